"""Checks that a file computes what its model does, as soon as it is written."""

import pathlib
import shutil

import keras
import numpy as np

from accel_tf import layers as graphs
from accel_tf._litert import quiet
from accel_tf.quantization import FakeQuantize, QuantizedLayer

# What the outputs of a file have to reach, in dB. A quantized file is not refused for noise: it may have
# few bits, and the samples are not those that its ranges are made for.
_FLOAT, _HALF, _QUANTIZED = 60.0, 30.0, 10.0


def floor_of(model: keras.Model) -> float:
    """Returns the SQNR in dB that a file of `model` has to reach."""
    layers = [layer for _, layer in graphs.walk(model)]
    if any(isinstance(layer, QuantizedLayer | FakeQuantize) for layer in layers):
        return _QUANTIZED
    half = {"float16", "bfloat16"} & {str(layer.compute_dtype) for layer in layers}
    return _HALF if half else _FLOAT


def require_same_file(
    verb: str, model: keras.Model, path: pathlib.Path, batch_size: int | None = None
) -> str:
    """Raises a ValueError, and removes the file, unless it computes what `model` does.

    The file is run in its own runtime on a few samples made from the model's input specification.

    Args:
        verb: The verb that wrote the file, for the message.
        model: The model that the file was made of.
        path: The file, or the folder of a SavedModel.
        batch_size: The number of samples that the file takes, if that is fixed.

    Returns:
        A sentence about how well they agree, or why they could not be compared.
    """
    # Imported here, as the runtimes import the modules that write files.
    from accel_tf.export._runtimes import runtime_of

    x = graphs.samples(model, batch_size or 4)
    if x is None:
        return "Not checked: no inputs could be made from the input specification."
    expected = graphs.run(model, x)
    try:
        with quiet():
            found = runtime_of(path).outputs(model, keras.tree.flatten(x))
    except Exception as error:
        _remove(path)
        raise ValueError(
            f"{verb} wrote a file of {model.name!r} that does not run: {type(error).__name__}: "
            f"{str(error).strip()[:500]} No file was left behind. {_way_out(verb)}"
        ) from error
    ratio, floor = _agreement(expected, found, floor_of(model)), floor_of(model)
    count = len(keras.tree.flatten(x)[0])
    if ratio < floor and graphs.difference(expected, graphs.run(model, x)) >= floor:
        _remove(path)
        raise ValueError(
            f"{verb} wrote a file that does not compute what {model.name!r} does: on {count} samples its "
            f"outputs have {ratio:.1f} dB, where {floor:g} dB are required. No file was left behind. "
            f"{_way_out(verb)}"
        )
    return f"Checked on {count} samples against the model: " + (
        "equal outputs." if np.isposinf(ratio) else f"{ratio:.1f} dB."
    )


def _way_out(verb):
    return (
        "This is an error in accel_tf or in the converter: please report it. To keep the file all the "
        f"same, call {verb}(..., verify=False), and look at it with accel_tf.export.verify."
    )


def _agreement(expected, found, floor) -> float:
    """Returns the lowest SQNR of the outputs; of a quantized model, of those that are floats."""
    pairs = list(zip(expected, found, strict=True))
    if (
        floor == _QUANTIZED
    ):  # An index, such as an arg-max, differs much where two values are close.
        pairs = [(y, z) for y, z in pairs if y.dtype.kind not in "iub"]
    return min((graphs.sqnr(y, np.asarray(z)) for y, z in pairs), default=np.inf)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
