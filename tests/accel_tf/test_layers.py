"""accel_tf.layers: every kind of model is walked once, followed, and rebuilt without sharing."""

import keras
import numpy as np
import pytest

from accel_tf import layers


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.first = keras.layers.Dense(3, name="first")
        self.block = keras.Sequential([keras.layers.Dense(2, name="inner")], name="block")

    def call(self, x):
        return self.block(self.first(x))


def nested_and_shared():
    shared = keras.layers.Dense(4, name="shared")
    inner = keras.Sequential(
        [keras.Input((4,)), shared, keras.layers.BatchNormalization(name="bn")], name="inner"
    )
    x = keras.Input((4,), name="x")
    y = inner(shared(x)) + x
    return keras.Model(x, keras.layers.Dense(2, name="head")(inner(y)), name="outer")


def recurrent():
    wrapped = keras.layers.Bidirectional(keras.layers.LSTM(3), name="both")
    return keras.Sequential([keras.Input((5, 2)), wrapped])


def paths(model):
    return [path for path, _ in layers.walk(model)]


def test_walk_descends_and_yields_shared_layers_once():
    found = paths(nested_and_shared())
    assert "inner/bn" in found and "head" in found
    assert sum(path.split("/")[-1] == "shared" for path in found) == 1
    assert len(found) == len(set(found))


def test_walk_descends_into_wrappers_and_subclassed_models():
    assert "both/forward_lstm/lstm_cell" in paths(recurrent())
    model = Subclassed()
    model(np.zeros((1, 4)))
    assert {"first", "block", "block/inner"} <= set(paths(model))


@pytest.mark.parametrize(
    "name", ["MobileNetV2", pytest.param("DenseNet121", marks=pytest.mark.full)]
)
def test_walk_meets_every_weight_of_real_models(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3))
    owned = {id(w) for _, layer in layers.walk(model) for w in layer.weights}
    assert owned == {id(w) for w in model.weights}


def test_calls_can_be_executed_in_order():
    model = nested_and_shared()
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    values = {id(model.inputs[0]): x}
    for call in layers.calls(model):
        if isinstance(call.layer, keras.layers.InputLayer):
            continue
        result = call.layer(*[values[id(t)] for t in call.inputs])
        values[id(call.outputs[0])] = result
    np.testing.assert_allclose(values[id(model.outputs[0])], model(x), rtol=1e-6)


def test_calls_rejects_a_subclassed_model():
    with pytest.raises(ValueError, match=r"'subclassed' \(Subclassed\) is subclassed"):
        layers.calls(Subclassed())


def test_require_model_names_the_verb_and_the_way_out():
    with pytest.raises(ValueError, match="prune expects a keras.Model, received int"):
        layers.require_model(3, "prune")
    unbuilt = keras.Sequential([keras.layers.Dense(1)], name="empty")
    with pytest.raises(ValueError, match=r"prune needs the weights of model 'empty'.*build"):
        layers.require_model(unbuilt, "prune")


def test_require_model_points_legacy_models_to_interop():
    legacy = type("Legacy", (), {"__module__": "tf_keras.src.engine.training"})()
    with pytest.raises(ValueError, match=r"accel_tf\.interop\.tfmot\.from_tf_keras"):
        layers.require_model(legacy, "prune")


@pytest.mark.parametrize("make", [nested_and_shared, recurrent])
def test_rebuild_copies_weights_and_shares_nothing(make):
    model = make()
    copy = layers.rebuild(model, lambda path, layer: None)
    x = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:])).astype("float32")
    np.testing.assert_array_equal(model(x), copy(x))
    assert not {id(w) for w in model.weights} & {id(w) for w in copy.weights}
    assert len(copy.weights) == len(model.weights)  # what was shared is shared again
    assert type(copy) is type(model) and copy.name == model.name


def test_rebuild_replaces_a_shared_layer_once():
    asked = []

    def replace(path, layer):
        asked.append(path)
        if layer.name == "shared":
            return keras.layers.Dense(4, activation="tanh", name="shared")
        return None

    copy = layers.rebuild(nested_and_shared(), replace)
    new = [layer for _, layer in layers.walk(copy) if layer.name == "shared"]
    assert len(new) == 1 and new[0].activation is keras.activations.tanh
    assert len(asked) == len(set(asked))


def test_rebuild_keeps_what_is_frozen():
    model = nested_and_shared()
    model.get_layer("head").trainable = False
    copy = layers.rebuild(model, lambda path, layer: None)
    assert not copy.get_layer("head").trainable
    assert len(copy.trainable_weights) == len(model.trainable_weights)


def test_rebuild_names_a_nested_subclassed_model():
    x = keras.Input((4,))
    model = keras.Model(x, Subclassed()(x))
    with pytest.raises(ValueError, match=r"'subclassed' \(Subclassed\) cannot be copied"):
        layers.rebuild(model, lambda path, layer: None)


def test_calls_come_in_order_and_once_for_each_use_of_a_layer():
    x = keras.Input((4,), name="x")
    shared = keras.layers.Dense(4, name="shared")
    model = keras.Model(x, shared(shared(x)))
    calls = layers.calls(model)
    assert [call.layer.name for call in calls] == ["x", "shared", "shared"]
    assert calls[2].inputs[0] is calls[1].outputs[0]
    sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="d")])
    assert [call.layer.name for call in layers.calls(sequential)][1:] == ["d"]


def test_rebuild_can_put_a_layer_behind_each_input():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="inner")
    model = keras.Model({"a": a, "b": b}, [inner(a), keras.layers.Add()([inner(a), inner(b)])])

    def double(i):
        return keras.layers.Rescaling(2.0, name="double") if i == 0 else None

    new = layers.rebuild(model, lambda path, layer: None, double)
    data = {"a": np.ones((1, 3)), "b": np.full((1, 3), 5.0)}
    expected = model({"a": 2 * data["a"], "b": data["b"]})
    for ours, theirs in zip(new(data), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    sequential = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    new = layers.rebuild(sequential, lambda path, layer: None, double)
    assert isinstance(new, keras.Sequential)
    np.testing.assert_allclose(new(data["a"]), sequential(2 * data["a"]), rtol=1e-6)


def test_rebuild_leaves_compilation_to_the_caller():
    model = nested_and_shared()
    model.compile("sgd", lambda y, p: p)
    new = layers.rebuild(model, lambda path, layer: None)
    assert model.compiled and not new.compiled


def test_rebuild_can_change_the_shapes_of_nested_inputs():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.ReLU()], name="inner")
    t = keras.Input((4,))
    graph = keras.Model(t, keras.layers.ReLU()(t), name="graph")
    x = keras.Input((3,))
    model = keras.Model(x, graph(inner(keras.layers.Dense(4, name="wide")(x))))

    def replace(path, layer):
        return keras.layers.Dense(2, name="wide") if layer.name == "wide" else None

    def input_shape(tensor):
        return (None, 2) if tensor.shape[-1] == 4 else tensor.shape

    new = layers.rebuild(model, replace, input_shape=input_shape)
    assert new.output_shape == (None, 2)
    assert new.get_layer("inner").input_shape == new.get_layer("graph").input_shape == (None, 2)
    assert isinstance(new.get_layer("inner"), keras.Sequential)


def test_an_operator_is_a_layer_that_keeps_its_constants(tmp_path):
    x, y = keras.Input((4,)), keras.Input((4,))
    z = keras.ops.concatenate([x, y * np.array([1.0, 2.0, 3.0, 4.0], "float32")], axis=-1)
    model = keras.Model([x, y], z[:, 1:7])

    def replace(site, path, operation):
        return None if isinstance(operation, keras.Layer) else layers.Operator.of(operation)

    rebuilt = layers.rebuild_calls(model, replace)
    assert {type(c.layer) for c in layers.calls(rebuilt)} == {
        keras.layers.InputLayer,
        layers.Operator,
    }
    data = [np.random.normal(size=(3, 4)).astype("float32") for _ in range(2)]
    np.testing.assert_array_equal(rebuilt(data), model(data))
    rebuilt.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(data), model(data))
    assert loaded.output_shape == (None, 6)
