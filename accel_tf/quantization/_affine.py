"""Layers that compute y = m·x + b per channel: as a kernel of their own, or as a part of the one before."""

import keras
import tensorflow as tf

from accel_tf.quantization._fake import evaluated, frozen, is_unrounded
from accel_tf.quantization._grids import Sums, grid_of, has_grid, note_sums, sums_of, unequal
from accel_tf.quantization._kernels import unflatten
from accel_tf.quantization._layers import QuantizedLayer, call_layer

_L = keras.layers


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedAffine(QuantizedLayer):
    """Runs a layer that computes y = m·x + b per channel and that no convolution takes in.

    In inference it is a 1×1 depthwise convolution, which LiteRT computes as one integer kernel
    with a scale per channel, so m costs no accuracy; as a product and a sum it would need two and
    a rounding in between.

    Args:
        layer: A BatchNormalization or Normalization over the last axis, a Rescaling, or a layer with
            one weight `gamma` that multiplies the channels.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        batch_norm = isinstance(self.layer, _L.BatchNormalization)
        if batch_norm and training and self.layer.trainable:
            return call_layer(self.layer, inputs, training, mask)
        channels = inputs.shape[-1]
        dtype = inputs.dtype if inputs.dtype.is_floating else self.compute_dtype
        with evaluated():
            factor, offset, sums = self._constants(inputs, training)
        factor, offset = tf.cast(factor, dtype), tf.cast(offset, dtype)
        shape = inputs.shape[1:]
        x = tf.cast(inputs, dtype)
        x = x if len(shape) == 3 else tf.reshape(x, (-1, 1, 1, channels))
        y = tf.nn.depthwise_conv2d(x, factor[None, None, :, None], [1, 1, 1, 1], "VALID") + offset
        y = y if len(shape) == 3 else unflatten(y, inputs, len(shape), (channels,))
        return note_sums(y, sums) if sums else y

    def _constants(self, inputs, training):
        """Returns m and b, float32, (channels,), and how the sums are rounded, or `None`."""
        factor, offset = (
            tf.broadcast_to(tf.cast(value, tf.float32), inputs.shape[-1:])
            for value in _affine(self.layer)
        )
        if training or is_unrounded() or not has_grid(inputs):
            return factor, unequal(offset) if frozen() else offset, None
        levels = 2 ** (self.scheme.weight_bits - 1) - 1
        sums = Sums(grid_of(inputs).exact_step, tf.abs(factor), levels)
        sums, offset = sums.plus(offset)
        return factor, offset, sums

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedFolded(QuantizedLayer):
    """Runs a layer that computes y = m·x + b per channel as a part of the kernel before it.

    The kernel's weights hold m; b goes to its bias, on the grid of its sums.

    Args:
        layer: As for `QuantizedAffine`, a BatchNormalization or one with a `gamma`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        sums = None if training else sums_of(inputs)
        if sums is None or sums.limit.shape[0] != inputs.shape[-1]:
            return call_layer(self.layer, inputs, training, mask)
        with evaluated():
            factor, offset = _affine(self.layer)
            sums, offset = sums.times(factor).plus(offset)
        return note_sums(
            inputs * tf.cast(factor, inputs.dtype) + tf.cast(offset, inputs.dtype), sums
        )


def _affine(layer):
    """Returns m and b, float32, of one element or one for each channel."""
    if isinstance(layer, _L.Rescaling):
        return layer.scale, layer.offset
    if isinstance(layer, _L.Normalization):
        mean, spread = (tf.reshape(tf.cast(v, tf.float32), (-1,)) for v in _statistics(layer))
        return (spread, mean) if layer.invert else (1 / spread, -mean / spread)
    if not isinstance(layer, _L.BatchNormalization):
        return layer.gamma.value, 0.0
    factor = tf.math.rsqrt(layer.moving_variance.value + layer.epsilon)
    if layer.scale:
        factor *= layer.gamma.value
    offset = -layer.moving_mean.value * factor
    if layer.center:
        offset += layer.beta.value
    return factor, offset


def _statistics(layer):
    mean, variance = (tf.convert_to_tensor(v) for v in (layer.mean, layer.variance))
    return mean, tf.maximum(tf.sqrt(variance), keras.config.epsilon())
