"""The softmax of attention, without the scores that a mask hides."""

import keras
import tensorflow as tf

from accel_tf.quantization._fake import frozen, is_observing
from accel_tf.quantization._grids import note_steps, steps_of
from accel_tf.quantization._layers import QuantizedLayer

# How far below the other scores one that is masked lies: e⁻⁸ is less than a tenth of a step.
_MASKED = 8.0


def masked_scores(wrapper, scores, mask, training):
    """Returns the scores of attention on the grid of `wrapper` for them, the masked ones at its low end.

    Args:
        wrapper: A layer with a tensor "scores" inside.
        scores: The scores.
        mask: Which of them count, of a shape that broadcasts to theirs, or `None`.
        training: Whether the layer is trained.
    """
    on_grid = wrapper.on_grid(training)
    if mask is None:
        return on_grid("scores", scores)
    mask = tf.cast(mask, tf.bool)
    quantizer = wrapper.grids["scores"]
    if quantizer is None:
        return tf.where(mask, scores, scores.dtype.min / 2)
    if frozen():
        return tf.where(mask, on_grid("scores", scores), quantizer.ends[0])
    # Clipped to the low end of the range, which lies that much lower while it is observed.
    low = tf.reduce_min(scores) - _MASKED if is_observing(training) else scores.dtype.min / 2
    masked = tf.where(mask, scores, low)
    if steps := steps_of(scores):
        note_steps(masked, lambda to: tf.where(mask, steps(to), -(2.0**15)))
    return on_grid("scores", masked)


@keras.saving.register_keras_serializable(package="accel_tf")
class MaskedSoftmax(keras.layers.Layer):
    """The softmax of `keras.layers.Attention`: of the last axis, without the scores that a mask hides.

    Args:
        **kwargs: As for any Keras layer.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True  # A mask ends here.

    def call(self, inputs, mask=None):
        if mask is None:
            return keras.ops.softmax(inputs)
        lowest = 65504.0 if inputs.dtype == "float16" else 1e9
        return keras.ops.softmax(keras.ops.where(mask, inputs, inputs - lowest))

    def compute_mask(self, inputs, previous_mask=None):
        return None

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedMaskedSoftmax(QuantizedLayer):
    """Runs a `MaskedSoftmax` as the softmax of integers, as `QuantizedAttention` does.

    Args:
        layer: A `MaskedSoftmax`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def inside(self):
        return {"scores": None, "probabilities": "softmax"}

    def compute(self, inputs, training, mask):
        probabilities = tf.nn.softmax(masked_scores(self, inputs, mask, training))
        return self.on_grid(training)("probabilities", probabilities)
