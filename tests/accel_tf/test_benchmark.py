"""accel_tf.benchmark: counts against numbers worked out by hand, times against known sleeps."""

import gc
import gzip
import random
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import accel_tf
from accel_tf import benchmark
from accel_tf.benchmark import _candidates, _runners


def sequential(shape, *stack):
    return keras.Sequential([keras.Input(shape), *stack])


def predict(path, x, batch_size):
    return _candidates.open_candidate("file", path).predict(x, batch_size)


@pytest.fixture(scope="module")
def litert(tmp_path_factory):
    """Writes a model as a `.tflite` file; with samples, as full int8."""

    def write(model, samples=None):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if samples is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ([s[None]] for s in samples)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.int8
        path = tmp_path_factory.mktemp("litert") / "model.tflite"
        with warnings.catch_warnings():  # "Statistics for quantized inputs were expected"
            warnings.simplefilter("ignore", UserWarning)
            path.write_bytes(converter.convert())
        return path

    return write


# FLOPs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "stack", "by_hand"),
    [
        ((7,), [layers.Dense(5)], 2 * 7 * 5),
        ((6, 7), [layers.Dense(5)], 2 * 6 * 7 * 5),
        ((8, 8, 3), [layers.Conv2D(4, 3)], 2 * 6 * 6 * 4 * 3 * 3 * 3),
        ((8, 8, 3), [layers.Conv2D(4, 3, padding="same", strides=2)], 2 * 4 * 4 * 4 * 27),
        ((8, 8, 4), [layers.Conv2D(6, 3, groups=2)], 2 * 6 * 6 * 6 * 9 * 2),
        ((9, 3), [layers.Conv1D(4, 3)], 2 * 7 * 4 * 9),
        ((4, 4, 4, 2), [layers.Conv3D(3, 2)], 2 * 27 * 3 * 8 * 2),
        ((8, 8, 4), [layers.DepthwiseConv2D(3)], 2 * 6 * 6 * 4 * 9),
        ((8, 8, 4), [layers.DepthwiseConv2D(3, depth_multiplier=2)], 2 * 6 * 6 * 8 * 9),
        ((8, 8, 4), [layers.SeparableConv2D(5, 3)], 2 * 36 * (4 * 9 + 4 * 5)),
        ((4, 4, 3), [layers.Conv2DTranspose(5, 3, strides=2)], 2 * 4 * 4 * 3 * 9 * 5),
        ((6, 4), [layers.EinsumDense("abc,cd->abd", (6, 5))], 2 * 6 * 4 * 5),
        ((5, 3), [layers.LSTM(4)], 2 * 5 * (3 * 16 + 4 * 16)),
        ((5, 3), [layers.GRU(4)], 2 * 5 * (3 * 12 + 4 * 12)),
        ((8, 8, 3), [layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D()], 0),
    ],
)
def test_flops_by_hand(shape, stack, by_hand):
    assert benchmark.flops(sequential(shape, *stack)) == by_hand


def test_flops_of_attention():
    x = keras.Input((6, 8))
    model = keras.Model(x, layers.MultiHeadAttention(num_heads=2, key_dim=4)(x, x))
    projections = 4 * 2 * 6 * 8 * 8
    assert benchmark.flops(model) == projections + 2 * (2 * 2 * 6 * 6 * 4)


def test_flops_count_nested_and_shared_layers_at_each_use():
    block = sequential((8,), layers.Dense(8), layers.ReLU())
    x = keras.Input((8,))
    model = keras.Model(x, layers.Dense(2)(block(block(x))))
    assert benchmark.flops(model) == 2 * (2 * 8 * 8) + 2 * 8 * 2


def test_flops_of_several_inputs_subclasses_and_batches():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Dense(2)(layers.Concatenate()([a, b])))
    x = {"a": np.zeros((5, 3)), "b": np.zeros((5, 4))}
    assert benchmark.flops(model) == 2 * 7 * 2
    assert benchmark.flops(model, x) == 5 * 2 * 7 * 2

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(self.dense(x))

    model = Twice()
    model(np.zeros((1, 3)))
    assert benchmark.flops(model, np.zeros((2, 3))) == 2 * 2 * (2 * 3 * 3)
    with pytest.raises(ValueError, match=r"no symbolic inputs.*flops\(model, x\)"):
        benchmark.flops(model)


def test_flops_do_not_depend_on_zeros_or_precision():
    model = sequential((4,), layers.Dense(4, kernel_initializer="zeros"))
    assert benchmark.flops(model) == 32
    keras.config.set_dtype_policy("mixed_float16")
    assert benchmark.flops(sequential((4,), layers.Dense(4))) == 32


def test_a_sparse_layer_counts_what_it_stores_only():
    model = sequential((32,), layers.Dense(16))
    kernel = model.layers[0].kernel.numpy()
    model.layers[0].kernel.assign(kernel * (np.abs(kernel) > np.quantile(np.abs(kernel), 0.9)))
    sparse = accel_tf.sparsify(model, min_sparsity=0.8)
    nonzero = np.count_nonzero(model.layers[0].kernel)
    stored = sparse.layers[0].values.shape[0]  # slices of four rows are as long as the longest
    assert nonzero <= stored < 2 * nonzero
    assert benchmark.flops(sparse) == 2 * stored
    assert benchmark.flops(sparse, np.zeros((8, 32))) == 8 * 2 * stored
    assert benchmark.parameters(sparse).total == nonzero + 16  # positions are no parameters
    assert benchmark.parameters(model).nonzero == benchmark.parameters(sparse).nonzero == nonzero


@pytest.mark.parametrize(
    ("name", "published"), [("MobileNet", 569e6), ("MobileNetV2", 300e6), ("ResNet50", 3.86e9)]
)
def test_flops_of_published_models(name, published):
    """Multiply–adds at 224×224: Howard et al. 2017, Sandler et al. 2018, Canziani et al. 2016."""
    model = getattr(keras.applications, name)(weights=None)
    assert benchmark.flops(model) / 2 == pytest.approx(published, rel=0.01)


def test_flops_need_known_shapes():
    model = sequential((None, 3), layers.Dense(2))
    with pytest.raises(ValueError, match=r"\(None, None, 3\)"):
        benchmark.flops(model)
    assert benchmark.flops(model, np.zeros((1, 10, 3))) == 2 * 10 * 3 * 2


def test_flops_of_a_loop_that_depends_on_data_is_an_error():
    class Halve(layers.Layer):
        def call(self, x):
            norm = lambda x: tf.reduce_sum(x) > 1  # noqa: E731
            return tf.while_loop(norm, lambda x: tf.matmul(x, tf.eye(2) / 2), [x])[0]

    model = sequential((2,), Halve())
    with pytest.raises(ValueError, match="number of steps depends on the data"):
        benchmark.flops(model)
    table = benchmark.compare({"loop": model}, np.ones((4, 2)), rounds=1, verbose=0)
    assert table["loop"].flops is None and "not counted" in table.note


# Parameters and bytes ---------------------------------------------------------------------------


def test_parameters_count_non_zeros_and_shared_weights_once():
    block = sequential((4,), layers.Dense(4))
    x = keras.Input((4,))
    model = keras.Model(x, block(block(x)))
    assert benchmark.parameters(model) == (20, 16)  # the biases are zero
    kernel = np.zeros((4, 4))
    kernel[0] = 1
    block.layers[0].kernel.assign(kernel)
    assert benchmark.parameters(model) == (20, 4)


def test_file_size_leaves_the_optimizer_out_and_the_model_alone(tmp_path, trained_cnn, digits):
    model = trained_cnn()
    model.save(tmp_path / "plain.keras")
    model.fit(digits[0][0][:8], digits[0][1][:8], verbose=0)
    optimizer = model.optimizer
    size = benchmark.file_size(model)
    plain = (tmp_path / "plain.keras").read_bytes()
    assert abs(size.plain - len(plain)) < 3000  # configuration and time stamp
    assert abs(size.gzipped - len(gzip.compress(plain))) < 3000
    assert model.optimizer is optimizer
    assert benchmark.file_size(tmp_path / "plain.keras").plain == len(plain)


def test_zeros_are_free_only_when_gzipped():
    model = sequential((100,), layers.Dense(100))
    dense = benchmark.file_size(model)
    kernel = model.layers[0].kernel.numpy()
    model.layers[0].kernel.assign(kernel * (np.abs(kernel) > np.quantile(np.abs(kernel), 0.9)))
    sparse = benchmark.file_size(model)
    assert abs(sparse.plain - dense.plain) < 200
    assert sparse.gzipped < dense.gzipped / 2


def test_missing_files_and_unbuilt_models_are_named(tmp_path):
    with pytest.raises(ValueError, match="no file .*nothing.tflite"):
        benchmark.file_size(tmp_path / "nothing.tflite")
    unbuilt = keras.Sequential([layers.Dense(1)], name="raw")
    for function in (benchmark.file_size, benchmark.parameters, benchmark.flops):
        with pytest.raises(ValueError, match="'raw'"):
            function(unbuilt)


# Latency ----------------------------------------------------------------------------------------


def test_latency_orders_known_durations():
    waits = {"short": 0.002, "long": 0.008}
    candidates = {name: (lambda x, s=s: time.sleep(s)) for name, s in waits.items()}
    times = benchmark.measure_latency(candidates, None, rounds=9, warmup=1, verbose=0)
    for name, seconds in waits.items():
        assert len(times[name].samples) == 9
        assert seconds <= times[name].median < seconds + 0.004


def test_candidates_take_turns_and_warm_up_is_not_counted():
    calls = []
    candidates = {name: (lambda x, n=name: calls.append(n)) for name in "ab"}
    benchmark.measure_latency(candidates, None, rounds=20, warmup=3, verbose=0)
    assert calls[:6] == ["a"] * 3 + ["b"] * 3
    turns = [tuple(calls[i : i + 4]) for i in range(6, len(calls), 4)]
    assert len(turns) == 20 and set(turns) == {tuple("aabb"), tuple("bbaa")}


def test_results_are_waited_for():
    class Lazy:
        fetched = 0

        def numpy(self):
            Lazy.fetched += 1

    benchmark.measure_latency(
        {"lazy": lambda x: {"out": [Lazy(), Lazy()]}}, None, rounds=2, warmup=1, verbose=0
    )
    assert Lazy.fetched == 2 * (1 + 2 * 2)


def test_latency_stops_early_and_restores_the_process():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    slow = {"slow": lambda x: time.sleep(0.01)}
    times = benchmark.measure_latency(slow, None, rounds=1000, warmup=0, max_seconds=0.1, verbose=0)
    assert 5 <= len(times["slow"].samples) < 20
    assert gc.isenabled() and random.random() == expected


def test_median_and_spread():
    latency = benchmark.Latency((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (latency.median, latency.spread, latency.percentile(100)) == (3.0, 2.0, 100.0)
    assert str(benchmark.Latency((0.0015, 0.0015))) == "1.5 ms ± 0 ns"


@pytest.mark.parametrize("jit", [True, False])
def test_models_run_in_inference_mode_as_they_were_compiled(jit):
    modes = []

    class Spy(layers.Layer):
        def call(self, x, training=None):
            modes.append((training, tf.inside_function()))
            return x

    model = sequential((3,), Spy())
    model.compile(jit_compile=jit)
    modes.clear()
    benchmark.measure_latency({"m": model}, np.zeros((2, 3)), rounds=3, warmup=1, verbose=0)
    assert modes == [(False, True)]  # traced once, never called eagerly
    assert _runners.compiled(model, np.zeros((2, 3)))._jit_compile is jit


def test_a_progress_bar_appears_only_when_it_takes_long(capsys, monkeypatch):
    clock = iter(range(10_000))
    candidates = {"c": lambda x: None}
    options = {"rounds": 5, "warmup": 0, "max_seconds": 1e9}
    benchmark.measure_latency(candidates, None, **options)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    benchmark.measure_latency(candidates, None, **options, verbose=0)
    assert capsys.readouterr().out == ""
    benchmark.measure_latency(candidates, None, **options)
    assert "5/5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ({}, {}, "at least one candidate"),
        ({"a": 3}, {}, "'a' must be a Keras model, .* Received: int"),
        ({"a": "model.h5"}, {}, r"'a' is the path 'model.h5'; only .tflite .*load_model"),
        ({"a": "gone.tflite"}, {}, r"'a': there is no file 'gone.tflite'"),
        ({"a": len}, {"rounds": 0}, "rounds=0"),
        ({"a": len}, {"warmup": -1}, "warmup=-1"),
    ],
)
def test_measure_latency_rejects(candidates, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.measure_latency(candidates, np.zeros((1, 2)), **options)


# LiteRT -----------------------------------------------------------------------------------------


def test_an_int8_file_is_compared_by_its_own_scales(trained_cnn, digits, litert):
    model = trained_cnn()
    x, y = digits[1][0][:100], digits[1][1][:100]
    path = litert(model, digits[0][0][:50])
    table = benchmark.compare({"float": model, "int8": path}, x, y, rounds=5, verbose=0)
    assert table["int8"].score > 0.95
    assert table["int8"].size.plain == path.stat().st_size < table["float"].size.plain
    assert table["int8"].parameters is None and table["int8"].flops is None
    outputs = predict(path, x, batch_size=32)
    expected = model(x).numpy()
    # Single outputs may clip, for the calibration saw 50 images; wrong scales would move them all.
    assert np.abs(outputs - expected).mean() < 0.03 * np.abs(expected).max()
    assert table.speedup("float") == 1.0 and table.speedup("int8") > 0


@pytest.fixture
def two_inputs():
    a, b = keras.Input((3,), name="zebra"), keras.Input((4,), name="apple")
    joined = layers.Concatenate()([a, b])
    return keras.Model([a, b], [layers.Dense(2)(joined), layers.Dense(5)(b)])


def test_files_of_several_inputs_and_outputs(two_inputs, litert):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(6, 3)).astype("float32"), rng.normal(size=(6, 4)).astype("float32")]
    path = litert(two_inputs)
    for inputs in (x, {"zebra": x[0], "apple": x[1]}):
        outputs = predict(path, inputs, batch_size=4)
        for got, expected in zip(outputs, two_inputs(x), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    error = lambda y, out: np.mean((out[0] - y) ** 2)  # noqa: E731
    table = benchmark.compare(
        {"keras": two_inputs, "file": path}, x, np.zeros((6, 2)), metric=error, rounds=2, verbose=0
    )
    assert table["file"].score == pytest.approx(table["keras"].score, rel=1e-4)


def test_inputs_that_do_not_fit_a_file_are_described(two_inputs, litert):
    path = litert(two_inputs)
    with pytest.raises(ValueError, match=r"apple \(-1, 4\), zebra \(-1, 3\).*dictionary by name"):
        predict(path, [np.zeros((2, 3)), np.zeros((2, 3))], 2)
    with pytest.raises(ValueError, match="has the inputs apple, zebra; received pear, zebra"):
        predict(path, {"zebra": np.zeros((2, 3)), "pear": np.zeros((2, 4))}, 2)


def test_a_file_of_fixed_batch_runs_once_per_chunk(litert):
    x = keras.Input(batch_shape=(2, 3))
    model = keras.Model(x, layers.Dense(2)(x))
    path = litert(model)
    data = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    expected = np.concatenate([model(data[i : i + 2]) for i in range(0, 6, 2)])
    np.testing.assert_allclose(predict(path, data, 6), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="takes 2 inputs per run; 3 is no multiple"):
        predict(path, data[:3], 6)


# The host ---------------------------------------------------------------------------------------


def test_host_names_the_machine():
    found = benchmark.host()
    assert found.cpu and found.cores >= 1 and found.versions["Keras"] == keras.__version__
    assert found.cpu in str(found) and tf.__version__ in str(found)
    assert "instruction sets" in found.table.column("host")


def test_roofline_has_the_magnitude_of_a_computer():
    limits = benchmark.roofline(matrix=512, megabytes=16, rounds=5)
    assert 1e9 < limits.peak < 1e15
    assert 1e8 < limits.bandwidth < 1e13
    assert limits.ridge == limits.peak / limits.bandwidth


def test_roofline_arithmetic():
    limits = benchmark.Roofline(peak=100.0, bandwidth=10.0)
    assert limits.ridge == 10
    np.testing.assert_array_equal(limits.attainable([1, 10, 100]), [10, 100, 100])
    assert limits.bound(flops=200, bytes_moved=10) == 2
    assert limits.bound(flops=200, bytes_moved=50) == 5
    with pytest.raises(ValueError, match="matrix=0"):
        benchmark.roofline(matrix=0)
