"""What export takes and refuses: other floats, other backends, other types, operators without kernels."""

import importlib

import keras
import numpy as np
import pytest

import accel_tf as at

L = keras.layers


def sqnr(expected, received):
    expected, received = np.asarray(expected, np.float64), np.asarray(received, np.float64)
    noise = np.square(expected - received).sum()
    return 10 * np.log10(np.square(expected).sum() / noise) if noise else np.inf


@pytest.mark.parametrize("policy, decibels", [("float16", 50), ("float64", 120)])
def test_models_of_other_floats_become_float32_files(policy, decibels, tmp_path):
    keras.config.set_dtype_policy(policy)
    x = keras.Input((4, 3))
    normal = L.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 1.0, 1.0])
    y = keras.Sequential([keras.Input((4, 3)), L.Dense(3), normal])(x)
    y = L.Bidirectional(L.SimpleRNN(3))(y)
    model = keras.Model(x, L.BatchNormalization()(L.Dense(2)(y)) * 2.0)
    data = np.random.default_rng(0).normal(size=(4, 4, 3)).astype("float32")
    path = at.export.saved_model(model, tmp_path / "m")
    assert at.export.verify(model, path, data).sqnr > decibels
    if policy == "float16":
        found = at.export.litert(model, tmp_path / "m.tflite")
        assert not any("float16" in op.inputs for op in found.operators)
        assert sqnr(model(data), at.export.run_litert(tmp_path / "m.tflite", data)) > decibels
    assert model.layers[1].layers[0].kernel.dtype == policy  # The model is as it was.


def test_other_backends_are_one_clear_error(monkeypatch, tmp_path):
    model = keras.Sequential([keras.Input((2,)), L.Dense(2)])
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"litert works on TensorFlow.*'jax'.*KERAS_BACKEND"):
        at.export.litert(model, tmp_path / "m.tflite")


def test_a_grouped_convolution_goes_to_onnx(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 4)), L.Conv2D(8, 3, groups=2)])
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 4)).astype("float32")
    at.export.onnx(model, tmp_path / "m.onnx")
    assert at.export.verify(model, tmp_path / "m.onnx", x).sqnr > 100


class ErrorFunction(L.Layer):
    """The error function, which LiteRT does not have."""

    def call(self, x):
        return keras.ops.erf(x)


class Bits(L.Layer):
    def call(self, x):
        return keras.ops.argmax(x, axis=-1)


def test_an_operator_without_a_kernel_is_told_with_its_layer_and_what_to_write(tmp_path):
    x = keras.Input((6,))
    model = keras.Model(x, [Bits(name="bits")(x), ErrorFunction(name="error")(x)])
    with pytest.raises(ValueError) as caught:
        at.export.litert(model, tmp_path / "m.tflite")
    message = str(caught.value)
    assert "no operator for BitwiseAnd (in bits). Write tf.argmax(x, axis)" in message
    assert "no operator for Erf (in error)." in message and "export.saved_model" in message
    with pytest.raises(ValueError, match=r"Bitcast, layer 'bits'\). Write .*tf.argmax"):
        at.export.onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("io_dtype", ["uint8", "float32", "int8"])
def test_the_type_of_inputs_and_outputs_is_a_choice(io_dtype, tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(4), L.Softmax()])
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    found = at.export.litert(quantized, tmp_path / "m.tflite", io_dtype=io_dtype)
    assert found.inputs == found.outputs == (io_dtype,)
    np.testing.assert_array_equal(at.export.run_litert(tmp_path / "m.tflite", x), quantized(x))


def test_a_type_that_does_not_fit_is_an_error(tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(4)])
    with pytest.raises(ValueError, match=r"io_dtype='uint8' does not fit.*let it be 'float32'\."):
        at.export.litert(model, tmp_path / "m.tflite", io_dtype="uint8")
    quantized = at.calibrate(model, np.ones((4, 6), "float32"), verbose=0)
    with pytest.raises(ValueError, match="'float32' or 'int8' or 'uint8'"):
        at.export.litert(quantized, tmp_path / "m.tflite", io_dtype="int16")


def test_a_folder_that_needs_the_sparse_operator_says_so(tmp_path):
    model = keras.Sequential([keras.Input((64,)), L.Dense(64)])
    kernel = np.random.default_rng(0).normal(size=(64, 64)) * (np.arange(64) % 16 == 0)
    model.layers[0].kernel.assign(kernel)
    sparse = at.sparsify(model, min_sparsity=0.5)
    x = np.ones((2, 64), "float32")
    with pytest.warns(UserWarning, match="needs AccelTfSparseMatMul.*import accel_tf.sparse"):
        path = at.export.saved_model(sparse, tmp_path / "m")
    assert at.export.verify(sparse, path, x).sqnr > 100
    with pytest.raises(ValueError, match=r"no operator for AccelTfSparseMatMul \(in dense\)"):
        at.export.litert(sparse, tmp_path / "m.tflite")


def test_a_wrong_file_does_not_replace_a_right_one(tmp_path, monkeypatch):
    """The converter is made to write a file of another model."""
    right = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    other = keras.models.clone_model(right)
    at.export.litert(right, tmp_path / "m.tflite")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    before = (tmp_path / "m.tflite").read_bytes()
    for module, verb, name in (
        ("_litert", "litert", "m.tflite"),
        ("_saved_model", "saved_model", "saved"),
    ):
        module = importlib.import_module(f"accel_tf.export.{module}")
        monkeypatch.setattr(module, "plain", lambda model: other)
        with pytest.raises(ValueError, match=f"{verb} wrote a file that does not compute"):
            getattr(at.export, verb)(right, tmp_path / name)
    assert (tmp_path / "m.tflite").read_bytes() == before
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["notes.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.tflite", "saved"]
    at.export.litert(right, tmp_path / "m.tflite", verify=False)  # the wrong one, as asked for


def test_a_random_operator_without_a_counterpart_is_told_without_advice_on_argmax(tmp_path):
    noise = L.Lambda(lambda x: x + keras.random.normal(keras.ops.shape(x)), name="noise")
    with pytest.raises(ValueError, match="layer 'noise'") as caught:
        at.export.onnx(keras.Sequential([keras.Input((6,)), noise]), tmp_path / "m.onnx")
    assert "argmax" not in str(caught.value) and "export.saved_model" in str(caught.value)
