"""Schemes, fake quantization and the model rewrite."""

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st
from quantized_models import fit, quantizers, residual, small_cnn

import accel_tf as at
from accel_tf.quantization import (
    FakeQuantize,
    Int4Weights,
    MovingAverage,
    QuantizedAffine,
    QuantizedLayer,
    fake_quantize_weights,
)

L = keras.layers


class FourBits(at.Int8):
    weight_bits = 4


def names(model):
    return [layer.name for _, layer in at.layers.walk(model)]


# Schemes


@pytest.mark.parametrize(
    "scheme", [at.Int8(), at.Int8(MovingAverage(0.5)), Int4Weights(), Int4Weights(64)]
)
def test_a_scheme_round_trips_through_its_config(scheme):
    assert type(scheme).from_config(scheme.get_config()) == scheme
    saved = keras.saving.serialize_keras_object(scheme)
    assert keras.saving.deserialize_keras_object(saved) == scheme
    with pytest.raises(AttributeError):
        scheme.weight_bits = 3


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_scheme_rejects_a_momentum_outside_the_unit_interval(momentum):
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\).*Received momentum="):
        at.Int8(MovingAverage(momentum))


# Fake quantization


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(2, 8),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
def test_weights_are_integers_times_a_scale_per_channel(shape, bits, size, seed):
    w = np.random.default_rng(seed).normal(0, size, shape).astype("float32")
    rounded = fake_quantize_weights(w, bits).numpy()
    limit = np.abs(w.astype("float64")).reshape(-1, shape[-1]).max(axis=0)
    step = limit / (2 ** (bits - 1) - 1)
    q = rounded / step
    assert np.abs(q - np.round(q)).max() < 1e-3
    assert np.abs(q).max() <= 2 ** (bits - 1) - 1 + 1e-3
    assert (np.abs(rounded - w) <= step * 0.501).all()


@pytest.mark.parametrize("axes", [(-1,), (0,), (-2, -1), ()])
@pytest.mark.parametrize("group_size", [1, 3, 8, 100])
def test_a_group_of_inputs_has_a_scale_of_its_own(axes, group_size):
    w = np.random.default_rng(0).normal(size=(3, 5, 4, 2)).astype("float32")
    rounded = fake_quantize_weights(w, 4, axes, group_size).numpy()
    kept = sorted(axis % 4 for axis in axes)
    order = [axis for axis in range(4) if axis not in kept] + kept
    columns = int(np.prod([w.shape[axis] for axis in kept]))
    a, b = (np.transpose(v, order).reshape(-1, columns) for v in (w.astype("float64"), rounded))
    for start in range(0, len(a), group_size):
        group, ours = a[start : start + group_size], b[start : start + group_size]
        scale = np.abs(group).max(axis=0) / 7
        np.testing.assert_allclose(ours, np.round(group / scale) * scale, atol=1e-5)


def test_weights_of_zero_stay_zero_and_a_depthwise_kernel_has_a_scale_for_each_output():
    assert not fake_quantize_weights(np.zeros((3, 2), "float32")).numpy().any()
    kernel = np.array([1.0, 100.0, 3.0, 0.01], "float32").reshape(1, 1, 2, 2)
    np.testing.assert_allclose(fake_quantize_weights(kernel, 8, (-2, -1)), kernel, rtol=1e-6)
    assert fake_quantize_weights(kernel, 8, ()).numpy()[0, 0, 1, 1] == 0.0


def test_the_gradient_passes_straight_through_the_rounding():
    w = tf.Variable([[0.31, -0.77], [0.1, 0.4]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(fake_quantize_weights(w, 4) * [[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(tape.gradient(loss, w), [[1.0, 2.0], [3.0, 4.0]])

    quantize = FakeQuantize()
    quantize(np.array([0.0, 1.0], "float32"), training=True)
    x = tf.constant([-0.5, 0.5, 1.5])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = quantize(x)
    # The last is clipped by the range that was observed, so moving it changes nothing.
    np.testing.assert_array_equal(tape.gradient(y, x), [0.0, 1.0, 0.0])


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=6
    ),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_a_range_is_the_debiased_moving_average_of_the_batches(batches, momentum):
    quantize = FakeQuantize(observer=MovingAverage(momentum))
    weights, lows, highs = [], [], []
    for batch in batches:
        quantize(np.array(batch, "float32"), training=True)
        weights = [w * momentum for w in weights] + [1 - momentum]
        lows.append(min(batch))
        highs.append(max(batch))
    low = min(np.average(lows, weights=weights), 0)
    high = max(np.average(highs, weights=weights), 0)
    if high - low > 1e-6:
        np.testing.assert_allclose(quantize.range, (low, high), rtol=1e-4, atol=1e-4)


def test_activations_lie_on_the_grid_that_scale_and_zero_point_describe():
    quantize = FakeQuantize()
    x = np.linspace(-1.3, 2.9, 1000).astype("float32")
    y = np.asarray(quantize(x, training=True), "float64")
    q = y / quantize.scale + quantize.zero_point
    assert np.abs(q - np.round(q)).max() < 1e-3
    assert np.round(q).min() == -128 and np.round(q).max() == 127
    assert np.abs(y - x).max() <= quantize.scale
    assert np.asarray(quantize(np.zeros(1, "float32")))[0] == 0.0


def test_a_range_is_frozen_in_inference_and_unknown_before_any_data():
    quantize = FakeQuantize(name="q")
    x = np.array([0.123456, 0.7654321], "float32")
    np.testing.assert_array_equal(quantize(x), x)
    with pytest.raises(ValueError, match="range of 'q' is unknown: no data"):
        _ = quantize.range
    quantize(x, training=True)
    before = quantize.range
    quantize(x * 100)
    assert quantize.range == before


def test_batches_without_numbers_teach_nothing():
    quantize = FakeQuantize(observer=MovingAverage(0.5))
    quantize(np.array([-1.0, 1.0], "float32"), training=True)
    quantize(np.array([np.nan, 5.0], "float32"), training=True)
    quantize(np.zeros(0, "float32"), training=True)
    assert quantize.range == (-1.0, 1.0)


# The rewrite


def test_fake_quantization_is_placed_where_the_integer_runtime_rounds():
    model = small_cnn()
    quantized = at.quantize_aware(model)
    observed = {
        layer.name: [q.name for q in layer.quantizers]
        for layer in quantized.layers
        if isinstance(layer, QuantizedLayer)
    }
    assert observed == {
        "conv": [],  # rounds together with the normalization and the ReLU behind it
        "norm": [],
        "relu": ["output"],
        "pool": [],  # on the grid of its input
        "flatten": [],
        "dropout": [],
        "hidden": ["output"],
        "probabilities": ["before_activation", "output"],
    }
    assert quantized.layers[0].name == "image_quantizer"
    report = at.report_of(quantized)
    assert {e.layer for e in report.done} == {"image", *observed} - {"pool", "dropout"}
    assert {e.layer for e in report.skipped} == {"pool", "dropout"}
    assert "folded" in dict(report.done)["norm"]


def test_branches_that_need_a_tensor_themselves_are_not_fused():
    x = keras.Input((4, 4, 2))
    a = L.Conv2D(2, 1, name="conv")(x)
    b = L.BatchNormalization(name="norm")(a)
    quantized = at.quantize_aware(keras.Model(x, L.Add()([a, L.ReLU(name="relu")(b)])))
    assert quantized.get_layer("conv").output_quantizer is not None
    assert isinstance(quantized.get_layer("norm"), QuantizedAffine)
    assert quantized.get_layer("norm").output_quantizer is None
    assert quantized.get_layer("relu").output_quantizer is not None


def test_the_new_model_computes_nearly_the_same_and_shares_nothing():
    model = residual()
    x = np.random.normal(size=(8, 6, 6, 2)).astype("float32")
    before = model.get_weights()
    expected = model(x)
    quantized = at.calibrate(model, x, verbose=0)
    spread = np.ptp(expected)
    assert 0 < np.abs(quantized(x) - expected).max() < 0.05 * spread
    assert not {id(v) for v in model.variables} & {id(v) for v in quantized.variables}
    for variable in quantized.variables:
        variable.assign(variable * 0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_quantize_aware_and_calibrate_make_the_same_representation():
    model = residual()
    a, b = at.quantize_aware(model), at.calibrate(model, np.ones((4, 6, 6, 2)), verbose=0)
    assert names(a) == names(b)
    assert [v.shape for v in a.variables] == [v.shape for v in b.variables]


@pytest.mark.parametrize("build", [small_cnn, residual])
@pytest.mark.parametrize(
    "options",
    [{}, {"jit_compile": True}, {"steps_per_execution": 2}, {"run_eagerly": True}],
    ids=["graph", "xla", "steps", "eager"],
)
def test_training_observes_every_range(build, options):
    quantized = at.quantize_aware(build())
    before = [v.numpy() for v in quantized.trainable_variables]
    fit(quantized, **options)
    assert all(np.isfinite(q.range).all() and q.scale > 0 for q in quantizers(quantized))
    assert any(
        (b != v.numpy()).any() for b, v in zip(before, quantized.trainable_variables, strict=True)
    )


@pytest.mark.parametrize("build", [small_cnn, residual])
def test_a_quantized_model_survives_its_file(build, tmp_path):
    quantized = at.quantize_aware(build(), at.Int8(MovingAverage(0.7)))
    x = fit(quantized)
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), quantized.predict(x, verbose=0))
    assert [q.range for q in quantizers(loaded)] == [q.range for q in quantizers(quantized)]
    assert {q.observer for q in quantizers(loaded)} == {MovingAverage(0.7)}


def test_mixed_precision_keeps_the_grid_and_the_state_in_float32():
    keras.config.set_dtype_policy("mixed_float16")
    model = residual()
    keras.config.set_dtype_policy("float32")
    quantized = at.quantize_aware(model)
    x = fit(quantized)
    assert quantized(x).dtype == tf.float16
    assert {v.dtype for v in quantized.variables if "seed" not in v.name} == {"float32"}
    assert all(np.isfinite(q.range).all() for q in quantizers(quantized))


def test_replicas_observe_the_range_of_the_global_batch():
    # The second replica's half of each batch is ten times as large as the first's.
    x = np.ones((8, 2), "float32") * ([[1.0]] * 4 + [[-10.0]] * 4)
    with at.mirrored_strategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((2,)), L.Dense(2, name="dense")])
        quantized = at.quantize_aware(model)
        quantized.compile(keras.optimizers.SGD(0.0), "mse")
    quantized.fit(x, np.zeros((8, 2)), batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert quantized.layers[0].range == pytest.approx((-10.0, 1.0))
    for variable in quantized.layers[0].variables:
        first, second = (float(v.numpy()) for v in variable.value.values)
        assert first == second


@pytest.mark.parametrize("exclude", [["hidden"], ["hid*"]])
def test_an_excluded_layer_stays_in_float_and_says_so(exclude):
    quantized = at.calibrate(small_cnn(), np.ones((4, 8, 8, 1)), exclude=exclude, verbose=0)
    assert type(quantized.get_layer("hidden")) is L.Dense
    assert quantized.get_layer("probabilities").quantize_inputs == [True]
    assert dict(at.report_of(quantized).skipped)["hidden"] == "excluded: stays in float"


def test_a_nested_model_can_be_excluded_as_a_whole():
    quantized = at.quantize_aware(residual(), exclude=["shared"])
    assert type(quantized.get_layer("shared").get_layer("conv")) is L.Conv2D
    assert quantized.get_layer("add").quantize_inputs == [True, True]


def squared(x):
    return x * x


class Unknown(L.Layer):
    def call(self, inputs):
        return tf.sort(inputs)


def test_what_cannot_be_quantized_is_an_error_with_a_way_out():
    inner = keras.Sequential([keras.Input((4, 3)), Unknown(name="own")], name="inner")
    nested = keras.Sequential([keras.Input((4, 3)), inner])
    with pytest.raises(ValueError, match=r"'inner/own': .*Unknown.*exclude=\['inner/own'\]"):
        at.quantize_aware(nested)
    at.quantize_aware(nested, exclude=["inner/own"])

    own = keras.Sequential([keras.Input((3,)), L.Dense(2, activation=squared, name="d")])
    with pytest.raises(ValueError, match=r"'d' \(Dense\): its activation 'squared' is none of lin"):
        at.quantize_aware(own)
    with pytest.raises(ValueError, match=r"'r' \(ReLU\): its activation 'ReLU\(max_value=3"):
        at.quantize_aware(keras.Sequential([keras.Input((3,)), L.ReLU(3.0, name="r")]))
    norm = keras.Sequential([keras.Input((4, 3)), L.BatchNormalization(axis=1, name="bn")])
    with pytest.raises(ValueError, match="'bn'.*normalizes axis 1 and not the last"):
        at.quantize_aware(norm)
    first = keras.Sequential(
        [keras.Input((2, 4, 4)), L.Conv2D(2, 1, name="c", data_format="channels_first")]
    )
    with pytest.raises(ValueError, match="the integer kernels are channels_last"):
        at.quantize_aware(first)


def test_wrong_arguments_are_named():
    model = small_cnn()
    with pytest.raises(ValueError, match="received int"):
        at.quantize_aware(7)
    with pytest.raises(ValueError, match=r"scheme such as Int8\(\), received 'int8'"):
        at.quantize_aware(model, "int8")
    with pytest.raises(ValueError, match="exclude='dense' matches no layer. There are conv, norm"):
        at.quantize_aware(model, exclude=["dense"])
    with pytest.raises(ValueError, match="list of paths, received the string 'conv'"):
        at.quantize_aware(model, exclude="conv")
    with pytest.raises(ValueError, match="quantized already .*float model"):
        at.calibrate(at.quantize_aware(model), np.ones((1, 8, 8, 1)), verbose=0)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(2)

        def call(self, x):
            return self.dense(x)

    own = Own()
    own(np.ones((1, 2)))
    with pytest.raises(ValueError, match="subclassed"):
        at.quantize_aware(own)


def test_fine_tuning_wins_back_accuracy_that_four_bits_cost(trained_cnn, digits):
    (x, y), (x_test, y_test) = digits
    model = trained_cnn()

    def accuracy(m):
        return float((m.predict(x_test, verbose=0).argmax(-1) == y_test).mean())

    tuned = at.quantize_aware(model, FourBits())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    tuned.compile(keras.optimizers.Adam(1e-3), loss)
    tuned.fit(x, y, epochs=2, verbose=0)
    assert accuracy(at.calibrate(model, x[:256], verbose=0)) >= accuracy(model) - 0.01
    assert accuracy(tuned) >= accuracy(model) - 0.03
