"""Biases of each sort: equal numbers, zeros, huge and tiny ones, one channel, one number."""

import keras
import numpy as np
import pytest
from keras import layers as L

import accel_tf as at

IMAGE, SIGNAL = (8, 8, 3), (12, 4)
HUGE = keras.initializers.Constant(1e4)


SORTS = {
    "equal": keras.initializers.Constant(1.0),
    "a prior": keras.initializers.Constant(-4.6),
    "zero": "zeros",
    "huge": HUGE,
    "denormal": keras.initializers.Constant(1e-40),
    "random": "random_normal",
}


def sqnr(signal, noisy):
    signal, noisy = np.asarray(signal, "float64"), np.asarray(noisy, "float64")
    return 10 * np.log10((signal**2).sum() / max(((signal - noisy) ** 2).sum(), 1e-30))


def _images(bias):
    x = keras.Input(IMAGE)
    given = {"bias_initializer": bias}
    norm = L.BatchNormalization(beta_initializer=bias, gamma_initializer="random_normal")
    cancelled = L.BatchNormalization(beta_initializer=bias, moving_mean_initializer=HUGE)
    return keras.Model(
        x,
        {
            "convolution": L.Conv2D(8, 3, **given)(x),
            "depthwise": L.DepthwiseConv2D(3, **given)(x),
            "separable": L.SeparableConv2D(8, 3, **given)(x),
            "normalized": L.BatchNormalization()(L.Conv2D(8, 3, **given)(x)),
            "normalization": norm(x),
            "cancelled": cancelled(L.Conv2D(8, 3, bias_initializer=HUGE)(x)),
        },
    )


def _signals(bias):
    x = keras.Input(SIGNAL)
    given = {"bias_initializer": bias}
    return keras.Model(
        x,
        {
            "positions": L.Dense(8, **given)(x),
            "einsum": L.EinsumDense("abc,cde->abde", (None, 2, 8), bias_axes="de", **given)(x),
            "sigmoid": L.Dense(8, activation="sigmoid", **given)(x),
            "signal": L.Conv1D(8, 3, **given)(x),
            "one channel": L.Conv1D(1, 3, **given)(x),
            "one channel up": L.Conv1DTranspose(1, 3, strides=2, **given)(x),
            "one channel each": L.DepthwiseConv1D(3, **given)(L.Conv1D(1, 1)(x)),
        },
    )


def outputs(model, x, path):
    """Returns the outputs of the fake-quantized model and of its file, and the scale of each."""
    single = keras.Model(model.inputs[0], keras.tree.flatten(model.output))
    quantized = at.calibrate(single, x, verbose=0)
    found = at.export.litert(quantized, path)
    return quantized(x), at.export.run_litert(path, x), quantized, found


@pytest.mark.filterwarnings("ignore:The quantized model .* differs much")  # of a huge bias
@pytest.mark.parametrize("build", [_images, _signals])
@pytest.mark.parametrize("sort", SORTS)
def test_a_bias_of_any_sort_is_the_same_in_the_file(build, sort, tmp_path):
    model = build(SORTS[sort])
    x = np.random.default_rng(0).normal(size=(16, *model.inputs[0].shape[1:])).astype("float32")
    expected, found, _, file = outputs(model, x, tmp_path / "m.tflite")
    assert file.int8_fraction == 1.0
    names = list(keras.tree.flatten({name: name for name in model.output}))
    for name, y, z in zip(names, expected, found, strict=True):
        y, z = np.asarray(y), np.asarray(z)
        if name in ("cancelled", "one channel up"):
            # The first has lost four digits to a difference of floats; the kernel of the second rounds
            # twice. Neither differs by more than one scale.
            scale = (max(y.max(), 0) - min(y.min(), 0)) / 254
            assert np.abs(z - y).max() < 1.01 * scale, name
            assert np.mean(z != y) < 0.05, name
        else:
            np.testing.assert_array_equal(z, y, err_msg=name)


@pytest.mark.parametrize("sort", ["equal", "a prior"])
def test_equal_biases_of_layers_of_several_kernels_are_right_in_the_file(sort, tmp_path):
    x = keras.Input(SIGNAL)
    bias = SORTS[sort]
    model = keras.Model(
        x,
        [
            L.MultiHeadAttention(2, 4, bias_initializer=bias)(x, x),
            L.GRU(4, bias_initializer=bias)(x),
            L.SimpleRNN(4, bias_initializer=bias)(x),
        ],
    )
    data = np.random.default_rng(0).normal(size=(16, *SIGNAL)).astype("float32")
    _, found, _, _ = outputs(model, data, tmp_path / "m.tflite")
    for y, z in zip(model(data), found, strict=True):
        assert sqnr(y, z) > 30
