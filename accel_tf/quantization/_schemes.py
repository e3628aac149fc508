"""Schemes: the number format of a quantized model, and how the ranges of activations are observed."""

import dataclasses
from typing import ClassVar

import keras


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Int8:
    """8-bit weights and activations, as LiteRT's integer kernels compute.

    Weights are symmetric with one scale per output channel, integers in [−127, 127]; activations
    are asymmetric with one scale and zero point per tensor, integers in [−128, 127]. The range of
    an activation is the moving average of each batch's minimum and maximum, debiased as Adam's
    moments are, so that the first batch already counts in full.

    Args:
        momentum: What the moving average of the ranges keeps at each batch, in [0, 1). A larger
            value is steadier and slower.

    Raises:
        ValueError: `momentum` is outside [0, 1).

    Example:

    >>> import accel_tf as at
    >>> at.Int8(momentum=0.9)
    Int8(momentum=0.9)

    Reference:
        Jacob et al., CVPR 2018, section 3.1; LiteRT 8-bit quantization specification.
    """

    momentum: float = 0.99

    weight_bits: ClassVar[int] = 8
    activation_bits: ClassVar[int] = 8

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"{type(self).__name__} needs a momentum in [0, 1): the fraction of the ranges "
                f"kept at each batch. Received momentum={self.momentum!r}."
            )

    def get_config(self) -> dict:
        """Returns the constructor's arguments, for `from_config`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict) -> "Int8":
        """Returns the scheme that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Int4(Int8):
    """4-bit weights, integers in [−7, 7], with 8-bit activations.

    For training and for measuring what four bits cost: `accel_tf.export.litert` refuses it, as the
    file would store the weights in eight bits and be neither smaller nor faster.

    Args:
        momentum: As in `Int8`.

    Example:

    >>> from accel_tf.quantization import Int4
    >>> Int4().weight_bits
    4
    """

    weight_bits: ClassVar[int] = 4
