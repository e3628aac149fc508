"""The layers that replace a model's layers: each runs the original one on the integer grid.

A wrapper quantizes its inputs where they are not on a grid yet, runs the layer, and quantizes the
output where the integer runtime would: at the end of what it fuses into one kernel.
"""

import inspect

import keras
import tensorflow as tf

from accel_tf.quantization._fake import FakeQuantize, fake_quantize_weights

# Activations that LiteRT computes inside the kernel before them.
FUSED = ("linear", "relu", "relu6")

# Output ranges that the integer kernels prescribe: 256 steps of 1/256, and of 1/128.
FIXED = {
    "softmax": (0.0, 255 / 256),
    "sigmoid": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}

# Any other activation that is one integer kernel, and those that are composed here.
ACTIVATIONS = (*FUSED, *FIXED, "silu", "leaky_relu")


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedLayer(keras.layers.Wrapper):
    """Runs a layer without weights (add, pooling, activation, …) between quantized tensors.

    Args:
        layer: The layer to run.
        scheme: The number format, such as `Int8()`.
        quantize_inputs: One flag per input tensor: whether it has to be quantized here, because
            it comes from the outside or from a layer left in float.
        output: `"observe"` to quantize the output with a range of its own; `None` to leave it,
            because it keeps its input's grid or a later layer is computed in the same kernel.
        activation: Name of an activation to apply to the layer's output, after that is quantized.
        **kwargs: As for any Keras layer.
    """

    def __init__(self, layer, scheme, quantize_inputs=(), output=None, activation=None, **kwargs):
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.scheme = scheme
        self.quantize_inputs = list(quantize_inputs)
        self.output_mode = output
        self.activation = activation
        self.input_quantizers = [
            self._quantizer(f"input_{i}") if needed else None
            for i, needed in enumerate(self.quantize_inputs)
        ]
        inner = activation or activation_of(layer)
        split = activation and activation not in FUSED
        self.inner_quantizer = self._quantizer("before_activation") if split else None
        self.output_quantizer = self._quantizer("output", FIXED.get(inner)) if output else None

    def _quantizer(self, name, fixed=None):
        return FakeQuantize(
            self.scheme.activation_bits,
            self.scheme.observer,
            fixed,
            self.scheme.symmetric,
            name=name,
            dtype=self.dtype_policy,
        )

    @property
    def quantizers(self) -> list[FakeQuantize]:
        """The `FakeQuantize` layers of this layer, inputs first."""
        every = [*self.input_quantizers, self.inner_quantizer, self.output_quantizer]
        return [quantizer for quantizer in every if quantizer is not None]

    def build(self, input_shape=None):
        super().build(input_shape)
        for quantizer in self.quantizers:
            quantizer.build()

    def call(self, inputs, training=None, mask=None):
        if any(self.quantize_inputs):
            tensors = [
                x if quantize is None else quantize(x, training=training)
                for x, quantize in zip(
                    keras.tree.flatten(inputs), self.input_quantizers, strict=True
                )
            ]
            inputs = keras.tree.pack_sequence_as(inputs, tensors)
        y = self.compute(inputs, training, mask)
        if self.activation:
            if self.inner_quantizer is not None:
                y = self.inner_quantizer(y, training=training)
            y = activate(self.activation, y)
        if self.output_quantizer is not None:
            y = self.output_quantizer(y, training=training)
        return y

    def compute(self, inputs, training, mask):
        """Returns the layer's output, before any activation that was split from it."""
        if activation_of(self.layer) == "silu":
            return activate("silu", inputs)
        return _call(self.layer, inputs, training, mask)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        config = {
            "scheme": keras.saving.serialize_keras_object(self.scheme),
            "quantize_inputs": self.quantize_inputs,
            "output": self.output_mode,
            "activation": self.activation,
        }
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        scheme = keras.saving.deserialize_keras_object(config["scheme"], custom_objects)
        return super().from_config({**config, "scheme": scheme}, custom_objects)


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedWeights(QuantizedLayer):
    """Runs a Dense, Conv2D or DepthwiseConv2D layer with its kernel on the integer grid.

    Per-channel symmetric weights stay on a grid when a BatchNormalization behind them is folded
    into the kernel, as that only multiplies each channel's scale. So the model need not fold it.

    Args:
        layer: The layer whose `kernel` is to be quantized; its own activation must be one that the
            kernel fuses, any other is passed as `activation`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        kernel = self.layer.kernel
        depthwise = isinstance(self.layer, keras.layers.DepthwiseConv2D)
        axes = (-2, -1) if depthwise else (-1,)
        rounded = fake_quantize_weights(kernel.value, self.scheme.weight_bits, axes)
        with keras.StatelessScope(state_mapping=[(kernel, rounded)]):
            return self._run(inputs)

    def _run(self, inputs):
        between = tuple(inputs.shape[1:-1])
        if not isinstance(self.layer, keras.layers.Dense) or not between or None in between:
            return self.layer(inputs)
        # One matrix product for all positions, whose number is known except for the batch.
        y = self.layer(tf.reshape(inputs, (-1, inputs.shape[-1])))
        return tf.reshape(y, (-1, *between, y.shape[-1]))


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedAffine(QuantizedLayer):
    """Runs a BatchNormalization or Rescaling that no convolution takes in: y = m·x + b per channel.

    In inference it is a 1×1 depthwise convolution, which LiteRT computes as one integer kernel
    with a scale per channel, so m costs no accuracy; as a product and a sum it would need two and
    a rounding in between.

    Args:
        layer: A BatchNormalization over the last axis, or a Rescaling.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        if isinstance(self.layer, keras.layers.BatchNormalization):
            if training and self.layer.trainable:
                return _call(self.layer, inputs, training, mask)
            factor, offset = _normalization(self.layer)
        else:
            channels = inputs.shape[-1]
            factor = tf.broadcast_to(tf.cast(self.layer.scale, tf.float32), (channels,))
            offset = tf.broadcast_to(tf.cast(self.layer.offset, tf.float32), (channels,))
        factor, offset = (tf.cast(value, inputs.dtype) for value in (factor, offset))
        shape = inputs.shape[1:]
        x = inputs if len(shape) == 3 else tf.reshape(inputs, (-1, 1, 1, shape[-1]))
        y = tf.nn.depthwise_conv2d(x, factor[None, None, :, None], [1, 1, 1, 1], "VALID") + offset
        return y if len(shape) == 3 else tf.reshape(y, (-1, *shape))


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedReshape(QuantizedLayer):
    """Runs a Flatten or Reshape as one reshape with every size known except the batch.

    Keras computes the batch size at run time; in a LiteRT file that would be three more operators.

    Args:
        layer: A Flatten or Reshape layer.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        shape = self.layer.compute_output_shape(inputs.shape)[1:]
        if None in shape:
            return self.layer(inputs)
        return tf.reshape(inputs, (-1, *shape))


def activation_of(layer) -> str | None:
    """Returns the name of the activation that `layer` ends with, `None` if it has none.

    Layers such as `ReLU(6)` are named by the activation that they amount to; what has no name here
    is returned as its Keras name, or as the class's.
    """
    if isinstance(layer, keras.layers.ReLU):
        if layer.negative_slope or layer.threshold or layer.max_value not in (None, 6):
            return repr_of_relu(layer)
        return "relu" if layer.max_value is None else "relu6"
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    if isinstance(layer, keras.layers.LeakyReLU):
        return "leaky_relu"
    if not hasattr(layer, "activation"):
        return None
    name = keras.activations.serialize(layer.activation)
    if not isinstance(name, str):
        return getattr(layer.activation, "__name__", type(layer.activation).__name__)
    return {"swish": "silu"}.get(name, name)


def repr_of_relu(layer) -> str:
    """Returns how an unusual ReLU layer was configured, for messages."""
    return (
        f"ReLU(max_value={layer.max_value}, negative_slope={layer.negative_slope}, "
        f"threshold={layer.threshold})"
    )


def activate(name, x):
    """Applies the activation called `name`; a product inside it is quantized like any other."""
    if name == "silu":
        gate = tf.cast(tf.sigmoid(x), tf.float32)
        gate = tf.quantization.fake_quant_with_min_max_vars(gate, *FIXED["sigmoid"])
        return x * tf.cast(gate, x.dtype)
    return keras.activations.get(name)(x)


def _normalization(layer):
    factor = tf.math.rsqrt(layer.moving_variance.value + layer.epsilon)
    if layer.scale:
        factor *= layer.gamma.value
    offset = -layer.moving_mean.value * factor
    if layer.center:
        offset += layer.beta.value
    return factor, offset


def _call(layer, inputs, training, mask):
    given = {"training": training, "mask": mask}
    known = inspect.signature(layer.call).parameters
    return layer(inputs, **{name: value for name, value in given.items() if name in known})
