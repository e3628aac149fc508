"""Measures what the kernels cost on this host."""

import math
import os
import time

import keras
import numpy as np
import tensorflow as tf

from . import _choice, _op
from ._conv import patches
from ._matrix import SparseMatrix

_BATCHES = (1, 8, 32, 128, 512)
_SIZE, _SMALL = 1024, 64
_DENSITY = 0.1
# Products follow each other in one function, and what its call from Python takes is subtracted.
_CHAIN = 8
# All are measured in turn, many times, so that what disturbs the host for a while disturbs all.
_ROUNDS, _SECONDS = 6, 0.03


def tune(*, verbose: int = 1) -> _choice.Costs:
    """Measures the kernels on this host, and makes later choices of this process by them.

    Takes some ten seconds, in which the host should do nothing else. The built-in costs are those
    of one machine with AVX-512; measure your own where the choice matters. Nothing is written to disk:
    call it again in the next process, before `sparsify`.

    Args:
        verbose: Whether to show a progress bar.

    Returns:
        The `Costs`, which print as a table; `costs()` returns them from now on.

    Raises:
        RuntimeError: There is no compiled op whose kernels could be measured.

    Example:

    >>> import accel_tf as at
    >>> before = at.sparse.costs()
    >>> costs = at.sparse.tune(verbose=0)
    >>> costs is at.sparse.costs()
    True
    """
    if _op.isa() == "tensorflow":
        raise RuntimeError(
            "tune measures the kernels of the compiled op, and there is none in this installation."
        )
    rng = np.random.default_rng(0)
    # So large that patches of it do not stay in a cache.
    image, channels = (8, 28, 28, 128), 128
    kernel = rng.normal(size=(3, 3, channels, channels)).astype(np.float32) / 34
    zeros = SparseMatrix.from_dense(np.zeros((9 * channels, channels)), format="unstructured")
    pixels = math.prod(image[:-1])

    def unrolled(x):
        return zeros._multiply(patches(x, (3, 3), (1, 1), (1, 1), "same"), None, "linear")

    jobs = {
        "nothing": (lambda x: x, (1, 16)),
        "convolution": (lambda x: tf.nn.conv2d(x, kernel, 1, "SAME"), image),
        "patches": (unrolled, image),
        "dense call": (_product(rng, "dense", 1, 16), (1, 16)),
        # Of a matrix of some size, as the plan is read, and its pieces handed out, in each call.
        "sparse call": (_product(rng, "unstructured", 0, _SIZE), (1, _SIZE)),
        "small": (_product(rng, "dense", 1, _SMALL), (_BATCHES[-1], _SMALL)),
        "empty": (_product(rng, "unstructured", 0, _SIZE), (_BATCHES[-1], _SIZE)),
    }
    for format in _choice.FORMATS:
        product = _product(rng, format, 1 if format == "dense" else _DENSITY, _SIZE)
        jobs.update({(format, batch): (product, (batch, _SIZE)) for batch in _BATCHES})
    times = _nanoseconds(jobs, rng, verbose)
    prices = {format: _price(format, times) for format in _choice.FORMATS}
    moving = pixels * sum(zeros.shape) * prices["unstructured"].move
    costs = _choice.Costs(
        batches=_BATCHES,
        prices=prices,
        convolution=times["convolution"] / (pixels * kernel.size),
        patches=max(times["patches"] - moving, times["patches"] / 2) / (pixels * zeros.shape[0]),
        host=f"this host, measured with {_op.isa()} kernels on {_threads()} threads",
    )
    _choice.use(costs)
    return costs


def _price(format, times) -> _choice.Price:
    """Takes the times apart into the three that the model of costs adds up."""
    most = _BATCHES[-1]
    if format == "dense":
        call, stored = times["dense call"], _SIZE**2
        weight = (times["dense", most] - call) / (most * stored)  # where moving does not count
        moving, moved = times["small"] - call - most * _SMALL**2 * weight, 2 * _SMALL * most
    else:
        call, stored = times["sparse call"], _DENSITY * _SIZE**2
        moving, moved = times["empty"] - call, 2 * _SIZE * most
    move = max(moving, 0) / moved
    weights = []
    for batch in _BATCHES:
        whole = times[format, batch]
        # Of small batches it is not known exactly what is moved; weights do not come for free.
        rest = max(whole - call - batch * 2 * _SIZE * move, whole / 4)
        weights.append(rest / (batch * stored))
    return _choice.Price(call, move, tuple(weights))


def _threads() -> int:
    return tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))


def _product(rng, format, density, size):
    """A product with a square matrix of unit gain, so that a chain neither grows nor vanishes."""
    blocks = {"4x1": 4, "16x1": 16}.get(format, 1)
    kept = np.repeat(rng.random((size, size // blocks)) < density, blocks, axis=1)
    w = rng.normal(size=(size, size)) * kept / max(np.sqrt(density * size), 1)
    matrix = SparseMatrix.from_dense(w, format=format)
    return lambda x: matrix._multiply(x, None, "linear")


def _nanoseconds(jobs, rng, verbose) -> dict:
    """The time of a call of each job `(function, shape)`, as it is when nothing else disturbs it."""
    chains = {}
    for name, (function, shape) in jobs.items():
        x = tf.constant(rng.normal(size=shape).astype(np.float32))
        chains[name] = (_chain(function), x)
        chains[name][0](x)  # is traced
    bar = keras.utils.Progbar(_ROUNDS * len(jobs), verbose=int(bool(verbose)), unit_name="timing")
    times = {name: [] for name in jobs}
    for _ in range(_ROUNDS):
        for name, (chain, x) in chains.items():
            start = end = time.perf_counter()
            while end - start < _SECONDS:
                begin = end
                chain(x)
                end = time.perf_counter()
                times[name].append(end - begin)
            bar.add(1)
    fastest = {name: 1e9 * float(np.quantile(t, 0.1)) for name, t in times.items()}
    called = fastest.pop("nothing")
    return {name: max(t - called, t / 100) / _CHAIN for name, t in fastest.items()}


def _chain(function):
    @tf.function(autograph=False)
    def chain(x):
        for _ in range(_CHAIN):
            x = function(x)
        return x

    return chain
