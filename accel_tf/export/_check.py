"""Checks that a file computes what its model does, before it takes the place that the user named."""

import contextlib
import os
import pathlib
import shutil
import tempfile

import keras
import numpy as np

from accel_tf import layers as graphs
from accel_tf._litert import quiet
from accel_tf.quantization import FakeQuantize, QuantizedLayer

# What the outputs of a file have to reach, in dB. A quantized file is not refused for noise: it may have
# few bits, and the samples are not those that its ranges are made for.
_FLOAT, _HALF, _QUANTIZED = 60.0, 30.0, 10.0


@contextlib.contextmanager
def draft(path: pathlib.Path, suffix: str = ""):
    """Yields a path to write to, which becomes `path` if the block ends without an error.

    So a file that turns out to be wrong leaves nothing behind, nor overwrites one that was right.

    Args:
        path: The file or folder that the user named; a folder may exist and hold other files.
        suffix: What the path to write to ends in, such as `".onnx"`; `""` for a folder.
    """
    if not suffix:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".accel_tf-") as folder:
        made = pathlib.Path(folder) / f"model{suffix}"
        yield made
        if made.is_dir():
            shutil.copytree(made, path, dirs_exist_ok=True)
        else:
            os.replace(made, path)


def require_same_file(
    verb: str, model: keras.Model, path: pathlib.Path, batch_size: int | None = None
) -> str:
    """Raises a ValueError unless a file computes what `model` does.

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
    expected, floor = graphs.run(model, x), floor_of(model)
    if not graphs.tells(expected):
        return "Not checked: the outputs for the samples are not finite, or all 0."
    try:
        with quiet():
            found = runtime_of(path).outputs(model, keras.tree.flatten(x))
        ratio = _agreement(expected, found, floor)
    except Exception as error:
        raise ValueError(
            f"{verb} wrote a file of {model.name!r} that does not run: {type(error).__name__}: "
            f"{str(error).strip()[:500]} No file was left behind. {_way_out(verb)}"
        ) from error
    count = len(keras.tree.flatten(x)[0])
    if ratio < floor and graphs.difference(expected, graphs.run(model, x)) >= floor:
        raise ValueError(
            f"{verb} wrote a file that does not compute what {model.name!r} does: on {count} samples its "
            f"outputs have {ratio:.1f} dB, where {floor:g} dB are required. No file was left behind. "
            f"{_way_out(verb)}"
        )
    agrees = "equal outputs" if np.isposinf(ratio) else f"{ratio:.1f} dB"
    return f"Checked on {count} samples against the model: {agrees}."


def floor_of(model: keras.Model) -> float:
    """Returns the SQNR in dB that a file of `model` has to reach."""
    layers = [layer for _, layer in graphs.walk(model)]
    if any(isinstance(layer, QuantizedLayer | FakeQuantize) for layer in layers):
        return _QUANTIZED
    half = {"float16", "bfloat16"} & {str(layer.compute_dtype) for layer in layers}
    return _HALF if half else _FLOAT


def _way_out(verb):
    return (
        "This is an error in accel_tf or in the converter: please report it. To keep the file all the "
        f"same, call {verb}(..., verify=False), and look at it with accel_tf.export.verify."
    )


def _agreement(expected, found, floor) -> float:
    """Returns the lowest SQNR of the outputs; of a quantized model, of those that are floats."""
    if len(expected) != len(found):
        raise ValueError(f"it has {len(found)} outputs, and the model {len(expected)}.")
    pairs = list(zip(expected, found, strict=True))
    if (
        floor == _QUANTIZED
    ):  # An index, such as an arg-max, differs much where two values are close.
        pairs = [(y, z) for y, z in pairs if y.dtype.kind not in "iub"]
    return min((graphs.sqnr(y, np.asarray(z)) for y, z in pairs), default=np.inf)
