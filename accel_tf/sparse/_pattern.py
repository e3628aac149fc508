"""The pattern of a sparse matrix in CSR form: checked, given a format, and packed once."""

import functools

import numpy as np
import tensorflow as tf

from . import _choice
from ._layout import HEIGHTS, Layout, count_blocks, pack


class Pattern:
    """Where the non-zeros of a matrix are, by output, and how they are packed.

    Args:
        row_pointers: (out + 1,) integers.
        columns: (nnz,) integers.
        shape: `(in, out)`.
        format: One of `FORMATS`, or `"auto"`.

    Raises:
        ValueError: The arrays do not describe a matrix of that shape; the message gives the first
            offending position. Or the format is none of the above.
    """

    def __init__(self, row_pointers, columns, shape, format="auto"):
        self.shape = tuple(int(size) for size in shape)
        if not all(0 <= size < 2**31 for size in self.shape):
            raise ValueError(
                f"A SparseMatrix holds from 0 to 2^31 - 1 inputs and outputs. Received: {shape}"
            )
        if format not in ("auto", *_choice.FORMATS):
            raise ValueError(
                f"format must be one of 'auto', {', '.join(map(repr, _choice.FORMATS))}. "
                f"Received: {format!r}"
            )
        self.requested = format
        self.row_pointers = _integers("row_pointers", row_pointers, np.int64)
        self.columns = _integers("columns", columns, np.int32)
        _check(self.row_pointers, self.columns, *self.shape)

    def with_format(self, format) -> "Pattern":
        """Returns the same pattern, to be packed in another format."""
        return Pattern(self.row_pointers, self.columns, self.shape, format)

    @functools.cached_property
    def format(self) -> str:
        """The format, which is chosen when it is first asked for."""
        if self.requested != "auto":
            return self.requested
        return self.choose(_choice.BATCH).format

    def choose(self, batch, **kwargs) -> _choice.Choice:
        """Which format is the fastest for a batch; arguments as of `_choice.choose`."""
        return _choice.choose(self._stored, self.shape, batch, **kwargs)

    def _stored(self, format) -> int:
        """The number of weights that a sparse format stores, but for the padding of slices."""
        height, shared = HEIGHTS[format]
        if not shared:
            return self.columns.size  # padding is some percent, and in the measured price
        return height * count_blocks(self.row_pointers, self.columns, self.shape, height)

    @functools.cached_property
    def layout(self) -> Layout:
        """The packed pattern, which is made when it is first asked for. Not for `"dense"`."""
        height, shared = HEIGHTS[self.format]
        return pack(self.row_pointers, self.columns, self.shape, height=height, shared=shared)

    @functools.cached_property
    def tensors(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The plan and the columns of the layout, as the ops read them."""
        with tf.init_scope():  # eager also while a function is traced, as they outlive it
            return tf.constant(self.layout.plan), tf.constant(self.layout.columns)

    def pack_values(self, values):
        """Puts values in the order of the layout; differentiable if `values` is a tensor."""
        order = self.layout.order
        if isinstance(values, np.ndarray):
            return np.where(order < 0, 0, np.append(values, 0)[order]).astype(values.dtype)
        stored = np.flatnonzero(order >= 0).astype(np.int32)
        position = np.empty(self.columns.size, np.int32)
        position[order[stored]] = stored

        @tf.custom_gradient
        def forward(values):  # the gradient of a gather would be a scatter, which is slow
            padded = tf.concat([values, tf.zeros(1, values.dtype)], axis=0)
            packed = tf.gather(padded, np.where(order < 0, self.columns.size, order))
            return packed, lambda upstream: tf.gather(upstream, position)

        return forward(tf.convert_to_tensor(values))

    def rows(self) -> np.ndarray:
        """The output of each non-zero."""
        return np.repeat(np.arange(self.shape[1]), np.diff(self.row_pointers))


def _integers(name, array, dtype) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension. Received shape {array.shape}.")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers. Received dtype {array.dtype}.")
    if array.size:
        limits = np.iinfo(dtype)
        bad = np.flatnonzero((array < limits.min) | (array > limits.max))
        if bad.size:
            raise ValueError(
                f"{name}[{bad[0]}] = {array[bad[0]]} does not fit {np.dtype(dtype).name}."
            )
    return array.astype(dtype)


def _check(pointers, columns, in_features, out_features) -> None:
    """The checks of the op (`custom_ops/kernels/`), made early, where the mistake is."""
    if pointers.size != out_features + 1:
        raise ValueError(
            f"row_pointers has {pointers.size} elements, expected {out_features + 1}: "
            f"one per output and one more, for shape {(in_features, out_features)}."
        )
    if pointers[0] != 0:
        raise ValueError(f"row_pointers[0] = {pointers[0]}, expected 0.")
    back = np.flatnonzero(pointers[1:] < pointers[:-1])
    if back.size:
        n = back[0] + 1
        raise ValueError(
            f"row_pointers[{n}] = {pointers[n]} is less than row_pointers[{n - 1}] = "
            f"{pointers[n - 1]}; expected a sequence that never decreases."
        )
    if pointers[-1] != columns.size:
        raise ValueError(
            f"row_pointers[{out_features}] = {pointers[-1]}, expected the number of values, "
            f"{columns.size}."
        )
    bad = np.flatnonzero((columns < 0) | (columns >= in_features))
    if bad.size:
        raise ValueError(
            f"columns[{bad[0]}] = {columns[bad[0]]}, expected a value in [0, {in_features})."
        )
