"""Post-training quantization: the ranges of a fake-quantized model from data, without training."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from accel_tf.layers import batch_of, run, samples, sqnr, unsaved, varying, walk
from accel_tf.quantization._checks import require_ranges
from accel_tf.quantization._data import batches_of, inputs_of, parts_of
from accel_tf.quantization._fake import FakeQuantize, observing
from accel_tf.quantization._observers import MinMax
from accel_tf.quantization._rewrite import require_same_unrounded, rewrite
from accel_tf.quantization._schemes import Int8, Mixed, Scheme
from accel_tf.report import attach, report_of

# How many samples of the data the result is compared on, and the ratio below which it warns, in dB.
_CHECKED = 16
_LEAST = 10.0
# The same for what varies between samples. At 0 dB, the mean of the outputs would be as good an answer.
_LEAST_VARYING = 0.0


def calibrate(
    model: keras.Model,
    data,
    scheme: Scheme | Mixed | None = None,
    *,
    exclude: Sequence[str] = (),
    batch_size: int = 32,
    verbose: int = 1,
    verify: bool = True,
) -> keras.Model:
    """Returns a copy of `model` with fake quantization, with ranges observed on `data`.

    The weights stay what they are; only ranges are learned, and they are those of the float model:
    while data pass, nothing is rounded. A few hundred inputs like those of production are enough;
    how they are divided into batches does not matter but to `MovingAverage`. The result is what
    `quantize_aware` makes, so it can be fine-tuned, too.

    Args:
        model: As for `quantize_aware`.
        data: Inputs without labels: an array (n, …), or a list or dict of arrays for several
            inputs; or a `tf.data.Dataset` or other finite iterable of batches, where a batch may
            also be a tuple `(x, y)` or `(x, y, sample_weight)`, of which x is used. A list of arrays
            is one array for each input; for a list of batches pass `iter(batches)`. `None` will do
            for schemes of weights alone, which have no ranges.
        scheme: The number format; `Int8()` if not given. Ranges are found by its observer; if it has
            none, by `MinMax()`, and the model goes on from there with `MovingAverage()` if it is trained.
        exclude: Paths of layers to leave in float, as for `quantize_aware`.
        batch_size: How many inputs of an array to run at a time. A model whose inputs were made for a
            batch of a fixed size, as by `keras.Input(batch_shape=...)`, runs in batches of that size.
        verbose: 1 for a progress bar, 0 for silence.
        verify: Whether to compare the new model with `model` on the first samples of the data. With
            nothing rounded it has to compute the same. What rounding costs is noted in the report as the
            median signal-to-quantization-noise ratio of a sample, and as the ratio of what varies between
            samples, without their mean. A warning is given if the former is below 10 dB or the latter
            below 0 dB.

    Returns:
        A new model of the same class, not compiled.

    Raises:
        ValueError: As `quantize_aware`; `data` has no batch or an empty one, does not fit the inputs
            of the model or the size of their batch, has labels beside an array of inputs, or has NaN or
            infinite values; or a layer's values are such that there is no grid for them; or the new model, with nothing
            rounded, does not compute what `model` does.

    Example:

    >>> import keras, numpy as np
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> data = np.linspace(-1.0, 3.0, 20).reshape(10, 2)
    >>> quantized = at.calibrate(model, data, verbose=0)
    >>> quantized.layers[0].range
    (-1.0, 3.0)

    Reference:
        Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
        arXiv:1806.08342, section 3.
    """
    scheme = scheme or Int8()
    if not isinstance(scheme, Scheme | Mixed):
        raise ValueError(f"calibrate expects a scheme such as Int8(), received {scheme!r}.")
    quantized = rewrite(model, scheme.with_default(MinMax()), exclude, "calibrate")
    x = None
    if data is not None:
        x = _observe(quantized, batches_of(quantized, data, batch_size), verbose)
        require_ranges(quantized)
    elif any(isinstance(layer, FakeQuantize) for _, layer in walk(quantized)):
        raise ValueError("calibrate needs data to find the ranges of activations, received None.")
    if scheme != scheme.with_default(MinMax()):
        quantized = _with_observers(model, quantized, scheme, exclude)
    if verify:
        require_same_unrounded("calibrate", model, quantized, x)
        _note_noise(model, quantized, x)
    return quantized


def _observe(quantized, batches, verbose):
    """Runs a quantized model on the data for its ranges; returns the first samples."""
    try:
        total = len(batches)
    except TypeError:
        total = None
    progress = keras.utils.Progbar(total, verbose=verbose)

    def observe(*tensors):
        quantized(tf.nest.pack_sequence_as(structure, tensors), training=False)
        floats = [tf.cast(t, tf.float32) for t in tensors if t.dtype.is_floating]
        return tf.reduce_all([True, *(tf.reduce_all(tf.math.is_finite(t)) for t in floats)])

    step, traced, first, size = 0, {}, None, batch_of(quantized)
    with observing(), _same_state(quantized):
        for step, batch in enumerate(batches, start=1):
            inputs = inputs_of(quantized, batch, step - 1)
            if first is None:
                count = max(_CHECKED // (size or 1), 1) * (size or 1)
                first = keras.tree.map_structure(lambda x, n=count: x[:n], inputs)
            for structure in parts_of(quantized, inputs, step - 1):
                tensors = tf.nest.flatten(structure)
                # Once for all batches, the last and smaller one included, unless images vary in size.
                specs = tuple(tf.TensorSpec((size, *x.shape[1:]), x.dtype) for x in tensors)
                if specs not in traced:
                    function = tf.function(observe, autograph=False)
                    traced[specs] = function.get_concrete_function(*specs)
                if not traced[specs](*tensors):
                    raise ValueError(
                        f"Batch {step - 1} of the calibration data has NaN or infinite values, from "
                        "which no range can be taken. Remove those inputs."
                    )
            progress.update(step, finalize=step == total)
    if not step:
        raise ValueError(
            "calibrate needs at least one batch of data; received none. An iterator that was read "
            "before is empty: pass the data anew."
        )
    return first


@contextlib.contextmanager
def _same_state(quantized):
    """Gives the layers of a model the state again that they have when it is entered, but no ranges."""
    layers = [layer for _, layer in walk(quantized)]
    ranges = {id(v) for layer in layers if isinstance(layer, FakeQuantize) for v in layer.variables}
    state = {id(v): v for layer in layers for v in (*layer.non_trainable_weights, *unsaved(layer))}
    before = [(v, tf.identity(v.value)) for key, v in state.items() if key not in ranges]
    yield
    for variable, value in before:
        variable.assign(value)


def _with_observers(model, quantized, scheme, exclude):
    """Returns the model of a scheme without observer: ranges as found, and followed by the moving average.

    Extremes only ever grow, so training goes on with an observer that follows the model.
    """
    result = rewrite(model, scheme, exclude, "calibrate")
    for (_, found), (_, layer) in zip(walk(quantized), walk(result), strict=True):
        if not isinstance(layer, FakeQuantize) or layer.fixed is not None:
            continue
        if layer.observer == found.observer:
            layer.set_weights(found.get_weights())
        elif found.observer.seen(found):
            layer.observer.start(layer, *found.observer.range(found))
    return result


def _usual_ratio(y, z) -> float:
    """Returns the median of the samples' SQNR in dB: an outlier is clipped on purpose by some observers."""
    return float(np.median([sqnr(a, b) for a, b in zip(y, z, strict=True)]))


def _note_noise(model, quantized, x):
    """Adds what rounding costs to the report, and warns if that is much."""
    x = samples(model) if x is None else x
    if x is None:
        return
    pairs = zip(run(model, x), run(quantized, x), strict=True)
    # An index, such as an arg-max, differs much where two values are close.
    pairs = [(y, z) for y, z in pairs if y.dtype.kind not in "iub"]
    ratio = min((_usual_ratio(y, z) for y, z in pairs), default=math.inf)
    varies = varying([y for y, _ in pairs], [z for _, z in pairs])
    figures = f"{ratio:.1f} dB"
    if math.isfinite(varies):
        figures += f", and {varies:.1f} dB of what varies between samples"
    found = report_of(quantized)
    attach(quantized, dataclasses.replace(found, note=f"{found.note} With rounding: {figures}."))
    if ratio < _LEAST or varies < _LEAST_VARYING:
        warnings.warn(
            f"The quantized model {model.name!r} differs much from the original: its outputs have a "
            f"median signal-to-quantization-noise ratio of {figures}, on the first samples. {_LEAST:g} dB "
            f"and more are usual, and below {_LEAST_VARYING:g} dB of what varies the error is larger than the "
            "differences between samples. accel_tf.quantization.quantization_error(quantized, x) tells which "
            "layers cause it; leave those in float with exclude=[...].",
            stacklevel=3,
        )
