"""Which layers can be pruned, and how far: each one alone, without training, against a budget."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from accel_tf.layers import require_model
from accel_tf.pruning._constraint import Masks
from accel_tf.pruning._figure import axes_or_new
from accel_tf.pruning._forms import form_of
from accel_tf.pruning._patterns import Pattern, Unstructured
from accel_tf.pruning._prune import _with_obstacle, prune
from accel_tf.pruning._schedules import ConstantSparsity, Schedule
from accel_tf.pruning._selection import weights_of
from accel_tf.report import Entry, Report, Table, attach, shorten

_UNITS = 10_000  # parts of the budget that layers can get
_RESOLUTION = 2.5e-7  # of a score near 1, which Keras computes in float32


@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity(Table):
    """What `sensitivity` found out: a `Table` of layers by sparsities, and what follows from it.

    Attributes:
        metric: The name of what was measured.
        baseline: Its value for the model as it is.
        drops: How much worse it gets, by the layer's path and the sparsity; below 0: it gets better.
        budget: What may be lost, in the unit of the metric, by all layers together.
        proposal: The sparsity proposed for each layer, by its path; 0.0 leaves it alone.
        predicted_drop: What the proposal would lose, if losses added up.
        total: The sparsity of all these layers together, if they are pruned as proposed.
        pattern: The pattern that they were pruned with.
        include: The selectors that chose them.
    """

    metric: str = ""
    baseline: float = 0.0
    drops: Mapping[str, Mapping[float, float]] = dataclasses.field(default_factory=dict)
    budget: float = 0.0
    proposal: Mapping[str, float] = dataclasses.field(default_factory=dict)
    predicted_drop: float = 0.0
    total: float = 0.0
    pattern: Pattern = Unstructured()
    include: object = None

    def prune(
        self,
        model: keras.Model,
        schedule: Callable[[float], Schedule] = ConstantSparsity,
        **options,
    ) -> Report:
        """Prunes each layer of `model` as proposed; it calls `accel_tf.prune` once for each.

        Args:
            model: The model, or another of the same layers.
            schedule: A function from the sparsity of a layer to its schedule, such as
                `lambda s: PolynomialDecay(s, end_step=1000)`. By default it is pruned at once.
            **options: `optimizer`, `initial_step`, … of `accel_tf.prune`.

        Returns:
            A `Report` of all layers.

        Raises:
            ValueError: The model lacks a layer of the proposal, or as `accel_tf.prune`.
        """
        weights = weights_of(model, self.include)
        owners = {w.path: "" for w in weights}
        if missing := [path for path in self.proposal if path not in owners]:
            raise ValueError(
                f"Model {model.name!r} has no layer {shorten(missing)}: the proposal is for another."
            )
        done = {}
        # Layers within a layer that has kernels of its own come first: its own call is the last.
        for path, level in reversed(self.proposal.items()):
            if not level:
                continue
            others = {p for p in owners if p != path and not path.startswith(f"{p}/")}
            report = prune(
                model,
                schedule(level),
                pattern=self.pattern,
                include=self.include,
                exclude=(lambda p, _, others=others: p in others) if others else None,
                **options,
            )
            done |= {entry.layer: entry for entry in report.done if entry.layer == path}
        for w in sorted(weights, key=lambda w: len(w.variable.shape)):  # a kernel's reason prevails
            owners[w.path] = w.reason
        left = {
            p: r or f"{self.pattern!r} does not fit, or was excluded" for p, r in owners.items()
        }
        left |= {p: "0 proposed: it is too sensitive" for p, s in self.proposal.items() if not s}
        report = Report(
            "prune",
            tuple(done[path] for path in owners if path in done),
            tuple(Entry(path, why) for path, why in left.items() if path not in done),
        )
        attach(model, report)
        return report

    def plot(self, axes=None):
        """Draws the drop of each layer over its sparsity, and the budget.

        Dots are what is proposed. Lines that leave the picture lose more than 12 budgets. The legend
        is in the order of the drops at the right edge; beyond 20 layers it names the most sensitive
        ones, and the others are grey.

        Args:
            axes: matplotlib axes to draw on; by default, those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes = axes_or_new(axes, 7.2, 3.9)
        order = sorted(self.drops, key=lambda path: -list(self.drops[path].values())[-1])
        shown, others = order[:20], order[20:]
        import matplotlib

        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, max(len(shown), 2)))
        styles = ("-", "--", ":")
        for i, path in enumerate(others + shown):
            x = [0.0, *self.drops[path]]
            y = [0.0, *self.drops[path].values()]
            rank = i - len(others)
            look = {"color": "#bbbbbb", "lw": 0.8, "zorder": 1}
            if rank >= 0:
                look = {"color": colors[rank], "ls": styles[rank % 3], "label": path}
            elif i == 0:
                look["label"] = f"{len(others)} others"
            axes.plot(x, y, **look)
            if (s := self.proposal[path]) > 0:
                dot = {"color": look["color"], "edgecolor": "white", "zorder": 3}
                axes.scatter([s], [self.drops[path][s]], **dot)
        axes.axhline(self.budget, color="#D55E00", lw=1, ls="--")
        axes.annotate(
            "budget",
            (0, self.budget),
            xytext=(3, 3),
            textcoords="offset points",
            color="#D55E00",
            fontsize="small",
        )
        # What a layer loses far above the budget does not matter, only that it does.
        values = [drop for levels in self.drops.values() for drop in levels.values()]
        top = min(max(values), 12 * self.budget) if self.budget else max(values)
        if top > 0:
            axes.set_ylim(max(min(values), -top / 3) - 0.05 * top, 1.05 * top)
        axes.set(xlabel="sparsity of the layer alone", ylabel=f"drop of {self.metric}")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
        return axes


def sensitivity(
    model: keras.Model,
    data=None,
    *,
    metric: str | Callable[[keras.Model], float] | None = None,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    pattern: Pattern = Unstructured(),  # noqa: B008 – frozen
    budget: float = 0.01,
    include=None,
    exclude=None,
    batch_size: int = 256,
    verbose: int = 1,
) -> Sensitivity:
    """Measures what each layer loses if it alone is pruned, and proposes a sparsity for each.

    Each layer is pruned by magnitude to each of the sparsities, the model is evaluated, and the
    layer gets its weights back; nothing is trained, and the model stays as it is.

    The proposal has the most zeros in all layers together whose drops, added up, stay within the
    budget: a knapsack, solved exactly up to a 10,000th of the budget. An equal share for each layer
    would waste that of the layers that need none. It takes losses for additive, which holds while
    they are small, not when many layers are pruned far; and it takes the largest drop up to a
    sparsity for the one there, and no drop for less than none, so that luck on a few samples pays for
    nothing. So it is a beginning: prune gradually, train on, and measure on data not used here.

    Args:
        model: A built Keras model, trained; compiled, unless `metric` is a function.
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, or structures of them, a
            `tf.data.Dataset` of batches or a `keras.utils.PyDataset`. Validation data, a thousand
            samples or more: a budget of 0.01 is one sample in a hundred. `None` if `metric` needs
            none.
        metric: The name of a metric that the model is compiled with, or `"loss"`; or a function of
            the model that returns a number, where higher is better. By default the first compiled
            metric, or the loss if there is none.
        sparsities: What to try, each in (0, 1).
        pattern: Which weights go together, as in `prune`.
        budget: The drop to accept, ≥ 0, of all layers together: 0.01 of an accuracy is one point.
        include, exclude: The layers to try, as in `prune`.
        batch_size: How many samples of arrays to run at a time.
        verbose: 1 for a progress bar, 0 for silence.

    Returns:
        A `Sensitivity`: a table of layers by sparsities. `.proposal` is the sparsity for each layer,
        `.prune(model, …)` applies it, `.plot()` draws the drops, `.drops` has the exact numbers.

    Raises:
        ValueError: The model is not built, or not compiled; there are no data; nothing can be pruned;
            a score is NaN or infinite; Keras does not know whether more of a metric is better; or
            an argument is not what is expected.

    Example:

    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((2,)),
    ...         keras.layers.Dense(4, use_bias=False, name="a"),
    ...         keras.layers.Dense(2, use_bias=False, name="b"),
    ...     ]
    ... )
    >>> model.set_weights([np.eye(2, 4), np.eye(4, 2)])
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0]] * 5)
    >>> model.compile(loss="mse")
    >>> found = at.sensitivity(model, (x, x), sparsities=(0.75, 0.875), verbose=0)
    >>> found.proposal
    {'a': 0.75, 'b': 0.75}
    >>> report = found.prune(model, lambda s: at.PolynomialDecay(s, end_step=1000))

    Reference: Han et al., "Learning both weights and connections for efficient neural networks"
    (2015), section 5 and figure 6, https://arxiv.org/abs/1506.02626; Li et al., "Pruning filters for
    efficient ConvNets", ICLR 2017, section 3.2 and figure 2, https://arxiv.org/abs/1608.08710.
    """
    require_model(model, "sensitivity")
    levels = _checked(sparsities, budget)
    weights = [_with_obstacle(w, pattern) for w in weights_of(model, include, exclude)]
    groups: dict[str, list] = {}
    for w in weights:
        if not w.reason:
            groups.setdefault(w.path, []).append(w)
    left = {w.path: w.reason for w in weights if w.reason and len(w.variable.shape) >= 2}
    left = [f"{path}: {reason}" for path, reason in left.items() if path not in groups]
    if not groups:
        raise ValueError(
            f"Nothing in model {model.name!r} can be pruned. {shorten(left) or 'It has no kernels.'}"
        )

    bar = keras.utils.Progbar(1 + len(groups) * len(levels), verbose=verbose, unit_name="model")
    drops, zeros = {}, {}
    with _metrics_kept(model):
        score = _Score(model, data, metric, batch_size)
        bar.add(1)
        for path, group in groups.items():
            drops[path], zeros[path] = {}, []
            for level in levels:
                with _pruned(group, level, pattern) as count:
                    drops[path][level] = score.drop(f"layer {path!r} at sparsity {level:.4g}")
                zeros[path].append(count)
                bar.add(1)

    chosen = _allocate([list(d.values()) for d in drops.values()], list(zeros.values()), budget)
    proposal = dict(zip(groups, [(0.0, *levels)[i] for i in chosen], strict=True))
    sizes = [sum(math.prod(w.variable.shape) for w in group) for group in groups.values()]
    total = sum((0, *zeros[path])[i] for path, i in zip(groups, chosen, strict=True)) / sum(sizes)
    predicted = sum(
        max(0.0, *list(drops[path].values())[:i]) if i else 0.0
        for path, i in zip(groups, chosen, strict=True)
    )
    rows = [
        (path, size, *drops[path].values(), proposal[path])
        for path, size in zip(groups, sizes, strict=True)
    ]
    note = (
        f"Proposed: {total:.4g} of these weights, for a drop of {predicted:.4g} if drops add up; "
        f"the budget is {budget:.4g}."
    )
    if left:
        note += f"\nLeft alone: {shorten(left)}"
    return Sensitivity(
        ("layer", "weights", *(f"{level:.4g}" for level in levels), "proposed"),
        rows,
        title=f"Drop of {score.name} ({score.baseline:.4g} as it is) with one layer alone at a sparsity",
        note=note,
        metric=score.name,
        baseline=score.baseline,
        drops=drops,
        budget=budget,
        proposal=proposal,
        predicted_drop=predicted,
        total=total,
        pattern=pattern,
        include=include,
    )


class _Score:
    """What is measured: `baseline` of the model as it was, and the drop from there."""

    def __init__(self, model, data, metric, batch_size):
        self._model = model
        if callable(metric):
            self.name = getattr(metric, "__name__", "the score").strip("<>")
            self._measure, self._sign = lambda: float(metric(model)), 1
        else:
            self._arguments = _arguments(model, data) | {"batch_size": batch_size, "verbose": 0}
            if "y" not in self._arguments:  # comes in batches
                del self._arguments["batch_size"]
            self.name = self._name(metric)
            self._measure = lambda: self._evaluate()[self.name]
            self._sign = 1 if _higher_is_better(model, self.name) else -1
        self.baseline = self._finite("the model as it is")

    def drop(self, of: str) -> float:
        return self._sign * (self.baseline - self._finite(of))

    def _finite(self, of):
        value = self._measure()
        if not math.isfinite(value):
            raise ValueError(
                f"The {self.name} of {of} is {value}: nothing can be compared with it."
            )
        return value

    def _evaluate(self):
        results = self._model.evaluate(**self._arguments, return_dict=True)
        return {name: float(value) for name, value in results.items()}

    def _name(self, metric):
        results = self._evaluate()
        if metric is None:
            metrics = [name for name in results if not _is_loss(name)]
            return (metrics or ["loss"])[0]
        if metric not in results:
            raise ValueError(
                f"No metric {metric!r}: model {self._model.name!r} is compiled with "
                f"{', '.join(results)}. Compile it with the metric, or pass a function of the model."
            )
        return metric


def _arguments(model, data) -> dict:
    """The data as arguments of `model.evaluate`."""
    if not model.compiled:
        raise ValueError(
            f"Model {model.name!r} is not compiled, so it has no metric. Call model.compile(…) with "
            "a loss and metrics, or pass sensitivity(…, metric=a function of the model)."
        )
    if isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        return {"x": _finite_and_not_empty(data)}
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            "sensitivity evaluates the model again and again: pass data that can be read as often, "
            "(x, y), (x, y, sample_weight), a tf.data.Dataset or a keras.utils.PyDataset. "
            f"Received: {type(data).__name__}"
        )
    if any(len(array) == 0 for array in keras.tree.flatten(data[0])):
        raise ValueError("sensitivity needs data to evaluate on; x has no samples.")
    return dict(zip(("x", "y", "sample_weight"), data, strict=False))


def _finite_and_not_empty(data):
    if isinstance(data, keras.utils.PyDataset):
        batches = len(data)
    else:
        batches = int(data.cardinality())
        if batches == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "sensitivity needs a finite dataset; end this one with .take(batches)."
            )
        if batches == tf.data.UNKNOWN_CARDINALITY:  # Keras would warn of its end each time
            batches = int(data.reduce(0, lambda count, *_: count + 1))
            data = data.apply(tf.data.experimental.assert_cardinality(batches))
    if not batches:
        raise ValueError("sensitivity needs data to evaluate on; the dataset has no batch.")
    return data


def _is_loss(name: str) -> bool:
    return name == "loss" or name.endswith("_loss")


def _higher_is_better(model, name: str) -> bool:
    if _is_loss(name):
        return False
    metrics = [m for group in model.metrics for m in getattr(group, "metrics", None) or [group]]
    # With several outputs, Keras puts the name of one before that of its metric.
    fitting = [m for m in metrics if name == m.name or name.endswith(f"_{m.name}")]
    # As `EarlyStopping` does, which knows no other way either.
    direction = getattr(max(fitting, key=lambda m: len(m.name), default=None), "_direction", None)
    if direction not in ("up", "down"):
        raise ValueError(
            f"Is more of {name!r} better, or less? Keras does not know. Pass sensitivity(…, metric=f) "
            "with a function f(model) -> float, where higher is better."
        )
    return direction == "up"


def _checked(sparsities, budget) -> tuple[float, ...]:
    levels = tuple(sorted({float(level) for level in sparsities}))
    if not levels or levels[0] <= 0 or levels[-1] >= 1:
        raise ValueError(
            f"sparsities are fractions of zeros to try, in (0, 1). Received: {sparsities!r}"
        )
    if not (0 <= budget < math.inf):
        raise ValueError(
            "budget is the drop of the metric to accept, ≥ 0: 0.01 of an accuracy is one point. "
            f"Received: {budget!r}"
        )
    return levels


class _metrics_kept:
    """Gives the model's metrics their values back: `fit` may be in the middle of an epoch."""

    def __init__(self, model):
        self._model = model

    def __enter__(self):
        self._saved = [(v, tf.identity(v.value)) for v in self._variables()]

    def __exit__(self, *_):
        for v, value in self._saved:
            v.assign(value)

    def _variables(self):
        return self._model.metrics_variables if self._model.compiled else []


class _pruned:
    """Prunes the weights of one layer while it lasts; enters with the number of zeros."""

    def __init__(self, weights, level, pattern):
        self._weights, self._level, self._pattern = weights, level, pattern

    def __enter__(self):
        self._saved = [(w.variable, tf.identity(w.variable.value)) for w in self._weights]
        try:
            return sum(self._prune(w.variable, w.layer) for w in self._weights)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        for v, value in self._saved:
            v.assign(value)

    def _prune(self, v, layer) -> int:
        schedule, forms = ConstantSparsity(self._level), {id(v): form_of(v, layer)}
        masks = Masks([v], schedule, self._pattern, None, forms)
        masks.start(0)
        mask = tf.convert_to_tensor(masks.masks[id(v)])
        v.assign(tf.where(mask, v.value, tf.zeros((), v.value.dtype)))
        return int(tf.size(mask)) - int(tf.math.count_nonzero(mask))


def _allocate(drops, zeros, budget) -> list[int]:
    """Chooses the option of each layer, 0 for none, with most zeros within the budget.

    Args:
        drops: For each layer, the drop at each sparsity, in rising order.
        zeros: The same for the number of zeros.
        budget: What the drops chosen may add up to.
    """
    best = np.zeros(_UNITS + 1, np.int64)  # the most zeros, by the units that are spent at most
    picks = []
    for row, gains in zip(drops, zeros, strict=True):
        # Nothing is gained by a drop that is negative, or smaller than at a lower sparsity.
        costs = np.maximum.accumulate(np.maximum(row, 0.0)) - _RESOLUTION
        if budget > 0:
            costs = np.ceil(np.maximum(costs, 0.0) / budget * _UNITS - 1e-6)
        else:
            costs = np.where(costs > 0, np.inf, 0.0)
        new, pick = best.copy(), np.zeros(_UNITS + 1, np.int64)
        for option, (cost, gain) in enumerate(zip(costs, gains, strict=True), start=1):
            if cost > _UNITS:
                continue
            cost = int(cost)
            reached = best[: _UNITS + 1 - cost] + gain
            better = reached > new[cost:]
            new[cost:][better] = reached[better]
            pick[cost:][better] = option
        best = new
        picks.append((pick, costs))
    chosen, left = [], _UNITS
    for pick, costs in reversed(picks):
        option = int(pick[left])
        chosen.append(option)
        left -= int(costs[option - 1]) if option else 0
    return chosen[::-1]
