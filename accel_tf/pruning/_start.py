"""What is said when training starts: that it is too short, or that weights were replaced.

A constraint is called within the training step, so the first call of a training is the first moment
at which both are known: `fit` has told the model how long it trains, and weights that a callback
restores are back.
"""

import dataclasses
import warnings
import weakref

import keras
import numpy as np
import tensorflow as tf

from accel_tf.report import shorten

# The share of a training within which a schedule that is proposed ends: the rest is for recovery.
SHARE = 0.75


class TrainingStart:
    """Warns, once per training, of what one call of `prune`, `train_sparse` or `cluster` holds.

    Each constraint of that call has it called in each training step. It asks the `members` of the call:
    `shortfall(batches)` returns what so many batches leave undone, or ""; `replaced()` returns the paths
    of the weights that no longer are what the call made of them.

    Args:
        model: The model that the verb was applied to.
        verb: The name of the verb.
        optimizer: The optimizer that was passed to the verb, or `None`.
    """

    def __init__(self, model: keras.Model, verb: str, optimizer=None):
        self.members: list = []
        self._model, self._verb, self._optimizer = model, verb, optimizer
        self._fit, self._graph = None, None

    def __call__(self) -> None:
        """Warns if this is the first call of a training, or of a training step that is traced."""
        graph = tf.compat.v1.get_default_graph() if tf.inside_function() else None
        with tf.init_scope():
            if (batches := self.batches()) is not None:
                for text in dict.fromkeys(member.shortfall(batches) for member in self.members):
                    if text:
                        warnings.warn(text, stacklevel=2)
            # All constraints of a training step are traced in the same graph. It is not kept alive.
            if graph is not None and (self._graph is None or self._graph() is not graph):
                self._graph = weakref.ref(graph)
                self._warn_of_replaced()

    def batches(self) -> int | None:
        """Returns how many batches the `fit` that starts has at most.

        Returns:
            An `int`, if it is called for the first time in a `fit` that is in its first epoch and knows
            its length; else `None`. `fit` tells nobody but callbacks of its argument `initial_epoch`.
        """
        history = getattr(self._model, "history", None)
        if not isinstance(history, keras.callbacks.History) or history is self._fit:
            return None
        # Epochs that have ended are listed, so this is empty in no training that is over.
        if getattr(history, "epoch", None) != []:
            return None
        self._fit = history
        steps, epochs = ((history.params or {}).get(name) for name in ("steps", "epochs"))
        # Another optimizer than the one that `fit` uses may make any number of steps in a batch.
        others = self._optimizer not in (None, self._model.optimizer)
        return None if others or steps is None or epochs is None else steps * epochs

    def _warn_of_replaced(self):
        paths = [path for member in self.members for path in member.replaced()]
        if paths:
            warnings.warn(
                f"After {self._verb}, these weights were replaced by values that {self._verb} has not "
                f"changed: {shorten(paths, 3)}. The first training step applies {self._verb} to the new "
                "values as they are, and what was chosen before is lost. Load weights first, then call "
                f"{self._verb}.",
                stacklevel=3,
            )


def prunes_nothing(schedule, now: int, end: int) -> str:
    """Returns what to say if a training prunes nothing, though the schedule is not done; else "".

    Args:
        schedule: A `Schedule`.
        now: The schedule's step when the training starts.
        end: Its step when the training ends.
    """
    if schedule.latest_update(now) >= schedule.reached_at:
        return ""
    rise = _next_rise(schedule, now)
    if rise is None or rise <= end:
        return ""
    return (
        f"This training prunes nothing: it goes from step {now} to step {end}, and the next update "
        f"that prunes is at step {rise} of {schedule!r}. The sparsity stays {_level(schedule, now)}. "
        "Train for more steps, or call prune again with a schedule that begins earlier or has a lower "
        f"frequency: {_shorter(schedule, now, end)}."
    )


def ends_early(schedule, now: int, end: int) -> str:
    """Returns what to say if a training ends before the schedule is done; else "".

    Args:
        schedule: A `Schedule`.
        now: The schedule's step when the training starts.
        end: Its step when the training ends.
    """
    if schedule.latest_update(now) >= schedule.reached_at or end >= schedule.reached_at:
        return ""
    return (
        f"Training ends at step {end}, before the schedule does, which reaches its highest sparsity "
        f"at step {schedule.reached_at}: {schedule!r}. The sparsity will be {_level(schedule, end)}, "
        f"not {_level(schedule, schedule.reached_at)}. Call fit again to go on, or let the schedule "
        f"end earlier: {_shorter(schedule, now, end)}."
    )


def _level(schedule, step: int) -> str:
    latest = schedule.latest_update(step)
    return f"{schedule.sparsity_at(latest) if latest >= 0 else 0.0:.4g}"


def _next_rise(schedule, now: int) -> int | None:
    """The first update after the step `now` that prunes more than is pruned then, if there is one."""
    latest = schedule.latest_update(now)
    level = schedule.sparsity_at(latest) if latest >= 0 else 0.0
    updates = np.arange(schedule.begin_step, schedule.reached_at + 1, schedule.frequency)
    updates = updates[updates > now]
    if not updates.size:
        return None
    rising = np.asarray(schedule.sparsity_at(updates)) > level
    return int(updates[rising.argmax()]) if rising.any() else None


def _shorter(schedule, now: int, end: int) -> str:
    """The call that prunes with a schedule of the same kind which the training completes."""
    last = now + max(round((end - now) * SHARE), 1)
    values = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    if schedule.reached_at == schedule.begin_step:  # it prunes at once
        values["begin_step"] = last
    else:
        begin = values["begin_step"] = schedule.begin_step if schedule.begin_step < last else now
        values["end_step"] = last
        values["frequency"] = max(1, min(schedule.frequency, (last - begin) // 10))
    defaults = {field.name: field.default for field in dataclasses.fields(schedule)}
    arguments = [
        f"{name}={getattr(value, '__name__', value)}"
        for name, value in values.items()
        if value != defaults[name]
    ]
    resumed = f", initial_step={now}" if now else ""
    return f"prune(model, {type(schedule).__name__}({', '.join(arguments)}){resumed})"
