"""The samples that candidates are run on: arrays, alone or in a list or dictionary."""

import keras
import numpy as np
import tensorflow as tf


def as_arrays(x):
    """Makes every leaf of `x` an array; float64 becomes Keras' float type, as in `fit`."""

    def convert(leaf):
        array = np.asarray(leaf)
        return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array

    # Lists are structures of several inputs only if their elements are arrays.
    if isinstance(x, (list, tuple)) and not (x and hasattr(x[0], "shape")):
        return convert(x)
    return tf.nest.map_structure(convert, x)


def length(x) -> int:
    """Returns the number of samples in `x`, which every leaf must share."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tf.nest.flatten(x)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "x needs at least one sample, the same number in each input. Received shapes: "
            f"{[leaf.shape for leaf in tf.nest.flatten(x)]}"
        )
    return sizes.pop()


def rows(x, start: int, stop: int):
    """Returns the samples from `start` up to, but not including, `stop`."""
    return tf.nest.map_structure(lambda leaf: leaf[start:stop], x)


def in_batches(run, x, batch_size: int):
    """Runs all of `x` in batches; returns the outputs joined, in the structure that `run` returns.

    Args:
        run: A function from a batch to its outputs, arrays or tensors in any structure.
        x: The samples, as from `as_arrays`.
        batch_size: The number of samples in each batch but the last.
    """
    count = length(x)
    parts = [run(rows(x, i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    return tf.nest.map_structure(
        lambda *leaves: np.concatenate(list(map(np.asarray, leaves))), *parts
    )


def multiple_of(fixed: int | None, size: int) -> int:
    """Returns the number of samples to run at a time, some `size`, where a file takes `fixed` per run.

    Args:
        fixed: The batch size of the file; `None` or a negative number if it takes any.
        size: About how many samples are wanted.
    """
    if fixed is None or fixed < 1:
        return size
    return max(size // fixed, 1) * fixed
