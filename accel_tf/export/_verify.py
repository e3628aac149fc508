"""Does the file say what the model said? Runs it in its own runtime, and looks for the first fault."""

import dataclasses
import os
import pathlib
from typing import NamedTuple

import keras
import numpy as np

from accel_tf import layers as graphs
from accel_tf import report
from accel_tf._litert import quiet
from accel_tf.export import _runtimes
from accel_tf.export._check import floor_of
from accel_tf.export._graph import intercepted

# Intermediate results are compared on this many inputs: enough to tell, and they are large.
_SAMPLES = 8

# The SQNR that the outputs of a quantized file have to reach, in dB. Results that fall on a tie are
# rounded either way, which leaves 30 dB and more; a wrong weight, axis or range does not leave 20.
_QUANTIZED = 20.0
# What a quantized model and its file have to keep of the original, in dB.
_TO_ORIGINAL = 10.0


class LayerMatch(NamedTuple):
    """One layer of the model beside its likeness in the file.

    Attributes:
        layer: The layer's path.
        tensor: The name of the tensor in the file that is most like its output; `""` if none has
            its shape.
        sqnr: How alike, in dB.
        note: `"first to deviate"`, `"deviates"`, or `"within a kernel"` for a layer whose output the
            runtime never writes down because it fuses it with the next.
    """

    layer: str
    tensor: str
    sqnr: float
    note: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Verification:
    """How a file's outputs compare with the model's; prints as text and renders as a table.

    Attributes:
        path: The file.
        runtime: What ran it: `"LiteRT"`, `"onnxruntime"` or `"TensorFlow"`; or
            `"onnxruntime without integer kernels"`, for a file that it cannot load with them.
        sqnr: Signal-to-quantization-noise ratio of the outputs in dB, 10·log₁₀(Σy² / Σ(y − ŷ)²); of
            several outputs the lowest.
        largest_difference: The largest absolute difference of any output.
        agreement: The fraction of inputs for which the largest output is the same one; of several
            outputs the lowest.
        threshold: The SQNR in dB that the outputs have to reach.
        layers: A `LayerMatch` for each layer, in the order in which the model runs them.
        to_original: The SQNR of the file's outputs to those of the original model, in dB; `None` if no
            original was given.
    """

    path: pathlib.Path
    runtime: str
    sqnr: float
    largest_difference: float
    agreement: float
    threshold: float
    layers: tuple[LayerMatch, ...]
    to_original: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the outputs agree with those of the model, and keep enough of the original's.

        Where the outputs are not equal, no layer may deviate either: outputs that hardly vary, such as
        the softmax of an untrained model, hide a fault. Where they are equal, layers do not count, as a
        runtime shows them only when it runs other kernels than those that compute the outputs.
        """
        kept = self.to_original is None or self.to_original >= min(self.threshold, _TO_ORIGINAL)
        agrees = self.sqnr >= self.threshold and self.first_deviation is None
        return kept and (agrees or np.isposinf(self.sqnr))

    @property
    def first_deviation(self) -> str | None:
        """The path of the first layer that deviates, `None` if none does."""
        return next((m.layer for m in self.layers if m.note == "first to deviate"), None)

    @property
    def table(self) -> report.Table:
        """One row per layer: the tensor that matches it, how well, and a note."""
        rows = [
            (m.layer, m.tensor.split(";")[0] or "–", _decibels(m.sqnr), m.note) for m in self.layers
        ]
        alike = "SQNR exact" if np.isposinf(self.sqnr) else f"SQNR {_decibels(self.sqnr)} dB"
        title = (
            f"{self.path.name} in {self.runtime}: {alike}, largest "
            f"difference {self.largest_difference:.3g}, same arg-max {self.agreement:.1%}"
        )
        if self.to_original is not None:
            title += f", SQNR to the original {_decibels(self.to_original)} dB"
        return report.Table(("layer", "tensor in the file", "SQNR [dB]", "note"), rows, title)

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__  # a prompt shows it as print does

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def verify(
    model: keras.Model,
    path: str | os.PathLike,
    x,
    *,
    original: keras.Model | None = None,
    threshold: float | None = None,
) -> Verification:
    """Runs an exported file in its own runtime and compares it with the model, layer by layer.

    Outputs are compared on all of `x`. Then each layer's output on the first inputs is looked up
    among all tensors that the file computes, by shape and likeness, so that names need not match
    and files from other converters can be checked too. What a runtime fuses has no tensor of its
    own: a layer is only said to deviate if what follows it does, too.

    Args:
        model: The model that the file was made of; a fake-quantized one for a quantized file.
        path: A `.tflite` file, an `.onnx` file, or a SavedModel folder.
        x: Inputs: an array (n, …), or a list or dict of them for several inputs.
        original: The float model that `model` was made of, such as the argument of `calibrate`, to be
            compared with as well: a file can agree with a model that has lost something.
        threshold: The SQNR in dB that the outputs have to reach; by default 60 dB for float32 models, 30
            for half precision, and 20 for quantized ones: rounding that falls the other way leaves 30 dB
            and more, and a wrong weight, axis or range does not leave 20.

    Returns:
        A `Verification`; it prints as a table.

    Raises:
        ValueError: The file is of no known kind, `x` does not fit, or the file has not as many
            outputs as the model or outputs of other shapes.
        FileNotFoundError: There is no such file.
        ImportError: The file's runtime is not installed.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,), name="x"), keras.layers.Dense(4, name="y")])
    >>> path = at.export.saved_model(model, tempfile.mkdtemp() + "/model")
    >>> found = at.export.verify(model, path, np.random.default_rng(0).random((5, 8)))
    >>> found.ok, found.agreement, found.first_deviation
    (True, 1.0, None)
    """
    graphs.require_model(model, "verify")
    path = pathlib.Path(path)
    runtime = _runtimes.runtime_of(path)
    arrays = _arrays(model, x)
    few = [array[: runtime.batch_size or _SAMPLES] for array in arrays]
    threshold = _threshold(model) if threshold is None else threshold
    expected = _flat(_call(model, arrays))
    with quiet():
        outputs = runtime.outputs(model, arrays)
        tensors = _by_size(runtime.tensors(model, few))
    _check_outputs(path, expected, outputs)
    pairs = list(zip(expected, outputs, strict=True))
    return Verification(
        path,
        runtime.name,
        min(graphs.sqnr(y, z) for y, z in pairs),
        max(float(np.abs(y - z).max(initial=0)) for y, z in pairs),
        min(float((y.argmax(-1) == z.argmax(-1)).mean()) if y.ndim else 1.0 for y, z in pairs),
        threshold,
        _matches(model, few, tensors, min(threshold, _QUANTIZED)),
        None if original is None else _to_original(original, arrays, outputs),
    )


def _threshold(model) -> float:
    return max(floor_of(model), _QUANTIZED)


def _to_original(original, arrays, outputs) -> float:
    expected = _flat(_call(original, arrays))
    return min(graphs.sqnr(y, z) for y, z in zip(expected, outputs, strict=True))


def _arrays(model, x) -> list[np.ndarray]:
    """Returns the inputs in the order of the model's."""
    if isinstance(x, dict):
        names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
        if set(names) != set(x):
            raise ValueError(f"The model has the inputs {names}, received {sorted(x)}.")
        x = [x[name] for name in names]
    several = isinstance(x, (list, tuple)) and len(x) and hasattr(x[0], "shape")
    arrays = [np.asarray(array) for array in (x if several else [x])]
    if not len(arrays[0]):
        raise ValueError("verify needs at least one input, received none.")
    inputs = getattr(model, "inputs", None) or []
    kinds = [tensor.dtype for tensor in inputs] or ["float32"] * len(arrays)
    if len(kinds) != len(arrays):
        raise ValueError(f"The model has {len(kinds)} inputs, received {len(arrays)} arrays.")
    return [array.astype(kind) for array, kind in zip(arrays, kinds, strict=True)]


def _call(model, arrays):
    if len(arrays) == 1 and not isinstance(getattr(model, "input", None), (list, dict)):
        return model(arrays[0], training=False)
    return model(keras.tree.pack_sequence_as(model.input, arrays), training=False)


def _flat(outputs) -> list[np.ndarray]:
    return [
        np.asarray(keras.ops.convert_to_numpy(y), np.float32) for y in keras.tree.flatten(outputs)
    ]


def _check_outputs(path, expected, outputs):
    shapes, received = [y.shape for y in expected], [y.shape for y in outputs]
    if shapes != received:
        raise ValueError(
            f"{path.name} gives outputs of the shapes {received}, the model of {shapes}: it is not a "
            "file of this model."
        )


class _Run(NamedTuple):
    """One call of a layer: its path, the tensors it read, by identity, and those that it made."""

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    values: list[np.ndarray]


# An own weight is no result of the file's: it is computed with, and rounded, when that is written.
_NOT_RUN = (keras.Model, keras.layers.InputLayer, graphs.OwnWeight)


def _runs(model, arrays) -> list[_Run]:
    """Runs the model and notes what each layer computes; parts of a layer are not looked into."""
    runs, alive = [], []
    outer = []
    for path, layer in graphs.walk(model):
        if not isinstance(layer, _NOT_RUN) and not any(
            path.startswith(other + "/") for other, _ in outer
        ):
            outer.append((path, layer))

    def noting(path, call):
        def noted(*args, **kwargs):
            results = call(*args, **kwargs)
            inputs, outputs = _tensors((args, kwargs)), _tensors(results)
            # Python reuses id() values after an object is freed, so tensors are kept alive.
            alive.extend([*inputs, *outputs])
            values = [np.asarray(t, np.float32) for t in outputs if t.dtype.is_floating]
            runs.append(_Run(path, tuple(map(id, inputs)), tuple(map(id, outputs)), values))
            return results

        return noted

    with intercepted(outer, noting):
        _call(model, arrays)
    return runs


def _tensors(structure) -> list:
    return [t for t in keras.tree.flatten(structure) if hasattr(t, "dtype") and hasattr(t, "numpy")]


def _matches(model, arrays, tensors, threshold) -> tuple[LayerMatch, ...]:
    runs = [run for run in _runs(model, arrays) if run.values]
    found = [_best(run, tensors) for run in runs]
    good = [sqnr >= threshold for _, sqnr, _ in found]
    # A layer that is fused has no tensor of its own; that of the next whose kernel ends vouches for it,
    # unless that is all but the same for every input, as the softmax of an untrained model.
    vouches = [g and varied >= threshold / 2 for g, (_, _, varied) in zip(good, found, strict=True)]
    fine = list(good)
    for i in reversed(range(len(runs))):
        made = set(runs[i].outputs)
        readers = [j for j in range(i + 1, len(runs)) if made & set(runs[j].inputs)]
        readers = readers or list(range(i + 1, min(i + 2, len(runs))))
        vouched = any(vouches[j] for j in readers)
        fine[i], vouches[i] = good[i] or vouched, vouches[i] or vouched
    matches, first = [], True
    for run, (name, sqnr, _), is_good, is_fine in zip(runs, found, good, fine, strict=True):
        note = "" if is_good else "within a kernel"
        if not is_fine:
            note, first = ("first to deviate" if first else "deviates"), False
        matches.append(LayerMatch(run.path, name, sqnr, note))
    return tuple(matches)


def _best(run, tensors) -> tuple[str, float, float]:
    """Returns the tensor that is most like the output of a layer, and how much so.

    Its name, the SQNR, and the SQNR of what differs from input to input.
    """
    best = ("", -np.inf, -np.inf)
    for value in run.values:
        for name, tensor in tensors.get(_size(value), ()):
            for view in _views(tensor, value.shape):
                if (sqnr := graphs.sqnr(value, view)) > best[1]:
                    varied = graphs.sqnr(value - value.mean(0), view - view.mean(0))
                    best = (name, sqnr, varied if len(value) > 1 else sqnr)
    return best


def _size(array) -> tuple[int, ...]:
    """What does not change when axes move: the sizes of axes other than 1, sorted."""
    return tuple(sorted(n for n in array.shape if n != 1))


def _by_size(tensors) -> dict:
    """Sorts pairs of name and array for `_best`."""
    sorted_ = {}
    for name, array in tensors:
        sorted_.setdefault(_size(array), []).append((name, array))
    return sorted_


def _views(tensor, shape):
    """Yields a tensor in the shape of another, with the channels last if they came first."""
    squeezed = tuple(n for n in shape if n != 1)
    if tuple(n for n in tensor.shape if n != 1) == squeezed:
        yield tensor.reshape(shape)
    if tensor.ndim > 2:
        moved = np.moveaxis(tensor, 1, -1)
        if moved.shape == shape:
            yield moved


def _decibels(value) -> str:
    return "exact" if value == np.inf else "–" if value == -np.inf else f"{value:.1f}"
