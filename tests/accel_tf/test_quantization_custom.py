"""What users write themselves: layers with weights of their own, activations, text models of blocks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at

L, ops = keras.layers, keras.ops
keep = keras.saving.register_keras_serializable(package="tests")


@keep
def gelu_of_bert(x):
    return keras.activations.gelu(x, approximate=True)


@keep
class Affine(L.Layer):
    """A learned scale, kept as a logarithm, and an offset; stochastic depth in training."""

    def build(self, shape):
        self.log = self.add_weight(shape=shape[-1:], initializer="normal", name="log")
        self.offset = self.add_weight(shape=shape[-1:], initializer="normal", name="offset")

    def call(self, x):
        return x * ops.exp(self.log) + self.offset


@keep
class DropPath(L.Layer):
    """As stochastic depth is often written."""

    def call(self, x, training=None):
        if not training:
            return x
        return x * ops.cast(keras.random.uniform((ops.shape(x)[0], 1, 1)) < 0.5, x.dtype)


@keep
class Encoder(L.Layer):
    """An encoder block that is given a mask of padding, as those of keras_hub are."""

    def __init__(self, name=None, **options):
        super().__init__(name=name, **options)
        self.attention = L.MultiHeadAttention(2, 8, name="attention")
        self.affine, self.drop = Affine(name="affine"), DropPath(name="drop")
        self.wide = L.Dense(32, activation=gelu_of_bert, name="wide")
        self.narrow, self.norm = L.Dense(16, name="narrow"), L.LayerNormalization(name="norm")

    def call(self, x, padding=None, training=None):
        mask = None if padding is None else ops.cast(padding, "bool")[:, None, :]
        y = self.attention(x, x, attention_mask=mask, training=training)
        y = self.norm(x + self.drop(self.affine(y), training=training))
        return y + self.narrow(self.wide(y))


def classifier():
    """A backbone with a dictionary of inputs, nested in a model with another."""
    tokens = keras.Input((10,), dtype="int32", name="tokens")
    padding = keras.Input((10,), dtype="int32", name="padding")
    x = L.ReversibleEmbedding(40, 16, name="table")(tokens)
    x = Encoder(name="second")(Encoder(name="first")(x, padding=padding), padding=padding)
    backbone = keras.Model({"tokens": tokens, "padding": padding}, x, name="backbone")
    again = {name: keras.Input((10,), dtype="int32", name=name) for name in ("tokens", "padding")}
    return keras.Model(again, L.Dense(3, name="head")(backbone(again)[:, 0]))


def texts(n=32):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (n, 10)).astype("int32")
    padding = (np.arange(10) < rng.integers(4, 11, (n, 1))).astype("int32")
    return {"tokens": tokens, "padding": padding}


def test_a_text_model_of_custom_blocks_is_int8_and_trains_all_its_weights(tmp_path):
    keras.utils.set_random_seed(0)
    model, x = classifier(), texts()
    quantized = at.quantize_aware(model)
    assert len(quantized.trainable_variables) == len(model.trainable_variables)
    notes = dict(at.report_of(quantized).skipped)
    assert "a weight" in notes["backbone/first/affine/log"]
    assert notes["backbone/first/drop"] == "nothing to compute in inference"
    quantized.compile("adam", "mse")
    before = quantized.get_weights()
    quantized.fit(x, np.ones((32, 3)), epochs=2, verbose=0)
    trained = [
        v.path for v, b in zip(quantized.weights, before, strict=True) if (v != b).numpy().any()
    ]
    # The bias of keys changes no attention.
    rest = {v.path for v in quantized.trainable_variables} - set(trained)
    assert all("key/bias" in path for path in rest)

    path = tmp_path / "model.keras"
    quantized.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded(x), quantized(x))
    found = at.export.litert(loaded, tmp_path / "model.tflite")
    assert {op.why for op in found.operators if op.kind == "float"} == {
        "LiteRT has no int8 kernel for layer normalization",
        "between integers and floats",
    }
    assert at.export.verify(loaded, tmp_path / "model.tflite", x).sqnr > 30  # Softmax is not exact.


def test_a_weight_is_on_the_grid_of_its_own_values(tmp_path):
    x = keras.Input((6,))
    model = keras.Model(x, L.Dense(3)(Affine(name="affine")(L.Dense(5)(x))))
    quantized = at.quantize_aware(model)
    quantized.compile(keras.optimizers.SGD(0.1), "mse")
    data = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    quantized.fit(data, np.full((64, 3), 3.0), batch_size=16, epochs=4, verbose=0)
    offset = dict(at.layers.walk(quantized))["affine/offset"].weight
    assert np.ptp(offset.numpy()) > 0.5  # It went a long way, and its range with it.
    found = at.export.litert(quantized, tmp_path / "model.tflite")
    assert not [op for op in found.operators if op.kind == "float"]
    assert at.export.verify(quantized, tmp_path / "model.tflite", data).sqnr > 100


def test_what_a_layer_does_in_training_alone_it_still_does():
    x = keras.Input((4, 2))
    model = keras.Model(x, L.Dense(2)(DropPath(name="path")(x)))
    quantized, data = at.quantize_aware(model), np.ones((64, 4, 2), "float32")
    np.testing.assert_allclose(np.ptp(quantized(data), axis=0), 0)
    assert np.ptp(quantized(data, training=True), axis=0).max() > 0


OWN_ACTIVATIONS = {
    "gelu_approximate": [gelu_of_bert, lambda x: ops.gelu(x)],
    "gelu": [tf.nn.gelu, lambda x: keras.activations.gelu(x)],
    "relu": [tf.nn.relu, ops.relu, lambda x: ops.relu(x)],
    "silu": [tf.nn.silu, tf.nn.swish, ops.swish],
    "softmax": [tf.nn.softmax, ops.softmax],
}


@pytest.mark.parametrize(
    ("name", "function"), [(n, f) for n, functions in OWN_ACTIVATIONS.items() for f in functions]
)
def test_an_activation_goes_by_what_it_computes(name, function, tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, activation=function), L.Dense(3)])
    named = gelu_of_bert if name == "gelu_approximate" else name
    same = keras.Sequential([keras.Input((6,)), L.Dense(8, activation=named), L.Dense(3)])
    same.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    quantized, expected = (at.calibrate(m, x, verbose=0) for m in (model, same))
    np.testing.assert_array_equal(quantized(x), expected(x))
    quantized.save(tmp_path / "model.keras")  # without the function, which may be a lambda
    loaded = keras.models.load_model(tmp_path / "model.keras")
    found = at.export.litert(loaded, tmp_path / "model.tflite")
    assert not [op for op in found.operators if op.kind == "float"]
    np.testing.assert_array_equal(at.export.run_litert(tmp_path / "model.tflite", x), quantized(x))


def test_an_activation_does_not_go_by_its_name():
    def relu(x):
        return ops.relu(x) - 0.1

    def softmax(x):
        return ops.softmax(x, axis=0)

    for function in (relu, softmax):
        model = keras.Sequential([keras.Input((4,)), L.Dense(3, activation=function, name="own")])
        with pytest.raises(ValueError, match=rf"'own'.*its activation '.*{function.__name__} of"):
            at.quantize_aware(model)


def test_what_users_write_without_an_integer_form_says_so(tmp_path):
    x = keras.Input((6,), dtype="int32")
    table = L.ReversibleEmbedding(20, 8, name="table")
    both = keras.Model(x, table(table(x), reverse=True))
    with pytest.raises(ValueError, match="'table'.*it is called in reverse"):
        at.quantize_aware(both)

    class Spectrum(L.Layer):
        def call(self, x):
            return tf.math.real(tf.signal.fft2d(tf.cast(x, tf.complex64)))

    model = keras.Sequential([keras.Input((8, 8)), Spectrum(name="spectrum"), L.Dense(3)])
    with pytest.raises(ValueError, match="'spectrum'.*a layer of your own can be made of those"):
        at.quantize_aware(model)
    quantized = at.calibrate(model, np.ones((4, 8, 8)), exclude=["spectrum"], verbose=0)
    with pytest.raises(ValueError, match=r"LiteRT has no operator for .*FFT"):
        at.export.litert(quantized, tmp_path / "model.tflite", allow_float=True)


def embedded(name=None):
    """Tokens, and their embedding with a mask."""
    ids = keras.Input((6,), dtype="int32", name=name)
    return ids, L.Embedding(20, 8, keras.initializers.RandomNormal(stddev=1.0), mask_zero=True)(ids)


def padded(n=32):
    x = np.random.default_rng(0).integers(1, 20, (n, 6))
    x[:, 4:] = 0
    return x


@keep
class MaskedBlock(L.Layer):
    """Keras hands the mask to the attention, and sets it on the output again."""

    def __init__(self, **options):
        super().__init__(**options)
        self.attention, self.supports_masking = L.MultiHeadAttention(2, 4), True

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return x + self.attention(x, x)


def two_blocks():
    keras.utils.set_random_seed(0)
    ids, x = embedded()
    y = L.GlobalAveragePooling1D()(MaskedBlock()(MaskedBlock()(x)))
    return keras.Model(ids, L.Dense(2)(y)), padded()


def attended(layer):
    keras.utils.set_random_seed(0)
    (first, query), (second, value) = embedded("first"), embedded("second")
    model = keras.Model([first, second], L.Dense(3)(layer()([query, value])))
    return model, [padded(), padded()[::-1].copy()]


@pytest.mark.parametrize(
    "make",
    [two_blocks, lambda: attended(L.Attention), lambda: attended(L.AdditiveAttention)],
    ids=["blocks", "attention", "additive"],
)
def test_masks_of_custom_layers_and_attention_are_kept(make, tmp_path):
    model, x = make()
    expected = np.asarray(model(x))
    for scheme, floor in ((at.Int8(), 30), (at.Int8Weights(), 35)):
        data = x if scheme.activation_bits else None
        quantized = at.calibrate(model, data, scheme, verbose=0)
        found = np.asarray(quantized(x))
        assert at.layers.sqnr(expected, found) > floor
        file = tmp_path / f"{type(scheme).__name__}.tflite"
        at.export.litert(quantized, file, allow_float=True)
        given = dict(zip(("first", "second"), x, strict=True)) if isinstance(x, list) else x
        assert at.layers.sqnr(found, at.export.run_litert(file, given)) > 40
        if found.ndim == 3:  # The outputs for padded queries are the bias.
            np.testing.assert_allclose(found[:, 4:], expected[:, 4:], atol=0.02)


@keep
class Patches(L.Layer):
    def call(self, x):
        return ops.reshape(x, (ops.shape(x)[0], 4, 16))


@keep
class PatchEncoder(L.Layer):
    """As in the examples of keras.io, with a token for the class."""

    def __init__(self, **options):
        super().__init__(**options)
        self.projection, self.positions = L.Dense(8), L.Embedding(4, 8)

    def build(self, shape):
        self.projection.build(shape)
        self.token = self.add_weight(shape=(1, 1, 8), initializer="normal", name="token")

    def call(self, x):
        positions = ops.expand_dims(ops.arange(0, 4, 1), axis=0)
        y = self.projection(x) + self.positions(positions)
        return ops.concatenate([ops.broadcast_to(self.token, (ops.shape(x)[0], 1, 8)), y], 1)


def test_patches_of_an_image_are_quantized(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8))
    model = keras.Model(x, L.Dense(3)(L.Flatten()(PatchEncoder()(Patches()(x)))))
    data = np.random.default_rng(0).normal(size=(32, 8, 8)).astype("float32")
    quantized = at.calibrate(model, data, verbose=0)
    assert at.layers.sqnr(np.asarray(model(data)), np.asarray(quantized(data))) > 30
    at.export.litert(quantized, tmp_path / "model.tflite", allow_float=True)
    assert at.export.verify(quantized, tmp_path / "model.tflite", data).sqnr > 40


def test_a_layer_that_cannot_be_taken_apart_says_why():
    class Zeros(L.Layer):
        def call(self, x):
            return x + ops.zeros((ops.shape(x)[0], 4))

    model = keras.Sequential([keras.Input((4,)), Zeros(name="zeros"), L.Dense(2)])
    with pytest.raises(ValueError, match=r"'zeros'.*it raises ValueError: .*None.*ops.reshape"):
        at.quantize_aware(model)
