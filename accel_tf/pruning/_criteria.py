"""What a weight is worth: the scores by which pruning decides which weights go first.

A `Criterion` is what a user writes. `prune` binds it to the weights it has chosen, which makes their
`Scores`: these live with the masks and see each weight twice in a step, as the optimizer left it and
as the mask leaves it.
"""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from accel_tf.pruning._config import Configured
from accel_tf.pruning._constraint import Scores, local_variable


class Criterion(Configured):
    """What weights are worth to the model. A subclass is a frozen dataclass and implements `bind`."""

    signed = False  # Whether scores may be negative, which norms would hide

    def bind(self, model, variables, step) -> Scores:
        """Returns the `Scores` of `variables`, weights of `model`; `step` is their `StepCounter`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Magnitude(Criterion):
    """The smallest weights go first.

    It needs no data, and weights that the loss pulls down become small: hard to beat in most cases.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> report = at.prune(model, at.ConstantSparsity(0.5), criterion=at.Magnitude())

    Reference: Han et al., "Learning both weights and connections for efficient neural networks"
    (2015); https://arxiv.org/abs/1506.02626.
    """

    def bind(self, model, variables, step):
        return Scores()


@dataclasses.dataclass(frozen=True)
class Movement(Criterion):
    """The weights that training moves towards zero go first, however large they still are.

    The score of a weight is what it has moved away from zero: the sum of w · Δw over the optimizer's
    steps since `prune`, which with plain SGD is −learning rate · w · ∂L/∂w, the paper's score. It is
    meant for fine-tuning, where magnitudes tell of the first task, and movements of the second.
    A pruned weight is zero here and moves no further: it keeps its score, and comes back if active
    ones fall below.

    Before the first step nothing has moved, so the schedule has to begin with zero sparsity, or
    later: `PolynomialDecay(0.9, end_step=1000)`, `OneShot(0.8, begin_step=200)`. With `Channels`,
    take `Channels("mean")`, as a norm has no sign.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> print(at.prune(model, at.OneShot(0.5, begin_step=100), criterion=at.Movement()))
    prune: 1 layer changed, 0 left alone
    layer  changed  note
    -----  -------  ------------------------------------------
    head   yes      kernel (8, 4): 0.5 by step 100, Movement()

    Reference: Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020,
    equation 2; https://arxiv.org/abs/2005.07683. There, pruned weights stay under their mask, and
    their scores go on.
    """

    signed = True

    def bind(self, model, variables, step):
        return _Movements(variables)


class _Movements(Scores):
    ready = False

    def __init__(self, variables):
        self._before = {id(v): local_variable(_float(v), "weight_before", v) for v in variables}
        self._moved = {id(v): local_variable(tf.zeros(v.shape), "movement", v) for v in variables}

    def of(self, variable):
        # With the step that is not booked yet: in the scope "global" one weight's constraint
        # decides for the others, too, whose turn comes later.
        before = self._before[id(variable)]
        return self._moved[id(variable)] + before * (_float(variable) - before)

    def book(self, variable, masked):
        self._moved[id(variable)].assign(self.of(variable))
        self._before[id(variable)].assign(tf.cast(masked, tf.float32))

    def follow(self, variable):
        self._before[id(variable)].assign(_float(variable))


@dataclasses.dataclass(frozen=True, eq=False)
class Taylor(Criterion):
    """The weights whose removal changes the loss least go first, to first order.

    The score is the magnitude of w · ∂L/∂w, the change of the loss if w became zero, were the loss
    linear. The gradient is that of the mean loss of the samples given, in inference mode, computed
    when `prune` is called; a gradual schedule then prunes in this order. Before training, with
    `OneShot(0.9)`, this is SNIP. Call `prune` again for scores of the weights as they are then.

    Args:
        x: Samples as the model takes them, an array or a structure of arrays; a few hundred do.
        y: Their targets, as `loss` takes them.
        loss: A Keras loss, or its name; by default that of the compiled model, which includes what
            regularizers add.
        batch_size: Samples at a time.

    Raises:
        ValueError: There are no samples, or x and y differ in their number. By `prune`: the model is
            not compiled and no loss is given, or a score is not finite.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, name="head")])
    >>> x, y = np.random.normal(size=(64, 8)), np.arange(64) % 3
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> report = at.prune(model, at.OneShot(0.5), criterion=at.Taylor(x, y, loss))
    >>> at.sparsity(model).total
    0.5

    Reference: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019,
    equation 8, whose square this is the root of; https://arxiv.org/abs/1906.10771. Lee et al.,
    "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019, equation 5;
    https://arxiv.org/abs/1810.02340.
    """

    x: object
    y: object
    loss: object = None
    batch_size: int = 256

    def __post_init__(self):
        lengths = {len(a) for a in keras.tree.flatten((self.x, self.y))}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                "Taylor needs samples x and as many targets y, at least one. Received lengths "
                f"{[len(a) for a in keras.tree.flatten((self.x, self.y))]}."
            )

    def __repr__(self):
        return f"Taylor({self._samples} samples)"

    def get_config(self):
        """Raises: samples are no configuration."""
        raise TypeError("Taylor holds samples, which are no plain values of a configuration.")

    @property
    def _samples(self):
        return len(keras.tree.flatten(self.x)[0])

    def bind(self, model, variables, step):
        if self.loss is None and not model.compiled:
            raise ValueError(
                f"Taylor needs the loss of model {model.name!r}, which is not compiled: compile it "
                "first, or pass Taylor(x, y, loss)."
            )
        sums = [tf.zeros(v.shape) for v in variables]
        for start in range(0, self._samples, self.batch_size):
            gradients = self._gradients(model, variables, slice(start, start + self.batch_size))
            sums = [s + g for s, g in zip(sums, gradients, strict=True)]
        scores = {}
        for v, gradient in zip(variables, sums, strict=True):
            score = tf.abs(_float(v) * gradient / self._samples)
            if not np.isfinite(score.numpy()).all():
                raise ValueError(
                    f"Taylor: the gradient of the weight {v.path!r} is not finite on the samples "
                    "given. Do they and the model's loss have values that are?"
                )
            scores[id(v)] = local_variable(score, "taylor", v)
        return _Fixed(scores)

    def _gradients(self, model, variables, part):
        """Those of the summed loss of one part of the samples; None where it does not depend."""
        x, y = keras.tree.map_structure(lambda a: tf.convert_to_tensor(a[part]), (self.x, self.y))
        n = len(keras.tree.flatten(x)[0])
        with tf.GradientTape() as tape:
            outputs = model(x, training=False)
            if self.loss is None:
                loss = model.compute_loss(x=x, y=y, y_pred=outputs, training=False)
            else:
                loss = tf.reduce_mean(keras.losses.get(self.loss)(y, outputs))
        if self.loss is None:
            model.reset_metrics()  # those of several outputs count each loss that is computed
        zero = tf.UnconnectedGradients.ZERO
        found = tape.gradient(loss, [v.value for v in variables], unconnected_gradients=zero)
        return [tf.cast(tf.convert_to_tensor(g), tf.float32) * n for g in found]


class _Fixed(Scores):
    def __init__(self, scores):
        self._scores = scores

    def of(self, variable):
        return tf.convert_to_tensor(self._scores[id(variable)])


@dataclasses.dataclass(frozen=True)
class SoftThreshold(Criterion):
    """The smallest weights go first, and an L1 penalty makes them small: to exactly zero, and all alike.

    After each optimizer step comes the proximal step of strength · ‖w‖₁, the soft threshold: each
    weight moves towards zero by learning rate · strength, and those that would pass it become zero.
    The penalty of `keras.regularizers.L1` has the same aim, but its gradient jumps at zero, so that
    weights tremble around it and are never zero. The sparsity is the schedule's, or more where the
    penalty has set more weights to zero: with `ConstantSparsity(0.0)` it is the penalty's alone.

    Args:
        strength: The weight of the L1 norm in the loss, > 0; 1e-5 to 1e-3, as for
            `keras.regularizers.L1`. With adaptive optimizers such as Adam the step is the same:
            learning rate · strength.

    Raises:
        ValueError: `strength` is not a positive number.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> criterion = at.SoftThreshold(strength=1e-4)
    >>> report = at.prune(model, at.ConstantSparsity(0.0), criterion=criterion)

    Reference: Tibshirani, "Regression shrinkage and selection via the lasso" (1996); Parikh and
    Boyd, "Proximal algorithms" (2014), sections 4.2 and 6.5.2; https://doi.org/10.1561/2400000003.
    """

    strength: float

    def __post_init__(self):
        if not (0 < self.strength < math.inf):
            raise ValueError(
                f"SoftThreshold: strength is the weight of the L1 norm, > 0. Received: {self.strength!r}"
            )

    def bind(self, model, variables, step):
        return _SoftThresholds(self.strength, step)


class _SoftThresholds(Scores):
    def __init__(self, strength, step):
        self._strength, self._step = strength, step

    def after_step(self, variable, w):
        optimizer = self._step.optimizer()
        rate = tf.cast(optimizer.learning_rate, w.dtype)
        # With gradient accumulation Keras applies constraints after each batch, and a step is
        # several: each takes its part of the threshold.
        by = rate * self._strength / (optimizer.gradient_accumulation_steps or 1)
        # Zero itself, not the −0.0 of a product with the sign.
        w = tf.convert_to_tensor(w)
        return tf.where(tf.abs(w) > by, w - tf.sign(w) * by, tf.zeros((), w.dtype))


def _float(variable):
    return tf.cast(tf.convert_to_tensor(variable.value), tf.float32)
