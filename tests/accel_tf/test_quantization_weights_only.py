"""Weight-only schemes take any model: layers that accel_tf does not know run with rounded kernels."""

import keras
import numpy as np
import pytest

import accel_tf as at
from accel_tf.layers import sqnr
from accel_tf.quantization import fake_quantize_weights
from accel_tf.quantization._weight_only import WeightOnlyLayer

L, ops = keras.layers, keras.ops
SCHEMES = [at.Int8Weights(), at.Int4Weights(), at.Float16()]


def wrapped(model):
    return {
        path: layer for path, layer in at.layers.walk(model) if isinstance(layer, WeightOnlyLayer)
    }


@keras.saving.register_keras_serializable("weights_only")
class Positions(L.Layer):
    """As KerasHub's PositionEmbedding: a slice of its table, of a length known when it runs."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length, self.supports_masking = length, True

    def build(self, shape):
        self.table = self.add_weight((self.length, shape[-1]), name="embeddings")

    def call(self, x, start_index=0):
        shape = ops.shape(x)
        table = ops.slice(self.table, (start_index, 0), (shape[-2], shape[-1]))
        return ops.broadcast_to(table, shape)

    def get_config(self):
        return {**super().get_config(), "length": self.length}


@keras.saving.register_keras_serializable("weights_only")
class Decoder(L.Layer):
    """A decoder block with a causal mask, a cache, and what an encoder returned, if there is one."""

    def __init__(self, width, heads, **kwargs):
        super().__init__(**kwargs)
        self.width, self.heads, self.supports_masking = width, heads, True
        self.query, self.key, self.value = (
            L.EinsumDense("abc,cde->abde", (None, heads, width // heads), bias_axes="de", name=name)
            for name in ("query", "key", "value")
        )
        self.merge = L.EinsumDense("abde,dec->abc", (None, width), bias_axes="c", name="merge")
        self.cross = L.MultiHeadAttention(heads, width // heads, name="cross")
        self.norm = L.LayerNormalization(name="norm")
        self.ffn = L.Dense(2 * width, "gelu", name="ffn")
        self.back = L.Dense(width, name="back")

    def build(self, x_shape, encoder_shape=None):
        shape = x_shape
        for layer in (self.query, self.key, self.value, self.norm, self.ffn):
            layer.build(shape)
        self.merge.build((*shape[:2], self.heads, self.width // self.heads))
        self.back.build((*shape[:2], 2 * self.width))
        if encoder_shape is not None:
            self.cross.build(shape, encoder_shape)

    def call(self, x, encoder=None, padding_mask=None, cache=None, return_cache=False):
        n = ops.shape(x)[1]
        key, value = self.key(x), self.value(x)
        if cache is not None:
            key, value = (ops.concatenate(p, 1) for p in zip(cache, (key, value), strict=True))
        m = ops.shape(key)[1]
        allowed = ops.arange(m)[None] <= ops.arange(n)[:, None] + (m - n)
        if padding_mask is not None:
            allowed = ops.logical_and(allowed, ops.cast(padding_mask, "bool")[:, None, None, :])
        scores = ops.einsum("bqhd,bkhd->bhqk", self.query(x), key) / 4
        scores = ops.softmax(ops.where(allowed, scores, -1e9))
        x += self.merge(ops.einsum("bhqk,bkhd->bqhd", scores, value))
        if encoder is not None:
            x += self.cross(x, encoder)
        x += self.back(self.ffn(self.norm(x)))
        return (x, (key, value)) if return_cache else x

    def get_config(self):
        return {**super().get_config(), "width": self.width, "heads": self.heads}


class Patches(L.Layer):
    """Patch embedding with a class token. As in KerasHub, its configuration has too many entries."""

    def __init__(self, patch, width, **kwargs):
        super().__init__(**kwargs)
        self.patch, self.width = patch, width
        self.embed = L.Conv2D(width, patch, patch, name="embed")

    def build(self, shape):
        self.embed.build(shape)
        self.count = (shape[1] // self.patch) * (shape[2] // self.patch)
        self.token = self.add_weight((1, 1, self.width), name="class_token")
        self.table = L.Embedding(self.count + 1, self.width, name="positions")
        self.table.build(())
        self.ids = self.add_weight((1, self.count + 1), dtype="int32", trainable=False, name="ids")
        self.ids.assign(np.arange(self.count + 1)[None])

    def call(self, x):
        y = ops.reshape(self.embed(x), (-1, self.count, self.width))
        token = ops.tile(self.token, (ops.shape(y)[0], 1, 1))
        return ops.concatenate([token, y], 1) + self.table(self.ids)

    def get_config(self):
        count = getattr(self, "count", None)
        return {**super().get_config(), "patch": self.patch, "width": self.width, "count": count}


def block(h):
    a = L.MultiHeadAttention(2, 16)(h, h)
    h = L.LayerNormalization()(h + a)
    return L.LayerNormalization()(h + L.Dense(32)(L.Dense(64, "gelu")(h)))


def bert():
    ids = keras.Input((None,), dtype="int32")
    h = L.Embedding(60, 32, mask_zero=True, name="tokens")(ids)
    h = block(L.LayerNormalization()(L.Add()([h, Positions(40, name="positions")(h)])))
    return keras.Model(ids, h), np.array([[3, 4, 5, 0, 0, 0], [7, 8, 9, 1, 2, 3]])


def gpt():
    ids = keras.Input((None,), dtype="int32", name="ids")
    padding = keras.Input((None,), dtype="int32", name="padding")
    table = L.ReversibleEmbedding(60, 32, name="tokens")
    h = table(ids)
    h = Decoder(32, 2, name="decoder")(h + Positions(40)(h), padding_mask=padding)
    data = {"ids": [[3, 4, 5, 6], [7, 8, 9, 1]], "padding": [[1, 1, 1, 0], [1, 1, 1, 1]]}
    data = {name: np.array(x, "int32") for name, x in data.items()}
    return keras.Model({"ids": ids, "padding": padding}, table(h, reverse=True)), data


def vit():
    image = keras.Input((16, 16, 3))
    h = block(Patches(4, 32, name="patches")(image))
    return keras.Model(image, L.Dense(60)(h[:, 0])), np.random.default_rng(0).normal(
        size=(2, 16, 16, 3)
    ).astype("float32")


def whisper():
    sound, ids = keras.Input((20, 8)), keras.Input((6,), dtype="int32")
    h = L.Conv1D(32, 3, 2, "same", activation="gelu")(L.Conv1D(32, 3, padding="same")(sound))
    encoded = block(h + Positions(10)(h))
    h = L.Embedding(60, 32)(ids)
    h = Decoder(32, 2, name="decoder")(h + Positions(6)(h), encoded)
    data = np.random.default_rng(0).normal(size=(2, 20, 8)).astype("float32")
    return keras.Model([sound, ids], h), [data, np.array([[3, 4, 5, 6, 7, 8]] * 2)]


@pytest.fixture(scope="module", params=[bert, gpt, vit, whisper], ids=lambda make: make.__name__)
def family(request, tmp_path_factory):
    keras.utils.set_random_seed(0)
    model, x = request.param()
    path = tmp_path_factory.mktemp("float") / "m.tflite"
    return model, x, at.export.litert(model, path, batch_size=2).size


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: type(s).__name__)
def test_files_of_transformers(family, scheme, tmp_path):
    model, x, size = family
    quantized = at.calibrate(model, None, scheme)
    assert "Checked without rounding" in at.report_of(quantized).note
    floor = {"Int8Weights": 33, "Int4Weights": 8, "Float16": 60}[type(scheme).__name__]
    y = quantized(x)
    assert floor < sqnr(np.asarray(model(x)), np.asarray(y)) < 100
    found = at.export.litert(quantized, tmp_path / "m.tflite", batch_size=2)
    # Graph and names have their size in models as small as these.
    kernels = sum(v.shape.num_elements() for v in model.weights if len(v.shape) > 1)
    saved = (size - found.size) / (4 * kernels)
    assert saved > {"Int8Weights": 0.55, "Int4Weights": 0.6, "Float16": 0.35}[type(scheme).__name__]
    assert not found.float_weights
    file = at.export.run_litert(tmp_path / "m.tflite", x)
    assert sqnr(np.asarray(y), np.asarray(file)) > (100 if scheme == at.Float16() else 30)


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = vit()
    quantized = at.calibrate(model, None, at.Int8Weights())
    sizes = [
        at.export.onnx(m, tmp_path / f"{i}.onnx", batch_size=2).stat().st_size
        for i, m in enumerate((model, quantized))
    ]
    session = onnxruntime.InferenceSession(tmp_path / "1.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    # onnxruntime may round the inputs of a product with an integer matrix.
    assert sqnr(np.asarray(quantized(x)), y) > 30 and sizes[1] < 0.5 * sizes[0]


@keras.saving.register_keras_serializable("weights_only")
class Parts(L.Layer):
    """Layers of several kinds, and a size that is known when they run, so that it has no graph."""

    def __init__(self, noise=0.0, **kwargs):
        super().__init__(**kwargs)
        self.noise = noise
        self.table = L.Embedding(7, 6, name="table")
        self.dense = L.Dense(6, "relu", kernel_regularizer="l2", name="dense")
        self.up = L.Conv2DTranspose(4, 3, padding="same", name="up")
        self.apart = L.SeparableConv2D(6, 3, padding="same", name="apart")
        self.norm = L.BatchNormalization(name="norm")
        self.drop = L.Dropout(0.5, name="drop")

    def build(self, shape):
        self.matrix = self.add_weight((6, 6), name="matrix")
        self.table.build(())
        self.dense.build((None, 6))
        self.up.build((None, 6, 6, 1))
        self.apart.build((None, 6, 6, 4))
        self.norm.build((None, 6, 6))

    def call(self, ids, training=None):
        ids = ops.convert_to_tensor(ids)
        h = self.dense(self.table(ids)) @ self.matrix
        h = self.drop(self.norm(h, training=training), training=training)
        if training:
            self.add_loss(ops.convert_to_tensor(1.0))
        return self.apart(self.up(ops.reshape(h, (ops.shape(h)[0], 6, 6, 1))))

    def get_config(self):
        return {**super().get_config(), "noise": self.noise}


def parts():
    ids = keras.Input((6,), dtype="int32")
    return keras.Model(ids, Parts(name="parts")(ids))


@pytest.mark.parametrize("scheme", [at.Int8Weights(), at.Int4Weights(5)], ids=["int8", "int4"])
def test_weights_are_rounded_as_in_known_layers(scheme):
    keras.utils.set_random_seed(0)
    model, x = parts(), np.arange(6)[None]
    layer = model.get_layer("parts")
    quantized = at.quantize_aware(model, scheme)
    by_hand = keras.models.clone_model(model)
    by_hand.set_weights(model.get_weights())
    axes = {
        "table/embeddings": () if scheme.group_size is None else (0,),
        "dense/kernel": (-1,),
        "up/kernel": (-2,),
        "apart/depthwise_kernel": (-2, -1),
        "apart/pointwise_kernel": (-1,),
        "parts/matrix": (-1,),
    }
    for v in by_hand.weights:
        found = [a for name, a in axes.items() if v.path.endswith(name)]
        if found:
            v.assign(
                fake_quantize_weights(v.value, scheme.weight_bits, found[0], scheme.group_size)
            )
    assert sqnr(np.asarray(by_hand(x)), np.asarray(quantized(x))) > 120
    assert sqnr(np.asarray(model(x)), np.asarray(quantized(x))) < 60
    (entry,) = [e for e in at.report_of(quantized).done if e.layer == "parts"]
    assert entry.note.startswith(f"weights int{scheme.weight_bits} per ")
    assert "float" not in entry.note
    assert layer.dense.kernel.shape == (6, 6)


def test_training_changes_weights_statistics_seeds_and_losses():
    keras.utils.set_random_seed(0)
    quantized = at.quantize_aware(parts(), at.Int8Weights())
    inner = wrapped(quantized)["parts"].layer
    before = [v.numpy() for v in inner.variables]
    quantized.compile("sgd", "mse")
    x = np.random.default_rng(0).integers(0, 7, (16, 6))
    history = quantized.fit(x, np.ones((16, 6, 6, 6)), batch_size=8, epochs=2, verbose=0)
    changed = [
        not np.array_equal(a, v.numpy()) for a, v in zip(before, inner.variables, strict=True)
    ]
    assert all(changed), [v.path for v, c in zip(inner.variables, changed, strict=True) if not c]
    assert history.history["loss"][0] > 1.0  # the loss that the layer adds
    assert quantized.losses[-1] > 0  # the regularizer of the kernel


def test_round_trip_keeps_what_is_excluded(tmp_path):
    keras.utils.set_random_seed(0)
    model, x = parts(), np.arange(6)[None]
    quantized = at.calibrate(model, None, at.Int8Weights(), exclude=["parts/dense"])
    assert wrapped(quantized)["parts"].exclude == ["dense"]
    assert "dense stays in float" in str(at.report_of(quantized))
    quantized.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(quantized(x), loaded(x))
    assert wrapped(loaded)["parts"].exclude == ["dense"]
    everything = at.calibrate(model, None, at.Int8Weights())
    assert sqnr(np.asarray(everything(x)), np.asarray(quantized(x))) < 80
    for scheme in (at.Int8Weights(), at.Float16()):
        quantized = at.calibrate(model, None, scheme, exclude=["parts/dense"])
        at.export.litert(quantized, tmp_path / "m.tflite")
        file = at.export.run_litert(tmp_path / "m.tflite", x.astype("int32"))
        assert sqnr(np.asarray(quantized(x)), file) > 30
    with pytest.raises(ValueError, match=r"'parts'.*'dense' in it .*'parts\*'"):
        at.calibrate(model, None, at.Mixed({"parts/dense": at.Float16()}, at.Int8Weights()))


def test_calls_with_several_arguments_and_outputs(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((5, 8))
    y, *state = L.LSTM(8, return_sequences=True, return_state=True, name="encoder")(x)
    y = L.LSTM(8, return_sequences=True, name="decoder")(y, initial_state=state)
    y, scores = L.MultiHeadAttention(2, 4, name="attention")(y, y, return_attention_scores=True)
    y = L.TimeDistributed(keras.Sequential([L.Dense(4), L.BatchNormalization()]), name="each")(y)
    y, cache = Decoder(4, 2, name="first")(y, return_cache=True)
    model = keras.Model(x, [Decoder(4, 2, name="second")(y, cache=cache), scores])
    quantized = at.calibrate(model, None, at.Int8Weights())
    assert {"encoder", "decoder", "attention", "first", "second"} <= wrapped(quantized).keys()
    data = np.random.default_rng(0).normal(size=(3, 5, 8)).astype("float32")
    for a, b in zip(model(data), quantized(data), strict=True):
        assert 25 < sqnr(np.asarray(a), np.asarray(b)) < 110
    quantized.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for a, b in zip(loaded(data), quantized(data), strict=True):
        np.testing.assert_array_equal(a, b)


@keras.saving.register_keras_serializable("weights_only")
class MaskedMean(L.Layer):
    """Reads the mask of its input, and hands on another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], 4), name="kernel")

    def call(self, x, mask=None):
        keep = ops.cast(mask, "float32")[..., None]
        keep = ops.reshape(keep, ops.shape(keep))  # a size that is known when it runs
        return (x * keep / ops.sum(keep, 1, keepdims=True)) @ self.kernel

    def compute_mask(self, inputs, mask=None):
        return ops.roll(mask, 1, axis=1)


def test_masks_are_read_and_handed_on():
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32")
    h = MaskedMean(name="mean")(L.Embedding(9, 8, mask_zero=True)(ids))
    model = keras.Model(ids, L.GlobalAveragePooling1D()(h))
    x = np.array([[3, 4, 0, 0], [5, 6, 7, 0]])
    quantized = at.calibrate(model, None, at.Int8Weights())
    assert 30 < sqnr(np.asarray(model(x)), np.asarray(quantized(x))) < 70


@keras.saving.register_keras_serializable("weights_only")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = L.Dense(8, name="dense")

    def call(self, x):
        return self.dense(x) + ops.zeros((ops.shape(x)[0], 1))  # which has no graph

    def get_config(self):
        return {"name": self.name}


def test_a_subclassed_model_within_a_model():
    x = keras.Input((8,))
    model = keras.Model(x, Subclassed(name="inside")(x))
    quantized = at.calibrate(model, None, at.Int8Weights())
    assert "inside" in wrapped(quantized)
    data = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    assert 30 < sqnr(np.asarray(model(data)), np.asarray(quantized(data))) < 70


@keras.saving.register_keras_serializable("weights_only")
class Folded(L.Layer):
    """Adds a constant to its kernel, which a converter does beforehand."""

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], 64), name="kernel")

    def call(self, x):
        shift = np.random.default_rng(0).normal(size=self.kernel.shape).astype("float32")
        n = ops.shape(x)[0]
        return ops.reshape(x @ (self.kernel + 0.1 * shift), (n, 64))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: type(s).__name__)
def test_weights_that_are_folded_stay_float_and_are_reported(scheme, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((32,)), Folded(name="folded"), L.Dense(64, name="dense")])
    quantized = at.calibrate(model, None, scheme)
    found = at.export.litert(quantized, tmp_path / "m.tflite")
    assert found.float_weights == ("folded",)
    assert "Weights stored as float32" in str(found) and "folded" in found._repr_html_()
    x = np.random.default_rng(0).normal(size=(3, 32)).astype("float32")
    assert sqnr(np.asarray(quantized(x)), at.export.run_litert(tmp_path / "m.tflite", x)) > 30


def test_shared_layers_are_stored_once(tmp_path):
    x = keras.Input((32,))
    dense, own = L.Dense(32, "relu", name="twice"), Decoder(32, 2, name="own")
    y = L.Reshape((4, 32))(L.Dense(128, name="wide")(dense(dense(x))))
    model = keras.Model(x, own(own(y)))
    quantized = at.calibrate(model, None, at.Int8Weights())
    found = at.export.litert(quantized, tmp_path / "m.tflite")
    assert found.float_weights == ()
    data = np.random.default_rng(0).normal(size=(3, 32)).astype("float32")
    file = at.export.run_litert(tmp_path / "m.tflite", data)
    assert sqnr(np.asarray(quantized(data)), file) > 30


def test_an_activation_that_is_a_lambda():
    model = keras.Sequential(
        [keras.Input((8,)), L.Dense(8, activation=lambda x: keras.activations.gelu(x, True))]
    )
    quantized = at.calibrate(model, None, at.Int8Weights())
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    assert 30 < sqnr(np.asarray(model(x)), np.asarray(quantized(x))) < 70
