"""Products and powers of sparse matrices, and x·Aᵏ without Aᵏ: many hops on a graph.

A `SparseMatrix` of shape (in, out) is stored by output, that is as the rows of its transpose; so
A·B is computed as (Bᵀ·Aᵀ)ᵀ, and neither is ever transposed.
"""

import math

import numpy as np
import tensorflow as tf

from . import _choice, _op
from ._matrix import SparseMatrix, sparse_matmul

# What Gustavson's product costs for each term, which has an index, a bit and a sum in memory, and for
# each element of the result, for which there are arrays to make; counted in multiply-adds of a dense
# product. Measured, 500 to 2,000 rows on two cores. Other products are priced by `costs()`.
_TERM = 80.0
_ELEMENT = 400.0

# The density of A from which A·A is faster as a dense product: 80·(density·n)²·n = n³ at 0.11.
_DENSE_ABOVE = 0.1


def sparse_sparse_matmul(a: SparseMatrix, b: SparseMatrix) -> SparseMatrix:
    """Returns A·B, sparse as well; `a @ b` in Python.

    Gustavson's algorithm, compiled: each row of the stored product is a sum of rows of one operand,
    and only products that can differ from zero are made. It runs on TensorFlow's intra-op threads,
    with the same bits for any number of them.

    The pattern of the product follows from the two patterns alone: sums that cancel are stored, as
    zeros (SciPy would drop them). Each stored place occurs once, in ascending order. Inside a
    `tf.function` the product is made once, while the function is traced. It has no gradient.

    Args:
        a: (m, k).
        b: (k, n).

    Returns:
        A `SparseMatrix` of shape (m, n).

    Raises:
        ValueError: The shapes do not match, an operand is not a `SparseMatrix`, or its values are
            not known before the function runs.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> a = at.SparseMatrix.from_dense([[1, 0, 2], [0, 0, 3]])
    >>> b = at.SparseMatrix.from_dense([[0, 1], [5, 0], [0, 1]])
    >>> (a @ b).to_dense().numpy()
    array([[0., 3.],
           [0., 3.]], dtype=float32)

    Reference: F. G. Gustavson, Two fast algorithms for sparse matrices: multiplication and permuted
    transposition, ACM TOMS 4(3), 1978, 250–269.
    """
    for operand in (a, b):
        if not isinstance(operand, SparseMatrix):
            raise ValueError(
                f"A @ B expects two of SparseMatrix. Received: {type(operand).__name__}. "
                "For x · A with a dense x there is sparse_matmul(x, A)."
            )
        _require_known(operand)
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"A @ B needs as many rows of B as A has columns. Received shapes {a.shape} and {b.shape}."
        )
    with tf.init_scope():
        pointers, columns, values = _multiply(_arrays(b), _arrays(a), a.shape[0])
    if _is_constant(a) and _is_constant(b):
        values = values.numpy()
    else:
        values = _without_gradient(values, a.values, b.values)
    return SparseMatrix(pointers, columns, values, (a.shape[0], b.shape[1]))


def matrix_power(matrix: SparseMatrix, k: int, *, dense_above: float = _DENSE_ABOVE):
    """Returns Aᵏ for a square sparse matrix, by repeated squaring.

    The binary digits of k are read from the left: each squares the power, and a 1 multiplies it by
    A, which stays as sparse as it was. That is ⌊log₂ k⌋ squarings and at most as many products.
    Powers fill up, and a full matrix is squared faster as one: from the first power on whose density
    exceeds `dense_above`, the work is dense; and where multiplying by A, step after step, costs less
    than the squarings that are left, that is done instead.

    The result is always a `SparseMatrix`, whichever way it was computed. Whether an element that is
    zero by cancellation is stored in it is not defined.

    Args:
        matrix: A, of shape (n, n).
        k: The exponent, from 0 on; A⁰ is the identity.
        dense_above: The density, from 0 to 1, above which a power is multiplied as a dense matrix;
            1 keeps all products sparse.

    Returns:
        A `SparseMatrix` of shape (n, n).

    Raises:
        ValueError: The matrix is not square, or `k` or `dense_above` is out of range.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> ring = at.SparseMatrix.from_dense(np.roll(np.eye(5), 1, axis=1))  # node i to node i + 1
    >>> at.matrix_power(ring, 1_000_001).to_dense().numpy()[0]
    array([0., 1., 0., 0., 0.], dtype=float32)

    Reference: D. E. Knuth, *The Art of Computer Programming*, vol. 2, 3rd ed., 1997, §4.6.3.
    """
    n = _require_square("matrix_power", matrix)
    k = _require_exponent("matrix_power", k)
    _require_known(matrix)
    if not 0 <= dense_above <= 1:
        raise ValueError(f"dense_above is a density in [0, 1]. Received: {dense_above!r}")
    if k == 0:
        return SparseMatrix(np.arange(n + 1), np.arange(n), np.ones(n, np.float32), (n, n))
    with tf.init_scope():
        power, reached = matrix, 1
        digits = bin(k)[3:]
        for i, digit in enumerate(digits):
            if isinstance(power, SparseMatrix) and power.density > dense_above:
                power = power.to_dense()
            if not isinstance(power, SparseMatrix):
                step = _seconds(matrix.nnz, n, rows=n)
                if (k - reached) * step < (len(digits) - i) * _seconds(n**2, n, rows=n):
                    for _ in range(k - reached):
                        power = sparse_matmul(power, matrix)
                    break
            power = _times(power, power)
            reached *= 2
            if digit == "1":
                power = _times(power, matrix)
                reached += 1
        if isinstance(power, SparseMatrix):
            return power
        full = tf.math.count_nonzero(power) > n**2 // 2
        return SparseMatrix.from_dense(power, format="dense" if full else "auto")


def propagate(matrix: SparseMatrix, x, k: int) -> tf.Tensor:
    """Returns x·Aᵏ: what `x` becomes after k hops on the graph of A.

    With A[i, j] the weight of the edge from node i to node j, one hop carries each entry of `x`
    along the edges; with rows that sum to 1, `x·Aᵏ` is the distribution of a random walk after k
    steps. For features in columns, H of shape (n, features), give `tf.transpose(H)`.

    As a rule `x` is multiplied k times by the sparse A, and Aᵏ is not formed. It is, or a part of it
    A^(2ˢ), where that takes less time by `accel_tf.sparse.costs()`: for many rows and many hops
    compared with n²/nnz, or where powers do not fill up.

    Differentiable in `x`; and in the values of A where these are a tensor or a variable, from
    `with_values`: then, no power is formed.

    Args:
        matrix: A, of shape (n, n).
        x: [..., n] float32 (or float16 or bfloat16, as in `sparse_matmul`).
        k: The number of hops, from 0 on.

    Returns:
        [..., n], of the dtype of `x`.

    Raises:
        ValueError: The matrix is not square, `x` does not match it, or `k` is negative.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> walk = at.SparseMatrix.from_dense([[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]])
    >>> at.propagate(walk, np.array([1, 0, 0], "float32"), 2).numpy()
    array([0.5, 0. , 0.5], dtype=float32)

    Reference: F. Wu et al., Simplifying Graph Convolutional Networks, ICML 2019, eq. 8.
    """
    n = _require_square("propagate", matrix)
    k = _require_exponent("propagate", k)
    x = tf.convert_to_tensor(x)
    if x.shape.rank == 0 or x.shape[-1:].as_list() not in ([None], [n]):
        raise ValueError(
            f"propagate expects x of shape [..., {n}] for a matrix of shape {matrix.shape}. "
            f"Received x of shape {x.shape}."
        )
    squarings = _squarings(matrix, k, x.shape[:-1].num_elements())
    power = matrix
    for i in range(squarings):
        if k >> i & 1:
            x = _times(x, power)
        if isinstance(power, SparseMatrix) and power.density > _DENSE_ABOVE:
            power = power.to_dense()
        power = _times(power, power)
    for _ in range(k >> squarings):
        x = _times(x, power)
    return x


def _squarings(matrix: SparseMatrix, k: int, rows: int | None) -> int:
    """The number s of squarings for which x·Aᵏ costs least.

    x is multiplied k >> s times by A^(2ˢ), and once by A^(2ⁱ) for each 1 among the lower digits.
    How far powers fill up is not known before they are made: the number of products in the first
    squaring is, and non-zeros are taken to fall anywhere, which is an upper bound for most graphs.
    So it is the forming that is overestimated.
    """
    if rows is None or not _is_constant(matrix):
        return 0
    n = matrix.shape[0]
    with tf.init_scope():
        pointers, columns = matrix.row_pointers.numpy(), matrix.columns.numpy()
    nnz, terms = float(columns.size), float(np.diff(pointers)[columns].sum())
    formed = below = 0.0
    best, choice = math.inf, 0  # as in `choose`, more work ahead must promise a margin
    for s in range(k.bit_length()):
        once = _seconds(nnz, n, rows)
        cost = formed + below + (k >> s) * once
        if cost * _choice.MARGIN < best:
            best, choice = cost, s
        below += (k >> s & 1) * once
        square = _seconds(n**2, n, rows=n)
        dense = nnz > _DENSE_ABOVE * n**2
        nnz = -(n**2) * math.expm1(-terms / n**2) if n else 0.0
        formed += square if dense else square / max(n, 1) ** 3 * (_TERM * terms + _ELEMENT * nnz)
        terms = nnz**2 / max(n, 1)
    return choice


def _seconds(nnz: float, n: int, rows: int) -> float:
    """The time of x·P, for `rows` rows of x, and a P of shape (n, n) with `nnz` non-zeros."""
    dense = _choice.costs().predict("dense", rows, (n, n), n**2)
    if nnz > _DENSE_ABOVE * n**2:
        return dense
    return min(dense, _choice.costs().predict("unstructured", rows, (n, n), nnz))


def _times(a, b):
    """a·b for any of the kinds that occur here; `a` sparse means that `b` is."""
    if isinstance(a, SparseMatrix):
        return sparse_sparse_matmul(a, b)
    if isinstance(b, SparseMatrix):
        return sparse_matmul(a, b)
    product = tf.matmul(tf.reshape(tf.cast(a, tf.float32), [-1, b.shape[0]]), b)
    return tf.cast(tf.reshape(product, tf.shape(a)), a.dtype)


def _multiply(a, b, columns: int):
    """The arrays of A·B from those of A and B, each `row_pointers, columns, values`."""
    if not _op._compiled():
        _op._say_that_there_is_no_op()
        return _multiply_without_op(a, b, columns)
    return _op.ops.accel_tf_sparse_sparse_mat_mul(*a, *b, out_columns=columns)


def _multiply_without_op(a, b, columns: int):
    rows = [int(pointers.shape[0]) - 1 for pointers, _, _ in (a, b)]
    operands = []
    for (pointers, at, values), shape in zip((a, b), (rows, (rows[1], columns)), strict=True):
        row = tf.repeat(tf.range(shape[0], dtype=tf.int64), pointers[1:] - pointers[:-1])
        indices = tf.stack([row, tf.cast(at, tf.int64)], axis=1)
        operands.append(
            tf.raw_ops.SparseTensorToCSRSparseMatrix(
                indices=indices, values=values, dense_shape=tf.constant(shape, tf.int64)
            )
        )
    product = tf.raw_ops.CSRSparseMatrixToSparseTensor(
        sparse_matrix=tf.raw_ops.SparseMatrixSparseMatMul(
            a=operands[0], b=operands[1], type=tf.float32
        ),
        type=tf.float32,
    )
    row, at = product.indices[:, 0], tf.cast(product.indices[:, 1], tf.int32)
    pointers = tf.searchsorted(row, tf.range(rows[0] + 1, dtype=tf.int64), out_type=tf.int64)
    return pointers, at, product.values


def _arrays(matrix: SparseMatrix):
    values = matrix.values
    if matrix.scales is not None:
        values = tf.cast(values, tf.float32) * tf.gather(matrix.scales, matrix._pattern.rows())
    return matrix.row_pointers, matrix.columns, values


@tf.custom_gradient
def _without_gradient(product, a, b):
    """The values of a product of these, which refuse to be differentiated, as they would be wrong."""

    def gradient(_):
        raise ValueError(
            "The product of two sparse matrices, and so matrix_power, has no gradient. To train the "
            "values of A, multiply by it step by step: x = sparse_matmul(x, A)."
        )

    return tf.identity(product), gradient


def _is_constant(matrix: SparseMatrix) -> bool:
    """Whether the values are an array: a variable may change, a tensor may have a gradient."""
    return isinstance(matrix._values, np.ndarray)


def _require_known(matrix: SparseMatrix) -> None:
    if not (tf.executing_eagerly() or _is_constant(matrix)):
        raise ValueError(
            "A product of sparse matrices is made before the function around it runs, when the values "
            f"of {matrix} are not known: they are a tensor or a variable. Make it outside."
        )


def _require_square(name: str, matrix: SparseMatrix) -> int:
    if not isinstance(matrix, SparseMatrix):
        raise ValueError(f"{name} expects a SparseMatrix. Received: {type(matrix).__name__}.")
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} expects a square matrix. Received one of shape {matrix.shape}.")
    return matrix.shape[0]


def _require_exponent(name: str, k) -> int:
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 0:
        raise ValueError(f"{name} expects an integer k, 0 or more. Received: {k!r}")
    return int(k)
