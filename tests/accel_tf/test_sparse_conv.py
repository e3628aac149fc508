"""SparseConv1D and SparseConv2D: the function and the gradients of Keras's, for all arguments."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.sparse._conv import patches

CASES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "strides": 2},
    {"kernel_size": 1, "strides": (3, 1), "padding": "same"},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (3, 2), "strides": (2, 1)},
    {"kernel_size": 3, "strides": 2, "padding": "same"},
    {"kernel_size": (2, 4), "strides": 3, "padding": "same"},
    {"kernel_size": 3, "dilation_rate": (2, 1), "padding": "same"},
    {"kernel_size": (2, 3), "dilation_rate": 2},
]
CASES_1D = [
    {"kernel_size": 1},
    {"kernel_size": 1, "strides": 2, "padding": "causal"},
    {"kernel_size": 4},
    {"kernel_size": 3, "strides": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 2, "strides": 3, "padding": "same"},
    {"kernel_size": 3, "dilation_rate": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "causal"},
    {"kernel_size": 3, "strides": 2, "padding": "causal"},
    {"kernel_size": 3, "dilation_rate": 3, "padding": "causal"},
]
BOTH = [(2, case) for case in CASES] + [(1, case) for case in CASES_1D]


def pair(rank, case, channels=5, filters=8):
    """A convolution with zeros in its kernel and the sparse one of the same function."""
    rng, size = np.random.default_rng(0), {1: (71,), 2: (11, 14)}[rank]
    dense = getattr(keras.layers, f"Conv{rank}D")(filters, activation="relu", **case)
    dense.build((None, *size, channels))
    kernel = rng.normal(size=dense.kernel.shape) * (rng.random(dense.kernel.shape) < 0.3)
    dense.set_weights([kernel, rng.normal(size=filters)])
    matrix = at.SparseMatrix.from_dense(kernel.reshape(-1, filters), format="unstructured")
    sparse = getattr(at, f"SparseConv{rank}D").from_matrix(
        matrix, bias=keras.ops.convert_to_numpy(dense.bias), activation="relu", **case
    )
    x = tf.constant(rng.normal(size=(2, *size, channels)).astype(np.float32))
    return dense, sparse, x


@pytest.mark.parametrize("rank, case", BOTH, ids=str)
def test_equals_the_dense_convolution_with_gradients(rank, case):
    dense, sparse, x = pair(rank, case)
    results = []
    for layer in (dense, sparse):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        weight = layer.kernel if layer is dense else layer.values
        dx, dw = tape.gradient(y, [x, weight.value], output_gradients=tf.sin(y))
        results.append((y, dx))
        if layer is dense:
            dense_dw = dw
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert sparse.compute_output_shape(x.shape) == tuple(y.shape)
    kept = keras.ops.convert_to_numpy(dense.kernel) != 0
    # An inactive filter has no gradient, and padding of the packed values has none either.
    stored, wanted = dw[dw != 0], dense_dw[kept & (dense_dw != 0)]
    np.testing.assert_allclose(np.sort(stored), np.sort(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_sizes_known_only_at_run_time(case):
    dense, sparse, x = pair(2, case)
    function = tf.function(sparse, input_signature=[tf.TensorSpec([None, None, None, 5])])
    for size in [(9, 9), (10, 12), (13, 11)]:
        x = tf.random.normal((2, *size, 5))
        np.testing.assert_allclose(function(x), dense(x), rtol=1e-4, atol=1e-4)

        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 5])])
        def slope(x):
            return tf.gradients(tf.reduce_sum(sparse(x) ** 2), x)[0]

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(dense(x) ** 2)
        np.testing.assert_allclose(slope(x), tape.gradient(y, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES_1D[3:], ids=str)
def test_lengths_known_only_at_run_time(case):
    dense, sparse, _ = pair(1, case)
    function = tf.function(sparse, input_signature=[tf.TensorSpec([None, None, 5])])
    for length in (9, 10, 13):
        x = tf.random.normal((2, length, 5))
        np.testing.assert_allclose(function(x), dense(x), rtol=1e-4, atol=1e-4)


def test_patches_are_those_of_tensorflow():
    x = tf.random.normal((2, 10, 9, 3))
    for sizes, strides, rates, padding in [
        ((3, 3), (1, 1), (1, 1), "same"),
        ((2, 3), (2, 3), (1, 1), "valid"),
        ((3, 2), (1, 1), (2, 3), "same"),
    ]:
        want = tf.image.extract_patches(
            x, (1, *sizes, 1), (1, *strides, 1), (1, *rates, 1), padding.upper()
        )
        np.testing.assert_array_equal(patches(x, sizes, strides, rates, padding), want)


def test_patches_have_derivatives_of_any_order():
    x = tf.random.normal((1, 4, 5, 2))
    theory, numeric = tf.test.compute_gradient(
        lambda x: patches(x, (2, 3), (2, 1), (1, 1), "same"), [x]
    )
    np.testing.assert_allclose(theory[0], numeric[0], atol=1e-3)

    def cost(x):
        return tf.reduce_sum(patches(x, (3, 3), (1, 1), (1, 1), "same") ** 3)

    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = cost(x)
        first = inner.gradient(y, x)
        total = tf.reduce_sum(first)
    counts = patches(tf.ones_like(x), (3, 3), (1, 1), (1, 1), "same")
    times = tf.reshape(tf.reduce_sum(tf.reshape(counts, (1, 4, 5, 9, 2)), axis=3), x.shape)
    np.testing.assert_allclose(first, 3 * times * x**2, rtol=1e-4)  # each pixel is in so many
    np.testing.assert_allclose(outer.gradient(total, x), 6 * times * x, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"filters": 0}, "filters must be a positive integer. Received: 0"),
        ({"kernel_size": (3, 0)}, "kernel_size must be a positive integer or 2 of them"),
        ({"strides": 1.5}, "strides must be a positive integer or 2 of them. Received: 1.5"),
        ({"padding": "causal"}, "padding must be 'valid' or 'same'. Received: 'causal'"),
        ({"groups": 2}, "groups=1 and data_format='channels_last' only. Received: groups=2"),
        ({"data_format": "channels_first"}, "Keep a keras.layers.Conv2D"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        at.SparseConv2D(**{"filters": 4, "kernel_size": 3, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel_size": (3, 3)}, r"kernel_size must be a positive integer. Received: \(3, 3\)"),
        ({"padding": "full"}, "padding must be 'valid' or 'same' or 'causal'. Received: 'full'"),
        ({"groups": 2}, "SparseConv1D has groups=1 .*Keep a keras.layers.Conv1D"),
    ],
)
def test_wrong_arguments_in_one_dimension(arguments, message):
    with pytest.raises(ValueError, match=message):
        at.SparseConv1D(**{"filters": 4, "kernel_size": 3, **arguments})


def test_wrong_shapes_name_the_layer():
    with pytest.raises(ValueError, match="'c' needs to know the channels of its input"):
        at.SparseConv2D(4, 3, name="c").build((None, 8, 8, None))
    with pytest.raises(ValueError, match="'c' reaches over 5 pixels, and cannot take .*4, 8, 3"):
        layer = at.SparseConv2D(4, 3, dilation_rate=2, name="c")
        layer.compute_output_shape((None, 4, 8, 3))


def test_config_round_trip():
    layer = at.SparseConv2D(
        8, (3, 1), 0.7, "relu6", strides=(1, 2), padding="same", dilation_rate=1, format="4x1"
    )
    layer.build((None, 8, 8, 4))
    config = layer.get_config()
    again = at.SparseConv2D.from_config(config)
    assert again.get_config() == config
    again.build((None, 8, 8, 4))
    np.testing.assert_array_equal(again.matrix.to_dense(), layer.matrix.to_dense())
