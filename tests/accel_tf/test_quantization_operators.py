"""Operators of keras.ops between layers: in integers, or as islands of floats that have a name."""

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import accel_tf as at
from accel_tf.quantization import FakeQuantize

SHAPE = (6, 8)


def _model(functions):
    """Returns a model with one output for each function of three tensors."""
    x = keras.Input(SHAPE)
    tensors = [L.Dense(8, name=f"d{i}")(x) for i in range(3)]
    return keras.Model(x, [function(*tensors) for function in functions])


def _exported(functions, path, scale=1.0):
    model = _model(functions)
    x = np.random.default_rng(0).normal(size=(32, *SHAPE)).astype("float32") * np.float32(scale)
    quantized = at.calibrate(model, x, verbose=0)
    file = at.export.litert(quantized, path)
    return quantized, file, model(x), quantized(x), at.export.run_litert(path, x)


INTEGERS = {
    "Add": lambda a, b, c: L.Add()([a, b, c]),
    "Multiply": lambda a, b, c: L.Multiply()([a, b, c]),
    "Average": lambda a, b, c: L.Average()([a, b, c]),
    "Maximum": lambda a, b, c: L.Maximum()([a, b, c]),
    "Minimum": lambda a, b, c: L.Minimum()([a, b]),
    "Concatenate": lambda a, b, c: L.Concatenate()([a, b, c]),
    "maximum with a number": lambda a, b, c: ops.maximum(a, 0.3),
    "minimum": lambda a, b, c: ops.minimum(b, c),
    "absolute": lambda a, b, c: ops.abs(a),
    "negative": lambda a, b, c: -b,
    "half": lambda a, b, c: c / 2,
    "split": lambda a, b, c: ops.split(a, 2, axis=-1)[1],
    "slice": lambda a, b, c: a[:, 1:4],
    "max": lambda a, b, c: ops.max(b, axis=1),
    "swapaxes": lambda a, b, c: ops.swapaxes(c, 1, 2),
    "stack": lambda a, b, c: ops.stack([a, b], axis=1),
    "hard_sigmoid": lambda a, b, c: ops.hard_sigmoid(a),
}


@pytest.mark.parametrize("half", [0, 1])
def test_operators_with_a_kernel_are_integers_and_the_file_computes_the_same(half, tmp_path):
    names = list(INTEGERS)[half::2]
    functions = [INTEGERS[name] for name in names]
    _, file, _, expected, found = _exported(functions, tmp_path / "m.tflite")
    assert file.int8_fraction == 1.0
    for name, y, z in zip(names, expected, found, strict=True):
        np.testing.assert_array_equal(z, y, err_msg=name)


ISLANDS = {
    "Square": lambda a, b, c: ops.square(a),
    "TrueDivide": lambda a, b, c: a / (ops.abs(b) + 1.0),
    "Where": lambda a, b, c: ops.where(a > 0, b, c),
    "Roll": lambda a, b, c: ops.roll(a, 2, axis=1),
    "Erf": lambda a, b, c: ops.erf(b),
    "Var": lambda a, b, c: ops.var(c, axis=1),
    "Sum": lambda a, b, c: ops.sum(a, axis=1),
    "Pad": lambda a, b, c: ops.pad(c, [[0, 0], [1, 1], [0, 0]]),
    "Repeat": lambda a, b, c: ops.repeat(a, 2, axis=1),
    "Flip": lambda a, b, c: ops.flip(b, axis=1),
    "Sort": lambda a, b, c: ops.sort(c),
}


@pytest.mark.parametrize("half", [0, 1])
def test_an_operator_without_an_integer_form_is_an_island_with_a_name(half, tmp_path):
    names = list(ISLANDS)[half::2]
    functions = [ISLANDS[name] for name in names]
    quantized, file, exact, expected, found = _exported(functions, tmp_path / "m.tflite")
    notes = " ".join(entry.note for entry in at.report_of(quantized).done)
    table = str(file.in_float)
    for name, y, z, w in zip(names, expected, found, exact, strict=True):
        assert f"{name} has no integer form here" in notes
        assert f"{name} has no integer form here" in table
        y, z = np.asarray(y), np.asarray(z)
        step = (y.max() - min(y.min(), 0)) / 255
        assert np.abs(z - y).max() < 1.01 * step, name
        if name != "Where":  # A number that is rounded to 0 is no longer above it.
            assert np.abs(z - np.asarray(w)).max() < 0.1 * np.abs(w).max(), name


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_position_is_that_of_the_file(axis, tmp_path):
    functions = [lambda a, *_: ops.argmax(a, axis), lambda a, *_: ops.argmin(a, axis)]
    _, file, _, expected, found = _exported(functions, tmp_path / "m.tflite")
    assert {"ARG_MAX", "ARG_MIN"} <= {op.name for op in file.operators}
    assert file.int8_fraction == 1.0 and file.outputs == ("int32", "int32")
    for y, z in zip(expected, found, strict=True):
        np.testing.assert_array_equal(np.reshape(z, np.shape(y)), y)


def test_activations_in_float_have_no_limits_that_the_model_does_not_have(tmp_path):
    names = ("softplus", "log_softmax", "log_sigmoid", "elu")
    functions = [lambda a, b, c, name=name: L.Activation(name)(a) for name in names]
    functions += [lambda a, b, c: ops.softplus(b), lambda a, b, c: ops.log_softmax(c)]
    _, _, exact, expected, found = _exported(functions, tmp_path / "m.tflite", scale=200.0)
    assert np.max(exact[0]) > 200 and np.min(exact[1]) < -200 and np.min(exact[2]) < -200
    for y, z, w in zip(expected, found, exact, strict=True):
        y, z = np.asarray(y), np.asarray(z)
        step = (max(y.max(), 0) - min(y.min(), 0)) / 255
        assert np.abs(z - y).max() < 1.01 * step
        assert np.abs(z - np.asarray(w)).max() < 6 * step


def test_a_bare_operator_can_be_excluded():
    model = _model([lambda a, b, c: L.Dense(4)(ops.sin(a))])
    (name,) = (c.layer.name for c in at.layers.calls(model) if "sin" in c.layer.name)
    quantized = at.quantize_aware(model, exclude=["sin*"])
    assert dict(at.report_of(quantized).skipped)[name] == "excluded: stays in float"
    with pytest.raises(ValueError, match="exclude='cos' matches no layer"):
        at.quantize_aware(model, exclude=["cos"])


def test_islands_are_trained_saved_and_loaded(tmp_path):
    model = _model([lambda a, b, c: ops.sin(a) + ops.maximum(b, 0.1), lambda a, b, c: ops.abs(c)])
    quantized = at.quantize_aware(model)
    x = np.random.default_rng(0).normal(size=(16, *SHAPE)).astype("float32")
    quantized.compile("sgd", "mse")
    quantized.fit(x, [x, x], epochs=1, verbose=0)
    assert all(q.range for _, q in at.layers.walk(quantized) if isinstance(q, FakeQuantize))
    quantized.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for y, z in zip(quantized(x), loaded(x), strict=True):
        np.testing.assert_array_equal(y, z)


def test_wrappers_are_taken_apart(tmp_path):
    x = keras.Input(SHAPE)
    inner = keras.Sequential([keras.Input(SHAPE[1:]), L.Dense(5, activation="relu"), L.Dense(3)])
    y = L.TimeDistributed(inner)(x)
    model = keras.Model(x, [y, L.Attention()([x, x])])
    data = np.random.default_rng(0).normal(size=(16, *SHAPE)).astype("float32")
    quantized = at.calibrate(model, data, verbose=0)
    file = at.export.litert(quantized, tmp_path / "m.tflite")
    assert file.int8_fraction == 1.0
    for z, w in zip(at.export.run_litert(tmp_path / "m.tflite", data), model(data), strict=True):
        assert np.abs(z - np.asarray(w)).max() < 0.1 * np.abs(w).max()


def test_a_product_of_three_with_masks_is_refused():
    """Keras multiplies by 1 where a mask is False, which a product of two after the other does not."""
    ids = keras.Input((4,), dtype="int32")
    x = L.Embedding(9, 4, mask_zero=True)(ids)
    model = keras.Model(ids, L.Multiply(name="product")([x, L.Dense(4)(x), L.Dense(4)(x)]))
    data = np.random.default_rng(0).integers(0, 9, (32, 4)).astype("int32")
    with pytest.raises(ValueError, match=r"'product': .*exclude=\['product'\]"):
        at.calibrate(model, data, verbose=0)
    assert at.calibrate(model, data, exclude=["product"], verbose=0)
