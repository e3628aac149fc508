"""What runs a candidate: one class for each runtime, all with the same four members.

    source             what is run: the Keras model, the path of the file, or the function
    runtime            the name of the runtime
    prepare(x)         a function without arguments that runs `x` and waits for the result, to be timed
    predict(x, n)      the outputs for all of `x`, computed in batches of `n`; with `by_name=True`, several
                       outputs are a dictionary also where the file has both an order and names

All that can be done beforehand is done by `prepare`: a model is traced for exactly this signature,
and its input already lies on the device.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from accel_tf._litert import LiteRTRunner
from accel_tf.benchmark import _samples
from accel_tf.export._onnx import onnx_module


def compiled(model: keras.Model, example) -> tf.function:
    """The inference pass of `model` as a `tf.function` of the flattened inputs."""

    def forward(*leaves):
        return model(tf.nest.pack_sequence_as(example, leaves), training=False)

    return tf.function(forward, jit_compile=_uses_xla(model), autograph=False)


def wait(outputs):
    """Brings every output to the host, so that none is still being computed."""
    return [
        leaf.numpy() if hasattr(leaf, "numpy") else leaf
        for leaf in tf.nest.flatten(outputs, expand_composites=True)
    ]


class FunctionRunner:
    """Any callable, which gets `x` as it is. It has no outputs that could be compared."""

    runtime = "Python"

    def __init__(self, function: Callable):
        self.source = function

    def prepare(self, x) -> Callable[[], Any]:
        return lambda: wait(self.source(x))


class KerasRunner:
    """A Keras model in TensorFlow; compiled by XLA if the model was compiled with `jit_compile`."""

    def __init__(self, model: keras.Model):
        self.source = model
        self.runtime = "XLA" if _uses_xla(model) else "TensorFlow"

    def prepare(self, x) -> Callable[[], Any]:
        x = _samples.as_arrays(x)
        leaves = _tensors(x)
        forward = compiled(self.source, x).get_concrete_function(*leaves)
        return lambda: wait(forward(*leaves))

    def predict(self, x, batch_size: int, by_name: bool = False):
        forward = compiled(self.source, x)

        def run(part):
            leaves = _tensors(part)
            return forward.get_concrete_function(*leaves)(*leaves)

        return _samples.in_batches(run, x, batch_size)


class LiteRTFileRunner:
    """A `.tflite` file in LiteRT, with as many threads as TensorFlow uses."""

    runtime = "LiteRT"

    def __init__(self, path: pathlib.Path):
        self.source = path
        self._runner = LiteRTRunner(path, threads=_threads())

    def prepare(self, x) -> Callable[[], Any]:
        return self._runner.prepare(_samples.as_arrays(x))

    def predict(self, x, batch_size: int, by_name: bool = False):
        fixed = int(self._runner.inputs[0]["shape_signature"][0])
        return _samples.in_batches(self._runner, x, _samples.multiple_of(fixed, batch_size))


class Input(NamedTuple):
    """An input of a file: its name, its shape with `None` for any size, and its NumPy type."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype


class _NamedInputsRunner:
    """What the runners of ONNX files and SavedModel folders have in common.

    Attributes:
        inputs: The inputs of the file.
        outputs: The names of its outputs.
        ordered: Whether inputs and outputs are in the order of the model's, so that lists fit them.
    """

    inputs: list[Input]
    outputs: list[str]
    ordered: bool

    def prepare(self, x) -> Callable[[], Any]:
        feeds = self._feeds(_samples.as_arrays(x))
        return lambda: [self._run(feed) for feed in feeds]

    def predict(self, x, batch_size: int, by_name: bool = False):
        def run(part):
            parts = [wait(self._run(feed)) for feed in self._feeds(part)]
            outputs = [np.concatenate(part) for part in zip(*parts, strict=True)]
            if len(outputs) == 1:
                return outputs[0]
            if self.ordered and not by_name:
                return outputs
            return dict(zip(self.outputs, outputs, strict=True))

        fixed = self.inputs[0].shape[0]
        return _samples.in_batches(run, x, _samples.multiple_of(fixed, batch_size))

    def _run(self, feed: dict[str, Any]) -> list:
        raise NotImplementedError

    def _on_device(self, array):
        return array

    def _feeds(self, x) -> list[dict[str, Any]]:
        """Returns the inputs of each run by name; there are several if the batch size is fixed."""
        arrays = self._by_name(x)
        count = len(next(iter(arrays.values())))
        fixed = {i.shape[0] for i in self.inputs if i.shape} - {None}
        size = fixed.pop() if fixed else count
        if fixed or count % size:
            raise ValueError(
                f"{self.source.name} takes {size} inputs per run; {count} is no multiple of it. "
                "Export it with batch_size=None to run any number."
            )
        return [
            {name: self._on_device(array[i : i + size]) for name, array in arrays.items()}
            for i in range(0, count, size)
        ]

    def _by_name(self, x) -> dict[str, np.ndarray]:
        names = [i.name for i in self.inputs]
        if isinstance(x, dict):
            fits = set(x) == set(names)
            arrays = [x[name] for name in names] if fits else []
        else:
            arrays = list(x) if isinstance(x, (list, tuple)) else [x]
            fits = len(arrays) == len(names) and (self.ordered or len(names) == 1)
        if not fits or not all(map(_fits, arrays, self.inputs)):
            described = ", ".join(f"{i.name} {i.shape} {i.dtype}" for i in self.inputs)
            received = tf.nest.map_structure(np.shape, x)
            raise ValueError(
                f"{self.source.name} has the inputs {described}, None standing for any size; "
                f"received the shapes {received}. Pass a dictionary with an array for each name."
            )
        return {i.name: self._cast(a, i) for a, i in zip(arrays, self.inputs, strict=True)}

    def _cast(self, array, expected: Input) -> np.ndarray:
        cast = array.astype(expected.dtype)
        if expected.dtype.kind in "iub" and not np.array_equal(cast, array):
            raise ValueError(
                f"{self.source.name} takes {expected.dtype} for its input {expected.name!r}; x holds "
                f"{array.dtype} values that {expected.dtype} cannot represent. Convert x to what the file "
                "expects."
            )
        return cast


class ONNXRunner(_NamedInputsRunner):
    """An `.onnx` file in onnxruntime on the CPU, with as many threads as TensorFlow uses."""

    runtime = "onnxruntime"
    ordered = True

    def __init__(self, path: pathlib.Path):
        library = onnx_module("onnxruntime")
        options = library.SessionOptions()
        options.intra_op_num_threads = _threads()
        options.log_severity_level = 3  # errors
        # Its threads go on spinning after a run, which would slow down the candidate of the next turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = library.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common class of their own
            raise ValueError(f"onnxruntime cannot load {path}: {error}") from error
        self.source = path
        self.inputs = [
            Input(entry.name, _known(entry.shape), _numpy_type(entry.type))
            for entry in self._session.get_inputs()
        ]
        self.outputs = [entry.name for entry in self._session.get_outputs()]

    def _run(self, feed):
        return self._session.run(None, feed)


class SavedModelRunner(_NamedInputsRunner):
    """The signature `serving_default` of a SavedModel folder, in TensorFlow."""

    runtime = "TensorFlow"
    ordered = False  # A signature has its inputs and outputs by name, in no order of the model's.

    def __init__(self, path: pathlib.Path):
        try:
            self._model = tf.saved_model.load(str(path))  # Its variables live as long as it does.
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise ValueError(f"TensorFlow cannot load the SavedModel {path}: {error}") from error
        if "serving_default" not in self._model.signatures:
            raise ValueError(
                f"The SavedModel {path} has no signature 'serving_default' to run; it has "
                f"{sorted(self._model.signatures)}. Write one with accel_tf.export.saved_model."
            )
        self._function = self._model.signatures["serving_default"]
        self.source = path
        self.inputs = [
            Input(name, _known(spec.shape), np.dtype(spec.dtype.as_numpy_dtype))
            for name, spec in self._function.structured_input_signature[1].items()
        ]
        self.outputs = sorted(self._function.structured_outputs)

    def _on_device(self, array):
        return tf.constant(array)

    def _run(self, feed):
        outputs = self._function(**feed)
        return wait([outputs[name] for name in self.outputs])


def _uses_xla(model) -> bool:
    """An XLA model is measured as XLA; "auto" in a model that is not compiled means no."""
    return bool(getattr(model, "compiled", False) and model.jit_compile)


def _tensors(x) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(x)]


def _threads() -> int:
    """The number of threads that TensorFlow computes an operation with."""
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    if hasattr(os, "sched_getaffinity"):
        return chosen or len(os.sched_getaffinity(0))
    return chosen or os.cpu_count() or 1


def _known(shape) -> tuple[int | None, ...]:
    """Returns a shape with `None` for each size that is open; ONNX gives such sizes names."""
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in shape)


def _numpy_type(name: str) -> np.dtype:
    """Returns the NumPy type for ONNX's name of a type, such as `tensor(float)`."""
    name = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64", "string": "object"}.get(name, name))


def _fits(array, expected: Input) -> bool:
    shape = np.shape(array)
    return len(shape) == len(expected.shape) and all(
        size in (None, n) for size, n in zip(expected.shape[1:], shape[1:], strict=True)
    )
