"""Sparsity as a function of the training step, number by number as in TFMOT.

A schedule *updates* the mask at the steps `begin_step, begin_step + frequency, …` up to `end_step`;
in between, the mask holds. Step 0 is the moment `prune` is called, step t follows the t-th optimizer
step. The arithmetic of the two that TFMOT has, too, is its own, float32 and TensorFlow's, so that
both agree to the last bit. `_curves` has the schedules that TFMOT does not have.
"""

import dataclasses
import functools
import math

import numpy as np
import tensorflow as tf

from accel_tf.pruning._config import Configured


class Schedule(Configured):
    """What the schedules share: the steps at which they update the mask, and their configuration.

    A subclass is a frozen dataclass with `begin_step`, `end_step` (-1: there is no end) and
    `frequency`, and implements `sparsity_at`. It may have `begin_epoch` and `end_epoch`, to be
    given instead of the steps; `prune` then asks for `steps_per_epoch`.
    """

    @property
    def reached_at(self) -> int:
        """The update that reaches the highest sparsity; training has to go on at least that long."""
        return self.begin_step

    def sparsity_at(self, step):
        """Returns the sparsity that the schedule prescribes at `step`, be it an update or not.

        Args:
            step: An `int`, a sequence of them, or an integer tensor (also inside `tf.function`).

        Returns:
            A fraction in [0, 1), as a `float` for an `int`, else as a float32 tensor of the shape
            of `step`, which may differ from it in the last bit.
        """
        raise NotImplementedError

    def updates_at(self, step):
        """Returns whether the mask is updated at `step`.

        Args:
            step: An `int`, a sequence of them, or an integer tensor (also inside `tf.function`).

        Returns:
            A `bool` for an `int`, else a bool tensor of the shape of `step`.
        """
        at = self._steps(step)
        due = (at >= self.begin_step) & ((at - self.begin_step) % self.frequency == 0)
        if self.end_step >= 0:
            due &= at <= self.end_step
        return _as_given(due, step)

    def latest_update(self, step):
        """Returns the last step, at or before `step`, at which the mask is updated.

        Args:
            step: An `int`, a sequence of them, or an integer tensor (also inside `tf.function`).

        Returns:
            The step, as an `int` or a tensor as `step` is; -1 before the first update.
        """
        at = self._steps(step)
        inside = at if self.end_step < 0 else tf.minimum(at, tf.cast(self.end_step, at.dtype))
        since = inside - self.begin_step
        latest = tf.where(since < 0, tf.constant(-1, at.dtype), inside - since % self.frequency)
        return _as_given(latest, step)

    @property
    def counts_epochs(self) -> bool:
        """Whether it begins or ends at an epoch, so that it has no steps before `in_steps`."""
        return any(getattr(self, f"{edge}_epoch", None) is not None for edge in ("begin", "end"))

    @property
    def epochs_unknown(self) -> str:
        """What to say where steps are needed, and epochs were given."""
        return (
            f"{self!r} counts in epochs. How many optimizer steps has one? Pass "
            "prune(…, steps_per_epoch=…): it is ceil(len(x) / batch_size), or len(dataset)."
        )

    def in_steps(self, steps_per_epoch: int) -> "Schedule":
        """Returns the schedule with `begin_epoch` and `end_epoch` as steps; `prune` does it itself.

        Epoch e ends with the step e · `steps_per_epoch`. The end is that of the last update until
        then, so that the final sparsity is reached.

        Args:
            steps_per_epoch: The optimizer's steps in an epoch, an integer ≥ 1.

        Raises:
            ValueError: `steps_per_epoch` is not what is expected; or in steps, the schedule has no
                room for its updates.

        Example:

        >>> PolynomialDecay(0.9, end_epoch=10, frequency=20).in_steps(25)
        PolynomialDecay(final_sparsity=0.9, end_step=240, initial_sparsity=0.0, begin_step=0, power=3, frequency=20)
        """
        require_integer("steps_per_epoch", steps_per_epoch, 1)
        if not self.counts_epochs:
            return self
        changes, begin = {}, self.begin_step
        if self.begin_epoch is not None:
            begin = round(self.begin_epoch * steps_per_epoch)
            changes |= {"begin_step": begin, "begin_epoch": None}
        if getattr(self, "end_epoch", None) is not None:
            length = max(round(self.end_epoch * steps_per_epoch) - begin, 0)
            # As it is if there is no room for an update: the error is about what was asked for.
            end = begin + (length // self.frequency * self.frequency or length)
            changes |= {"end_step": end, "end_epoch": None}
        return dataclasses.replace(self, **changes)

    def __repr__(self):
        arguments = (f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({', '.join(arguments)})"

    def _steps(self, step) -> tf.Tensor:
        if self.counts_epochs:
            raise ValueError(self.epochs_unknown)
        return step if tf.is_tensor(step) else tf.convert_to_tensor(step, tf.int64)

    def _last_update(self) -> int:
        """The last update at or before `end_step`, in Python's numbers, hence also within a graph."""
        return (
            self.begin_step + (self.end_step - self.begin_step) // self.frequency * self.frequency
        )

    def _validate(self, *sparsities: str):
        name = type(self).__name__
        for field in sparsities:
            value = getattr(self, field)
            if not 0.0 <= value < 1.0:
                raise ValueError(
                    f"{name}: {field} is the fraction of zeros, in [0, 1). Received: {value!r}"
                )
        for edge, default in (("begin", (0,)), ("end", (-1, None))):
            epoch = getattr(self, f"{edge}_epoch", None)
            if epoch is not None and getattr(self, f"{edge}_step") not in default:
                raise ValueError(f"{name}: give {edge}_step or {edge}_epoch, not both: {self!r}")
            if epoch is not None and not (0 <= epoch < math.inf):
                raise ValueError(f"{name}: {edge}_epoch must be ≥ 0. Received: {epoch!r}")
        for field, least in (("begin_step", 0), ("end_step", -1), ("frequency", 1)):
            value = getattr(self, field)
            if value is None:  # to be known in steps
                continue
            require_integer(f"{name}: {field}", value, least)
            if field in self.__dict__:
                object.__setattr__(self, field, int(value))

    def _validate_ramp(self, initial: str, updates: int = 2):
        """Whether there is an end, and room for so many updates until then."""
        name = type(self).__name__
        if self.end_step is None and self.end_epoch is None:
            raise ValueError(f"{name} needs end_step or end_epoch, at which it reaches its end.")
        if self.counts_epochs:
            return
        if self.end_step - self.begin_step < (updates - 1) * self.frequency:
            raise ValueError(
                f"{name} never gets past {initial}: the steps from begin_step={self.begin_step} to "
                f"end_step={self.end_step} are fewer than frequency={self.frequency}, the steps "
                f"between two updates{'' if updates == 2 else f', of which it needs {updates}'}. "
                "Lower frequency or raise end_step."
            )


def _epoch():
    """A field for an epoch, which may be given instead of a step."""
    return dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True, repr=False)
class ConstantSparsity(Schedule):
    """Prunes to one sparsity at once, and holds it.

    Each update chooses the smallest weights anew, so that another weight may take a pruned one's
    place; the sparsity stays.

    Args:
        sparsity: The fraction of zeros, in [0, 1).
        begin_step: The first update; with 0 it happens when `prune` is called.
        end_step: The mask is not updated after this step, only held; -1 means there is no end.
        frequency: Steps between updates.
        begin_epoch, end_epoch: Epochs instead of steps, see `Schedule.in_steps`; fractions are
            fine.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> schedule = ConstantSparsity(0.75, begin_step=200)
    >>> schedule.updates_at(200), schedule.updates_at(250), schedule.sparsity_at(250)
    (True, False, 0.75)

    Reference: `ConstantSparsity` of the TensorFlow Model Optimization Toolkit (TFMOT), where our
    `sparsity` is called `target_sparsity`.
    """

    sparsity: float
    begin_step: int = 0
    end_step: int = -1
    frequency: int = 100
    begin_epoch: float | None = _epoch()
    end_epoch: float | None = _epoch()

    def __post_init__(self):
        self._validate("sparsity")
        if not self.counts_epochs and 0 <= self.end_step < self.begin_step:
            raise ValueError(
                f"ConstantSparsity never prunes: it ends at step {self.end_step}, before it begins "
                f"at {self.begin_step}. Use end_step=-1 for no end."
            )

    def sparsity_at(self, step):
        shape = tf.shape(self._steps(step))
        return _as_given(tf.fill(shape, tf.constant(self.sparsity, tf.float32)), step)


@dataclasses.dataclass(frozen=True, repr=False)
class OneShot(Schedule):
    """Prunes to one sparsity at one step, and never chooses again.

    `ConstantSparsity` lets another weight take a pruned one's place at later updates; this does not.

    Args:
        sparsity: The fraction of zeros after the step, in [0, 1).
        begin_step: The step; with 0 it happens when `prune` is called.
        begin_epoch: The epoch after which it happens, instead of the step.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> schedule = OneShot(0.75, begin_step=200)
    >>> [schedule.sparsity_at(step) for step in (0, 199, 200, 1000)]
    [0.0, 0.0, 0.75, 0.75]

    Reference: the one-shot pruning of Han et al., "Learning both weights and connections for
    efficient neural networks" (2015); https://arxiv.org/abs/1506.02626.
    """

    sparsity: float
    begin_step: int = 0
    begin_epoch: float | None = _epoch()

    @property
    def end_step(self) -> int:
        """The step of the only update."""
        return self.begin_step

    @property
    def frequency(self) -> int:
        """There is one update only."""
        return 1

    def __post_init__(self):
        self._validate("sparsity")

    def sparsity_at(self, step):
        after = self._steps(step) >= self.begin_step
        return _as_given(tf.where(after, tf.constant(self.sparsity, tf.float32), 0.0), step)


@dataclasses.dataclass(frozen=True, repr=False)
class PolynomialDecay(Schedule):
    """Raises the sparsity from `initial_sparsity` to `final_sparsity`, fast at first, then slowly.

    With s_i, s_f the initial and final sparsity, t_0 = `begin_step`, t_1 = `end_step`, the sparsity
    at step t is s_f + (s_i − s_f)·(1 − (t − t_0) / (t_1 − t_0))^power, constant outside [t_0, t_1].

    Args:
        final_sparsity: The fraction of zeros at `end_step` and ever after, in [0, 1).
        end_step: The step at which `final_sparsity` is reached. Choose it so that some training is
            left to recover, and `end_step - begin_step` a multiple of `frequency`: the last update
            is the last multiple, and its sparsity is what remains.
        initial_sparsity: The fraction of zeros at `begin_step`, in [0, 1).
        begin_step: The first update; with 0 it happens when `prune` is called.
        power: The exponent, greater than 0; 3 is the paper's.
        frequency: Steps between updates.
        begin_epoch, end_epoch: Epochs instead of steps, see `Schedule.in_steps`; fractions are
            fine.

    Raises:
        ValueError: An argument is out of its range, or the schedule ends before its second update,
            so that it would never leave `initial_sparsity`.

    Example:

    >>> schedule = PolynomialDecay(final_sparsity=0.9, end_step=1000)
    >>> [round(schedule.sparsity_at(step), 2) for step in (0, 250, 500, 1000, 2000)]
    [0.0, 0.52, 0.79, 0.9, 0.9]
    >>> schedule.latest_update(730)
    700

    Reference: Zhu and Gupta, "To prune, or not to prune" (2017), equation 1;
    https://arxiv.org/abs/1710.01878. `PolynomialDecay` of TFMOT.
    """

    final_sparsity: float
    end_step: int | None = None
    initial_sparsity: float = 0.0
    begin_step: int = 0
    power: float = 3
    frequency: int = 100
    begin_epoch: float | None = _epoch()
    end_epoch: float | None = _epoch()

    def __post_init__(self):
        self._validate("initial_sparsity", "final_sparsity")
        if not self.power > 0:
            raise ValueError(f"PolynomialDecay: power must be > 0. Received: {self.power!r}")
        self._validate_ramp(f"initial_sparsity={self.initial_sparsity}")

    @property
    def reached_at(self) -> int:
        return self.latest_update(self.end_step)

    def sparsity_at(self, step):
        done = tf.cast(self._steps(step) - self.begin_step, tf.float32)
        done = tf.clip_by_value(done / (self.end_step - self.begin_step), 0.0, 1.0)
        missing = (self.initial_sparsity - self.final_sparsity) * tf.pow(1.0 - done, self.power)
        return _as_given(missing + self.final_sparsity, step)


@functools.lru_cache
def levels(schedule: Schedule) -> np.ndarray:
    """Returns the sparsity at each update of `schedule` in turn, float32; the last holds ever after.

    Training looks the sparsity up in this table. TensorFlow's `pow` of a scalar, of a vector, in a
    graph and under XLA differ in the last bit, and one bit can decide about one weight.
    """
    updates = range(schedule.begin_step, schedule.reached_at + 1, schedule.frequency)
    return np.array([schedule.sparsity_at(step) for step in updates], np.float32)


def require_integer(what, value, least):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{what} must be an integer. Received: {value!r}")
    if value < least:
        raise ValueError(f"{what} must be ≥ {least}. Received: {value}")


def _as_given(value, step):
    """Answers an `int` with a Python number, and everything else with a tensor."""
    return value.numpy().item() if isinstance(step, (int, np.integer)) else value
