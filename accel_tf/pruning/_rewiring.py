"""The masks of dynamic sparse training: of constant size, they move while the model trains.

Keras calls the constraint of a weight after each optimizer step, and never shows it the gradient. It
need not. While an element is inactive, it is zero, and so is what the optimizer remembers of it; the
gradient is computed for it all the same, as Keras's kernels are dense. Hence what a single optimizer
step leaves there is made of the gradient alone, and tells which elements have the largest.
"""

import zlib

import keras
import numpy as np
import tensorflow as tf

from accel_tf.pruning._constraint import MaskConstraint, Scores, local_variable
from accel_tf.pruning._start import SHARE

# An active element is never exactly zero: the zeros of a weight are its mask, also in a file. Small
# enough to vanish in any sum, yet a normal number in float32 and bfloat16.
_ALMOST_ZERO = 1e-30


class RewiredMask:
    """The mask of one weight, in which some connections are replaced as `method` says.

    Args:
        variable: The Keras variable.
        kept: How many of its elements are active, an `int`, always.
        method: A `SET` or `RigL`: when, how many, and which elements to grow.
        step: A `StepCounter`.
        optimizer: A function that returns the optimizer that trains the variable, or `None`.
        index: A number of its own among the model's weights, so that they draw different places.
        initial_step: The step at which training starts or goes on: its rewiring is done.
        training_start: The `TrainingStart` of the call of `train_sparse`.
    """

    unfinished = ""  # unlike pruning: the sparsity is the final one from the start
    scores = Scores()  # of no use here: `method` decides

    def __init__(
        self, variable, kept: int, method, step, optimizer, index, initial_step, training_start
    ):
        self.kept, self.method, self._index = kept, method, index
        self._variable, self._step, self._optimizer = variable, step, optimizer
        self._mask = local_variable(self._mask_of_weights(), "rewired_mask", variable)
        latest = tf.constant(method.latest_update(initial_step), tf.int64)
        self._latest = local_variable(latest, "latest_update", variable)
        self.masks = {id(variable): self._mask}
        self._training_start = training_start
        training_start.members.append(self)

    def shortfall(self, batches: int) -> str:
        """Returns what to say if a training of so many batches never rewires; else ""."""
        now, end = int(self._step.after(0)), int(self._step.after(batches))
        latest, method = self.method.latest_update(now), self.method
        due = latest + method.frequency
        if not (self._holds() and self._variable.trainable) or end >= due or due > method.end_step:
            return ""
        name, last = type(method).__name__, max(1, round((end - now) * SHARE))
        return (
            f"This training rewires nothing: it goes from step {now} to step {end}, and the next "
            f"rewiring is at step {due} of {method!r}. The masks stay as they are. Train for more "
            f"steps, or call train_sparse with a lower frequency: train_sparse(model, "
            f"{name}({method.sparsity}, end_step={now + last}, frequency={max(1, last // 10)}))."
        )

    def replaced(self) -> list[str]:
        """Returns the path of the weight if more of its elements are not zero than are active."""
        active = np.count_nonzero(keras.ops.convert_to_numpy(self._variable))
        return [self._variable.path] if self._holds() and active > self.kept else []

    def _holds(self) -> bool:
        return getattr(self._variable.constraint, "masks", None) is self

    def remove(self, variable) -> None:
        """Leaves the weight to another verb: nothing to do, as it shares its mask with none."""

    def update(self, variable) -> None:
        """Moves the mask if a rewiring is due, then resets the state of what is inactive."""
        slots = state_of(self._variable, self._optimizer(), self.method)
        step = self._step()
        if tf.inside_function():
            with tf.init_scope():
                self._follow_weights(self._step.completed())
        due = self.method.latest_update(step)
        # Not `due > latest`: an optimizer that is restored may go back.
        moves = (due > 0) & tf.not_equal(due, self._latest)
        tf.cond(moves, lambda: self._rewire(due, slots), lambda: None)
        for slot, initial in slots:
            _reset(slot, self._mask, initial)
        self._training_start()

    def _follow_weights(self, step):
        """Takes over a mask that was restored with the weights, before the step that is traced.

        `keras.callbacks.BackupAndRestore` does so when `fit` starts.
        """
        mask = self._mask_of_weights()
        if (mask != self._mask.numpy()).any():
            self._mask.assign(mask)
            self._latest.assign(self.method.latest_update(step))

    def _mask_of_weights(self):
        # Elements that are not zero come first: a model from a file, or from `prune`, keeps its own.
        magnitude = np.abs(keras.ops.convert_to_numpy(self._variable).astype("float32"))
        mask = _largest(tf.constant(magnitude.ravel()), self.kept)
        return mask.numpy().reshape(magnitude.shape)

    def _rewire(self, due, slots):
        weights = _flat(self._variable)
        active = tf.reshape(self._mask, [-1])
        moved = self.method.moved_at(due, self.kept, weights.shape[0])
        magnitude = tf.where(active, tf.abs(weights), -1.0)
        attraction = tf.where(active, -1.0, self._attraction(weights, due, slots))
        mask = _largest(magnitude, self.kept - moved) | _largest(attraction, moved)
        self._mask.assign(tf.reshape(mask, self._variable.shape))
        self._latest.assign(due)

    def _attraction(self, weights, due, slots):
        """Returns a score ≥ 0 for each element; of the inactive ones the highest are grown."""
        if self.method.by_gradient:
            # State that starts at zero is proportional to the gradient now, or to its square. The
            # weight is, too, but not in Adam, which divides the gradient by its own magnitude.
            from_zero = [slot for slot, initial in slots if initial == 0.0]
            return tf.abs(_flat(from_zero[0]) if from_zero else weights)
        # A function of seed, index and step: alike on all replicas, and after an interruption.
        seed = zlib.crc32(f"{self.method.seed}/{self._index}".encode())
        seed = tf.stack([tf.constant(seed, tf.int64), tf.cast(due, tf.int64)])
        return tf.random.stateless_uniform(weights.shape, seed)


class RewiredConstraint(MaskConstraint):
    """Sets the inactive elements of one weight to zero, and no others."""

    def apply(self, w):
        """Returns `w` with the mask as it stands, and active zeros as the next best to zero."""
        masked = super().apply(w)
        active_zeros = self.masks.masks[id(self._variable)] & (masked == 0)
        return tf.where(active_zeros, tf.cast(_ALMOST_ZERO, masked.dtype), masked)


def state_of(variable, optimizer, method) -> list:
    """Returns what `optimizer` remembers of each element of `variable`.

    Args:
        variable: The Keras variable.
        optimizer: The Keras optimizer that trains it.
        method: The `SET` or `RigL` that asks.

    Returns:
        `(slot, initial)` pairs: a Keras variable of the same shape, and the number that all its
        elements were at first.

    Raises:
        ValueError: `optimizer` does not train `variable`, or not in a way that `method` can follow.
    """
    name = type(method).__name__
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    known = inner is not None and inner.built
    if not known or inner._var_key(variable) not in inner._trainable_variables_indices:
        state = (
            "the model is not compiled" if inner is None else "model.optimizer does not train it"
        )
        raise ValueError(
            f"{name} needs the optimizer that trains the weight {variable.path!r}, but {state}. In a "
            "custom training loop, or if the model is a part of the one that is trained, call "
            "train_sparse(…, optimizer=the_one_that_trains)."
        )
    o = keras.optimizers
    if isinstance(inner, (o.ScheduleFreeAdamW, o.MultiOptimizer)):
        raise ValueError(
            f"{name} cannot train with {type(inner).__name__}, which keeps the state of weights in a "
            "way of its own, so that dropped ones would come back. Use SGD, Adam or AdamW."
        )
    if method.by_gradient and isinstance(inner, o.Adafactor):
        raise ValueError(
            "RigL grows the weights of largest gradient, which Adafactor divides by the scale of "
            "their rows and columns, and does not keep. Use SGD, Adam or AdamW, or SET."
        )
    index = inner._get_variable_index(variable)
    # Gradients that are being accumulated are no state; averages `StepCounter` refuses.
    others = ("_trainable_variables", "_accumulated_gradients", "_model_variables_moving_average")
    found = []
    for attribute, slots in vars(inner).items():
        if attribute in others or not isinstance(slots, (list, tuple)) or len(slots) <= index:
            continue
        slot = slots[index]
        if isinstance(slot, keras.Variable) and slot.shape == variable.shape:
            starts_high = attribute == "_accumulators"  # of Adagrad and Ftrl
            found.append((slot, inner.initial_accumulator_value if starts_high else 0.0))
    return found


def _reset(slot, mask, initial):
    def assign(value, mask):
        value.assign(tf.where(mask, value, tf.cast(initial, value.dtype)))

    def on_all_replicas(strategy, mask):
        strategy.extended.update(slot.value, assign, args=(mask,), group=False)

    # Keras, too, updates its slots from outside of the replicas.
    mask = tf.convert_to_tensor(mask)
    tf.distribute.get_replica_context().merge_call(on_all_replicas, args=(mask,))


def _largest(scores, count):
    """Returns a bool vector: exactly `count` of `scores`, of equal ones those that come first."""
    n = scores.shape[0]
    _, order = tf.math.top_k(scores, k=n)  # of static length, for XLA
    return tf.scatter_nd(order[:, None], tf.range(n) < count, [n])


def _flat(variable):
    return tf.cast(tf.reshape(variable.value, [-1]), tf.float32)
