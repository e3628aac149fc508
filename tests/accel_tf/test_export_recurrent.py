"""Files of recurrent layers: masks, reversed sequences, and loops of integers."""

import keras
import numpy as np
import pytest

import accel_tf as at

L = keras.layers


def sqnr(expected, received):
    expected, received = np.asarray(expected, np.float64), np.asarray(received, np.float64)
    noise = np.square(expected - received).sum()
    return 10 * np.log10(np.square(expected).sum() / noise) if noise else np.inf


def masked(*layers):
    ids = keras.Input((4,), dtype="int32")
    values = keras.initializers.RandomNormal(stddev=1.0, seed=0)
    x = L.Embedding(9, 3, values, mask_zero=True)(ids)
    for layer in layers:
        x = layer(x)
    return keras.Model(ids, x)


IDS = np.array([[3, 4, 0, 0], [5, 0, 0, 0], [1, 2, 3, 4], [0, 2, 0, 7]], np.int32)
SIGNALS = np.random.default_rng(0).normal(size=(16, 5, 3)).astype("float32")


def test_a_float_file_of_a_masked_bidirectional_layer_is_the_model(tmp_path):
    # Keras' own unrolled form zeroes what a reversed layer returns by the mask in the wrong order.
    model = masked(L.Bidirectional(L.SimpleRNN(2, return_sequences=True)), L.SimpleRNN(2))
    at.export.litert(model, tmp_path / "m.tflite")
    assert sqnr(model(IDS), at.export.run_litert(tmp_path / "m.tflite", IDS)) > 100
    at.export.onnx(model, tmp_path / "m.onnx")
    assert at.export.verify(model, tmp_path / "m.onnx", IDS).sqnr > 100
    inner = model.layers[2].backward_layer
    assert inner.go_backwards and not inner.unroll


@pytest.mark.parametrize("batch_size", [None, 1])
def test_masked_and_reversed_layers_of_integers_are_the_model(batch_size, tmp_path):
    model = masked(
        L.SimpleRNN(3, go_backwards=True, return_sequences=True, zero_output_for_mask=True)
    )
    quantized = at.calibrate(model, IDS, verbose=0)
    assert sqnr(model(IDS), quantized(IDS)) > 25
    found = at.export.litert(quantized, tmp_path / "m.tflite", batch_size=batch_size)
    assert found.int8_fraction == 1.0
    np.testing.assert_array_equal(at.export.run_litert(tmp_path / "m.tflite", IDS), quantized(IDS))


@pytest.mark.parametrize("kind, sequences", [(L.LSTM, True), (L.GRU, False), (L.SimpleRNN, False)])
def test_integer_layers_are_a_loop_of_integers_and_smaller(kind, sequences, tmp_path):
    model = keras.Sequential([keras.Input((5, 3)), kind(32, return_sequences=sequences)])
    quantized = at.calibrate(model, SIGNALS, verbose=0)
    found = at.export.litert(quantized, tmp_path / "int8.tflite", batch_size=1)
    names = [op.name for op in found.operators]
    assert found.int8_fraction == 1.0 and names.count("WHILE") == 1 and len(names) < 45
    assert found.size < at.export.litert(model, tmp_path / "m.tflite", batch_size=1).size
    real = at.export.run_litert(tmp_path / "int8.tflite", SIGNALS)
    assert sqnr(quantized(SIGNALS), real) > 30


def test_weights_alone_are_a_loop_too(tmp_path):
    model = keras.Sequential([keras.Input((5, 3)), L.LSTM(16), L.Dense(2)])
    x = SIGNALS
    quantized = at.calibrate(model, x, at.Int8Weights(), verbose=0)
    found = at.export.litert(quantized, tmp_path / "m.tflite")
    assert len(found.operators) < 60
    assert sqnr(quantized(x), at.export.run_litert(tmp_path / "m.tflite", x)) > 35


def test_one_time_step_is_no_loop_that_runs(tmp_path):
    model = keras.Sequential([keras.Input((1, 3)), L.GRU(4, return_sequences=True)])
    quantized = at.calibrate(model, SIGNALS[:, :1], verbose=0)
    at.export.litert(quantized, tmp_path / "m.tflite")
    real = at.export.run_litert(tmp_path / "m.tflite", SIGNALS[:, :1])
    assert sqnr(quantized(SIGNALS[:, :1]), real) > 30


def test_sequences_of_any_length_need_a_loop(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), L.SimpleRNN(4, name="rnn")])
    with pytest.raises(
        ValueError, match="'rnn' takes sequences of any length.*Pass batch_size=1"
    ) as e:
        at.export.litert(model, tmp_path / "m.tflite")
    assert "\x1b" not in str(e.value)
    with pytest.raises(ValueError, match="Give the model's input a length"):
        at.export.onnx(model, tmp_path / "m.onnx")
    at.export.litert(model, tmp_path / "m.tflite", batch_size=1)
    for length in (2, 5):
        x = SIGNALS[:, :length]
        assert sqnr(model(x), at.export.run_litert(tmp_path / "m.tflite", x)) > 100


def test_integer_layers_take_sequences_of_any_length(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), L.SimpleRNN(4)])
    quantized = at.calibrate(model, SIGNALS, verbose=0)
    found = at.export.litert(quantized, tmp_path / "m.tflite")
    assert found.int8_fraction == 1.0
    for length in (2, 5):
        x = SIGNALS[:, :length]
        real = at.export.run_litert(tmp_path / "m.tflite", x)
        np.testing.assert_array_equal(real, quantized(x))
