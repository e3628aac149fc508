"""Fake-quantized models round as the integer kernels do: biases, and means of integers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as L

import accel_tf as at
from accel_tf.quantization._grids import Grid, grid_of, note_grid

# Sums that fall on a half are rounded by the last bit of a float, and differ now and then; with biases
# of floats many times as many outputs would, and an eighth of the means.
SHARE = 2e-4


def _stack(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


def _norm():
    return L.BatchNormalization(
        beta_initializer="random_normal",
        moving_mean_initializer="random_normal",
        gamma_initializer=keras.initializers.RandomUniform(0.5, 1.5),
    )


def _read_by_equal_activations():
    image = keras.Input(IMAGE)
    x = _norm()(L.Conv2D(24, 3, use_bias=False)(image))
    pooled = L.MaxPooling2D(2)(L.ReLU()(x))
    return keras.Model(
        image, L.Concatenate()([pooled, L.MaxPooling2D(2)(L.ReLU()(L.Dropout(0.1)(x)))])
    )


IMAGE, SIGNAL = (16, 16, 8), (64, 8)
BIAS = {"bias_initializer": "random_normal"}
MODELS = {
    "convolution": lambda: _stack(IMAGE, L.Conv2D(24, 3, **BIAS)),
    "normalized": lambda: _stack(IMAGE, L.Conv2D(24, 1, use_bias=False), _norm(), L.ReLU()),
    "normalized, biased": lambda: _stack(IMAGE, L.Conv2D(24, 1, **BIAS), _norm()),
    "depthwise": lambda: _stack(IMAGE, L.DepthwiseConv2D(3, 2, depth_multiplier=2), _norm()),
    "separable": lambda: _stack(IMAGE, L.SeparableConv2D(24, 3, use_bias=False), _norm()),
    "separable, biased": lambda: _stack(IMAGE, L.SeparableConv2D(24, 3, **BIAS)),
    "dilated": lambda: _stack(IMAGE, L.Conv2D(24, 3, dilation_rate=2, **BIAS)),
    "normalization alone": lambda: _stack(IMAGE, _norm()),
    "signal": lambda: _stack(SIGNAL, L.Conv1D(32, 3, **BIAS)),
    "positions": lambda: _stack(SIGNAL, L.Dense(32, activation="relu", **BIAS)),
    "einsum": lambda: _stack(
        SIGNAL, L.EinsumDense("abc,cde->abde", (None, 4, 8), bias_axes="de", **BIAS)
    ),
    "grid handed on": lambda: _stack(
        IMAGE, L.ReLU(), L.MaxPooling2D(8), L.Dropout(0.5), L.Flatten(), L.Dense(1024, **BIAS)
    ),
    "means": lambda: _stack(IMAGE, L.AveragePooling2D(2), L.Conv2D(24, 1, use_bias=False)),
    "means of few at the border": lambda: _stack(
        IMAGE, L.ReLU(), L.AveragePooling2D(3, 1, "same"), L.Conv2D(24, 1, use_bias=False)
    ),
    "read by equal activations": _read_by_equal_activations,
    "means of a signal": lambda: _stack(SIGNAL, L.AveragePooling1D(4), L.Dense(128)),
}


def _last_step(quantized):
    return [v.scale for _, v in at.layers.walk(quantized) if hasattr(v, "scale")][-1]


@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_numbers_of_the_model(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    x = np.random.default_rng(0).normal(0.1, 1, (64, *model.input_shape[1:])).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    expected = np.asarray(quantized(x))
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    assert expected.size > 30_000
    assert np.mean(np.abs(found - expected) > _last_step(quantized) / 2) <= SHARE


@pytest.mark.parametrize("bound", [1.0, 1.7, 3.0])
def test_zero_is_on_the_same_integer_where_it_is_halfway_between_two(bound, tmp_path):
    model = _stack(IMAGE, L.Conv2D(24, 3), L.ReLU())
    x = np.random.default_rng(0).uniform(-bound, bound, (16, *IMAGE)).astype("float32")
    x[0, 0, 0, :2] = -bound, bound
    quantized = at.calibrate(model, x, verbose=0)
    quantizer = quantized.layers[0]
    low, high = quantizer.ends
    np.testing.assert_allclose(quantizer.range, (-bound, bound), rtol=1e-6)
    np.testing.assert_allclose((low, high), (-128 * quantizer.scale, 127 * quantizer.scale), 1e-6)
    assert quantizer.zero_point == 0
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    differ = np.abs(found - quantized(x)) > _last_step(quantized) / 2
    assert np.mean(differ) <= SHARE


def test_a_bias_stays_what_it_is_where_activations_are_floats():
    model = _stack((8,), L.Dense(8, name="before"), L.Dense(4, name="after", **BIAS))
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    quantized = at.calibrate(model, x, at.Int8Weights(), verbose=0)
    kernels = [at.quantization.fake_quantize_weights(v.kernel.value) for v in model.layers]
    biases = [v.bias.numpy() for v in model.layers]
    expected = (x @ kernels[0] + biases[0]) @ kernels[1] + biases[1]
    np.testing.assert_allclose(quantized(x), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_moves_by_half_a_step_of_the_sums_at_most():
    model = _stack((8,), L.Dense(4, name="y", **BIAS))
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    wrapper, source = quantized.layers[-1], quantized.layers[0]
    step = source.scale * np.abs(model.layers[0].kernel.numpy()).max(axis=0) / 127
    sums = wrapper.sums(source(x), wrapper.layer.kernel, (-1,), training=False)
    np.testing.assert_allclose(sums.step, step, rtol=1e-5)
    bias, exact = sums.bias(wrapper.layer.bias).numpy(), model.layers[0].bias.numpy()
    assert np.abs(bias - exact).max() > 0
    assert (np.abs(bias - exact) <= 0.501 * step).all()
    np.testing.assert_allclose(bias / step, np.round(bias / step), atol=1e-2)


@given(
    low=st.integers(-255, 0),
    step=st.floats(1e-3, 1e3),
    window=st.integers(2, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_means_are_rounded_away_from_the_integer_0(low, step, window, seed):
    step = np.float32(step)
    integers = np.random.default_rng(seed).integers(low, low + 256, (40, window))
    zero = -128 - low
    x = tf.constant(integers * step, tf.float32)
    grid = Grid(tf.constant(step), tf.constant(float(zero)))
    found = grid.rounded(lambda v: tf.reduce_mean(v, -1), x).numpy()
    sums = (integers + zero).sum(axis=-1)
    # LiteRT: (sum ± n / 2) / n, where division drops the fraction.
    expected = np.sign(sums) * ((2 * np.abs(sums) + window) // (2 * window)) - zero
    np.testing.assert_allclose(found / step, expected, atol=1e-2)


def test_means_are_exact_where_no_range_is_known_and_have_their_gradient():
    x = tf.constant([[0.3, 0.4]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = Grid(tf.constant(1.0), tf.constant(0.0)).rounded(lambda v: tf.reduce_mean(v, -1), x)
    assert float(y[0]) == 0.0
    np.testing.assert_allclose(tape.gradient(y, x), [[0.5, 0.5]])
    unknown = Grid(tf.constant(0.0), tf.constant(0.0))
    np.testing.assert_allclose(unknown.rounded(lambda v: tf.reduce_mean(v, -1), x), [0.35])
    assert grid_of(x) is None
    assert grid_of(note_grid(x, lambda: unknown)) is unknown
