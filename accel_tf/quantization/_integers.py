"""What integer kernels compute between tensors, to the last bit, in steps of the grid of their output.

Floats come close to it, but where a result is almost halfway between two integers, close is not enough:
one output in some hundred thousand would be rounded to the other one, and a deep network magnifies
that as much as any rounding. So what computes the output of a kernel notes on it how the runtime does, and
FakeQuantize rounds that. The arithmetic is that of XNNPACK, which has LiteRT's kernels for CPUs, in
the same order: https://github.com/google/XNNPACK.
"""

import functools
import zlib

import keras
import numpy as np
import tensorflow as tf
from keras.src.ops import nn as nn_ops  # Keras exports the functions, not the operations.
from keras.src.ops import numpy as numpy_ops

from accel_tf.layers import Operator
from accel_tf.quantization._grids import (
    counted,
    fixed_point,
    grid_of,
    half_away,
    half_up,
    has_grid,
    note_steps,
    steps_of,
)

_L = keras.layers


def note(layer, inputs, y):
    """Notes on `y`, the output of a layer or operator, how the runtime computes it, where it is known."""
    operation, inputs = _operation(layer), keras.tree.flatten(inputs)
    if type(operation) in _LEAKY:
        return _noted(y, _leaky_relu(operation, *inputs, exact=y))
    kernel = _KERNELS.get(type(operation), _no_kernel)
    return _noted(y, kernel(operation, *inputs))


def joins(layer) -> bool:
    """Whether the inputs of a layer or operator share the grid of its output in a file."""
    return type(_operation(layer)) in _JOINING


def _operation(layer):
    return layer.operation if isinstance(layer, Operator) else layer


def total(x, y):
    """Returns x + y, noted."""
    return _noted(x + y, _sum(None, x, y))


def difference(x, y):
    """Returns x − y, noted."""
    return _noted(x - y, _sum(None, x, y, sign=-1.0))


def product(x, y):
    """Returns x · y, noted."""
    return _noted(x * y, _product(None, x, y))


def matrix_product(x, y, **transposed):
    """Returns the products of matrices that `tf.matmul` does, noted."""
    return _noted(tf.matmul(x, y, **transposed), _matrix_product(x, y, transposed))


def _noted(y, steps):
    return note_steps(y, steps) if steps else y


def _no_kernel(operation, *inputs):
    return None


def _sum(operation, *inputs, sign=1.0):
    if len(inputs) != 2 or not all(map(has_grid, inputs)):
        return None

    def steps(to):
        (a, one), (b, other) = (counted(x, to) for x in inputs)
        one, other = one / to.step, other / to.step
        # Both factors in multiples of 1 / unit, of which the larger one has 21 bits.
        exponent = tf.bitwise.right_shift(tf.bitcast(tf.maximum(one, other), tf.int32), 23) - 127
        unit = tf.pow(tf.constant(2.0, tf.float64), tf.cast(20 - exponent, tf.float64))
        one, other = (tf.round(tf.cast(f, tf.float64) * unit) / unit for f in (one, sign * other))
        sums = tf.cast(a, tf.float64) * one + tf.cast(b, tf.float64) * other
        return tf.cast(half_up(sums), tf.float32)

    return steps


def _product(operation, *inputs):
    if len(inputs) != 2 or not all(map(has_grid, inputs)):
        return None

    def steps(to):
        (a, one), (b, other) = (counted(x, to) for x in inputs)
        return a * b * (one * other / to.step)

    return steps


def _matrix_product(x, y, transposed):
    if not has_grid(x) or not has_grid(y):
        return None

    def steps(to):
        (a, one), (b, other) = (counted(v, to) for v in (x, y))
        a, b = tf.cast(a, tf.float64), tf.cast(b, tf.float64)
        sums, ratio = tf.matmul(a, b, **transposed), one * other / to.step
        exact = tf.cast(one, tf.float64) * tf.cast(other, tf.float64) / tf.cast(to.step, tf.float64)
        # XNNPACK takes it if the zero of the second factor is 0, else a kernel of LiteRT's own.
        own = tf.cast(fixed_point(sums, exact, half_away), tf.float32)
        return tf.where(grid_of(y).zero == 0, tf.cast(sums, tf.float32) * ratio, own)

    return steps


def _mean(operation, *inputs):
    if not has_grid(inputs[0]):
        return None

    def steps(to):
        (x,) = inputs
        (integers, step), zero = counted(x, to), grid_of(x).zero
        axes = list(range(1, len(x.shape) - 1))
        count = tf.cast(tf.reduce_prod(tf.shape(x)[1:-1]), tf.float32)
        total = tf.reduce_sum(integers + zero, axes, operation.keepdims)
        factor = step / to.step * (1 / count)
        return tf.round(total * factor + (to.zero - zero * count * factor)) - to.zero

    return steps


def _concatenation(operation, *inputs, join=tf.concat):
    """What comes from a kernel is rounded once, here; what is on a grid already goes to another."""

    def in_steps(x, to):
        if steps := steps_of(x):
            return steps(to)
        return _moved(x, operation, to) if has_grid(x) else x * (1 / to.step)

    return lambda to: join([in_steps(x, to) for x in inputs], operation.axis)


def _extreme(operation, *inputs, choose):
    """As a concatenation, its inputs are on the grid of its output, each rounded there."""

    def in_steps(x, to):
        if isinstance(x, tf.Tensor) and has_grid(x):
            return tf.round(_moved(x, operation, to))
        return tf.round(x * (1 / to.step))

    return lambda to: choose(*(in_steps(x, to) for x in inputs))


def moved(x, layer, quantizer):
    """Returns a tensor for a layer in a file whose inputs share the grid of its output, see `joins`.

    Left alone, the converter would move a tensor to this grid for all of its readers, and by an operator
    that takes 8 bits of the ratio of both steps. A product with a constant does it for this one, with
    24 bits.

    Args:
        x: An input of the concatenation.
        layer: The layer or operator.
        quantizer: The `FakeQuantize` of its output.
    """
    if not has_grid(x):
        return x
    with tf.init_scope():
        grid, to = grid_of(x), quantizer.current_grid()
        same = bool(_same(grid, to))
    return x if same else x * _nearly_one(_operation(layer))


def _nearly_one(operation) -> float:
    """Returns a factor that a converter keeps, and apart from that of another concatenation."""
    return 1 + (1 + zlib.crc32(operation.name.encode()) % 999) * 2.0**-23


def _moved(x, operation, to):
    """Returns a tensor on a grid in steps of another, see `moved`."""
    same = _same(grid_of(x), to)
    unit = tf.constant(_nearly_one(operation) / 255, tf.float32)  # As an integer the factor is 255.
    integers, step = counted(x, to)
    factor = tf.where(same, 1.0, step * unit / to.step)
    return integers * tf.where(same, 1.0, 255.0) * factor


def _same(grid, other):
    return (grid.step == other.step) & (grid.zero == other.zero)


def leaky_relu(x, slope: float, exact, to):
    """Returns the leaky ReLU of a tensor on a grid in steps of another, with 8 fractional bits of factors.

    Args:
        x: The tensor.
        slope: What numbers below 0 are multiplied by.
        exact: Its leaky ReLU in floats, for where no range of `x` is known yet.
        to: The other grid.
    """
    integers, step = counted(x, to)
    ratio = step / to.step
    factor = tf.where(integers > 0, tf.round(256 * ratio), tf.round(256 * (ratio * slope)))
    y = half_up(integers * factor / 256)
    return tf.where(grid_of(x).step > 0, y, exact * (1 / to.step))


def _leaky_relu(operation, *inputs, exact):
    slope = operation.negative_slope
    if not slope or not has_grid(inputs[0]):
        return None
    return functools.partial(leaky_relu, inputs[0], slope, exact)


def prelu(x, alpha, exact, to):
    """Returns the parametric ReLU of a tensor on a grid in steps of another, as LiteRT's own kernel does.

    Args:
        x: The tensor.
        alpha: What numbers below 0 are multiplied by, as integers of 8 bits times one step.
        exact: The parametric ReLU in floats, for where no range of `x` is known yet.
        to: The other grid.
    """
    integers, step = counted(x, to)
    fine = tf.maximum(tf.reduce_max(tf.abs(tf.cast(alpha, tf.float32))), 1e-12) / 127
    slopes = tf.cast(tf.round(tf.cast(alpha, tf.float32) / fine), tf.float64)
    integers = tf.cast(integers, tf.float64)
    ratios = step / to.step, step * fine / to.step
    more, less = (tf.cast(ratio, tf.float64) for ratio in ratios)
    below = fixed_point(integers * slopes, less, half_away)
    above = fixed_point(integers, more, half_away)
    y = tf.cast(tf.where(integers < 0, below, above), tf.float32)
    return tf.where(grid_of(x).step > 0, y, exact * (1 / to.step))


def resized(x, size, exact):
    """Returns an image on a grid resized bilinearly to the same grid, with 11 bits for each weight.

    Args:
        x: A tensor (batch, height, width, channels), of a height and width that are known.
        size: The new height and width.
        exact: The resized image in floats, for where no range of `x` is known yet, and for gradients.
    """
    grid = grid_of(x)
    step = tf.where(grid.step > 0, grid.step, 1.0)
    y = tf.cast(tf.round(tf.cast(x, tf.float32) / step) + grid.zero, tf.float64)
    for axis in (1, 2):
        low, high, weights = _neighbours(x.shape[axis], size[axis - 1])
        weights = weights.reshape([-1 if i == axis else 1 for i in range(4)])
        first, second = tf.gather(y, low, axis=axis), tf.gather(y, high, axis=axis)
        y = first * 2**11 + (second - first) * weights
    y = (tf.cast(half_up(y / 2**22), tf.float32) - grid.zero) * step
    y = tf.where(grid.step > 0, tf.cast(y, exact.dtype), exact)
    return exact + tf.stop_gradient(y - exact)


def _neighbours(size, new_size):
    """Returns for each new pixel of an axis the old ones beside it, and the weight of the second."""
    scale = np.float32(size) / np.float32(new_size)
    places = (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    places = np.clip(places, 0, size - 1)
    low = np.floor(places).astype(int)
    return low, np.minimum(low + 1, size - 1), np.round((places - low) * 2**11).astype(np.float64)


def hard_swish(x, exact, to):
    """Returns the hard swish of a tensor on a grid in steps of another, as LiteRT's own kernel does.

    That is x · clip(x / 6 + 1 / 2, 0, 1) with 16 bits for both factors, rounded half away from 0, but
    cut off in between: tensorflow/lite/kernels/internal/reference/hard_swish.h.

    Args:
        x: The tensor.
        exact: Its hard swish in floats, for where no range of `x` is known yet.
        to: The other grid.
    """
    integers, step = counted(x, to)
    # A grid has 256 numbers, so each result is computed once, and looked up.
    integers = tf.clip_by_value(tf.cast(integers, tf.int32), -255, 255)
    a = tf.range(-255, 256, dtype=tf.float64) * 128
    fine = step / 128
    (out, down), (gate, up) = _multiplier(fine / to.step), _multiplier(fine / (3 / 2**15))
    more, less = tf.maximum(up - 1, 0.0), tf.maximum(-up, 0.0)
    slope = _times(_saturated(a * 2.0**more), gate)
    slope = tf.where(up > 0, _saturated(slope * 2), half_away(slope / 2.0**less))
    slope = tf.floor((slope + 2**15) / 2)
    y = slope * _times(a, out) / 2**15
    y = tf.sign(y) * tf.floor(tf.abs(y))
    y = tf.gather(tf.cast(half_away(y / 2.0**-down), tf.float32), integers + 255)
    return tf.where(grid_of(x).step > 0, y, exact * (1 / to.step))


def _multiplier(ratio):
    """Returns a float32 scalar as m · 2^e, m from 2^14 to 2^15 − 1, for `_times`."""
    exponent = tf.bitwise.right_shift(tf.bitcast(ratio, tf.int32), 23) - 126
    exponent = tf.cast(exponent, tf.float64)
    m = half_up(tf.cast(ratio, tf.float64) * 2.0 ** (15 - exponent))
    return tf.minimum(m, 2.0**15 - 1), exponent


def _times(x, m):
    return half_up(x * m / 2**15)


def _saturated(x):
    return tf.clip_by_value(x, -(2.0**15), 2.0**15 - 1)


_LEAKY = (_L.LeakyReLU, _L.ReLU, nn_ops.LeakyRelu)
_MAXIMUM = functools.partial(_extreme, choose=tf.maximum)
_MINIMUM = functools.partial(_extreme, choose=tf.minimum)
_STACK = functools.partial(_concatenation, join=tf.stack)
_KERNELS = {
    **dict.fromkeys([_L.Add, numpy_ops.Add], _sum),
    **dict.fromkeys([_L.Subtract, numpy_ops.Subtract], functools.partial(_sum, sign=-1.0)),
    **dict.fromkeys([_L.Multiply, numpy_ops.Multiply], _product),
    **dict.fromkeys([_L.GlobalAveragePooling1D, _L.GlobalAveragePooling2D], _mean),
    **dict.fromkeys([_L.Concatenate, numpy_ops.Concatenate], _concatenation),
    numpy_ops.Stack: _STACK,
    **dict.fromkeys([_L.Maximum, numpy_ops.Maximum], _MAXIMUM),
    **dict.fromkeys([_L.Minimum, numpy_ops.Minimum], _MINIMUM),
}
_JOINING = {t for t, k in _KERNELS.items() if k in (_concatenation, _STACK, _MAXIMUM, _MINIMUM)}
