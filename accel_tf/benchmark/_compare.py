"""One table for the question of every chapter: what does each model cost, and how good is it?"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from accel_tf import layers
from accel_tf.benchmark import _candidates
from accel_tf.benchmark._cost import FileSize, file_size, flops, parameters
from accel_tf.benchmark._latency import Latency, Progress, measure_latency
from accel_tf.report import Table, human_bytes


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What `compare` found out about one model; `None` where it does not apply.

    Attributes:
        score: The value of the metric, by default the accuracy, between 0 and 1.
        parameters: The number of parameters.
        nonzero: The number of parameters that are not zero.
        flops: FLOPs of one forward pass on one sample.
        size: Bytes on disk, plain and gzipped.
        latency: The `Latency` on the batch, in seconds.
    """

    score: float | None
    parameters: int | None
    nonzero: int | None
    flops: int | None
    size: FileSize
    latency: Latency


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Table):
    """The table that `compare` returns; index it by a model's name for the exact numbers.

    Attributes:
        results: A `Measurement` for each model, by name.
    """

    results: Mapping[str, Measurement] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Measurement:
        if name not in self.results:
            raise KeyError(f"No model {name!r}; there are {', '.join(self.results)}.")
        return self.results[name]

    def speedup(self, name: str) -> float:
        """How many times faster `name` is than the first model, by the medians."""
        first = next(iter(self.results.values()))
        return first.latency.median / self[name].latency.median


def compare(
    models: Mapping[str, Any],
    x,
    y=None,
    *,
    metric: str | Callable | keras.Metric = "accuracy",
    latency_batch: int = 1,
    rounds: int = 100,
    verbose: int = 1,
) -> Comparison:
    """Measures models side by side: quality, parameters, FLOPs, size, latency.

    Args:
        models: Names and built Keras models, or paths of `.tflite` files (run by LiteRT; inputs
            are quantized and outputs dequantized by the file's own scales). The first is
            the baseline of the last column.
        x: The samples, as values, integers too: an array, or a list or dictionary of arrays for models of several inputs.
        y: The labels: integers of shape `(n,)` or `(n, 1)`, or one-hot of the shape of the outputs.
            `None` leaves the metric out.
        metric: `"accuracy"`, which takes the arg-max of the last axis, or the side of 0.5 for a
            single output; or the name of a Keras metric, a `keras.Metric`, or a function
            `(y, outputs) -> float` of NumPy arrays.
        latency_batch: The number of samples in the batch that is timed.
        rounds: The number of timed calls of each model; see `measure_latency`.
        verbose: 0 is silent, 1 shows a progress bar when it takes longer than two seconds.

    Returns:
        A `Comparison`, which is a `Table` for the terminal and the notebook. Its exact numbers are in
        `comparison["name"]`, a `Measurement`.

    Raises:
        ValueError: There is no model, one is neither a built Keras model nor a `.tflite` file, or
            the labels do not fit the outputs.

    Example:

    >>> x, y = np.eye(4, dtype="float32"), np.arange(4)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, "softmax", False)])
    >>> model.set_weights([np.eye(4)])
    >>> table = at.compare({"identity": model}, x, y, verbose=0)
    >>> table["identity"].score, table["identity"].parameters, table["identity"].nonzero
    (1.0, 16, 4)
    """
    if not models:
        raise ValueError("compare needs at least one model, received none.")
    for name, model in models.items():
        _candidates.check(name, model)
        if not _candidates.is_litert(model):
            layers.require_model(model, "compare")
    x = _candidates.as_arrays(x)
    count = _candidates.length(x)
    if y is not None and len(y) != count:
        raise ValueError(f"x has {count} samples and y {len(y)}; they must be equal.")
    if not 1 <= latency_batch <= count:
        raise ValueError(
            f"latency_batch must be between 1 and the {count} samples of x. "
            f"Received: latency_batch={latency_batch}"
        )

    progress = Progress("model", len(models), verbose)
    costs = {}
    for i, (name, model) in enumerate(models.items()):
        costs[name] = _costs(name, model, x, y, metric)
        progress.update(i + 1)
    batch = _candidates.rows(x, 0, latency_batch)
    times = measure_latency(models, batch, rounds=rounds, verbose=verbose)
    results = {name: Measurement(**costs[name], latency=times[name]) for name in models}
    return _table(results, _metric_name(metric), latency_batch, y is not None)


def _costs(name, model, x, y, metric) -> dict[str, Any]:
    is_keras = isinstance(model, keras.Model)
    count = parameters(model) if is_keras else None
    return {
        "parameters": count and count.total,
        "nonzero": count and count.nonzero,
        "flops": _flops_or_none(model, x) if is_keras else None,
        "size": file_size(model),
        "score": None if y is None else _score(name, model, x, np.asarray(y), metric),
    }


def _flops_or_none(model, x) -> int | None:
    try:
        return flops(model, _candidates.rows(x, 0, 1))
    except ValueError:  # a loop that depends on the data; the table shows a dash, its note says so
        return None


def _score(name, model, x, y, metric) -> float:
    outputs = _candidates.predict(model, x, batch_size=256)
    if metric == "accuracy":
        return _accuracy(name, y, outputs)
    if isinstance(metric, str):
        metric = keras.metrics.get(metric)
    if isinstance(metric, keras.Metric):
        metric.reset_state()
        metric.update_state(y, outputs)
        return float(metric.result())
    return float(np.mean(metric(y, outputs)))


def _accuracy(name, y, outputs) -> float:
    leaves = keras.tree.flatten(outputs)
    if len(leaves) != 1:
        raise ValueError(
            f"Model {name!r} has several outputs, for which accuracy is not defined. Pass "
            "metric=a function (y, outputs) -> float."
        )
    outputs = leaves[0]
    if outputs.ndim > 1 and outputs.shape[-1] > 1:
        predicted = outputs.argmax(-1)
        actual = y.argmax(-1) if y.shape == outputs.shape else y
    else:
        predicted, actual = outputs > 0.5, y
    if actual.size != predicted.size:
        raise ValueError(
            f"Labels of shape {y.shape} do not fit the outputs of model {name!r}, of shape "
            f"{outputs.shape}: expected integers, one for each row, or one-hot of that shape."
        )
    return float(np.mean(predicted == actual.reshape(predicted.shape)))


def _metric_name(metric) -> str:
    name = metric if isinstance(metric, str) else getattr(metric, "name", None)
    return name or getattr(metric, "__name__", "metric")


def _table(results, metric, batch, has_score) -> Comparison:
    first = next(iter(results.values())).latency.median
    columns = ["model", metric, "parameters", "non-zero", "FLOPs", "size", "gzipped"]
    columns += ["latency", "speed-up"]
    rows = []
    for name, m in results.items():
        counts = [_human_count(n) for n in (m.parameters, m.nonzero, m.flops)]
        sizes = [human_bytes(n) for n in m.size]
        row = [name, m.score, *counts, *sizes, str(m.latency), f"{first / m.latency.median:.2f}×"]
        rows.append(row)
    if not has_score:
        columns.pop(1)
        rows = [[row[0], *row[2:]] for row in rows]
    note = (
        f"FLOPs: one sample, a multiply–add is two. Latency: batch of {batch}, median ± "
        "interquartile range. Size: without optimizer state."
    )
    if any(m.flops is None for m in results.values()):
        note += " –: not counted (.tflite file, or a loop that depends on the data)."
    return Comparison(columns, rows, note=note, results=results)


def _human_count(n: int | None) -> str | None:
    if n is None:
        return None
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if n >= size:
            return f"{n / (1e3 if size == 1e4 else size):.3g}{unit}"
    return f"{n:,}"
