"""Calibration: the ranges of activations, found on data without training."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from quantized_models import fit, quantizers, residual, small_cnn

import accel_tf as at
from accel_tf.layers import sqnr
from accel_tf.quantization import Int4Weights

L = keras.layers


def two_inputs():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    return keras.Model([a, b], L.Dense(2)(L.Add()([a, b])))


def test_calibration_takes_data_in_every_usual_form():
    x = np.random.default_rng(0).normal(size=(10, 8, 8, 1)).astype("float32")
    y = np.zeros(10)
    model = small_cnn()
    pairs = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    forms = [
        x,
        tf.constant(x),
        pairs,
        pairs.map(lambda x, y: x),
        ((b, None) for b in (x[:4], x[4:8], x[8:])),
    ]
    ranges = {at.calibrate(model, d, batch_size=4, verbose=0).layers[0].range for d in forms}
    assert len(ranges) == 1
    low, high = ranges.pop()
    assert x.min() <= low < 0 < high <= x.max()

    a, b = np.ones((4, 3)), np.full((4, 3), -2.0)
    for data in ([a, b], {"a": a, "b": b}, iter([([a, b], None)])):
        quantized = at.calibrate(two_inputs(), data, verbose=0)
        assert quantized.get_layer("a_quantizer").range == (0.0, 1.0)
        assert quantized.get_layer("b_quantizer").range == (-2.0, 0.0)
    images = keras.Sequential([keras.Input((2,), dtype="uint8"), L.Rescaling(1 / 255), L.Dense(2)])
    quantized = at.calibrate(images, np.array([[0, 255]], "uint8"), verbose=0)
    assert quantized.layers[0].quantizers[0].range == (0.0, 255.0)


def test_ranges_are_those_of_the_float_model_however_the_data_are_divided():
    keras.utils.set_random_seed(2)
    model = residual()
    x = np.random.normal(size=(50, 6, 6, 2)).astype("float32")
    fit(model)  # so that no layer passes its input on as it is
    forward, backward = (
        at.calibrate(model, data, batch_size=n, verbose=0) for data, n in ((x, 50), (x[::-1], 7))
    )
    for ours, other in zip(quantizers(forward), quantizers(backward), strict=True):
        np.testing.assert_allclose(ours.range, other.range, rtol=1e-5)
    for name in ("add_relu", "pre_relu", "mean", "scale", "logits"):
        values = keras.Model(model.input, model.get_layer(name).output)(x)
        low, high = forward.get_layer(name).output_quantizer.range
        np.testing.assert_allclose(low, min(0, np.min(values)), rtol=1e-5)
        np.testing.assert_allclose(high, np.max(values), rtol=1e-5)


def test_calibration_trains_nothing():
    model = small_cnn()
    quantized = at.calibrate(model, np.random.normal(3, 2, (64, 8, 8, 1)), verbose=0)
    np.testing.assert_array_equal(
        quantized.get_layer("norm").layer.moving_mean.numpy(),
        model.get_layer("norm").moving_mean.numpy(),
    )
    np.testing.assert_array_equal(
        quantized.get_layer("conv").layer.kernel.numpy(),
        model.get_layer("conv").kernel.numpy(),
    )


def test_weights_alone_are_quantized_without_data():
    model = small_cnn()
    x = np.random.normal(size=(8, 8, 8, 1)).astype("float32")
    errors = []
    for scheme in (at.Float16(), at.Int8Weights(), Int4Weights(8), Int4Weights(None)):
        quantized = at.calibrate(model, None, scheme, verbose=0)
        assert not quantizers(quantized)
        assert type(quantized.get_layer("relu")) is L.ReLU
        errors.append(float(np.abs(quantized(x) - model(x)).max()))
    assert 0 < errors[0] < errors[1] < min(errors[2:])
    with pytest.raises(ValueError, match="needs data to find the ranges"):
        at.calibrate(model, None, verbose=0)


def test_schemes_are_mixed_by_path():
    x = np.random.normal(size=(16, 8, 8, 1)).astype("float32")
    mixed = at.Mixed({"h*": at.Int8Weights(), "probabilities": None})
    quantized = at.calibrate(small_cnn(), x, mixed, verbose=0)
    assert quantized.get_layer("conv").scheme == at.Int8()
    assert quantized.get_layer("hidden").quantizers == []
    assert type(quantized.get_layer("probabilities")) is L.Dense
    with pytest.raises(ValueError, match="Mixed: 'head' matches no layer"):
        at.calibrate(small_cnn(), x, at.Mixed({"head": None}), verbose=0)
    with pytest.raises(ValueError, match="None for float, for 'conv'; received 8"):
        at.Mixed({"conv": 8})


def test_data_that_calibrates_nothing_is_an_error():
    model = small_cnn()
    with pytest.raises(ValueError, match="at least one batch of data; received none"):
        at.calibrate(model, iter([]), verbose=0)
    bad = np.ones((6, 8, 8, 1))
    bad[5] = np.inf
    with pytest.raises(ValueError, match="Batch 2 of the calibration data has NaN or infinite"):
        at.calibrate(model, bad, batch_size=2, verbose=0)
    with pytest.raises(ValueError, match=r"finite dataset.*take\(batches\)"):
        at.calibrate(model, tf.data.Dataset.from_tensors(np.ones((1, 8, 8, 1))).repeat(), verbose=0)
    with pytest.raises(ValueError, match=r"same length, received \[2, 3\]"):
        at.calibrate(two_inputs(), [np.ones((2, 3)), np.ones((3, 3))], verbose=0)


# Data that does not fit the model ----------------------------------------------------------------


def line(shape=(4,), dtype="float32"):
    stack = [keras.Input(shape, dtype=dtype, name="x"), L.Dense(3)]
    return keras.Sequential(stack, name="line")


X = np.linspace(-1, 3, 80, dtype="float32").reshape(20, 4)
Y = np.zeros((20, 3), "float32")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"at least one sample; received an empty list. Write calibrate\(model, x\)"),
        ((), "at least one sample; received an empty tuple"),
        ({}, "at least one sample; received an empty dict"),
        (X[:0], "at least one batch of data; received none"),
        ((X, Y), r"has 1 input, .* tuple of 2: \(20, 4\), \(20, 3\).*write calibrate\(model, x\)"),
        ([X, X], r"has 1 input, .* list of 2: .* write calibrate\(model, iter\(batches\)\)"),
        (3, "takes an array, .* Received: int 3"),
        ("data.npy", "takes an array, .* Received: str 'data.npy'"),
        (X[:, :3], r"Batch 0 .* has the shape \(20, 3\), and input 'x' takes \(None, 4\)"),
        (X[None], r"Batch 0 .* has the shape \(1, 20, 4\)"),
        (X[0], r"shape \(4,\), and .* looks like a single sample: .*batch\(32\)"),
        (tf.data.Dataset.from_tensor_slices(X), "looks like a single sample"),
        (iter([X, Y]), r"Batch 1 .* has the shape \(20, 3\)"),
        (iter([X, X[:0]]), r"Batch 1 .* is empty: its shape is \(0, 4\)"),
        ({"pear": X}, r"keys \['pear'\], and the model needs \['x'\]"),
        (X.astype("complex64"), "Batch 0 .* has complex64 values that input 'x', of type float32"),
        (X.astype(str), "Batch 0 .* has string values that input 'x', of type float32"),
        (np.full((2, 4), None), "Batch 0 .* is no array of numbers"),
    ],
)
def test_data_that_does_not_fit_the_model_is_described(data, message):
    with pytest.raises(ValueError, match=message):
        at.calibrate(line(), data, verbose=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            ([np.ones((4, 3)), np.ones((4, 3))], np.ones(4)),
            r"2 inputs, .* tuple of 2: list, \(4,\)",
        ),
        ([np.ones((4, 3))], r"2 inputs, .* list of 1: \(4, 3\)"),
        (np.ones((4, 3)), r"has 1 array, and the model takes 2: \['a', 'b'\]"),
        ({"a": np.ones((4, 3)), "c": np.ones((4, 3))}, r"keys \['a', 'c'\].*needs \['b'\]"),
    ],
)
def test_data_of_too_few_inputs_is_described(data, message):
    with pytest.raises(ValueError, match=message):
        at.calibrate(two_inputs(), data, verbose=0)


def test_data_in_lists_tuples_and_dictionaries_means_the_same_as_an_array():
    expected = (-1.0, 3.0)
    for data in (X.tolist(), [X], {"x": X}, [(X[:9], Y[:9]), (X[9:], Y[9:])]):
        quantized = at.calibrate(line(), data, batch_size=8, verbose=0)
        assert quantized.layers[0].range == expected


def test_several_inputs_come_in_tuples_dictionaries_and_lists_of_batches():
    a, b = np.ones((4, 3)), np.full((4, 3), -2.0)
    for data in ((a, b), {"a": a.tolist(), "b": b, "unused": a}, [[a, b], [a, b]]):
        quantized = at.calibrate(two_inputs(), data, verbose=0)
        assert quantized.get_layer("a_quantizer").range == (0.0, 1.0)
        assert quantized.get_layer("b_quantizer").range == (-2.0, 0.0)


def test_inputs_that_an_integer_type_would_cut_off_are_refused():
    images = keras.Sequential([keras.Input((2,), dtype="uint8"), L.Rescaling(1 / 255), L.Dense(2)])
    whole = at.calibrate(images, np.array([[0.0, 255.0]]), verbose=0)
    assert whole.layers[0].quantizers[0].range == (0.0, 255.0)
    with pytest.raises(
        ValueError, match="float64 values that input .*, of type uint8, does not hold"
    ):
        at.calibrate(images, np.array([[0.0, 0.5]]), verbose=0)


def test_float_ids_are_refused_where_they_would_be_quantized():
    keras.utils.set_random_seed(0)
    ids = keras.Input((4,), name="ids")
    pooled = L.GlobalAveragePooling1D()(L.Embedding(300, 8, name="table")(ids))
    model = keras.Model(ids, L.Dense(2)(pooled))
    x = np.random.default_rng(0).integers(0, 300, (50, 4)).astype("float32")
    with pytest.raises(
        ValueError, match=r"'table'.*ids are floats.*dtype='int32'.*exclude=\['table"
    ):
        at.calibrate(model, x, verbose=0)
    expected = np.asarray(model(x))
    for quantized in (
        at.calibrate(model, x, exclude=["table"], verbose=0),
        at.calibrate(model, None, at.Int8Weights(), verbose=0),
    ):
        error = np.square(quantized(x) - expected).sum()
        assert 10 * np.log10(np.square(expected).sum() / error) > 30


def fixed_batch(*layers):
    return keras.Sequential([keras.Input(batch_shape=(8, 4, 3)), *layers, L.Dense(2)])


def test_a_model_of_a_fixed_batch_runs_in_batches_of_that_size():
    x = np.random.default_rng(0).normal(size=(40, 4, 3)).astype("float32")
    for layer, out in ((L.GRU(8, stateful=True, name="gru"), ["gru"]), (L.Flatten(), [])):
        model = fixed_batch(layer)
        quantized = at.calibrate(model, x, exclude=out, verbose=0)
        assert "Checked without rounding on 16 samples" in at.report_of(quantized).note
        assert sqnr(np.asarray(model(x[:8])), np.asarray(quantized(x[:8]))) > 25
        if not out:  # so that no state tells the batches apart
            for data in (tf.data.Dataset.from_tensor_slices(x).batch(8), iter([x])):
                same = at.calibrate(model, data, verbose=0)
                assert same.layers[0].range == quantized.layers[0].range


@pytest.mark.parametrize("data", [lambda x: x, lambda x: iter([x[:32], x[32:]])])
def test_samples_that_are_no_whole_batches_are_an_error(data):
    x = np.zeros((39, 4, 3), "float32")
    with pytest.raises(ValueError, match="samples, .* take 8 at a time.*a multiple of 8"):
        at.calibrate(fixed_batch(L.Flatten()), data(x), verbose=0)


def test_rounding_that_hides_what_varies_between_samples_is_a_warning():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    dense = L.Dense(4, "softmax", name="logits")
    model = keras.Sequential([keras.Input((8,)), dense])
    dense.kernel.assign(1e-3 * dense.kernel)  # all outputs are close to those of the bias
    dense.bias.assign([0.0, 1.0, 2.0, 0.5])
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", UserWarning)
        quantized = at.calibrate(model, x, verbose=0)
    (warning,) = [w for w in given if w.category is UserWarning]
    assert "dB of what varies between samples, on the first samples" in str(warning.message)
    y, z = np.asarray(model(x[:16])), np.asarray(quantized(x[:16]))
    assert sqnr(y, z) > 35 and sqnr(y - y.mean(0), z - y.mean(0)) < 0
    note = at.report_of(quantized).note
    total = np.median([sqnr(a, b) for a, b in zip(y, z, strict=True)])
    varies = sqnr(y - y.mean(0), z - y.mean(0))
    assert note.endswith(
        f"With rounding: {total:.1f} dB, and {varies:.1f} dB of what varies between samples."
    )
