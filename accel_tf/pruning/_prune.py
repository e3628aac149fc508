"""The verb `prune`."""

import math
from collections.abc import Callable

import keras
import numpy as np

from accel_tf.layers import require_model
from accel_tf.pruning._constraint import MaskConstraint, Masks, StepCounter
from accel_tf.pruning._criteria import Criterion, Magnitude, SoftThreshold
from accel_tf.pruning._curves import FunctionSchedule
from accel_tf.pruning._distribution import active_weights
from accel_tf.pruning._forms import form_of
from accel_tf.pruning._patterns import NM, Channels, Pattern, Unstructured
from accel_tf.pruning._schedules import Schedule, require_integer
from accel_tf.pruning._selection import Weight, weights_of
from accel_tf.pruning._start import TrainingStart
from accel_tf.report import Entry, Report, attach

_BY_SHAPE = ("erdos_renyi", "erdos_renyi_kernel")


def prune(
    model: keras.Model,
    schedule: Schedule | Callable[[int], float],
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 – frozen
    criterion: Criterion = Magnitude(),  # noqa: B008 – frozen
    scope: str = "layer",
    include=None,
    exclude=None,
    optimizer: keras.optimizers.Optimizer | None = None,
    initial_step: int = 0,
    steps: int | None = None,
    steps_per_epoch: int | None = None,
) -> Report:
    """Prunes `model` in place, now and after each optimizer step, as `schedule` says.

    The weights get a constraint, which Keras applies within the training step, so the sparsity is
    exact whenever a step has ended: in `fit`, in custom loops, under XLA, mixed precision and
    `tf.distribute`. The model stays what it is: no wrappers, the same names, a plain `.keras` file.

    Steps count from this call, under any optimizer: compile the model anew, and the schedule goes on.
    Call `prune` again to replace the schedule of the weights it selects; the others keep theirs, and
    `strip_pruning` ends it. A `tf.function` of your own that contains the training step has to be
    made after the call, as it records the constraints it finds.

    When `fit` starts, a warning is given if the training ends before the schedule does. The check does
    not see `initial_epoch` or the length of a generator, and is repeated only after `compile`;
    `SparsityLog` checks at each `fit`.

    Call `prune` again after loading a model or weights, not before, with `initial_step`: a file
    holds the zeros, not the schedule. A loaded model that is trained without this call loses its
    zeros, and nothing can warn of it; `accel_tf.sparsity(model).total` shows how many there are.
    Dense weights that are loaded into a pruned model are pruned by their magnitude in the first
    step, with a warning if `fit` has not yet run since `compile`; after that, the old mask is
    applied to them.

    On several workers, `fit` of Keras 3 fails (keras issue 20585). A custom training loop works, with
    the same weights on all workers: build the model and call `prune(model, …, optimizer=optimizer)`
    in the strategy's scope, then `optimizer.apply` in `strategy.run`; see `accel_tf.distribute`.

    Callbacks that bring back earlier weights (`EarlyStopping(restore_best_weights=True)`) bring back
    their sparsity, too: let them start after the schedule's end, with `start_from_epoch`.

    Zeros alone make files smaller once they are compressed, not models faster: Keras's dense
    kernels multiply by zero. `accel_tf.sparsify` does not.

    Args:
        model: A built Keras model: functional, sequential or subclassed. Compile it before or after.
        schedule: `ConstantSparsity(0.8)`, `PolynomialDecay(0.9, end_step=1000)`, …, or a function
            `step -> sparsity`, with `steps`.
        pattern: Which weights go together: `Unstructured()`, `Block((1, 4))`, `NM(2, 4)`,
            `Channels()`.
        criterion: Which weights go first: `Magnitude()`, the smallest; `Movement()`, those that
            training moves to zero; `Taylor(x, y)`, those that the loss misses least, as SNIP;
            `SoftThreshold(strength)`, the smallest, which an L1 penalty makes exactly zero.
        scope: `"layer"` gives each kernel the schedule's sparsity; `"global"` gives it to all
            together, so that the smallest weights go wherever they are. That is more accurate at
            high sparsity, but may empty a layer. `"erdos_renyi"` and `"erdos_renyi_kernel"` give it
            to all together, too, and share it by the kernels' shapes, so that small kernels stay
            denser: see `SET`.
        include: Only these layers, and those below them: a layer, a layer class, a name or path with
            wildcards (`"block_*"`), a function `(path, layer) -> bool`, or a sequence of those. By
            default kernels of rank ≥ 2 are pruned, except depthwise ones; biases, normalization and
            embeddings are not. A layer that you include itself gives up all its trainable weights
            of rank ≥ 2, except biases.
        exclude: Leave these layers alone, and those below them; written as `include`.
        optimizer: The optimizer that trains the model, if it is not `model.optimizer`: in custom
            training loops, or if `model` is a part of the one you compile.
        initial_step: The schedule's step now. To resume training from a checkpoint, pass
            `int(model.optimizer.iterations)`.
        steps: The step at which training is going to end, to be told now if that is too early for
            the schedule. A function as the schedule needs it: it is followed until then.
        steps_per_epoch: The optimizer steps in an epoch, for a schedule in epochs, such as
            `PolynomialDecay(0.9, end_epoch=8)`.

    Returns:
        A `Report`: what is pruned, and why the other layers are not.

    Raises:
        ValueError: The model is not built, nothing in it can be pruned, a selector matches no layer,
            the schedule does not end within `steps`, the criterion has no scores yet at a step that
            prunes already, or an argument is not what is expected.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10, name="head")])
    >>> print(at.prune(model, at.ConstantSparsity(0.75)))
    prune: 1 layer changed, 0 left alone
    layer  changed  note
    -----  -------  ------------------------------
    head   yes      kernel (8, 10): 0.75 by step 0
    >>> at.sparsity(model).total
    0.75

    Reference: Han et al., "Learning both weights and connections for efficient neural networks"
    (2015); https://arxiv.org/abs/1506.02626.
    """
    require_model(model, "prune")
    schedule = _in_steps(schedule, steps, steps_per_epoch)
    _validate(schedule, pattern, criterion, scope, initial_step)
    weights = [_with_obstacle(w, pattern) for w in weights_of(model, include, exclude)]
    chosen = [w.variable for w in weights if not w.reason]
    forms = {id(w.variable): form_of(w.variable, w.layer) for w in weights if not w.reason}
    groups = [chosen] if scope == "global" else [[v] for v in chosen]
    levels = _levels(groups, forms, schedule, pattern, scope)
    goals = {}
    for group, rise in zip(groups, levels, strict=True):
        # The schedule's own number where it is for all: patterns may round theirs up.
        goal = rise[-1] if scope in _BY_SHAPE else schedule.sparsity_at(schedule.reached_at)
        goals |= {id(v): goal for v in group}
    report = _report(weights, forms, goals, schedule, pattern, criterion)
    if not chosen:
        raise ValueError(f"Nothing in model {model.name!r} can be pruned:\n{report}")

    step = StepCounter(model, optimizer, initial_step)
    scores = criterion.bind(model, chosen, step)
    training_start = TrainingStart(model, "prune", optimizer)
    for group, rise in zip(groups, levels, strict=True):
        masks = Masks(group, schedule, pattern, step, forms, scores, rise, training_start)
        masks.start(initial_step)
        if not scores.ready and not all(map(masks.holds, group)):
            raise ValueError(
                f"{criterion!r} has no scores before training, and {schedule!r} prunes at step "
                f"{initial_step} already. Begin later, or with no sparsity: "
                "PolynomialDecay(0.9, end_step=…), OneShot(0.8, begin_step=…)."
            )
        for v in group:
            MaskConstraint.attach(masks, v)
    if model.compiled:
        model.train_function = None  # traced without these constraints; `fit` makes it anew
    attach(model, report)
    return report


def _in_steps(schedule, steps, steps_per_epoch) -> Schedule:
    """The schedule as one of ours that counts in steps, and ends within those there are."""
    if steps is not None:
        require_integer("steps", steps, 1)
    if not isinstance(schedule, Schedule):
        foreign = type(schedule).__module__.startswith("tensorflow_model_optimization")
        if foreign or isinstance(schedule, type) or not callable(schedule):
            hint = (
                "Convert it with accel_tf.interop.tfmot.from_tfmot."
                if foreign
                else "ConstantSparsity(0.8) prunes at once, PolynomialDecay(0.8, end_step=…) "
                "gradually."
            )
            raise ValueError(
                "prune expects a schedule of accel_tf or a function step -> sparsity. "
                f"Received: {schedule!r}. {hint}"
            )
        if steps is None:
            raise ValueError(
                f"Until which step is the function {schedule!r} the schedule? Pass prune(…, steps=…), "
                "those of the whole training, or FunctionSchedule(function, end_step=…, frequency=…)."
            )
        return FunctionSchedule(schedule, end_step=steps)
    if schedule.counts_epochs and steps_per_epoch is None:
        raise ValueError(schedule.epochs_unknown)
    if steps_per_epoch is not None:
        schedule = schedule.in_steps(steps_per_epoch)
    if steps is not None and schedule.reached_at > steps:
        raise ValueError(
            f"Training ends at step {steps}, too early for the schedule: it goes on to step "
            f"{schedule.reached_at}. Train longer, or end the schedule earlier, some time before "
            f"the training does. Received: {schedule!r}"
        )
    return schedule


def _validate(schedule, pattern, criterion, scope, initial_step):
    if not isinstance(pattern, Pattern):
        raise ValueError(
            "prune expects a pattern such as Unstructured(), Block((1, 4)), NM(2, 4) or Channels(). "
            f"Received: {pattern!r}"
        )
    if not isinstance(criterion, Criterion):
        raise ValueError(
            "prune expects a criterion: Magnitude(), Movement(), Taylor(x, y) or SoftThreshold(1e-4). "
            f"Received: {criterion!r}"
        )
    if isinstance(pattern, Channels) and pattern.criterion == "l2" and criterion.signed:
        raise ValueError(
            f"The scores of {criterion!r} have signs, which the norm of {pattern!r} would hide: pass "
            'Channels("mean").'
        )
    if isinstance(criterion, SoftThreshold) and not isinstance(pattern, Unstructured):
        raise ValueError(
            f"{criterion!r} sets single weights to zero, so it cannot keep {pattern!r}: pass "
            "Unstructured() or another criterion."
        )
    pattern.levels(schedule)
    if scope not in ("layer", "global", *_BY_SHAPE):
        raise ValueError(
            'scope is "layer", "global", "erdos_renyi" or "erdos_renyi_kernel". '
            f"Received: {scope!r}"
        )
    if scope in _BY_SHAPE and isinstance(pattern, NM):
        raise ValueError(
            f"{pattern!r} gives each kernel the same sparsity; scope {scope!r} does not."
        )
    if initial_step < 0:
        raise ValueError(f"initial_step must be ≥ 0. Received: {initial_step}")


def _levels(groups, forms, schedule, pattern, scope) -> list[np.ndarray]:
    """The sparsity of each group at each update of the schedule."""
    together = pattern.levels(schedule)
    if scope not in _BY_SHAPE:
        return [together] * len(groups)
    shapes = [forms[id(v)].shape(v.shape) for (v,) in groups]
    sizes = np.array([math.prod(shape) for shape in shapes])
    kept = [active_weights(shapes, float(sparsity), scope) for sparsity in together]
    return list(np.float32(1 - np.array(kept) / sizes).T) if groups else []


def _with_obstacle(weight: Weight, pattern: Pattern) -> Weight:
    if weight.reason:
        return weight
    shape = form_of(weight.variable, weight.layer).shape(weight.variable.shape)
    return weight._replace(reason=pattern.obstacle(shape, weight.layer))


def _report(weights: list[Weight], forms, goals, schedule, pattern, criterion) -> Report:
    by = "" if criterion == Magnitude() else repr(criterion)
    layers: dict[str, list[Weight]] = {}
    for weight in sorted(weights, key=lambda w: len(w.variable.shape) < 2):
        layers.setdefault(weight.path, []).append(weight)
    done, left = [], []
    for path in dict.fromkeys(w.path for w in weights):  # in the model's order
        pruned, others = [], []
        for _, _, v, reason in layers[path]:
            if not reason:
                goal = f"{goals[id(v)]:.4g} by step {schedule.reached_at}"
                remarks = (goal, pattern.remark(forms[id(v)].shape(v.shape)), by)
                pruned.append(f"{v.name} {tuple(v.shape)}: {', '.join(filter(None, remarks))}")
            elif len(v.shape) >= 2:
                others.append(f"not {v.name}: {reason}")
        if pruned:
            done.append(Entry(path, "; ".join(pruned + others)))
        else:
            left.append(Entry(path, layers[path][0].reason))  # a kernel's, if it has one
    return Report("prune", tuple(done), tuple(left))
