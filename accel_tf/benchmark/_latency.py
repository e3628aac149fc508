"""Latency: warm-up excluded, candidates interleaved, results waited for, median and spread given."""

import dataclasses
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from accel_tf.benchmark import _candidates


@dataclasses.dataclass(frozen=True)
class Latency:
    """The latencies of one candidate, in seconds.

    Attributes:
        samples: One latency per round, in the order measured.
    """

    samples: tuple[float, ...] = dataclasses.field(repr=False)

    @property
    def median(self) -> float:
        """The median; half of the calls were faster."""
        return float(np.median(self.samples))

    @property
    def spread(self) -> float:
        """The interquartile range; the middle half of the calls lies within it."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(high - low)

    def percentile(self, q: float) -> float:
        """The latency that `q` percent of the calls did not exceed; 99 is the tail users feel."""
        return float(np.percentile(self.samples, q))

    def __str__(self) -> str:
        return f"{human_seconds(self.median)} ± {human_seconds(self.spread)}"


def measure_latency(
    candidates: Mapping[str, Any] | Sequence | Any,
    x,
    *,
    rounds: int = 100,
    warmup: int = 10,
    max_seconds: float = 5.0,
    verbose: int = 1,
) -> dict[str, Latency]:
    """Measures how long each candidate takes on the batch `x`, all under the same conditions.

    Clock speed, temperature and neighbours change while one measures. So the candidates take turns,
    in an order shuffled anew in each round, and whatever disturbs one disturbs all. A turn is one
    untimed call, which brings the candidate's weights back into the caches, and one timed call.
    The median and the interquartile range are reported, since the distribution of latencies has a
    long tail that a mean and a standard deviation do not describe.

    Args:
        candidates: A dictionary of names and what to run: a built Keras model (traced into a
            `tf.function` for the signature of `x`; with XLA if it was compiled with
            `jit_compile=True`), a path as in `compare`, or a callable, which gets `x` as it is. A
            list of these, or one of them, is named as in `compare`.
        x: One batch: an array, or a list or dictionary of arrays for models of several inputs.
        rounds: The number of timed calls of each candidate.
        warmup: Untimed calls of each candidate before the first round: tracing, memory allocation
            and thread start happen there.
        max_seconds: Stops early, after at least five rounds, once the rounds have taken this long
            for each candidate on average.
        verbose: 0 is silent, 1 shows a progress bar when it takes longer than two seconds.

    Returns:
        A dictionary from each name to its `Latency`, in seconds.

    Raises:
        ValueError: There is no candidate, one cannot be run, or `rounds` is below 1.
        ImportError: The runtime of a file is not installed.

    Reference:
        Hoefler and Belli (2015), Scientific benchmarking of parallel computing systems, SC15.

    Example:

    >>> times = at.measure_latency({"sort": np.sort, "sum": np.sum}, np.ones(1000), verbose=0)
    >>> times["sort"].median > 0
    True
    """
    candidates = _candidates.named(candidates, "measure_latency")
    if not candidates:
        raise ValueError("measure_latency needs at least one candidate, received none.")
    if rounds < 1 or warmup < 0:
        raise ValueError(
            "rounds must be at least 1 and warmup at least 0. "
            f"Received: rounds={rounds}, warmup={warmup}"
        )
    opened = {name: _candidates.open_candidate(name, c) for name, c in candidates.items()}
    runners = {name: candidate.prepare(x) for name, candidate in opened.items()}
    return in_turns(runners, rounds, warmup, max_seconds, verbose)


def in_turns(
    runners: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 10,
    max_seconds: float = 5.0,
    verbose: int = 1,
) -> dict[str, Latency]:
    """Times functions without arguments by turns, as `measure_latency` describes it."""
    for run in runners.values():
        for _ in range(warmup):
            run()

    samples = {name: [] for name in runners}
    order = list(runners)
    shuffle = random.Random(0).shuffle  # a generator of its own leaves the global one alone
    progress = Progress("latency", rounds, verbose)
    budget = max_seconds * len(order)
    with _no_garbage_collection():
        start = time.perf_counter()
        for i in range(rounds):
            if i >= 5 and time.perf_counter() - start > budget:
                break
            shuffle(order)
            for name in order:
                samples[name].append(_turn(runners[name]))
            progress.update(i + 1)
    progress.close()
    return {name: Latency(tuple(values)) for name, values in samples.items()}


def human_seconds(seconds: float) -> str:
    """Formats a duration: `1.23 s`, `45.6 ms`, `789 µs`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


class Progress:
    """A progress bar of Keras that appears only when the work takes longer than two seconds."""

    def __init__(self, label: str, total: int, verbose: int):
        self._label, self._total, self._verbose = label, total, verbose
        self._start, self._bar, self._done = time.perf_counter(), None, 0

    def update(self, done: int) -> None:
        self._done = done
        if not self._verbose or time.perf_counter() - self._start < 2:
            return
        if self._bar is None:
            self._bar = keras.utils.Progbar(self._total, unit_name=self._label)
        self._bar.update(done)

    def close(self) -> None:
        if self._bar is not None and self._done < self._total:
            self._bar.update(self._done, finalize=True)


def _turn(run: Callable[[], Any]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _no_garbage_collection:
    """Keeps Python's collector from running inside a timed call."""

    def __enter__(self):
        self._enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_):
        if self._enabled:
            gc.enable()
