"""Fusion of layers: what follows a kernel becomes part of it, so that the model has less to do.

In inference a BatchNormalization multiplies each channel by a number and adds another one. So can the
kernel and the bias of the layer before it, and nothing is left of the normalization. An activation
that is a layer of its own becomes that of the layer before it, which may compute it in the same pass.
"""

from collections import Counter
from typing import NamedTuple

import keras
import numpy as np

from . import layers
from .report import Entry, Report, attach


def _last(kernel, factor):
    return kernel * factor


def _transposed(kernel, factor):  # (..., out, in)
    return kernel * factor[:, None]


def _depthwise(kernel, factor):  # (..., in, multiplier), whose outputs are numbered in this order
    return kernel * factor.reshape(kernel.shape[-2:])


# For each type of layer the name of the kernel whose outputs are channels, and how to scale them.
_KERNELS = {
    keras.layers.Dense: ("kernel", _last),
    keras.layers.Conv1D: ("kernel", _last),
    keras.layers.Conv2D: ("kernel", _last),
    keras.layers.Conv3D: ("kernel", _last),
    keras.layers.Conv1DTranspose: ("kernel", _transposed),
    keras.layers.Conv2DTranspose: ("kernel", _transposed),
    keras.layers.Conv3DTranspose: ("kernel", _transposed),
    keras.layers.DepthwiseConv1D: ("kernel", _depthwise),
    keras.layers.DepthwiseConv2D: ("kernel", _depthwise),
    keras.layers.SeparableConv1D: ("pointwise_kernel", _last),
    keras.layers.SeparableConv2D: ("pointwise_kernel", _last),
}


def fuse(model: keras.Model, *, verify: bool = True) -> keras.Model:
    """Returns a copy of a model with normalizations and activations fused into the kernels before.

    A `BatchNormalization` behind a `Dense`, convolution, transposed, depthwise or separable
    convolution is folded into its kernel and bias. A `ReLU` or `Activation` layer behind one of these,
    or behind the normalization, becomes the layer's `activation`. Of a `SpectralNormalization` the layer
    inside remains, whose kernel it changes in training only. Nested models are descended into, and
    zeros of kernels stay zeros.

    The new model computes the same function in inference, up to rounding. It is not compiled. In
    training, statistics that were folded are those of the moment, and no longer updated.

    `accel_tf.report_of(new_model)` tells what became of each normalization and activation, and why.

    A layer that cannot be copied, as its configuration does not make it again, is shared by both models,
    and the report says so.

    Args:
        model: A built functional or sequential model.
        verify: Whether to compare the new model with `model` on a few samples made from its input
            specification.

    Returns:
        A new model of the same class and name, its layers named as before.

    Raises:
        ValueError: `model` is not built, or it is subclassed; or the new model does not compute what
            `model` does, which is an error in accel_tf or in a custom layer.

    Example:

    >>> import keras, accel_tf as at
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)),
    ...     keras.layers.Conv2D(4, 3, use_bias=False),
    ...     keras.layers.BatchNormalization(),
    ...     keras.layers.ReLU(),
    ... ])
    >>> [type(layer).__name__ for layer in at.fuse(model).layers]
    ['Conv2D']

    Reference: B. Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2, equation 14.
    """
    layers.require_model(model, "fuse")
    shared, done = [], []

    def on_failure(path):
        shared.append(Entry(path, layers.NOT_COPIED))

    bare = _without_wrappers(model, on_failure, done)
    paths = {id(layer): path for path, layer in layers.walk(bare)}
    plan = _Plan(bare)

    def replace(path, layer):
        if id(layer) in plan.gone:
            return layers.REMOVED
        chain = plan.chains.get(id(layer))
        return None if chain is None else chain.fused()

    new_model = layers.rebuild(bare, replace, on_failure=on_failure)
    done += [Entry(paths[key], chain.note) for key, chain in plan.chains.items()]
    skipped = [Entry(paths[key], note) for key, note in plan.skipped.items()]
    shared = list(dict.fromkeys(shared))
    note = layers.require_same("fuse", model, new_model) if verify else ""
    attach(new_model, Report("fuse", tuple(done), (*skipped, *shared), note))
    return new_model


def _without_wrappers(model, on_failure, done) -> keras.Model:
    """Returns a model without layers that change a kernel in training only, `model` if it has none."""

    def replace(path, layer):
        if type(layer) is not keras.layers.SpectralNormalization:
            return None
        inner = layer.layer
        new = layers.anew(inner, path, name=layer.name)
        new.build_from_config(inner.get_build_config())
        layers.copy_state(inner, new, path)
        new.trainable = layer.trainable
        done.append(Entry(path, f"is {type(inner).__name__} alone, as it computes in inference"))
        return new

    wrappers = (type(x) is keras.layers.SpectralNormalization for _, x in layers.walk(model))
    return layers.rebuild(model, replace, on_failure=on_failure) if any(wrappers) else model


class _Chain(NamedTuple):
    """A layer with a kernel, and those behind it that become part of it."""

    layer: keras.Layer
    normalization: keras.layers.BatchNormalization | None
    activation: keras.Layer | None

    @property
    def note(self) -> str:
        parts = []
        if self.normalization is not None:
            parts.append(f"takes in {self.normalization.name!r}")
        if self.activation is not None:
            parts.append(f"computes {self.activation.name!r}")
        return " and ".join(parts)

    def fused(self) -> keras.Layer:
        layer, array = self.layer, keras.ops.convert_to_numpy
        config = layer.get_config()
        if self.normalization is not None:
            config["use_bias"] = True
        if self.activation is not None:
            config["activation"] = keras.activations.serialize(_function(self.activation))
        new = type(layer).from_config(config)
        new.build_from_config(layer.get_build_config())
        new.trainable = layer.trainable
        if self.normalization is None:
            layers.copy_state(layer, new, layer.name)
            return new
        weights = {v.name: array(v) for v in layer.weights}
        name, scale = _KERNELS[type(layer)]
        factor, shift = _affine(self.normalization)
        bias = weights.get("bias", 0.0)
        weights[name] = scale(weights[name].astype(np.float64), factor)
        weights["bias"] = bias * factor + shift
        for variable in new.weights:
            variable.assign(weights[variable.name].astype(variable.dtype))
        return new


class _Plan:
    """Which layers are fused, and which are not, and why."""

    def __init__(self, model):
        self.chains: dict[int, _Chain] = {}
        self.gone: set[int] = set()
        self.skipped: dict[int, str] = {}
        graphs = [model, *(sub for _, sub in layers.walk(model) if layers.has_graph(sub))]
        # A list, not a generator: a subclassed model raises here.
        calls = [layers.calls(graph) for graph in graphs]
        self._uses = Counter(id(call.layer) for each in calls for call in each)
        for graph, each in zip(graphs, calls, strict=True):
            self._follow(each, {id(tensor) for tensor in graph.outputs})
        for call in (call for each in calls for call in each):
            if (
                type(call.layer) is keras.layers.BatchNormalization
                and id(call.layer) not in self.gone
            ):
                reason = "no kernel stands alone before it, whose outputs only it reads"
                self.skipped.setdefault(id(call.layer), reason)

    def _follow(self, calls, ends):
        readers = {}
        for call in calls:
            for tensor in call.inputs:
                readers.setdefault(id(tensor), []).append(call.layer)
        produced = {id(call.layer): call.outputs[0] for call in calls}

        def reader(layer):
            """The one layer that reads the output of `layer`, if there is one, of one use."""
            tensor = produced[id(layer)]
            found = readers.get(id(tensor), [])
            if len(found) != 1 or id(tensor) in ends or self._uses[id(found[0])] != 1:
                return None
            return found[0]

        for layer in (call.layer for call in calls):
            if type(layer) not in _KERNELS or self._uses[id(layer)] != 1:
                continue
            behind = reader(layer)
            normalization = activation = None
            if type(behind) is keras.layers.BatchNormalization:
                reason = _obstacle(layer, behind)
                if reason is not None:
                    self.skipped[id(behind)] = reason
                    continue
                normalization, behind = behind, reader(behind)
            if _function(behind) is not None and layer.activation is keras.activations.linear:
                activation = behind
            if normalization is not None or activation is not None:
                self.chains[id(layer)] = _Chain(layer, normalization, activation)
                self.gone |= {id(x) for x in (normalization, activation) if x is not None}


def _obstacle(layer, normalization) -> str | None:
    """Why `normalization` cannot be folded into `layer`; None if it can."""
    if layer.activation is not keras.activations.linear:
        return f"the activation of {layer.name!r} comes before it"
    if getattr(layer, "quantization_mode", None):
        return f"the kernel of {layer.name!r} is quantized ({layer.quantization_mode})"
    if getattr(layer, "lora_enabled", False):
        return f"{layer.name!r} carries a LoRA update; merge it into the kernel first"
    axis, ndim = normalization.axis, len(layer.output.shape)
    channels = 1 if getattr(layer, "data_format", "") == "channels_first" else ndim - 1
    if axis % ndim != channels:
        return f"it normalizes axis {axis}; the channels of {layer.name!r} are axis {channels}"
    return None


def _affine(normalization) -> tuple[np.ndarray, np.ndarray]:
    """What a BatchNormalization multiplies each channel by in inference, and what it adds."""
    array = keras.ops.convert_to_numpy
    variance = array(normalization.moving_variance).astype(np.float64)
    factor = 1 / np.sqrt(variance + normalization.epsilon)
    if normalization.scale:
        factor = factor * array(normalization.gamma)
    shift = -factor * array(normalization.moving_mean)
    if normalization.center:
        shift = shift + array(normalization.beta)
    return factor, shift


def _function(layer):
    """The function that an activation layer applies, where a kernel's `activation` may be that too."""
    if type(layer) is keras.layers.Activation:
        return layer.activation
    if type(layer) is keras.layers.ReLU and not layer.negative_slope and not layer.threshold:
        return {None: keras.activations.relu, 6: keras.activations.relu6}.get(layer.max_value)
    return None
