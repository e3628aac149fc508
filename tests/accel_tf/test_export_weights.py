"""Weights of few bits in files: those into which the converter folded a normalization before them."""

import keras
import numpy as np
import pytest

import accel_tf as at
from accel_tf.export import _weights
from accel_tf.export._unfold import unfold
from accel_tf.layers import sqnr

L = keras.layers
RNG = np.random.default_rng(0)


def encoder(*layers, calls=1, shape=(64,)):
    """A model of `layers` whose normalizations do something, called once for each of its inputs."""
    part = keras.Sequential([keras.Input(shape), *layers], name="embedding")
    inputs = [keras.Input(shape, name=f"x{i}") for i in range(calls)]
    model = keras.Model(
        inputs, L.Concatenate()([part(x) for x in inputs]) if calls > 1 else part(*inputs)
    )
    for v in model.weights:
        if not v.name.endswith("kernel"):
            v.assign(RNG.uniform(0.5, 2, v.shape))
    return model


MODELS = {
    "once": lambda: encoder(L.BatchNormalization(), L.Dense(32, "relu", name="dense")),
    "twice": lambda: encoder(L.BatchNormalization(), L.Dense(32, name="dense"), calls=2),
    "both sides": lambda: encoder(
        L.BatchNormalization(), L.Dense(32, name="dense"), L.BatchNormalization()
    ),
    "images": lambda: encoder(
        L.Conv2D(6, 3, activation="tanh"),
        L.Flatten(),
        L.BatchNormalization(),
        L.Dense(32, "tanh", name="dense"),
        calls=2,
        shape=(6, 6, 1),
    ),
}


@pytest.mark.parametrize("scheme", [at.Int8Weights(), at.Int4Weights(32)], ids=["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_behind_a_normalization_are_stored_in_few_bits(name, scheme, tmp_path):
    model = MODELS[name]()
    quantized = at.calibrate(model, None, scheme, verbose=0)
    found = at.export.litert(quantized, tmp_path / "m.tflite")
    products = [op for op in found.operators if op.name == "FULLY_CONNECTED"]
    assert {op.inputs[1] for op in products} == {f"int{scheme.weight_bits}"}
    assert found.float_weights == ()
    x = {t.name: RNG.normal(size=(4, *t.shape[1:])).astype("float32") for t in model.inputs}
    y = quantized(list(x.values()))
    # LiteRT rounds what such a product reads to 8 bits.
    assert sqnr(np.asarray(y), at.export.run_litert(tmp_path / "m.tflite", x)) > 40


def test_weights_that_stay_float_are_named_once_and_as_exclude_takes_them(tmp_path, monkeypatch):
    quantized = at.calibrate(MODELS["twice"](), None, at.Int8Weights(), verbose=0)
    monkeypatch.setattr(_weights, "unfold", lambda folded, kernels: None)
    with pytest.raises(ValueError, match=r"weights of embedding/dense are .*\['embedding/dense'\]"):
        at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.litert(quantized, tmp_path / "m.tflite", allow_float=True)
    assert found.float_weights == ("embedding/dense",)


def test_factors_are_found_again_in_weights_with_zeros():
    kernel = RNG.integers(-3, 4, (20, 5)).astype("float32")
    kernel[4] = 0
    factors, out = RNG.normal(size=20), RNG.normal(size=5)
    folded = (out[:, None] * kernel.T * factors).astype("float32")
    other = RNG.normal(size=(20, 5)).astype("float32")
    found = unfold(folded, [other, kernel])
    np.testing.assert_allclose(found.weights * found.factors, folded, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found.weights / np.abs(found.weights).max(1, keepdims=True),
        np.sign(found.factors[0] * factors[0] * out)[:, None] * (kernel / np.abs(kernel).max(0)).T,
        rtol=1e-5,
        atol=1e-6,
    )
    assert unfold(folded, [other]) is None and unfold(folded[:, :4], [kernel]) is None
