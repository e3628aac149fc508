"""Which weights of a model are pruned or clustered: by default, with `include` and `exclude`."""

import fnmatch
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from accel_tf.layers import walk
from accel_tf.report import shorten

# Reasons not to prune a weight that are the user's, not the weight's.
UNSELECTED = ("excluded", "not included")


class Weight(NamedTuple):
    """A weight of a model with the layer that owns it; `reason` says why not to prune it, or ""."""

    path: str
    layer: keras.Layer
    variable: Any
    reason: str


def weights_of(model: keras.Model, include=None, exclude=None) -> list[Weight]:
    """Returns each weight of `model` once, with the reason not to prune it, if there is one.

    By default the kernels of rank 2 and more are pruned: those of Dense, EinsumDense, convolutions
    and recurrent cells. Depthwise kernels are few weights, each of which is all that a channel has;
    the rows of an embedding are looked up, not multiplied; both are left to an explicit choice.

    Args:
        model: A built Keras model.
        include: A selector, or a sequence of them: only layers that match, and the layers below
            them, are pruned. A layer that matches itself, rather than by its parent, gives up all
            its trainable weights of rank ≥ 2, whatever they are, except biases. A selector is a
            layer, a layer class, a name or path with the wildcards `*` and `?`, or a function of
            path and layer.
        exclude: The same; layers that match and the layers below them are left alone.

    Raises:
        ValueError: A selector matches no layer.
    """
    layers = [(model.name, model), *walk(model)]
    included, excluded = Selection(include, layers), Selection(exclude, layers)
    # Depth first, so that the innermost layer that has a weight is the last to claim it.
    owner = {id(v): (path, layer) for path, layer in layers for v in layer.weights}

    def weight(v):
        path, layer = owner[id(v)]
        if layer in excluded:
            reason = UNSELECTED[0]
        elif include is not None and layer not in included:
            reason = UNSELECTED[1]
        else:
            reason = _reason(v, layer, explicit=included.names(layer))
        return Weight(path, layer, v, reason)

    return [weight(v) for v in {id(v): v for v in model.weights}.values()]


def is_kernel(weight: Weight) -> bool:
    """Whether a weight is pruned by default, or would be if it were not frozen or excluded."""
    return len(weight.variable.shape) >= 2 and not _unusual(weight.variable, weight.layer)


def _reason(v, layer, explicit: bool) -> str:
    if len(v.shape) < 2:
        return "no weight of rank ≥ 2"
    if not v.trainable:
        return "frozen: no optimizer will keep its constraint; set trainable = True before"
    if not keras.backend.is_float_dtype(v.dtype):
        return f"{v.dtype} weights, not floating-point ones"
    if v.name == "bias":  # of rank 2 in attention and in GRUs
        return "a bias, which is added, not multiplied"
    return "" if explicit else _unusual(v, layer)


def _unusual(v, layer) -> str:
    kinds = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
    one_input_each = getattr(layer, "groups", 1) > 1 and v.shape[-2] == 1
    if isinstance(layer, kinds) or v.name == "depthwise_kernel" or one_input_each:
        return "a depthwise kernel, few weights that all matter; name it in include if you want it"
    if not v.name.endswith("kernel"):
        return f"{v.name} is not a kernel; name its layer in include if you want it"
    return ""


class Selection:
    """The layers that selectors match, and all below them, under whichever parent they are shared."""

    def __init__(self, selectors, layers):
        if selectors is None:
            selectors = []
        elif isinstance(selectors, str) or not isinstance(selectors, Sequence):
            selectors = [selectors]
        # By identity: in subclassed models neighbours may have the same name, hence the same path.
        self._named, self._below = set(), set()
        for selector in selectors:
            found = [layer for path, layer in layers if _matches(selector, path, layer)]
            if not found:
                raise ValueError(
                    f"No layer matches {selector!r}. A selector is a layer, a layer class, a name "
                    "or path with wildcards, or a function (path, layer) -> bool. The layers are: "
                    f"{shorten((path for path, _ in layers[1:]), 20)}."
                )
            self._named |= {id(layer) for layer in found}
            self._below |= {id(below) for layer in found for _, below in walk(layer)}

    def names(self, layer) -> bool:
        """Returns whether a selector matches `layer` itself."""
        return id(layer) in self._named

    def __contains__(self, layer):
        return self.names(layer) or id(layer) in self._below


def _matches(selector, path, layer) -> bool:
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(name, selector) for name in (path, layer.name))
    if isinstance(selector, type):
        return isinstance(layer, selector)
    if isinstance(selector, keras.Layer):
        return layer is selector
    if callable(selector):
        return bool(selector(path, layer))
    raise ValueError(
        "A selector is a layer, a layer class, a name or path with wildcards, or a function "
        f"(path, layer) -> bool. Received: {selector!r}"
    )
