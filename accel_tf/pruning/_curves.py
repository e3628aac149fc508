"""The schedules beyond TFMOT's: other curves from one sparsity to another, cycles, and functions.

All of them reach their final sparsity at the last update, whether `frequency` divides their length or
not. They compute in float64 and round, so that what rises rises in float32, too.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from accel_tf.pruning._schedules import Schedule, _as_given, _epoch, require_integer

_ROUNDING = 1e-9  # shares of a cycle are rounded; updates are much farther apart


@dataclasses.dataclass(frozen=True, repr=False)
class _Curve(Schedule):
    """What the curves share: a function `_curve` of the progress, from 0 to 1 at the last update."""

    final_sparsity: float
    end_step: int | None = None
    initial_sparsity: float = 0.0
    begin_step: int = 0
    frequency: int = 100
    begin_epoch: float | None = _epoch()
    end_epoch: float | None = _epoch()

    def __post_init__(self):
        self._validate("initial_sparsity", "final_sparsity")
        self._validate_ramp(f"initial_sparsity={self.initial_sparsity}")

    @property
    def reached_at(self) -> int:
        return self._last_update()

    def sparsity_at(self, step):
        since = tf.cast(self._steps(step) - self.begin_step, tf.float64)
        done = tf.clip_by_value(since / (self._last_update() - self.begin_step), 0.0, 1.0)
        # The ends are exact: what remains of the final sparsity is what the user wrote.
        level = tf.where(done >= 1.0, tf.cast(self.final_sparsity, tf.float64), self._curve(done))
        return _as_given(tf.cast(level, tf.float32), step)

    def _curve(self, done: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, repr=False)
class CosineDecay(_Curve):
    """Raises the sparsity from `initial_sparsity` to `final_sparsity` along half a cosine: slow, fast, slow.

    With s_i, s_f the initial and final sparsity and x the progress from the first update to the last,
    from 0 to 1, the sparsity is s_f + (s_i − s_f)·(1 + cos(π·x)) / 2, constant outside. Unlike
    `PolynomialDecay` it leaves a model that has not been trained some time before most weights go.

    Args:
        final_sparsity: The fraction of zeros from the last update on, in [0, 1).
        end_step: The last update is at this step, or less than `frequency` before.
        initial_sparsity: The fraction of zeros at `begin_step`, in [0, 1).
        begin_step: The first update; with 0 it happens when `prune` is called.
        frequency: Steps between updates.
        begin_epoch, end_epoch: Epochs instead of steps, see `Schedule.in_steps`; fractions are
            fine.

    Raises:
        ValueError: An argument is out of its range, or the schedule ends before its second update.

    Example:

    >>> schedule = CosineDecay(final_sparsity=0.9, end_step=1000)
    >>> [round(schedule.sparsity_at(step), 2) for step in (0, 250, 500, 1000, 2000)]
    [0.0, 0.13, 0.45, 0.9, 0.9]

    Reference: the curve is that of Loshchilov and Hutter, "SGDR" (2017), equation 5, for learning
    rates; https://arxiv.org/abs/1608.03983.
    """

    def _curve(self, done):
        left = (1.0 + tf.cos(math.pi * done)) / 2.0
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left


@dataclasses.dataclass(frozen=True, repr=False)
class ExponentialDecay(_Curve):
    """Removes the same fraction of the weights that remain at each update: the density decays.

    With s_i, s_f the initial and final sparsity and x the progress from the first update to the last,
    from 0 to 1, the sparsity is 1 − (1 − s_i)·((1 − s_f) / (1 − s_i))^x, constant outside. That is
    iterative magnitude pruning, without its rewinding of the weights.

    Args:
        final_sparsity: The fraction of zeros from the last update on, in [0, 1).
        end_step: The last update is at this step, or less than `frequency` before.
        initial_sparsity: The fraction of zeros at `begin_step`, in [0, 1).
        begin_step: The first update; with 0 it happens when `prune` is called.
        frequency: Steps between updates.
        begin_epoch, end_epoch: Epochs instead of steps, see `Schedule.in_steps`; fractions are
            fine.

    Raises:
        ValueError: An argument is out of its range, or the schedule ends before its second update.

    Example:

    >>> schedule = ExponentialDecay(final_sparsity=0.9375, end_step=400)  # halved four times
    >>> [schedule.sparsity_at(step) for step in (0, 100, 200, 300, 400)]
    [0.0, 0.5, 0.75, 0.875, 0.9375]

    Reference: Frankle and Carbin, "The lottery ticket hypothesis" (2019), section 1: each of n rounds
    prunes p^(1/n) of the weights that survive; https://arxiv.org/abs/1803.03635.
    """

    def _curve(self, done):
        density = 1.0 - self.initial_sparsity
        return 1.0 - density * ((1.0 - self.final_sparsity) / density) ** done


@dataclasses.dataclass(frozen=True, repr=False)
class Cyclical(Schedule):
    """Prunes in cycles; each but the last ends with weights growing back, so that mistakes can heal.

    Every cycle starts at `initial_sparsity` and rises to `final_sparsity` as `PolynomialDecay`, and
    its last update reaches it; the next update starts the next cycle. After the last cycle the
    sparsity stays. Of the weights that were zero, those grow back that the optimizer's latest step
    moved most; they start from that step.

    Args:
        final_sparsity: The fraction of zeros at the end of each cycle, in [0, 1).
        end_step: The last update is at this step, or less than `frequency` before.
        cycles: How many, at least 1; each needs two updates.
        initial_sparsity: The fraction of zeros at the start of each cycle, below `final_sparsity`.
        begin_step: The first update; with 0 it happens when `prune` is called.
        power: The exponent of `PolynomialDecay`, greater than 0.
        frequency: Steps between updates.
        begin_epoch, end_epoch: Epochs instead of steps, see `Schedule.in_steps`; fractions are
            fine.

    Raises:
        ValueError: An argument is out of its range, or the cycles have fewer than two updates.

    Example:

    >>> schedule = Cyclical(0.9, end_step=700, cycles=2, initial_sparsity=0.5)
    >>> [round(schedule.sparsity_at(step), 2) for step in range(0, 801, 100)]
    [0.5, 0.78, 0.89, 0.9, 0.5, 0.78, 0.89, 0.9, 0.9]

    Reference: Srinivas et al., "Cyclical pruning for sparse neural networks" (2022);
    https://arxiv.org/abs/2202.01290.
    """

    final_sparsity: float
    end_step: int | None = None
    cycles: int = 3
    initial_sparsity: float = 0.0
    begin_step: int = 0
    power: float = 3
    frequency: int = 100
    begin_epoch: float | None = _epoch()
    end_epoch: float | None = _epoch()

    def __post_init__(self):
        self._validate("initial_sparsity", "final_sparsity")
        require_integer("Cyclical: cycles", self.cycles, 1)
        if not self.power > 0:
            raise ValueError(f"Cyclical: power must be > 0. Received: {self.power!r}")
        if not self.initial_sparsity < self.final_sparsity:
            raise ValueError(
                "Cyclical: initial_sparsity, to which each cycle goes back, must be lower than "
                f"final_sparsity. Received: {self.initial_sparsity!r} and {self.final_sparsity!r}"
            )
        self._validate_ramp(f"its {self.cycles} cycles", updates=2 * self.cycles)

    @property
    def reached_at(self) -> int:
        return self._last_update()

    def sparsity_at(self, step):
        # In units of updates, of which each cycle has its share. The final sparsity is reached one
        # unit before the share is used up: whatever it is, exactly one update falls within that unit.
        updates = (self._last_update() - self.begin_step) // self.frequency + 1
        share = updates / self.cycles
        since = tf.cast(self._steps(step) - self.begin_step, tf.float64) / self.frequency
        since = tf.clip_by_value(since, 0.0, updates - 1.0)
        cycle = tf.floor(since / share + _ROUNDING)
        done = (since - cycle * share) / (share - 1.0)
        done = tf.where(done > 1.0 - _ROUNDING, tf.ones_like(done), tf.maximum(done, 0.0))
        left = tf.pow(1.0 - done, tf.cast(self.power, tf.float64))
        level = self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left
        return _as_given(tf.cast(level, tf.float32), step)


@dataclasses.dataclass(frozen=True, repr=False)
class FunctionSchedule(Schedule):
    """Prunes as a Python function of the step says, whatever it computes with.

    The function is asked when the schedule is made, once for each update; training reads the answers
    from a table. So it runs in graphs and under XLA, and need not be a TensorFlow function.
    Between updates, before the first and after the last, the sparsity holds.

    `prune(model, function, steps=…)` makes one itself.

    Args:
        function: Called with an `int`, the step; returns the fraction of zeros, in [0, 1).
        end_step: The last update is at this step, or less than `frequency` before.
        begin_step: The first update; with 0 it happens when `prune` is called.
        frequency: Steps between updates.
        begin_epoch, end_epoch: Epochs instead of steps, see `Schedule.in_steps`; fractions are
            fine. The function is called with steps all the same.

    Raises:
        ValueError: An argument is out of its range, or what the function returns.

    Example:

    >>> schedule = FunctionSchedule(lambda step: 0.9 * step / 1000, end_step=1000)
    >>> [round(schedule.sparsity_at(step), 2) for step in (0, 199, 200, 1000, 2000)]
    [0.0, 0.09, 0.18, 0.9, 0.9]
    """

    function: Callable[[int], float]
    end_step: int | None = None
    begin_step: int = 0
    frequency: int = 100
    begin_epoch: float | None = _epoch()
    end_epoch: float | None = _epoch()

    def __post_init__(self):
        if not callable(self.function):
            raise ValueError(
                f"FunctionSchedule expects a function step -> sparsity. Received: {self.function!r}"
            )
        self._validate()
        self._validate_ramp("its first value")
        if not self.counts_epochs:
            updates = range(self.begin_step, self._last_update() + 1, self.frequency)
            object.__setattr__(self, "_table", np.array([*map(self._ask, updates)], np.float32))

    @property
    def reached_at(self) -> int:
        return self._last_update()

    def sparsity_at(self, step):
        index = (self._steps(step) - self.begin_step) // self.frequency
        index = tf.clip_by_value(index, 0, len(self._table) - 1)
        return _as_given(tf.gather(tf.constant(self._table), index), step)

    def _ask(self, step: int) -> float:
        level = self.function(step)
        try:
            valid = 0.0 <= float(level) < 1.0
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(
                f"FunctionSchedule: the function must return the fraction of zeros, in [0, 1). At "
                f"step {step} it returned {level!r}."
            )
        return float(level)
