"""Embeddings, whose rows become activations."""

import keras
import tensorflow as tf

from accel_tf.quantization._fake import frozen, passes
from accel_tf.quantization._grids import note_grid
from accel_tf.quantization._layers import QuantizedLayer
from accel_tf.quantization._weights import activation_grid, round_like_activations


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedEmbedding(QuantizedLayer):
    """Looks up a table on the integer grid, one grid for all of it; the output is on it, too.

    Args:
        layer: An Embedding.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    rounds_weights = True

    def compute(self, inputs, training, mask):
        table = self.layer.embeddings
        if not self.scheme.activation_bits:
            rounded = self.rounded(table, () if self.scheme.group_size is None else (0,))
            return self._rows(rounded, inputs)
        # Its rows become activations, so they are on such a grid: asymmetric, 8 or 16 bits.
        y = self._rows(round_like_activations(table.value, self.scheme), inputs)
        return y if passes() else note_grid(y, lambda: activation_grid(table.value, self.scheme))

    def _rows(self, rounded, indices):
        if frozen():  # Keras lets indices be negative, which would be three more operators.
            return tf.gather(rounded, tf.cast(indices, tf.int32))
        with keras.StatelessScope(state_mapping=[(self.layer.embeddings, rounded)]):
            return self.layer(indices)
