"""Which layers are quantized how: one rule for each type of layer and each operator between layers."""

import functools
from typing import NamedTuple

import keras
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from keras.src.ops import core as core_ops  # Keras exports the functions, not the operations.
from keras.src.ops import nn as nn_ops
from keras.src.ops import numpy as numpy_ops

from accel_tf import layers as graphs
from accel_tf.quantization import (
    _activations,
    _affine,
    _composite,
    _embedding,
    _layers,
    _recurrent,
    _same_grid,
    _softmax,
)

_L = keras.layers


class Rule(NamedTuple):
    """How a type of layer is quantized.

    Attributes:
        kind: `"kernel"`: a product with weights, which rounds once at its end; `"weights"`: the
            same, but nothing behind it becomes part of it; `"affine"`: a factor and an offset for
            each channel; `"activation"`; `"arithmetic"`: rounds at its end; `"grid"`: its output
            is on its input's grid; `"identity"`: nothing to compute in inference; `"float"`: LiteRT
            has no integer kernel, so that it stays as it is.
        wrapper: The class that runs it on the grid; `None` if it is left as it is.
        fuses: Whether its kernel takes in a ReLU behind it.
    """

    kind: str
    wrapper: type | None = None
    fuses: bool = False


_KERNEL = Rule("kernel", _layers.QuantizedWeights, fuses=True)
_AFFINE = Rule("affine", _affine.QuantizedAffine, fuses=True)
_ACTIVATION = Rule("activation", _layers.QuantizedLayer)
_SUM = Rule("arithmetic", _layers.QuantizedLayer, fuses=True)
_ARITHMETIC = Rule("arithmetic", _layers.QuantizedLayer)
_RESHAPE = Rule("grid", _same_grid.QuantizedReshape)
_GRID = Rule("grid", _same_grid.QuantizedGrid)
_IDENTITY = Rule("identity", _same_grid.QuantizedIdentity)
OWN_IDENTITY = Rule("identity")  # of a layer that may not tell the shape of its output
_NORMALIZATION = Rule("weights", _composite.QuantizedNormalization)
_RECURRENT = Rule("grid", _recurrent.QuantizedRecurrent)
_FLOAT = Rule("float")

_OPERATOR = _composite.QuantizedOperator


def _layers_of(*names):
    """Returns those layers of Keras that this version has."""
    return [getattr(_L, name) for name in names if hasattr(_L, name)]


RULES: dict[type, Rule] = {
    **dict.fromkeys(
        _layers_of(
            "Dense", "EinsumDense", "Conv1D", "Conv2D", "DepthwiseConv1D", "DepthwiseConv2D"
        ),
        _KERNEL,
    ),
    **dict.fromkeys(
        _layers_of("SeparableConv1D", "SeparableConv2D"),
        Rule("kernel", _layers.QuantizedSeparable, fuses=True),
    ),
    # The converter does not fold a normalization into these.
    **dict.fromkeys(
        _layers_of("Conv1DTranspose", "Conv2DTranspose"),
        Rule("weights", _layers.QuantizedWeights, fuses=True),
    ),
    **dict.fromkeys([_L.BatchNormalization, _L.Rescaling, _L.Normalization, LayerScale], _AFFINE),
    **dict.fromkeys(_layers_of("Activation", "ReLU", "Softmax", "LeakyReLU", "ELU"), _ACTIVATION),
    _L.PReLU: Rule("weights", _layers.QuantizedPReLU),
    **dict.fromkeys(
        _layers_of("Embedding", "ReversibleEmbedding"), Rule("grid", _embedding.QuantizedEmbedding)
    ),
    _L.LayerNormalization: _NORMALIZATION,
    _L.MultiHeadAttention: Rule("weights", _composite.QuantizedAttention),
    _softmax.MaskedSoftmax: Rule("grid", _softmax.QuantizedMaskedSoftmax),
    **dict.fromkeys(_layers_of("LSTM", "GRU", "SimpleRNN"), _RECURRENT),
    **dict.fromkeys([_L.Add, _L.Subtract, _L.Multiply], _SUM),
    **dict.fromkeys([_L.Maximum, _L.Minimum], _ARITHMETIC),
    CustomScaleLayer: Rule("arithmetic", _composite.QuantizedScaledSum, fuses=True),
    **dict.fromkeys(
        _layers_of("Concatenate", "GlobalAveragePooling1D", "GlobalAveragePooling2D"), _ARITHMETIC
    ),
    **dict.fromkeys([_L.Flatten, _L.Reshape], _RESHAPE),
    **dict.fromkeys(
        _layers_of(
            "MaxPooling1D",
            "MaxPooling2D",
            "GlobalMaxPooling1D",
            "GlobalMaxPooling2D",
            "ZeroPadding1D",
            "ZeroPadding2D",
            "Cropping1D",
            "Cropping2D",
            "RandomCrop",
            "Permute",
            "RepeatVector",
            "UpSampling1D",
        ),
        _GRID,
    ),
    **dict.fromkeys(
        _layers_of("AveragePooling1D", "AveragePooling2D"),
        Rule("grid", _same_grid.QuantizedAverage),
    ),
    **dict.fromkeys(
        _layers_of("UpSampling2D", "Resizing"), Rule("grid", _same_grid.QuantizedResize)
    ),
    **dict.fromkeys(
        _layers_of(
            "Dropout",
            "SpatialDropout1D",
            "SpatialDropout2D",
            "SpatialDropout3D",
            "GaussianNoise",
            "GaussianDropout",
            "AlphaDropout",
            "Identity",
            "ActivityRegularization",
            "RandomFlip",
            "RandomTranslation",
            "RandomRotation",
            "RandomZoom",
            "RandomContrast",
            "RandomBrightness",
            "RandomColorDegeneration",
            "RandomColorJitter",
            "RandomElasticTransform",
            "RandomErasing",
            "RandomGaussianBlur",
            "RandomGrayscale",
            "RandomHue",
            "RandomInvert",
            "RandomPerspective",
            "RandomPosterization",
            "RandomSaturation",
            "RandomSharpness",
            "RandomShear",
            "RandAugment",
            "AugMix",
        ),
        _IDENTITY,
    ),
    StochasticDepth: OWN_IDENTITY,
    graphs.WithMask: Rule("identity", _same_grid.QuantizedGrid),
    graphs.Repeated: Rule("grid", _same_grid.QuantizedRepeated),
    **dict.fromkeys(
        _layers_of(
            "Conv3D",
            "Conv3DTranspose",
            "MaxPooling3D",
            "AveragePooling3D",
            "GroupNormalization",
            "Masking",
            "RMSNormalization",
            "UnitNormalization",
        ),
        _FLOAT,
    ),
    **dict.fromkeys([numpy_ops.Add, numpy_ops.Subtract], Rule("arithmetic", _OPERATOR, fuses=True)),
    **dict.fromkeys(
        [
            numpy_ops.Absolute,
            numpy_ops.Abs,
            numpy_ops.Concatenate,
            numpy_ops.Divide,
            numpy_ops.Exp,
            numpy_ops.Matmul,
            numpy_ops.Maximum,
            numpy_ops.Mean,
            numpy_ops.Minimum,
            numpy_ops.Multiply,
            numpy_ops.Negative,
            numpy_ops.Stack,
            numpy_ops.TrueDivide,
        ],
        Rule("arithmetic", _OPERATOR),
    ),
    **dict.fromkeys(
        [
            core_ops.ConvertToTensor,
            numpy_ops.ExpandDims,
            numpy_ops.GetItem,
            numpy_ops.Max,
            numpy_ops.Min,
            numpy_ops.Reshape,
            numpy_ops.Split,
            numpy_ops.Squeeze,
            numpy_ops.Swapaxes,
            numpy_ops.Take,
            numpy_ops.Transpose,
        ],
        Rule("grid", _composite.QuantizedSameScale),
    ),
    **dict.fromkeys(
        [
            nn_ops.Elu,
            nn_ops.Gelu,
            nn_ops.HardSigmoid,
            nn_ops.HardSilu,
            nn_ops.LeakyRelu,
            nn_ops.LogSigmoid,
            nn_ops.LogSoftmax,
            nn_ops.Relu,
            nn_ops.Relu6,
            nn_ops.Selu,
            nn_ops.Sigmoid,
            nn_ops.Silu,
            nn_ops.Softmax,
            nn_ops.Softplus,
            nn_ops.Softsign,
            numpy_ops.Tanh,
        ],
        Rule("activation", _OPERATOR),
    ),
}


_ISLAND = Rule("arithmetic", _composite.QuantizedIsland)


def rule_of(layer) -> Rule | None:
    """Returns the rule for a layer or operator, `None` if there is none.

    An operator without a rule of its own computes in float between quantized tensors.
    """
    rule = RULES.get(type(layer))
    if type(layer) in _CHAINS and _terms(layer) > 2:
        return None  # The integer kernels take two tensors, see `graph_of`.
    if not isinstance(layer, keras.Layer):
        by_tensor = type(layer) in _DIVISIONS and not _divides_by_number(layer)
        return _ISLAND if rule is None or by_tensor else rule
    return _IDENTITY if rule is _ACTIVATION and _activations.name_of(layer) == "linear" else rule


# Layers that combine any number of tensors, by the operator that combines two.
_CHAINS = {
    _L.Add: keras.ops.add,
    _L.Maximum: keras.ops.maximum,
    _L.Minimum: keras.ops.minimum,
    _L.Multiply: keras.ops.multiply,
}
_DIVISIONS = (numpy_ops.Divide, numpy_ops.TrueDivide)


def _divides_by_number(operation) -> bool:
    """Whether an operator divides a tensor by a number, which is a product, and not one by a tensor."""
    numerator, denominator = operation._inbound_nodes[0].arguments.args[:2]
    tensors = [isinstance(x, keras.KerasTensor) for x in (numerator, denominator)]
    return tensors == [True, False]


def _is_masked(layer) -> bool:
    """Whether a layer is called with a tensor that has a mask."""
    tensors = [x for node in layer._inbound_nodes for x in node.input_tensors]
    return any(getattr(x, "_keras_mask", None) is not None for x in tensors)


def _terms(layer) -> int:
    """Returns how many tensors a layer or operator is called with at most; 0 if it is in no graph."""
    return max((len(node.input_tensors) for node in layer._inbound_nodes), default=0)


def graph_of(layer):
    """Returns what a layer without a rule computes, as a function of layers and operators.

    For a custom layer that is its `call`; for a layer that has no such form, `None`.
    """
    if isinstance(layer, _L.Multiply) and _is_masked(layer):
        return None  # Keras multiplies by 1 where one of several tensors is masked.
    if isinstance(layer, _L.Average):
        return lambda tensors: functools.reduce(keras.ops.add, tensors) * (1 / len(tensors))
    if type(layer) in _CHAINS:
        return lambda tensors: functools.reduce(_CHAINS[type(layer)], tensors)
    if isinstance(layer, _L.Bidirectional):
        return functools.partial(_both_ways, layer)
    if type(layer) in (_L.Attention, _L.AdditiveAttention):
        return functools.partial(_attention, layer)
    if isinstance(layer, _L.TimeDistributed) and isinstance(layer.layer, _L.Dense):
        return lambda x, **_: layer.layer(x)  # which works on the last axis anyway
    return layer.call


def _attention(layer, inputs, mask=None, training=None, use_causal_mask=False):
    """Computes an Attention or AdditiveAttention, with the softmax as a layer with a mask."""
    query, value, key = inputs[0], inputs[1], inputs[-1]
    query_mask, value_mask = mask[:2] if mask else (None, None)
    scores = layer._calculate_scores(query, key)
    mask = layer._calculate_score_mask(scores, value_mask, use_causal_mask)
    if mask is not None and len(mask.shape) == 2:
        mask = keras.ops.expand_dims(mask, -2)
    weights = _softmax.MaskedSoftmax(name="softmax")(scores, mask=mask)
    if layer.dropout:
        weights = _L.Dropout(layer.dropout, seed=layer.seed, name="dropout")(weights)
    y = keras.ops.matmul(weights, value)
    if query_mask is None:
        return y
    return keras.ops.where(keras.ops.expand_dims(query_mask, -1), y, 0.0)


def _both_ways(layer, x, mask=None, **_):
    ahead, back = layer.forward_layer(x, mask=mask), layer.backward_layer(x, mask=mask)
    if layer.return_sequences:
        back = keras.ops.take(back, list(reversed(range(x.shape[1]))), axis=1)
    if layer.merge_mode == "concat":
        return _L.Concatenate(name="merge")([ahead, back])
    if layer.merge_mode == "sum":
        return _L.Add(name="merge")([ahead, back])
    raise ValueError(f"merge_mode={layer.merge_mode!r} has no integer form.")


def lack_of_rule(layer, out: str) -> str:
    """Returns why a layer without a rule cannot be quantized, and what to write instead.

    Args:
        layer: A Keras layer in a graph.
        out: How to leave it in float, as a sentence without its full stop.
    """
    kind = type(layer).__name__
    if isinstance(layer, _L.SpectralNormalization):
        return f"{kind} changes its kernel in training; accel_tf.fuse(model) takes it away. {out}."
    function = graph_of(layer)
    if function is None:
        return (
            f"there is no integer form of {kind} for more than two tensors where one has a mask, whose "
            f"steps Keras replaces by 1. {out}."
        )
    if type(layer).__module__.startswith("keras."):
        return f"there is no integer form of {kind}. {out}."
    return (
        f"there is no integer form of {kind}, and it cannot be taken apart: "
        f"{graphs.why_kept(layer, function)}. {out}, or build the model from the layers that "
        "quantize_aware lists; a layer of your own can be made of those, of weights and of keras.ops, the "
        "same in training and inference."
    )


def obstacle(layer, inputs, scheme) -> str | None:
    """Returns what keeps a layer with a rule from being quantized, `None` if nothing does.

    Args:
        layer: The layer or operator.
        inputs: The tensors of its call.
        scheme: The scheme to quantize it with.
    """
    name = _activations.name_of(layer)
    if name is not None and name not in _activations.KNOWN and rule_of(layer).kind != "float":
        return f"its activation {name!r} is none of {', '.join(_activations.KNOWN)}"
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        return "the integer kernels are channels_last"
    if any(node.arguments.kwargs.get("reverse") for node in layer._inbound_nodes):
        return "it is called in reverse, which is a product with the table that it looks up"
    if isinstance(layer, _L.Embedding) and scheme.activation_bits:
        if keras.backend.is_float_dtype(inputs[0].dtype):
            return (
                "its ids are floats, and quantization would change them. Give the model integer ids: "
                "keras.Input(shape, dtype='int32')"
            )
    if not scheme.per_channel and rule_of(layer).kind == "affine":
        return (
            "it scales each channel by a number of its own, and per_channel=False has one scale for all. "
            "Fold it into the kernel before it with accel_tf.fuse(model), if there is one"
        )
    if not scheme.per_channel and isinstance(layer, _L.MultiHeadAttention):
        return "its kernels have a scale for each channel in the file, against per_channel=False"
    rank = len(inputs[0].shape)
    if isinstance(layer, _L.BatchNormalization | _L.Normalization | _L.LayerNormalization):
        axes = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
        if any(axis is not None and axis % rank != rank - 1 for axis in axes):
            return f"it normalizes axis {layer.axis} and not the last one"
    if isinstance(layer, _L.Resizing) and (
        layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio or layer.antialias
    ):
        return "it crops, pads or smooths besides resizing"
    if isinstance(layer, _L.UpSampling2D | _L.Resizing) and layer.interpolation not in (
        "nearest",
        "bilinear",
    ):
        return f"LiteRT resizes nearest or bilinear, not {layer.interpolation}"
    if isinstance(layer, _L.RNN):
        return _recurrent.obstacle(layer)
    if isinstance(layer, _L.MultiHeadAttention):
        return _composite.obstacle(layer, inputs)
    return None
