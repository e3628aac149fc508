"""The sparse matrix, and the product with it."""

import keras
import numpy as np
import tensorflow as tf

from . import _op
from ._pattern import Pattern

_NONE = np.zeros(0, np.float32)
_ACTIVATIONS = {"linear": tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6}


class SparseMatrix:
    """An immutable sparse weight matrix W of shape (in, out), stored by output.

    The orientation is that of a Keras kernel, `y = x · W`. What one sees is CSR (compressed sparse
    rows) of the transpose, so that each *output* is one row and one thread can own it: output `n`
    has the weights `values[p]` of the inputs `columns[p]`, for `p` from `row_pointers[n]` up to,
    but not including, `row_pointers[n + 1]`. Columns need not be sorted; a pair that occurs twice
    counts twice.

    What the kernels read is packed from that in one of these formats, when the matrix is first
    multiplied by:

    - `"unstructured"`: any pattern, 16-bit columns, cut into tiles that fit the L1 cache;
    - `"4x1"`: blocks of four outputs that share an input, the fastest if they are nearly full;
    - `"16x1"`: blocks of sixteen;
    - `"dense"`: no sparse kernel at all, but `tf.matmul` on a dense copy.

    Args:
        row_pointers: (out + 1,) integers, from 0 to nnz, never decreasing; stored as int64.
        columns: (nnz,) integers in [0, in); stored as int32.
        values: (nnz,) float32: an array, or a tensor or variable, through which gradients flow.
        shape: `(in, out)`.
        format: One of the above, or `"auto"`, which takes the one that `costs()` predicts to be the
            fastest for batches of 32.

    Raises:
        ValueError: The arrays do not describe a matrix of that shape; the message gives the first
            offending position. Or the format is none of the above.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> w = np.array([[1, 0], [0, 0], [0, 2]], "float32")  # three inputs, two outputs
    >>> m = at.SparseMatrix.from_dense(w, format="unstructured")
    >>> m
    SparseMatrix(shape=(3, 2), nnz=2, density=0.333, format='unstructured')
    >>> m.row_pointers.numpy(), m.columns.numpy(), m.values.numpy()
    (array([0, 1, 2]), array([0, 2], dtype=int32), array([1., 2.], dtype=float32))

    Reference: Y. Saad, *Iterative Methods for Sparse Linear Systems*, 2nd ed., SIAM 2003, §3.4.
    """

    def __init__(self, row_pointers, columns, values, shape, *, format="auto"):
        pattern = Pattern(row_pointers, columns, shape, format)
        self._set(pattern, _float_values(values, pattern), None)

    def _set(self, pattern, values, scales):
        self._pattern, self._values, self._scales = pattern, values, scales
        self._made: dict[str, tf.Tensor] = {}

    @classmethod
    def _of(cls, pattern, values, scales=None) -> "SparseMatrix":
        matrix = cls.__new__(cls)
        matrix._set(pattern, values, scales)
        return matrix

    @classmethod
    def from_dense(cls, w, format="auto") -> "SparseMatrix":
        """Returns the non-zeros of a matrix.

        Args:
            w: (in, out) floats: an array, a tensor, a Keras kernel, or a sparse matrix or array of
                SciPy, whose duplicates are summed up. NaN and infinity count as non-zeros. Stored as
                float32.
            format: As in `SparseMatrix`.

        Returns:
            A `SparseMatrix` of the same shape, with columns in ascending order.

        Raises:
            ValueError: `w` has not two dimensions, or is a `tf.SparseTensor`.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> at.SparseMatrix.from_dense(np.eye(4)).nnz
        4
        """
        if isinstance(w, tf.SparseTensor):
            raise ValueError(
                "from_dense received a tf.SparseTensor. Write from_dense(tf.sparse.to_dense(w))."
            )
        if hasattr(w, "tocsc"):  # SciPy's formats, each of which offers this conversion
            return cls._of_scipy(w, format)
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
        return cls(pointers, columns, by_output[rows, columns], w.shape, format=format)

    @classmethod
    def _of_scipy(cls, w, format) -> "SparseMatrix":
        w = w.tocsc(copy=True)  # whose columns are the outputs, as in this class
        w.sum_duplicates()
        w.eliminate_zeros()
        return cls(w.indptr, w.indices, w.data, w.shape, format=format)

    def with_values(self, values) -> "SparseMatrix":
        """Returns a matrix with the same pattern and other values, which may be differentiated.

        A tensor or variable is packed whenever the matrix is multiplied by, an array once.

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
        return SparseMatrix._of(self._pattern, _float_values(values, self._pattern))

    def with_format(self, format) -> "SparseMatrix":
        """Returns the same matrix, to be packed in another format.

        Args:
            format: As in `SparseMatrix`.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> at.SparseMatrix.from_dense(np.eye(4)).with_format("4x1").format
        '4x1'
        """
        return SparseMatrix._of(self._pattern.with_format(format), self._values, self._scales)

    def quantize(self) -> "SparseMatrix":
        """Returns the matrix with int8 values, each output with a scale of its own.

        The weights of output `n` become `scales[n] · values[p]`, the scale being a 127th of their
        largest magnitude. A stored weight takes 3 bytes instead of 6, its column included, and
        bytes are what a batch of 1 waits for. Gradients flow to `x` and the bias, not to the values.

        Raises:
            ValueError: The values are a tensor of unknown content, or not finite.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> m = at.SparseMatrix.from_dense(np.diag([127.0, 2.0])).quantize()
        >>> m.values.numpy(), m.scales.numpy()
        (array([127, 127], dtype=int8), array([1.        , 0.01574803], dtype=float32))
        """
        if self._scales is not None:
            return self
        if tf.is_tensor(self._values) and not hasattr(self._values, "numpy"):
            raise ValueError("quantize needs to see the values: call it outside of tf.function.")
        values = np.asarray(self._values)
        if not np.all(np.isfinite(values)):
            p = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"values[{p}] = {values[p]} cannot be quantized to int8.")
        rows = self._pattern.rows()
        largest = np.zeros(self.shape[1], np.float32)
        np.maximum.at(largest, rows, np.abs(values))
        scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        integers = np.clip(np.rint(values / scales[rows]), -127, 127).astype(np.int8)
        return SparseMatrix._of(self._pattern, integers, scales)

    def to_dense(self) -> tf.Tensor:
        """Returns the dense matrix, a float32 tensor of shape (in, out).

        Example:

        >>> import numpy as np, accel_tf as at
        >>> at.SparseMatrix.from_dense(2 * np.eye(2)).to_dense().numpy()
        array([[2., 0.],
               [0., 2.]], dtype=float32)
        """
        rows = self._pattern.rows()
        values = tf.cast(self._values, tf.float32)
        if self._scales is not None:
            values *= self._scales[rows]
        indices = np.stack([self._pattern.columns.astype(np.int64), rows], axis=1)
        return tf.scatter_nd(indices, values, tf.constant(self.shape, tf.int64))

    @property
    def shape(self) -> tuple[int, int]:
        """`(in, out)`."""
        return self._pattern.shape

    @property
    def format(self) -> str:
        """The format in which the kernels read it: `"unstructured"`, `"4x1"`, `"16x1"`, `"dense"`."""
        return self._pattern.format

    @property
    def nnz(self) -> int:
        """The number of weights of the pattern; a format may store more, as padding."""
        return self._pattern.columns.size

    @property
    def density(self) -> float:
        """The fraction of weights in the pattern: 1 − sparsity; 0.0 for an empty matrix."""
        size = self.shape[0] * self.shape[1]
        return self.nnz / size if size else 0.0

    @property
    def nbytes(self) -> int:
        """The size of what the kernels read, in bytes: the packed pattern, values and scales."""
        if self.format == "dense":
            return 4 * self.shape[0] * self.shape[1]
        layout = self._pattern.layout
        width = 4 if self._scales is None else 1
        scales = 0 if self._scales is None else self._scales.nbytes
        return layout.plan.nbytes + layout.columns.nbytes + width * layout.order.size + scales

    @property
    def row_pointers(self) -> tf.Tensor:
        """(out + 1,) int64: where each output's non-zeros start."""
        return tf.constant(self._pattern.row_pointers)

    @property
    def columns(self) -> tf.Tensor:
        """(nnz,) int32: the input of each non-zero."""
        return tf.constant(self._pattern.columns)

    @property
    def values(self) -> tf.Tensor:
        """(nnz,) float32 or int8: the weight of each non-zero."""
        return tf.convert_to_tensor(self._values)

    @property
    def scales(self) -> tf.Tensor | None:
        """(out,) float32: what the int8 values of each output are multiplied by; or `None`."""
        return None if self._scales is None else tf.constant(self._scales)

    def __matmul__(self, other: "SparseMatrix") -> "SparseMatrix":
        """The product of two sparse matrices, sparse as well: `sparse_sparse_matmul(self, other)`."""
        from ._power import sparse_sparse_matmul  # which is built on this module

        return sparse_sparse_matmul(self, other)

    def __repr__(self) -> str:
        int8 = "" if self._scales is None else ", int8"
        return (
            f"SparseMatrix(shape={self.shape}, nnz={self.nnz}, density={self.density:.3g}, "
            f"format={self.format!r}{int8})"
        )

    def _multiply(self, x, bias, activation):
        """`activation(x · W + bias)`, in float32."""
        if self.format == "dense":
            y = tf.tensordot(x, self._dense, 1)
            return _ACTIVATIONS[activation](y if bias is None else y + bias)
        return _op.multiply(
            x,
            *self._pattern.tensors,
            self._packed_values,
            _NONE if self._scales is None else self._once("scales", lambda: self._scales),
            _NONE if bias is None else bias,
            activation=activation,
            **self._pattern.layout.attributes,
        )

    @property
    def _dense(self):
        return self._once("dense", self.to_dense)

    @property
    def _packed_values(self):
        return self._once("packed", lambda: self._pattern.pack_values(self._values))

    def _once(self, name, make):
        """What `make` returns, kept if it is constant: other values may change, or have gradients."""
        if not isinstance(self._values, np.ndarray):
            return make()
        if name not in self._made:
            with tf.init_scope():  # eager also while a function is traced, as it outlives it
                self._made[name] = tf.convert_to_tensor(make())
        return self._made[name]


def sparse_matmul(x, matrix: SparseMatrix, bias=None, activation=None) -> tf.Tensor:
    """Returns `activation(x · W + bias)` for a sparse W, through the compiled op.

    Differentiable, any number of times, in `x`, in `bias` and in the values of
    `matrix.with_values(values)`. Runs on the CPU, over TensorFlow's intra-op threads; the result has
    the same bits for any number of threads, and in functions that XLA compiles (`jit_compile=True`).

    Args:
        x: [..., in] float32; one or more dimensions, each of which may be 0. float16 and bfloat16
            are computed in float32 and returned in their own type.
        matrix: W, of shape (in, out). It is packed when it is first used.
        bias: (out,) float32, or `None`.
        activation: `None`, `"relu"` or `"relu6"`, which cost next to nothing here.

    Returns:
        [..., out], of the dtype of `x`.

    Raises:
        ValueError: The last dimension of `x` is not `in`, its dtype is neither of the above, or
            `bias` or `activation` is not as described.
        tf.errors.InvalidArgumentError: `in` does not match a shape known only at run time.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> w = np.array([[1, 0], [0, 0], [0, 2]], "float32")
    >>> m = at.SparseMatrix.from_dense(w)
    >>> at.sparse_matmul(np.ones((1, 3), "float32"), m, bias=[-2.0, 1.0], activation="relu").numpy()
    array([[0., 3.]], dtype=float32)
    """
    if not isinstance(matrix, SparseMatrix):
        raise ValueError(
            f"sparse_matmul expects a SparseMatrix. Received: {type(matrix).__name__}. "
            "Make one with SparseMatrix.from_dense(w)."
        )
    x = tf.convert_to_tensor(x)
    if x.dtype not in (tf.float32, tf.float16, tf.bfloat16):
        raise ValueError(
            f"sparse_matmul computes in float32. Received x of dtype {x.dtype.name}; "
            "convert it with tf.cast(x, tf.float32)."
        )
    if x.shape.rank == 0 or x.shape[-1:].as_list() not in ([None], [matrix.shape[0]]):
        raise ValueError(
            f"sparse_matmul expects x of shape [..., {matrix.shape[0]}] for a matrix of shape "
            f"{matrix.shape}. Received x of shape {x.shape}."
        )
    if activation not in (None, *_ACTIVATIONS):
        raise ValueError(
            f"sparse_matmul fuses the activations {', '.join(map(repr, _ACTIVATIONS))}. "
            f"Received: {activation!r}; apply others to what it returns."
        )
    if bias is not None:
        bias = tf.cast(bias, tf.float32)
        if not bias.shape.is_compatible_with([matrix.shape[1]]):
            raise ValueError(
                f"bias must have shape ({matrix.shape[1]},) for a matrix of shape {matrix.shape}. "
                f"Received: {bias.shape}"
            )
    if x.dtype == tf.float32:  # as it is most of the time, and a cast to the same type takes time
        return matrix._multiply(x, bias, activation or "linear")
    y = matrix._multiply(tf.cast(x, tf.float32), bias, activation or "linear")
    return tf.cast(y, x.dtype)


def _float_values(values, pattern: Pattern):
    """Checks values; returns tensors and variables as they are, all else as an array."""
    if isinstance(values, keras.Variable):
        values = values.value
    if not (tf.is_tensor(values) or isinstance(values, tf.Variable)):
        values = np.asarray(values, np.float32)
    if tuple(values.shape) != pattern.columns.shape:
        raise ValueError(
            f"values has shape {tuple(values.shape)}, expected that of columns, "
            f"{pattern.columns.shape}."
        )
    if values.dtype != tf.float32:
        raise ValueError(f"values must be float32. Received: {values.dtype}")
    return values
