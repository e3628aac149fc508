"""Fake quantization: rounding tensors to their integer grid while computing in float.

Weights carry their range with them and are rounded by functions (_weights.py); activations need a
range that is observed, so they are rounded by a layer that keeps it.
"""

import contextlib
import contextvars
import functools
import math

import keras
import tensorflow as tf

from accel_tf.quantization._grids import Grid, grid_between, note_grid, steps_of
from accel_tf.quantization._observers import MovingAverage

# Below, a step would be so small that biases do not fit into 32 bits of it; above, sums overflow.
_NARROWEST, _WIDEST = 1e-9, 1e30

# How every FakeQuantize layer behaves while a verb runs; "" follows `training`.
_mode: contextvars.ContextVar[str] = contextvars.ContextVar("accel_tf_fake_quantize", default="")


@contextlib.contextmanager
def observing():
    """While it is entered, fake-quantized models observe ranges in inference, and round nothing.

    This is how `calibrate` runs a model: with ranges that are only being found, values would be
    clipped, and what is found behind them would depend on the order of the batches. A `tf.function`
    keeps the behaviour that it was traced with, so call the model eagerly or trace a new one inside.
    """
    with _enter("observe"):
        yield


@contextlib.contextmanager
def freezing(integers: bool = False):
    """While it is entered, ranges are Python constants, which is what a converter needs.

    Args:
        integers: Whether the converter makes integer operators, as LiteRT's does.
    """
    with _enter("freeze to integers" if integers else "freeze"):
        yield


@contextlib.contextmanager
def floating():
    """While it is entered, activations pass unrounded: for a converter that finds the ranges itself."""
    with _enter("float"):
        yield


@contextlib.contextmanager
def _enter(mode):
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def unrounded():
    """While it is entered, neither activations nor weights are rounded: the model is a float one."""
    with _enter("off"):
        yield


@contextlib.contextmanager
def applying():
    """While it is entered, ranges stay as they are, even while others are observed."""
    with _enter("off" if is_unrounded() else "apply"):
        yield


def is_observing(training) -> bool:
    """Whether ranges are observed now, by training or by calibration."""
    return _mode.get() == "observe" or (bool(training) and not _mode.get())


def frozen() -> bool:
    """Whether a model is being converted, so that ranges are constants and nothing is trained."""
    return _mode.get() in ("freeze", "freeze to integers", "float")


@contextlib.contextmanager
def evaluated():
    """While it is entered, a model that is being converted computes numbers at once, not in its graph."""
    with tf.init_scope() if frozen() else contextlib.nullcontext():
        yield


def becomes_integers() -> bool:
    """Whether a converter makes integer operators of the model now."""
    return _mode.get() == "freeze to integers"


def apart(x):
    """Returns a tensor that is in float where a converter makes integers, and `x` otherwise.

    Left alone, the converter computes the operators behind `x` on the grid of `x`, and those before
    `x` on the grid of what comes behind them, also where these operators need floats.
    """
    return x * (1 + 2.0**-23) if becomes_integers() and x.dtype.is_floating else x


def passes() -> bool:
    """Whether activations pass unrounded now."""
    return _mode.get() in ("float", "off", "observe")


def is_unrounded() -> bool:
    """Whether nothing is rounded now, see `unrounded` and `observing`."""
    return _mode.get() in ("off", "observe")


@keras.saving.register_keras_serializable(package="accel_tf")
class FakeQuantize(keras.layers.Layer):
    """Rounds an activation to an integer grid whose range is observed during training.

    The range is widened to contain 0, so that zero padding is exact, and shifted by less than half
    a step so that 0 falls on the grid. Values outside the range are clipped and get no gradient;
    inside, the gradient passes straight through. In inference the range is frozen. A layer that
    has not seen any data yet passes its input unchanged.

    Args:
        bits: Width of the integers, 2 to 16.
        observer: How the range is found; `MovingAverage()` if not given.
        fixed: `(low, high)` for a range that is known beforehand, such as a softmax's; nothing is
            observed then.
        symmetric: Whether 0 is the middle of the grid, whose integers are −(2^(bits−1) − 1) and up.
        nonnegative: Whether the values are known to be 0 or more, as a ReLU's are; that saves the
            search for a minimum, and half of the gradient.
        **kwargs: As for any Keras layer.

    Example:

    >>> import numpy as np
    >>> from accel_tf.quantization import FakeQuantize
    >>> quantize = FakeQuantize(bits=2)
    >>> np.asarray(quantize(np.array([0.0, 0.9, 1.2, 3.0]), training=True)).tolist()
    [0.0, 1.0, 1.0, 3.0]
    >>> quantize.range
    (0.0, 3.0)
    """

    def __init__(
        self, bits=8, observer=None, fixed=None, symmetric=False, nonnegative=False, **kwargs
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.bits = bits
        self.observer = observer or MovingAverage()
        self.fixed = None if fixed is None else tuple(fixed)
        self.symmetric = symmetric
        self.nonnegative = nonnegative
        self.used = False  # whether anything was to be observed in this process

    def build(self, input_shape=None):
        if self.fixed is None:
            self.observer.build(self)
        self.built = True

    def state(self, name, shape=(), trainable=False, constraint=None):
        """Makes a float32 variable of zeros that the observer keeps, as the attribute `name`."""
        # Each replica computes the same numbers from all replicas' batches (see `extremes`), so any
        # one of them is the value to keep.
        variable = self.add_weight(
            name=name,
            shape=shape,
            dtype="float32",
            initializer="zeros",
            trainable=trainable,
            constraint=constraint,
            autocast=False,
            aggregation="mean" if trainable else "only_first_replica",
        )
        setattr(self, name, variable)

    def call(self, inputs, training=None):
        x = tf.cast(inputs, tf.float32)
        dtype = inputs.dtype if inputs.dtype.is_floating else self.compute_dtype  # uint8 images
        observes = self.fixed is None and is_observing(training)
        if observes:
            self.used = True
            self.observer.observe(self, x)
        if passes():
            y = x
        elif self.fixed is not None:
            y = self.round(x, *self.fixed)
        elif frozen():
            y = self.round(x, *self.ends)
        elif observes:
            y = self.observer.fake_quantize(self, x)
        else:
            count = steps_of(inputs)
            y = tf.cond(self.observer.seen(self), lambda: self._apply(x, count), lambda: x)
        y = tf.cast(y, dtype)
        return y if passes() else note_grid(y, self.current_grid)

    def _apply(self, x, count):
        """Returns `x` on the frozen grid, as the runtime rounds it: halves to even.

        Args:
            x: A float32 tensor.
            count: A function from the grid to `x` in its steps as an integer kernel computes them, to
                the last bit; `None` for what is no kernel's output.
        """
        low, high = self.limits()
        if self.bits > 8:  # A float does not tell sums from their neighbours.
            return self.round(x, low, high)
        grid = self.current_grid()
        step, zero = grid.step, grid.zero
        steps = count(grid) if count else x * (1 / step)
        lowest, highest = self.symmetric - 2.0 ** (self.bits - 1), 2.0 ** (self.bits - 1) - 1
        y = tf.clip_by_value(tf.round(steps), lowest - zero, highest - zero) * step
        inside = tf.cast((x >= low) & (x <= high), x.dtype)
        return _in_place_of(x * tf.stop_gradient(inside), y)

    def current_grid(self) -> Grid:
        """Returns the grid as it is now, as tensors."""
        low, high = self.limits() if self.fixed is None else self.fixed
        grid = grid_between(low, high, self.bits, self.symmetric)
        known = True if self.fixed else self.observer.seen(self)
        return grid._replace(exact_step=tf.where(known, grid.exact_step, 0.0))

    @property
    def calibrating(self) -> bool:
        """Whether ranges are to be observed though nothing is trained, see `observing`."""
        return _mode.get() == "observe"

    def extremes(self, x) -> tuple:
        """Returns the minimum and maximum of `x`, over all replicas of a strategy.

        Also whether both are finite: they are not if a value is NaN or infinite, or if there is none.
        """
        low = tf.zeros(()) if self.nonnegative else tf.reduce_min(x)
        high = tf.reduce_max(x)
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            lows, highs = replica.all_gather([low[None], high[None]], axis=0)
            low, high = tf.reduce_min(lows), tf.reduce_max(highs)
        return low, high, tf.math.is_finite(high - low)

    def over_replicas(self, x):
        """Returns the sum of `x` over all replicas of a strategy."""
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, x)
        return x

    @property
    def range(self) -> tuple[float, float]:
        """The frozen range as Python floats, 0 included.

        Raises:
            ValueError: No data has been seen yet, or the values are so large or so small that
                there is no grid for them.
        """
        if self.fixed is not None:
            return self.fixed
        with tf.init_scope():  # Also while a graph is traced, the numbers are wanted.
            if self.built and self.observer.seen(self):
                # Under a strategy the values of variables are no tensors yet.
                self._check(*(float(tf.convert_to_tensor(x)) for x in self.observer.range(self)))
                low, high = self.grid(*self.observer.range(self))
                return float(low), float(high)
        raise ValueError(
            f"The range of {self.path or self.name!r} is unknown: no data has been seen. "
            "Train the model with fit, or make it with calibrate, first."
        )

    def _check(self, low, high):
        size = max(abs(low), abs(high))
        if math.isfinite(size) and (size == 0 or _NARROWEST < size < _WIDEST):
            return
        raise ValueError(
            f"The range of {self.path or self.name!r} is [{low:.3g}, {high:.3g}], for which there is "
            f"no grid: values have to reach {_NARROWEST:g} and stay below {_WIDEST:g}. "
            "Scale the data, or look for a layer before it that diverges."
        )

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest number of the grid: `range`, shifted so that 0 falls on it.

        Raises:
            ValueError: As for `range`.
        """
        if self.fixed is not None:
            return self.fixed
        _ = self.range  # An unknown range is an error.
        with tf.init_scope():
            low, high = self.limits()
            return float(low), float(high)

    @property
    def scale(self) -> float:
        """The step between neighbours on the grid, in the units of the activation."""
        low, high = self.range
        return (high - low) / (2**self.bits - 1 - self.symmetric)

    @property
    def zero_point(self) -> int:
        """The integer that stands for 0, for integers from −2^(bits−1) up."""
        return 0 if self.symmetric else round(-self.ends[0] / self.scale) - 2 ** (self.bits - 1)

    def limits(self) -> tuple:
        """Returns the ends of the grid as tensors."""
        low, high = self.grid(*self.observer.range(self))
        if self.symmetric:
            return low, high
        # TensorFlow and the converter would shift it as well, but not the same way where 0 is halfway
        # between two numbers of the grid, as for images in −1 to 1.
        steps = 2**self.bits - 1
        step = (high - low) / steps
        zero = tf.round(-low * steps / (high - low))
        return -zero * step, (steps - zero) * step

    def grid(self, low, high) -> tuple:
        """Returns the range of an observer with 0 included, tensors of any shape."""
        low, high = tf.minimum(low, 0.0), tf.maximum(high, 0.0)
        # A tensor that is always 0 has no scale; any will do.
        high = tf.where(high - low > _NARROWEST, high, low + 1.0)
        if self.symmetric:
            high = tf.maximum(high, -low)
            low = -high
        return low, high

    def round(self, x, low, high):
        """Returns `x` on the grid between two ends, with the gradient straight through inside."""
        fake_quant = functools.partial(
            tf.quantization.fake_quant_with_min_max_vars,
            min=low,
            max=high,
            num_bits=self.bits,
            narrow_range=self.symmetric,
        )
        if not self.nonnegative or frozen():
            return fake_quant(x)

        @tf.custom_gradient
        def rounded(x):
            # The operation's own gradient takes three passes over the tensor.
            def gradient(dy):
                return dy * tf.cast(x <= high, dy.dtype)

            return fake_quant(x), gradient

        return rounded(x)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = {
            "bits": self.bits,
            "observer": keras.saving.serialize_keras_object(self.observer),
            "fixed": self.fixed,
            "symmetric": self.symmetric,
            "nonnegative": self.nonnegative,
        }
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config):
        observer = keras.saving.deserialize_keras_object(config["observer"])
        return cls(**{**config, "observer": observer})


@tf.custom_gradient
def _in_place_of(x, y):
    """Returns `y` with the gradient of `x`."""
    return y, lambda dy: (dy, None)
