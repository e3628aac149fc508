"""Running LiteRT files: integers as values or as the file's own, dictionaries, errors with the path."""

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.export import LiteRTRunner, run_litert, verify

L = keras.layers


@pytest.fixture(scope="module")
def bytes_file(tmp_path_factory):
    """A model that reads values from 0 to 255, its int8 file, and such values."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).integers(0, 256, (64, 8)).astype("uint8")
    model = keras.Sequential([keras.Input((8,)), L.Rescaling(1 / 255), L.Dense(4)])
    quantized = at.calibrate(model, x.astype("float32"), verbose=0)
    path = tmp_path_factory.mktemp("bytes") / "u.tflite"
    at.export.litert(quantized, path)
    return quantized, path, x


def test_integers_are_values_unless_they_are_of_the_data_type_of_the_file(bytes_file):
    model, path, x = bytes_file
    expected = run_litert(path, x.astype("float32"))
    np.testing.assert_allclose(expected, model(x), atol=1e-6)
    for values in (x, x.astype("int32"), x.astype("int64"), x.tolist()):
        np.testing.assert_array_equal(run_litert(path, values), expected)
    runner = LiteRTRunner(path)
    scale, zero_point = runner.inputs[0]["quantization"]
    raw = np.clip(np.rint(x / np.float32(scale)) + zero_point, -128, 127).astype("int8")
    np.testing.assert_array_equal(run_litert(path, raw), expected)
    np.testing.assert_array_equal(runner(raw, raw=True), expected)
    np.testing.assert_array_equal(runner(raw), runner(raw.astype("float32")))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_in_compare_and_verify_all_inputs_are_values(dtype, bytes_file):
    model, path, x = bytes_file
    x = np.minimum(x, 127).astype(dtype)
    y = model(x.astype("float32")).numpy().argmax(-1)
    assert at.compare({"file": path}, x, y, verbose=0, rounds=2)["file"].score == 1.0
    assert verify(model, path, x).sqnr > 100


def test_ids_must_fit_the_data_type_of_the_file(tmp_path):
    model = keras.Sequential([keras.Input((3,), dtype="int32"), L.Embedding(9, 2)])
    path = tmp_path / "ids.tflite"
    at.export.litert(model, path)
    for ids in ([[1, 2, 3]], [[1.0, 2.0, 3.0]], np.array([[1, 2, 3]], "uint8")):
        np.testing.assert_array_equal(run_litert(path, ids), model(np.array([[1, 2, 3]])))
    for wrong in (2**40, float("nan"), -(2**33)):
        with pytest.raises(ValueError, match="of ids.tflite is int32; received values from"):
            run_litert(path, [[1, 2, wrong]])
    with pytest.raises(
        ValueError, match="LiteRT cannot run .*ids.tflite: gather index out of bounds"
    ):
        run_litert(path, [[1, 2, 200]])


@pytest.fixture(scope="module")
def two_heads():
    keras.utils.set_random_seed(0)
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    h = L.Concatenate()([L.Dense(4)(a), b])
    outputs = {"zone": L.Dense(3, "softmax")(h), "b": L.Dense(1)(h), "area": L.Dense(1)(h)}
    model = keras.Model({"a": a, "b": b}, outputs)
    rng = np.random.default_rng(0)
    return model, {name: rng.normal(size=(5, 6)).astype("float32") for name in "ab"}


@pytest.mark.parametrize("is_quantized", [False, True], ids=["float", "int8"])
def test_a_dictionary_of_outputs_keeps_its_keys_in_every_runtime(is_quantized, two_heads, tmp_path):
    model, x = two_heads
    model = at.calibrate(model, x, verbose=0) if is_quantized else model
    expected = model(x)
    at.export.litert(model, tmp_path / "m.tflite")
    for found in (run_litert(tmp_path / "m.tflite", x), LiteRTRunner(tmp_path / "m.tflite")(x)):
        assert set(found) == {"zone", "b", "area"}
        for key, values in found.items():
            np.testing.assert_allclose(values, expected[key], atol=1e-5)
    saved = at.export.saved_model(model, tmp_path / "saved")
    third = at.export.onnx(model, tmp_path / "m.onnx")
    for path in (tmp_path / "m.tflite", saved, third):
        assert verify(model, path, x).sqnr > 100

    def both(y, outputs):
        return float(np.sum(outputs["area"]) + np.sum(outputs["zone"][:, 0]))

    files = {"file": tmp_path / "m.tflite"}
    table = at.compare(files, x, np.zeros(5), metric=both, verbose=0, rounds=2)
    assert table["file"].score == pytest.approx(both(None, model(x)), abs=1e-4)


def test_the_names_in_the_other_files_are_the_keys_too(two_heads, tmp_path):
    model, _ = two_heads
    saved = tf.saved_model.load(str(at.export.saved_model(model, tmp_path / "saved")))
    assert set(saved.signatures["serving_default"].structured_outputs) == {"zone", "b", "area"}
    file = onnx.load(at.export.onnx(model, tmp_path / "m.onnx"))
    # An ONNX file cannot have an input and an output of one name.
    assert {entry.name for entry in file.graph.output} == {"zone", "b_", "area"}


def test_dictionaries_of_one_and_of_subclassed_models(tmp_path):
    class Heads(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = L.Dense(3), L.Dense(2)

        def call(self, x):
            return {"z1": self.first(x), "a2": self.second(x)}

    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    model = Heads()
    model(x)
    at.export.litert(model, tmp_path / "m.tflite")
    found = run_litert(tmp_path / "m.tflite", x)
    assert {key: values.shape for key, values in found.items()} == {"z1": (4, 3), "a2": (4, 2)}
    assert verify(model, tmp_path / "m.tflite", x).sqnr > 100
    image = keras.Input((6,))
    one = keras.Model(image, {"logits": L.Dense(3)(image)})
    at.export.litert(one, tmp_path / "one.tflite")
    assert list(run_litert(tmp_path / "one.tflite", x)) == ["logits"]
    y = one(x)["logits"].numpy().argmax(-1)
    models = {"model": one, "file": tmp_path / "one.tflite"}
    table = at.compare(models, x, y, verbose=0, rounds=2)
    assert table["file"].score == table["model"].score == 1.0


def test_one_tensor_under_two_keys(tmp_path):
    x = keras.Input((3,))
    y = L.Dense(2)(x)
    model = keras.Model(x, {"twice": y, "once": y})
    at.export.litert(model, tmp_path / "m.tflite")
    found = run_litert(tmp_path / "m.tflite", np.ones((2, 3)))
    assert set(found) == {"twice", "once"}
    np.testing.assert_array_equal(found["twice"], found["once"])


def test_twelve_outputs_stay_a_list_in_their_order(tmp_path):
    x = keras.Input((3,))
    model = keras.Model(x, [L.Dense(1 + i)(x) for i in range(12)])
    at.export.litert(model, tmp_path / "m.tflite")
    found = run_litert(tmp_path / "m.tflite", np.ones((2, 3)))
    assert [values.shape[1] for values in found] == list(range(1, 13))


def test_named_outputs_of_other_converters_are_no_dictionary(tmp_path):
    class Named(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
        def run(self, x):
            return {"dense_1": 2 * x}

    module = Named()
    functions = [module.run.get_concrete_function()]
    path = tmp_path / "m.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions(functions, module).convert())
    np.testing.assert_array_equal(run_litert(path, np.ones((2, 3))), np.full((2, 3), 2))
