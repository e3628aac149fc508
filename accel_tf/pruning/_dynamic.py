"""Dynamic sparse training: a model that is sparse from its first step, and finds its own wiring.

The verb `train_sparse`, the two methods `SET` and `RigL`, and how they share the active weights
among layers. How a mask moves is in `_rewiring`.
"""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from accel_tf.layers import require_model
from accel_tf.pruning._config import Configured
from accel_tf.pruning._constraint import StepCounter
from accel_tf.pruning._distribution import DISTRIBUTIONS, active_weights
from accel_tf.pruning._forms import form_of
from accel_tf.pruning._rewiring import RewiredConstraint, RewiredMask
from accel_tf.pruning._selection import weights_of
from accel_tf.pruning._start import TrainingStart
from accel_tf.report import Entry, Report, attach


@dataclasses.dataclass(frozen=True)
class SET(Configured):
    """Sparse evolutionary training: drops the smallest weights, grows as many at random.

    Every `frequency` steps, in each kernel, the `fraction` of the active weights that is smallest in
    magnitude is set to zero, and as many inactive ones, drawn at random, are set free. They start at
    zero with the step that sets them free. The number of active weights never changes.

    Args:
        sparsity: The fraction of zeros in all kernels together, in [0, 1).
        end_step: The last step that may rewire. Leave some training after it, a quarter say, for the
            newest weights to learn.
        frequency: Steps between two rewirings.
        fraction: The share of the active weights that a rewiring replaces, in (0, 1).
        distribution: How kernels share the active weights. `"uniform"` gives each the same sparsity;
            `"erdos_renyi"` a density proportional to (inputs + outputs) / (inputs · outputs), so
            that small kernels stay denser; `"erdos_renyi_kernel"` counts a convolution's spatial
            dimensions among those, too.
        seed: An integer that, with the step, decides what is grown.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> method = SET(sparsity=0.95, end_step=1000)
    >>> method.fraction_at(100), method.fraction_at(900)
    (0.3, 0.3)

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", Nature Communications 9 (2018), algorithm 1 and, for
    the distribution, equation 1; https://doi.org/10.1038/s41467-018-04316-3.
    """

    sparsity: float
    end_step: int
    frequency: int = 100
    fraction: float = 0.3
    distribution: str = "erdos_renyi_kernel"
    seed: int = 0

    by_gradient = False

    def __post_init__(self):
        name = type(self).__name__
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(
                f"{name}: sparsity is the fraction of zeros, in [0, 1). Received: {self.sparsity!r}"
            )
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(
                f"{name}: fraction is the share of the active weights that is replaced, in (0, 1). "
                f"Received: {self.fraction!r}"
            )
        for field in ("frequency", "end_step", "seed"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ValueError(f"{name}: {field} must be an integer. Received: {value!r}")
            object.__setattr__(self, field, int(value))
        if self.frequency < 1:
            raise ValueError(f"{name}: frequency must be ≥ 1. Received: {self.frequency}")
        if self.end_step < self.frequency:
            raise ValueError(
                f"{name} never rewires: end_step={self.end_step} comes before the first rewiring, "
                f"at step frequency={self.frequency}. Lower frequency or raise end_step."
            )
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"{name}: distribution is one of {', '.join(map(repr, DISTRIBUTIONS))}. "
                f"Received: {self.distribution!r}"
            )

    def fraction_at(self, step):
        """Returns the share of the active weights that a rewiring at `step` replaces.

        Args:
            step: An `int`, or an integer tensor (also inside `tf.function`).

        Returns:
            A `float` for an `int`, else a float32 tensor.
        """
        return self.fraction if isinstance(step, int) else tf.fill(tf.shape(step), self.fraction)

    def latest_update(self, step):
        """Returns the last step, at or before `step`, that rewires; 0 before the first.

        Args:
            step: An `int`, or an integer tensor (also inside `tf.function`).

        Returns:
            The step, as an `int` or a tensor as `step` is.
        """
        inside = (
            min(step, self.end_step)
            if isinstance(step, int)
            else tf.minimum(step, tf.cast(self.end_step, step.dtype))
        )
        return inside - inside % self.frequency

    def moved_at(self, step, kept: int, n: int):
        """Returns how many of `kept` active weights, of `n` in all, a rewiring at `step` replaces."""
        wanted = tf.round(tf.cast(self.fraction_at(step), tf.float32) * float(kept))
        return tf.minimum(tf.cast(wanted, tf.int32), n - kept)


@dataclasses.dataclass(frozen=True)
class RigL(SET):
    """The rigged lottery: drops the smallest weights, grows those with the largest gradient.

    As `SET`, with two differences. What is grown is not left to chance: the weights whose gradient
    is largest in magnitude are those that would lower the loss most. And the share that is replaced
    falls, from `fraction` to nothing at `end_step`, by a cosine: fraction/2 · (1 + cos(π t/end_step)).

    The gradient is the one of the batch at the step that rewires, as the optimizer gets it: averaged
    over replicas and accumulated batches. It is had from what the optimizer made of it, exactly so
    for SGD, RMSprop, Adam and its relatives, Adagrad, Adadelta, Ftrl, Lion and Muon. Adafactor keeps
    no state of each weight, so there it is the gradient divided by the scale of its row and column.
    A weight that is dropped cannot come back in the same rewiring, only in the next.

    Args:
        sparsity: The fraction of zeros in all kernels together, in [0, 1).
        end_step: The last step that may rewire: three quarters of all steps in the paper.
        frequency: Steps between two rewirings. New weights need time to grow before they compete.
        fraction: The share of the active weights that is replaced at first, in (0, 1).
        distribution: How kernels share the active weights; see `SET`.
        seed: Not used: the gradient decides.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> method = RigL(sparsity=0.95, end_step=1000)
    >>> [round(method.fraction_at(step), 2) for step in (0, 500, 1000)]
    [0.3, 0.15, 0.0]

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, section 3
    and algorithm 1; https://arxiv.org/abs/1911.11134.
    """

    by_gradient = True

    def fraction_at(self, step):
        if isinstance(step, int):
            return self.fraction / 2 * (1 + math.cos(math.pi * min(step / self.end_step, 1.0)))
        done = tf.minimum(tf.cast(step, tf.float32) / self.end_step, 1.0)
        return self.fraction / 2 * (1 + tf.cos(math.pi * done))


def train_sparse(
    model: keras.Model,
    method: SET,
    *,
    include=None,
    exclude=None,
    optimizer: keras.optimizers.Optimizer | None = None,
    initial_step: int = 0,
) -> Report:
    """Makes `model` sparse in place, now, and lets it find its wiring while it trains.

    Give it a fresh model: it is as sparse in its first step as in its last. Kernels get a constraint,
    which Keras applies within the training step, so the number of zeros is exact whenever a step has
    ended: in `fit`, in custom loops, under XLA, mixed precision and `tf.distribute`. The model stays
    what it is: no wrappers, the same names, a plain `.keras` file.

    At first the largest weights are active; those that are zero already never are, as long as there
    are others, so a model from a file or from `prune` keeps its mask. The optimizer's state of
    inactive weights is reset after each step: a weight that is grown starts as if it were new.

    Steps count from this call. Call it again after loading a model or weights, with the same method
    and `initial_step`: the zeros in a file are the mask, and the rewirings go on where they were.
    `keras.callbacks.BackupAndRestore` works as it is. `fit` warns when it starts if it is too short
    for a single rewiring, or if weights were replaced by dense ones since this call. A `tf.function` of your own that contains the
    training step has to be made after the call.

    What this saves is in the file, as with `prune`, and in the network's form; Keras's dense kernels
    take as long as before, in training, too. `accel_tf.sparsify` makes the result faster.

    Args:
        model: A built Keras model: functional, sequential or subclassed. Compile it before or after.
        method: `RigL(0.9, end_step=…)`, or `SET(0.9, end_step=…)`.
        include: Only these layers, and those below them; selectors are those of `prune`. By default
            kernels of rank ≥ 2 are sparse, except depthwise ones.
        exclude: Leave these layers dense, and those below them.
        optimizer: The optimizer that trains the model, if it is not `model.optimizer`: in custom
            training loops, or if `model` is a part of the one you compile.
        initial_step: The step now. To resume training from a checkpoint, pass
            `int(model.optimizer.iterations)`.

    Returns:
        A `Report`: which kernels are sparse, how sparse, and why the other layers are not.

    Raises:
        ValueError: The model is not built, nothing in it can be made sparse, a selector matches no
            layer, or an argument is not what is expected. While training: the optimizer does not
            train the model, or keeps its state in a way that the method cannot follow.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10, name="head")])
    >>> print(at.train_sparse(model, at.RigL(sparsity=0.75, end_step=1000)))
    train_sparse: 1 layer changed, 0 left alone
    layer  changed  note
    -----  -------  -------------------------------------
    head   yes      kernel (8, 10): 20 of 80 active, 0.75
    >>> at.sparsity(model).total
    0.75

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020;
    https://arxiv.org/abs/1911.11134.
    """
    require_model(model, "train_sparse")
    if not isinstance(method, SET):
        raise ValueError(
            f"train_sparse expects RigL(…) or SET(…). Received: {method!r}. Schedules such as "
            "PolynomialDecay are for accel_tf.prune."
        )
    if initial_step < 0:
        raise ValueError(f"initial_step must be ≥ 0. Received: {initial_step}")
    weights = weights_of(model, include, exclude)
    chosen = [w for w in weights if not w.reason]
    shapes = [form_of(w.variable, w.layer).shape(w.variable.shape) for w in chosen]
    counts = active_weights(shapes, method.sparsity, method.distribution) if chosen else []
    kept = {id(w.variable): count for w, count in zip(chosen, counts, strict=True)}
    report = _report(weights, kept)
    if not chosen:
        raise ValueError(f"Nothing in model {model.name!r} can be made sparse:\n{report}")

    step = StepCounter(model, optimizer, initial_step)
    training_start = TrainingStart(model, "train_sparse", optimizer)

    def trainer():
        return optimizer or getattr(model, "optimizer", None)

    for index, (v, count) in enumerate(zip((w.variable for w in chosen), counts, strict=True)):
        mask = RewiredMask(v, count, method, step, trainer, index, initial_step, training_start)
        RewiredConstraint.attach(mask, v)
    if model.compiled:
        model.train_function = None  # traced without these constraints; `fit` makes it anew
    attach(model, report)
    return report


def _report(weights, kept: dict[int, int]) -> Report:
    layers: dict[str, tuple[list, list]] = {}
    for path, _, v, reason in weights:
        active, others = layers.setdefault(path, ([], []))
        if reason:
            # A kernel's reason says more than that of a bias.
            others.insert(0 if len(v.shape) >= 2 else len(others), reason)
            continue
        n = v.shape.num_elements()
        share = f"{kept[id(v)]} of {n} active, {1 - kept[id(v)] / n:.4g}"
        active.append(f"{v.name} {tuple(v.shape)}: {share}")
    done = [Entry(path, "; ".join(active)) for path, (active, _) in layers.items() if active]
    left = [Entry(path, others[0]) for path, (active, others) in layers.items() if not active]
    return Report("train_sparse", tuple(done), tuple(left))
