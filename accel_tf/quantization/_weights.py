"""Rounding weights to the format of a scheme, with the gradient passing straight through."""

import math

import tensorflow as tf

from accel_tf.quantization._fake import frozen, passes
from accel_tf.quantization._grids import Grid, grid_between


def round_weights(weights, scheme, axes: tuple[int, ...] = (-1,)):
    """Rounds weights to the format of a scheme.

    Args:
        weights: Float tensor of any shape.
        scheme: An `Int8`, `Int4Weights`, `Float16`, …
        axes: The channel axes, as for `fake_quantize_weights`.

    Returns:
        A tensor of the same shape and dtype; the gradient passes straight through.
    """
    if scheme.weight_type == "float":
        return straight_through(lambda w: tf.cast(tf.cast(w, tf.float16), w.dtype), weights)
    if not scheme.per_channel:
        axes = ()
    return fake_quantize_weights(weights, scheme.weight_bits, axes, scheme.group_size)


def fake_quantize_weights(
    weights, bits: int = 8, axes: tuple[int, ...] = (-1,), group_size: int | None = None
):
    """Rounds weights to a symmetric grid with one scale per channel.

    The gradient passes straight through the rounding (Bengio et al., 2013, arXiv:1308.3432).

    Args:
        weights: Float tensor of any shape.
        bits: Width of the integers, 2 to 16; they span [−(2^(bits−1) − 1), 2^(bits−1) − 1].
        axes: The channel axes: entries that differ in their index along one of these have scales
            of their own. Empty for one scale per tensor.
        group_size: How many consecutive weights of a channel share a scale, in the order of its
            other axes; the last group may be smaller. `None` for all of them.

    Returns:
        A tensor of the same shape and dtype, whose values are integers times the scale.

    Example:

    >>> from accel_tf.quantization import fake_quantize_weights
    >>> fake_quantize_weights([[7.0, -14.0], [1.2, 4.9]], bits=4).numpy().tolist()
    [[7.0, -14.0], [1.0, 4.0]]
    """
    weights = tf.convert_to_tensor(weights)
    others, kept = _split(weights, axes)
    count = math.prod(weights.shape[axis] for axis in others)
    if group_size is None or group_size >= count:
        scale = _steps(limits_of_channels(weights, axes), bits)
    else:
        scale = _steps(_limits_of_groups(weights, others, kept, count, group_size), bits)
    # Plain operations, not tf.quantization.fake_quant: a converter folds them into the constant,
    # folds a BatchNormalization on top, and finds the same per-channel grid again by itself.
    return straight_through(lambda w: tf.round(w / scale) * scale, weights)


def _split(weights, axes) -> tuple[list[int], list[int]]:
    """Returns the other axes of a tensor, and these, both in order."""
    rank = len(weights.shape)
    kept = {axis % rank for axis in axes}
    return [axis for axis in range(rank) if axis not in kept], sorted(kept)


def limits_of_channels(weights, axes: tuple[int, ...]):
    """Returns the largest magnitude of each channel, with other axes than `axes` of size 1."""
    others, _ = _split(weights, axes)
    return tf.reduce_max(tf.abs(weights), axis=others, keepdims=True)


def _steps(limit, bits):
    # A channel of zeros stays zero; its scale only has to be different from 0.
    return tf.stop_gradient(tf.maximum(limit, 1e-12)) / (2 ** (bits - 1) - 1)


def _limits_of_groups(weights, others, kept, count, group_size):
    """Returns the largest magnitude of each weight's group, in the shape of the weights."""
    order = [*others, *kept]
    flat = tf.reshape(tf.transpose(tf.abs(weights), order), (count, -1))
    groups = -(-count // group_size)
    padded = tf.pad(flat, [[0, groups * group_size - count], [0, 0]])
    limit = tf.reduce_max(tf.reshape(padded, (groups, group_size, -1)), axis=1)
    spread = tf.repeat(limit, group_size, axis=0)[:count]
    moved = tf.reshape(spread, [weights.shape[axis] for axis in order])
    return tf.transpose(moved, [order.index(axis) for axis in range(len(order))])


def round_like_activations(weights, scheme):
    """Rounds weights to one grid with a zero point, as the activations of a scheme have it.

    Args:
        weights: Float tensor of any shape.
        scheme: An `Int8` or `Int16x8`; one without integer activations rounds as weights do.
    """
    if passes():
        return weights
    if not scheme.activation_bits:
        return round_weights(weights, scheme, ())
    x, (low, high), bits = (
        tf.cast(weights, tf.float32),
        _ends(weights, scheme),
        scheme.activation_bits,
    )
    y = tf.quantization.fake_quant_with_min_max_vars(x, low, high, bits, scheme.symmetric)
    return tf.cast(y, weights.dtype)


def activation_grid(weights, scheme) -> Grid:
    """Returns the grid that `round_like_activations` rounds weights to; the arguments are the same."""
    return grid_between(*_ends(weights, scheme), scheme.activation_bits, scheme.symmetric)


def _ends(weights, scheme):
    x = tf.cast(weights, tf.float32)
    low, high = tf.minimum(tf.reduce_min(x), 0.0), tf.maximum(tf.reduce_max(x), 0.0)
    high = tf.where(high - low > 1e-9, high, low + 1.0)
    if scheme.symmetric:
        high = tf.maximum(high, -low)
        low = -high
    return tf.stop_gradient(low), tf.stop_gradient(high)


def straight_through(rounding, weights):
    # A file needs no gradient, and tracing one for each layer would double the time to write it.
    return rounding(weights) if frozen() else tf.grad_pass_through(rounding)(weights)
