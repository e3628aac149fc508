"""Factors that a converter has folded into weights, so that these lie on no grid any more.

A normalization in front of a product scales each input by a number of its own. TensorFlow's converter
multiplies the weights by these numbers, which no scale per output channel can express.
"""

from typing import NamedTuple

import numpy as np

# How far the folded weights may be from the product of weights and factors, relative to the largest.
_TOLERANCE = 1e-5


class Unfolded(NamedTuple):
    """Weights of a product, taken apart.

    Attributes:
        weights: float32, (outputs, inputs), without the factors of the inputs.
        factors: float32, (inputs,).
    """

    weights: np.ndarray
    factors: np.ndarray


def unfold(folded: np.ndarray, kernels) -> Unfolded | None:
    """Returns the weights and the factors of inputs that are folded into them, if one kernel fits.

    Args:
        folded: The weights in a file, (outputs, inputs), which are `out[:, None] * kernel.T * factors` for
            any numbers `out` and `factors`.
        kernels: The rounded kernels to try, with the axis of the inputs first.
    """
    for kernel in kernels:
        if kernel.size != folded.size or kernel.shape[0] != folded.shape[1]:
            continue
        k = kernel.reshape(len(kernel), -1).T.astype(np.float64)
        # The row with the fewest zeros tells the most factors; the others follow from the scales of rows.
        row = np.argmax(np.count_nonzero(k, axis=1))
        factors = np.divide(folded[row], k[row], out=np.zeros(k.shape[1]), where=k[row] != 0)
        out = _ratios(folded, k * factors, axis=1)
        factors = _ratios(folded, k * out[:, None], axis=0)
        weights = k * out[:, None]
        if np.abs(weights * factors - folded).max() <= _TOLERANCE * np.abs(folded).max():
            return Unfolded(weights.astype(np.float32), factors.astype(np.float32))
    return None


def _ratios(y, x, axis):
    """Returns the numbers that bring `x` next to `y` along an axis; 1 where `x` is 0."""
    square = np.square(x).sum(axis)
    return np.divide((y * x).sum(axis), square, out=np.ones(len(square)), where=square != 0)
