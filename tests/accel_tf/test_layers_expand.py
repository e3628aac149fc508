"""accel_tf.layers: custom layers and subclassed models become graphs, with the weights they have."""

import keras
import numpy as np
import pytest

from accel_tf import layers

L, ops = keras.layers, keras.ops


def expand(model):
    """Expands all layers that are not Keras's."""

    def graph_of(path, layer):
        return None if type(layer).__module__.startswith("keras.") else layer.call

    return layers.expand(model, graph_of)


def around(*below, shape=(4,)):
    """A functional model of some layers, one behind the other."""
    x = y = keras.Input(shape)
    for layer in below:
        y = layer(y)
    return keras.Model(x, y)


def data(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


class Scaled(L.Layer):
    """A layer of layers and operators, and with weights of its own if that is asked for."""

    def __init__(self, own=False, **options):
        super().__init__(**options)
        self.own, self.dense = own, L.Dense(4, name="dense")

    def build(self, shape):
        self.dense.build(shape)
        if self.own:
            self.log = self.add_weight(
                shape=(4,), initializer="normal", name="log", regularizer="l2"
            )
            self.mean = self.add_weight(
                shape=(4,), initializer="normal", name="mean", trainable=False
            )

    def call(self, x, training=None):
        y = self.dense(ops.relu(x)) * 2.0
        return (y - self.mean) * ops.exp(self.log) if self.own else y


class Noise(L.Layer):
    """As stochastic depth and noise are written: nothing in inference."""

    def call(self, x, training=None):
        return x + keras.random.normal(ops.shape(x)) if training else x


class NoiseAndMore(Noise):
    def call(self, x, training=True):
        return ops.relu(super().call(x, training))


class Tied(L.Layer):
    """Computes with what belongs to a sublayer: its kernel, or that transposed before any call."""

    def __init__(self, transposed, **options):
        super().__init__(**options)
        self.transposed, self.dense = transposed, L.Dense(4, use_bias=False)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        kernel = self.dense.kernel
        return ops.matmul(self.dense(x), ops.transpose(kernel) if self.transposed else kernel)


class Alias(Tied):
    """Calls a sublayer's kernel its own."""

    def build(self, shape):
        super().build(shape)
        self.kernel = self.dense.kernel

    def call(self, x):
        return ops.matmul(self.dense(x), self.kernel)


class Counting(L.Layer):
    def build(self, shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.hidden = [self.add_weight(shape=(), initializer="ones", name="one")]

    def call(self, x):
        self.count.assign_add(1.0)
        return x * self.hidden[0]


class Sizes(L.Layer):
    """Is told the size of what it gets, which may be unknown while it is traced."""

    def call(self, x):
        return ops.reshape(x, (-1, *ops.shape(x)[1:], 1))


class Numbers(L.Layer):
    def call(self, x):
        return ops.convert_to_tensor(np.asarray(x)) if len(x) else x

    def compute_output_shape(self, shape):
        return shape


def test_a_layer_of_layers_is_expanded_in_place():
    layer = Scaled(name="scaled")
    inner = keras.Sequential([keras.Input((4,)), Scaled(name="below")], name="inner")
    model = around(layer, layer, inner)
    expanded = expand(model)
    x = data(3, 4)
    np.testing.assert_array_equal(expanded(x), model(x))
    paths = [path for path, _ in layers.walk(expanded)]
    assert {"scaled/dense", "inner/below/dense"} <= set(paths)
    assert {id(v) for v in expanded.variables} == {id(v) for v in model.variables}
    assert layers.expand(model, lambda path, layer: None) is model


def test_own_weights_stay_weights(tmp_path):
    model, x = around(Scaled(own=True, name="scaled"), L.Dense(2)), data(3, 4)
    expanded = expand(model)
    assert "scaled/log" in dict(layers.walk(expanded))
    np.testing.assert_allclose(expanded(x), model(x), rtol=1e-6)
    assert {id(v) for v in expanded.variables} == {id(v) for v in model.variables}
    assert isinstance(model.layers[1].log, keras.Variable)

    copy = layers.rebuild(expanded, lambda path, layer: None)
    np.testing.assert_allclose(copy(x), model(x), rtol=1e-6)
    assert len(copy.trainable_variables) == len(model.trainable_variables) == 5
    assert len(copy.non_trainable_variables) == 1
    np.testing.assert_allclose(copy.losses, model.losses, rtol=1e-6)
    copy.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), copy(x))
    loaded.compile("sgd", "mse")
    log = dict(layers.walk(loaded))["scaled/log"].weight
    before = log.numpy()
    loaded.fit(x, data(3, 2), verbose=0)
    assert (log.numpy() != before).all()


@pytest.mark.parametrize(
    "layer",
    [Numbers(), Noise(), NoiseAndMore(), Tied(True), Tied(False), Alias(False), Counting()],
    ids=lambda layer: layer.name,
)
def test_what_has_no_graph_is_not_expanded(layer):
    model = around(layer)
    assert expand(model) is model
    assert layers.passes_on(layer) == (type(layer) is Noise)
    assert not [v for v in vars(layer).values() if isinstance(v, keras.KerasTensor)]


@pytest.mark.parametrize("length", [3, None])
def test_a_size_that_is_not_known_makes_no_graph(length):
    model = around(Sizes(), shape=(length, 4))
    assert (expand(model) is model) == (length is None)
    np.testing.assert_array_equal(expand(model)(data(2, 3, 4)), model(data(2, 3, 4)))


class Cross(L.Layer):
    """Attends to something, and to something else if there is any."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense = L.Dense(4, name="dense")

    def call(self, x, context, more=None):
        y = self.dense(x - context)
        return y if more is None else y + more


def test_a_layer_may_be_called_with_one_tensor_twice():
    a, b, cross = keras.Input((4,)), keras.Input((4,)), Cross(name="cross")
    model, x = keras.Model([a, b], cross(b, cross(a, a))), [data(2, 4), np.ones((2, 4), "float32")]
    expanded = expand(model)
    assert "cross/dense" in dict(layers.walk(expanded)) and expanded is not model
    np.testing.assert_array_equal(expanded(x), model(x))
    differently = keras.Model([a, b], cross(b, a, more=b))
    assert expand(differently) is differently


class Stages(L.Layer):
    """Returns its input among its outputs, as backbones do that return all stages."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense = L.Dense(4)

    def call(self, x):
        return x, self.dense(x)


def test_an_output_may_be_the_input():
    model, x = around(Stages(name="stages"), L.Add()), data(2, 4)
    expanded = expand(model)
    assert "stages/dense" in {path.rpartition("_")[0] or path for path, _ in layers.walk(expanded)}
    np.testing.assert_array_equal(expanded(x), model(x))


def test_a_nested_model_keeps_the_names_of_its_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner = keras.Model({"b": b, "a": a}, Scaled(name="scaled")(a) - b, name="inner")
    c, d = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([c, d], inner({"b": d, "a": c}))
    expanded, x = expand(model), [data(2, 4), np.ones((2, 4), "float32")]
    assert "inner/scaled/dense" in dict(layers.walk(expanded))
    np.testing.assert_array_equal(expanded(x), model(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.first = L.Dense(3, name="first")
        self.block = keras.Sequential([L.Dense(2, name="inner")], name="block")
        self.scale = self.add_weight(shape=(2,), initializer="normal", name="scale")

    def call(self, x):
        return self.block(self.first(x)) * self.scale


def test_a_subclassed_model_has_a_functional_form_that_shares_its_weights():
    model, x = Subclassed(), data(5, 4)
    expected = model(x)
    functional = layers.functional(model, x)
    np.testing.assert_array_equal(functional(x), expected)
    assert {id(v) for v in functional.variables} == {id(v) for v in model.variables}

    class Numbers(keras.Model):
        def call(self, x):
            return x if float(x[0, 0]) > 0 else -x

    with pytest.raises(ValueError, match=r"\(Numbers\) has no graph: its call uses more"):
        layers.functional(Numbers(), x)

    class InAList(keras.Model):
        def __init__(self):
            super().__init__()
            self.scales = [self.add_weight(shape=(4,), name="scale")]

        def call(self, x):
            return x * self.scales[0]

    with pytest.raises(ValueError, match=r"\(InAList\) has no graph.*uses .*scale as it is"):
        layers.functional(InAList(), x)


def test_a_layer_whose_configuration_does_not_make_it_is_named():
    class Forgetful(L.Layer):
        def __init__(self, units, **options):
            super().__init__(**options)
            self.units = units

        def get_config(self):
            return {"name": self.name}

        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"'forgetful' \(Forgetful\) cannot be copied.*get_config"):
        layers.rebuild(around(Forgetful(3, name="forgetful")), lambda path, layer: None)
