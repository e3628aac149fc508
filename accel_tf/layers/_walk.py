"""The layers of a model with their paths, and the calls in its graph."""

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import keras
from keras.src.models.functional import Functional  # Keras exports no public name for it.


def walk(model: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Yields each layer below `model` once, depth first, with its path.

    Nested models and the sublayers of wrappers and custom layers are descended into; a layer that
    is shared is yielded once, under the path at which it is met first.

    Args:
        model: A functional, sequential or subclassed model, or a layer.

    Yields:
        `(path, layer)`: the names from the model down, joined by `/`, and the layer.
    """
    seen = {id(model)}

    def below(parent, prefix):
        for layer in parent._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = prefix + layer.name
            yield path, layer
            yield from below(layer, path + "/")

    yield from below(model, "")


class Call(NamedTuple):
    """One call of a layer in a model's graph.

    Attributes:
        layer: The layer or operator.
        inputs: The tensors that it was called with, except for the masks of a layer.
        outputs: The tensors that it returned.
    """

    layer: keras.Operation
    inputs: tuple[keras.KerasTensor, ...]
    outputs: tuple[keras.KerasTensor, ...]


def calls(model: keras.Model) -> list[Call]:
    """Returns the calls in the graph of `model`, in an order in which they can be executed.

    A nested model is one call; its own graph is had by `calls` again. A shared layer occurs as
    often as it is called. Operators such as `x + y` between tensors occur too.

    Args:
        model: A built functional or sequential model.

    Raises:
        ValueError: `model` has no graph of layers, because it is subclassed.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if not isinstance(graph, Functional):
        raise ValueError(
            f"Model {model.name!r} ({type(model).__name__}) is subclassed: it has no graph of "
            "layers to follow. Make it one that has, with accel_tf.layers.functional(model, x), or "
            "apply the technique to the functional models inside it."
        )
    return [
        Call(node.operation, _inputs(node), tuple(node.outputs))
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]


def _inputs(node) -> tuple[keras.KerasTensor, ...]:
    """Returns the tensors of a call, without those that Keras or the user passed as masks."""
    if not isinstance(node.operation, keras.Layer):
        return tuple(node.input_tensors)
    args, kwargs = node.arguments.args, node.arguments.kwargs
    names = [*inspect.signature(node.operation.call).parameters]
    named = [*zip([*names, *[""] * len(args)], args, strict=False), *kwargs.items()]
    given = [x for name, x in named if name != "mask" and not name.endswith("_mask")]
    return tuple(x for x in keras.tree.flatten(given) if isinstance(x, keras.KerasTensor))


def has_graph(model) -> bool:
    """Whether a model is functional or sequential, so that `calls` can follow it."""
    return isinstance(model, (keras.Sequential, Functional))


def require_model(model, verb: str) -> None:
    """Raises a `ValueError` unless `model` is a built Keras 3 model.

    Args:
        model: What the user passed.
        verb: The verb that needs it, for the message.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"{verb} works on TensorFlow, and Keras runs on {keras.backend.backend()!r}. Set "
            'os.environ["KERAS_BACKEND"] = "tensorflow" before keras is imported.'
        )
    if not isinstance(model, keras.Model):
        legacy = type(model).__module__.startswith(("tf_keras", "tensorflow.python.keras"))
        hint = (
            " It is a legacy tf_keras model; convert it with accel_tf.interop.tfmot.from_tf_keras."
            if legacy
            else ""
        )
        raise ValueError(f"{verb} expects a keras.Model, received {type(model).__name__}.{hint}")
    if not model.built:
        raise ValueError(
            f"{verb} needs the weights of model {model.name!r}, which is not built yet. "
            "Call it on a batch, or call model.build(input_shape), first."
        )
