"""Layers whose output is on the grid of their input: poolings, reshapes, and what only trains."""

import keras
import tensorflow as tf

from accel_tf.quantization._fake import frozen, is_unrounded
from accel_tf.quantization._grids import grid_of, hand_on, has_grid
from accel_tf.quantization._integers import resized
from accel_tf.quantization._layers import QuantizedLayer, call_layer


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedGrid(QuantizedLayer):
    """Runs a layer whose output is on the grid of its input, such as a maximum pooling.

    Args:
        layer: The layer.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        return hand_on(inputs, self.run(inputs, training, mask))

    def run(self, inputs, training, mask):
        """Returns the layer's output for its input."""
        return call_layer(self.layer, inputs, training, mask)


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedIdentity(QuantizedGrid):
    """Runs a layer that returns its input in inference, such as a dropout; a file goes without.

    Args:
        layer: The layer.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def run(self, inputs, training, mask):
        # Some draw random numbers in inference, too, which no file can.
        return inputs if frozen() else super().run(inputs, training, mask)


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedAverage(QuantizedGrid):
    """Runs an AveragePooling1D or AveragePooling2D, whose output is rounded to its input's grid.

    Args:
        layer: The layer.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def run(self, inputs, training, mask):
        grid = None if frozen() or is_unrounded() else grid_of(inputs)
        if grid is None:
            return self.layer(inputs)

        def mean(x):
            # Not by the layer, which would compute in half precision if its policy is that.
            pool = self.layer
            return keras.ops.average_pool(x, pool.pool_size, pool.strides, pool.padding)

        return grid.rounded(mean, inputs)


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedReshape(QuantizedGrid):
    """Runs a Flatten or Reshape as one reshape with every size known except the batch.

    Keras computes the batch size at run time; in a LiteRT file that would be three more operators.

    Args:
        layer: A Flatten or Reshape layer.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def run(self, inputs, training, mask):
        shape = self.layer.compute_output_shape(inputs.shape)[1:]
        if None in shape:
            return self.layer(inputs)
        return tf.reshape(inputs, (-1, *shape))


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedResize(QuantizedGrid):
    """Runs an UpSampling2D or Resizing as the one kernel that LiteRT has for it.

    Args:
        layer: An UpSampling2D, or a Resizing that only resizes, nearest or bilinear.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def run(self, inputs, training, mask):
        size = self.layer.compute_output_shape(inputs.shape)[1:3]
        if None in size:
            return self.layer(inputs)
        y = tf.cast(tf.image.resize(inputs, size, self.layer.interpolation), inputs.dtype)
        exact = frozen() or is_unrounded() or self.layer.interpolation == "nearest"
        if exact or None in inputs.shape[1:3] or self.scheme.activation_bits != 8:
            return y
        return resized(inputs, size, y) if has_grid(inputs) else y


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedRepeated(QuantizedGrid):
    """Repeats a tensor for each sample of a batch.

    Args:
        layer: An `accel_tf.layers.Repeated`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        return hand_on(inputs[0], self.layer(inputs))
