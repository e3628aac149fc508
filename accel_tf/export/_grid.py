"""Finding the integer grid that weights were rounded to, from the weights alone.

A converter folds constants: what is left of a fake-quantized kernel are floats that lie on a grid,
perhaps multiplied by a normalization's factors, which only changes the scales. The largest weight
of each channel or group sits on the grid's end, so that the grid can be read off.
"""

from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """Weights as integers.

    Attributes:
        integers: int8, in the shape of the weights.
        scales: float32, (channels, groups).
        axis: The axis of the channels; `None` if one scale is for the whole tensor.
        group: How many consecutive weights of a channel share a scale; `None` for all of them.
    """

    integers: np.ndarray
    scales: np.ndarray
    axis: int | None
    group: int | None


def is_half(weights: np.ndarray) -> bool:
    """Whether float32 weights were rounded to float16, and perhaps multiplied by a power of two since."""
    with np.errstate(over="ignore"):
        error = np.abs(weights - weights.astype(np.float16).astype(np.float32)).max(initial=0.0)
    # A product that is too small for a normal number of half precision has fewer bits.
    return bool(error <= min(2.0**-25, 1e-5 * np.abs(weights).max(initial=0.0)))


def find(weights: np.ndarray, bits: int, group: int | None, axes) -> Grid | None:
    """Returns the grid that `weights` lie on, with channels along the first of `axes` that fits.

    Args:
        weights: float32.
        bits: Width of the integers, which span [−(2^(bits−1) − 1), 2^(bits−1) − 1].
        group: How many consecutive weights of a channel share a scale; `None` for all of them.
        axes: Axes to try; `None` among them tries one channel for all.
    """
    top = 2 ** (bits - 1) - 1
    for axis in axes:
        moved = weights[None] if axis is None else np.moveaxis(weights, axis, 0)
        rows = moved.reshape(len(moved), -1)
        count = rows.shape[1]
        size = count if group is None or group >= count else group
        padded = np.pad(rows, ((0, 0), (0, -count % size))).reshape(len(rows), -1, size)
        scales = np.abs(padded).max(axis=2) / np.float32(top)
        scales = np.where(scales, scales, 1)  # Of zeros any scale will do, except 0.
        integers = padded / scales[:, :, None]
        rounded = np.round(integers)
        if np.abs(integers - rounded).max(initial=0) > 0.01:
            continue
        rounded = rounded.reshape(len(rows), -1)[:, :count].reshape(moved.shape)
        rounded = rounded[0] if axis is None else np.moveaxis(rounded, 0, axis)
        return Grid(
            rounded.astype(np.int8),
            scales.astype(np.float32),
            axis,
            None if size == count else size,
        )
    return None
