"""accel_tf.layers: a custom layer that is taken apart keeps its masks, its constants and the batch."""

import keras
import numpy as np
import pytest

from accel_tf import layers

L, ops = keras.layers, keras.ops


def expand(model):
    """Expands all layers that are not Keras's, and requires that there are such."""

    def graph_of(path, layer):
        return None if type(layer).__module__.startswith("keras.") else layer.call

    expanded = layers.expand(model, graph_of)
    assert expanded is not model
    return expanded


def table():
    return L.Embedding(20, 8, keras.initializers.RandomNormal(stddev=1.0), mask_zero=True)


def tokens():
    x = np.random.default_rng(0).integers(1, 20, (8, 6))
    x[::2, 3:] = 0
    return x


def text_model(*below):
    """A model of tokens, whose last layer is a mean over the mask that reaches it."""
    ids = keras.Input((6,), dtype="int32")
    x = ids
    for layer in below:
        x = layer(x)
    return keras.Model(ids, L.GlobalAveragePooling1D()(x))


class Block(L.Layer):
    """Keras hands the mask of `x` to the attention, and sets it on the output again."""

    def __init__(self, **options):
        super().__init__(**options)
        self.attention, self.supports_masking = L.MultiHeadAttention(2, 4), True

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return x + self.attention(x, x)


class Explicit(Block):
    """Computes with the mask itself."""

    def call(self, x, mask=None):
        if mask is None:
            return x
        return x + self.attention(x, x, attention_mask=mask[:, None, :]) * mask.shape[1]


class Drops(Block):
    """Has no mask on its output, as that is a sum of two tensors."""

    def __init__(self, **options):
        super().__init__(**options)
        self.supports_masking = False


class Shorter(Block):
    """Has a mask of its own: that of its input, shifted."""

    def call(self, x):
        return super().call(x)[:, 1:]

    def compute_mask(self, x, mask=None):
        return None if mask is None else mask[:, 1:]


class TokensAndPositions(L.Layer):
    """As in the examples of keras.io."""

    def __init__(self, **options):
        super().__init__(**options)
        self.tokens, self.positions = table(), L.Embedding(6, 8)
        self.supports_masking = True

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(0, ops.shape(x)[-1], 1))

    def compute_mask(self, x, mask=None):
        return self.tokens.compute_mask(x)


class TwoOutputs(Block):
    """Returns a tensor that a layer inside reads when it has no mask yet."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pool = L.GlobalAveragePooling1D()

    def call(self, x):
        y = x + 1.0
        return y, self.pool(y)


@pytest.mark.parametrize(
    "below",
    [
        (table, Block, Block),
        (table, Explicit, Explicit),
        (table, Shorter, Block),
        (TokensAndPositions, Block, Explicit),
    ],
    ids=["implicit", "explicit", "own_mask", "positions"],
)
def test_each_layer_gets_the_mask_that_it_had(below, tmp_path):
    model, x = text_model(*(make() for make in below)), tokens()
    expanded = expand(model)
    np.testing.assert_allclose(expanded(x), model(x), rtol=1e-5, atol=1e-6)
    copy = layers.rebuild(expanded, lambda path, layer: None)
    copy.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_mask_ends_where_it_ended():
    with pytest.warns(UserWarning, match="does not support masking"):
        model = text_model(table(), Drops())
    expanded, x = expand(model), tokens()
    with pytest.warns(UserWarning, match="does not support masking"):
        expected = model(x)
    np.testing.assert_allclose(expanded(x), expected, rtol=1e-5, atol=1e-6)


def test_a_mask_from_inside_of_a_nested_model_passes():
    ids = keras.Input((6,), dtype="int32")
    inner = keras.Model(ids, table()(ids))
    model, x = text_model(inner, Block()), tokens()
    np.testing.assert_allclose(expand(model)(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_output_has_its_mask_only_outside():
    ids = keras.Input((6,), dtype="int32")
    y, pooled = TwoOutputs()(table()(ids))
    model, x = keras.Model(ids, [L.GlobalAveragePooling1D()(y), pooled]), tokens()
    for found, expected in zip(expand(model)(x), model(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Sized(L.Layer):
    """Reshapes and repeats with the size of the batch."""

    def __init__(self, how, **options):
        super().__init__(**options)
        self.how = how

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, 4), initializer="normal", name="token")

    def call(self, x):
        batch = ops.shape(x)[0]
        if self.how == "reshape":
            return ops.reshape(x, (batch, 2, 8)) * 1.0
        if self.how == "reshape with -1":
            return ops.reshape(x, (batch, -1, 2, 2)) * 1.0
        if self.how == "broadcast":
            return ops.concatenate([ops.broadcast_to(self.token, (batch, 3, 4)), x], 1)
        if self.how == "tile":
            return ops.concatenate([ops.tile(self.token, [batch, 1, 1]), x], 1)
        return x + ops.zeros((batch, 1, 4))


def sized_model(how):
    x = keras.Input((4, 4))
    return keras.Model(x, Sized(how, name="sized")(x))


@pytest.mark.parametrize("how", ["reshape", "reshape with -1", "broadcast"])
def test_a_graph_finds_the_size_of_the_batch(how):
    model = sized_model(how)
    x = np.random.default_rng(0).normal(size=(3, 4, 4)).astype("float32")
    copy = layers.rebuild(expand(model), lambda path, layer: None)
    np.testing.assert_allclose(copy(x), model(x), rtol=1e-6)


@pytest.mark.parametrize(("how", "error"), [("tile", "TypeError"), ("zeros", "ValueError")])
def test_what_cannot_be_told_says_why(how, error):
    layer = sized_model(how).layers[1]
    reason = layers.why_kept(layer, layer.call)
    assert f"it raises {error}: " in reason and "write -1 for it in ops.reshape" in reason
