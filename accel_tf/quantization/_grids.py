"""The grid of a tensor, noted on the tensor: for biases, and for what keeps the grid of its input.

An integer kernel adds up products of an integer of its input and one of its weights, so that its bias
is a whole number of the product of both steps. What quantizes a tensor notes its grid there, and what
keeps the grid hands it on. Behind anything else it is unknown, and biases stay what they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

_GRID, _SUMS = "_accel_tf_grid", "_accel_tf_sums"


class Grid(NamedTuple):
    """The integers that stand for activations.

    Attributes:
        step: What an integer more is worth, a float32 scalar; 0 while no range is known.
        zero: The integer that stands for 0, float32 as well.
    """

    step: tf.Tensor
    zero: tf.Tensor

    def rounded(self, mean, x):
        """Returns `mean(x)` rounded to the grid, as LiteRT does: halves away from the integer 0.

        Args:
            mean: A function that takes means of the elements of a tensor.
            x: A tensor on the grid. The gradient passes straight through.
        """
        step = tf.where(self.step > 0, self.step, 1.0)
        # Of integers, so that a half is a half.
        y = mean(tf.round(tf.cast(x, tf.float32) / step) + self.zero)
        y = (tf.sign(y) * tf.floor(tf.abs(y) + 0.5) - self.zero) * step
        exact = mean(x)
        y = tf.where(self.step > 0, tf.cast(y, exact.dtype), exact)
        return exact + tf.stop_gradient(y - exact)


class Sums(NamedTuple):
    """How the sums of a kernel without activation are rounded.

    Attributes:
        step: The step of the sums, float32, (channels,).
        rest: What rounding took from the bias, float32, (channels,); 0.0 without bias.
    """

    step: tf.Tensor
    rest: tf.Tensor | float = 0.0

    def round(self, value):
        """Returns numbers on the grid of the sums; where their step is 0, it is unknown."""
        known = self.step > 0
        step = tf.where(known, self.step, 1.0)
        return tf.where(known, tf.round(value / step) * step, value)

    def bias(self, variable):
        """Returns a bias on the grid of the sums."""
        value = tf.cast(variable.value, tf.float32)
        if self.step.shape[0] != variable.shape.num_elements():
            return value  # shared by several channels
        return tf.reshape(self.round(tf.reshape(value, (-1,))), value.shape)

    def without(self, variable, bias):
        """Returns these sums with what rounding took from a bias as their rest."""
        rest = tf.cast(variable.value, tf.float32) - bias
        return self._replace(rest=tf.reshape(rest, (-1,)))

    def times(self, factor):
        """Returns the sums when each channel is multiplied by a factor."""
        return Sums(self.step * tf.abs(factor), self.rest * factor)


def note_grid(x, grid: Callable[[], Grid]):
    """Notes on `x` a function that returns its grid; returns `x`."""
    setattr(x, _GRID, grid)
    return x


def grid_of(x) -> Grid | None:
    """Returns the grid that `x` is on, `None` if it is unknown."""
    grid = getattr(x, _GRID, None)
    return grid and grid()


def note_sums(x, sums: Sums):
    """Notes on `x` that it consists of such sums; returns `x`."""
    setattr(x, _SUMS, sums)
    return x


def sums_of(x) -> Sums | None:
    """Returns what `note_sums` noted on `x`, if anything."""
    return getattr(x, _SUMS, None)


def hand_on(x, y):
    """Notes on `y` what is noted on `x`; returns `y`."""
    for name in (_GRID, _SUMS):
        if (noted := getattr(x, name, None)) is not None:
            setattr(y, name, noted)
    return y
