"""The weight constraint that `prune` puts on variables: Keras applies it after each optimizer step.

`Masks` holds the masks that one call of `prune` decides together: of one weight, or of all with
scope "global". `MaskConstraint` applies one of them to its weight.
"""

import keras
import tensorflow as tf

from accel_tf.pruning._forms import Form, form_of
from accel_tf.pruning._patterns import Pattern, keep_largest
from accel_tf.pruning._schedules import Schedule


class StepCounter:
    """The step of the schedule: the optimizer steps since `prune` was called, plus `initial_step`.

    The optimizer is the one given, or that of the model when training starts: `compile` may come
    before or after `prune`.
    """

    def __init__(self, model: keras.Model, optimizer, initial_step: int):
        self._model, self._given = model, optimizer
        self._at_call = optimizer or getattr(model, "optimizer", None)
        self._offset = initial_step
        if self._at_call is not None:
            self._offset -= int(keras.ops.convert_to_numpy(self._at_call.iterations))
        self._initial = initial_step

    def __call__(self) -> tf.Tensor:
        """Returns the step, an int64 scalar, that the optimizer is just completing."""
        optimizer = self._given or getattr(self._model, "optimizer", None)
        if optimizer is None or not optimizer.built:
            state = "is not compiled" if optimizer is None else "is trained by another optimizer"
            raise ValueError(
                f"Pruning model {self._model.name!r} needs the step of the optimizer that trains "
                f"it, but the model {state}. In a custom training loop, or if it is a part of the "
                "model that is trained, call prune(…, optimizer=the_one_that_trains)."
            )
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if inner.use_ema:
            raise ValueError(
                f"The optimizer {inner.name!r} of model {self._model.name!r} has use_ema=True: it "
                "replaces the weights by a moving average, in which pruned weights are not zero. "
                "Train with use_ema=False while the model is pruned."
            )
        # A model that was compiled anew since `prune` has an optimizer that starts at zero.
        offset = self._offset if optimizer is self._at_call else self._initial
        # Keras applies constraints before it counts the batch. With gradient accumulation a step
        # is several batches, of which `optimizer.iterations` tells whole steps only.
        batches = tf.cast(inner._iterations.value, tf.int64) + 1
        return batches // (inner.gradient_accumulation_steps or 1) + offset


class Masks:
    """The masks of the weights that share one sparsity, updated by the schedule.

    Args:
        variables: The Keras variables; their total is pruned to the schedule's sparsity.
        schedule: A `Schedule`.
        pattern: Which weights go together.
        step: A `StepCounter`.
        forms: Which axes of a variable are inputs, by its id; by default, all but the last.
    """

    def __init__(
        self,
        variables,
        schedule: Schedule,
        pattern: Pattern,
        step: StepCounter,
        forms: dict[int, Form] | None = None,
    ):
        self.variables = list(variables)
        self.schedule, self.pattern, self._step = schedule, pattern, step
        self._forms = forms or {id(v): form_of(v) for v in self.variables}
        self._levels = tf.constant(pattern.levels(schedule))
        # The masks live where the weights do. Replicas hold equal weights, hence decide alike: each
        # updates its own copy, because a conditional update must not wait for other replicas.
        strategy = getattr(self.variables[0].value, "distribute_strategy", None)
        with (strategy or tf.distribute.get_strategy()).scope():
            self.masks = {
                id(v): _local_variable(tf.ones(v.shape, tf.bool), "pruning_mask")
                for v in self.variables
            }
            self.latest = _local_variable(tf.constant(-1, tf.int64), "latest_update")
        self._traced = tf.function(self._decide)

    @property
    def unfinished(self) -> str:
        """A sentence, if the schedule has not reached its highest sparsity yet, else ""."""
        latest, goal = int(self.latest.numpy()), self.schedule.reached_at
        if latest >= goal:
            return ""
        so_far = f"the last one was at step {latest}" if latest >= 0 else "there was none yet"
        return f"Pruning is under way: its updates go on to step {goal}, {so_far}."

    def remove(self, variable) -> None:
        """Leaves `variable` to another call of `prune`; the others keep their common sparsity."""
        self.variables = [v for v in self.variables if v is not variable]
        self._traced = tf.function(self._decide)

    def update(self, step=None) -> None:
        """Updates the masks if the schedule has an update since the last one.

        Args:
            step: The schedule's step, an int64 scalar; by default the optimizer's.
        """
        due = self.schedule.latest_update(self._step() if step is None else step)
        # Not `updates_at(step)`: the first weight's constraint updates the masks of all, and a run
        # resumed from a checkpoint has to catch up.
        # Each weight's constraint contains the update, so in a graph the update of all weights
        # together is a function: it is traced once, not once for each weight.
        shared = len(self.variables) > 1 and not tf.executing_eagerly()
        decide = self._traced if shared else self._decide
        tf.cond(tf.not_equal(due, self.latest), lambda: decide(due), lambda: None)

    def _decide(self, due):
        frozen = [v.path for v in self.variables if not v.trainable]
        if frozen and len(self.variables) > 1:
            raise ValueError(
                f"The weight {frozen[0]!r} was frozen after prune(…, scope='global'): its zeros can "
                "no longer follow the schedule. Call prune again for the weights that are trained."
            )
        index = (due - self.schedule.begin_step) // self.schedule.frequency
        last = tf.cast(tf.size(self._levels) - 1, tf.int64)
        sparsity = tf.gather(self._levels, tf.clip_by_value(index, 0, last))
        forms = [self._forms[id(v)] for v in self.variables]
        kernels = zip(forms, self.variables, strict=True)
        scores = [
            self.pattern.scores(form.of(tf.convert_to_tensor(v.value))) for form, v in kernels
        ]
        keep = keep_largest(tf.concat(scores, axis=0), sparsity)
        parts = tf.split(keep, [s.shape[0] for s in scores])
        for form, v, part in zip(forms, self.variables, parts, strict=True):
            mask = self.pattern.expand(part, form.shape(v.shape))
            self.masks[id(v)].assign(form.back(mask, v.shape))
        self.latest.assign(due)


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

    def __call__(self, w):
        self.masks.update()
        return self.apply(w)

    def apply(self, w):
        """Returns `w` with the mask as it stands: zeros, not the −0.0 of a product."""
        mask = self.masks.masks[id(self._variable)]
        masked = tf.where(mask, w, tf.zeros((), w.dtype))
        if self.inner is not None:
            # On the masked weight, so that a norm is that of the weights that remain; and masked
            # again, because a constraint may move zeros.
            masked = tf.where(mask, self.inner(masked), tf.zeros((), w.dtype))
        return masked


def _local_variable(value, name):
    return tf.Variable(
        value,
        trainable=False,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
