"""Runs what can be measured: a Keras model, a `.tflite` file, or any callable."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def is_litert(candidate) -> bool:
    return isinstance(candidate, (str, os.PathLike)) and str(candidate).endswith(".tflite")


def check(name: str, candidate) -> None:
    """Raises a `ValueError` unless `candidate` is something that can be run."""
    if isinstance(candidate, (str, os.PathLike)):
        if not is_litert(candidate):
            raise ValueError(
                f"Candidate {name!r} is the path {str(candidate)!r}; only .tflite files are run "
                "from a path. Load others first: keras.models.load_model(path)."
            )
        if not pathlib.Path(candidate).is_file():
            raise ValueError(f"Candidate {name!r}: there is no file {str(candidate)!r}.")
    elif not callable(candidate):
        raise ValueError(
            f"Candidate {name!r} must be a Keras model, a callable or the path of a .tflite file. "
            f"Received: {type(candidate).__name__}"
        )


def as_arrays(x):
    """Makes every leaf of `x` an array, float64 becoming Keras' float type, as `fit` does."""

    def convert(leaf):
        array = np.asarray(leaf)
        return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array

    # Lists are structures of several inputs only if their elements are arrays.
    if isinstance(x, (list, tuple)) and not (x and hasattr(x[0], "shape")):
        return convert(x)
    return tf.nest.map_structure(convert, x)


def length(x) -> int:
    """The number of samples in `x`, which every leaf must share."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tf.nest.flatten(x)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "x needs at least one sample, the same number in each input. Received shapes: "
            f"{[leaf.shape for leaf in tf.nest.flatten(x)]}"
        )
    return sizes.pop()


def rows(x, start: int, stop: int):
    return tf.nest.map_structure(lambda leaf: leaf[start:stop], x)


def runner(candidate, x) -> Callable[[], Any]:
    """Returns a function without arguments that runs `candidate` on `x` and waits for the result.

    All that can be done before is done here: a model is traced for exactly this signature, and its
    input already lies on the device.
    """
    if is_litert(candidate):
        return LiteRT(candidate).runner(x)
    if isinstance(candidate, keras.Model):
        leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(x)]
        forward = compiled(candidate, x).get_concrete_function(*leaves)
        return lambda: wait(forward(*leaves))
    return lambda: wait(candidate(x))


def compiled(model: keras.Model, example) -> tf.function:
    """The inference pass of `model` as a `tf.function` of the flattened inputs."""

    def forward(*leaves):
        return model(tf.nest.pack_sequence_as(example, leaves), training=False)

    # An XLA model is measured as XLA; "auto" in an uncompiled model means no.
    jit = bool(getattr(model, "compiled", False) and model.jit_compile)
    return tf.function(forward, jit_compile=jit, autograph=False)


def wait(outputs):
    """Brings every output to the host, so that none is still being computed."""
    return [
        leaf.numpy() if hasattr(leaf, "numpy") else leaf
        for leaf in tf.nest.flatten(outputs, expand_composites=True)
    ]


def predict(candidate, x, batch_size: int):
    """Returns the outputs of `candidate` for all of `x` as NumPy arrays, in its own structure."""
    if is_litert(candidate):
        run = LiteRT(candidate).predict
    else:
        forward = compiled(candidate, x)

        def run(part):
            leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(part)]
            return forward.get_concrete_function(*leaves)(*leaves)

    count = length(x)
    parts = [run(rows(x, i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    return tf.nest.map_structure(
        lambda *leaves: np.concatenate(list(map(np.asarray, leaves))), *parts
    )


class LiteRT:
    """A `.tflite` file in the LiteRT interpreter, with as many threads as TensorFlow uses.

    Inputs are matched to the file's by name when they come as a dictionary, else by shape.
    """

    def __init__(self, path):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError(
                f"Running {str(path)!r} needs the package ai-edge-litert, which is not installed. "
                'Install it with: pip install "accel-tf[litert]"'
            ) from error
        threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count()
        self._path = str(path)
        self._interpreter = Interpreter(model_path=self._path, num_threads=threads)
        self._interpreter.allocate_tensors()

    def predict(self, x):
        """Runs float samples through the file; integer inputs are quantized, outputs dequantized."""
        invoke, outputs = self._prepare(x)
        results = [
            [_dequantize(self._interpreter.get_tensor(o["index"]), o) for o in outputs]
            for _ in invoke()
        ]
        joined = [np.concatenate(parts) for parts in zip(*results, strict=True)]
        return joined[0] if len(joined) == 1 else joined

    def runner(self, x) -> Callable[[], Any]:
        """Returns a function that copies prepared inputs in, computes, and copies outputs out.

        The conversion between float and integer is outside: a program that feeds an int8 file from
        a camera has no floats to convert.
        """
        invoke, outputs = self._prepare(x)
        return lambda: [
            [self._interpreter.get_tensor(o["index"]) for o in outputs] for _ in invoke()
        ]

    def _prepare(self, x):
        """Allocates for the batch of `x`; returns a generator function that runs it, and outputs.

        A file whose batch is fixed, as full-int8 files often are, is run several times.
        """
        inputs = self._match(x)
        count = len(inputs[0][1])
        fixed = {int(detail["shape_signature"][0]) for detail, _ in inputs} - {-1}
        size = fixed.pop() if fixed else count
        if fixed or count % size:
            raise ValueError(
                f"{self._path} has a fixed batch of {size}, which does not divide the "
                f"{count} samples received. Export it with a batch of 1 or a dynamic batch."
            )
        for detail, _ in inputs:
            if detail["shape"][0] != size:
                shape = [size, *detail["shape"][1:]]
                self._interpreter.resize_tensor_input(detail["index"], shape)
        self._interpreter.allocate_tensors()
        chunks = [
            [(detail["index"], array[i : i + size]) for detail, array in inputs]
            for i in range(0, count, size)
        ]

        def invoke():
            for chunk in chunks:
                for index, array in chunk:
                    self._interpreter.set_tensor(index, array)
                self._interpreter.invoke()
                yield

        return invoke, self._details("output")

    def _match(self, x):
        """Pairs each input of the file with its array, converted to the file's data type."""
        details = self._details("input")
        if isinstance(x, dict):
            arrays = [self._by_name(detail, x) for detail in details]
        else:
            arrays = self._by_shape(details, tf.nest.flatten(x))
        return [(d, _quantize(np.asarray(a), d)) for d, a in zip(details, arrays, strict=True)]

    def _by_name(self, detail, x):
        for name, array in x.items():
            if name in (detail["key"], detail["name"]):
                return array
        raise ValueError(
            f"{self._path} has an input {detail['key']!r}, x has {', '.join(map(repr, x))}."
        )

    def _by_shape(self, details, arrays):
        remaining = list(arrays)
        matched = []
        for detail in details:
            shape = tuple(detail["shape"][1:])
            fitting = [i for i, array in enumerate(remaining) if array.shape[1:] == shape]
            if len(details) > 1 and len(fitting) > 1 or not fitting or len(arrays) != len(details):
                described = ", ".join(f"{d['key']} {tuple(d['shape'].tolist())}" for d in details)
                raise ValueError(
                    f"{self._path} has the inputs {described}; cannot tell which of the arrays of "
                    f"shapes {[a.shape for a in arrays]} goes where. Pass x as a dictionary by name."
                )
            matched.append(remaining.pop(fitting[0]))
        return matched

    def _details(self, kind):
        """The inputs or outputs of the file, in the order of its signature where it has one."""
        if self._interpreter.get_signature_list():
            signature = self._interpreter.get_signature_runner()
            details = getattr(signature, f"get_{kind}_details")()
            return [
                {**details[key], "key": key} for key in sorted(details, key=lambda k: (len(k), k))
            ]
        details = getattr(self._interpreter, f"get_{kind}_details")()
        return [{**detail, "key": detail["name"]} for detail in details]


def _quantize(array, detail):
    scale, zero_point = detail["quantization"]
    if not scale or not np.issubdtype(array.dtype, np.floating):
        return array.astype(detail["dtype"])
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.round(array / scale) + zero_point, limits.min, limits.max).astype(
        detail["dtype"]
    )


def _dequantize(array, detail):
    scale, zero_point = detail["quantization"]
    return (array.astype(np.float32) - zero_point) * np.float32(scale) if scale else array
