"""The masks of blocks and of n zeros in m are TFMOT's, on weights of which no two are equal.

Importing TFMOT turns `tf.keras` into tf_keras for the whole process, so this file runs itself in
another one, where it compares.
"""

import pathlib
import subprocess
import sys

import keras
import numpy as np

import accel_tf as at
from accel_tf.interop.tfmot import to_tfmot


def test_masks_are_tfmots():
    script = pathlib.Path(__file__)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["blocks", "n_of_m"]


def our_mask(weights, schedule, pattern):
    """What `prune` leaves of the kernel of a Dense or Conv layer."""
    if weights.ndim == 2:
        layer = keras.layers.Dense(weights.shape[1], use_bias=False)
        model = keras.Sequential([keras.Input(weights.shape[:1]), layer])
    else:
        *size, inputs, outputs = weights.shape
        layer = keras.layers.Conv2D(outputs, size, use_bias=False)
        model = keras.Sequential([keras.Input((*size, inputs)), layer])
    layer.kernel.assign(weights)
    at.prune(model, schedule, pattern=pattern)
    return layer.kernel.numpy() != 0


def tfmot_mask(weights, schedule, block=(1, 1), pooling="AVG", m_by_n=None):
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

    step = tf.constant(1, tf.int64)
    pruning = pruning_impl.Pruning(
        lambda: step, [], to_tfmot(schedule), block, pooling, sparsity_m_by_n=m_by_n
    )
    return pruning._maybe_update_block_mask(tf.constant(weights))[1].numpy() != 0


def blocks():
    rng = np.random.default_rng(0)
    divide = 0
    for case in range(150):
        block = tuple(int(b) for b in rng.integers(1, 6, 2))
        if case % 3 == 0:
            block = [(1, 4), (4, 1), (1, 16), (16, 1), (2, 2)][case // 3 % 5]
        size = np.array(block) + rng.integers(1, 30, 2)  # TFMOT fails on a single row of blocks
        if case % 2:
            size = np.array(block) * rng.integers(2, 6, 2)
        divide += not (size % block).any()
        weights = rng.normal(size=size).astype("float32")
        schedule = at.ConstantSparsity(rng.uniform(0, 0.99))
        pooling = ("AVG", "MAX")[case // 2 % 2]
        expected = tfmot_mask(weights, schedule, block, pooling)
        mask = our_mask(weights, schedule, at.Block(block, pooling))
        np.testing.assert_array_equal(mask, expected, str((case, size, block, pooling)))
        # TFMOT refuses blocks on convolutions. Ours are those of the matrix that it multiplies by.
        if size[0] % 3 == 0:
            kernel = weights.reshape(3, 1, -1, size[1])
            mask = our_mask(kernel, schedule, at.Block(block, pooling))
            np.testing.assert_array_equal(mask, expected.reshape(kernel.shape))
    assert 75 <= divide < 130, divide


def n_of_m():
    rng = np.random.default_rng(0)
    for case in range(100):
        m = int(rng.integers(2, 9))
        n = int(rng.integers(1, m))
        shape = rng.integers(m - n + 1, 20, 2) if case % 2 else rng.integers(m - n + 1, 12, 4)
        weights = rng.normal(size=shape).astype("float32")
        schedule, pattern = at.ConstantSparsity(n / m), at.NM(n, m)
        expected = tfmot_mask(weights, schedule, m_by_n=(n, m))
        mask = our_mask(weights, schedule, pattern)
        np.testing.assert_array_equal(mask, expected, str((case, shape, pattern)))


if __name__ == "__main__":
    for check in (blocks, n_of_m):
        check()
        print(check.__name__)
