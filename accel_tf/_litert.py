"""Run LiteRT (`.tflite`) files, through `ai_edge_litert`."""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from accel_tf._litert_file import has_output_keys, read_litert
from accel_tf._litert_schema import litert_module


def run_litert(path: str | os.PathLike, inputs, *, threads: int = 1):
    """Runs a LiteRT file on inputs: quantizes them, runs the file, returns float outputs.

    This function is for checking and measuring; an application would keep the integers.

    Args:
        path: A `.tflite` file.
        inputs: An array of shape (n, …), or for several inputs a dict of them by name. A file
            with a fixed batch size takes an n that is a multiple of it. Floats are quantized where
            the file reads quantized integers, and so are integers and lists of integers: 200 is the
            value 200. Only an array of exactly the data type that the file reads, such as int8, is
            taken as the integers of the file, as they are.
        threads: How many threads to run with.

    Returns:
        A float32 array of shape (n, …), or a list of them if the model has several outputs. If the
        model returns a dictionary and accel_tf wrote the file, the result is a dictionary with the
        same keys.

    Raises:
        ValueError: The file is no LiteRT model or damaged, LiteRT cannot run it, or the number, the
            shape or the values of the inputs do not fit it.
        ImportError: ai_edge_litert is not installed.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> import accel_tf as at
    >>> path = tempfile.mkdtemp() + "/float.tflite"
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> _ = at.export.litert(model, path)
    >>> at.export.run_litert(path, np.zeros((3, 8))).shape
    (3, 4)
    """
    return LiteRTRunner(path, threads=threads)(inputs, raw=True)


class LiteRTRunner:
    """A LiteRT file kept open, so that a call costs little more than the computation.

    Args:
        path: A `.tflite` file.
        threads: How many threads to run with.

    Raises:
        ValueError: The file is not a LiteRT model, it is damaged, or LiteRT cannot run it.
        ImportError: ai_edge_litert is not installed.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> import accel_tf as at
    >>> path = tempfile.mkdtemp() + "/float.tflite"
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> _ = at.export.litert(model, path)
    >>> run = at.export.LiteRTRunner(path)
    >>> run(np.zeros((2, 8))).shape, run(np.zeros((5, 8))).shape
    ((2, 4), (5, 4))
    """

    def __init__(self, path: str | os.PathLike, *, threads: int = 1):
        self.path = pathlib.Path(path)
        content = self.path.read_bytes()
        self._has_keys = has_output_keys(read_litert(content, self.path))
        content = self._content(content)
        with quiet(), self._naming_the_file():
            self._interpreter = litert_module("interpreter").Interpreter(
                model_content=content, num_threads=threads, **self._options()
            )
            self._interpreter.allocate_tensors()
            self.inputs = self._details("input")
            self.outputs = self._details("output")
            self._require_batches()
        self._shapes = None

    def _content(self, content) -> bytes:
        """Returns what is run of a file with a content that is sound."""
        return content

    def _options(self) -> dict:
        return {}

    @contextlib.contextmanager
    def _naming_the_file(self):
        """Raises what LiteRT raises as a `ValueError` that names the file."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"LiteRT cannot run {self.path}: {str(error).strip().rstrip('.')}. Check the values "
                "of the inputs; write a damaged file again with accel_tf.export.litert."
            ) from error

    def _require_batches(self):
        if not self.inputs or not self.outputs:
            raise ValueError("it needs at least one input and one output")
        for detail in self.inputs:
            if not len(detail["shape_signature"]):
                raise ValueError(f"its input {detail['key']} is a scalar and takes no samples")

    def __call__(self, inputs, *, raw: bool = False):
        """Returns the float outputs for inputs, returned as in `run_litert`.

        Args:
            inputs: An array, or a list or dict of them for several inputs.
            raw: Whether arrays of exactly the data type that the file reads are the integers of the
                file; otherwise they are values to be quantized, as those of other types always are.
        """
        parts = [
            [to_floats(q, detail) for q, detail in zip(integers, self.outputs, strict=True)]
            for integers in self.prepare(inputs, raw=raw)()
        ]
        outputs = [p[0] if len(p) == 1 else np.concatenate(p) for p in zip(*parts, strict=True)]
        if self._has_keys:
            keys = [detail["key"] for detail in self.outputs]
            return dict(zip(keys, outputs, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    def prepare(self, inputs, *, raw: bool = False) -> Callable[[], list]:
        """Quantizes inputs beforehand; returns a function that only runs them, to be timed.

        A program that feeds an int8 file from a camera has no floats to convert either.

        Args:
            inputs: As in `__call__`.
            raw: As in `__call__`.

        Returns:
            A function without arguments. It copies the inputs in, computes, copies the outputs
            out, and returns them as they are in the file: a list of arrays for each run, of which
            there are several if the file's batch size is fixed.
        """
        arrays = [
            self._converted(np.asarray(x), detail, raw)
            for x, detail in zip(self._match(inputs), self.inputs, strict=True)
        ]
        n = len(arrays[0])
        if not n or any(len(x) != n for x in arrays):
            raise ValueError(
                f"{self.path.name} needs at least one sample, the same number in each input. "
                f"Received the shapes {', '.join(str(x.shape) for x in arrays)}."
            )
        fixed = {int(detail["shape_signature"][0]) for detail in self.inputs} - {-1}
        size = fixed.pop() if fixed else n
        if fixed or n % size:
            raise ValueError(
                f"{self.path.name} takes {size} inputs per run; {n} is no multiple of it. Export "
                "it with batch_size=None to run any number."
            )
        chunks = [[x[i : i + size] for x in arrays] for i in range(0, n, size)]
        return lambda: [self._run(chunk) for chunk in chunks]

    def _converted(self, x, detail, raw):
        """Returns an input in the data type that the file reads."""
        dtype, (scale, zero_point) = detail["dtype"], detail["quantization"]
        if not np.issubdtype(dtype, np.integer) or (raw and x.dtype == dtype):
            return x.astype(dtype)
        limits = np.iinfo(dtype)
        if scale:
            # As LiteRT's own operator does, halves to even.
            steps = np.rint(x.astype(np.float32) * (np.float32(1) / np.float32(scale)))
            return np.clip(steps + zero_point, limits.min, limits.max).astype(dtype)
        if x.size and not (limits.min <= x.min() and x.max() <= limits.max):
            raise ValueError(
                f"The input {detail['key']} of {self.path.name} is {limits.dtype}; received values "
                f"from {x.min()} to {x.max()}, which it cannot hold."
            )
        return x.astype(dtype)

    def _run(self, arrays) -> list:
        with self._naming_the_file():
            return self._invoked(arrays)

    def _invoked(self, arrays) -> list:
        shapes = [x.shape for x in arrays]
        if shapes != self._shapes:
            for detail, shape in zip(self.inputs, shapes, strict=True):
                self._interpreter.resize_tensor_input(detail["index"], shape)
            self._interpreter.allocate_tensors()
            self._shapes = shapes
        for detail, x in zip(self.inputs, arrays, strict=True):
            self._interpreter.set_tensor(detail["index"], x)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(detail["index"]) for detail in self.outputs]

    def _match(self, inputs) -> list:
        """Returns the arrays in the order of the file's inputs."""
        if isinstance(inputs, dict):
            names = [detail["key"] for detail in self.inputs]
            if set(names) != set(inputs):
                raise ValueError(
                    f"{self.path.name} has the inputs {', '.join(names)}; received "
                    f"{', '.join(sorted(inputs))}."
                )
            arrays = [inputs[name] for name in names]
            if all(map(_fits, arrays, self.inputs)):
                return arrays
        else:
            # Only a list that holds arrays is one of several inputs.
            several = isinstance(inputs, (list, tuple)) and inputs and hasattr(inputs[0], "shape")
            arrays = list(inputs) if several else [np.asarray(inputs)]
            fitting = [[i for i, x in enumerate(arrays) if _fits(x, d)] for d in self.inputs]
            if len(arrays) == len(fitting) and all(len(found) == 1 for found in fitting):
                return [arrays[i] for (i,) in fitting]
        described = ", ".join(
            f"{d['key']} {tuple(int(n) for n in d['shape_signature'])}" for d in self.inputs
        )
        raise ValueError(
            f"{self.path.name} has the inputs {described}, -1 standing for any size; received the "
            f"shapes {', '.join(str(np.shape(x)) for x in arrays)}. Where shapes do not tell which "
            "goes where, pass a dictionary by name."
        )

    def _details(self, kind) -> list[dict[str, Any]]:
        """The inputs or outputs of the file, in the order of its signature where it has one."""
        if self._interpreter.get_signature_list():
            signature = self._interpreter.get_signature_runner()
            details = getattr(signature, f"get_{kind}_details")()
            return [{**details[key], "key": key} for key in sorted(details, key=natural)]
        details = getattr(self._interpreter, f"get_{kind}_details")()
        return [{**detail, "key": detail["name"]} for detail in details]


def _fits(x, detail) -> bool:
    expected = tuple(int(n) for n in detail["shape_signature"])
    shape = np.shape(x)
    return len(shape) == len(expected) and all(
        e in (-1, n) for e, n in zip(expected[1:], shape[1:], strict=True)
    )


def to_floats(q, detail):
    scale, zero_point = detail["quantization"]
    if not np.issubdtype(q.dtype, np.integer) or not scale:
        return q
    return (q.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)


def natural(name):
    """A sorting key that puts output_10 behind output_9."""
    digits = "".join(filter(str.isdigit, name))
    return int(digits or 0), name


@contextlib.contextmanager
def quiet():
    """Keeps what the converter prints off the terminal; yields a function that returns it.

    Python's part writes to `sys.stdout`, `sys.stderr` and TensorFlow's logger, the C++ part to the
    file descriptors beneath, and a notebook has all of these apart from one another.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        sys.stdout.flush()
        sys.stderr.flush()
        for number in (1, 2):
            original = os.dup(number)
            stack.callback(os.close, original)
            stack.callback(os.dup2, original, number)
            os.dup2(log.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        logger = tf.get_logger()
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel("ERROR")

        def read():
            log.seek(0)
            return log.read().decode(errors="replace")

        yield read
