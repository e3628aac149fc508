"""The grid of a tensor, noted on the tensor: for biases, and for what keeps the grid of its input.

An integer kernel adds up products of an integer of its input and one of its weights, so that its bias
is a whole number of the product of both steps. What quantizes a tensor notes its grid there, and what
keeps the grid hands it on. Behind anything else it is unknown, and biases stay what they are. What
computes the output of a kernel notes how the runtime does that, to the last bit (_integers.py).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

_GRID, _SUMS, _STEPS = "_accel_tf_grid", "_accel_tf_sums", "_accel_tf_steps"


class Grid(NamedTuple):
    """The integers that stand for activations.

    Attributes:
        exact_step: What an integer more is worth, a float64 scalar; 0 while no range is known.
        zero: The integer that stands for 0, a float32 scalar.
    """

    exact_step: tf.Tensor
    zero: tf.Tensor

    @property
    def step(self):
        """The step as a file has it, float32."""
        return tf.cast(self.exact_step, tf.float32)

    def rounded(self, mean, x):
        """Returns `mean(x)` rounded to the grid, as LiteRT does: halves away from the integer 0.

        Args:
            mean: A function that takes means of the elements of a tensor.
            x: A tensor on the grid. The gradient passes straight through.
        """
        step = tf.where(self.step > 0, self.step, 1.0)
        # Of integers, so that a half is a half.
        y = mean(tf.round(tf.cast(x, tf.float32) / step) + self.zero)
        y = (half_away(y) - self.zero) * step
        exact = mean(x)
        y = tf.where(self.step > 0, tf.cast(y, exact.dtype), exact)
        return exact + tf.stop_gradient(y - exact)


def grid_between(low, high, bits: int, symmetric: bool) -> Grid:
    """Returns the grid of a range of float32 numbers, as the converter computes it.

    Args:
        low, high: The ends of the range, which 0 lies in.
        bits: Width of the integers.
        symmetric: Whether the integer 0 stands for 0.
    """
    step = tf.cast(high, tf.float64) - tf.cast(low, tf.float64)
    step /= 2**bits - 1 - symmetric
    zero = tf.round(-low / tf.cast(step, tf.float32)) - 2 ** (bits - 1)
    return Grid(step, 0.0 if symmetric else zero)


class Sums(NamedTuple):
    """How the sums of a kernel without activation are rounded.

    Attributes:
        source: The step of the input, a float64 scalar; 0 while no range is known.
        limit: The largest magnitude of each channel's weights, once rounded, float32, (channels,).
        levels: The integer that stands for it.
        bias: The bias as it was, float32, (channels,); 0.0 without.
        rounded: The bias on the grid, which the sums have.
        own: Whether a kernel of LiteRT's own rounds them, and not one of XNNPACK.
    """

    source: tf.Tensor
    limit: tf.Tensor
    levels: int
    bias: tf.Tensor | float = 0.0
    rounded: tf.Tensor | float = 0.0
    own: bool = False

    @property
    def step(self):
        """The step of the sums, float32, (channels,), to the bit of what the runtime computes."""
        return tf.cast(self.source, tf.float32) * (self.limit / self.levels)

    def counted(self, x, grid: Grid):
        """Returns sums in steps of a grid."""
        step = _known(self.step, grid)
        integers = tf.round(x / step)
        if not self.own:
            return integers * (step / grid.step)
        exact = tf.cast(tf.cast(self.source, tf.float32), tf.float64)
        exact = _known(exact * tf.cast(self.limit / self.levels, tf.float64), grid)
        ratio = exact / tf.cast(grid.step, tf.float64)
        return tf.cast(fixed_point(tf.cast(integers, tf.float64), ratio, half_up), tf.float32)

    def round(self, value):
        """Returns a bias on the grid of the sums, as the converter rounds it, in float64."""
        exact = tf.cast(value, tf.float64)
        step = self.source * (tf.cast(self.limit, tf.float64) / self.levels)
        known = step > 0
        integers = half_away(exact / tf.where(known, step, 1.0))
        return tf.cast(tf.where(known, integers * step, exact), tf.float32)

    def with_bias(self, value):
        """Returns these sums with a bias, and this bias on their grid, in its own shape."""
        if self.limit.shape[0] != value.shape.num_elements():
            return self, unequal(value)  # shared by several channels
        sums, rounded = self.plus(tf.reshape(value, (-1,)))
        return sums, tf.reshape(rounded, value.shape)

    def times(self, factor):
        """Returns the sums when each channel is multiplied by a factor."""
        scaled = (self.limit * tf.abs(factor), self.bias * factor, self.rounded * factor)
        return self._replace(**dict(zip(("limit", "bias", "rounded"), scaled, strict=True)))

    def plus(self, offset):
        """Returns the sums with an offset in their bias, and what to add to them for it."""
        bias = self.bias + offset
        # As the converter adds both parts up, in float32.
        total = self.rounded + (self.round(bias) - self.rounded)
        rounded = unequal(total, self.rounded)
        return self._replace(bias=bias, rounded=rounded), rounded - self.rounded


def unequal(bias, part=0.0):
    """Returns a bias whose numbers are not all equal, unless they are 0 or there is only one.

    A converter stores equal numbers as one, and then rounds this number with the scale of the first
    channel for all channels. The last number is moved by less than a millionth, which is far less
    than half of any scale.

    Args:
        bias: Float tensor of any shape.
        part: What the converter adds up to `bias` with another constant, in the shape of `bias`: the
            difference between the numbers has to be larger than the rounding error of this sum.
    """
    count = bias.shape.num_elements()
    if count < 2:
        return bias
    flat = tf.reshape(bias, (-1,))
    size = tf.maximum(tf.abs(bias), tf.abs(tf.cast(part, bias.dtype)))
    last = tf.one_hot(count - 1, count, dtype=bias.dtype) * 2.0**-21
    moved = bias + size * tf.reshape(last, bias.shape)
    return tf.where(tf.reduce_all(flat == flat[0]), moved, bias)


def half_away(x):
    """Returns numbers rounded, halves away from 0; `tf.round` takes them to even ones."""
    return tf.sign(x) * tf.floor(tf.abs(x) + 0.5)


def half_up(x):
    """Returns numbers rounded, halves up."""
    return tf.floor(x + 0.5)


def fixed_point(sums, ratio, last):
    """Returns integers times a ratio, rounded as LiteRT's own kernels do.

    The ratio has 31 bits and an exponent. The product is rounded twice, before and after the shift by
    the exponent: tensorflow/lite/kernels/internal/common.h, MultiplyByQuantizedMultiplier.

    Args:
        sums: The integers, float64 of any shape.
        ratio: Positive, float64 of a shape that fits.
        last: How the second rounding takes halves: `half_away` or `half_up`.
    """
    exponent = tf.cast(tf.bitwise.right_shift(tf.bitcast(ratio, tf.int64), 52) - 1022, tf.float64)
    m = half_away(ratio * 2.0 ** (31 - exponent))
    left, right = tf.maximum(exponent, 0.0), tf.maximum(-exponent, 0.0)
    return last(half_up(sums * 2.0**left * m / 2.0**31) / 2.0**right)


def note_grid(x, grid: Callable[[], Grid]):
    """Notes on `x` a function that returns its grid; returns `x`."""
    setattr(x, _GRID, grid)
    return x


def grid_of(x) -> Grid | None:
    """Returns the grid that `x` is on, `None` if it is unknown."""
    grid = getattr(x, _GRID, None)
    return grid and grid()


def has_grid(x) -> bool:
    """Whether a grid was noted on `x`."""
    return hasattr(x, _GRID)


def counted(x, to: Grid):
    """Returns the integers of a tensor on a grid, less its zero, and the step, float32.

    Args:
        x: A tensor that a grid was noted on.
        to: The grid that it is counted for.
    """
    step = _known(grid_of(x).step, to)
    return tf.round(tf.cast(x, tf.float32) / step), step


def _known(step, to):
    """Returns the step to count in: where no range is known yet there are floats, and a fine step."""
    return tf.where(step > 0, step, tf.cast(to.step, step.dtype) * 2.0**-16)


def requantized(x, to: Grid):
    """Returns a tensor on a grid, rounded to another, in its steps: halves up."""
    integers, step = counted(x, to)
    ratio = tf.cast(step / to.step, tf.float64)  # which the runtime computes in float32
    return tf.cast(half_up(tf.cast(integers, tf.float64) * ratio), tf.float32)


def note_sums(x, sums: Sums):
    """Notes on `x` that it consists of such sums; returns `x`."""
    setattr(x, _SUMS, sums)
    return x


def sums_of(x) -> Sums | None:
    """Returns what `note_sums` noted on `x`, if anything."""
    return getattr(x, _SUMS, None)


def note_steps(x, steps: Callable[[Grid], tf.Tensor]):
    """Notes on `x` how the runtime computes it; returns `x`.

    Args:
        x: A tensor.
        steps: A function from a grid to `x` in its steps, which are still to be rounded.
    """
    setattr(x, _STEPS, steps)
    return x


def steps_of(x) -> Callable[[Grid], tf.Tensor] | None:
    """Returns how the runtime computes `x` in steps of a grid, `None` where that is unknown."""
    if x.dtype != tf.float32:
        return None  # Sums cannot be told from their neighbours.
    if steps := getattr(x, _STEPS, None):
        return steps
    sums = sums_of(x)
    if sums is None or sums.limit.shape[0] != x.shape[-1]:
        return None
    return functools.partial(sums.counted, x)


def hand_on(x, y):
    """Notes on `y` what is noted on `x`; returns `y`."""
    for name in (_GRID, _SUMS, _STEPS):
        if (noted := getattr(x, name, None)) is not None:
            setattr(y, name, noted)
    return y
