"""Products and convolutions in the form that the converter turns into one integer kernel."""

import keras
import tensorflow as tf

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


def einsum_dense(layer, x, kernel, factor=None):
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
        return layer(x) if factor is None else layer(x) * factor
    rows, columns = kernel.shape[:n].num_elements(), kernel.shape[n:].num_elements()
    y = tf.reshape(x, (-1, rows)) @ tf.reshape(tf.cast(kernel, x.dtype), (rows, columns))
    tail = tuple(kernel.shape[n:])
    if layer.bias is not None:
        bias = tf.broadcast_to(tf.cast(layer.bias.value, y.dtype), tail)
        y += tf.reshape(bias, (columns,))
    if factor is not None:
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


def dilated(layer, x, kernel):
    """Runs a dilated convolution as one kernel; Keras would take the image apart for it."""
    kernel = tf.cast(kernel, x.dtype)
    row = len(x.shape) == 3  # 1-D: an image of one row
    if row:
        x, kernel = x[:, None], kernel[None]
    strides, rates = ((*v, *v)[-2:] for v in (layer.strides, layer.dilation_rate))
    x, padding = pad_causal(layer, x)
    if isinstance(layer, _L.DepthwiseConv1D | _L.DepthwiseConv2D):
        y = tf.nn.depthwise_conv2d(x, kernel, (1, *strides, 1), padding, dilations=rates)
    else:
        y = tf.nn.conv2d(x, kernel, strides, padding, dilations=rates)
    if layer.use_bias:
        y += tf.cast(layer.bias.value, y.dtype)
    return layer.activation(tf.squeeze(y, 1) if row else y)


def pad_causal(layer, x):
    """Returns an image of one row padded as `layer` wants it, and the padding that is left to do."""
    if layer.padding != "causal":
        return x, layer.padding.upper()
    reach = (layer.kernel_size[0] - 1) * layer.dilation_rate[0]
    return tf.pad(x, [[0, 0], [0, 0], [reach, 0], [0, 0]]), "VALID"
