"""`assert verify(...).ok` holds for files that are right, whatever the weights are."""

import keras
import numpy as np
import pytest

import accel_tf as at

L = keras.layers


def image(*inside):
    return keras.Sequential([keras.Input((8, 8, 3)), *inside, L.Flatten(), L.Dense(4, name="head")])


def sequence(*inside):
    return keras.Sequential([keras.Input((6, 8)), *inside, L.Flatten(), L.Dense(4, name="head")])


def residual():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    x = L.Add()([x, L.BatchNormalization()(L.Conv2D(8, 3, padding="same")(x))])
    x = L.Concatenate()([L.ReLU()(x), L.AveragePooling2D(3, 1, "same")(x)])
    return keras.Model(inputs, L.Dense(4, activation="softmax")(L.GlobalAveragePooling2D()(x)))


def classifier():
    inputs = keras.Input((6,), dtype="int32")
    x = L.Embedding(20, 8, mask_zero=True)(inputs)
    x = L.LayerNormalization()(L.Add()([x, L.MultiHeadAttention(2, 4)(x, x)]))
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling1D()(x)))


MODELS = {
    "dense": lambda: sequence(L.Dense(16, "relu"), L.Dense(8, "tanh")),
    "convolution": lambda: image(L.Conv2D(8, 3, activation="relu"), L.MaxPooling2D()),
    "normalization": lambda: image(L.Conv2D(8, 3), L.BatchNormalization(), L.ReLU(6)),
    "depthwise": lambda: image(L.DepthwiseConv2D(3), L.Activation("hard_swish"), L.Conv2D(4, 1)),
    "separable": lambda: image(L.SeparableConv2D(8, 3), L.Activation("silu")),
    "residual": residual,
    "convolution over time": lambda: sequence(L.Conv1D(8, 3, padding="causal"), L.PReLU()),
    "lstm": lambda: sequence(L.LSTM(8, return_sequences=True)),
    "gru": lambda: sequence(L.GRU(8, return_sequences=True)),
    "classifier": classifier,
}


def check(name, seed, folder):
    keras.utils.set_random_seed(seed)
    model, rng = MODELS[name](), np.random.default_rng(seed)
    shape = (24, *model.input_shape[1:])
    x = rng.integers(0, 20, shape) if name == "classifier" else rng.normal(size=shape)
    quantized = at.calibrate(model, x, verbose=0)
    at.export.litert(quantized, folder / "m.tflite")
    found = at.export.verify(quantized, folder / "m.tflite", x, original=model)
    assert found.ok, (name, seed, found)


@pytest.mark.parametrize("name", ["normalization", "lstm", "classifier"])
def test_a_right_file_is_ok(name, tmp_path):
    check(name, 0, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
def test_right_files_are_ok_for_50_seeds(name, tmp_path):
    for seed in range(50):
        check(name, seed, tmp_path)
