"""Numbers that have no grid: each is an error that names the layer, at the first verb that meets it."""

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.quantization import MSE, FakeQuantize, Learned, MinMax, MovingAverage

L = keras.layers


def network():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4, name="dense")], name="inner")
    x = keras.Input((4,), name="x")
    return keras.Model(x, L.Dense(2, name="logits")(L.ReLU(name="relu")(inner(x))))


def data(n=8):
    return np.random.default_rng(0).normal(size=(n, 4)).astype("float32")


def poison(model, value):
    kernel = model.get_layer("inner").get_layer("dense").kernel
    kernel.assign(tf.tensor_scatter_nd_update(kernel.value, [[1, 2]], [value]))
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("verb", ["quantize_aware", "calibrate"])
def test_weights_that_are_no_numbers_are_found_at_once(verb, value):
    model = poison(network(), value)
    arguments = (data(),) if verb == "calibrate" else ()
    message = (
        r"Layer 'inner/dense' has 1 NaN or infinite weights in 'kernel', the first at \(1, 2\)"
    )
    with pytest.raises(ValueError, match=message + r".*exclude=\['inner/dense'\]"):
        getattr(at, verb)(model, *arguments)
    at.quantize_aware(model, exclude=["inner/dense"])


def test_weights_that_training_has_ruined_are_not_exported(tmp_path):
    quantized = at.calibrate(network(), data(), verbose=0)
    kernel = quantized.get_layer("inner").get_layer("dense").layer.kernel
    kernel.assign(kernel * np.nan)
    with pytest.raises(ValueError, match="Layer 'inner/dense' has 16 NaN or infinite weights"):
        at.export.litert(quantized, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_an_empty_batch_is_named():
    with pytest.raises(ValueError, match="at least one batch of data; received none"):
        at.calibrate(network(), data(0), verbose=0)
    batches = [data(), data(0), data()]
    with pytest.raises(ValueError, match=r"Batch 1 of the calibration data is empty: .*\(0, 4\)"):
        at.calibrate(network(), iter(batches), verbose=0)


@pytest.mark.parametrize("observer", [MovingAverage(), MinMax(), MSE(), Learned()], ids=repr)
@pytest.mark.parametrize("size", [1e32, 1e-12])
def test_values_that_have_no_grid_are_an_error(observer, size):
    quantize = FakeQuantize(observer=observer, name="q")
    quantize(np.linspace(-1, 1, 9, dtype="float32") * np.float32(size), training=True)
    if isinstance(observer, Learned) and size < 1:
        assert quantize.range[1] <= 1e-8  # it is never narrower
        return
    with pytest.raises(ValueError, match=r"range of 'q' is \[.*\], for which there is no grid"):
        _ = quantize.scale


def test_calibrate_names_the_layer_whose_values_are_too_large_or_too_small():
    model = network()
    kernel = model.get_layer("inner").get_layer("dense").kernel
    kernel.assign(kernel * 1e33)
    with pytest.raises(ValueError, match="range of '.*dense.*' is .* no grid"):
        at.calibrate(model, data(), verbose=0)
    kernel.assign(kernel * 1e-23)
    kernel.assign(kernel * 1e-23)
    with pytest.raises(ValueError, match="range of '.*dense.*' is .* no grid"):
        at.calibrate(model, data(), verbose=0)


def test_an_overflow_of_half_precision_is_told_from_bad_data():
    keras.config.set_dtype_policy("mixed_float16")
    model = network()
    keras.config.set_dtype_policy("float32")
    kernel = model.get_layer("inner").get_layer("dense").kernel
    kernel.assign(kernel * 0 + 50_000.0)
    with pytest.raises(
        ValueError, match=r"'inner/dense.*' in each batch|for 'inner/dense/output'.*65504"
    ):
        at.calibrate(model, np.ones((8, 4), "float32"), verbose=0)


def test_zeros_alone_have_a_grid():
    quantized = at.calibrate(network(), np.zeros((4, 4), "float32"), verbose=0)
    np.testing.assert_array_equal(quantized(np.zeros((1, 4))), np.zeros((1, 2)))


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    st.sampled_from([(8, False), (4, False), (16, True)]),
)
def test_each_range_has_a_zero_point_that_fits_or_is_an_error(a, b, grid):
    bits, symmetric = grid
    quantize = FakeQuantize(bits, MinMax(), symmetric=symmetric, name="q")
    quantize(np.array([a, b], "float32"), training=True)
    size = max(abs(a), abs(b))
    if 0 < size <= 1e-9 or size >= 1e30:
        with pytest.raises(ValueError, match="no grid"):
            _ = quantize.scale
        return
    assert -(2 ** (bits - 1)) <= quantize.zero_point < 2 ** (bits - 1)
    assert np.isfinite(quantize.scale) and quantize.scale > 0
    assert float(quantize(np.zeros(1, "float32"))[0]) == 0.0


def test_images_of_any_size_calibrate_and_each_size_is_seen():
    x = keras.Input((None, None, 1), name="image")
    y = L.GlobalAveragePooling2D()(L.Conv2D(2, 3, activation="relu", name="conv")(x))
    model = keras.Model(x, L.Dense(2)(y))
    batches = [np.ones((2, 6, 6, 1)), np.full((2, 9, 7, 1), 3.0), np.full((1, 6, 6, 1), -2.0)]
    quantized = at.calibrate(model, (b.astype("float32") for b in batches), verbose=0)
    low, high = quantized.layers[1].range
    assert low < 0 < high
    assert quantized(np.ones((1, 12, 5, 1))).shape == (1, 2)
