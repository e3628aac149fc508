"""accel_tf.benchmark.compare: scores that are known beforehand, and gains that are kept apart."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers

from accel_tf import benchmark
from accel_tf.benchmark import _compare

ONCE = {"rounds": 1, "verbose": 0}


def sequential(shape, *stack, **options):
    return keras.Sequential([keras.Input(shape), *stack], **options)


@pytest.fixture
def identity():
    """A model whose outputs are its inputs, so that every score is known."""
    model = sequential((4,), layers.Dense(4, use_bias=False))
    model.set_weights([np.eye(4)])
    return model


@pytest.mark.parametrize("labels", ["sparse", "column", "one-hot"])
def test_accuracy_of_every_kind_of_label(identity, labels):
    y = np.array([0, 1, 2, 0])  # the last is wrong
    y = {"sparse": y, "column": y[:, None], "one-hot": np.eye(4)[y]}[labels]
    table = benchmark.compare({"m": identity}, np.eye(4), y, rounds=1, verbose=0)
    assert table["m"].score == 0.75


def test_accuracy_of_sequences_and_of_one_output():
    steps = sequential((3, 4), layers.Identity())
    y = np.array([[0, 1, 2], [1, 1, 1]])
    x = np.eye(4)[y]
    x[0, 0] = [0, 9, 0, 0]
    table = benchmark.compare({"m": steps}, x, y, rounds=1, verbose=0)
    assert table["m"].score == pytest.approx(5 / 6)
    binary = sequential((1,), layers.Identity())
    x = np.array([[0.2], [0.7], [0.9], [0.4]])
    for y in ([0, 1, 0, 0], [[0], [1], [0], [0]]):
        assert benchmark.compare({"m": binary}, x, y, rounds=1, verbose=0)["m"].score == 0.75


@pytest.mark.parametrize(
    ("metric", "column"),
    [
        ("mean_absolute_error", "mean_absolute_error"),
        (keras.metrics.MeanSquaredError(name="mse"), "mse"),
        (lambda y, p: np.abs(y - p).max(), "<lambda>"),
    ],
)
def test_other_metrics(identity, metric, column):
    table = benchmark.compare(
        {"m": identity}, np.eye(4), np.zeros((4, 4)), metric=metric, rounds=1, verbose=0
    )
    assert column in table.columns
    assert table["m"].score == pytest.approx(1.0 if column == "<lambda>" else 0.25)


def test_the_table_reads_as_text_and_html_and_keeps_exact_numbers(identity):
    other = sequential((4,), layers.Dense(300), layers.Dense(4))
    table = benchmark.compare(
        {"small": identity, "large": other}, np.eye(4), np.arange(4), latency_batch=2, verbose=0
    )
    text = str(table)
    assert "small" in text and "1.00×" in text and "batch of 2" in text
    assert "<table" in table._repr_html_()
    small, large = table["small"], table["large"]
    assert (small.parameters, small.nonzero, small.flops, small.score) == (16, 4, 32, 1.0)
    assert large.parameters == 4 * 300 + 300 + 300 * 4 + 4
    assert large.latency.median > 0 and len(large.latency.samples) == 100
    assert table.speedup("large") == pytest.approx(small.latency.median / large.latency.median)
    assert dataclasses.is_dataclass(small)
    with pytest.raises(KeyError, match="No model 'x'; there are small, large"):
        table["x"]


def test_compare_without_labels_leaves_the_metric_out(identity):
    table = benchmark.compare({"m": identity}, np.eye(4), rounds=1, verbose=0)
    assert "accuracy" not in table.columns and table["m"].score is None


def test_compare_takes_real_and_mixed_precision_models():
    real = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=4)
    keras.config.set_dtype_policy("mixed_float16")
    mixed = sequential((32, 32, 3), layers.GlobalAveragePooling2D(), layers.Dense(4))
    x = np.zeros((3, 32, 32, 3), "float32")
    table = benchmark.compare({"r": real, "m": mixed}, x, [0, 1, 2], rounds=2, verbose=0)
    assert table["r"].parameters == real.count_params()
    assert table["m"].parameters == 16 and table["m"].score == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("models", "x", "y", "options", "message"),
    [
        ({}, np.eye(4), None, {}, "at least one model"),
        ({"f": len}, np.eye(4), None, {}, "compare expects a keras.Model"),
        (None, np.eye(4), [0, 1], {}, "x has 4 samples and y 2"),
        (None, np.zeros((0, 4)), None, {}, "at least one sample"),
        (None, np.eye(4), None, {"latency_batch": 5}, "between 1 and the 4 samples"),
        (None, np.eye(4), np.zeros((4, 3)), {}, r"shape \(4, 3\) do not fit .* \(4, 4\)"),
    ],
)
def test_compare_rejects(identity, models, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.compare({"m": identity} if models is None else models, x, y, verbose=0, **options)


# Targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "y"),
    [
        ((4, 3), [[1.5, 2.0, 3.0]] * 4),  # several real values for each sample
        ((4, 1), [0.5, 1.5, 2.5, 3.5]),
        ((4, 1), [[0.5], [1.5], [2.5], [3.5]]),
        ((4, 1), [20, 30, 40, 50]),  # integers are no labels of a single output
        ((4, 2, 3), np.full((4, 2, 3), 0.25)),
    ],
)
def test_real_targets_are_scored_by_the_root_mean_square_error(outputs, y):
    model = sequential(outputs[1:], layers.Identity())
    x = np.random.default_rng(0).normal(size=outputs).astype("float32")
    by_hand = np.sqrt(np.mean((x - np.reshape(y, outputs)) ** 2))
    table = benchmark.compare({"m": model}, x, y, **ONCE)
    assert table.columns[1] == "RMSE" and "root-mean-square error" in table.note
    assert table["m"].score == pytest.approx(by_hand, rel=1e-6)
    with pytest.raises(ValueError, match=r"Accuracy compares labels .*'m', but y\[.*Leave metric"):
        benchmark.compare({"m": model}, x, y, metric="accuracy", **ONCE)


def test_labels_of_any_type_are_scored_by_accuracy(identity):
    x = np.eye(4)
    for y in ([0, 1, 2, 0], [0.0, 1.0, 2.0, 0.0], np.eye(4, dtype=bool)[[0, 1, 2, 0]]):
        table = benchmark.compare({"m": identity}, x, y, **ONCE)
        assert table.columns[1] == "accuracy" and table["m"].score == 0.75
    several = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    assert benchmark.compare({"m": identity}, x, several, **ONCE)["m"].score == 14 / 16
    arg_max = keras.Model(identity.inputs, keras.ops.argmax(identity.outputs[0], -1))
    assert benchmark.compare({"m": arg_max}, x, [0, 1, 2, 0], **ONCE)["m"].score == 0.75


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        ([1, 2, 3, 4], {}, r"y\[3\] = 4 is no integer from 0 to 3. Pass labels"),
        ([0, 1, 2, -1], {}, r"y\[3\] = -1 is no integer from 0 to 3"),
        ([0, 1, 2, 0.5], {}, r"y\[3\] = 0.5 is no integer"),
        (list("abcd"), {}, "values of type <U1, which are no numbers"),
        ([0, 1, 2, 3], {"metric": 3}, "metric must be None, .* Received: 3"),
    ],
)
def test_targets_that_no_metric_fits_are_described(identity, y, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.compare({"m": identity}, np.eye(4), y, **options, **ONCE)


def test_one_output_in_a_dictionary_is_scored_and_several_need_a_metric():
    x = keras.Input((4,))
    a, b = layers.Identity()(x), layers.Dense(2)(x)
    one, two = keras.Model(x, {"a": a}), keras.Model(x, {"a": a, "b": b})
    assert benchmark.compare({"m": one}, np.eye(4), [0, 1, 2, 0], **ONCE)["m"].score == 0.75
    with pytest.raises(ValueError, match="'m' has 2 outputs, .* metric=a function"):
        benchmark.compare({"m": two}, np.eye(4), [0, 1, 2, 0], **ONCE)


def test_the_first_model_decides_which_metric_all_are_scored_by():
    one, three = (sequential((3,), layers.Dense(n), name=f"m{n}") for n in (1, 3))
    y = np.array([0.5, 1.5])
    with pytest.raises(ValueError, match=r"shape \(2,\) do not fit .*'m3', of shape \(2, 3\)"):
        benchmark.compare([one, three], np.ones((2, 3)), y, **ONCE)


# Names and gains --------------------------------------------------------------------------------


def test_models_without_names_get_their_own(identity, tmp_path):
    identity.name = "net"
    other = keras.models.clone_model(identity)
    assert list(benchmark.compare(identity, np.eye(4), **ONCE).results) == ["net"]
    identity.save(tmp_path / "net.keras")
    table = benchmark.compare((identity, other, tmp_path / "net.keras"), np.eye(4), **ONCE)
    assert table.column("model") == ["net", "net (2)", "net.keras"]
    times = benchmark.measure_latency([np.sort, np.sort], np.eye(4), rounds=1, verbose=0)
    assert list(times) == ["sort", "sort (2)"]


@pytest.mark.parametrize("models", [3, np.eye(4), None])
def test_what_is_no_model_is_named_with_the_line_to_write(models):
    with pytest.raises(ValueError, match=rf"{type(models).__name__}. Write compare\(\{{'name'"):
        benchmark.compare(models, np.eye(4))


def test_the_gain_of_the_precision_is_kept_apart_from_that_of_the_runtime():
    def measured(seconds, runtime):
        return benchmark.Measurement(
            score=None,
            parameters=None,
            nonzero=None,
            flops=None,
            size=benchmark.FileSize(1, 1),
            latency=benchmark.Latency((seconds,)),
            runtime=runtime,
        )

    results = {
        "keras": measured(12.0, "TensorFlow"),
        "float file": measured(4.0, "LiteRT"),
        "int8 file": measured(1.0, "LiteRT"),
        "onnx": measured(6.0, "onnxruntime"),
    }
    table = _compare._table(results, None, 1)
    assert table.column("speed-up") == ["1.00×", "3.00×", "12.00×", "2.00×"]
    assert table.column("runtime") == ["TensorFlow", "LiteRT", "LiteRT", "onnxruntime"]
    assert table.column("same runtime") == [None, "1.00×", "4.00×", None]
    assert "first model of the same runtime" in table.note
    assert table.speedup("int8 file", over="float file") == 4.0
    assert table.speedup("int8 file") == 12.0
    with pytest.raises(KeyError, match="No model 'float'"):
        table.speedup("int8 file", over="float")
    del results["float file"], results["int8 file"], results["onnx"]
    assert (
        _compare._table(results, None, 1).columns[-1] == "speed-up"
    )  # one runtime, no more to say


def test_xla_is_a_runtime_of_its_own(identity):
    compiled = keras.models.clone_model(identity)
    compiled.compile(jit_compile=True)
    table = benchmark.compare({"plain": identity, "xla": compiled}, np.eye(4), **ONCE)
    assert (table["plain"].runtime, table["xla"].runtime) == ("TensorFlow", "XLA")
