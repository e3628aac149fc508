"""The convolutions with a sparse kernel: patches of the image, times a sparse matrix."""

import math

import keras
import tensorflow as tf

from ._base import SparseLayer
from ._matrix import SparseMatrix


class _SparseConv(SparseLayer):
    """What the convolutions share: a product with patches of an image of `_rank` dimensions."""

    _rank: int
    _paddings: tuple[str, ...]

    def __init__(
        self,
        filters,
        kernel_size,
        sparsity=0.9,
        activation=None,
        use_bias=True,
        *,
        strides=1,
        padding="valid",
        dilation_rate=1,
        groups=1,
        data_format="channels_last",
        **kwargs,
    ):
        super().__init__(sparsity, activation, use_bias, **kwargs)
        self.filters = _positive("filters", filters, 1)[0]
        self.kernel_size = _positive("kernel_size", kernel_size, self._rank)
        self.strides = _positive("strides", strides, self._rank)
        self.dilation_rate = _positive("dilation_rate", dilation_rate, self._rank)
        if padding not in self._paddings:
            raise ValueError(
                f"padding must be {' or '.join(map(repr, self._paddings))}. Received: {padding!r}"
            )
        self.padding = padding
        if groups != 1 or data_format != "channels_last":
            raise ValueError(
                f"{type(self).__name__} has groups=1 and data_format='channels_last' only. Received: "
                f"groups={groups}, data_format={data_format!r}. Keep a keras.layers.Conv{self._rank}D."
            )
        self.input_spec = keras.layers.InputSpec(ndim=self._rank + 2)

    def build(self, input_shape):
        if input_shape[-1] is None:
            raise ValueError(
                f"{self._name_for_errors} needs to know the channels of its input. "
                f"Received input_shape={tuple(input_shape)}."
            )
        self._build_kernel(math.prod(self.kernel_size) * input_shape[-1], self.filters)
        self.input_spec = keras.layers.InputSpec(ndim=self._rank + 2, axes={-1: input_shape[-1]})

    def compute_output_shape(self, input_shape):
        sizes = []
        for axis, size in enumerate(input_shape[1:-1]):
            reach = (self.kernel_size[axis] - 1) * self.dilation_rate[axis] + 1
            if size is None:
                sizes.append(None)
            elif self.padding != "valid":
                sizes.append(-(-size // self.strides[axis]))
            elif size < reach:
                raise ValueError(
                    f"{self._name_for_errors} reaches over {reach} pixels, and cannot take an input "
                    f"of shape {tuple(input_shape)} with padding='valid'."
                )
            else:
                sizes.append((size - reach) // self.strides[axis] + 1)
        return (input_shape[0], *sizes, self.filters)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
        }


@keras.saving.register_keras_serializable(package="accel_tf")
class SparseConv1D(_SparseConv):
    """A Conv1D layer whose kernel is sparse.

    It is computed as a `SparseConv2D` on an image of one row.

    Args:
        filters: The number of output channels.
        kernel_size: An integer, the number of time steps that the kernel covers.
        sparsity, activation, use_bias: As in `SparseDense`.
        strides, dilation_rate: Integers; unlike in Keras, both may exceed 1.
        padding: `"valid"`, `"same"`, or `"causal"`: an output depends on no later time step.
        **kwargs: The other arguments of `SparseDense`.

    Raises:
        ValueError: An argument is out of range; `groups` and `data_format="channels_first"` have no
            sparse form.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> layer = at.SparseConv1D(8, 3, sparsity=0.9, padding="causal", activation="relu")
    >>> layer(np.ones((1, 12, 16), "float32")).shape
    TensorShape([1, 12, 8])
    >>> layer.matrix.shape  # 3 · 16 inputs
    (48, 8)
    """

    _rank = 1
    _paddings = ("valid", "same", "causal")

    @classmethod
    def from_matrix(cls, matrix: SparseMatrix, kernel_size, bias=None, **kwargs) -> "SparseConv1D":
        """Returns an unbuilt layer that will take its weights from `matrix` and `bias`.

        Args:
            matrix: (kernel size · channels, filters), a Conv1D kernel reshaped.
            kernel_size: An integer.
            bias: (filters,) float32, or `None` for a layer without bias.
            **kwargs: Arguments of `SparseConv1D`, except for `filters`, `use_bias`, `format` and
                `nonzeros`.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> matrix = at.SparseMatrix.from_dense([[0.0], [2.0]])
        >>> layer = at.SparseConv1D.from_matrix(matrix, 2)
        >>> layer(np.arange(4, dtype="float32").reshape(1, 4, 1)).numpy().ravel()
        array([2., 4., 6.], dtype=float32)
        """
        layer = cls(matrix.shape[1], kernel_size, use_bias=bias is not None, **kwargs)
        return layer._take(matrix, bias)

    def call(self, inputs):
        (size,), (stride,), (dilation,) = self.kernel_size, self.strides, self.dilation_rate
        if size == stride == 1:
            return self._product(inputs)
        padding = self.padding
        if padding == "causal":
            inputs = tf.pad(inputs, [(0, 0), ((size - 1) * dilation, 0), (0, 0)])
            padding = "valid"
        image = tf.expand_dims(inputs, 1)
        rows = patches(image, (1, size), (1, stride), (1, dilation), padding)
        return self._product(tf.squeeze(rows, 1))


@keras.saving.register_keras_serializable(package="accel_tf")
class SparseConv2D(_SparseConv):
    """A Conv2D layer whose kernel is sparse.

    A 1×1 convolution is a `SparseDense` on the channels of every pixel. A larger one is the same on
    patches of kernel-size × channels numbers, which are copied together first. (A sum of sparse
    products for each position in the kernel was measured too: as fast within a fifth, one way or the
    other, and as many matrices as positions.) Copying pays for itself where there are many filters;
    the patches take kernel-size times the memory of the image.

    Args:
        filters: The number of output channels.
        kernel_size: An integer, or `(height, width)`.
        sparsity, activation, use_bias: As in `SparseDense`.
        strides, dilation_rate: Integers, or pairs; unlike in Keras, both may exceed 1.
        padding: `"valid"` or `"same"`.
        **kwargs: The other arguments of `SparseDense`.

    Raises:
        ValueError: An argument is out of range; `groups` and `data_format="channels_first"` have no
            sparse form.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> layer = at.SparseConv2D(8, 3, sparsity=0.9, padding="same", activation="relu")
    >>> layer(np.ones((1, 12, 12, 16), "float32")).shape
    TensorShape([1, 12, 12, 8])
    >>> layer.matrix.shape  # 3 · 3 · 16 inputs
    (144, 8)
    """

    _rank = 2
    _paddings = ("valid", "same")

    @classmethod
    def from_matrix(cls, matrix: SparseMatrix, kernel_size, bias=None, **kwargs) -> "SparseConv2D":
        """Returns an unbuilt layer that will take its weights from `matrix` and `bias`.

        Args:
            matrix: (height · width · channels, filters), a Conv2D kernel reshaped.
            kernel_size: `(height, width)`.
            bias: (filters,) float32, or `None` for a layer without bias.
            **kwargs: Arguments of `SparseConv2D`, except for `filters`, `use_bias`, `format` and
                `nonzeros`.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> kernel = np.zeros((3, 3, 1, 1)); kernel[1, 1] = 2
        >>> matrix = at.SparseMatrix.from_dense(kernel.reshape(-1, 1))
        >>> layer = at.SparseConv2D.from_matrix(matrix, (3, 3))
        >>> layer(np.arange(9, dtype="float32").reshape(1, 3, 3, 1)).numpy().ravel()
        array([8.], dtype=float32)
        """
        layer = cls(matrix.shape[1], kernel_size, use_bias=bias is not None, **kwargs)
        return layer._take(matrix, bias)

    def call(self, inputs):
        if self.kernel_size == self.strides == (1, 1):
            return self._product(inputs)
        return self._product(
            patches(inputs, self.kernel_size, self.strides, self.dilation_rate, self.padding)
        )


def patches(x, kernel_size, strides, dilation_rate, padding):
    """Returns the pixels under the kernel at each of its places, side by side.

    The same as `tf.image.extract_patches`, and more than twice as fast.

    Args:
        x: [batch, height, width, channels].
        kernel_size, strides, dilation_rate: Pairs of integers.
        padding: `"valid"` or `"same"`.

    Returns:
        [batch, new height, new width, kernel height · kernel width · channels].
    """
    x = tf.convert_to_tensor(x)
    batch, height, width, channels = keras.ops.shape(x)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation_rate, strict=True)]
    sizes = [height, width]
    if padding == "same" and max(reach) > 1:
        pads = [_same(*axis) for axis in zip(sizes, reach, strides, strict=True)]
        x = tf.pad(x, [(0, 0), *pads, (0, 0)])
        sizes = [size + sum(pad) for size, pad in zip(sizes, pads, strict=True)]
    counts = [(size - r) // s + 1 for size, r, s in zip(sizes, reach, strides, strict=True)]
    taps = [
        (i * dilation_rate[0], j * dilation_rate[1])
        for i in range(kernel_size[0])
        for j in range(kernel_size[1])
    ]
    spans = [(count - 1) * s + 1 for count, s in zip(counts, strides, strict=True)]

    @tf.custom_gradient
    def unfold(x):
        slices = [
            x[:, i : i + spans[0] : strides[0], j : j + spans[1] : strides[1]] for i, j in taps
        ]
        return tf.concat(slices, axis=-1) if len(taps) > 1 else slices[0], fold

    def fold(upstream):
        """The transpose: what belongs to the same pixel is added up. Slices' own gradient is slow."""
        pieces = []
        for part, offsets in zip(tf.split(upstream, len(taps), axis=-1), taps, strict=True):
            part = _spread(part, (batch, *counts, channels), strides)[:, : spans[0], : spans[1]]
            pads = [
                (offset, size - offset - span)
                for offset, size, span in zip(offsets, sizes, spans, strict=True)
            ]
            pieces.append(tf.pad(part, [(0, 0), *pads, (0, 0)]))
        return tf.add_n(pieces)

    return unfold(x)


def _spread(x, shape, strides):
    """Puts zeros behind each pixel, so that pixels are `strides` apart."""
    if tuple(strides) == (1, 1):
        return x
    batch, height, width, channels = shape
    x = tf.reshape(x, [batch, height, 1, width, 1, channels])
    gaps = [(0, stride - 1) for stride in strides]
    x = tf.pad(x, [(0, 0), (0, 0), gaps[0], (0, 0), gaps[1], (0, 0)])
    return tf.reshape(x, [batch, height * strides[0], width * strides[1], channels])


def _same(size, reach, stride):
    """TensorFlow's padding before and behind an axis, by which ⌈size / stride⌉ places come about."""
    if stride == 1:
        total = reach - 1
    elif tf.is_tensor(size):
        rest = size % stride
        total = tf.maximum(reach - tf.where(rest == 0, stride, rest), 0)
    else:
        total = max(reach - (size % stride or stride), 0)
    return total // 2, total - total // 2


def _positive(name, value, n) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(values) != n or any(not isinstance(v, int) or v < 1 for v in values):
        kind = "a positive integer" if n == 1 else f"a positive integer or {n} of them"
        raise ValueError(f"{name} must be {kind}. Received: {value!r}")
    return values
