"""Quantization parameters belong to a call of a layer; masks reach every layer that reads them."""

import keras
import numpy as np
import pytest

import accel_tf as at
from accel_tf import layers

# Keras says so of each nested model behind a mask, which it passes on all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Layer 'sequential")

L = keras.layers
RNG = np.random.default_rng(0)
NEAR, FAR = (RNG.normal(size=(64, 16)).astype("float32") * scale for scale in (1, 37))
IDS = np.array([[3, 4, 0, 0], [5, 0, 0, 0], [1, 2, 6, 8], [7, 8, 3, 0]] * 8)


def decibels(expected, received):
    return layers.difference([np.asarray(expected)], [np.asarray(received)])


def shared_dense():
    a, b = keras.Input((16,), name="a"), keras.Input((16,), name="b")
    shared = L.Dense(8, "relu", name="shared")
    y = L.Concatenate()([L.Dense(4)(shared(a)), L.Dense(4)(shared(b))])
    return keras.Model([a, b], y)


def siamese():
    a, b = keras.Input((16,), name="a"), keras.Input((16,), name="b")
    encoder = keras.Sequential(
        [keras.Input((16,)), L.Dense(8, "relu", name="shared"), L.Dense(8, name="out")],
        name="encoder",
    )
    y = L.Concatenate(name="both")([encoder(a), encoder(b)])
    return keras.Model([a, b], L.Dense(3, name="head")(y))


@pytest.mark.parametrize("make", [shared_dense, siamese])
def test_each_call_of_a_shared_layer_has_ranges_of_its_own(make, tmp_path):
    model, x = make(), {"a": NEAR, "b": FAR}
    quantized = at.calibrate(model, [NEAR, FAR], verbose=0)
    float_outputs = model([NEAR, FAR])
    # One range for both calls, which the larger inputs determine, leaves 11 dB.
    assert decibels(float_outputs, quantized([NEAR, FAR])) > 30
    assert len(quantized.trainable_weights) == len(model.trainable_weights)
    note = next(note for path, note in at.report_of(quantized).done if path.endswith("shared"))
    assert "ranges of their own for 2 calls" in note

    at.export.litert(quantized, tmp_path / "calls.tflite")
    outputs = at.export.run_litert(tmp_path / "calls.tflite", x)
    np.testing.assert_array_equal(outputs, quantized([NEAR, FAR]))

    quantized.save(tmp_path / "calls.keras")
    loaded = keras.models.load_model(tmp_path / "calls.keras")
    np.testing.assert_array_equal(loaded([NEAR, FAR]), quantized([NEAR, FAR]))
    assert len(loaded.trainable_weights) == len(model.trainable_weights)  # still shared
    loaded.compile("sgd", "mse")
    loaded.fit([NEAR, FAR], np.asarray(float_outputs), verbose=0)
    wrappers = [w for _, w in layers.walk(loaded) if isinstance(w, at.quantization.QuantizedLayer)]
    assert len({id(w.layer) for w in wrappers}) == len(wrappers) - (
        1 if make is shared_dense else 2
    )


def test_quantization_error_tells_of_a_shared_layer_once():
    quantized = at.calibrate(siamese(), [NEAR, FAR], verbose=0)
    error = at.quantization.quantization_error(quantized, [NEAR, FAR], target=200, verbose=0)
    paths = [path for path in error.alone if "encoder" in path]
    assert len(paths) == 2 and "encoder/shared" in paths
    better = at.calibrate(siamese(), [NEAR, FAR], exclude=error.suggestion, verbose=0)
    assert better.get_layer("encoder").get_layer("shared")


def masked(build):
    """A model in which `build` stands between an embedding with a mask and what reads the mask."""
    inputs = keras.Input((4,), dtype="int32")
    x = build(L.Embedding(9, 8, mask_zero=True)(inputs))
    return keras.Model(inputs, x if len(x.shape) == 2 else L.GlobalAveragePooling1D()(x))


def nested(*inside):
    return keras.Sequential([keras.Input((4, 8)), *inside])


BETWEEN = {
    "nothing": lambda x: x,
    "dense": lambda x: L.Dense(8)(x),
    "layer normalization": lambda x: L.LayerNormalization()(x),
    "batch normalization": lambda x: L.BatchNormalization()(x),
    "activation": lambda x: L.Activation("relu")(x),
    "dropout": lambda x: L.Dropout(0.1)(x),
    "sum": lambda x: L.Add()([x, L.Dense(8)(x)]),
    "product": lambda x: L.Multiply()([x, L.Dense(8)(x)]),
    "concatenation": lambda x: L.Concatenate()([x, L.Dense(8)(x)]),
    "attention": lambda x: L.MultiHeadAttention(2, 4)(x, x),
    "time distributed": lambda x: L.TimeDistributed(L.Dense(4))(x),
    "nested": lambda x: nested(L.Dense(8), L.Dense(8))(x),
    "read in a nested model": lambda x: nested(L.Dense(8), L.GlobalAveragePooling1D())(x),
    "operator": lambda x: x + L.Dense(8)(x),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_masks_pass_quantized_layers(between, tmp_path):
    model = masked(BETWEEN[between])
    quantized = at.calibrate(model, IDS, verbose=0)
    assert decibels(model(IDS), quantized(IDS)) > 33  # 2 to 5 dB if the mask is lost
    at.export.litert(quantized, tmp_path / "masked.tflite")
    outputs = at.export.run_litert(tmp_path / "masked.tflite", IDS.astype("int32"))
    *_, last = (q for _, q in layers.walk(quantized) if isinstance(q, at.quantization.FakeQuantize))
    assert np.abs(outputs - quantized(IDS)).max() <= 1.01 * last.scale


@pytest.mark.parametrize("between", ["dense", "nested", "read in a nested model"])
def test_masks_pass_sparse_layers_and_smaller_ones(between):
    model = masked(BETWEEN[between])
    assert decibels(model(IDS), at.sparsify(model, min_sparsity=0.0)(IDS)) > 100
    at.mask_channels(model, 0.25)
    assert decibels(model(IDS), at.remove_channels(model)(IDS)) > 100


@pytest.mark.parametrize("sequences", [False, True])
def test_the_usual_text_classifier_can_be_calibrated(sequences):
    def recurrent(x):
        x = L.Bidirectional(L.LSTM(8, return_sequences=sequences))(x)
        return L.LSTM(8)(x) if sequences else x

    model = masked(lambda x: L.Dense(2)(recurrent(20 * x)))
    keras.utils.set_random_seed(0)
    quantized = at.calibrate(model, IDS, verbose=0)
    unmasked = IDS + (IDS == 0)
    noise = decibels(model(IDS), quantized(IDS))
    assert noise > 15 and noise > decibels(model(IDS), model(unmasked)) + 5
