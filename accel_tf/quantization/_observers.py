"""Observers: how the range of an activation is found from the batches that pass.

An observer is a small immutable object that says how; what it has found is kept in variables of the
`FakeQuantize` layer that it is given, so a model file has both.
"""

import dataclasses

import keras
import tensorflow as tf


class Observer:
    """Finds the range of a tensor from what it sees; use one of its subclasses.

    A batch with a NaN or an infinite value, and one without any value, teaches an observer nothing.
    """

    def build(self, layer) -> None:
        """Makes the state variables on `layer`, by `layer.state(name, shape)`; one is `weight`."""
        raise NotImplementedError

    def seen(self, layer):
        """Returns whether `layer` has seen data, a boolean scalar tensor."""
        return layer.weight.value > 0

    def observe(self, layer, x) -> None:
        """Takes a float32 tensor into account."""
        raise NotImplementedError

    def range(self, layer) -> tuple:
        """Returns `(low, high)` as scalar float32 tensors, from the state."""
        return layer.low.value, layer.high.value

    def fake_quantize(self, layer, x):
        """Returns `x` on the grid of the range so far, as it is done in training."""
        return layer.round(x, *layer.limits())

    def get_config(self) -> dict:
        """Returns the constructor's arguments, for `from_config`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict) -> "Observer":
        """Returns the observer that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class MovingAverage(Observer):
    """The moving average of each batch's minimum and maximum, debiased as Adam's moments are.

    It follows a model whose activations change, so it is the one to train with.

    Args:
        momentum: What the average keeps at each batch, in [0, 1). A larger value is steadier and
            slower; the first batch counts in full whatever it is.

    Raises:
        ValueError: `momentum` is outside [0, 1).

    Example:

    >>> import numpy as np
    >>> from accel_tf.quantization import FakeQuantize, MovingAverage
    >>> quantize = FakeQuantize(observer=MovingAverage(0.5))
    >>> for batch in ([0.0, 1.0], [0.0, 4.0]):
    ...     _ = quantize(np.array(batch), training=True)
    >>> quantize.range  # (0.25 · 1 + 0.5 · 4) / 0.75
    (0.0, 3.0)

    Reference:
        Jacob et al., CVPR 2018, section 3.1; the debiasing is Kingma and Ba's, ICLR 2015, section 3.
    """

    momentum: float = 0.99

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"{type(self).__name__} needs a momentum in [0, 1): the fraction of the ranges "
                f"kept at each batch. Received momentum={self.momentum!r}."
            )

    def build(self, layer):
        for name in ("low", "high", "weight"):
            layer.state(name)

    def observe(self, layer, x):
        low, high, valid = layer.extremes(x)
        rate = tf.where(valid, 1.0 - self.momentum, 0.0)
        for state, new in ((layer.low, low), (layer.high, high), (layer.weight, 1.0)):
            state.assign(state.value + rate * (tf.where(valid, new, 0.0) - state.value))

    def start(self, layer, low, high) -> None:
        """Begins with a range that was found otherwise, as if it were that of all batches so far."""
        for state, value in ((layer.low, low), (layer.high, high), (layer.weight, 1.0)):
            state.assign(value)

    def range(self, layer):
        weight = tf.maximum(layer.weight.value, 1e-12)  # the total weight of all that was seen
        return layer.low.value / weight, layer.high.value / weight


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest value ever seen: nothing is clipped, whatever an outlier costs.

    Example:

    >>> import numpy as np
    >>> from accel_tf.quantization import FakeQuantize, MinMax
    >>> quantize = FakeQuantize(observer=MinMax())
    >>> for batch in ([-1.0, 1.0], [0.0, 4.0]):
    ...     _ = quantize(np.array(batch), training=True)
    >>> quantize.range
    (-1.0, 4.0)

    Reference:
        Krishnamoorthi, arXiv:1806.08342, section 3.1.
    """

    def build(self, layer):
        for name in ("low", "high", "weight"):
            layer.state(name)

    def observe(self, layer, x):
        remember_extremes(layer, *layer.extremes(x))


def remember_extremes(layer, low, high, valid, names=("low", "high")) -> tuple:
    """Widens the range in a layer's state to a batch's, if that is valid; returns it.

    Both are finite then, so 0 times them is 0; `weight` counts the batches.
    """
    first = layer.weight.value == 0
    results = []
    for name, new, widen in zip(names, (low, high), (tf.minimum, tf.maximum), strict=True):
        old = getattr(layer, name).value
        wider = tf.where(first, new, widen(old, new))
        results.append(tf.where(valid, wider, old))
        getattr(layer, name).assign(results[-1])
    layer.weight.assign(layer.weight.value + tf.cast(valid, tf.float32))
    return tuple(results)


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Learned(Observer):
    """A range that the optimizer trains together with the weights (LSQ, and LSQ+ for its offset).

    It starts at the minimum and maximum of the first batch, or of all the data of `calibrate`, and
    then follows the gradient of the loss, which knows what clipping and rounding cost. It pays with
    4 bits and less; in layers with `trainable=False` the range stays where it started. A lower end
    at 0, as after a ReLU, stays 0.

    With step s, zero point z and Q the largest number of steps from the anchor, the derivative of
    the rounded value x̂ with respect to s is that of LSQ,

        ∂x̂/∂s = round(x/s) − x/s inside the range, Q above it, 0 below (−Q on a symmetric grid),

    times 1/√(N·Q) for a tensor of N values. The variable is the width Q·s of the range and its
    gradient is scaled accordingly: SGD moves s as in the paper, and the steps of Adam, which are
    about as large as its learning rate, are small in relation to it.

    Example:

    >>> import keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> quantized = at.quantize_aware(model, at.Int8(at.quantization.Learned()))
    >>> [v.name for v in quantized.layers[0].trainable_variables]
    ['width', 'low']

    Reference:
        Esser et al., "Learned step size quantization", ICLR 2020, equation 3 and section 2.2;
        Bhalgat et al., "LSQ+", CVPR Workshops 2020, section 3.1.
    """

    def build(self, layer):
        layer.state("width", trainable=True, constraint=_positive)
        layer.state("low", trainable=True, constraint=_not_positive)
        layer.state("weight")

    def observe(self, layer, x):
        low, high, valid = layer.extremes(x)
        low, high = tf.minimum(low, 0.0), tf.maximum(high, 0.0)
        if layer.calibrating:  # the union of all batches
            old_low, old_high = self.range(layer)
            low, high = tf.minimum(low, old_low), tf.maximum(high, old_high)
        else:
            valid &= layer.weight.value == 0
        width = tf.maximum(high, -low) if layer.symmetric else high - low
        # Assigned at every step, as in a branch no replica may wait for the others.
        layer.width.assign(tf.where(valid, tf.maximum(width, _SMALLEST), layer.width.value))
        layer.low.assign(tf.where(valid, low, layer.low.value))
        layer.weight.assign(layer.weight.value + tf.cast(valid, tf.float32))

    def range(self, layer):
        width, low = layer.width.value, layer.low.value
        if layer.symmetric:
            return -width, width
        return low, low + width

    def fake_quantize(self, layer, x):
        largest = float(2 ** (layer.bits - 1) - 1 if layer.symmetric else 2**layer.bits - 1)

        grid = layer.limits()

        @tf.custom_gradient
        def rounded(x, width, low):
            y = layer.round(x, *grid)

            def gradient(dy):
                # d x̂ / d(Q·s) is 1/Q of that by s, and to move s as in the paper it takes Q² of it.
                size = tf.cast(tf.size(x), tf.float32)
                factor = largest**1.5 * tf.math.rsqrt(tf.maximum(size, 1.0))
                above, below = x > grid[1], x < grid[0]
                inside = tf.where(above | below, 0.0, y - x) / width
                ends = tf.cast(above, tf.float32)
                if layer.symmetric:
                    ends -= tf.cast(below, tf.float32)
                to_width = tf.reduce_sum(dy * (inside + ends)) * factor
                to_low = tf.reduce_sum(tf.where(above | below, dy, 0.0)) * factor
                to_low = tf.zeros_like(low) if layer.symmetric else tf.where(low < 0, to_low, 0.0)
                return tf.where(above | below, 0.0, dy), to_width, to_low

            return y, gradient

        return rounded(x, layer.width.value, layer.low.value)


_SMALLEST = 1e-8


def _positive(width):
    return tf.maximum(width, _SMALLEST)


def _not_positive(low):
    return tf.minimum(low, 0.0)
