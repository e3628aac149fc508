"""Products and powers of sparse matrices: against SciPy and float64, with and without the op."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.sparse import _power


def random_dense(rng, rows, columns, density):
    return (rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < density)).astype(
        np.float32
    )


def matrix_of(stored: scipy.sparse.csr_matrix) -> at.SparseMatrix:
    """The SparseMatrix whose stored rows, one for each output, are those of a SciPy matrix."""
    return at.SparseMatrix(stored.indptr, stored.indices, stored.data, stored.shape[::-1])


@st.composite
def pairs(draw):
    """Two matrices in SciPy's CSR form that can be multiplied, columns unsorted and repeated."""
    sizes = st.sampled_from([0, 1, 2, 5, 33, 63, 64, 65, 200])
    rows, inner, columns = draw(sizes), draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for m, n in ((rows, inner), (inner, columns)):
        lengths = rng.integers(0, draw(st.sampled_from([1, 3, 90])), m) * (n > 0)
        at_ = rng.integers(0, max(n, 1), lengths.sum())
        # Whole numbers: terms cancel, and sums are exact.
        values = rng.integers(-2, 3, at_.size).astype(np.float32)
        made.append(scipy.sparse.csr_matrix((values, at_, np.r_[0, np.cumsum(lengths)]), (m, n)))
    return made


def pattern(m: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix((np.ones(m.indices.size), m.indices, m.indptr), m.shape)


@settings(max_examples=150)
@given(pairs())
def test_product_has_the_pattern_and_the_values_of_scipys(pair):
    a, b = pair
    # SciPy drops sums that are zero, so the pattern is that of a product in which none is.
    want = pattern(a) @ pattern(b)
    want.sort_indices()
    dense = a.toarray() @ b.toarray()
    for multiply in (_power._multiply, _power._multiply_without_op):
        arrays = [matrix_of(m) for m in pair]
        pointers, columns, values = multiply(*map(_power._arrays, arrays), b.shape[1])
        np.testing.assert_array_equal(pointers, want.indptr)
        np.testing.assert_array_equal(columns, want.indices)
        rows = np.repeat(np.arange(a.shape[0]), np.diff(want.indptr))
        np.testing.assert_array_equal(values, dense[rows, want.indices])
        assert (pointers.dtype, columns.dtype, values.dtype) == (tf.int64, tf.int32, tf.float32)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.2, 1.0]))
def test_operator_is_the_matrix_product(seed, density):
    rng = np.random.default_rng(seed)
    m, k, n = rng.integers(1, 90, 3)
    a, b = random_dense(rng, m, k, density), random_dense(rng, k, n, density)
    product = at.SparseMatrix.from_dense(a) @ at.SparseMatrix.from_dense(b)
    assert product.shape == (m, n)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    error = np.abs(product.to_dense() - a64 @ b64)
    assert (error <= 1e-5 * (np.abs(a64) @ np.abs(b64))).all()
    assert product.nnz == np.count_nonzero((a != 0).astype(int) @ (b != 0))


def test_sums_that_cancel_are_stored():
    a = at.SparseMatrix.from_dense([[1, -1]])
    b = at.SparseMatrix.from_dense([[2, 3, 0], [2, 0, 0]])
    product = a @ b
    np.testing.assert_array_equal(product.to_dense(), [[0, 3, 0]])
    assert product.nnz == 2


def test_a_product_is_a_matrix_like_any_other():
    rng = np.random.default_rng(3)
    a, b, c = (random_dense(rng, 30, 30, 0.2) for _ in range(3))
    sparse = [at.SparseMatrix.from_dense(w) for w in (a, b, c)]
    x = rng.normal(size=(4, 30)).astype(np.float32)
    product = sparse[0] @ sparse[1] @ sparse[2]
    np.testing.assert_allclose(at.sparse_matmul(x, product), x @ a @ b @ c, rtol=1e-4, atol=1e-4)
    doubled = product.with_values(2 * product.values)
    np.testing.assert_allclose(doubled.to_dense(), 2 * product.to_dense())


DIGEST = """
import hashlib, sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
import accel_tf as at
rng = np.random.default_rng(0)
w = rng.normal(size=(700, 700)) * (rng.random((700, 700)) < 0.05) * (np.arange(700) % 7 > 2)
m = at.SparseMatrix.from_dense(w)
product = m @ m
digest = hashlib.sha256()
for a in (product.row_pointers, product.columns, product.values):
    digest.update(a.numpy().tobytes())
print(digest.hexdigest())
"""


def test_bits_do_not_depend_on_the_number_of_threads():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, threads], capture_output=True, text=True, check=True
        ).stdout
        for threads in ("1", "4")
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_operands_that_do_not_fit(shape):
    a = at.SparseMatrix.from_dense(np.ones(shape))
    with pytest.raises(ValueError, match=r"as many rows of B as A has columns. Received shapes \("):
        a @ a
    with pytest.raises(
        ValueError, match="two of SparseMatrix. Received: ndarray. .* sparse_matmul"
    ):
        a @ np.ones(shape)


def test_the_op_says_where_an_operand_is_malformed():
    good = [[0, 1], [0], [1.0]]

    def call(a=good, b=good, columns=1):
        arrays = [tf.constant(p, t) for p, t in zip([*a, *b], 2 * DTYPES, strict=True)]
        return _power._op.ops.accel_tf_sparse_sparse_mat_mul(*arrays, out_columns=columns)

    DTYPES = [tf.int64, tf.int32, tf.float32]
    assert call()[2].numpy() == [1]
    for kwargs, message in [
        ({"a": [[0, 2], [0], [1.0]]}, r"a_row_pointers\[1\] = 2, expected the number of values, 1"),
        ({"b": [[1, 1], [0], [1.0]]}, r"b_row_pointers\[0\] = 1, expected 0"),
        ({"a": [[0, 1], [1], [1.0]]}, r"a_columns\[0\] = 1, expected a value in \[0, 1\)"),
        ({"b": [[0, 1], [-1], [1.0]]}, r"b_columns\[0\] = -1, expected a value in \[0, 1\)"),
        ({"b": [[], [], []]}, r"b_row_pointers has shape \[0\], expected \[rows \+ 1\]"),
        ({"columns": 2**31}, r"out_columns = 2147483648, expected at most 2147483647"),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            call(**kwargs)


# --- powers ------------------------------------------------------------------------------------------


def walk(rng, n, degree):
    """A random graph's adjacency, rows summing to 1, in float64."""
    w = np.zeros((n, n))
    for i in range(n):
        w[i, rng.choice(n, min(degree, n), replace=False)] = 1 / min(degree, n)
    return w


@settings(max_examples=60)
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(0, 40),
    st.sampled_from([0, 0.1, 0.5, 1]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_power_and_propagation_equal_float64(n, degree, k, dense_above, seed):
    rng = np.random.default_rng(seed)
    w = walk(rng, n, degree)
    a = at.SparseMatrix.from_dense(w)
    want = np.linalg.matrix_power(w, k)
    power = at.matrix_power(a, k, dense_above=dense_above)
    assert isinstance(power, at.SparseMatrix) and power.shape == (n, n)
    np.testing.assert_allclose(power.to_dense(), want, rtol=1e-4, atol=1e-6)
    x = rng.normal(size=(*rng.integers(0, 4, rng.integers(0, 3)), n)).astype(np.float32)
    hops = at.propagate(a, x, k)
    assert hops.shape == x.shape and hops.dtype == tf.float32
    np.testing.assert_allclose(hops, x @ want, rtol=1e-4, atol=1e-5)


def test_powers_of_a_sparse_pattern_stay_sparse():
    n = 1000
    shift = at.SparseMatrix.from_dense(np.roll(np.eye(n), 1, axis=1))
    power = at.matrix_power(shift, 10**9 + 1)
    assert power.nnz == n
    np.testing.assert_array_equal(power.columns, (np.arange(n) - 1) % n)
    band = at.SparseMatrix.from_dense(np.eye(n) + np.eye(n, k=1))
    assert at.matrix_power(band, 5).nnz == 6 * n - 15


def test_the_last_squarings_give_way_to_steps(monkeypatch):
    """Once a power is full, twelve products with a matrix of density 0.02 cost less than squarings."""
    rng = np.random.default_rng(0)
    a = at.SparseMatrix.from_dense(walk(rng, 400, 8))
    calls = []
    monkeypatch.setattr(
        _power, "sparse_matmul", lambda x, m: calls.append(1) or at.sparse_matmul(x, m)
    )
    power = at.matrix_power(a, 15)
    # 15 is 1111 in binary: A² and A³ = A²·A are sparse products, A³ is full, and A⁴ … A¹⁵ are steps.
    assert len(calls) == 12
    want = np.linalg.matrix_power(a.to_dense().numpy().astype(np.float64), 15)
    np.testing.assert_allclose(power.to_dense(), want, rtol=1e-4)


def test_propagation_forms_a_power_where_that_is_cheaper():
    rng = np.random.default_rng(0)
    sparse = at.SparseMatrix.from_dense(walk(rng, 500, 5))
    assert _power._squarings(sparse, 3, rows=1) == 0
    assert _power._squarings(sparse, 32, rows=8) == 0
    assert _power._squarings(sparse, 10_000, rows=2000) > 5
    shift = at.SparseMatrix.from_dense(np.roll(np.eye(500), 1, axis=1))
    assert (
        _power._squarings(shift, 1 << 20, rows=64) > 10
    )  # one non-zero a row, however often squared
    assert _power._squarings(sparse, 10_000, rows=None) == 0
    assert _power._squarings(sparse.with_values(tf.Variable(sparse.values)), 10_000, 1000) == 0


@pytest.mark.parametrize("k", [0, 1, 3, 200])
def test_propagation_has_a_gradient_in_x(k):
    rng = np.random.default_rng(2)
    w = walk(rng, 40, 3)
    a = at.SparseMatrix.from_dense(w)
    x = tf.constant(rng.normal(size=(2, 300, 40)).astype(np.float32))
    dy = rng.normal(size=x.shape).astype(np.float32)
    assert k == 3 or (_power._squarings(a, k, 600) > 0) == (k == 200)
    want = dy @ np.linalg.matrix_power(w, k).T
    for function in (at.propagate, tf.function(at.propagate)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(a, x, k)
        np.testing.assert_allclose(tape.gradient(y, x, dy), want, rtol=1e-3, atol=1e-4)


def test_a_variable_adjacency_learns_and_is_never_formed():
    rng = np.random.default_rng(4)
    a = at.SparseMatrix.from_dense(walk(rng, 12, 2))
    values = tf.Variable(a.values)
    x = tf.constant(rng.normal(size=(5000, 12)).astype(np.float32))
    results = []
    for propagate in (at.propagate, tf.function(at.propagate)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(propagate(a.with_values(values), x, 50) ** 2)
        results.append(tape.gradient(loss, values))
    with tf.GradientTape() as tape:
        dense = tf.scatter_nd(
            np.argwhere(a.to_dense().numpy().T != 0)[:, ::-1].copy(), values, (12, 12)
        )
        y = x
        for _ in range(50):
            y = y @ dense
        loss = tf.reduce_mean(y**2)
    for gradient in results:
        np.testing.assert_allclose(gradient, tape.gradient(loss, values), rtol=1e-3)
        break


def test_a_product_does_not_pretend_to_be_constant():
    a = at.SparseMatrix.from_dense(np.eye(3))
    values = a.values
    with tf.GradientTape() as tape:
        tape.watch(values)
        y = tf.reduce_sum((a.with_values(values) @ a).values)
    with pytest.raises(ValueError, match="has no gradient. To train the values of A"):
        tape.gradient(y, values)
    of_variable = a.with_values(tf.Variable(values))
    for function in (
        lambda: (of_variable @ a).values,
        lambda: at.matrix_power(of_variable, 2).values,
    ):
        np.testing.assert_array_equal(function(), values)
        with pytest.raises(ValueError, match="made before the function around it runs"):
            tf.function(function)()
    np.testing.assert_array_equal(tf.function(lambda: (a @ a).values)(), values)


def test_half_precision_and_unknown_batches():
    a = at.SparseMatrix.from_dense(walk(np.random.default_rng(5), 20, 3))
    x = tf.ones([400, 20], tf.float16)
    for k in (0, 2, 500):
        y = at.propagate(a, x, k)
        assert y.dtype == tf.float16
        np.testing.assert_allclose(tf.reduce_sum(y), 8000, rtol=0.02)
    function = tf.function(
        lambda x: at.propagate(a, x, 4), input_signature=[tf.TensorSpec([None, None, 20])]
    )
    x = tf.random.stateless_normal([2, 3, 20], (0, 1))
    np.testing.assert_allclose(function(x), at.propagate(a, x, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("verb", [at.matrix_power, lambda a, k: at.propagate(a, np.ones(3), k)])
def test_wrong_arguments(verb):
    square = at.SparseMatrix.from_dense(np.eye(3))
    for k in (-1, 2.0, True, "2"):
        with pytest.raises(ValueError, match=f"an integer k, 0 or more. Received: {k!r}"):
            verb(square, k)
    with pytest.raises(
        ValueError, match=r"expects a square matrix. Received one of shape \(2, 3\)"
    ):
        verb(at.SparseMatrix.from_dense(np.ones((2, 3))), 2)
    with pytest.raises(ValueError, match="expects a SparseMatrix. Received: ndarray"):
        verb(np.eye(3), 2)


def test_wrong_arguments_of_one_verb():
    square = at.SparseMatrix.from_dense(np.eye(3))
    with pytest.raises(ValueError, match=r"a density in \[0, 1\]. Received: 2"):
        at.matrix_power(square, 2, dense_above=2)
    for x in (np.float32(1), np.ones((3, 4), np.float32)):
        with pytest.raises(ValueError, match=r"x of shape \[..., 3\] .* Received x of shape"):
            at.propagate(square, x, 2)
