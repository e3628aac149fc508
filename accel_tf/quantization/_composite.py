"""Layers of several integer kernels: attention, scaled sums, and the operators between layers."""

import functools

import keras
import numpy as np
import tensorflow as tf
from keras.src.ops import math as math_ops
from keras.src.ops import numpy as numpy_ops  # Keras exports the functions, not the operations.

from accel_tf.quantization import _activations, _preserve
from accel_tf.quantization._fake import (
    apart,
    becomes_integers,
    evaluated,
    frozen,
    passes,
)
from accel_tf.quantization._grids import (
    hand_on,
    note_steps,
    note_sums,
    sums_of,
)
from accel_tf.quantization._integers import matrix_product, product, total
from accel_tf.quantization._kernels import channel_axes, einsum_dense
from accel_tf.quantization._layers import QuantizedLayer
from accel_tf.quantization._softmax import masked_scores
from accel_tf.quantization._weights import round_like_activations


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedNormalization(QuantizedLayer):
    """Runs a LayerNormalization in float between quantized tensors.

    Args:
        layer: A LayerNormalization over the last axis.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    @classmethod
    def island(cls, layer):
        return "LiteRT has no int8 kernel for layer normalization"

    def compute(self, inputs, training, mask):
        if not frozen():
            return self.layer(inputs)

        # Sums, not means: the converter would round a mean of integers to their grid. With 16 bits
        # it does that to all, and its sums are wrong by a tenth (LiteRT 2.3).
        def mean(x):
            if passes():
                return tf.reduce_mean(x, -1, keepdims=True)
            return tf.reduce_sum(x, -1, keepdims=True) * (1 / inputs.shape[-1])

        layer, x = self.layer, inputs
        if not layer.rms_scaling:
            x -= mean(x)
        y = x * tf.math.rsqrt(mean(x * x) + layer.epsilon)
        if layer.gamma is not None:
            y *= layer.gamma.value
        return y if layer.beta is None else y + layer.beta.value


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedScaledSum(QuantizedLayer):
    """Runs a layer that adds its second input, times a constant `scale`, to its first.

    Args:
        layer: The layer, with an attribute `scale`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def inside(self):
        return {"scaled": None}

    def compute(self, inputs, training, mask):
        x, y = inputs
        scaled = y * self.layer.scale
        if sums := sums_of(y):
            with evaluated():
                note_sums(scaled, sums.times(self.layer.scale))
        return total(x, self.on_grid(training)("scaled", scaled))

    def compute_output_shape(self, input_shape):
        return input_shape[0]


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedOperator(QuantizedLayer):
    """Runs an operator between layers, such as `x + y`, with its constants on a grid of their own.

    Args:
        layer: An `accel_tf.layers.Operator`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.supports_masking = True  # A mask ends here, as it does at the operator.

    def compute_mask(self, inputs, previous_mask=None):
        return None

    def compute(self, inputs, training, mask):
        def rounded(constant):
            if np.ndim(constant) and np.asarray(constant).dtype.kind == "f":
                return round_like_activations(tf.cast(constant, inputs_dtype), self.scheme)
            return constant

        name = _activations.name_of(self.layer)
        if name in _activations.APPLIED:
            return _activations.apply(name, inputs, self.on_grid(training))
        inputs_dtype = _dtype_of(inputs)
        if form := _FORMS.get(type(self.layer.operation)):
            return form(*self.layer.arguments(inputs))
        if name in _activations.FLOAT:
            return apart(self.layer.run(apart(inputs), rounded))
        inputs = self.on_one_grid(inputs)
        return self.noted(self.layer.arguments(inputs), self.layer.run(inputs, rounded))

    def compute_output_spec(self, inputs, **_):
        return self.layer.compute_output_spec(inputs)


# Operators that integer kernels compute in another form.
_FORMS = {
    numpy_ops.Divide: lambda x, constant: product(x, 1.0 / constant),
    numpy_ops.Negative: lambda x: product(x, -1.0),
    numpy_ops.TrueDivide: lambda x, constant: product(x, 1.0 / constant),
}


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedSameScale(QuantizedOperator):
    """Runs an operator whose outputs have the scale and zero point of its input, such as a split.

    Args:
        layer: An `accel_tf.layers.Operator`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        y = self.layer.run(inputs)
        if becomes_integers() and isinstance(self.layer.operation, numpy_ops.Split):
            y = _slices(inputs, y, self.layer.operation.axis)
        return keras.tree.map_structure(functools.partial(hand_on, inputs), y)


def _slices(x, parts, axis):
    """Returns the parts of a split as slices: a part that nobody reads would have no grid in a file."""
    before, start = (slice(None),) * (axis % len(x.shape)), 0
    made = []
    for size in [part.shape[axis] for part in parts]:
        made.append(x[(*before, slice(start, start + size))])
        start += size
    return made


def _dtype_of(tensors):
    """Returns the dtype of the first tensor of floats, or else of the first."""
    dtypes = [x.dtype for x in keras.tree.flatten(tensors)]
    return next(filter(lambda dtype: dtype.is_floating, dtypes), dtypes[0])


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedIsland(QuantizedOperator):
    """Runs an operator that has no integer form in float between quantized tensors.

    Args:
        layer: An `accel_tf.layers.Operator`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    @classmethod
    def island(cls, layer):
        operation = getattr(layer, "operation", layer)
        return f"{type(operation).__name__} has no integer form here"

    def compute(self, inputs, training, mask):
        inputs = keras.tree.map_structure(apart, inputs)
        form = _ISLANDS.get(type(self.layer.operation)) if becomes_integers() else None
        y = form(self.layer.operation, *self.layer.arguments(inputs)) if form else None
        return keras.tree.map_structure(apart, self.layer.run(inputs) if y is None else y)

    def leave(self, y, training):
        def rounded(x):
            return QuantizedOperator.leave(self, x, training) if x.dtype.is_floating else x

        return keras.tree.map_structure(rounded, y)


def _rolled(operation, x):
    """Returns what `keras.ops.roll` does, of operators that LiteRT has."""
    if not isinstance(operation.axis, int) or not isinstance(operation.shift, int):
        return None
    axis = operation.axis % len(x.shape)
    if x.shape[axis] is None:
        return None
    first = -operation.shift % x.shape[axis]
    parts = tf.split(x, (first, x.shape[axis] - first), axis)
    return tf.concat(parts[::-1], axis)


def _error_function(operation, x):
    """Returns erf(x) to 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    t = 1.0 / (1.0 + 0.3275911 * tf.abs(x))
    y = 0.0
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = (y + factor) * t
    return tf.sign(x) * (1.0 - y * tf.exp(-x * x))


# Operators that LiteRT does not have, made of some that it has.
_ISLANDS = {math_ops.Erf: _error_function, numpy_ops.Roll: _rolled}


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedIndex(QuantizedIsland):
    """Runs an operator that makes positions or truth values of numbers, such as an argmax.

    Args:
        layer: An `accel_tf.layers.Operator`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        operation = self.layer.operation
        if function := _POSITIONS.get(type(operation)):
            # Keras tells -0.0 from 0.0, which integers are not.
            return _position(function, inputs, operation.axis, operation.keepdims)
        return super().compute(inputs, training, mask)


_POSITIONS = {numpy_ops.Argmax: tf.argmax, numpy_ops.Argmin: tf.argmin}


def _position(function, x, axis, keepdims):
    """Returns where a tensor has its largest or smallest value, as Keras does."""
    rank = len(x.shape)
    flat = tf.reshape(x, (-1,)) if axis is None else x
    y = function(flat, axis=axis or 0, output_type=tf.int32)
    if not keepdims:
        return y
    return tf.reshape(y, (1,) * rank) if axis is None else tf.expand_dims(y, axis)


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedAttention(QuantizedLayer):
    """Runs a MultiHeadAttention as integer products, with a softmax of integers in between.

    Masked scores get the lowest value of the scores' grid, which is held so low that nothing of them
    is left after the softmax.

    Args:
        layer: A MultiHeadAttention over one axis.
        scheme, output, activation, kwargs: As for `QuantizedLayer`.
        quantize_inputs: As for `QuantizedLayer`; if one input needs it, all are quantized here.
    """

    rounds_weights = True

    def __init__(self, layer, scheme, quantize_inputs=(), output=None, activation=None, **kwargs):
        flags = [any(quantize_inputs)] * 3
        super().__init__(layer, scheme, flags, output, activation, **kwargs)

    def inside(self):
        names = ("query", "key", "value", "scores", "attended")
        return {**dict.fromkeys(names), "probabilities": "softmax"}

    def build(self, query_shape, value_shape, key_shape=None):
        if not self.layer.built:
            self.layer.build(query_shape, value_shape, key_shape)
        for quantizer in self.quantizers:
            quantizer.build()
        _preserve.hold_again(self.layer, self._kept)
        self.built = True

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        if return_attention_scores:
            raise ValueError(
                f"Layer {self.name!r} does not return attention scores once it is quantized."
            )
        layer = self.layer
        query, value, key = self.enter([query, value, value if key is None else key], training)
        mask = layer._compute_attention_mask(
            query,
            value,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
        )
        if use_causal_mask:
            causal = np.tri(query.shape[1], value.shape[1], dtype=bool)[None]
            mask = causal if mask is None else tf.logical_and(tf.cast(mask, tf.bool), causal)
        on_grid = self.on_grid(training)
        factor = layer._inverse_sqrt_key_dim
        q = on_grid("query", self._project(layer._query_dense, query, training, factor))
        k = on_grid("key", self._project(layer._key_dense, key, training))
        v = on_grid("value", self._project(layer._value_dense, value, training))
        # (batch, head, position, …)
        q, k, v = (hand_on(x, tf.transpose(x, (0, 2, 1, 3))) for x in (q, k, v))
        mask = mask if mask is None else mask[:, None]  # the same for each head
        scores = masked_scores(self, matrix_product(q, k, transpose_b=True), mask, training)
        probabilities = on_grid("probabilities", tf.nn.softmax(scores))
        if layer._dropout > 0.0 and training:
            probabilities = layer._dropout_layer(probabilities, training=training)
        attended = on_grid("attended", matrix_product(probabilities, v))
        attended = hand_on(attended, tf.transpose(attended, (0, 2, 1, 3)))
        return self.leave(self._project(layer._output_dense, attended, training), training)

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        return self.layer.compute_output_shape(query_shape, value_shape, key_shape)

    def _project(self, dense, x, training, factor=1.0):
        axes = channel_axes(dense)
        kernel = self.rounded(dense.kernel, axes)
        sums, values = self.sums(x, dense.kernel, kernel, axes, training), []
        if dense.bias is not None:
            bias, sums = self.bias(dense.bias, sums)
            values = [(dense.bias, bias)]
        with keras.StatelessScope(state_mapping=values):
            y = einsum_dense(dense, x, kernel, factor)
        if sums is None:
            return y
        sums = sums.times(factor)

        def steps(to):
            flat = tf.reshape(y, (-1, sums.limit.shape[0]))
            return tf.reshape(sums.counted(flat, to), tf.shape(y))

        return note_steps(y, steps)


def obstacle(layer, inputs) -> str | None:
    """Returns what keeps a MultiHeadAttention from being quantized, `None` if nothing does."""
    if any(len(x.shape) != 3 for x in inputs[:1]) or len(layer._attention_axes) != 1:
        return "it attends over more than one axis"
    if getattr(layer, "_use_gate", False):
        return "it has a gate"
    return None
