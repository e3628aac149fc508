"""One table for the question of every chapter: what does each model cost, and how good is it?"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from accel_tf import layers
from accel_tf.benchmark import _candidates, _samples, _score
from accel_tf.benchmark._cost import FileSize, file_size, flops, parameters
from accel_tf.benchmark._latency import Latency, Progress, in_turns
from accel_tf.report import Table, human_bytes


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What `compare` found out about one model; `None` where it does not apply.

    Attributes:
        score: The value of the metric; an accuracy lies between 0 and 1.
        parameters: The number of parameters.
        nonzero: The number of parameters that are not zero.
        flops: FLOPs of one forward pass on one sample.
        size: Bytes on disk, plain and gzipped.
        latency: The `Latency` on the batch, in seconds.
        runtime: What ran the model: `"TensorFlow"`, `"XLA"`, `"LiteRT"` or `"onnxruntime"`.
    """

    score: float | None
    parameters: int | None
    nonzero: int | None
    flops: int | None
    size: FileSize
    latency: Latency
    runtime: str


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

    def speedup(self, name: str, over: str | None = None) -> float:
        """Returns how many times faster one model is than another, by the medians.

        Args:
            name: The name of the one model.
            over: The name of the other model; the first of the table by default.
        """
        other = self[next(iter(self.results)) if over is None else over]
        return other.latency.median / self[name].latency.median


def compare(
    models: Mapping[str, Any] | Sequence | Any,
    x,
    y=None,
    *,
    metric: str | Callable | keras.Metric | None = None,
    latency_batch: int = 1,
    rounds: int = 100,
    verbose: int = 1,
) -> Comparison:
    """Measures models side by side: quality, parameters, FLOPs, size, latency.

    A file differs from its Keras model in two ways: another runtime runs it, and its numbers may
    have another precision. If the models run in several runtimes, two more columns separate the two
    gains: *runtime* names the runtime, and *same runtime* is the speed-up over the first model of the
    same runtime. List the float file before the int8 file. Then the *speed-up* of the float file is
    the gain of the runtime, and the *same runtime* of the int8 file is the gain of the precision.

    Args:
        models: A dictionary of names and models, or a list of models, or one model. Models without
            names get those of the Keras model or the file, made unique: `net`, `net (2)`. The first
            model is the baseline of the speed-up. A model is a built Keras model or one of these
            paths:

            - `.tflite`, run by LiteRT; inputs are quantized and outputs dequantized by the file's own
              quantization parameters;
            - `.onnx`, run by onnxruntime on the CPU with its default options, but that its threads
              stop spinning after a run, since they would slow down the next model;
            - the folder of a SavedModel, whose signature `serving_default` is run;
            - `.keras`, loaded by `keras.models.load_model(path, compile=False)`, so the size is again
              that without the optimizer. If it has layers of your own, import the module that
              registers them first.

            LiteRT and onnxruntime get as many threads as TensorFlow.
        x: The samples as values, integers too: an array, or a list or dictionary of arrays for models
            of several inputs.
        y: The targets: labels or real values. Labels are the numbers of classes, of shape `(n,)` or
            `(n, 1)`, or zeros and ones of the shape of the outputs, such as one-hot rows or the two
            classes of a single output. All other numbers are real values. `None` leaves the metric
            out.
        metric: `None` chooses `"accuracy"` if `y` holds labels, and the root-mean-square error (the
            column is then *RMSE*) if `y` holds real values of the shape of the outputs.
            `"accuracy"` takes the arg-max of the last axis, or the side of 0.5 for a single output or
            if several labels apply to a sample. Other metrics are the name of a Keras metric, a
            `keras.Metric`, or a function `(y, outputs) -> float` of NumPy arrays. It gets several
            outputs as the model returns them, in a list or dictionary; those of a SavedModel are
            a dictionary.
        latency_batch: The number of samples in the batch that is timed.
        rounds: The number of timed calls of each model; see `measure_latency`.
        verbose: 0 is silent, 1 shows a progress bar when it takes longer than two seconds.

    Returns:
        A `Comparison`, which is a `Table` for the terminal and the notebook. Its exact numbers are in
        `comparison["name"]`, a `Measurement`.

    Raises:
        ValueError: There is no model, one is neither a built Keras model nor a file that can be
            loaded, or `y` does not fit the outputs or the metric.
        ImportError: ai_edge_litert or onnxruntime is not installed, and a file needs it.

    Example:

    >>> x, y = np.eye(4, dtype="float32"), np.arange(4)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, "softmax", False)])
    >>> model.set_weights([np.eye(4)])
    >>> table = at.compare({"identity": model}, x, y, verbose=0)
    >>> table["identity"].score, table["identity"].parameters, table["identity"].nonzero
    (1.0, 16, 4)
    """
    models = _candidates.named(models, "compare")
    if not models:
        raise ValueError("compare needs at least one model, received none.")
    for model in models.values():
        if not _candidates.is_path(model):
            layers.require_model(model, "compare")
    runners = {name: _candidates.open_candidate(name, model) for name, model in models.items()}
    x = _samples.as_arrays(x)
    count = _samples.length(x)
    if y is not None and len(y) != count:
        raise ValueError(f"x has {count} samples and y {len(y)}; they must be equal.")
    if not 1 <= latency_batch <= count:
        raise ValueError(
            f"latency_batch must be between 1 and the {count} samples of x. "
            f"Received: latency_batch={latency_batch}"
        )

    progress = Progress("model", len(runners), verbose)
    costs, title, by_name = {}, None, False
    for i, (name, runner) in enumerate(runners.items()):
        costs[name] = _costs(runner, x)
        if y is not None:
            outputs = runner.predict(x, 256, by_name)
            if title is None:  # The first model decides, so that the column is one metric.
                by_name = isinstance(outputs, dict)
                metric = _score.metric_for(metric, np.asarray(y), name, outputs)
                title = _score.title_of(metric)
            costs[name]["score"] = _score.score(metric, np.asarray(y), name, outputs)
        progress.update(i + 1)
    batch = _samples.rows(x, 0, latency_batch)
    prepared = {name: runner.prepare(batch) for name, runner in runners.items()}
    times = in_turns(prepared, rounds, verbose=verbose)
    results = {name: Measurement(**costs[name], latency=times[name]) for name in runners}
    return _table(results, title, latency_batch)


def _costs(runner, x) -> dict[str, Any]:
    is_keras = isinstance(runner.source, keras.Model)
    count = parameters(runner.source) if is_keras else None
    return {
        "parameters": count and count.total,
        "nonzero": count and count.nonzero,
        "flops": _flops_or_none(runner.source, x) if is_keras else None,
        "size": file_size(runner.source),
        "score": None,
        "runtime": runner.runtime,
    }


def _flops_or_none(model, x) -> int | None:
    try:
        return flops(model, _samples.rows(x, 0, 1))
    except ValueError:  # a loop that depends on the data; the table shows a dash, its note says so
        return None


def _table(results, metric: str | None, batch: int) -> Comparison:
    columns = {
        "model": list(results),
        metric: [m.score for m in results.values()],
        "parameters": [_human_count(m.parameters) for m in results.values()],
        "non-zero": [_human_count(m.nonzero) for m in results.values()],
        "FLOPs": [_human_count(m.flops) for m in results.values()],
        "size": [human_bytes(m.size.plain) for m in results.values()],
        "gzipped": [human_bytes(m.size.gzipped) for m in results.values()],
        "latency": [str(m.latency) for m in results.values()],
        "speed-up": _speedups(results, over=dict.fromkeys(results, next(iter(results)))),
    }
    notes = [
        f"FLOPs: one sample, a multiply–add is two. Latency: batch of {batch}, median ± "
        "interquartile range. Size: without optimizer state."
    ]
    if any(m.flops is None for m in results.values()):
        notes.append(
            "–: not counted (a file of another runtime, or a loop that depends on the data)."
        )
    if metric is None:
        del columns[metric]
    elif metric == "RMSE":
        notes.append("RMSE: root-mean-square error of the outputs, less is better.")
    if len({m.runtime for m in results.values()}) > 1:
        columns["runtime"] = [m.runtime for m in results.values()]
        columns["same runtime"] = _speedups(results, over=_first_of_runtime(results))
        notes.append(
            "Same runtime: speed-up over the first model of the same runtime, – if it has no other."
        )
    rows = list(zip(*columns.values(), strict=True))
    return Comparison(list(columns), rows, note=" ".join(notes), results=results)


def _speedups(results, over: Mapping[str, str | None]) -> list[str | None]:
    """Returns the speed-up of each model over another one, `None` where there is no other."""
    return [
        other and f"{results[other].latency.median / m.latency.median:.2f}×"
        for other, m in ((over[name], m) for name, m in results.items())
    ]


def _first_of_runtime(results) -> dict[str, str | None]:
    """Returns for each model the first one of its runtime, `None` if there is only one."""
    names: dict[str, list[str]] = {}
    for name, m in results.items():
        names.setdefault(m.runtime, []).append(name)
    return {
        name: names[m.runtime][0] if len(names[m.runtime]) > 1 else None
        for name, m in results.items()
    }


def _human_count(n: int | None) -> str | None:
    if n is None:
        return None
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if n >= size:
            return f"{n / (1e3 if size == 1e4 else size):.3g}{unit}"
    return f"{n:,}"
