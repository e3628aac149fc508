"""accel_tf.sparse: the matrix, and the product against dense float64, with its gradients."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.sparse import _op

FORMATS = ["unstructured", "4x1", "16x1", "dense"]


def random_dense(rng, in_features, out_features, density):
    w = rng.normal(size=(in_features, out_features)).astype(np.float32)
    w *= rng.random(w.shape) < density
    if out_features > 2:
        w[:, 1] = 0  # an output without inputs
    return w


@st.composite
def problems(draw):
    """`(x, w)`: sizes around the widths of vectors and tiles, all densities, any leading shape."""
    edges = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65])
    in_features, out_features = draw(st.one_of(edges, st.just(300))), draw(edges)
    lead = draw(st.one_of(st.just(()), st.tuples(edges), st.tuples(st.integers(0, 5), edges)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = random_dense(rng, in_features, out_features, draw(st.sampled_from([0, 0.02, 0.3, 1])))
    return rng.normal(size=(*lead, in_features)).astype(np.float32), w


def assert_near(got, want, magnitude):
    """Within 1e-5 of the sum of the magnitudes that were added up."""
    got = np.asarray(got)
    assert got.shape == want.shape
    np.testing.assert_array_less(np.abs(got - want), 1e-5 * magnitude + 1e-30)


@settings(max_examples=250)
@given(problems(), st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_product_and_gradients_equal_dense_float64(problem, format, with_bias, int8):
    x, w = problem
    matrix = at.SparseMatrix.from_dense(w, format=format)
    if int8:
        matrix = matrix.quantize()
        w = matrix.to_dense().numpy()
    rng = np.random.default_rng(0)
    dy = rng.normal(size=(*x.shape[:-1], w.shape[1])).astype(np.float32)
    bias = rng.normal(size=w.shape[1]).astype(np.float32)
    x_tensor, b_tensor, values = tf.constant(x), tf.constant(bias), tf.constant(matrix.values)
    with tf.GradientTape() as tape:
        tape.watch([x_tensor, b_tensor, *([] if int8 else [values])])
        used = matrix if int8 else matrix.with_values(values)
        y = at.sparse_matmul(x_tensor, used, bias=b_tensor if with_bias else None)
    dx, dbias, dvalues = tape.gradient(y, [x_tensor, b_tensor, values], output_gradients=dy)

    size = int(np.prod(x.shape[:-1], dtype=int))
    x64 = x.reshape(size, -1 if x.size else w.shape[0]).astype(np.float64)
    dy64 = dy.reshape(size, w.shape[1]).astype(np.float64)
    w64, bias = w.astype(np.float64), bias * with_bias
    magnitude = abs(x64) @ abs(w64) + abs(bias)
    assert_near(y, (x64 @ w64 + bias).reshape(dy.shape), magnitude.reshape(dy.shape))
    assert_near(dx, (dy64 @ w64.T).reshape(x.shape), (abs(dy64) @ abs(w64).T).reshape(x.shape))
    if with_bias and bias.size:
        assert_near(dbias, dy64.sum(axis=0), abs(dy64).sum(axis=0))
    if not int8:
        pattern = w.T != 0
        assert_near(dvalues, (x64.T @ dy64).T[pattern], (abs(x64).T @ abs(dy64)).T[pattern])


@settings(max_examples=50)
@given(problems(), st.sampled_from(FORMATS))
def test_from_dense_and_back(problem, format):
    _, w = problem
    matrix = at.SparseMatrix.from_dense(w, format=format)
    np.testing.assert_array_equal(matrix.to_dense(), w)
    assert matrix.shape == w.shape and matrix.nnz == np.count_nonzero(w)
    assert matrix.format == format
    assert matrix.density == pytest.approx(np.count_nonzero(w) / w.size if w.size else 0)
    if format == "dense":
        assert matrix.nbytes == w.nbytes
    else:
        read = [*matrix._pattern.tensors, matrix._packed_values]
        assert matrix.nbytes == sum(a.numpy().nbytes for a in read)


def test_formats_and_their_sizes():
    rng = np.random.default_rng(0)
    blocks = np.repeat(rng.random((512, 128)) < 0.1, 4, axis=1) * rng.normal(size=(512, 512))
    scattered = rng.permuted(blocks, axis=1)
    assert at.SparseMatrix.from_dense(blocks).format == "4x1"
    assert at.SparseMatrix.from_dense(scattered).format == "unstructured"
    assert at.SparseMatrix.from_dense(rng.normal(size=(512, 512))).format == "dense"
    nnz = np.count_nonzero(blocks)
    # Values, columns, and a little for the plan and padding.
    for w, format, size in [(blocks, "4x1", 4.5), (scattered, "unstructured", 6)]:
        matrix = at.SparseMatrix.from_dense(w, format=format)
        assert size * nnz < matrix.nbytes < (size + 0.8) * nnz
        assert (size - 3) * nnz < matrix.quantize().nbytes < (size - 2) * nnz
    assert at.SparseMatrix.from_dense(blocks).with_format("16x1").format == "16x1"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_fused_activations_and_their_gradients(format, activation):
    rng = np.random.default_rng(4)
    w = 3 * random_dense(rng, 30, 21, 0.4)
    matrix = at.SparseMatrix.from_dense(w, format=format)
    x, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 8, 30), (21,)))

    def fused(x, bias, values):
        return at.sparse_matmul(x, matrix.with_values(values), bias, activation)

    def apart(x, bias, values):
        y = at.sparse_matmul(x, matrix.with_values(values))
        return getattr(tf.nn, activation)(y + bias)

    results = []
    arguments = [tf.constant(x), tf.constant(bias), matrix.values]
    for function in (fused, apart, tf.function(fused)):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = function(*arguments)
        results.append([y, *tape.gradient(y, arguments, output_gradients=tf.cos(y))])
    assert 0.1 < np.mean(results[0][0] == 0) < 0.9
    assert (np.max(results[0][0]) > 6) == (activation == "relu")
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_quantized_values_are_near():
    rng = np.random.default_rng(5)
    w = random_dense(rng, 100, 50, 0.3) * np.exp(rng.normal(size=50)).astype(np.float32)
    matrix = at.SparseMatrix.from_dense(w, format="unstructured").quantize()
    assert matrix.values.dtype == tf.int8 and matrix.quantize() is matrix
    assert "int8" in repr(matrix)
    largest = np.abs(w).max(axis=0)
    assert np.all(np.abs(matrix.to_dense() - w) <= largest / 127 / 2 * 1.001)
    np.testing.assert_allclose(matrix.scales[largest > 0], largest[largest > 0] / 127, rtol=1e-6)
    with pytest.raises(ValueError, match=r"values\[1\] = inf cannot be quantized"):
        at.SparseMatrix([0, 2], [0, 1], [1.0, np.inf], (2, 1)).quantize()
    seen = tf.function(lambda v: matrix.with_values(v).quantize().values)
    with pytest.raises(ValueError, match="call it outside of tf.function"):
        seen(tf.ones(matrix.nnz))


def test_constant_values_are_packed_once_and_others_whenever_used():
    matrix = at.SparseMatrix.from_dense(np.eye(4), format="unstructured")
    x = tf.ones([1, 4])
    assert matrix._packed_values is matrix._packed_values
    variable = tf.Variable(matrix.values)
    of_variable = matrix.with_values(variable)
    product = tf.function(lambda x: at.sparse_matmul(x, of_variable))
    np.testing.assert_array_equal(product(x), [[1, 1, 1, 1]])
    variable.assign([1, 2, 3, 4])
    np.testing.assert_array_equal(product(x), [[1, 2, 3, 4]])
    assert of_variable._pattern.layout is matrix._pattern.layout


@pytest.mark.parametrize("format", ["unstructured", "4x1"])
def test_numerical_gradients(format):
    rng = np.random.default_rng(1)
    w = random_dense(rng, 9, 7, 0.4)
    matrix = at.SparseMatrix.from_dense(w, format=format)
    x = rng.normal(size=(5, 9)).astype(np.float32)
    of_x = lambda x: at.sparse_matmul(x, matrix)  # noqa: E731
    of_values = lambda v: at.sparse_matmul(x, matrix.with_values(v))  # noqa: E731
    for function, argument in [(of_x, x), (of_values, matrix.values)]:
        theory, numeric = tf.test.compute_gradient(function, [argument], delta=1 / 64)
        np.testing.assert_allclose(theory[0], numeric[0], atol=1e-4)
        assert np.abs(theory[0]).max() > 0.1


@pytest.mark.parametrize("format", ["unstructured", "4x1"])
def test_second_derivatives(format):
    rng = np.random.default_rng(2)
    w = random_dense(rng, 6, 5, 0.5)
    matrix = at.SparseMatrix.from_dense(w, format=format)

    def slope(x, v):
        """A function of the first derivatives, so that its own derivative needs the second."""
        with tf.GradientTape() as tape:
            tape.watch([x, v])
            y = at.sparse_matmul(x, matrix.with_values(v))
            cost = tf.reduce_sum(y**3)
        return sum(tf.reduce_sum(g**2) for g in tape.gradient(cost, [x, v]))

    def slope_dense(x, v):
        positions = tf.constant(np.argwhere(w.T)[:, ::-1].copy())
        with tf.GradientTape() as tape:
            tape.watch([x, v])
            cost = tf.reduce_sum((x @ tf.scatter_nd(positions, v, w.shape)) ** 3)
        return sum(tf.reduce_sum(g**2) for g in tape.gradient(cost, [x, v]))

    x, v = tf.constant(rng.normal(size=(4, 6)).astype(np.float32)), matrix.values
    results = []
    for function in (slope, slope_dense, tf.function(slope)):
        with tf.GradientTape() as tape:
            tape.watch([x, v])
            value = function(x, v)
        results.append(tape.gradient(value, [x, v]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


DIGEST = """
import hashlib, json, sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
import accel_tf as at
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for batch, k, n in [(1, 700, 900), (2, 513, 700), (33, 300, 411), (200, 257, 130)]:
    w = rng.normal(size=(k, n)).astype("float32") * (rng.random((k, n)) < 0.2)
    x = tf.constant(rng.normal(size=(batch, k)).astype("float32"))
    for format in ("unstructured", "4x1"):
        m = at.SparseMatrix.from_dense(w, format=format)
        v = m.values
        with tf.GradientTape() as tape:
            tape.watch([x, v])
            y = at.sparse_matmul(x, m.with_values(v))
        for a in [y, *tape.gradient(y, [x, v], output_gradients=y)]:
            digest.update(a.numpy().tobytes())
        assert np.allclose(y, x.numpy() @ w, atol=1e-3)
print(json.dumps([at.sparse.isa(), digest.hexdigest()]))
"""


@pytest.mark.parametrize(
    "isa, threads",
    # Every split of every instruction set is tested in custom_ops/tests; here, TensorFlow's threads.
    [(at.sparse.available_isas()[-1], (1, 4)), ("scalar", (1, 4))],
)
def test_any_number_of_threads_gives_the_same_bits(isa, threads):
    def digest(threads):
        env = {"ACCEL_TF_ISA": isa, "TF_CPP_MIN_LOG_LEVEL": "3", "PATH": "/usr/bin:/bin"}
        output = subprocess.run(
            [sys.executable, "-c", DIGEST, str(threads)],
            env=env, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        return json.loads(output)

    results = [digest(n) for n in threads]
    assert results[0][0] == isa
    assert all(result == results[0] for result in results)


def test_unknown_isa_is_refused():
    code = "import accel_tf as at, numpy as np; at.sparse_matmul(np.ones(2, 'f'), at.SparseMatrix.from_dense(np.eye(2), '4x1'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"ACCEL_TF_ISA": "mmx", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert (
        'ACCEL_TF_ISA: no kernels called "mmx" run on this host; there are scalar' in result.stderr
    )


def test_half_precision_is_computed_in_float32():
    rng = np.random.default_rng(3)
    w = random_dense(rng, 64, 32, 0.3)
    matrix = at.SparseMatrix.from_dense(w, format="unstructured")
    for dtype in (tf.float16, tf.bfloat16):
        x = tf.cast(rng.normal(size=(9, 64)), dtype)
        y = at.sparse_matmul(x, matrix)
        assert y.dtype == dtype
        want = tf.cast(at.sparse_matmul(tf.cast(x, tf.float32), matrix), dtype)
        np.testing.assert_array_equal(tf.cast(y, tf.float32), tf.cast(want, tf.float32))


@pytest.mark.parametrize(
    "x, message",
    [
        (np.ones((2, 3)), "Received x of dtype float64; convert it with tf.cast"),
        (np.ones((2, 3), np.int32), "Received x of dtype int32"),
        (
            np.ones((2, 4), np.float32),
            r"expects x of shape \[..., 3\].*Received x of shape \(2, 4\)",
        ),
        (np.float32(1), r"expects x of shape \[..., 3\].*Received x of shape \(\)"),
    ],
)
def test_wrong_activations(x, message):
    with pytest.raises(ValueError, match=message):
        at.sparse_matmul(x, at.SparseMatrix.from_dense(np.eye(3)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bias": np.ones(2)}, r"bias must have shape \(3,\).*Received: \(2,\)"),
        (
            {"activation": "gelu"},
            "fuses the activations 'linear', 'relu', 'relu6'. Received: 'gelu'",
        ),
    ],
)
def test_wrong_epilogues(arguments, message):
    with pytest.raises(ValueError, match=message):
        at.sparse_matmul(
            np.ones((1, 3), np.float32), at.SparseMatrix.from_dense(np.eye(3)), **arguments
        )


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="format must be one of 'auto', .*'1x4'"):
        at.SparseMatrix.from_dense(np.eye(3), format="1x4")


def test_a_dense_matrix_is_refused():
    with pytest.raises(ValueError, match="expects a SparseMatrix. Received: ndarray.*from_dense"):
        at.sparse_matmul(np.ones((1, 3), np.float32), np.eye(3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0, 1], [0], [1.0], (1, 2)), "row_pointers has 2 elements, expected 3"),
        (([1, 1], [0], [1.0], (1, 1)), r"row_pointers\[0\] = 1, expected 0"),
        (
            ([0, 2, 1], [0], [1.0], (1, 2)),
            r"row_pointers\[2\] = 1 is less than row_pointers\[1\] = 2",
        ),
        (([0, 2], [0], [1.0], (1, 1)), r"row_pointers\[1\] = 2, expected the number of values, 1"),
        (([0, 2], [0, 5], [1.0, 2.0], (5, 1)), r"columns\[1\] = 5, expected a value in \[0, 5\)"),
        (([0, 1], [-1], [1.0], (5, 1)), r"columns\[0\] = -1"),
        (([0, 1], [2**40], [1.0], (5, 1)), r"columns\[0\] = 1099511627776 does not fit int32"),
        (([0, 1], [0.5], [1.0], (5, 1)), "columns must be integers. Received dtype float64"),
        (([[0, 1]], [0], [1.0], (5, 1)), r"row_pointers must have one dimension.*\(1, 2\)"),
        (([0, 1], [0], [1.0, 2.0], (5, 1)), r"values has shape \(2,\), expected that of columns"),
        (([0], [], [], (5, 2**31)), r"from 0 to 2\^31 - 1"),
    ],
)
def test_malformed_matrices(arguments, message):
    with pytest.raises(ValueError, match=message):
        at.SparseMatrix(*arguments)


def test_gradients_reach_a_keras_variable():
    matrix = at.SparseMatrix.from_dense(np.eye(2))
    variable = keras.Variable([3.0, 5.0])
    with tf.GradientTape() as tape:
        y = at.sparse_matmul(np.array([7, 11], np.float32), matrix.with_values(variable))
    np.testing.assert_array_equal(y, [21, 55])
    np.testing.assert_array_equal(tape.gradient(y, variable.value), [7, 11])


def test_a_matrix_is_immutable():
    matrix = at.SparseMatrix.from_dense(np.eye(2))
    for name in ("shape", "values", "row_pointers", "columns", "format", "scales"):
        with pytest.raises(AttributeError):
            setattr(matrix, name, None)


def test_values_must_be_float32():
    matrix = at.SparseMatrix.from_dense(np.eye(2))
    with pytest.raises(ValueError, match="values must be float32"):
        matrix.with_values(tf.ones(2, tf.float64))


def test_from_dense_wants_two_dimensions():
    with pytest.raises(ValueError, match=r"expects a matrix \(in, out\).*shape \(3, 3, 1, 1\)"):
        at.SparseMatrix.from_dense(np.ones((3, 3, 1, 1)))


@pytest.mark.parametrize("format", FORMATS)
def test_duplicates_and_unsorted_columns_count(format):
    matrix = at.SparseMatrix([0, 3], [2, 0, 2], [1.0, 2.0, 3.0], (3, 1), format=format)
    np.testing.assert_array_equal(matrix.to_dense(), [[2], [0], [4]])
    x = np.array([[1, 10, 100]] * 5, np.float32)
    np.testing.assert_array_equal(at.sparse_matmul(x, matrix), [[402]] * 5)


def test_shape_functions_infer_and_check():
    matrix = at.SparseMatrix.from_dense(np.ones((3, 4)), format="unstructured")

    @tf.function(input_signature=[tf.TensorSpec([None, 7, 3])])
    def product(x):
        y = at.sparse_matmul(x, matrix)
        assert y.shape.as_list() == [None, 7, 4]
        gradient = tf.gradients(y, x)[0]
        assert gradient.shape.as_list() == [None, 7, 3]
        return y

    assert product(tf.ones([2, 7, 3])).shape == (2, 7, 4)

    x, packed = tf.ones([2, 3]), (*matrix._pattern.tensors, matrix._packed_values)
    none = tf.zeros(0)
    for arguments, message in [
        ((tf.ones([2, 5]), *packed, none, none), "Dimensions must be equal, but are 5 and 3"),
        ((tf.ones([]), *packed, none, none), "must be at least rank 1"),
        ((x, packed[0][None], *packed[1:], none, none), "must be rank 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            tf.function(
                lambda *a: _op.multiply(*a, **matrix._pattern.layout.attributes)
            ).get_concrete_function(*arguments)


def test_a_shape_known_only_at_run_time_is_checked_by_the_op():
    matrix = at.SparseMatrix.from_dense(np.ones((3, 4)), format="unstructured")
    product = tf.function(
        lambda x: at.sparse_matmul(x, matrix), input_signature=[tf.TensorSpec([None, None])]
    )
    assert product(tf.ones([2, 3])).shape == (2, 4)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"x has shape \[2,5\], expected \[..., 3\]"
    ):
        product(tf.ones([2, 5]))


def test_saved_model_round_trip(tmp_path):
    rng = np.random.default_rng(4)
    w = random_dense(rng, 20, 10, 0.3)

    class Module(tf.Module):
        def __init__(self):
            self.matrix = at.SparseMatrix.from_dense(w, format="unstructured")

        @tf.function(input_signature=[tf.TensorSpec([None, 20])])
        def product(self, x):
            return at.sparse_matmul(x, self.matrix)

    x = rng.normal(size=(6, 20)).astype(np.float32)
    module = Module()
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_array_equal(loaded.product(x), module.product(x))


def test_version_check():
    _op.check_version("2.21.0", "2.21.3")
    for running in ("2.22.0", "3.21.0", "2.2.1"):
        with pytest.raises(
            at.sparse.OpVersionError, match=f"built for TensorFlow 2.21.0, .*{running}"
        ):
            _op.check_version("2.21.0", running)
