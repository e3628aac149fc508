"""The sparse matrix, and the product with it."""

import keras
import numpy as np
import tensorflow as tf

from . import _op


class SparseMatrix:
    """An immutable sparse weight matrix W of shape (in, out), stored by output.

    The orientation is that of a Keras kernel, `y = x · W`. The storage is CSR (compressed sparse
    rows) of the transpose, so that each *output* is one row and one thread can own it: output `n`
    has the weights `values[p]` of the inputs `columns[p]`, for `p` from `row_pointers[n]` up to,
    but not including, `row_pointers[n + 1]`. Columns need not be sorted; a pair that occurs twice
    counts twice.

    Args:
        row_pointers: (out + 1,) integers, from 0 to nnz, never decreasing; stored as int64.
        columns: (nnz,) integers in [0, in); stored as int32.
        values: (nnz,) float32: an array, or a tensor or variable, through which gradients flow.
        shape: `(in, out)`.

    Raises:
        ValueError: The arrays do not describe a matrix of that shape; the message gives the first
            offending position.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> w = np.array([[1, 0], [0, 0], [0, 2]], "float32")  # three inputs, two outputs
    >>> m = at.SparseMatrix.from_dense(w)
    >>> m
    SparseMatrix(shape=(3, 2), nnz=2, density=0.333)
    >>> m.row_pointers.numpy(), m.columns.numpy(), m.values.numpy()
    (array([0, 1, 2]), array([0, 2], dtype=int32), array([1., 2.], dtype=float32))

    Reference: Y. Saad, *Iterative Methods for Sparse Linear Systems*, 2nd ed., SIAM 2003, §3.4.
    """

    def __init__(self, row_pointers, columns, values, shape):
        in_features, out_features = (int(size) for size in shape)
        if not (0 <= in_features < 2**31 and 0 <= out_features < 2**31):
            raise ValueError(
                f"A SparseMatrix holds from 0 to 2^31 - 1 inputs and outputs. Received: {shape}"
            )
        pointers = _integers("row_pointers", row_pointers, np.int64)
        columns = _integers("columns", columns, np.int32)
        if isinstance(values, keras.Variable):
            values = values.value
        if not (tf.is_tensor(values) or isinstance(values, tf.Variable)):
            values = np.asarray(values, np.float32)
        if tuple(values.shape) != columns.shape:
            raise ValueError(
                f"values has shape {tuple(values.shape)}, expected that of columns, {columns.shape}."
            )
        if values.dtype != tf.float32:
            raise ValueError(f"values must be float32. Received: {values.dtype}")
        _check(pointers, columns, in_features, out_features)
        self._set(tf.constant(pointers), tf.constant(columns), values, in_features, out_features)

    def _set(self, row_pointers, columns, values, in_features, out_features):
        self._row_pointers = row_pointers
        self._columns = columns
        self._values = tf.convert_to_tensor(values) if isinstance(values, np.ndarray) else values
        self._shape = (in_features, out_features)

    @classmethod
    def from_dense(cls, w) -> "SparseMatrix":
        """Returns the non-zeros of a dense matrix.

        Args:
            w: (in, out) floats: an array, a tensor, or a Keras kernel. NaN and infinity count as
                non-zeros. Stored as float32.

        Returns:
            A `SparseMatrix` of the same shape, with columns in ascending order.

        Raises:
            ValueError: `w` has not two dimensions.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> at.SparseMatrix.from_dense(np.eye(4)).nnz
        4
        """
        w = np.asarray(tf.convert_to_tensor(w), np.float32)
        if w.ndim != 2:
            raise ValueError(
                f"from_dense expects a matrix (in, out). Received one of shape {w.shape}; reshape "
                "a convolution's kernel to two dimensions first."
            )
        by_output = np.ascontiguousarray(w.T)
        rows, columns = np.nonzero(by_output)
        pointers = np.zeros(w.shape[1] + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=w.shape[1]), out=pointers[1:])
        return cls(pointers, columns, by_output[rows, columns], w.shape)

    @classmethod
    def _of_variables(cls, row_pointers, columns, values, shape) -> "SparseMatrix":
        """Wraps tensors or variables unchecked; the op checks them whenever it runs."""
        matrix = cls.__new__(cls)
        matrix._set(row_pointers, columns, values, *shape)
        return matrix

    def with_values(self, values) -> "SparseMatrix":
        """Returns a matrix with the same pattern and other values.

        Args:
            values: (nnz,) float32 array, tensor or variable.

        Example:

        >>> import numpy as np, tensorflow as tf, accel_tf as at
        >>> m = at.SparseMatrix.from_dense(np.eye(2))
        >>> x = np.array([[3, 5]], "float32")
        >>> v = tf.Variable(m.values)
        >>> with tf.GradientTape() as tape:
        ...     y = at.sparse_matmul(x, m.with_values(v))
        >>> tape.gradient(y, v).numpy()
        array([3., 5.], dtype=float32)
        """
        return SparseMatrix(self._row_pointers, self._columns, values, self._shape)

    def to_dense(self) -> tf.Tensor:
        """Returns the dense matrix, a float32 tensor of shape (in, out).

        Example:

        >>> import numpy as np, accel_tf as at
        >>> at.SparseMatrix.from_dense(np.diag([1, 2])).to_dense().numpy()
        array([[1., 0.],
               [0., 2.]], dtype=float32)
        """
        lengths = self._row_pointers[1:] - self._row_pointers[:-1]
        rows = tf.repeat(tf.range(self._shape[1], dtype=tf.int64), lengths)
        indices = tf.stack([tf.cast(self._columns, tf.int64), rows], axis=1)
        return tf.scatter_nd(indices, self.values, tf.constant(self._shape, tf.int64))

    @property
    def shape(self) -> tuple[int, int]:
        """`(in, out)`."""
        return self._shape

    @property
    def nnz(self) -> int:
        """The number of stored weights."""
        return int(self._columns.shape[0])

    @property
    def density(self) -> float:
        """The fraction of weights that are stored: 1 − sparsity; 0.0 for an empty matrix."""
        size = self._shape[0] * self._shape[1]
        return self.nnz / size if size else 0.0

    @property
    def nbytes(self) -> int:
        """The size of the three arrays, in bytes."""
        return 8 * (self._shape[1] + 1) + 8 * self.nnz

    @property
    def row_pointers(self) -> tf.Tensor:
        """(out + 1,) int64: where each output's non-zeros start."""
        return tf.convert_to_tensor(self._row_pointers)

    @property
    def columns(self) -> tf.Tensor:
        """(nnz,) int32: the input of each non-zero."""
        return tf.convert_to_tensor(self._columns)

    @property
    def values(self) -> tf.Tensor:
        """(nnz,) float32: the weight of each non-zero."""
        return tf.convert_to_tensor(self._values)

    def __repr__(self) -> str:
        return f"SparseMatrix(shape={self.shape}, nnz={self.nnz}, density={self.density:.3g})"


def sparse_matmul(x, matrix: SparseMatrix) -> tf.Tensor:
    """Returns `x · W` for a sparse W, through the compiled op.

    Differentiable, any number of times, in `x` and in `matrix.values`. Runs on the CPU, over
    TensorFlow's intra-op threads; the result has the same bits for any number of threads. It is
    no op that XLA knows: it cannot stand inside `tf.function(jit_compile=True)`.

    Faster than `tf.matmul` from about 80 % sparsity on; below that, multiply by
    `matrix.to_dense()`.

    Args:
        x: [..., in] float32; one or more dimensions, each of which may be 0. float16 and bfloat16
            are computed in float32 and returned in their own type.
        matrix: W, of shape (in, out).

    Returns:
        [..., out], of the dtype of `x`.

    Raises:
        ValueError: The last dimension of `x` is not `in`, or its dtype is neither of the above.
        tf.errors.InvalidArgumentError: `in` does not match a shape known only at run time.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> w = np.array([[1, 0], [0, 0], [0, 2]], "float32")
    >>> at.sparse_matmul(np.ones((1, 3), "float32"), at.SparseMatrix.from_dense(w)).numpy()
    array([[1., 2.]], dtype=float32)
    """
    if not isinstance(matrix, SparseMatrix):
        raise ValueError(
            f"sparse_matmul expects a SparseMatrix. Received: {type(matrix).__name__}. "
            "Make one with SparseMatrix.from_dense(w)."
        )
    x = tf.convert_to_tensor(x)
    dtype = x.dtype
    if dtype not in (tf.float32, tf.float16, tf.bfloat16):
        raise ValueError(
            f"sparse_matmul computes in float32. Received x of dtype {dtype.name}; "
            "convert it with tf.cast(x, tf.float32)."
        )
    if x.shape.rank == 0 or x.shape[-1:].as_list() not in ([None], [matrix.shape[0]]):
        raise ValueError(
            f"sparse_matmul expects x of shape [..., {matrix.shape[0]}] for a matrix of shape "
            f"{matrix.shape}. Received x of shape {x.shape}."
        )
    y = _op.multiply(
        tf.cast(x, tf.float32), matrix.row_pointers, matrix.columns, matrix.values, matrix.shape[0]
    )
    return tf.cast(y, dtype)


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
    """The checks of the op (`custom_ops/kernels/csr.cc`), made early, where the mistake is."""
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
