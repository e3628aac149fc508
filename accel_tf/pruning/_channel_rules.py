"""How each kind of layer treats channels: which have to go together, and which are constant.

A channel is one index of a tensor's last axis. A rule knows two things about a call of a layer:
`link` names the channels of its output, given those of its inputs, and ties those that can only be
removed together; `value` says which channels of the output are the same number everywhere, whatever
the model's input is. Layers with no rule keep all their channels.

The simplest rule, of layers that treat each channel by itself and keep constants, is `Channelwise`.
"""

import keras
import numpy as np
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from keras.src.layers.convolutional.base_conv import BaseConv
from keras.src.layers.convolutional.base_conv_transpose import BaseConvTranspose
from keras.src.layers.convolutional.base_separable_conv import BaseSeparableConv
from keras.src.ops import nn as _nn
from keras.src.ops import numpy as _np

_L = keras.layers


class Channelwise:
    """Each channel of the output is a function of the same channel of the input."""

    def link(self, graph, part, call, xs):
        """Returns the channels of the output, an int array, or a sentence: why it has no rule.

        Args:
            graph: The `ChannelGraph`, which makes, ties and pins channels.
            part: The graph's `Part` for the layer, whose `slots` a layer with weights fills in.
            call: The `layers.Call`.
            xs: The channels of each input, int arrays.
        """
        return xs[0]

    def value(self, part, call, xs):
        """Returns the output's channels that are constant, a float array with NaN for the others."""
        return xs[0]


class Elementwise(Channelwise):
    """An activation, or another function of single elements."""

    def link(self, graph, part, call, xs):
        if not is_elementwise(call.layer):
            return f"{call.layer.name!r} makes each output of all channels"
        return xs[0]

    def value(self, part, call, xs):
        return apply(call.layer, xs[0])


class Padded(Channelwise):
    """Zeros are put around, next to which no other number is constant."""

    def value(self, part, call, xs):
        return np.where(xs[0] == 0, 0.0, np.nan)


class Rescale(Elementwise):
    """`x * scale + offset` of two numbers."""

    def link(self, graph, part, call, xs):
        if np.size(call.layer.scale) > 1 or np.size(call.layer.offset) > 1:
            return "it scales each channel by a number of its configuration"
        return xs[0]


class Merge(Channelwise):
    """Elements of several tensors are combined: their channels live or die together."""

    def __init__(self, combine):
        self.combine = combine

    def link(self, graph, part, call, xs):
        arguments = _arguments(call)
        if any(np.size(a) > 1 for a in arguments if not isinstance(a, keras.KerasTensor)):
            return "it combines channels with an array of constants"
        width = max(len(x) for x in xs)
        first = next(x for x in xs if len(x) == width)
        for x in xs:
            if len(x) == width:
                graph.tie(first, x)
            else:
                graph.pin(x, f"one channel meets {width} in {call.layer.name!r}")
        return first

    def value(self, part, call, xs):
        tensors = iter(xs)
        values = [
            next(tensors) if isinstance(a, keras.KerasTensor) else np.float64(a)
            for a in _arguments(call)
        ]
        return np.array(self.combine(call.layer, values), np.float64)


class Concatenate(Channelwise):
    """Channels side by side, or positions one behind the other."""

    def link(self, graph, part, call, xs):
        if self._joins_channels(call):
            return np.concatenate(xs)
        for x in xs[1:]:
            graph.tie(xs[0], x)
        return xs[0]

    def value(self, part, call, xs):
        return np.concatenate(xs) if self._joins_channels(call) else _all_equal(np.stack(xs))

    def _joins_channels(self, call):
        return call.layer.axis in (-1, len(call.outputs[0].shape) - 1)


class Reshape(Channelwise):
    """Flatten and Reshape: a channel becomes several, or several positions' become one."""

    def link(self, graph, part, call, xs):
        (x,), shape = xs, call.outputs[0].shape
        n_in, n_out = len(x), shape[-1]
        if n_in % n_out == 0:
            rows = x.reshape(-1, n_out)
            for row in rows[1:]:
                graph.tie(rows[0], row)
            out = rows[0]
        elif n_out % n_in == 0:
            out = np.tile(x, n_out // n_in)
        else:
            return f"{n_in} channels become {n_out}, across their bounds"
        if type(call.layer) is _L.Reshape:
            lead = [-1 if size is None else size for size in shape[1:-1]]
            part.resize = lambda count: {"target_shape": (*lead, count(out))}
        return out

    def value(self, part, call, xs):
        (x,), n_out = xs, call.outputs[0].shape[-1]
        if len(x) % n_out == 0:
            return _all_equal(x.reshape(-1, n_out))
        return np.tile(x, n_out // len(x))


class PerChannel(Channelwise):
    """Layers with weights of one number per channel: BatchNormalization, LayerScale, PReLU."""

    def link(self, graph, part, call, xs):
        layer, (x,), last = call.layer, xs, len(call.inputs[0].shape) - 1
        if type(layer) is _L.BatchNormalization and layer.axis not in (-1, last):
            return f"it normalizes axis {layer.axis}, which is not the last"
        for w in layer.weights:
            if w.shape and w.shape[-1] == len(x):
                # A variance of zero would be divided by; a mean of zero keeps zeros zero.
                part.slot(w, len(w.shape) - 1, x, zero=w.name != "moving_variance")
        if type(layer) is LayerScale:
            part.resize = lambda count: {"projection_dim": count(x)}
        return x

    def value(self, part, call, xs):
        layer, (x,) = call.layer, xs
        if type(layer) is _L.PReLU:  # its slopes vary with the position
            return np.where(x == 0, 0.0, np.nan)
        if type(layer) is LayerScale:
            return _product([x, _array(layer.gamma)])
        scale = 1 / np.sqrt(_array(layer.moving_variance) + layer.epsilon)
        scale = scale * _array(layer.gamma) if layer.scale else scale
        shift = _array(layer.beta) if layer.center else 0.0
        return _product([x - _array(layer.moving_mean), scale]) + shift


class Mix(Channelwise):
    """Dense, convolutions and separable ones: each output channel is a sum over the inputs'."""

    def link(self, graph, part, call, xs):
        layer, (x,) = call.layer, xs
        if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
            return "its kernel is quantized, or carries a LoRA update"
        groups = getattr(layer, "groups", 1)
        out = graph.new(call.outputs[0].shape[-1])
        part.reads, part.makes = x, out
        if type(layer) is _L.Dense:
            part.resize = lambda count: {"units": count(out)}
        else:
            part.resize = lambda count: {"filters": count(out)}
        if isinstance(layer, BaseSeparableConv):
            depthwise, pointwise = layer.depthwise_kernel, layer.pointwise_kernel
            part.slot(depthwise, len(depthwise.shape) - 2, x)
            part.slot(pointwise, len(pointwise.shape) - 2, np.repeat(x, depthwise.shape[-1]))
            part.slot(pointwise, len(pointwise.shape) - 1, out)
        else:
            # Each group has to keep as many channels as the others: those of one place go together.
            for tied in (x, out) if groups > 1 else ():
                for segment in tied.reshape(groups, -1)[1:]:
                    graph.tie(tied[: len(segment)], segment)
            last = len(layer.kernel.shape) - 1
            inputs, outputs = last - 1, last
            if isinstance(layer, BaseConvTranspose):
                inputs, outputs = outputs, inputs
            part.slot(layer.kernel, inputs, x[: len(x) // groups])
            part.slot(layer.kernel, outputs, out)
        _finish(graph, part, layer, out)
        return out

    def value(self, part, call, xs):
        return _summed(part, call.layer, xs[0])


class Depthwise(Channelwise):
    """Each input channel makes `depth_multiplier` output channels of its own."""

    def link(self, graph, part, call, xs):
        layer, (x,) = call.layer, xs
        out = np.repeat(x, call.outputs[0].shape[-1] // len(x))
        part.makes = out
        last = len(layer.kernel.shape) - 1
        if isinstance(layer, BaseConv):  # a convolution with as many groups as channels
            part.slot(layer.kernel, last, out)
            part.resize = lambda count: {"filters": count(out), "groups": count(x)}
        else:
            part.slot(layer.kernel, last - 1, x)
        _finish(graph, part, layer, out)
        return out

    def value(self, part, call, xs):
        return _summed(part, call.layer, xs[0])


class Lookup(Channelwise):
    """Embedding: it makes channels out of positions."""

    def link(self, graph, part, call, xs):
        layer = call.layer
        if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
            return "its table is quantized, or carries a LoRA update"
        part.makes = out = graph.new(call.outputs[0].shape[-1])
        part.slot(layer.embeddings, 1, out)
        part.resize = lambda count: {"output_dim": count(out)}
        return out

    def value(self, part, call, xs):
        return np.where(np.any(_array(call.layer.embeddings) != 0, axis=0), np.nan, 0.0)


class Response:
    """What a sum over channels makes of constant inputs.

    Attributes:
        gain: The kernel summed over its positions, of shape (groups, inputs, outputs) per group.
        touched: Whether any weight between an input and an output is not zero; the same shape.
        exact: Whether a constant input makes a constant output. With padding it does not at the
            border; transposed, it depends on the position how many inputs meet in an output.
    """

    def __init__(self, layer):
        if isinstance(layer, BaseSeparableConv):
            depthwise, pointwise = _array(layer.depthwise_kernel), _array(layer.pointwise_kernel)
            size = depthwise.shape[:-2]
            depthwise = depthwise.reshape(-1, *depthwise.shape[-2:])
            pointwise = pointwise.reshape(*depthwise.shape[1:], -1)  # (in, multiplier, out)
            gain = np.einsum("im,imo->io", depthwise.sum(0), pointwise)[None]
            some = np.any(depthwise, axis=0)[..., None] & (pointwise != 0)
            touched = np.any(some, axis=1)[None]
        else:
            kernel = _array(layer.kernel)
            if isinstance(layer, BaseConvTranspose):
                kernel = kernel.swapaxes(-1, -2)
            size = kernel.shape[:-2]
            flat = kernel.reshape(-1, *kernel.shape[-2:])
            gain, touched = flat.sum(0), np.any(flat, axis=0)
            if hasattr(layer, "depth_multiplier"):  # depthwise: (in, multiplier)
                gain, touched = gain[:, None], touched[:, None]
            else:
                split = (gain.shape[0], getattr(layer, "groups", 1), -1)
                gain, touched = (a.reshape(split).swapaxes(0, 1) for a in (gain, touched))
        self.gain, self.touched = gain, touched
        padded = getattr(layer, "padding", "valid") != "valid" and np.prod(size) > 1
        self.exact = not padded and not isinstance(layer, BaseConvTranspose)


def rule_of(layer, xs) -> Channelwise | str:
    """Returns the rule of a layer or operation, or why there is none.

    Args:
        layer: A Keras layer or operation.
        xs: The channels of its inputs; `None` for an input that has no channels.
    """
    if getattr(layer, "data_format", None) == "channels_first":
        return "its channels are not the last axis (data_format='channels_first')"
    kind = type(layer)
    if kind is _L.Embedding:
        return _EMBEDDING
    if any(x is None for x in xs):
        return "the number of channels is not known"
    if isinstance(layer, BaseConv) and kind in _MIX and 1 < layer.groups == len(xs[0]):
        return _DEPTHWISE
    if kind in _RULES:
        return _RULES[kind]
    if kind in (_L.LayerNormalization, _L.GroupNormalization, _L.RMSNormalization):
        return f"{kind.__name__} takes its statistics over the channels: fewer would change them"
    if kind is _L.Normalization:
        return "Normalization scales each channel by a number of its configuration"
    return f"{kind.__name__} has no rule that says what becomes of its channels"


def is_elementwise(function) -> bool:
    """Whether each element of `function(x)` depends on the same element of x alone, by trial."""
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(2, 6)
    whole, part = np.asarray(function(x)), np.asarray(function(x[:, :3]))
    return whole.shape == x.shape and np.allclose(whole[:, :3], part, atol=1e-6)


def apply(function, x):
    """Returns `function(x)` of constants, NaN where x is."""
    known = ~np.isnan(x)
    y = np.asarray(function(np.where(known, x, 0)[None].astype(np.float32)), np.float64)[0]
    return np.where(known, y, np.nan)


def _finish(graph, part, layer, out):
    if layer.use_bias:
        part.slot(layer.bias, 0, out)
    if not is_elementwise(layer.activation):
        name = getattr(layer.activation, "__name__", layer.activation)
        graph.pin(out, f"its activation, {name}, makes each output of all channels")


def _summed(part, layer, x):
    response = part.response
    groups, inputs, _ = response.gain.shape
    x = x.reshape(groups, inputs)
    known = x == 0 if not response.exact else ~np.isnan(x)
    unknown = np.any(~known[..., None] & response.touched, axis=1).ravel()
    total = np.einsum("gi,gio->go", np.where(known, x, 0), response.gain).ravel()
    if layer.use_bias:
        total = total + _array(layer.bias)
    return apply(layer.activation, np.where(unknown, np.nan, total))


def _arguments(call) -> list:
    """The tensors and the numbers that the call was given, in their order."""
    operation, index, _ = call.outputs[0]._keras_history
    given = operation._inbound_nodes[index].arguments
    return [
        a
        for a in keras.tree.flatten((given.args, given.kwargs))
        if isinstance(a, keras.KerasTensor) or (a is not None and not isinstance(a, (bool, str)))
    ]


def _product(factors):
    """The product of constants: zero is zero, whatever the other factors are."""
    zero = np.any(np.stack(np.broadcast_arrays(*[f == 0 for f in factors])), axis=0)
    return np.where(zero, 0.0, np.prod(np.stack(np.broadcast_arrays(*factors)), axis=0))


def _all_equal(rows):
    return np.where(np.all(rows == rows[0], axis=0), rows[0], np.nan)


def _array(variable):
    return keras.ops.convert_to_numpy(variable).astype(np.float64)


def _every(module, *names) -> list:
    return [getattr(module, name) for name in names if hasattr(module, name)]


_DIMS = ("1D", "2D", "3D")
_EMBEDDING, _DEPTHWISE = Lookup(), Depthwise()
_MIX = [_L.Dense, *(getattr(_L, f"Conv{d}{t}") for d in _DIMS for t in ("", "Transpose"))]
_MIX += [_L.SeparableConv1D, _L.SeparableConv2D]
_KEEP = _every(
    _L,
    *(f"{name}{d}" for d in _DIMS for name in ("MaxPooling", "AveragePooling", "Cropping")),
    *(f"Global{name}Pooling{d}" for d in _DIMS for name in ("Max", "Average")),
    *(f"{name}{d}" for d in _DIMS for name in ("UpSampling", "SpatialDropout")),
    *("Dropout", "GaussianDropout", "GaussianNoise", "Identity", "ActivityRegularization"),
    "RepeatVector",
)
_UNARY = [
    *_every(_L, "Activation", "ReLU", "LeakyReLU", "ELU"),
    *_every(_nn, "Relu", "Relu6", "Sigmoid", "Softplus", "Softsign", "Silu", "LogSigmoid"),
    *_every(_nn, "LeakyRelu", "HardSigmoid", "HardSilu", "Elu", "Selu", "Gelu", "Celu", "HardTanh"),
    *_every(_np, "Tanh", "Absolute", "Square", "Exp", "Negative", "Sqrt"),
]
_COMBINE = {
    **dict.fromkeys((_L.Add, _np.Add), lambda _, xs: sum(xs)),
    **dict.fromkeys((_L.Multiply, _np.Multiply), lambda _, xs: _product(xs)),
    **dict.fromkeys((_L.Subtract, _np.Subtract), lambda _, xs: xs[0] - xs[1]),
    **dict.fromkeys((_L.Maximum, _np.Maximum), lambda _, xs: np.maximum.reduce(xs)),
    **dict.fromkeys((_L.Minimum, _np.Minimum), lambda _, xs: np.minimum.reduce(xs)),
    _L.Average: lambda _, xs: sum(xs) / len(xs),
    CustomScaleLayer: lambda layer, xs: xs[0] + layer.scale * xs[1],
}
_RULES = {
    **dict.fromkeys([*_KEEP, StochasticDepth], Channelwise()),
    **dict.fromkeys(_UNARY, Elementwise()),
    **dict.fromkeys(_every(_L, *(f"ZeroPadding{d}" for d in _DIMS)), Padded()),
    **dict.fromkeys([_L.Flatten, _L.Reshape], Reshape()),
    **dict.fromkeys([_L.BatchNormalization, _L.PReLU, LayerScale], PerChannel()),
    **dict.fromkeys([_L.DepthwiseConv1D, _L.DepthwiseConv2D], _DEPTHWISE),
    **dict.fromkeys(_MIX, Mix()),
    **{kind: Merge(combine) for kind, combine in _COMBINE.items()},
    _L.Rescaling: Rescale(),
    _L.Concatenate: Concatenate(),
    _np.Concatenate: Concatenate(),
}
