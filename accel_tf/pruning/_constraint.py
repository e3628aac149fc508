"""The weight constraint that `prune` puts on variables: Keras applies it after each optimizer step.

`Scores` say what a weight is worth, those of `_criteria` and here that of its magnitude. `Masks` holds the masks that one call of `prune` decides together: of one weight, or of all with
scope "global". `MaskConstraint` applies one of them to its weight.
"""

import keras
import tensorflow as tf

from accel_tf.pruning._forms import Form, form_of
from accel_tf.pruning._patterns import Pattern, keep_largest
from accel_tf.pruning._schedules import Schedule
from accel_tf.pruning._start import TrainingStart, ends_early, prunes_nothing


class StepCounter:
    """The step of the schedule: the optimizer steps since `prune` was called, plus `initial_step`.

    The optimizer is the one given, or that of the model when training starts: `compile` may come
    before or after `prune`, and again in the middle of the schedule, which then goes on.
    """

    def __init__(self, model: keras.Model, optimizer, initial_step: int):
        self._model, self._given = model, optimizer
        self._counted, self._initial = None, initial_step  # the optimizer that counts
        self._offset = initial_step  # the step when the optimizer that counts was at zero
        at_call = optimizer or getattr(model, "optimizer", None)
        if at_call is not None:
            self._counted = _inner(at_call)
            self._offset -= int(_steps(self._counted))

    def __call__(self) -> tf.Tensor:
        """Returns the step, an int64 scalar, that the optimizer is just completing."""
        # Keras applies constraints before it counts the batch.
        return self._steps(self.optimizer(), 1)

    def completed(self) -> tf.Tensor:
        """Returns the last step, an int64 scalar, that the optimizer has completed."""
        return self._steps(self.optimizer(), 0)

    def optimizer(self) -> keras.optimizers.Optimizer:
        """Returns the optimizer that trains the model, without what scales its loss.

        Raises:
            ValueError: There is none, or it is one that would not leave zeros.
        """
        optimizer = self._given or getattr(self._model, "optimizer", None)
        if optimizer is None or not optimizer.built:
            state = "is not compiled" if optimizer is None else "is trained by another optimizer"
            raise ValueError(
                f"The masks of model {self._model.name!r} need the step of the optimizer that trains "
                f"it, but the model {state}. In a custom training loop, or if it is a part of the "
                "model that is trained, pass optimizer=the_one_that_trains to prune or train_sparse."
            )
        inner = _inner(optimizer)
        if inner.use_ema:
            raise ValueError(
                f"The optimizer {inner.name!r} of model {self._model.name!r} has use_ema=True: it "
                "replaces the weights by a moving average, in which pruned weights are not zero. "
                "Train with use_ema=False while the model is pruned."
            )
        return inner

    def after(self, batches: int) -> tf.Tensor:
        """Returns the step, an int64 scalar, once the optimizer has had so many batches more.

        Unlike the others, it can tell before training starts: Keras builds optimizers later.
        """
        optimizer = self._given or getattr(self._model, "optimizer", None) or self.optimizer()
        return self._steps(_inner(optimizer), batches)

    def _steps(self, inner, batches):
        if inner is not self._counted:
            with tf.init_scope():
                self._count_on(inner)
        return _steps(inner, batches) + self._offset

    def _count_on(self, inner):
        """Lets another optimizer count, where the one before it has arrived.

        If that one has done nothing since the call, the count of the new one is what holds:
        `keras.callbacks.BackupAndRestore` may have restored it.
        """
        before, self._counted = self._counted, inner
        reached = self._initial if before is None else int(_steps(before)) + self._offset
        self._offset = reached
        if reached != self._initial:
            self._offset -= int(_steps(inner))


def _inner(optimizer) -> keras.optimizers.Optimizer:
    """Returns the optimizer without what scales its loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _steps(optimizer, batches: int = 0) -> tf.Tensor:
    """Returns the steps of an optimizer, an int64 scalar, once it has had so many batches more.

    With gradient accumulation a step is several batches, of which `optimizer.iterations` tells whole
    steps only.
    """
    batches += tf.cast(optimizer._iterations.value, tf.int64)
    return batches // (optimizer.gradient_accumulation_steps or 1)


class Scores:
    """What weights are worth, by their magnitude; other criteria override what they do otherwise."""

    ready = True  # Whether it can tell before the first step

    def of(self, variable) -> tf.Tensor:
        """Returns the scores of a Keras variable's elements, float32, of its shape."""
        return magnitude(variable)

    def after_step(self, variable, w):
        """Returns what becomes of `w`, the variable as an optimizer step left it, before its mask."""
        return w

    def book(self, variable, masked) -> None:
        """Takes note of a step, before the variable becomes `masked`."""

    def follow(self, variable) -> None:
        """Takes note that the variable was changed from outside, before the step that is traced."""


class Masks:
    """The masks of the weights that share one sparsity, updated by the schedule.

    Args:
        variables: The Keras variables; their total is pruned to the schedule's sparsity.
        schedule: A `Schedule`.
        pattern: Which weights go together.
        step: A `StepCounter`.
        forms: Which axes of a variable are inputs, by its id; by default, all but the last.
        scores: The `Scores` that decide; by default by magnitude.
        levels: The sparsity at each update, if it is not that of the schedule.
        training_start: The `TrainingStart` of the call of `prune`; by default nothing is said.
    """

    def __init__(
        self,
        variables,
        schedule: Schedule,
        pattern: Pattern,
        step: StepCounter,
        forms: dict[int, Form] | None = None,
        scores: Scores | None = None,
        levels=None,
        training_start: TrainingStart | None = None,
    ):
        self.variables = list(variables)
        self.schedule, self.pattern, self._step = schedule, pattern, step
        self.training_start = training_start
        if training_start is not None:
            training_start.members.append(self)
        self.scores = scores or Scores()
        self._forms = forms or {id(v): form_of(v) for v in self.variables}
        self._levels = tf.constant(pattern.levels(schedule) if levels is None else levels)
        self.masks = {
            id(v): local_variable(tf.ones(v.shape, tf.bool), "pruning_mask", v)
            for v in self.variables
        }
        latest = tf.constant(-1, tf.int64)
        self.latest = local_variable(latest, "latest_update", self.variables[0])
        self._traced = tf.function(self._decide)

    @property
    def unfinished(self) -> str:
        """A sentence, if the schedule has not reached its highest sparsity yet, else ""."""
        latest, goal = int(self.latest.numpy()), self.schedule.reached_at
        if latest >= goal:
            return ""
        so_far = f"the last one was at step {latest}" if latest >= 0 else "there was none yet"
        return f"Pruning is under way: its updates go on to step {goal}, {so_far}."

    def step_after(self, batches: int) -> int:
        """Returns the schedule's step once the optimizer has had so many batches more."""
        return int(self._step.after(batches))

    def shortfall(self, batches: int) -> str:
        """Returns what a training of so many batches leaves undone, as a sentence, or ""."""
        if not any(v.trainable for v in self.variables):
            return ""
        now, end = self.step_after(0), self.step_after(batches)
        return prunes_nothing(self.schedule, now, end) or ends_early(self.schedule, now, end)

    def replaced(self) -> list[str]:
        """Returns the paths of the weights that are less sparse than the masks made them."""
        if all(map(self.holds, self.variables)):
            return []
        # A checkpoint of another step has zeros elsewhere, but as many as are due at its step.
        due = self.schedule.latest_update(self._step.completed())
        masks = self._choose(due, Scores())
        return [v.path for v in self.variables if _loses(v, masks[id(v)])]

    def remove(self, variable) -> None:
        """Leaves `variable` to another call of `prune`; the others keep their common sparsity."""
        self.variables = [v for v in self.variables if v is not variable]
        self._traced = tf.function(self._decide)

    def holds(self, variable) -> bool:
        """Returns whether a weight, as it is, is zero wherever its mask says so."""
        return not _loses(variable, self.masks[id(variable)])

    def start(self, step: int) -> None:
        """Decides about the weights as they are, at the schedule's `step`, an `int`."""
        due = tf.constant(self.schedule.latest_update(step), tf.int64)
        if due >= 0:
            # Before the first step there may be no score, and none is needed where training goes
            # on: what was pruned is zero.
            self._decide(due, self.scores if self.scores.ready else Scores())

    def update(self, variable) -> None:
        """Updates the masks if the schedule has an update since the last one.

        Args:
            variable: The weight whose constraint is being applied.
        """
        self._require_trainable()
        # Before the masks follow: where weights no longer fit their masks, they were replaced.
        if self.training_start is not None:
            self.training_start()
        if tf.inside_function():
            with tf.init_scope():
                self._follow(variable)
        due = self.schedule.latest_update(self._step())
        # Not `updates_at(step)`: the first weight's constraint updates the masks of all, and a run
        # resumed from a checkpoint has to catch up.
        # Each weight's constraint contains the update, so in a graph the update of all weights
        # together is a function: it is traced once, not once for each weight.
        shared = len(self.variables) > 1 and tf.inside_function()
        decide = self._traced if shared else self._decide
        tf.cond(tf.not_equal(due, self.latest), lambda: decide(due), lambda: None)

    def _follow(self, variable):
        """Lets the masks follow from weights that were restored, before the step that is traced.

        `keras.callbacks.BackupAndRestore` restores them when `fit` starts. Their zeros tell what was
        pruned, whatever the criterion was. After the step it would be too late: zeros have moved.
        """
        due = self.schedule.latest_update(self._step.completed())
        if int(due) != int(self.latest.numpy()) or not self.holds(variable):
            self._decide(due, Scores())
        self.scores.follow(variable)

    def _decide(self, due, scores=None):
        masks = self._choose(due, scores or self.scores)
        for v in self.variables:
            self.masks[id(v)].assign(masks[id(v)])
        self.latest.assign(due)

    def _require_trainable(self):
        frozen = [v.path for v in self.variables if not v.trainable]
        if frozen and len(self.variables) > 1:
            raise ValueError(
                f"The weight {frozen[0]!r} was frozen after prune(…, scope='global'): its zeros can "
                "no longer follow the schedule. Call prune again for the weights that are trained."
            )

    def _choose(self, due, scores) -> dict:
        """Returns the mask of each weight, by its id, after the schedule's update at `due`."""
        index = (due - self.schedule.begin_step) // self.schedule.frequency
        last = tf.cast(tf.size(self._levels) - 1, tf.int64)
        sparsity = tf.gather(self._levels, tf.clip_by_value(index, 0, last))
        sparsity = tf.where(due < 0, tf.zeros_like(sparsity), sparsity)  # there was no update yet
        forms = [self._forms[id(v)] for v in self.variables]
        kernels = zip(forms, self.variables, strict=True)
        units = [self.pattern.scores(form.of(scores.of(v))) for form, v in kernels]
        keep = keep_largest(tf.concat(units, axis=0), sparsity)
        parts = tf.split(keep, [s.shape[0] for s in units])
        return {
            id(v): form.back(self.pattern.expand(part, form.shape(v.shape)), v.shape)
            for form, v, part in zip(forms, self.variables, parts, strict=True)
        }


class MaskConstraint(keras.constraints.Constraint):
    """Sets the pruned elements of one weight to zero; `prune` puts it on `variable.constraint`.

    It belongs to the variable, not to the layer's configuration: saved models know nothing of it.

    Args:
        masks: The `Masks` that hold this weight's mask.
        variable: The Keras variable.
        inner: The constraint that the variable had before, or `None`; it stays in force.
    """

    def __init__(self, masks: Masks, variable, inner=None):
        self.masks, self.inner = masks, inner
        self._variable = variable

    @classmethod
    def attach(cls, masks: Masks, variable) -> None:
        """Puts it on `variable`, in place of one that was there before, and applies it."""
        inner = variable.constraint
        if isinstance(inner, MaskConstraint):
            inner.masks.remove(variable)
            inner = inner.inner
        variable.constraint = cls(masks, variable, inner)
        variable.assign(variable.constraint.apply(variable))

    def __call__(self, w):
        self.masks.update(self._variable)
        scores = self.masks.scores
        masked = self.apply(scores.after_step(self._variable, w))
        scores.book(self._variable, masked)
        return masked

    def apply(self, w):
        """Returns `w` with the mask as it stands: zeros, not the −0.0 of a product."""
        mask = self.masks.masks[id(self._variable)]
        masked = tf.where(mask, w, tf.zeros((), w.dtype))
        if self.inner is not None:
            # On the masked weight, so that a norm is that of the weights that remain; and masked
            # again, because a constraint may move zeros.
            masked = tf.where(mask, self.inner(masked), tf.zeros((), w.dtype))
        return masked


def _loses(variable, mask) -> bool:
    """Returns whether a mask sets elements of a weight, as it is, to zero that are not."""
    return bool(tf.reduce_any(tf.not_equal(variable.value, 0) & ~tf.convert_to_tensor(mask)))


def magnitude(variable) -> tf.Tensor:
    """Returns the magnitudes of a Keras variable's elements, float32."""
    return tf.abs(tf.cast(tf.convert_to_tensor(variable.value), tf.float32))


def local_variable(value, name, like) -> tf.Variable:
    """Returns a variable that lives where the Keras variable `like` does, and is no weight.

    Replicas hold equal weights, hence decide alike: each updates its own copy, because a conditional
    update must not wait for other replicas.
    """
    strategy = getattr(like.value, "distribute_strategy", None)
    with (strategy or tf.distribute.get_strategy()).scope():
        return tf.Variable(
            value,
            trainable=False,
            name=name,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
