"""The layers that replace a model's layers: each runs the original one on the integer grid.

A wrapper quantizes its inputs where they are not on a grid yet, runs the layer, and quantizes the
output where the integer runtime would: at the end of what it fuses into one kernel.
"""

import functools
import inspect

import keras
import tensorflow as tf

from accel_tf import _keras
from accel_tf.quantization import _activations, _preserve
from accel_tf.quantization._fake import (
    FakeQuantize,
    apart,
    becomes_integers,
    evaluated,
    frozen,
    is_unrounded,
)
from accel_tf.quantization._grids import (
    Sums,
    grid_of,
    has_grid,
    note_steps,
    note_sums,
    unequal,
)
from accel_tf.quantization._integers import joins, moved, note, prelu
from accel_tf.quantization._kernels import (
    channel_axes,
    convolution,
    dense,
    einsum_dense,
    is_apart,
    pad_causal,
)
from accel_tf.quantization._weights import limits_of_channels, round_like_activations, round_weights

_L = keras.layers


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedLayer(keras.layers.Wrapper):
    """Runs a layer without weights (add, pooling, activation, …) between quantized tensors.

    Args:
        layer: The layer to run.
        scheme: The number format, such as `Int8()`.
        quantize_inputs: One flag per input tensor: whether it has to be quantized here, because
            it comes from the outside or from a layer left in float; `"weight"` for a tensor that is
            a weight, whose range is that of its values.
        output: `"observe"` to quantize the output with a range of its own; `None` to leave it,
            because it keeps its input's grid or a later layer is computed in the same kernel.
        activation: Name of an activation to apply to the layer's output, after that is quantized.
        kept: Which zeros and clusters of the layer's weights to hold, as `_preserve.held` returns it.
        shared: A key that the wrappers of several calls of one layer have in common, by which they
            share it again when their model is loaded.
        **kwargs: As for any Keras layer.
    """

    def __init__(
        self,
        layer,
        scheme,
        quantize_inputs=(),
        output=None,
        activation=None,
        kept=(),
        shared=None,
        **kwargs,
    ):
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.supports_masking = layer.supports_masking
        self.scheme = scheme
        self.quantize_inputs = list(quantize_inputs)
        self.output_mode = output
        self._kept, self.shared = kept, shared
        self.masked = False  # whether a mask has reached the layer inside, in this process
        self.activation = activation
        self.input_quantizers = [
            self._quantizer(f"input_{i}") if needed is True else None
            for i, needed in enumerate(self.quantize_inputs)
        ]
        last = activation or _activations.name_of(layer)
        split = activation and activation not in _activations.FUSED
        self.inner_quantizer = self._quantizer("before_activation") if split else None
        self.output_quantizer = self._quantizer("output", last) if output else None
        self.grids = {name: self._quantizer(name, fixed) for name, fixed in self.inside().items()}

    def _quantizer(self, name, activation=None):
        bits = self.scheme.activation_bits
        return bits and FakeQuantize(
            bits,
            self.scheme.observer,
            _activations.fixed_range(activation, self.scheme),
            self.scheme.symmetric,
            nonnegative=activation in ("relu", "relu6"),
            name=name,
            dtype=self.dtype_policy,
        )

    def inside(self) -> dict[str, str | None]:
        """Returns the tensors within the layer that integer kernels round, by name.

        Where the runtime prescribes the range, the value is the activation that it belongs to.
        """
        return _activations.inside(self.activation or _activations.name_of(self.layer))

    # Whether it has weights that are rounded.
    rounds_weights = False

    @classmethod
    def island(cls, layer) -> str:
        """Why a part of `layer` is computed in float, because LiteRT lacks a kernel; or `""`."""
        return _activations.float_island(_activations.name_of(layer))

    @property
    def float_island(self) -> str:
        """Why a part of the layer is computed in float between quantized tensors; or `""`."""
        if not self.scheme.activation_bits:
            return ""
        if self.masked and isinstance(self.layer, _L.GlobalAveragePooling1D):
            return "LiteRT has no int8 kernel for a mean over a mask"
        return self.island(self.layer) or _activations.float_island(self.activation)

    @property
    def quantizers(self) -> list[FakeQuantize]:
        """The `FakeQuantize` layers of this layer, inputs first."""
        every = [*self.input_quantizers, *self.grids.values()]
        every += [self.inner_quantizer, self.output_quantizer]
        return [quantizer for quantizer in every if quantizer is not None]

    def build(self, input_shape=None):
        super().build(input_shape)
        for quantizer in self.quantizers:
            quantizer.build()
        _preserve.hold_again(self.layer, self._kept)

    def call(self, inputs, training=None, mask=None):
        inputs = self.enter(inputs, training)
        return self.leave(self.compute(inputs, training, mask), training)

    def enter(self, inputs, training):
        """Returns the inputs, quantized where they were not."""
        if not any(self.quantize_inputs):
            return inputs
        tensors = keras.tree.flatten(inputs)
        # A mask among them has no range.
        places = [i for i, x in enumerate(tensors) if x.dtype != tf.bool]
        flags = zip(places, self.quantize_inputs, self.input_quantizers, strict=True)
        for i, needed, quantize in flags:
            if needed == "weight":
                tensors[i] = round_like_activations(tensors[i], self.scheme)
            elif quantize is not None:
                tensors[i] = quantize(tensors[i], training=training)
        return keras.tree.pack_sequence_as(inputs, tensors)

    def leave(self, y, training):
        """Returns the output for what the layer computed: activated and quantized."""
        if self.activation:
            if self.inner_quantizer is not None:
                y = self.inner_quantizer(y, training=training)
            y = _activations.apply(self.activation, y, self.on_grid(training))
        if self.output_quantizer is not None:
            y = self.output_quantizer(y, training=training)
        return y

    def on_grid(self, training):
        """Returns a function `(name, x)` that quantizes a tensor of `inside()`."""

        def quantize(name, x):
            quantizer = self.grids[name]
            return x if quantizer is None else quantizer(x, training=training)

        return quantize

    def rounded(self, variable, axes=(-1,)):
        """Returns the values of a weight on its grid, with a scale for each index along `axes`."""
        _preserve.catch_up(variable)
        if is_unrounded():
            return variable.value
        if _preserve.clusters_of(variable):
            return _preserve.round_clusters(variable, self, axes)
        if axes and not self.scheme.per_channel:
            return _preserve.round_on_one_grid(variable, self)
        if frozen():
            # A constant at once: a converter folds such arithmetic slowly, and that of groups not.
            with tf.init_scope():
                return tf.constant(round_weights(variable.value, self.scheme, axes).numpy())
        return round_weights(variable.value, self.scheme, axes)

    def sums(self, x, variable, rounded, axes, training):
        """Returns the grid of the sums of `x` and a weight, once rounded, as `Sums` without a bias.

        `None` where no bias is to be rounded: in training, and where a step is unknown.
        """
        scheme = self.scheme
        if training or is_unrounded() or not has_grid(x) or _preserve.clusters_of(variable):
            return None
        if scheme.weight_type == "float" or scheme.group_size is not None:
            return None
        with evaluated():
            if scheme.per_channel:
                limits = limits_of_channels(tf.cast(rounded, tf.float32), axes)
            else:
                weights = tf.cast(variable.value, tf.float32)
                limits = tf.fill(
                    limits_of_channels(weights, axes).shape, tf.reduce_max(tf.abs(weights))
                )
            limits = tf.reshape(limits, (-1,))
            return Sums(grid_of(x).exact_step, limits, 2 ** (scheme.weight_bits - 1) - 1)

    def bias(self, variable, sums):
        """Returns the values of a bias as the runtime adds them, and its sums with this bias.

        Args:
            variable: The bias.
            sums: What `sums` returned.
        """
        if sums is None and not frozen():
            return variable.value, None
        with evaluated():
            value = tf.cast(variable.value, tf.float32)
            if sums is None:
                return unequal(value), None
            sums, value = sums.with_bias(value)
            return value, sums

    def compute(self, inputs, training, mask):
        """Returns the layer's output, before any activation that was split from it."""
        name = _activations.name_of(self.layer)
        if name in _activations.APPLIED:
            return _activations.apply(name, inputs, self.on_grid(training))
        if name in _activations.FLOAT:
            return apart(call_layer(self.layer, apart(inputs), training, mask))
        inputs = self.on_one_grid(inputs)
        y = call_layer(self.layer, inputs, training, mask)
        if any(m is not None for m in keras.tree.flatten(mask)) and takes(self.layer, "mask"):
            self.masked = True
            return y  # The integer kernels that `note` knows take no mask.
        return self.noted(inputs, y)

    def on_one_grid(self, inputs):
        """Returns the inputs, those of a concatenation as a file needs them, see `moved`."""
        if not becomes_integers() or self.output_quantizer is None or not joins(self.layer):
            return inputs
        return keras.tree.map_structure(
            lambda x: moved(x, self.layer, self.output_quantizer), inputs
        )

    def noted(self, inputs, y):
        """Returns `y`, the output for `inputs`, with how the runtime computes it noted on it."""
        name = _activations.name_of(self.layer)
        if name in _activations.FUSED:
            return _activations.note_clipped(name, keras.tree.flatten(inputs)[0], y)
        return note(self.layer, inputs, y)

    def compute_mask(self, inputs, previous_mask=None):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        config = {
            "scheme": keras.saving.serialize_keras_object(self.scheme),
            "quantize_inputs": self.quantize_inputs,
            "output": self.output_mode,
            "activation": self.activation,
            "kept": _preserve.held(self.layer) if self.built else self._kept,
            "shared": self.shared,
        }
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        def load(name):
            return keras.saving.deserialize_keras_object(config[name], custom_objects)

        # Keras itself loses that wrappers share a layer: it notes so in a copy of the configuration.
        key = config.get("shared")
        layer = (key and _keras.shared_object(key)) or load("layer")
        if key:
            _keras.record_shared_object(key, layer)
        return cls(**{**config, "layer": layer, "scheme": load("scheme")})


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedWeights(QuantizedLayer):
    """Runs a dense or convolutional layer with its kernel on the integer grid.

    Per-channel symmetric weights stay on a grid when a BatchNormalization behind them is folded
    into the kernel, as that only multiplies each channel's scale. So the model need not fold it.

    Args:
        layer: The layer whose `kernel` is to be quantized; its own activation must be one that the
            kernel fuses, any other is passed as `activation`.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    rounds_weights = True

    def compute(self, inputs, training, mask):
        kernel, axes = self.layer.kernel, channel_axes(self.layer)
        rounded = self.rounded(kernel, axes)
        values = [(kernel, rounded)]
        sums = self.sums(inputs, kernel, rounded, axes, training)
        if self.layer.bias is not None:
            bias, sums = self.bias(self.layer.bias, sums)
            values.append((self.layer.bias, bias))
        with keras.StatelessScope(state_mapping=values):
            y = self._run(inputs, rounded)
        if sums and isinstance(self.layer, _L.Conv1DTranspose | _L.Conv2DTranspose):
            sums = sums._replace(own=True)
        return note_sums(y, sums) if sums else y

    def _run(self, x, kernel):
        layer = self.layer
        if isinstance(layer, _L.Dense):
            return dense(layer, x)
        if isinstance(layer, _L.EinsumDense):
            return einsum_dense(layer, x, kernel)
        # Keras's own form trains on every processor, but is not always one kernel of a converter.
        return convolution(layer, x, kernel) if frozen() and is_apart(layer, x) else layer(x)


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedSeparable(QuantizedLayer):
    """Runs a separable convolution as its two kernels, between which the runtime rounds.

    Args:
        layer: A SeparableConv1D or SeparableConv2D.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    rounds_weights = True

    def inside(self):
        return {**super().inside(), "depthwise": None}

    def compute(self, inputs, training, mask):
        layer, dtype = self.layer, inputs.dtype
        row = len(inputs.shape) == 3  # 1-D: an image of one row
        x = inputs[:, None] if row else inputs
        first, second = layer.depthwise_kernel, layer.pointwise_kernel
        kernels = self.rounded(first, (-2, -1)), self.rounded(second)
        depthwise, pointwise = (tf.cast(k[None] if row else k, dtype) for k in kernels)
        strides = (*layer.strides, *layer.strides)[-2:]  # TensorFlow takes equal ones only.
        rates = (*layer.dilation_rate, *layer.dilation_rate)[-2:]
        x, padding = pad_causal(layer, x)
        sums = self.sums(inputs, first, kernels[0], (-2, -1), training)
        x = tf.nn.depthwise_conv2d(x, depthwise, (1, *strides, 1), padding, dilations=rates)
        x = self.on_grid(training)("depthwise", note_sums(x, sums) if sums else x)
        y = tf.nn.conv2d(x, pointwise, 1, "VALID")
        sums = self.sums(x, second, kernels[1], (-1,), training)
        if layer.use_bias:
            bias, sums = self.bias(layer.bias, sums)
            y += tf.cast(bias, dtype)
        y = layer.activation(tf.squeeze(y, 1) if row else y)
        return note_sums(y, sums) if sums else y


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedPReLU(QuantizedLayer):
    """Runs a PReLU with its slopes on a grid.

    Args:
        layer: A PReLU.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    def compute(self, inputs, training, mask):
        alpha = self.layer.alpha
        rounded = self.rounded(alpha, ())
        with keras.StatelessScope(state_mapping=[(alpha, rounded)]):
            y = self.layer(inputs)
        if not has_grid(inputs) or self.scheme.activation_bits != 8:
            return y
        return note_steps(y, functools.partial(prelu, inputs, rounded, y))


def call_layer(layer, inputs, training, mask):
    """Calls a layer with what it takes of `training` and `mask`."""
    given = {"training": training, "mask": mask}
    return layer(inputs, **{name: value for name, value in given.items() if takes(layer, name)})


def takes(layer, argument: str) -> bool:
    """Whether the `call` of a layer has an argument of that name."""
    return argument in inspect.signature(layer.call).parameters
