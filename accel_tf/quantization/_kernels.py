"""Products and convolutions in the form that the converter turns into one integer kernel."""

import keras
import numpy as np
import tensorflow as tf

from accel_tf.quantization._fake import evaluated, frozen
from accel_tf.quantization._grids import unequal

_L = keras.layers


def channel_axes(layer) -> tuple[int, ...]:
    """Returns the axes of a layer's kernel that number its output channels."""
    if isinstance(layer, _L.DepthwiseConv1D | _L.DepthwiseConv2D):
        return (-2, -1)
    if isinstance(layer, _L.Conv1DTranspose | _L.Conv2DTranspose | _L.Conv3DTranspose):
        return (-2,)
    if isinstance(layer, _L.EinsumDense):
        _, kernel, output = split_einsum(layer.equation)
        return tuple(i for i, letter in enumerate(kernel) if letter in output)
    return (-1,)


def split_einsum(equation: str) -> tuple[str, str, str]:
    """Returns the letters of input, kernel and output of an EinsumDense equation."""
    left, output = equation.replace(" ", "").split("->")
    return (*left.split(","), output)


def einsum_dense(layer, x, kernel, factor=1.0):
    """Runs an EinsumDense as one matrix product where it amounts to one, as most do.

    Args:
        layer: An EinsumDense.
        x: Its input.
        kernel: Its kernel, on a grid.
        factor: What to multiply the result by, before the layer's activation.
    """
    given, letters, output = (part.replace("...", "") for part in split_einsum(layer.equation))
    summed = [letter for letter in letters if letter not in output]
    n = len(summed)
    made = letters[n:]
    plain = list(letters[:n]) == summed and not set(given) & set(made)
    if not plain or not given.endswith(letters[:n]) or not output.endswith(made):
        return layer(x) * factor if factor != 1.0 else layer(x)
    rows, columns = kernel.shape[:n].num_elements(), kernel.shape[n:].num_elements()
    y = tf.reshape(x, (-1, rows)) @ tf.reshape(tf.cast(kernel, x.dtype), (rows, columns))
    tail = tuple(kernel.shape[n:])
    if layer.bias is not None:
        with evaluated():
            bias = tf.reshape(tf.broadcast_to(layer.bias.value, tail), (columns,))
            bias = unequal(bias) if frozen() else bias
        y += tf.cast(bias, y.dtype)
    if factor != 1.0:
        y *= factor  # Here it is folded into the kernel.
    return layer.activation(unflatten(y, x, len(x.shape) - n, tail))


def unflatten(y, x, rank: int, tail: tuple):
    """Reshapes `y` to the first `rank` axes of `x`, the batch left open, and then `tail`."""
    sizes = [n if n is not None else tf.shape(x)[i] for i, n in enumerate(x.shape)]
    return tf.reshape(y, (-1, *sizes[1:rank], *tail))


def dense(layer, x):
    """Runs a Dense layer as one matrix product for all positions, which is one integer kernel."""
    if len(x.shape) == 2:
        return layer(x)
    return unflatten(layer(tf.reshape(x, (-1, x.shape[-1]))), x, len(x.shape) - 1, (layer.units,))


def is_apart(layer, x) -> bool:
    """Whether Keras runs a convolution of `x` in a form that no converter makes one kernel of.

    Keras compiles a grouped convolution on its own, where a converter loses sight of its layer, takes
    the image of a dilated convolution apart, and adds the bias of a 1-D convolution behind a reshape,
    past which the converter does not fuse the bias of a single channel. Behind a transposed convolution
    without a bias it fuses no activation.
    """
    if isinstance(layer, _L.Conv1DTranspose):
        return x.shape[1] is not None  # The length of the output is a constant of the kernel.
    if isinstance(layer, _L.Conv2DTranspose):
        return True
    return len(x.shape) == 3 or max(getattr(layer, "groups", 1), *layer.dilation_rate) > 1


def convolution(layer, x, kernel):
    """Runs a convolution for which `is_apart` holds as one kernel with its bias."""
    kernel = tf.cast(kernel, x.dtype)
    row = len(x.shape) == 3  # 1-D: an image of one row
    if row:
        x, kernel = x[:, None], kernel[None]
    if isinstance(layer, _L.Conv1DTranspose | _L.Conv2DTranspose):
        y = _transposed(layer, x, kernel)
        y += tf.cast(_some_bias(layer), y.dtype)
    else:
        y = _convolved(layer, x, kernel)
        if layer.use_bias:
            y += tf.cast(layer.bias.value, y.dtype)
    y = layer.activation(y)
    return tf.squeeze(y, 1) if row else y


def _some_bias(layer):
    """Returns the bias of a layer; where it has none, numbers that are 0 on any grid, but not as floats."""
    tiny = np.arange(1, layer.filters + 1, dtype=np.float32) * np.float32(1e-30)
    if not layer.use_bias:
        return tiny
    with evaluated():
        bias = tf.cast(layer.bias.value, tf.float32)
        return tf.where(tf.reduce_all(bias == 0), tiny, bias)


def _transposed(layer, x, kernel):
    """Returns the transposed convolution of an image."""
    if isinstance(layer, _L.Conv2DTranspose):
        return keras.ops.conv_transpose(
            x,
            kernel,
            layer.strides,
            layer.padding,
            output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate,
        )
    length = layer.compute_output_shape((None, *x.shape[2:]))[1]
    return tf.nn.conv2d_transpose(
        *(x, kernel, (tf.shape(x)[0], 1, length, kernel.shape[-2])),
        *((1, *layer.strides), layer.padding.upper()),
        dilations=(1, *layer.dilation_rate),
    )


def _convolved(layer, x, kernel):
    strides, rates = ((*v, *v)[-2:] for v in (layer.strides, layer.dilation_rate))
    x, padding = pad_causal(layer, x)
    if isinstance(layer, _L.DepthwiseConv1D | _L.DepthwiseConv2D):
        return tf.nn.depthwise_conv2d(x, kernel, (1, *strides, 1), padding, dilations=rates)
    return tf.nn.conv2d(x, kernel, strides, padding, dilations=rates)


def pad_causal(layer, x):
    """Returns an image of one row padded as `layer` wants it, and the padding that is left to do."""
    if layer.padding != "causal":
        return x, layer.padding.upper()
    reach = (layer.kernel_size[0] - 1) * layer.dilation_rate[0]
    return tf.pad(x, [[0, 0], [0, 0], [reach, 0], [0, 0]]), "VALID"
