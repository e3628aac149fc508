"""LiteRT files: written, inspected and run; int8 from end to end for quantized models."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import accel_tf as at

L = keras.layers


class FourBits(at.Int8):
    weight_bits = 4


def agreement(a, b):
    return float((a.argmax(-1) == b.argmax(-1)).mean())


def blocks():
    """Each supported layer, in the forms that LiteRT fuses and in those that it does not."""
    x = keras.Input((8, 8, 3))
    a = L.BatchNormalization()(L.Conv2D(8, 3, padding="same")(x))
    y = L.Conv2D(8, 3, padding="same", activation="relu")(L.ReLU()(a))
    y = L.ReLU(6.0)(L.Add()([a, y]))
    y = L.Concatenate()([y, L.BatchNormalization()(L.Conv2D(4, 1)(y)), L.MaxPooling2D(1)(y)])
    y = L.AveragePooling2D(2)(L.ReLU()(L.BatchNormalization()(y)))  # Normalization comes first.
    y = L.DepthwiseConv2D(3, depth_multiplier=2)(L.Cropping2D(1)(L.ZeroPadding2D(2)(y)))
    gate = L.Dense(4, activation="silu")(L.GlobalAveragePooling2D()(y))
    gate = L.Reshape((1, 1, 40))(L.Dense(40, activation="sigmoid")(gate))
    y = L.Subtract()([L.Multiply()([y, gate]), gate])
    y = L.Permute((2, 1, 3))(L.LeakyReLU()(y))
    y = L.BatchNormalization()(L.Dense(12)(L.Flatten()(y)))
    y = L.BatchNormalization()(L.Activation("tanh")(y))
    y = L.Concatenate()([y, L.GlobalMaxPooling2D()(L.Rescaling(2.0, offset=-1.0)(x))])
    return keras.Model(x, L.Dense(5, activation="softmax")(y))


def scatter_statistics(model, rng):
    """Gives each normalization statistics as after training, negative factors included."""
    for variable in model.variables:
        if variable.path.endswith(("gamma", "kernel")):
            scale = 0.3 if variable.path.endswith("kernel") else 1.0
            variable.assign(rng.normal(0, scale, variable.shape))
        elif variable.path.endswith("moving_variance"):
            variable.assign(rng.uniform(0.5, 2.0, variable.shape))
        else:
            variable.assign(rng.uniform(-0.3, 0.3, variable.shape))


def test_every_supported_layer_becomes_int8_and_computes_the_same(tmp_path):
    rng = np.random.default_rng(0)
    model = blocks()
    scatter_statistics(model, rng)
    x = rng.normal(size=(64, 8, 8, 3)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    found = at.export.litert(quantized, tmp_path / "model.tflite")
    assert found.int8_fraction == 1.0 and found.not_int8 == ()
    assert (found.inputs, found.outputs) == (("int8",), ("int8",))
    names = [op.name for op in found.operators]
    # Nothing computes shapes, and a normalization that stands alone is one kernel.
    assert not {"SHAPE", "PACK", "DEQUANTIZE"} & set(names)
    fake, real = np.asarray(quantized(x)), at.export.run_litert(tmp_path / "model.tflite", x)
    assert agreement(fake, real) >= 0.95
    assert np.abs(fake - real).max() <= 8 / 256


@pytest.mark.parametrize("train", [False, True], ids=["calibrated", "trained"])
def test_the_file_of_the_trained_cnn_is_the_fake_quantized_model(
    train, trained_cnn, digits, tmp_path
):
    (x, y), (x_test, _) = digits
    model = trained_cnn()
    if train:
        quantized = at.quantize_aware(model)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        quantized.compile(keras.optimizers.Adam(1e-4), loss)
        quantized.fit(x, y, epochs=1, verbose=0)
    else:
        quantized = at.calibrate(model, x[:256], verbose=0)
    quantized.save(tmp_path / "model.keras")
    # A process of its own: nothing but the file carries the model over.
    script = (
        "import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'\n"
        "import keras, accel_tf as at, accel_tf.quantization\n"
        f"model = keras.models.load_model({str(tmp_path / 'model.keras')!r})\n"
        f"print(at.export.litert(model, {str(tmp_path / 'model.tflite')!r}).int8_fraction)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "1.0\n"

    found = at.inspect_litert(tmp_path / "model.tflite")
    names = [op.name for op in found.operators]
    assert names.count("CONV_2D") == 2 and names.count("FULLY_CONNECTED") == 2
    assert all(op.is_int8 for op in found.operators)
    real = at.export.run_litert(tmp_path / "model.tflite", x_test)
    fake = quantized.predict(x_test, verbose=0)
    step = quantized.layers[-1].output_quantizer.scale
    assert agreement(fake, real) >= 0.99
    assert agreement(model.predict(x_test, verbose=0), real) >= 0.98
    assert (np.abs(fake - real) < 0.01 * step).mean() > 0.9  # the same integers
    assert np.abs(fake - real).max() < 4 * step


@pytest.mark.parametrize("alpha", [0.35, pytest.param(1.0, marks=pytest.mark.full)])
def test_mobilenet_v2_goes_all_the_way(alpha, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 96, 96, 3)).astype("float32")
    model = keras.applications.MobileNetV2((96, 96, 3), alpha, weights=None, classes=10)
    quantized = at.quantize_aware(model)
    quantized.compile("sgd", "sparse_categorical_crossentropy")
    quantized.fit(x, rng.integers(0, 10, 8), batch_size=8, epochs=1, verbose=0)
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x[:2]), quantized(x[:2]))
    found = at.export.litert(loaded, tmp_path / "model.tflite")
    assert found.int8_fraction == 1.0
    assert (found.inputs, found.outputs) == (("int8",), ("int8",))
    names = [op.name for op in found.operators]
    assert names.count("CONV_2D") == 35 and names.count("DEPTHWISE_CONV_2D") == 17
    assert len(names) == 35 + 17 + 10 + 3  # additions, mean, dense, softmax and nothing else
    real = at.export.run_litert(tmp_path / "model.tflite", x)
    assert np.abs(real - np.asarray(loaded(x))).max() <= 4 / 256


def test_layers_between_tensors_of_rank_two_and_three_become_int8(tmp_path):
    rng = np.random.default_rng(0)
    layers = [
        L.BatchNormalization(),
        L.Dense(4, activation="relu"),
        L.Flatten(),
        L.BatchNormalization(scale=False),
        L.Dense(3, activation="tanh"),
    ]
    model = keras.Sequential([keras.Input((5, 6)), *layers])
    scatter_statistics(model, rng)
    x = rng.normal(size=(16, 5, 6)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    found = at.export.litert(quantized, tmp_path / "model.tflite")
    assert found.int8_fraction == 1.0
    real = at.export.run_litert(tmp_path / "model.tflite", x)
    assert np.abs(real - np.asarray(quantized(x))).max() <= 2 / 128


def test_any_batch_size_or_one(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 1)), L.Conv2D(2, 3), L.Flatten(), L.Dense(3)])
    x = np.random.normal(size=(6, 4, 4, 1)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    at.export.litert(quantized, tmp_path / "any.tflite")
    fixed = at.export.litert(quantized, tmp_path / "two.tflite", batch_size=2)
    assert fixed.int8_fraction == 1.0
    expected = at.export.run_litert(tmp_path / "any.tflite", x)
    np.testing.assert_array_equal(at.export.run_litert(tmp_path / "two.tflite", x), expected)
    run = at.export.LiteRTRunner(tmp_path / "any.tflite")
    for n in (1, 5, 2):
        np.testing.assert_array_equal(run(x[:n]), expected[:n])
    with pytest.raises(ValueError, match="two.tflite takes 2 inputs per run; 3 is no multiple"):
        at.export.run_litert(tmp_path / "two.tflite", x[:3])
    with pytest.raises(ValueError, match=r"\(-1, 4, 4, 1\).*received the shapes \(6, 16\)"):
        run(x.reshape(6, 16))


def test_several_inputs_and_outputs_go_by_name(tmp_path):
    z, a = keras.Input((3,), name="z"), keras.Input((2,), name="a")
    y = L.Concatenate()([L.Dense(3, name="own")(z), a])
    model = keras.Model([z, a], [L.Dense(2, activation="softmax")(y), L.Dense(4)(y)])
    data = {"z": np.random.normal(size=(8, 3)), "a": np.random.normal(size=(8, 2)) * 10}
    data = {name: x.astype("float32") for name, x in data.items()}
    quantized = at.calibrate(model, [data["z"], data["a"]], verbose=0)
    found = at.export.litert(quantized, tmp_path / "model.tflite")
    assert found.inputs == found.outputs == ("int8", "int8")
    run = at.export.LiteRTRunner(tmp_path / "model.tflite")
    for real, fake in zip(run(data), quantized([data["z"], data["a"]]), strict=True):
        assert real.shape == fake.shape
        np.testing.assert_allclose(real, fake, atol=0.02 * np.ptp(fake) + 1 / 128)
    with pytest.raises(ValueError, match="has the inputs a, z; received z"):
        run({"z": data["z"]})


def test_a_float_model_gives_an_honest_float_file(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, activation="tanh")])
    found = at.export.litert(model, tmp_path / "float.tflite")
    assert found.int8_fraction == 0.0 and found.inputs == found.outputs == ("float32",)
    x = np.random.normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(
        at.export.run_litert(tmp_path / "float.tflite", x), model(x), atol=1e-5
    )


def test_mixed_precision_is_exported_as_float32(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((4, 4, 1)), L.Conv2D(2, 3), L.Flatten(), L.Dense(3)])
    x = np.random.normal(size=(16, 4, 4, 1)).astype("float32")
    assert "float16" not in str(at.export.litert(model, tmp_path / "float.tflite"))
    quantized = at.calibrate(model, x, verbose=0)
    assert at.export.litert(quantized, tmp_path / "int8.tflite").int8_fraction == 1.0
    assert model.compute_dtype == quantized.layers[1].compute_dtype == "float16"


def test_what_stays_in_float_is_never_silent(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.ELU(name="f"), L.Dense(2)])
    quantized = at.calibrate(model, np.ones((4, 4)), exclude=["f"], verbose=0)
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match="did not become int8: .*ELU.*allow_float"):
        at.export.litert(quantized, path)
    assert not path.exists()
    found = at.export.litert(quantized, path, allow_float=True)
    assert 0 < found.int8_fraction < 1
    assert "ELU" in found.not_int8 and found.inputs == ("float32",)
    np.testing.assert_allclose(
        at.export.run_litert(path, np.ones((2, 4))), quantized(np.ones((2, 4))), atol=0.05
    )


def test_models_that_cannot_be_exported_say_why(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="d")])
    with pytest.raises(ValueError, match="range of .* is unknown: no data has been seen"):
        at.export.litert(at.quantize_aware(model), tmp_path / "m.tflite")
    four = at.calibrate(model, np.ones((4, 4)), FourBits(), verbose=0)
    with pytest.raises(ValueError, match=r"'d' has 4-bit weights \(FourBits\).*with Int8\(\)"):
        at.export.litert(four, tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="litert expects a keras.Model, received str"):
        at.export.litert("model", tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_inspection_renders_and_rejects_other_files(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    at.export.litert(at.calibrate(model, np.ones((4, 4)), verbose=0), tmp_path / "m.tflite")
    found = at.inspect_litert(tmp_path / "m.tflite")
    assert found.size == (tmp_path / "m.tflite").stat().st_size
    assert "1 operators, 100% int8, int8 in, int8 out" in str(found)
    assert "<table" in found._repr_html_() and "FULLY_CONNECTED" in found._repr_html_()
    (tmp_path / "other").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="other is not a LiteRT model: it has no TFL3 mark"):
        at.inspect_litert(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        at.inspect_litert(tmp_path / "absent")


def test_a_missing_runtime_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    for name in ("interpreter", "schema_py_generated"):
        monkeypatch.setitem(sys.modules, f"ai_edge_litert.{name}", None)
    with pytest.raises(ImportError, match=r"pip install 'accel-tf\[litert\]'"):
        at.export.litert(model, tmp_path / "m.tflite")


def test_conversion_is_quiet(capfd, tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    quantized = at.calibrate(model, np.ones((4, 4)), verbose=0)
    at.export.litert(quantized, tmp_path / "m.tflite")
    at.export.run_litert(tmp_path / "m.tflite", np.ones((1, 4)))
    assert capfd.readouterr() == ("", "")


def test_a_model_trained_on_two_replicas_is_exported(tmp_path):
    with at.mirrored_strategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((2,)), L.Dense(2)])
        quantized = at.quantize_aware(model)
        quantized.compile("sgd", "mse")
    quantized.fit(np.ones((8, 2)), np.zeros((8, 2)), batch_size=8, verbose=0)
    assert at.export.litert(quantized, tmp_path / "m.tflite").int8_fraction == 1.0
