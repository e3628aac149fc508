"""Schemes: the number format of a quantized model, and how the ranges of activations are observed."""

import dataclasses
import fnmatch
from typing import ClassVar

import keras

from accel_tf import report
from accel_tf.quantization._observers import Observer


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What every scheme says about a layer; use one of its subclasses.

    Attributes:
        weight_bits: Width of the weights' integers; 16 with `weight_type` "float" for half floats.
        activation_bits: Width of the activations' integers; `None` where they stay in float.
        symmetric: Whether the grid of activations has its zero point at 0.
        per_channel: Whether each output channel's weights have a scale of their own; else all weights of
            a tensor share one.
        group_size: How many consecutive weights along the input axis share a scale; `None` for one
            scale per output channel.
    """

    weight_bits: ClassVar[int] = 8
    weight_type: ClassVar[str] = "int"
    activation_bits: ClassVar[int | None] = None
    symmetric: ClassVar[bool] = False
    per_channel = True  # not annotated, so that it comes last among the fields of Int8
    group_size: ClassVar[int | None] = None

    def get_config(self) -> dict:
        """Returns the constructor's arguments, for `from_config`."""
        config = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: keras.saving.serialize_keras_object(v) if isinstance(v, Observer) else v
            for name, v in config.items()
        }

    def with_default(self, observer: Observer) -> "Scheme":
        """Returns the scheme with that observer, unless it has one or has none to choose."""
        if getattr(self, "observer", observer) is None:
            return dataclasses.replace(self, observer=observer)
        return self

    @classmethod
    def from_config(cls, config: dict) -> "Scheme":
        """Returns the scheme that `get_config` described."""
        return cls(**{name: _object(value) for name, value in config.items()})


def _object(value):
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True)
class _Activations(Scheme):
    """A scheme whose activations are integers, of ranges that are observed."""

    observer: Observer | None = None

    def __post_init__(self):
        if not isinstance(self.observer, Observer | None):
            raise ValueError(
                f"{type(self).__name__} expects an observer such as MovingAverage(), received "
                f"{self.observer!r}."
            )


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Int8(_Activations):
    """8-bit weights and activations, as LiteRT's integer kernels compute.

    Weights are symmetric with one scale per output channel, integers in [−127, 127]; activations
    are asymmetric with one scale and zero point per tensor, integers in [−128, 127].

    Args:
        observer: How the range of an activation is found: `MovingAverage()`, `MinMax()`,
            `Percentile()`, `MSE()`, `Entropy()` or `Learned()` from `accel_tf.quantization`. By
            default `calibrate` takes all values that it sees, and training the moving average, from
            there on if the model was calibrated.
        per_channel: Whether each output channel's weights have a scale of their own. With `False` all
            weights of a kernel share one, which some NPUs and microcontrollers need; it costs
            accuracy where channels differ in size. Call `accel_tf.fuse` before, as a
            BatchNormalization that is folded into a kernel makes channels differ.

    Raises:
        ValueError: `observer` is none.

    Example:

    >>> import accel_tf as at
    >>> at.Int8()
    Int8(observer=None, per_channel=True)

    Reference:
        Jacob et al., CVPR 2018, section 3.1; LiteRT 8-bit quantization specification.
    """

    activation_bits: ClassVar[int | None] = 8
    per_channel: bool = True


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Int16x8(_Activations):
    """8-bit weights and 16-bit activations, symmetric, for models that 8 bits cost accuracy.

    Args:
        observer: As in `Int8`.

    Example:

    >>> import accel_tf as at
    >>> at.Int16x8().activation_bits
    16

    Reference:
        LiteRT, "Post-training integer quantization with int16 activations".
    """

    activation_bits: ClassVar[int | None] = 16
    symmetric: ClassVar[bool] = True


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Int8Weights(Scheme):
    """8-bit weights, symmetric with one scale per output channel; activations stay in float.

    A LiteRT file of it is four times smaller, and its kernels round activations to 8 bits as they
    meet them, each batch with a range of its own ("dynamic range").

    Example:

    >>> import accel_tf as at
    >>> at.Int8Weights().activation_bits is None
    True
    """


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Int4Weights(Scheme):
    """4-bit weights, integers in [−7, 7], with a scale for each group of inputs; float activations.

    Args:
        group_size: How many consecutive weights along a kernel's input axis share a scale, ≥ 1. The
            last group is smaller where it does not divide; `None` for one scale per output channel.

    Raises:
        ValueError: `group_size` is not a positive integer.

    Example:

    >>> import accel_tf as at
    >>> at.Int4Weights(group_size=64).weight_bits
    4

    Reference:
        Frantar et al., "GPTQ", ICLR 2023, section 4, on groups.
    """

    group_size: int | None = 32

    weight_bits: ClassVar[int] = 4

    def __post_init__(self):
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"group_size must be a positive integer or None, received {size!r}.")


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Float16(Scheme):
    """Weights as half-precision floats, half the size, and computation in float.

    Example:

    >>> import accel_tf as at
    >>> at.Float16().weight_bits
    16
    """

    weight_bits: ClassVar[int] = 16
    weight_type: ClassVar[str] = "float"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A scheme of its own for some layers, and a default for the rest.

    Args:
        schemes: For each path of a layer, or pattern with `*` and `?`, its scheme, or `None` to
            leave it in float. Paths are those that `accel_tf.report_of` shows; the path of a nested
            model means all of it. Where several match, the first counts.
        default: The scheme of all other layers; `None` leaves them in float.

    Raises:
        ValueError: Something else than a scheme stands where one belongs.

    Example:

    >>> import accel_tf as at
    >>> mixed = at.Mixed({"head": at.Int16x8(), "block?/*": at.Int8Weights()}, default=at.Int8())
    >>> mixed.of("head").activation_bits
    16
    """

    schemes: dict
    default: Scheme | None = Int8()

    def __post_init__(self):
        for name, scheme in [*self.schemes.items(), ("default", self.default)]:
            if not isinstance(scheme, Scheme | None):
                raise ValueError(
                    f"Mixed expects a scheme such as Int8(), or None for float, for {name!r}; "
                    f"received {scheme!r}."
                )

    def with_default(self, observer: Observer) -> "Mixed":
        """Returns the same with that observer, for those of the schemes that have chosen none."""
        schemes = {name: s and s.with_default(observer) for name, s in self.schemes.items()}
        return Mixed(schemes, self.default and self.default.with_default(observer))

    def of(self, path: str) -> Scheme | None:
        """Returns the scheme of the layer at `path`, or `None` if it stays in float."""
        for pattern, scheme in self.schemes.items():
            if matches(path, pattern):
                return scheme
        return self.default


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern means the layer at `path`, itself or by the model that it is in."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern + "/*")


def schemes_by_path(scheme, exclude, paths):
    """Returns a function from the path of a layer to its scheme, `None` if it stays in float.

    Args:
        scheme: A scheme for all layers, or a `Mixed`.
        exclude: Patterns of paths to leave in float.
        paths: All paths that there are; a pattern has to match one.
    """
    if isinstance(exclude, str):
        raise ValueError(f"exclude expects a list of paths, received the string {exclude!r}.")
    paths = list(paths)
    mixed = scheme if isinstance(scheme, Mixed) else Mixed({}, scheme)
    for what, patterns in (("exclude=", exclude), ("Mixed: ", mixed.schemes)):
        for pattern in patterns:
            if not any(matches(path, pattern) for path in paths):
                raise ValueError(
                    f"{what}{pattern!r} matches no layer. There are {report.shorten(paths)}."
                )
    return lambda path: None if any(matches(path, p) for p in exclude) else mixed.of(path)
