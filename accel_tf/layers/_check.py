"""Checks that what a verb returns computes what it was given, so that no verb errs in silence."""

import warnings
from collections.abc import Callable

import keras
import numpy as np

from accel_tf.layers._walk import calls, has_graph, walk

# A float32 rounding error is some 140 dB below its value; sums in another order cost a part of that.
FLOAT_FLOOR = 60.0
# Half-precision numbers have 11 bits, or 8 of them in bfloat16.
_HALF_FLOOR = 25.0
# What the part of the outputs that varies from sample to sample has to reach.
_VARYING_FLOOR = 20.0
# What an unknown size of an input is tried with: a sequence, then images.
_SIZES = (8, 32, 96, 224)


def samples(model: keras.Model, count: int = 4, seed: int = 0):
    """Returns some inputs that `model` takes, made from its input specification.

    Numbers are normally distributed. Integers are valid indices of the smallest embedding, and in every
    other sample the last ones are 0, which is what most masks hide. Strings are words that the lookup
    layers know.

    Args:
        model: A built model.
        count: How many samples.
        seed: The seed of the random numbers.

    Returns:
        An array of shape (count, …), or a structure of them as `model` is called with; `None` if
        `model` has no input specification, or runs with none of the sizes that were tried.
    """
    if not has_graph(model):
        return None
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    indices = {id(t) for c in calls(model) if _is_table(c.layer) for t in c.inputs}
    for size in _SIZES:
        rng = np.random.default_rng(seed)
        x = keras.tree.map_structure(
            lambda t, r=rng, s=size: _sample(model, t, id(t) in indices, count, s, r), structure
        )
        try:
            run(model, x)
        except Exception:  # whatever a layer does with inputs that it was not made for
            continue
        return x
    return None


def batch_of(model: keras.Model) -> int | None:
    """Returns the number of samples that the inputs of a model were made for, `None` for any number."""
    if not has_graph(model):
        return None
    return next((t.shape[0] for t in model.inputs if t.shape[0] is not None), None)


def run(model: keras.Model, x) -> list[np.ndarray]:
    """Returns the outputs of `model` in inference, in the order of its structure.

    The state that layers keep between calls stays as it is. A model that takes a fixed number of samples
    is run on as many at a time, each time from that state.
    """
    size, count = batch_of(model), len(keras.tree.flatten(x)[0])
    if size is not None and count > size and count % size == 0:
        starts = range(0, count, size)
        parts = [
            run(model, keras.tree.map_structure(lambda a, s=s: a[s : s + size], x)) for s in starts
        ]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns again of what the user has seen before.
        # The seeds of dropout within recurrent layers would move on in inference, too.
        with keras.StatelessScope():
            y = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    return [np.asarray(keras.ops.convert_to_numpy(v)) for v in keras.tree.flatten(y)]


def sqnr(expected: np.ndarray, received: np.ndarray) -> float:
    """Returns 10·log₁₀(Σy² / Σ(y − ŷ)²) in dB; infinite for equal outputs.

    Outputs that are not numbers, such as strings, are equal or not: infinite, or minus infinity. So
    are outputs of different shapes, and NaN and infinities in different places.
    """
    if expected.shape != received.shape:
        return -np.inf
    if expected.dtype.kind not in "fiubV" or received.dtype.kind not in "fiubV":
        return np.inf if np.array_equal(expected, received) else -np.inf
    y, z = expected.astype(np.float64), received.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(finite, np.isfinite(z)):
        return -np.inf
    if not np.array_equal(y[~finite], z[~finite], equal_nan=True):
        return -np.inf
    noise = np.square(y[finite] - z[finite]).sum()
    if not noise:
        return np.inf
    # Outputs that are all but zero have no signal to compare with.
    return float(10 * np.log10(max(np.square(y[finite]).sum(), 1e-12) / noise))


def difference(expected: list[np.ndarray], received: list[np.ndarray]) -> float:
    """Returns the lowest `sqnr` of several outputs, in dB."""
    if len(expected) != len(received):
        return -np.inf
    return min((sqnr(y, z) for y, z in zip(expected, received, strict=True)), default=np.inf)


def tells(outputs: list[np.ndarray]) -> bool:
    """Whether outputs can be compared: some of them are finite and not 0, or no numbers."""
    return any(y.dtype.kind not in "fV" or np.any(np.isfinite(y) & (y != 0)) for y in outputs)


def require_same(
    verb: str,
    old: keras.Model,
    new: keras.Model,
    x=None,
    expected: list | None = None,
    how: str = "",
) -> str:
    """Raises a ValueError unless `new` computes what `old` does, up to the rounding of sums.

    Args:
        verb: The verb that made `new`, for the message.
        old: The model that the verb was given.
        new: The model that it is about to return.
        x: Inputs to compare on; by default, `samples(old)`.
        expected: What `new` has to return for `x`, if it is not what `old` returns.
        how: How `new` is run, for the sentence, such as `"without rounding "`.

    Returns:
        A sentence for the report: how well they agree, or why they could not be compared.
    """
    x = samples(old) if x is None else x
    if x is None:
        return "Not checked: no inputs could be made from the input specification."
    y = run(old, x) if expected is None else expected
    if not tells(y):
        return "Not checked: the outputs for the samples are not finite, or all 0."
    count = len(keras.tree.flatten(x)[0])
    floor = _floor(old)
    try:
        z = run(new, x)
    except Exception as error:
        raise ValueError(
            f"{verb} made a model that cannot be called as {old.name!r} can: {type(error).__name__}: "
            f"{str(error).strip()}. {_way_out(verb)}"
        ) from error
    found = difference(y, z)
    if found >= floor and (floor < FLOAT_FLOOR or _follows(y, z)):
        return f"Checked {how}on {count} samples against the original: {_decibels(found)}."
    if expected is None and difference(y, run(old, x)) < floor:
        return f"Not checked: {old.name!r} returns other outputs each time."
    where = _first_deviation(old, new, x, floor)
    raise ValueError(
        f"{verb} has to return a model that computes what {old.name!r} does, but on {count} samples the "
        f"outputs differ: {_decibels(found)} where {floor:g} dB are required, and {_VARYING_FLOOR:g} dB of "
        f"what varies between samples{where}. {_way_out(verb)}"
    )


def _follows(expected, received) -> bool:
    """Whether outputs vary from sample to sample as they should, if they vary by more than rounding."""
    return varying(expected, received) >= _VARYING_FLOOR


def varying(expected: list[np.ndarray], received: list[np.ndarray]) -> float:
    """Returns the lowest `sqnr` of what varies between samples, in dB.

    Outputs with a large constant part reach a high ratio whatever the rest does. The mean over the
    samples is such a part.

    Args:
        expected: Outputs, with the samples along their first axis.
        received: Others of the same shapes.

    Returns:
        The ratio; infinite if no output varies by more than the rounding of floats.
    """
    ratios = []
    for y, z in zip(expected, received, strict=True):
        if y.dtype.kind != "f" or len(y) < 2 or not np.isfinite(y).all():
            continue
        mean = y.mean(0, dtype=np.float64)
        if np.abs(y - mean).max() > 1e-4 * np.abs(y).max():
            ratios.append(sqnr(y - mean, z - mean))
    return min(ratios, default=np.inf)


def _way_out(verb):
    return (
        "A layer whose configuration does not make it again can cause this, and otherwise it is an error "
        f"in accel_tf: please report it. To get the model all the same, call {verb}(..., verify=False)."
    )


def _decibels(value: float) -> str:
    return "equal outputs" if value == np.inf else f"{value:.1f} dB"


def _floor(model) -> float:
    policies = {str(layer.compute_dtype) for _, layer in walk(model)}
    return _HALF_FLOOR if policies & {"float16", "bfloat16"} else FLOAT_FLOOR


def _first_deviation(old, new, x, floor) -> str:
    """Returns where two models part, in words, as far as layers of equal names tell."""
    if not has_graph(old):
        return ""
    outputs = {layer.name: layer for layer in new.layers}
    for call in calls(old):
        twin = outputs.get(call.layer.name)
        if twin is None or not call.inputs or len(call.outputs) != 1:
            continue
        try:
            ours = run(keras.Model(old.inputs, call.outputs[0]), keras.tree.flatten(x))
            theirs = run(keras.Model(new.inputs, twin.output), keras.tree.flatten(x))
        except Exception:  # A layer without one output, or one that is called several times.
            continue
        if difference(ours, theirs) < floor:
            return f", first behind layer {call.layer.name!r}"
    return ""


def _is_table(layer) -> bool:
    return isinstance(layer, keras.layers.Embedding)


def _sample(model, tensor, is_index, count, size, rng):
    """Returns an array for one input."""
    shape = (tensor.shape[0] or count, *(n or size for n in tensor.shape[1:]))
    if tensor.dtype == "string":
        return rng.choice(_words(model), shape)
    if keras.backend.is_float_dtype(tensor.dtype) and not is_index:
        return rng.normal(size=shape).astype(keras.backend.standardize_dtype(tensor.dtype))
    if tensor.dtype == "bool":
        return rng.random(shape) < 0.5
    x = rng.integers(0, _largest_index(model, tensor), shape)
    if len(shape) > 1:
        x[1::2, -(-2 * shape[1] // 3) :] = 0
    return x.astype(tensor.dtype)


def _largest_index(model, tensor) -> int:
    sizes = [layer.input_dim for _, layer in walk(model) if _is_table(layer)]
    return min(sizes, default=256 if tensor.dtype == "uint8" else 8)


def _words(model) -> list[str]:
    known: list[str] = []
    for _, layer in walk(model):
        words: Callable | None = getattr(layer, "get_vocabulary", None)
        if words is not None:
            known += [str(word) for word in words()]
    return [word for word in known if word] or ["one", "two", "three"]
