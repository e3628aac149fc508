"""TFMOT and tf_keras: converted models compute the same; our schedules and masks are TFMOT's.

Importing TFMOT turns `tf.keras` into tf_keras for the whole process, so what needs it runs in another
one. The functions that do are at the end; each is called by name in a fresh interpreter.
"""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tf_keras

import accel_tf as at
from accel_tf.interop.tfmot import from_tf_keras, from_tfmot, to_tf_keras, to_tfmot

L = keras.layers


def nested():
    shared = L.Dense(8, activation="gelu", name="shared")
    sequential = keras.Sequential(
        [keras.Input((8,)), L.Dense(8, activation="silu"), L.BatchNormalization()], name="inner"
    )
    x = keras.Input((8,))
    residual = keras.Model(x, L.Add()([L.Dense(8, use_bias=False)(x), x]), name="residual")
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    h = L.Concatenate()([residual(sequential(shared(a))), sequential(shared(b))])
    return keras.Model([a, b], [L.Dense(1)(h), L.Dense(3, activation="softmax")(h)])


def sequence():
    inputs = keras.Input((6,), dtype="int32")
    x = L.Embedding(9, 8)(inputs)
    x = L.Bidirectional(L.LSTM(4, return_sequences=True))(x)
    x = L.GRU(5, return_sequences=True)(x)
    x = L.MultiHeadAttention(2, 4)(x, x)
    x = L.LayerNormalization()(x)
    x = L.TimeDistributed(L.Dense(3, activation="relu6"))(x)
    x = L.SeparableConv1D(4, 3, depth_multiplier=2)(x)
    x = L.Dropout(0.5)(L.LeakyReLU(0.2)(x))
    return keras.Model(inputs, L.GlobalAveragePooling1D()(x))


def dictionaries():
    inputs = {name: keras.Input((8,), name=name) for name in ("a", "b")}
    return keras.Model(inputs, {"sum": L.Add()([inputs["a"], L.Dense(8)(inputs["b"])])})


def mobilenet():
    return keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None, classes=5)


def values(structure):
    return [np.asarray(y) for y in keras.tree.flatten(structure)]


@pytest.mark.parametrize("make", [nested, sequence, dictionaries, mobilenet])
def test_models_compute_the_same_there_and_back(make):
    model, rng = make(), np.random.default_rng(0)
    for w in model.weights:  # also what training would have moved, such as moving averages
        if keras.backend.is_float_dtype(w.dtype):
            w.assign(w + rng.uniform(0.01, 0.1, w.shape))
    x = keras.tree.map_structure(
        lambda i: (
            rng.integers(0, 9, (4, *i.shape[1:]))
            if i.dtype == "int32"
            else rng.normal(size=(4, *i.shape[1:])).astype("float32")
        ),
        model._inputs_struct,
    )
    legacy = to_tf_keras(model)
    assert isinstance(legacy, tf_keras.Model) and not isinstance(legacy, keras.Model)
    back = from_tf_keras(legacy)
    assert [layer.name for layer in back.layers] == [layer.name for layer in model.layers]
    expected = values(model(x))
    assert max(y.std() for y in expected) > 1e-3
    for other in (legacy, back):
        for y, z in zip(expected, values(other(x)), strict=True):
            np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-5)
    # Copies: training one leaves the other alone.
    back.set_weights([np.zeros(w.shape) for w in back.weights])
    np.testing.assert_array_equal(values(model(x))[0], expected[0])


def test_pruned_models_and_frozen_layers_keep_their_state():
    model = nested()
    at.prune(model, at.ConstantSparsity(0.75))
    model.get_layer("shared").trainable = False
    model.get_layer("inner").trainable = False
    back = from_tf_keras(to_tf_keras(model))
    assert at.sparsity(back).rows == at.sparsity(model).rows
    assert not back.get_layer("shared").trainable and not back.get_layer("inner").trainable
    assert len(back.trainable_weights) == len(model.trainable_weights) == 5


@pytest.mark.parametrize("name", ["relu", "elu", "selu", "softplus", "tanh", "mish", "leaky_relu"])
def test_activations(name):
    model = keras.Sequential([keras.Input((50,)), L.Activation(name)])
    x = np.linspace(-5, 5, 50, dtype="float32")[None]
    np.testing.assert_allclose(to_tf_keras(model)(x), model(x), atol=1e-6)


class Custom(keras.Layer):
    def call(self, x):
        return x


def test_what_cannot_be_converted_is_named():
    x = keras.Input((8,))
    for output, message in [
        (L.Dense(2, activation="hard_sigmoid", name="d")(x), "'d.activation' is 'hard_sigmoid'"),
        (x + 1, "'add' is a Add, which tf_keras has no layer for. Operations such as x"),
        (Custom(name="mine")(x), "'mine' is a Custom, which tf_keras has no layer for"),
        (L.RMSNormalization(name="rms")(x), "'rms' is a RMSNormalization"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_tf_keras(keras.Model(x, output))
    attention = L.MultiHeadAttention(2, 4, use_gate=True, name="gated")
    y = keras.Input((3, 8))
    with pytest.raises(ValueError, match="'gated': .*no argument 'use_gate', which is True"):
        to_tf_keras(keras.Model(y, attention(y, y)))
    with pytest.raises(
        ValueError, match="expects a keras.Model, received Sequential.*from_tf_keras"
    ):
        to_tf_keras(tf_keras.Sequential([tf_keras.Input((3,)), tf_keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match="expects a built tf_keras.Model"):
        from_tf_keras(keras.Model(x, L.Dense(1)(x)))


@pytest.mark.parametrize("given", [0.5, {"class_name": "Mine", "config": {}}, at.Unstructured()])
def test_unknown_schedules_are_refused(given):
    with pytest.raises(
        ValueError, match="from_tfmot expects TFMOT's ConstantSparsity or Polynomial"
    ):
        from_tfmot(given)
    with pytest.raises(
        ValueError, match="TFMOT has schedules that equal ConstantSparsity and Poly"
    ):
        to_tfmot(given)


@pytest.mark.parametrize(
    "check", ["schedules_convert", "schedules_and_masks_are_tfmots", "tfmot_keeps_all_ties"]
)
def test_with_tfmot(check):
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('checks', {str(pathlib.Path(__file__))!r})\n"
        "checks = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(checks)\n"
        f"checks.{check}()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "passed" in run.stdout


def schedules_convert():
    from tensorflow_model_optimization.sparsity import keras as theirs

    for ours in (
        at.ConstantSparsity(0.5, begin_step=3, end_step=50, frequency=2),
        at.PolynomialDecay(0.9, 1000, initial_sparsity=0.1, begin_step=5, power=2, frequency=7),
    ):
        converted = to_tfmot(ours)
        assert isinstance(converted, getattr(theirs, type(ours).__name__))
        assert from_tfmot(converted) == from_tfmot(converted.get_config()) == ours
    try:
        from_tfmot(theirs.PolynomialDecay(0.0, 0.5, 0, 50))  # its default frequency is 100
    except ValueError as error:
        assert "never gets past initial_sparsity" in str(error)
    else:
        raise AssertionError("a schedule that never prunes was accepted")
    print("passed")


class Holder(keras.Layer):
    """Holds a kernel of any shape."""

    def __init__(self, values):
        super().__init__()
        self.kernel = self.add_weight(values.shape, name="kernel")
        self.kernel.assign(values)

    def call(self, x):
        return x


def our_mask(weights, schedule, step):
    model = keras.Sequential([keras.Input((1,)), Holder(weights)])
    at.prune(model, schedule, initial_step=step)
    return model.layers[0].kernel.numpy() != 0


def tfmot_mask(weights, schedule, step):
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

    pruning = pruning_impl.Pruning(
        lambda: tf.constant(step, tf.int64), [], to_tfmot(schedule), (1, 1), "AVG"
    )
    return pruning._update_mask(tf.constant(weights))[1].numpy() != 0


def schedules_and_masks_are_tfmots():
    import tensorflow as tf

    rng = np.random.default_rng(0)
    updates = masks = 0
    for case in range(1000):
        begin, frequency = int(rng.integers(0, 50)), int(rng.integers(1, 20))
        end = begin + frequency * int(rng.integers(1, 40)) + int(rng.integers(0, frequency))
        step = int(rng.integers(1, end + 60))
        first, last = rng.uniform(0, 0.99, 2)
        ours = (
            at.PolynomialDecay(last, end, first, begin, rng.choice([1, 2, 3, 1.5]), frequency)
            if case % 3
            else at.ConstantSparsity(last, begin, int(rng.choice([-1, end])), frequency)
        )
        update, sparsity = to_tfmot(ours)(tf.constant(step, tf.int64))
        assert bool(update) == ours.updates_at(step), (case, ours, step)
        assert float(sparsity) == ours.sparsity_at(step), (case, ours, step)

        shape = tuple(rng.integers(1, 8, rng.integers(2, 5)).tolist())
        magnitudes = rng.permutation(np.arange(1, np.prod(shape) + 1)).reshape(shape)  # no ties
        weights = (magnitudes * rng.choice([-0.01, 0.01], shape)).astype("float32")
        held = ours.latest_update(step)  # what TFMOT's mask was last made at
        expected = tfmot_mask(weights, ours, held) if held >= 0 else np.ones(shape, bool)
        np.testing.assert_array_equal(our_mask(weights, ours, step), expected, str((case, ours)))
        updates, masks = updates + bool(update), masks + (held >= 0)
    assert updates > 100 and masks > 700, (updates, masks)
    print("passed")


def tfmot_keeps_all_ties():
    """TFMOT keeps whatever reaches its threshold, also where that is far too much; we count."""
    schedule = at.ConstantSparsity(0.5)
    equal = np.ones((10, 10), "float32")
    mostly_zero = np.zeros((10, 10), "float32")
    mostly_zero[0] = 1
    assert tfmot_mask(equal, schedule, 0).sum() == 100
    assert our_mask(equal, schedule, 0).sum() == 50
    assert tfmot_mask(mostly_zero, schedule, 0).all()
    assert our_mask(mostly_zero, schedule, 0).sum() == 10  # the weights that are not zero
    print("passed")
