"""Runs what can be measured: a Keras model, a `.tflite` file, or any callable."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accel_tf._litert import LiteRTRunner


def is_litert(candidate) -> bool:
    return isinstance(candidate, (str, os.PathLike)) and str(candidate).endswith(".tflite")


def check(name: str, candidate) -> None:
    """Raises a `ValueError` unless `candidate` is something that can be run."""
    if isinstance(candidate, (str, os.PathLike)):
        if not is_litert(candidate):
            raise ValueError(
                f"Candidate {name!r} is the path {str(candidate)!r}; only .tflite files are run "
                "from a path. Load others first: keras.models.load_model(path)."
            )
        if not pathlib.Path(candidate).is_file():
            raise ValueError(f"Candidate {name!r}: there is no file {str(candidate)!r}.")
    elif not callable(candidate):
        raise ValueError(
            f"Candidate {name!r} must be a Keras model, a callable or the path of a .tflite file. "
            f"Received: {type(candidate).__name__}"
        )


def as_arrays(x):
    """Makes every leaf of `x` an array, float64 becoming Keras' float type, as `fit` does."""

    def convert(leaf):
        array = np.asarray(leaf)
        return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array

    # Lists are structures of several inputs only if their elements are arrays.
    if isinstance(x, (list, tuple)) and not (x and hasattr(x[0], "shape")):
        return convert(x)
    return tf.nest.map_structure(convert, x)


def length(x) -> int:
    """The number of samples in `x`, which every leaf must share."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tf.nest.flatten(x)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "x needs at least one sample, the same number in each input. Received shapes: "
            f"{[leaf.shape for leaf in tf.nest.flatten(x)]}"
        )
    return sizes.pop()


def rows(x, start: int, stop: int):
    return tf.nest.map_structure(lambda leaf: leaf[start:stop], x)


def runner(candidate, x) -> Callable[[], Any]:
    """Returns a function without arguments that runs `candidate` on `x` and waits for the result.

    All that can be done before is done here: a model is traced for exactly this signature, and its
    input already lies on the device.
    """
    if is_litert(candidate):
        return _open(candidate).prepare(x)
    if isinstance(candidate, keras.Model):
        leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(x)]
        forward = compiled(candidate, x).get_concrete_function(*leaves)
        return lambda: wait(forward(*leaves))
    return lambda: wait(candidate(x))


def compiled(model: keras.Model, example) -> tf.function:
    """The inference pass of `model` as a `tf.function` of the flattened inputs."""

    def forward(*leaves):
        return model(tf.nest.pack_sequence_as(example, leaves), training=False)

    # An XLA model is measured as XLA; "auto" in an uncompiled model means no.
    jit = bool(getattr(model, "compiled", False) and model.jit_compile)
    return tf.function(forward, jit_compile=jit, autograph=False)


def wait(outputs):
    """Brings every output to the host, so that none is still being computed."""
    return [
        leaf.numpy() if hasattr(leaf, "numpy") else leaf
        for leaf in tf.nest.flatten(outputs, expand_composites=True)
    ]


def predict(candidate, x, batch_size: int):
    """Returns the outputs of `candidate` for all of `x` as NumPy arrays, in its own structure."""
    if is_litert(candidate):
        run = _open(candidate)
    else:
        forward = compiled(candidate, x)

        def run(part):
            leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(part)]
            return forward.get_concrete_function(*leaves)(*leaves)

    count = length(x)
    parts = [run(rows(x, i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    return tf.nest.map_structure(
        lambda *leaves: np.concatenate(list(map(np.asarray, leaves))), *parts
    )


def _open(path) -> LiteRTRunner:
    """A `.tflite` file, run with as many threads as TensorFlow uses."""
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count()
    return LiteRTRunner(path, threads=threads)
