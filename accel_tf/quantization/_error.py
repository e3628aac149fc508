"""Which layers quantization hurts: the signal-to-noise ratio of each, and what to leave in float."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from accel_tf.layers import require_model, walk
from accel_tf.pruning._figure import axes_or_new
from accel_tf.quantization._fake import FakeQuantize, applying, unrounded
from accel_tf.quantization._layers import QuantizedLayer
from accel_tf.report import Table


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizationError(Table):
    """What `quantization_error` found out: a `Table` of layers, and what follows from it.

    A ratio in decibels is 10·log₁₀ of the power of the float values over that of the error: 20 dB
    is an error of a tenth of the values, and each bit more gives about 6 dB.

    Attributes:
        total: The ratio of the quantized model's output, in dB.
        alone: The ratio of the model's output if only this layer is quantized, by its path.
        own: The ratio of the layer's own output in the quantized model, by its path: its own error
            and that of all layers before it.
        target: The ratio that the suggestion aims at.
        suggestion: Paths of the layers to leave in float, for `exclude`; empty if there is no need.
        reached: The ratio of the output with these layers in float.
    """

    total: float = math.inf
    alone: Mapping[str, float] = dataclasses.field(default_factory=dict)
    own: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target: float = 0.0
    suggestion: list[str] = dataclasses.field(default_factory=list)
    reached: float = math.inf

    def plot(self, axes=None):
        """Draws both ratios of each layer, in the order of the model; the suggestion is in red.

        Args:
            axes: matplotlib axes to draw on; by default, those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        paths = list(self.alone)
        axes = axes_or_new(axes, 7.2, max(2.4, 0.22 * len(paths) + 1))
        rows = np.arange(len(paths))
        red, blue, grey = "#D55E00", "#0072B2", "#999999"
        colors = [red if path in self.suggestion else blue for path in paths]
        axes.scatter(list(self.own.values()), rows, color=grey, marker="|", label="its own output")
        label = "model's output, this layer alone"
        axes.scatter(list(self.alone.values()), rows, color=colors, zorder=3, label=label)
        axes.axvline(self.target, color=red, lw=1, ls="--", label="target")
        axes.axvline(self.total, color="black", lw=1, label="model's output, all layers")
        axes.set_yticks(rows, paths, fontsize="small")
        axes.invert_yaxis()
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlabel("signal to quantization noise (dB)")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
        return axes


def quantization_error(
    quantized: keras.Model, x, *, target: float = 30.0, batch_size: int = 32, verbose: int = 1
) -> QuantizationError:
    """Measures what rounding costs in each layer, and suggests which ones to leave in float.

    The same weights are run with rounding and without, on data without labels: for all layers, and
    for each layer alone. Nothing of the model is changed.

    Args:
        quantized: What `calibrate` or `quantize_aware` and `fit` returned.
        x: Some inputs, 100 or so: an array (n, …), or a list or dict of arrays for several inputs.
        target: The ratio of signal to noise, in dB, that the model's output should have.
        batch_size: How many inputs to run at a time.
        verbose: 1 for a progress bar, 0 for silence.

    Returns:
        A `QuantizationError`: a table of the ratios in dB. `.suggestion` is the smallest set that
        reaches the target when layers are left in float in the order of what they cost alone.

    Raises:
        ValueError: The model is not quantized, its ranges are unknown, or `x` is empty.

    Example:

    >>> import keras, numpy as np
    >>> import accel_tf as at
    >>> keras.utils.set_random_seed(0)
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(2, name="b")]
    ... )
    >>> x = np.random.normal(size=(64, 8))
    >>> quantized = at.calibrate(model, x, verbose=0)
    >>> error = at.quantization.quantization_error(quantized, x, target=38, verbose=0)
    >>> error.total > 20, error.suggestion
    (True, ['a'])
    >>> better = at.calibrate(model, x, exclude=error.suggestion, verbose=0)

    Reference:
        Wu et al., "Integer quantization for deep learning inference", arXiv:2004.09602, section
        5.2, whose analysis of sensitivity and partial quantization this is, by noise.
    """
    require_model(quantized, "quantization_error")
    steps = _steps(quantized)
    calls = _calls_by_layer(steps)
    batches = _batches(x, batch_size)
    bar = keras.utils.Progbar(len(calls) + 2, verbose=verbose, unit_name="layer")

    floats, everything, powers = [], [], {path: np.zeros(2) for path in steps}
    with _recording(steps) as records:
        for batch in batches:  # one at a time, as all outputs of all layers may be large
            floats += _run(quantized, [batch], steps, ())
            clean = {path: record.take() for path, record in records.items()}
            everything += _run(quantized, [batch], steps, tuple(steps))
            for path, record in records.items():
                powers[path] += _powers(clean[path], record.take())
    own = {path: _decibels(*sum(powers[p] for p in paths)) for path, paths in calls.items()}
    total = _ratio(floats, everything)
    bar.add(2)
    alone = {}
    for path, paths in calls.items():
        alone[path] = _ratio(floats, _run(quantized, batches, steps, paths))
        bar.add(1)

    def without(excluded):
        rest = [p for path, paths in calls.items() if path not in excluded for p in paths]
        return _ratio(floats, _run(quantized, batches, steps, rest))

    # The quantizer of an input is no layer to exclude, and one that costs nothing need not be.
    able = (path for path in calls if isinstance(steps[path], QuantizedLayer))
    worst = sorted((path for path in able if alone[path] < math.inf), key=alone.get)
    count = _first(len(worst), lambda n: (without(worst[:n]) if n else total) >= target)
    suggestion = [path for path in calls if path in worst[:count]]
    reached = without(suggestion) if suggestion else total
    rows = [(path, alone[path], own[path], "yes" if path in suggestion else "") for path in calls]
    note = f"All layers: {total:.4g} dB; the target is {target:.4g} dB."
    if suggestion:
        note += f" With those suggested in float: {reached:.4g} dB"
        note += "." if reached >= target else ", and no set of layers gives more."
    return QuantizationError(
        ("layer", "alone", "own output", "leave in float"),
        rows,
        title="Signal to quantization noise in dB: of the model with one layer quantized, of each layer",
        note=note,
        total=total,
        alone=alone,
        own=own,
        target=target,
        suggestion=suggestion,
        reached=reached,
    )


def _steps(model) -> dict[str, keras.Layer]:
    """Returns the layers that round, by path; those inside of others are theirs."""
    steps = {}
    for path, layer in walk(model):
        inside = any(path.startswith(f"{outer}/") for outer in steps)
        if isinstance(layer, QuantizedLayer | FakeQuantize) and not inside:
            steps[path] = layer
    if not steps:
        raise ValueError(
            f"Model {model.name!r} is not quantized, so nothing can be compared. Pass what calibrate "
            "or quantize_aware returned."
        )
    quantizers = [layer for _, layer in walk(model) if isinstance(layer, FakeQuantize)]
    if quantizers and not any(q.fixed or (q.built and q.observer.seen(q)) for q in quantizers):
        raise ValueError(
            f"The ranges of model {model.name!r} are unknown: no data has been seen. Train it with "
            "fit, or make it with calibrate, first."
        )
    return steps


def _calls_by_layer(steps) -> dict[str, list[str]]:
    """Returns the paths of all calls of each layer, by the path that it has in the float model."""
    found: dict[int, list[str]] = {}
    for path, layer in steps.items():
        found.setdefault(id(getattr(layer, "layer", layer)), []).append(path)
    # The names of further calls are longer, see `layers.rebuild_calls`.
    return {min(paths, key=len): paths for paths in found.values()}


def _batches(x, size):
    lengths = {len(array) for array in keras.tree.flatten(x)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "quantization_error needs an array of inputs, or several of one length above 0; "
            f"received lengths {sorted(lengths)}."
        )
    return [
        keras.tree.map_structure(lambda a, s=s: tf.convert_to_tensor(a[s : s + size]), x)
        for s in range(0, lengths.pop(), size)
    ]


def _run(model, batches, steps, rounding) -> list[np.ndarray]:
    """Returns the outputs of all batches as flat arrays, with only some of the layers rounding."""
    results = []
    with contextlib.ExitStack() as stack:
        for path, layer in steps.items():
            stack.enter_context(_in_mode(layer, applying if path in rounding else unrounded))
        for batch in batches:
            results += _flat(model(batch, training=False))
    return results


@contextlib.contextmanager
def _in_mode(layer, mode):
    """Runs each call of `layer` in a mode of _fake.py."""
    with _calls_replaced(layer, lambda call, *args, **kwargs: _within(mode, call, args, kwargs)):
        yield


def _within(mode, call, args, kwargs):
    with mode():
        return call(*args, **kwargs)


@contextlib.contextmanager
def _calls_replaced(layer, run):
    before = layer.call

    def call(*args, **kwargs):
        return run(before, *args, **kwargs)

    outer = layer.__dict__.get("call")
    object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        if outer is None:
            object.__delattr__(layer, "call")
        else:
            object.__setattr__(layer, "call", outer)


@contextlib.contextmanager
def _recording(steps):
    records = {path: _Record() for path in steps}
    with contextlib.ExitStack() as stack:
        for path, layer in steps.items():
            stack.enter_context(_calls_replaced(layer, records[path]))
        yield records


class _Record:
    """The outputs of one layer since the last `take`."""

    def __init__(self):
        self._outputs = []

    def __call__(self, call, *args, **kwargs):
        result = call(*args, **kwargs)
        self._outputs += _flat(result)
        return result

    def take(self) -> list[np.ndarray]:
        outputs, self._outputs = self._outputs, []
        return outputs


def _flat(outputs) -> list[np.ndarray]:
    return [np.asarray(y, "float64").ravel() for y in keras.tree.flatten(outputs) if y is not None]


def _powers(signal, noisy) -> np.ndarray:
    """Returns the sums of squares of the signal and of the noise."""
    pairs = list(zip(signal, noisy, strict=True))
    return np.array(
        [sum(np.sum(s**2) for s, _ in pairs), sum(np.sum((s - n) ** 2) for s, n in pairs)]
    )


def _decibels(power, noise) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def _ratio(signal, noisy) -> float:
    """Returns the signal-to-noise ratio in dB; infinite if there is no noise."""
    return _decibels(*_powers(signal, noisy))


def _first(n: int, holds) -> int:
    """Returns the first of 0, …, n that holds if all after it do; n if none does."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
