"""Measures what the kernels cost on this host."""

import time

import keras
import numpy as np
import tensorflow as tf

from . import _choice, _op
from ._conv import patches
from ._matrix import SparseMatrix

# One size stands for all: prices per weight depend on the batch much more than on the size.
_SIZE = 1024
_BATCHES = (1, 8, 32, 256)
_DENSITY = 0.1
# Products follow each other in one function, so that calling it from Python does not count.
_CHAIN = 8


def tune(*, verbose: int = 1) -> _choice.Costs:
    """Measures the kernels on this host, and makes later choices of this process by them.

    Takes some ten seconds, in which the host should do nothing else. The built-in costs are those
    of one machine with AVX2; measure your own where the choice matters. Nothing is written to disk:
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
    bar = keras.utils.Progbar(
        len(_choice.FORMATS) * len(_BATCHES) + 4, verbose=int(bool(verbose)), unit_name="measure"
    )
    rng = np.random.default_rng(0)

    def seconds(function, *shape):
        bar.add(1)
        return _seconds(function, tf.constant(rng.normal(size=shape).astype(np.float32)))

    call = seconds(_product(rng, "unstructured", 0.5, 16), 1, 16)
    nothing = seconds(_product(rng, "unstructured", 0, _SIZE), _BATCHES[-1], _SIZE)
    move = max(nothing - call, 1e-9) / (_BATCHES[-1] * 2 * _SIZE)
    prices = {}
    for format in _choice.FORMATS:
        density = 1 if format == "dense" else _DENSITY
        product = _product(rng, format, density, _SIZE)
        prices[format] = []
        for batch in _BATCHES:
            whole = seconds(product, batch, _SIZE)
            fixed = call + (0 if format == "dense" else batch * 2 * _SIZE * move)
            # What moving costs a small batch is not known exactly; weights do not come for free.
            rest = max(whole - fixed, whole / 4)
            prices[format].append(1e9 * rest / (batch * density * _SIZE**2))

    image, channels = (4, 28, 28, 64), 64
    kernel = tf.constant(rng.normal(size=(3, 3, channels, channels)).astype(np.float32) / 24)
    pixels = np.prod(image[:-1])
    convolution = seconds(lambda x: tf.nn.conv2d(x, kernel, 1, "SAME"), *image)
    unrolled = seconds(
        lambda x: patches(x, (3, 3), (1, 1), (1, 1), "same")[..., 4 * channels : 5 * channels],
        *image,
    )
    threads = tf.config.threading.get_intra_op_parallelism_threads() or "all"
    costs = _choice.Costs(
        batches=_BATCHES,
        per_weight={format: tuple(price) for format, price in prices.items()},
        convolution=1e9 * convolution / (pixels * 9 * channels**2),
        move=1e9 * move,
        patches=1e9 * unrolled / (pixels * 9 * channels),
        call=1e9 * call,
        host=f"this host, measured with {_op.isa()} kernels and {threads} threads",
    )
    _choice.use(costs)
    return costs


def _product(rng, format, density, size):
    """A product with a square matrix of unit gain, so that a chain neither grows nor vanishes."""
    blocks = {"4x1": 4, "16x1": 16}.get(format, 1)
    kept = np.repeat(rng.random((size, size // blocks)) < density, blocks, axis=1)
    w = rng.normal(size=(size, size)) * kept / max(np.sqrt(density * size), 1)
    matrix = SparseMatrix.from_dense(w, format=format)
    return lambda x: matrix._multiply(x, None, "linear")


def _seconds(function, x) -> float:
    """The time of one call, of a chain of them: the median of calls for a fifth of a second."""

    @tf.function
    def chain(x):
        for _ in range(_CHAIN):
            x = function(x)
        return x

    chain(x)
    times = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < 0.2:
        begin = time.perf_counter()
        chain(x)
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) / _CHAIN
