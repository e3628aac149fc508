"""Each kind of layer and operator: quantized, trained, saved, and the same numbers in its int8 file."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

import accel_tf as at
from accel_tf.quantization import QuantizedLayer

L = keras.layers


def sqnr(signal, noisy):
    """The signal-to-quantization-noise ratio in dB."""
    signal, noisy = np.asarray(signal, "float64"), np.asarray(noisy, "float64")
    return 10 * np.log10((signal**2).sum() / max(((signal - noisy) ** 2).sum(), 1e-30))


def stack(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


IMAGES = {
    "separable": [L.SeparableConv2D(4, 3, name="s"), L.BatchNormalization(), L.ReLU()],
    "transposed": [L.Conv2DTranspose(4, 3, strides=2), L.BatchNormalization(), L.ReLU()],
    "dilated": [L.Conv2D(4, 3, dilation_rate=2), L.BatchNormalization(), L.ReLU()],
    "dilated depthwise": [L.DepthwiseConv2D(3, dilation_rate=2, padding="same")],
    "grouped": [L.Conv2D(6, 3, groups=3), L.BatchNormalization(), L.ReLU()],
    "mobile": [L.Conv2D(4, 3, activation="hard_swish"), L.Conv2D(4, 1, activation="hard_sigmoid")],
    "resized": [L.UpSampling2D(2), L.UpSampling2D(2, interpolation="bilinear"), L.Resizing(9, 7)],
    "slopes": [L.Conv2D(4, 3), L.PReLU("random_uniform", shared_axes=(1, 2)), L.LeakyReLU()],
    "normalized": [L.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0]), L.Conv2D(2, 3)],
    "augmented": [
        L.RandomFlip(),
        L.RandomErasing(),
        L.RandomHue(0.1),
        L.Conv2D(2, 3),
        L.GlobalMaxPooling2D(),
    ],
}
SEQUENCES = {
    "separable": [L.SeparableConv1D(4, 3, padding="same", strides=2)],
    "causal": [L.Conv1D(4, 3, padding="causal", dilation_rate=2), L.BatchNormalization(), L.ReLU()],
    "convolutions": [
        L.Conv1D(8, 3, padding="same"),
        L.BatchNormalization(),
        L.ReLU(),
        L.MaxPooling1D(),
        L.DepthwiseConv1D(3, padding="same"),
        L.AveragePooling1D(2),
        L.GlobalAveragePooling1D(),
        L.Dense(3),
    ],
    "transposed": [L.Conv1DTranspose(4, 3, strides=2)],
    "einsum": [
        L.EinsumDense("abc,cde->abde", (None, 2, 8), bias_axes="de", activation="relu"),
        L.EinsumDense("abde,def->abf", (None, 5)),
    ],
    "gelu": [L.Dense(8, activation="gelu"), L.Dense(5, activation="exponential"), L.Dense(3)],
    "lstm": [L.LSTM(8, return_sequences=True), L.LSTM(8, dropout=0.1), L.Dense(3)],
    "gru": [L.GRU(8, go_backwards=True, bias_initializer="random_uniform"), L.Dense(3)],
    "both ways": [
        L.Bidirectional(L.LSTM(4, return_sequences=True)),
        L.TimeDistributed(L.Dense(4)),
        L.Bidirectional(L.GRU(4), merge_mode="sum"),
    ],
    "rnn": [L.SimpleRNN(8, go_backwards=True), L.Dense(3)],
}
CASES = [
    *[pytest.param((8, 8, 3), layers, id=f"2d {name}") for name, layers in IMAGES.items()],
    *[pytest.param((12, 4), layers, id=f"1d {name}") for name, layers in SEQUENCES.items()],
]


def copies(layers):
    return [type(layer).from_config(layer.get_config()) for layer in layers]


@pytest.mark.parametrize(("shape", "layers"), CASES)
def test_a_layer_is_int8_in_the_file_and_computes_the_same(shape, layers, tmp_path):
    model = stack(shape, *copies(layers))
    x = np.random.normal(size=(32, *shape)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    assert 20 < sqnr(model.predict(x, verbose=0), quantized.predict(x, verbose=0)) < 100
    found = at.export.litert(quantized, tmp_path / "model.tflite")
    assert found.int8_fraction == 1.0
    real = at.export.run_litert(tmp_path / "model.tflite", x)
    assert sqnr(quantized.predict(x, verbose=0), real) > 30


def encoder():
    """Token and position embeddings, one encoder block, with operators between layers."""
    tokens = keras.Input((10,), dtype="int32", name="tokens")
    x = L.Embedding(30, 16, name="words")(tokens) + L.Embedding(10, 16)(keras.ops.arange(10)[None])
    attended = L.MultiHeadAttention(2, 8, dropout=0.1, name="attention")(x, x)
    x = L.LayerNormalization(name="norm")(x + attended)
    x = L.LayerNormalization()(L.Add()([x, L.Dense(16)(L.Dense(32, activation="gelu")(x))]))
    return keras.Model(tokens, L.Dense(4, name="head")(L.GlobalAveragePooling1D()(x)))


def masked_encoder():
    tokens = keras.Input((10,), dtype="int32")
    x = L.Embedding(30, 16, mask_zero=True)(tokens)
    x = L.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True)
    return keras.Model(tokens, L.Dense(4)(x[:, 0]))


def masked_lstm():
    tokens = keras.Input((10,), dtype="int32")
    x = L.LSTM(8, return_sequences=True)(L.Embedding(30, 16, mask_zero=True)(tokens))
    return keras.Model(tokens, L.Dense(4)(L.LSTM(8)(x)))


def residual_sum():
    x = keras.Input((10, 6))
    y = keras.ops.relu(L.Dense(6)(x) * 0.5 + x)
    y = keras.ops.concatenate([y - 1.0, keras.ops.transpose(y, (0, 1, 2))], axis=-1)
    y = L.Average(name="average")([y, L.Dense(12)(x), L.Dense(12)(y)])
    return keras.Model(x, L.Dense(4)(keras.ops.mean(y, axis=1)))


def application_block():
    """What only models of keras.applications have: scaled sums, layer scale, stochastic depth."""
    x = start = keras.Input((6, 6, 4))
    y = L.LayerNormalization(name="norm")(L.Conv2D(4, 3, groups=4, padding="same")(x))
    y = LayerScale(0.5, 4)(L.Dense(4)(L.Dense(8, activation="gelu")(y)))
    x = x + StochasticDepth(0.1)(y)
    y = L.Activation("relu")(CustomScaleLayer(0.3)([x, L.Conv2D(4, 1)(x)]))
    return keras.Model(start, L.Dense(4)(L.GlobalAveragePooling2D()(y)))


GRAPHS = [encoder, application_block, masked_encoder, masked_lstm, residual_sum]


def data_for(model, n=32):
    shape = (n, *model.inputs[0].shape[1:])
    if model.inputs[0].dtype == "int32":
        x = np.random.randint(1, 30, shape)
        x[:, 7:] *= np.random.randint(0, 2, (n, 1))  # padding, in every second text or so
        return x.astype("int32")
    return np.random.normal(size=shape).astype("float32")


@pytest.mark.parametrize("build", GRAPHS)
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_a_graph_is_trained_saved_and_the_same_in_its_file(build, options, tmp_path):
    model = build()
    x = data_for(model)
    quantized = at.quantize_aware(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    quantized.compile(keras.optimizers.Adam(1e-3), loss, **options)
    y = np.random.randint(0, 4, len(x))
    history = quantized.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(history).all() and min(history[1:]) < history[0]
    if options:
        return
    expected = quantized.predict(x, verbose=0)
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    found = at.export.litert(loaded, tmp_path / "model.tflite")
    islands = {layer.name for _, layer in at.layers.walk(loaded) if _is_island(layer)}
    assert islands == {layer.name for layer in model.layers if "norm" in layer.name}
    if not islands:
        assert found.int8_fraction == 1.0
    assert sqnr(expected, at.export.run_litert(tmp_path / "model.tflite", x)) > 20


def _is_island(layer):
    return isinstance(layer, QuantizedLayer) and bool(layer.float_island)


def test_attention_of_a_masked_position_is_nothing():
    """The output for real positions does not depend on what is masked."""
    model = masked_encoder()
    x = data_for(model)
    quantized = at.calibrate(model, x, verbose=0)
    attention = next(v for _, v in at.layers.walk(quantized) if v.name == "multi_head_attention")
    query = tf.random.normal((4, 10, 16))
    other = tf.concat([query[:, :9], query[:, 9:] * -3], 1)
    mask = np.ones((4, 10, 10), bool)
    mask[:, :, 9] = False
    a, b = (attention(query, v, attention_mask=mask) for v in (query, other))
    np.testing.assert_allclose(a, b, atol=2 * attention.output_quantizer.scale)


def test_the_loop_over_time_computes_what_keras_does():
    """Before any range is known, only the weights are rounded."""
    for kind in (L.LSTM, L.GRU, L.SimpleRNN):
        model = stack((7, 4), L.Masking(), kind(5, return_sequences=True, go_backwards=True))
        quantized = at.quantize_aware(model)
        assert type(quantized.layers[1]) is L.Masking
        assert "no int8 kernel for Masking" in at.report_of(quantized).skipped[0].note
        x = np.random.normal(size=(3, 7, 4)).astype("float32")
        x[0, 4:] = 0
        assert sqnr(model(x), quantized(x)) > 30


def test_what_has_no_integer_form_says_so():
    def sequence(*layers):
        return stack((6, 4), *layers)

    for layer, reason in [
        (L.LSTM(3, activation="relu"), "its activations are not tanh and sigmoid"),
        (L.LSTM(3, stateful=True), "it returns or keeps its state"),
        (L.GRU(3, recurrent_dropout=0.5), "it drops states"),
        (L.GRU(3, reset_after=False), "its reset gate comes before the product"),
        (L.LayerNormalization(axis=1), "it normalizes axis"),
    ]:
        if getattr(layer, "stateful", False):
            model = keras.Sequential([keras.Input(batch_shape=(2, 6, 4)), layer])
        else:
            model = sequence(layer)
        with pytest.raises(ValueError, match=reason):
            at.quantize_aware(model)


def test_layers_without_an_integer_kernel_stay_in_float_and_say_so():
    model = stack((4, 4, 4, 1), L.Conv3D(2, 3, name="volume"), L.Flatten(), L.Dense(2, name="head"))
    quantized = at.calibrate(model, np.random.normal(size=(4, 4, 4, 4, 1)), verbose=0)
    skipped = dict(at.report_of(quantized).skipped)
    assert "no int8 kernel for Conv3D" in skipped["volume"]
    assert type(quantized.get_layer("volume")) is L.Conv3D


@keras.saving.register_keras_serializable(package="tests")
class Block(L.Layer):
    """An encoder block as tutorials write it: a layer of layers."""

    def __init__(self, name=None, **options):
        super().__init__(name=name, **options)
        self.attention = L.MultiHeadAttention(2, 8, name="attention")
        self.expand = L.Dense(32, activation="relu", name="expand")
        self.shrink = L.Dense(16, name="shrink")
        self.norm = L.LayerNormalization(name="norm")
        self.dropout = L.Dropout(0.1)

    def call(self, x, training=None):
        y = x + self.dropout(self.attention(x, x), training=training)
        return self.norm(y + self.shrink(self.expand(y)))


class Own(keras.Model):
    """A subclassed model with a nested one, and a layer that is used twice."""

    def __init__(self):
        super().__init__(name="own")
        self.embed = L.Embedding(30, 16)
        self.block = Block(name="block")
        self.heads = stack((16,), L.Dense(8, activation="relu"), L.Dense(4))
        self.both = L.Bidirectional(L.GRU(8), name="both")

    def call(self, tokens):
        x = self.block(self.block(self.embed(tokens)))
        return self.heads(self.both(x))


def test_layers_of_layers_are_taken_apart(tmp_path):
    x = keras.Input((10, 16))
    y = Block(name="second")(Block(name="first")(x))
    model = keras.Model(x, L.Dense(4)(L.GlobalAveragePooling1D()(y)))
    data = data_for(model)
    quantized = at.calibrate(model, data, verbose=0)
    notes = dict(at.report_of(quantized).done)
    assert "weights int8 per channel" in notes["first/attention"]
    assert "first/shrink" in notes and "second/expand" in notes
    assert sqnr(model(data), quantized(data)) > 20
    at.export.litert(quantized, tmp_path / "model.tflite")
    real = at.export.run_litert(tmp_path / "model.tflite", data)
    assert sqnr(quantized.predict(data, verbose=0), real) > 20
    left = at.quantize_aware(model, exclude=["first"])
    assert type(left.get_layer("first")) is Block
    mixed = at.quantize_aware(model, at.Mixed({"second": at.Int8Weights(), "first/norm": None}))
    notes = dict(at.report_of(mixed).skipped)
    assert notes["first/norm"] == "excluded: stays in float"
    assert mixed.get_layer("second").get_layer("expand").quantizers == []


def test_a_subclassed_model_goes_by_its_graph():
    model, x = Own(), np.random.randint(0, 30, (16, 10)).astype("int32")
    expected = model(x)
    with pytest.raises(ValueError, match=r"subclassed.*accel_tf.layers.functional\(model, x\)"):
        at.quantize_aware(model)
    quantized = at.calibrate(at.layers.functional(model, x), x, verbose=0)
    assert sqnr(expected, quantized(x)) > 8
    assert {"block/attention", "both/forward_gru"} <= {
        e.layer for e in at.report_of(quantized).done
    }


@pytest.mark.parametrize("name", ["dilated", "dilated depthwise", "causal"])
def test_dilated_convolutions_train_on_every_processor(name):
    """TensorFlow's gradient of a convolution with gaps needs oneDNN, which few processors get."""
    shape = (16, 8) if name == "causal" else (16, 16, 8)
    copies = [type(v).from_config(v.get_config()) for v in {**IMAGES, **SEQUENCES}[name]]
    model = at.quantize_aware(stack(shape, *copies))

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            y = model(x, training=True)
        return tape.gradient(y, model.trainable_variables)

    graph = gradient.get_concrete_function(tf.zeros((2, *shape))).graph
    found = [op for op in graph.get_operations() if "BackpropFilter" in op.type]
    assert found and all(set(op.get_attr("dilations")) == {1} for op in found)
