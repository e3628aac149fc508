"""Observers: how the range of an activation is found from the batches that pass."""

import dataclasses

import keras
import tensorflow as tf


class Observer:
    """Finds the range of a tensor from what it sees; use one of its subclasses."""

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
        raise NotImplementedError

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

    Args:
        momentum: What the average keeps at each batch, in [0, 1). A larger value is steadier and
            slower; the first batch counts in full whatever it is.

    Raises:
        ValueError: `momentum` is outside [0, 1).
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
        low, high = layer.extremes(x)
        # False for NaN and for an empty batch, whose minimum is +inf: those teach nothing.
        valid = low <= high
        rate = tf.where(valid, 1.0 - self.momentum, 0.0)
        for state, new in ((layer.low, low), (layer.high, high), (layer.weight, 1.0)):
            state.assign(state.value + rate * (tf.where(valid, new, 0.0) - state.value))

    def range(self, layer):
        # Divided by the total weight of what was seen, which debiases: Kingma and Ba, 2015, section 3.
        weight = tf.maximum(layer.weight.value, 1e-12)
        return layer.low.value / weight, layer.high.value / weight
