"""Observers: what range each finds, and that all of them work wherever a model is trained."""

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.quantization import (
    MSE,
    Entropy,
    FakeQuantize,
    Learned,
    MinMax,
    MovingAverage,
    Percentile,
)
from accel_tf.quantization._histograms import BINS

L = keras.layers
OBSERVERS = [MovingAverage(0.9), MinMax(), Percentile(99.9), MSE(), Entropy(), Learned()]
HISTOGRAMS = [Percentile(99.9), MSE(), Entropy()]
every = pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
histograms = pytest.mark.parametrize("observer", HISTOGRAMS, ids=lambda o: type(o).__name__)
batches_of_floats = st.lists(
    st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=40),
    min_size=1,
    max_size=5,
)


def observed(observer, *batches, bits=8, symmetric=False):
    quantize = FakeQuantize(bits, observer, symmetric=symmetric)
    for batch in batches:
        quantize(np.asarray(batch, "float32"), training=True)
    return quantize


def cnn():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            L.Conv2D(3, 3, name="conv"),
            L.BatchNormalization(),
            L.ReLU(name="relu"),
            L.Flatten(),
            L.Dense(3, name="logits"),
        ]
    )


def data(n=16):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6, 6, 1)).astype("float32"), rng.integers(0, 3, n)


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, **options)
    return model


def quantizers(model):
    return [layer for _, layer in at.layers.walk(model) if isinstance(layer, FakeQuantize)]


# What each finds


@hypothesis.settings(max_examples=30)
@hypothesis.given(batches_of_floats)
def test_min_max_holds_the_extremes_of_all_that_was_seen(batches):
    values = np.concatenate([np.asarray(b, "float32") for b in batches])
    quantize = observed(MinMax(), *batches)
    assert (float(quantize.low), float(quantize.high)) == (values.min(), values.max())


@hypothesis.settings(max_examples=30)
@hypothesis.given(batches_of_floats, st.sampled_from(HISTOGRAMS))
def test_a_histogram_does_not_depend_on_the_order_of_the_batches(batches, observer):
    first, second = (observed(observer, *order) for order in (batches, batches[::-1]))
    np.testing.assert_array_equal(first.counts.numpy(), second.counts.numpy())
    assert float(first.low) == float(second.low) and float(first.high) == float(second.high)
    values = np.concatenate([np.asarray(b, "float32") for b in batches])
    assert (float(first.smallest), float(first.largest)) == (values.min(), values.max())
    limit = float(first.limit)
    assert np.log2(limit) % 1 == 0 and np.abs(values).max() < limit
    expected = np.histogram(values, BINS, (-limit, limit))[0]
    np.testing.assert_array_equal(first.counts.numpy(), expected)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.integers(1, 20_000), st.floats(51, 100), st.floats(1e-6, 1e6), st.integers(0, 2**31)
)
def test_a_percentile_is_exact_to_a_bin(n, percentile, size, seed):
    x = (np.random.default_rng(seed).standard_t(3, n) * size).astype("float32")
    quantize = observed(Percentile(percentile), x[: n // 2], x[n // 2 :])
    # Between two neighbours any value is a percentile; the observer takes one in a bin of theirs.
    ends = np.percentile(x.astype("float64"), [100 - percentile, percentile], method="lower")
    upper = np.percentile(x.astype("float64"), [100 - percentile, percentile], method="higher")
    width = 2 * float(quantize.limit) / BINS
    low, high = float(quantize.low), float(quantize.high)
    assert ends[0] - 1.01 * width <= low <= upper[0] + 1.01 * width
    assert ends[1] - 1.01 * width <= high <= upper[1] + 1.01 * width


def test_a_hundredth_percentile_is_the_range_and_outliers_are_left_out_by_others():
    x = np.append(np.linspace(0.0, 1.0, 100_000), 30.0)
    assert observed(Percentile(100.0), x).range == (0.0, 30.0)
    assert observed(Percentile(), x).range[1] == pytest.approx(1.0, abs=0.02)


def squared_error(x, low, high, bits):
    """The error in float64 of rounding to the grid of a range, 0 on it."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    q = np.clip(np.round(x / step) + zero, 0, 2**bits - 1)
    return np.mean(((q - zero) * step - x) ** 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "laplace", "relu", "heavy", "uniform", "silu"])
def test_mse_finds_a_range_about_as_good_as_the_best(bits, shape):
    rng = np.random.default_rng(3)
    x = {
        "normal": rng.normal(size=20_000),
        "laplace": rng.laplace(size=20_000),
        "relu": np.maximum(rng.normal(size=20_000), 0),
        "heavy": rng.standard_t(3, 20_000),
        "uniform": rng.uniform(-1, 3, 20_000),
        "silu": (lambda z: z / (1 + np.exp(-z)))(rng.normal(0, 3, 20_000)),
    }[shape].astype("float32")
    found = squared_error(x, *observed(MSE(), x, bits=bits).range, bits)
    ends = np.linspace(0, np.abs(x).max(), 400)[1:]
    candidates = [(max(-t, x.min()), min(t, x.max())) for t in ends]
    best = min(squared_error(x.astype("float64"), *c, bits) for c in candidates)
    assert found <= 1.05 * best  # the best of the values themselves, not of their histogram
    assert found <= squared_error(x, x.min(), x.max(), bits) * (1 + 1e-6)


def tensorrt_bins(counts, levels):
    """How many bins TensorRT keeps, in plain loops over a histogram of magnitudes."""
    counts = counts.astype("float64")
    counts[0] = counts[1]
    divergences = {}
    for kept in range(levels, len(counts) + 1, max(1, (len(counts) - levels) // 120)):
        reference = counts[:kept].copy()
        reference[-1] += counts[kept:].sum()
        rounded = np.zeros(kept)
        level = np.arange(kept) * levels // kept
        for k in range(levels):
            full = (level == k) & (reference > 0)
            if full.any():
                rounded[full] = counts[:kept][level == k].sum() / full.sum()
        p, q = reference / reference.sum(), rounded / rounded.sum()
        full = p > 0
        divergences[kept] = np.sum(p[full] * np.log(p[full] / (q[full] + 1e-9)))
    return min(divergences, key=divergences.get)


@pytest.mark.parametrize("seed", range(3))
def test_entropy_clips_where_tensorrt_does(seed):
    rng = np.random.default_rng(seed)
    x = np.append(rng.normal(size=50_000), rng.uniform(5, 15, 20)).astype("float32")
    quantize = observed(Entropy(), x)
    limit = float(quantize.limit)
    bins = tensorrt_bins(np.histogram(np.abs(x), BINS // 2, (0, limit))[0], 128)
    expected = min(bins * limit / (BINS // 2), x.max())
    assert quantize.range[1] == pytest.approx(expected, rel=0.02)


@histograms
def test_zeros_alone_and_sixteen_bits_are_ranges_too(observer):
    assert observed(observer, np.zeros(9)).scale > 0
    x = np.random.default_rng(0).normal(size=5000)
    wide = observed(observer, x, bits=16, symmetric=True)
    assert wide.range[0] == -wide.range[1]
    assert 0.6 * np.abs(x).max() < wide.range[1] <= np.abs(x).max() * 1.001


@pytest.mark.parametrize("percentile", [50, 100.5, float("nan")])
def test_a_percentile_out_of_range_is_an_error(percentile):
    with pytest.raises(ValueError, match="above 50 and at most 100, received percentile="):
        Percentile(percentile)


# What all of them promise


@every
def test_an_observer_round_trips_through_its_config(observer):
    saved = keras.saving.serialize_keras_object(observer)
    assert keras.saving.deserialize_keras_object(saved) == observer


@every
@pytest.mark.parametrize("symmetric", [False, True])
def test_batches_without_numbers_teach_nothing(observer, symmetric):
    quantize = FakeQuantize(8, observer, symmetric=symmetric)
    bad = [[np.nan, 5.0], [5.0, np.nan], [np.inf, 1.0], [-np.inf, 1.0], []]
    for batch in bad:
        quantize(np.array(batch, "float32"), training=True)
    with pytest.raises(ValueError, match="no data has been seen"):
        _ = quantize.range
    quantize(np.linspace(-1.0, 2.0, 50, dtype="float32"), training=True)
    before = [v.numpy() for v in quantize.variables]
    for batch in bad:
        quantize(np.array(batch, "float32"), training=True)
    for old, new in zip(before, quantize.variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())
    assert -2.01 <= quantize.range[0] < -0.8 and 1.6 < quantize.range[1] <= 2.01


@every
def test_the_values_lie_on_the_grid_of_the_range_and_survive_inference(observer):
    x = np.random.default_rng(1).normal(size=1000).astype("float32")
    quantize = observed(observer, x)
    trained, inferred = quantize(x, training=True), quantize(x)
    q = np.asarray(inferred, "float64") / quantize.scale
    assert np.abs(q - np.round(q)).max() < 1e-3
    np.testing.assert_allclose(trained, inferred, atol=quantize.scale * 0.6)


@every
@pytest.mark.parametrize(
    "options",
    [{}, {"jit_compile": True}, {"steps_per_execution": 2}, {"run_eagerly": True}],
    ids=["graph", "xla", "steps", "eager"],
)
def test_every_observer_trains_calibrates_and_survives_its_file(observer, options, tmp_path):
    x, y = data()
    quantized = compiled(at.quantize_aware(cnn(), at.Int8(observer)), **options)
    quantized.fit(x, y, batch_size=4, epochs=1, verbose=0)
    assert all(np.isfinite(q.range).all() and q.scale > 0 for q in quantizers(quantized))
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [q.range for q in quantizers(loaded)] == [q.range for q in quantizers(quantized)]
    assert {q.observer for q in quantizers(loaded)} == {observer}
    loaded.fit(x, y, batch_size=4, epochs=1, verbose=0)


@every
def test_calibrated_models_become_the_file_that_they_predict(observer, tmp_path):
    x, _ = data(64)
    model = cnn()
    quantized = at.calibrate(model, x, at.Int8(observer), verbose=0)
    expected = quantized.predict(x, verbose=0)
    assert np.abs(expected - model.predict(x, verbose=0)).max() < 0.1 * np.ptp(expected)
    at.export.litert(quantized, tmp_path / "model.tflite")
    step = quantizers(quantized)[-1].scale
    got = at.export.run_litert(tmp_path / "model.tflite", x)
    assert np.abs(got - expected).max() <= 1.01 * step
    assert np.mean(np.abs(got - expected) < 0.01 * step) > 0.95


@every
def test_mixed_precision_observes_in_float32(observer):
    keras.config.set_dtype_policy("mixed_float16")
    model = cnn()
    keras.config.set_dtype_policy("float32")
    x, y = data()
    quantized = compiled(at.quantize_aware(model, at.Int8(observer)))
    quantized.fit(x, y, batch_size=8, epochs=1, verbose=0)
    assert {v.dtype for q in quantizers(quantized) for v in q.weights} == {"float32"}
    assert all(np.isfinite(q.range).all() for q in quantizers(quantized))


@every
def test_two_replicas_hold_the_true_extremes_of_different_data(observer):
    # The second replica's half of each batch is ten times as large as the first's.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6, 6, 1)).astype("float32")
    x[np.arange(32) % 16 >= 8] *= -10.0
    y = np.zeros(32)
    with at.mirrored_strategy(["CPU:0", "CPU:1"]).scope():
        quantized = at.quantize_aware(cnn(), at.Int8(observer))
        compiled(quantized)
        quantized.optimizer.learning_rate = 0.0
    quantized.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    quantize = quantizers(quantized)[0]
    halves = x[:16], x[16:]
    if isinstance(observer, MovingAverage):
        expected = [np.average([f(h) for h in halves] * 2, weights=0.9 ** np.arange(3, -1, -1.0))
                    for f in (np.min, np.max)]  # fmt: skip
        found = quantize.range
    elif isinstance(observer, Learned):  # starts at the first batch
        expected, found = (halves[0].min(), halves[0].max()), quantize.range
    elif isinstance(observer, MinMax):
        expected, found = (x.min(), x.max()), quantize.range
    else:
        expected, found = (x.min(), x.max()), (quantize.smallest.numpy(), quantize.largest.numpy())
        assert quantize.counts.numpy().sum() == 2 * x.size
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for variable in quantize.variables:
        first, second = (v.numpy() for v in variable.value.values)
        np.testing.assert_array_equal(first, second)


# Learned ranges


def lsq_plus(x, s, low, bits, dy):
    """LSQ+ in float64 for a grid [low, low + Q·s]: gradients of sum(dy · x̂) by s and by low."""
    largest = 2**bits - 1
    zero = np.round(-low / s)
    v = x / s + zero
    q = np.clip(np.round(v), 0, largest)
    by_s = np.where(v < 0, 0, np.where(v > largest, largest, np.round(v) - v))
    by_low = ((v < 0) | (v > largest)).astype(float)
    return (q - zero) * s, np.sum(dy * by_s), np.sum(dy * by_low)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_a_learned_range_is_that_of_lsq(bits):
    rng = np.random.default_rng(bits)
    largest = 2**bits - 1
    # Ends at integer multiples of the step, so that nothing is shifted, and values off the ties.
    s = 0.25
    low = -s * (largest // 3)
    x = rng.uniform(2 * low, low + 1.5 * largest * s, 500).astype("float32")
    dy = rng.normal(size=500).astype("float32")
    quantize = FakeQuantize(bits, Learned())
    quantize.build()
    quantize.width.assign(largest * s)
    quantize.low.assign(low)
    quantize.weight.assign(1.0)
    x = x[np.abs(np.abs(x / s) % 1 - 0.5) > 1e-3]
    x = x[(x < low - 1e-4) | (x > low + 1e-4)]
    dy = dy[: len(x)]
    inside = (x >= low) & (x <= low + largest * s)
    with tf.GradientTape() as tape:
        x_ = tf.constant(x)
        tape.watch(x_)
        y = quantize(x_, training=True)
        loss = tf.reduce_sum(y * dy)
    to_x, to_width, to_low = tape.gradient(loss, [x_, quantize.width.value, quantize.low.value])
    expected, by_s, by_low = lsq_plus(x.astype("float64"), s, low, bits, dy)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(to_x, np.where(inside, dy, 0))
    # A step of SGD with the scaled gradient of the width moves s as g · ∂/∂s does in the paper.
    g = 1 / np.sqrt(len(x) * largest)
    assert float(to_width) / largest == pytest.approx(g * by_s, rel=1e-3, abs=1e-4)
    factor = largest**1.5 / np.sqrt(len(x))
    assert float(to_low) == pytest.approx(factor * by_low, rel=1e-3, abs=1e-3)


def test_a_symmetric_learned_range_is_lsq_without_offset():
    quantize = FakeQuantize(4, Learned(), symmetric=True)
    x = tf.constant([-3.0, -0.3, 0.1, 0.6, 0.7])
    quantize(tf.constant([0.7, -0.7]), training=True)  # s = 0.1, integers −7 to 7
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(quantize(x + 0.02, training=True))
    to_width, to_low = tape.gradient(loss, [quantize.width.value, quantize.low.value])
    by_s = (
        -7 + 0.2 * (-1) * 3 + 7
    )  # −0.28 → −3: −0.2; 0.12 → 1, 0.62 → 6: −0.2 each; 0.72 is clipped
    assert float(to_width) / 7 == pytest.approx(by_s / np.sqrt(5 * 7), rel=1e-3)
    assert float(to_low) == 0.0


def test_ranges_are_learned_unless_their_layer_is_frozen():
    x, y = data(64)
    model = cnn()
    model.get_layer("relu").trainable = False
    quantized = compiled(at.quantize_aware(model, at.Int8(Learned())))
    trainable = {v.path for v in quantized.trainable_variables}
    assert sum(path.endswith(("width", "low")) for path in trainable) == 4
    quantized.fit(x[:4], y[:4], batch_size=4, verbose=0)
    before = {q.path: q.range for q in quantizers(quantized)}
    quantized.fit(x, y, batch_size=4, epochs=2, verbose=0)
    moved = {
        path: q.range != before[path] for path, q in ((q.path, q) for q in quantizers(quantized))
    }
    assert list(moved.values()) == [True, False, True]
    relu = quantizers(quantized)[1]
    assert relu.range[0] == 0.0


def test_a_low_end_of_zero_stays_and_no_range_turns_inside_out():
    x, y = data(64)
    quantized = at.quantize_aware(cnn(), at.Int8(Learned()))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    quantized.compile(keras.optimizers.SGD(30.0), loss)  # far too large
    quantized.fit(x, y, batch_size=8, epochs=2, verbose=0)
    for quantize in quantizers(quantized):
        assert float(quantize.width) > 0 and float(quantize.low) <= 0
    assert float(quantizers(quantized)[1].low) == 0.0


def test_learning_shrinks_the_range_that_an_outlier_has_set():
    """A regression through 2 bits: the outlier's range rounds all else to 0, and learning ends that."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (512, 1)).astype("float32")
    x[0] = 8.0
    quantize = FakeQuantize(2, Learned(), name="q")
    model = keras.Sequential([keras.Input((1,)), quantize])
    model.compile(keras.optimizers.Adam(0.05), "mae")
    model.fit(x, x, batch_size=512, epochs=1, verbose=0)
    assert quantize.range[1] == pytest.approx(8.0, abs=0.2)
    first = model.evaluate(x, x, verbose=0)
    model.fit(x, x, batch_size=512, epochs=250, verbose=0)
    assert quantize.range[1] < 2.0
    assert model.evaluate(x, x, verbose=0) < 0.5 * first


# What calibrate takes if nothing is said


def test_calibrate_takes_all_values_in_and_training_goes_on_from_there():
    x, y = data(64)
    model = cnn()
    default = at.calibrate(model, x, verbose=0)
    widest = at.calibrate(model, x, at.Int8(MinMax()), verbose=0)
    ranges = [[q.range for q in quantizers(m)] for m in (default, widest)]
    np.testing.assert_allclose(*ranges, rtol=1e-5)
    assert {type(q.observer) for q in quantizers(default)} == {MovingAverage}
    before = [q.range[1] for q in quantizers(default)]
    compiled(default).fit(10 * x, y, batch_size=64, epochs=1, verbose=0)
    after = [q.range[1] for q in quantizers(default)]
    # One batch, ten times as large, is a hundredth of the average.
    assert after[0] == pytest.approx(0.99 * before[0] + 0.01 * 10 * x.max(), rel=1e-4)


def test_a_mixed_scheme_keeps_the_observers_that_it_names():
    mixed = at.quantization.Mixed({"conv": at.Int8(MinMax()), "logits": at.Int8Weights()})
    filled = mixed.with_default(MSE())
    assert filled.of("conv").observer == MinMax()
    assert filled.of("logits") == at.Int8Weights()
    assert filled.of("relu").observer == MSE()
