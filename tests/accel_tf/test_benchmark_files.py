"""accel_tf.benchmark on files: each runtime computes what the Keras model computes."""

import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf import benchmark
from accel_tf.benchmark import _candidates

L = keras.layers
ONCE = {"rounds": 1, "verbose": 0}


@pytest.fixture
def network():
    stack = [keras.Input((4,), name="x"), L.Dense(8, "relu"), L.Dense(3, name="y")]
    return keras.Sequential(stack, name="network")


@pytest.fixture
def two_inputs():
    a, b = keras.Input((3,), name="zebra"), keras.Input((4,), name="apple")
    return keras.Model([a, b], [L.Dense(2)(L.Concatenate()([a, b])), L.Dense(5)(b)])


def written(model, folder):
    """Writes a model for each runtime; returns the paths by the name of the runtime."""
    model.save(folder / "a.keras")
    paths = {"TensorFlow": folder / "a.keras"}
    paths["folder"] = at.export.saved_model(model, folder / "saved")
    paths["onnxruntime"] = at.export.onnx(model, folder / "a.onnx")
    at.export.litert(model, folder / "a.tflite")
    paths["LiteRT"] = folder / "a.tflite"
    return paths


def test_each_kind_of_file_is_run_by_its_runtime(network, tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 4)).astype("float32")  # more than one batch
    outputs = network(x)
    paths = written(network, tmp_path)

    def error(y, outputs):
        return np.abs(outputs - y).max()

    table = benchmark.compare({"keras": network, **paths}, x, outputs, metric=error, **ONCE)
    assert all(m.score < 1e-5 for m in table.results.values())
    runtimes = ["TensorFlow", "TensorFlow", "TensorFlow", "onnxruntime", "LiteRT"]
    assert table.column("runtime") == runtimes
    assert table["TensorFlow"].parameters == network.count_params()
    assert table["onnxruntime"].parameters is None and table["onnxruntime"].flops is None
    assert table["onnxruntime"].size.plain == paths["onnxruntime"].stat().st_size
    files = [file for file in paths["folder"].rglob("*") if file.is_file()]
    assert table["folder"].size.plain == sum(file.stat().st_size for file in files)
    assert all(m.latency.median > 0 for m in table.results.values())
    times = benchmark.measure_latency(paths, x, rounds=1, verbose=0)
    assert list(times) == list(paths)


def test_files_of_several_inputs_take_dictionaries_and_ordered_lists(two_inputs, tmp_path):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(6, 3)).astype("float32"), rng.normal(size=(6, 4)).astype("float32")]
    by_name = {"zebra": x[0], "apple": x[1]}
    names = at.export._graph.output_names(two_inputs)
    y = dict(zip(names, two_inputs(x), strict=True))
    onnx = at.export.onnx(two_inputs, tmp_path / "a.onnx")
    folder = at.export.saved_model(two_inputs, tmp_path / "saved")

    def error(_, outputs):
        found = outputs if isinstance(outputs, dict) else dict(zip(names, outputs, strict=True))
        return max(np.abs(found[name] - y[name]).max() for name in names)

    for models, inputs in (([two_inputs, onnx, folder], by_name), ([two_inputs, onnx], x)):
        table = benchmark.compare(models, inputs, np.zeros(6), metric=error, **ONCE)
        assert all(m.score < 1e-5 for m in table.results.values())
    with pytest.raises(ValueError, match=r"saved has the inputs .*apple \(None, 4\) float32"):
        benchmark.compare(folder, x, **ONCE)
    with pytest.raises(ValueError, match=r"a.onnx has the inputs zebra .*Pass a dictionary"):
        benchmark.compare(onnx, {"zebra": x[0], "pear": x[1]}, **ONCE)


def test_outputs_in_a_dictionary_keep_their_names(tmp_path):
    x = keras.Input((4,), name="x")
    outputs = {"scores": L.Dense(3, name="scores")(x), "age": L.Dense(1, name="age")(x)}
    model = keras.Model(x, outputs)
    data = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    age = np.asarray(model(data)["age"])
    onnx = at.export.onnx(model, tmp_path / "a.onnx")
    folder = at.export.saved_model(model, tmp_path / "saved")
    table = benchmark.compare(
        [model, onnx, folder], data, age, metric=lambda y, o: np.abs(y - o["age"]).max(), **ONCE
    )
    assert all(m.score < 1e-6 for m in table.results.values())


def test_inputs_are_cast_only_to_what_holds_their_values(tmp_path):
    ids = keras.Input((4,), dtype="int32", name="ids")
    model = keras.Model(ids, L.Flatten()(L.Embedding(300, 2)(ids)))
    paths = written(model, tmp_path)
    for dtype in ("int64", "uint16", "float32"):
        x = np.arange(8).reshape(2, 4).astype(dtype) + 250
        y = np.asarray(model(x.astype("int32")))
        table = benchmark.compare(paths, x, y, **ONCE)
        assert table.columns[1] == "RMSE" and all(m.score < 1e-6 for m in table.results.values())
    for name in ("onnxruntime", "folder"):
        with pytest.raises(ValueError, match="takes int32 for its input 'ids'; x holds float32"):
            benchmark.compare(paths[name], np.full((2, 4), 1.5, "float32"), **ONCE)


def test_a_file_of_fixed_batch_runs_once_per_chunk(network, tmp_path):
    onnx = at.export.onnx(network, tmp_path / "a.onnx", batch_size=2)
    folder = at.export.saved_model(network, tmp_path / "saved", batch_size=2)
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    y = np.asarray(network(x))
    table = benchmark.compare([onnx, folder], x, y, latency_batch=4, **ONCE)
    assert all(m.score < 1e-6 for m in table.results.values())
    with pytest.raises(ValueError, match="a.onnx takes 2 inputs per run; 1 is no multiple of it"):
        benchmark.compare(onnx, x, **ONCE)


def test_onnxruntime_gets_the_threads_of_tensorflow_and_stops_them(network, tmp_path):
    runner = _candidates.open_candidate("a", at.export.onnx(network, tmp_path / "a.onnx"))
    options = runner._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    assert options.intra_op_num_threads == (chosen or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.onnx", "'gone.onnx': there is no file"),
        ("gone", "'gone': there is no file .*no such folder"),
        ("model.pt", "only .tflite and .onnx files, .keras files and SavedModel folders"),
        ("bad.onnx", "onnxruntime cannot load .*bad.onnx"),
        ("bad.keras", "Keras cannot load .*bad.keras"),
        ("bad", "TensorFlow cannot load the SavedModel"),
    ],
)
def test_files_that_cannot_be_run_are_named(tmp_path, name, message):
    for path in ("bad.onnx", "bad.keras"):
        (tmp_path / path).write_text("no model")
    (tmp_path / "bad").mkdir()
    with pytest.raises(ValueError, match=message):
        benchmark.compare(tmp_path / name, np.eye(4))


def test_a_file_of_unknown_layers_says_what_to_import(tmp_path):
    class Own(L.Layer):
        def call(self, x):
            return x

    keras.Sequential([keras.Input((4,)), Own()]).save(tmp_path / "own.keras")
    with pytest.raises(
        ValueError, match="import the module that registers .*class 'Own'"
    ) as caught:
        benchmark.compare(tmp_path / "own.keras", np.eye(4))
    assert len(str(caught.value)) < 800  # Keras' own message has the whole configuration.


def test_a_missing_runtime_says_what_to_install(network, tmp_path, monkeypatch):
    path = at.export.onnx(network, tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'accel-tf\[onnx\]'"):
        benchmark.compare(path, np.zeros((2, 4)))


@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_a_fixed_batch_need_not_divide_what_is_scored_at_a_time(suffix, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    path, write = tmp_path / f"m.{suffix}", {"tflite": at.export.litert, "onnx": at.export.onnx}
    write[suffix](model, path, batch_size=100)
    x = np.random.default_rng(0).normal(size=(300, 4)).astype("float32")
    y = np.asarray(model(x)).argmax(1)
    table = at.compare({"file": path}, x, y, latency_batch=100, rounds=3, verbose=0)
    assert table["file"].score == 1.0
