"""Models with zeros in their kernels, and the comparison of two, for the tests of sparse layers."""

import keras
import numpy as np

import accel_tf as at


def zero_out(model, sparsity=0.9, seed=0):
    """Sets a random fraction of each kernel, in every nested layer, to zero; keeps the scale of sums."""
    rng = np.random.default_rng(seed)
    for _, layer in at.layers.walk(model):
        if isinstance(getattr(layer, "kernel", None), keras.Variable):
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            mask = rng.random(kernel.shape) >= sparsity
            layer.kernel.assign(kernel * mask / np.sqrt(1 - sparsity))
    return model


def mlp(**kwargs):
    return zero_out(
        keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(128, activation="relu", name="wide", **kwargs),
                keras.layers.Dense(32, use_bias=False, name="thin", **kwargs),
            ]
        )
    )


def x_of(model, batch=5, seed=1):
    shape = [batch, *(size or 7 for size in model.input_shape[1:])]
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_function(a, b, atol=1e-4):
    x = x_of(a)
    np.testing.assert_allclose(a(x), b(x), rtol=1e-4, atol=atol)
