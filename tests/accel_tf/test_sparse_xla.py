"""The compiled op under XLA: it is compiled to a call of the same kernels, so that every bit agrees."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.sparse import _op

FORMATS = ["unstructured", "4x1", "16x1"]


def make_matrix(format, in_features=300, out_features=200, density=0.15, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(in_features, out_features)).astype(np.float32)
    w *= rng.random(w.shape) < density
    return at.SparseMatrix.from_dense(w, format=format)


def normal(*shape, seed=1):
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def compiled(function, **kwargs):
    return tf.function(function, jit_compile=True, autograph=False, **kwargs)


def assert_same_bits(a, b):
    tf.nest.assert_same_structure(a, b)
    for x, y in zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.shape == y.shape and x.dtype == y.dtype


def assert_near(a, b):
    for x, y in zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max(initial=0))


def targets(function, *arguments):
    """The calls in what XLA makes of a function, by target."""
    hlo = function.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    return [part.split('"')[0] for part in hlo.split('custom_call_target="')[1:]]


def test_the_installed_package_can_be_compiled():
    assert _op.supports_jit() and at.SparseDense(3).supports_jit


def test_keras_does_not_compile_it_unasked_for_a_gpu(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["a GPU"])
    assert not at.SparseDense(3).supports_jit


@pytest.mark.parametrize("shape", [(), (0,), (1,), (37,), (2, 3), (2, 0, 5), (200,)])
@pytest.mark.parametrize("format", FORMATS)
def test_product_has_the_bits_of_the_plain_op(format, shape):
    matrix, x, bias = make_matrix(format), normal(*shape, 300), normal(200)

    def check(matrix, activation):
        def product(x):
            return at.sparse_matmul(x, matrix, bias, activation)

        jit = compiled(product)
        assert_same_bits(jit(x), product(x))
        if tf.size(x) > 0:
            assert targets(jit, x) == ["AccelTfSparseMatMul"]

    check(matrix, None)
    check(matrix, "relu")
    check(matrix.quantize(), "relu6")


@pytest.mark.parametrize("size", [(0, 7), (7, 0), (1, 1), (5, 9)])
def test_small_and_empty_matrices(size):
    matrix = at.SparseMatrix.from_dense(np.ones(size, np.float32), format="unstructured")
    x = normal(3, size[0])
    assert_same_bits(
        compiled(lambda x: at.sparse_matmul(x, matrix))(x), at.sparse_matmul(x, matrix)
    )
    empty = at.SparseMatrix.from_dense(np.zeros(size, np.float32), format="unstructured")
    np.testing.assert_array_equal(
        compiled(lambda x: at.sparse_matmul(x, empty))(x), np.zeros((3, size[1]))
    )


def test_unknown_batch_is_compiled_for_each_size():
    matrix = make_matrix("unstructured")
    jit = compiled(
        lambda x: at.sparse_matmul(x, matrix),
        input_signature=[tf.TensorSpec([None, None, 300], tf.float32)],
    )
    for shape in [(1, 1), (5, 7), (0, 3), (33, 1), (5, 7)]:
        x = normal(*shape, 300)
        assert_same_bits(jit(x), at.sparse_matmul(x, matrix))


def gradients(x, values, bias, matrix, activation):
    with tf.GradientTape() as tape:
        tape.watch([x, values, bias])
        y = at.sparse_matmul(x, matrix.with_values(values), bias, activation)
        cost = tf.reduce_sum(y * y)
    return y, *tape.gradient(cost, [x, values, bias])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(format, activation):
    matrix = make_matrix(format)
    inputs = normal(37, 300), matrix.values, normal(200)
    function = lambda x, v, b: gradients(x, v, b, matrix, activation)  # noqa: E731
    jit = compiled(function)
    # The bias's gradient is a sum that XLA orders in its own way; all else is ours.
    (*ours, dbias), (*plain, plain_dbias) = jit(*inputs), function(*inputs)
    assert_same_bits(ours, plain)
    assert_near(dbias, plain_dbias)
    assert sorted(targets(jit, *inputs)) == [
        "AccelTfSparseMatMul",
        "AccelTfSparseMatMulGradValues",
        "AccelTfSparseMatMulGradX",
    ]


def test_gradient_of_int8_weights():
    matrix = make_matrix("4x1").quantize()

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = at.sparse_matmul(x, matrix)
        return tape.gradient(y, x)

    assert_same_bits(compiled(gradient)(normal(9, 300)), gradient(normal(9, 300)))


def test_second_derivatives():
    matrix = make_matrix("unstructured", 30, 20)

    def slope(x, values):
        with tf.GradientTape() as outer:
            outer.watch([x, values])
            with tf.GradientTape() as tape:
                tape.watch([x, values])
                cost = tf.reduce_sum(at.sparse_matmul(x, matrix.with_values(values)) ** 3)
            total = sum(tf.reduce_sum(g**2) for g in tape.gradient(cost, [x, values]))
        return outer.gradient(total, [x, values])

    inputs = normal(5, 30), matrix.values
    assert_near(compiled(slope)(*inputs), slope(*inputs))


@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_a_batch_whose_size_is_computed(kept):
    """XLA keeps such a batch in memory of the largest size; what lies behind it must not count."""
    matrix = make_matrix("unstructured")
    mask = tf.constant({"all": [True] * 8, "some": [True, False] * 4, "none": [False] * 8}[kept])
    x = tf.where(mask[:, None, None], normal(8, 5, 300), np.nan)

    def function(x, mask, values):
        kept = tf.boolean_mask(x, mask)
        with tf.GradientTape() as tape:
            tape.watch([kept, values])
            y = at.sparse_matmul(kept, matrix.with_values(values))
            cost = tf.reduce_sum(y * y)
        return y, *tape.gradient(cost, [kept, values])

    results = compiled(function)(x, mask, matrix.values)
    assert results[0].shape == (tf.math.count_nonzero(mask), 5, 200)
    assert_near(results, function(x, mask, matrix.values))


def test_inside_of_loops_and_branches():
    matrix, x = make_matrix("unstructured", 64, 64), normal(5, 64)

    def function(x):
        step = lambda i, x: (i + 1, at.sparse_matmul(x, matrix, activation="relu6"))  # noqa: E731
        _, x = tf.while_loop(lambda i, _: i < 3, step, (0, x))
        return tf.cond(x[0, 0] > 1, lambda: at.sparse_matmul(x, matrix), lambda: 2 * x)

    assert_near(compiled(function)(x), function(x))


def test_layers_train_as_without_xla():
    def train(jit_compile):
        keras.utils.set_random_seed(0)
        x = inputs = keras.Input((8, 8, 4))
        x = at.SparseConv2D(32, 3, sparsity=0.7, activation="relu", seed=0)(x)
        x = keras.layers.Reshape((36, 32))(x)
        x = at.SparseConv1D(32, 3, sparsity=0.7, padding="causal", strides=2, seed=2)(x)
        x = at.SparseMultiHeadAttention(2, 8, sparsity=0.6)(x, x)
        x = keras.layers.GlobalAveragePooling1D()(x)
        x = at.SparseDense(12, sparsity=0.5, activation="softmax", seed=1, format="4x1")(x)
        model = keras.Model(inputs, x)
        model.compile("adam", "sparse_categorical_crossentropy", jit_compile=jit_compile)
        x, y = normal(70, 8, 8, 4).numpy(), np.arange(70) % 10
        # 32 + 32 + 6 samples: two sizes of a batch, each compiled for itself.
        losses = model.fit(x, y, batch_size=32, epochs=2, verbose=0).history["loss"]
        assert model.jit_compile == jit_compile  # Keras has not fallen back, with a warning
        return losses, model.predict(x, verbose=0)

    for a, b in zip(train(True), train(False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def raw(matrix, x, **changes):
    """The op on the tensors of a matrix, of which some are changed; no check of ours before it."""
    plan, columns = matrix._pattern.tensors
    arguments = dict(
        x=x,
        plan=plan,
        columns=columns,
        values=matrix._packed_values,
        scales=np.zeros(0, np.float32),
        bias=np.zeros(0, np.float32),
        **matrix._pattern.layout.attributes,
    )
    return _op.ops.accel_tf_sparse_mat_mul(**{**arguments, **changes})


def changed(tensor, position, value):
    array = np.array(tensor)
    array[position] = value
    return array


def test_malformed_input_is_an_error_and_the_next_call_works():
    matrix, x = make_matrix("unstructured"), normal(5, 300)
    plan, columns = matrix._pattern.tensors
    values = matrix._packed_values
    unknown = tf.TensorSpec(None, tf.float32)
    jit = compiled(
        lambda x, p, c, v, b: raw(matrix, x, plan=p, columns=c, values=v, bias=b),
        input_signature=[
            unknown,
            tf.TensorSpec(None, tf.int32),
            tf.TensorSpec(None, tf.uint16),
            unknown,
            unknown,
        ],
    )
    good = [x, plan, columns, values, np.zeros(0, np.float32)]
    for position, value, message in [
        (0, x[:, 1:], r"x has shape \[5,299\], expected \[\.\.\., 300\]"),
        (0, tf.constant(1.0), "shape"),
        (1, plan[:-1], r"plan has \d+ elements, expected \d+"),
        (1, plan[:2], "plan has 2 elements, expected at least 3"),
        (1, changed(plan, 4, -1), r"plan\[4\] = -1, expected"),
        (1, changed(plan, 1, 2**31 - 1), r"plan has \d+ elements, expected"),
        (1, changed(plan, -1, 10**6), r"plan\[\d+\] = 1000000, expected"),
        (2, columns[:-4], r"expected the number of steps"),
        (2, changed(columns, 7, 65535), r"columns\[7\] = 65535, expected a value from 0 to"),
        (3, values[1:], r"values has \d+ elements, expected \d+"),
        (4, normal(199), "bias has 199 elements, expected 200"),
    ]:
        bad = [*good[:position], value, *good[position + 1 :]]
        with pytest.raises(tf.errors.InvalidArgumentError, match="AccelTfSparseMatMul.*" + message):
            jit(*bad)
    assert_same_bits(jit(*good), at.sparse_matmul(x, matrix))


def test_malformed_input_of_the_gradients_is_an_error():
    matrix, x, dy = make_matrix("4x1"), normal(5, 300), normal(5, 200)
    plan, columns = matrix._pattern.tensors
    attributes = matrix._pattern.layout.attributes
    bad = changed(columns, 3, 65535)
    for name, function in [
        (
            "GradX",
            lambda c: _op.multiply_transposed(dy, plan, c, matrix._packed_values, **attributes),
        ),
        ("GradValues", lambda c: _op.sampled(dy, x, plan, c, **attributes)),
    ]:
        jit = compiled(function)
        with pytest.raises(
            tf.errors.InvalidArgumentError,
            match=rf"AccelTfSparseMatMul{name}: columns\[3\] = 65535",
        ):
            jit(bad)
        assert_same_bits(jit(columns), function(columns))


def test_calls_from_many_threads_at_once():
    """A call that waits for the threads of a pool, from one of them, must not wait forever."""
    matrices = [make_matrix(format, 256, 256, seed=i) for i, format in enumerate(FORMATS * 3)]

    def function(x):  # independent of each other: XLA may run them at the same time
        return [at.sparse_matmul(x, matrix) for matrix in matrices]

    jit = compiled(function)
    inputs = [normal(200, 256, seed=i) for i in range(12)]
    expected = [function(x) for x in inputs]
    jit(inputs[0])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for result, reference in zip(threads.map(jit, inputs * 3), expected * 3, strict=True):
            assert_same_bits(result, reference)


PRODUCT = """
import sys, warnings
import numpy as np, tensorflow as tf
tf.function(lambda x: x + 1, jit_compile=True)(tf.ones(3))  # XLA is in use before the op is loaded
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import accel_tf as at
    matrix = at.SparseMatrix.from_dense(np.eye(3), format="unstructured")
print(at.sparse._op.supports_jit(), sum("XLA cannot compile" in str(w.message) for w in caught))
product = lambda x: at.sparse_matmul(x, matrix)
assert np.array_equal(product(np.ones((2, 3), "float32")), np.ones((2, 3)))
try:
    jit = tf.function(product, jit_compile=True)
    assert np.array_equal(jit(np.ones((2, 3), "float32")), np.ones((2, 3)))
    print("compiled")
except tf.errors.InvalidArgumentError as error:
    print("No registered 'AccelTfSparseMatMul'" in str(error))
"""


def run(folder: Path) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PRODUCT],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCEL_TF_OP_DIR": str(folder)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.fixture
def library(tmp_path):
    """A copy of the folder of the compiled op."""
    folder = next(f for f in _op._folders() if (f / _op._LIBRARY).is_file())
    for file in folder.glob("_accel_tf_*.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_loaded_after_xla_was_first_used(library):
    assert run(library) == ["True", "0", "compiled"]


def test_the_op_runs_without_xla(library):
    (library / _op._XLA_LIBRARY).unlink()
    assert run(library) == ["False", "0", "True"]


def test_the_op_runs_with_a_broken_xla_and_says_so(library):
    (library / _op._XLA_LIBRARY).write_bytes(b"\x7fELF")
    assert run(library) == ["False", "1", "True"]
