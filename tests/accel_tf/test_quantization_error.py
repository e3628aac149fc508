"""The signal-to-noise ratio of each layer, and what it suggests to leave in float."""

import keras
import numpy as np
import pytest

import accel_tf as at
from accel_tf.quantization import quantization_error

L = keras.layers


def network():
    """Nested and shared layers; the kernel of "spiky" has an outlier that costs all others their bits."""
    inner = keras.Sequential(
        [keras.Input((12,)), L.Dense(12, activation="relu", name="dense")], name="inner"
    )
    x = keras.Input((12,), name="x")
    y = inner(inner(x))
    y = L.Add(name="add")([y, L.Dense(12, name="spiky")(x)])
    return keras.Model(x, L.Dense(4, name="logits")(y))


def spiked(model):
    kernel = model.get_layer("spiky").kernel
    value = kernel.numpy()
    value[0] = 12.0  # in each channel, for an input that is always 0
    kernel.assign(value)
    return model


@pytest.fixture
def case():
    x = np.random.default_rng(0).normal(size=(96, 12)).astype("float32")
    x[:, 0] = 0.0
    model = spiked(network())
    return model, x, at.calibrate(model, x, verbose=0)


def decibels(reference, got):
    reference, got = np.asarray(reference, "float64"), np.asarray(got, "float64")
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - got) ** 2))


def test_the_total_is_the_ratio_of_the_outputs(case):
    model, x, quantized = case
    error = quantization_error(quantized, x, verbose=0)
    assert error.total == pytest.approx(decibels(model(x), quantized(x)), abs=0.01)
    assert list(error.alone) == ["x_quantizer", "inner/dense", "spiky", "add", "logits"]
    assert error.own["logits"] == pytest.approx(error.total)


def test_each_layer_alone_is_the_model_with_the_others_in_float(case):
    model, x, quantized = case
    error = quantization_error(quantized, x, verbose=0)
    # Only the kernel of "spiky" rounds much, and by hand:
    step = np.abs(model.get_layer("spiky").kernel.numpy()).max(0) / 127
    rounded = keras.models.clone_model(model)
    rounded.set_weights(model.get_weights())
    kernel = rounded.get_layer("spiky").kernel
    kernel.assign(np.round(kernel.numpy() / step) * step)
    assert error.alone["spiky"] == pytest.approx(decibels(model(x), rounded(x)), abs=0.4)
    assert error.alone["spiky"] == min(error.alone.values()) < 25
    assert all(ratio > 30 for path, ratio in error.alone.items() if path != "spiky")


def test_noise_adds_up(case):
    _, x, quantized = case
    error = quantization_error(quantized, x, verbose=0)
    predicted = -10 * np.log10(sum(10 ** (-ratio / 10) for ratio in error.alone.values()))
    assert error.total == pytest.approx(predicted, abs=1.0)


def test_the_suggestion_is_what_exclude_needs(case):
    model, x, quantized = case
    error = quantization_error(quantized, x, target=26, verbose=0)
    assert error.suggestion == ["spiky"]
    assert error.total < 25 and error.reached >= 26
    better = at.calibrate(model, x, exclude=error.suggestion, verbose=0)
    again = quantization_error(better, x, target=26, verbose=0)
    assert again.total > 26 and again.suggestion == []
    assert "leave in float" in error.columns and "yes" in str(error)


def test_a_target_out_of_reach_says_so(case):
    _, x, quantized = case
    error = quantization_error(quantized, x, target=200, verbose=0)
    assert set(error.suggestion) == {"inner/dense", "spiky", "add", "logits"}
    assert "no set of layers gives more" in error.note
    assert error.reached < 200


def test_nothing_of_the_model_changes(case):
    _, x, quantized = case
    before, expected = quantized.get_weights(), quantized(x)
    quantization_error(quantized, x, verbose=0)
    for old, new in zip(before, quantized.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(expected, quantized(x))
    assert not any("call" in vars(layer) for _, layer in at.layers.walk(quantized))


@pytest.mark.parametrize("scheme", [at.Int8Weights(), at.Int4Weights(4)], ids=["int8", "int4"])
def test_weights_alone_have_an_error_too(case, scheme):
    model, x, _ = case
    quantized = at.quantize_aware(model, scheme)
    error = quantization_error(quantized, x, verbose=0)
    assert error.total == pytest.approx(decibels(model(x), quantized(x)), abs=0.01)


def test_it_is_for_models_of_attention_and_memory_too():
    x = keras.Input((6, 8), name="x")
    y = L.MultiHeadAttention(2, 4, name="attention")(x, x)
    y = L.LSTM(5, name="memory")(L.LayerNormalization(name="norm")(y))
    model = keras.Model(x, L.Dense(3, name="logits")(y))
    data = np.random.default_rng(0).normal(size=(40, 6, 8)).astype("float32")
    quantized = at.calibrate(model, data, verbose=0)
    error = quantization_error(quantized, data, verbose=0)
    assert error.total == pytest.approx(decibels(model(data), quantized(data)), abs=0.05)
    assert {"attention", "memory", "norm", "logits"} <= set(error.alone)
    assert all(np.isfinite(error.alone[p]) for p in ("attention", "memory", "logits"))


def test_the_plot_has_each_layer_and_the_suggestion_in_red(case):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, x, quantized = case
    error = quantization_error(quantized, x, target=26, verbose=0)
    axes = error.plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == list(error.alone)
    colors = axes.collections[1].get_facecolors()
    red = [tuple(c[:3]) == matplotlib.colors.to_rgb("#D55E00") for c in colors]
    assert [p for p, is_red in zip(error.alone, red, strict=True) if is_red] == ["spiky"]
    plt.close(axes.figure)


def test_what_cannot_be_compared_is_an_error(case):
    model, x, quantized = case
    with pytest.raises(ValueError, match="is not quantized, so nothing can be compared"):
        quantization_error(model, x, verbose=0)
    with pytest.raises(ValueError, match="ranges of model .* are unknown: no data has been seen"):
        quantization_error(at.quantize_aware(model), x, verbose=0)
    with pytest.raises(ValueError, match=r"one length above 0; received lengths \[0\]"):
        quantization_error(quantized, x[:0], verbose=0)
    with pytest.raises(ValueError, match="received int"):
        quantization_error(3, x, verbose=0)
