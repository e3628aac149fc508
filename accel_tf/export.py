"""Export: LiteRT (`.tflite`) files from Keras models, checked after they are written.

A model from `accel_tf.quantize_aware` or `accel_tf.calibrate` becomes a file whose inputs, outputs
and operators are 8-bit integers; any other model becomes a float32 file.
"""

import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import sys
import tempfile
import warnings
from collections import Counter
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras.src.models.functional import Functional  # Keras exports no public name for it.
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from accel_tf import layers as graphs
from accel_tf import report
from accel_tf.quantization import QuantizedLayer
from accel_tf.quantization._fake import freezing


class Operator(NamedTuple):
    """One operator of a LiteRT file: its name and the data types of its tensors, constants too."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def is_int8(self) -> bool:
        """Whether it computes on 8-bit integers: no float goes in or out, and int8 comes out."""
        dtypes = (*self.inputs, *self.outputs)
        return "int8" in self.outputs and not any(d.startswith(("float", "bfloat")) for d in dtypes)


@dataclasses.dataclass(frozen=True)
class LiteRTFile:
    """What a LiteRT file contains; prints as text and renders as a table in a notebook.

    Attributes:
        path: Where it is.
        size: Its size in bytes.
        inputs, outputs: The data types of the model's inputs and outputs, such as `("int8",)`.
        operators: Each `Operator` in order of execution.
    """

    path: pathlib.Path
    size: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: tuple[Operator, ...]

    @property
    def int8_fraction(self) -> float:
        """The fraction of the operators that compute on 8-bit integers."""
        return sum(op.is_int8 for op in self.operators) / max(len(self.operators), 1)

    @property
    def not_int8(self) -> tuple[str, ...]:
        """The names of the operators that do not compute on 8-bit integers."""
        return tuple(op.name for op in self.operators if not op.is_int8)

    @property
    def table(self) -> report.Table:
        """One row per kind of operator: how many there are, and their data types."""
        counts = Counter(
            (op.name, "int8" if op.is_int8 else "no", " ".join(op.inputs), " ".join(op.outputs))
            for op in self.operators
        )
        rows = [(name, n, int8, i, o) for (name, int8, i, o), n in counts.items()]
        title = (
            f"{self.path.name}: {report.human_bytes(self.size)}, {len(self.operators)} operators, "
            f"{self.int8_fraction:.0%} int8, {' '.join(self.inputs)} in, {' '.join(self.outputs)} out"
        )
        return report.Table(("operator", "count", "kind", "inputs", "outputs"), rows, title)

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    allow_float: bool = False,
) -> LiteRTFile:
    """Writes `model` as a LiteRT file and inspects what was written.

    Args:
        model: A model made by `quantize_aware` or `calibrate`, which gives a file that computes in
            int8, input and output included; or any other Keras model, which gives a float32 file.
            float16 computation is exported as float32.
        path: Where to write; usually ends in `.tflite`.
        batch_size: Fixes the number of inputs per run; with `None` the file takes any number, by
            `resize_tensor_input`.
        allow_float: Whether a quantized model may keep operators that are not int8, such as those
            of layers that were excluded. Its inputs and outputs are float32 then. The converter
            computes an excluded layer in int8 all the same where it has an integer kernel for it.

    Returns:
        What the file contains, as from `inspect_litert`.

    Raises:
        ValueError: The model is quantized but has seen no data, has 4-bit weights, or an operator
            did not become int8 although `allow_float` is false (the message names them; no file is
            left behind); or the converter failed.
        ImportError: ai_edge_litert, which reads the file back, is not installed.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, activation="relu")])
    >>> quantized = at.calibrate(model, np.random.default_rng(0).random((64, 8)), verbose=0)
    >>> path = tempfile.mkdtemp() + "/model.tflite"
    >>> at.export.litert(quantized, path).int8_fraction
    1.0
    """
    graphs.require_model(model, "litert")
    _litert_module("schema_py_generated")  # Missing? Then say so before the work, not after.
    path = pathlib.Path(path)
    quantizers = [layer for _, layer in graphs.walk(model) if isinstance(layer, QuantizedLayer)]
    for layer in quantizers:
        _require_exportable(layer)
    content = _convert(_plain(model), batch_size, bool(quantizers), allow_float)
    found = _inspect(content, path)
    if quantizers and not allow_float and found.not_int8:
        raise ValueError(
            f"Operators of {model.name!r} did not become int8: {report.shorten(found.not_int8)}. "
            "Layers excluded from quantization stay in float (see accel_tf.report_of); pass "
            "allow_float=True to export them so. No file was written."
        )
    path.write_bytes(content)
    return found


def inspect_litert(path: str | os.PathLike) -> LiteRTFile:
    """Returns what a LiteRT file contains: its operators, data types and the share that is int8.

    Args:
        path: A `.tflite` file.

    Raises:
        ValueError: The file is not a LiteRT model.
        FileNotFoundError: There is no such file.
        ImportError: ai_edge_litert is not installed.

    Example:

    >>> import tempfile, keras
    >>> import accel_tf as at
    >>> path = tempfile.mkdtemp() + "/float.tflite"
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> _ = at.export.litert(model, path)
    >>> [op.name for op in at.inspect_litert(path).operators]
    ['FULLY_CONNECTED']
    """
    path = pathlib.Path(path)
    return _inspect(path.read_bytes(), path)


def run_litert(path: str | os.PathLike, inputs, *, threads: int = 1):
    """Runs a LiteRT file on float inputs: quantizes them, runs the file, returns float outputs.

    For checking and measuring; an application would keep the integers.

    Args:
        path: A `.tflite` file.
        inputs: A float array of shape (n, …), or for several inputs a dict of them by name. A file
            with a fixed batch size takes an n that is a multiple of it.
        threads: How many threads to run with.

    Returns:
        A float32 array of shape (n, …), or a list of them if the model has several outputs.

    Raises:
        ValueError: The number or the shape of the inputs does not fit the file.
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
    return LiteRTRunner(path, threads=threads)(inputs)


class LiteRTRunner:
    """A LiteRT file kept open, so that a call costs little more than the computation.

    Args:
        path: A `.tflite` file.
        threads: How many threads to run with.

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
        _require_litert(content, self.path)
        with _quiet():
            self._interpreter = _litert_module("interpreter").Interpreter(
                model_content=content, num_threads=threads
            )
            self._interpreter.allocate_tensors()
            signature = self._interpreter.get_signature_runner()
        self._inputs = signature.get_input_details()
        outputs = signature.get_output_details()
        self._outputs = [outputs[name] for name in sorted(outputs, key=_natural)]
        self._shapes = {}

    def __call__(self, inputs):
        """Returns the outputs for one array, or a dict of them by name, as `run_litert` does."""
        arrays = inputs if isinstance(inputs, dict) else {next(iter(self._inputs)): inputs}
        if set(arrays) != set(self._inputs):
            raise ValueError(
                f"{self.path.name} has the inputs {', '.join(sorted(self._inputs))}; received "
                f"{', '.join(sorted(arrays))}. Pass a dict of arrays by name."
            )
        arrays = {name: self._checked(name, np.asarray(x)) for name, x in arrays.items()}
        fixed = int(next(iter(self._inputs.values()))["shape_signature"][0])
        if fixed == -1:
            outputs = self._run(arrays)
        else:
            n = len(next(iter(arrays.values())))
            if n % fixed or not n:
                raise ValueError(
                    f"{self.path.name} takes {fixed} inputs per run; {n} is no multiple of it."
                )
            runs = [
                self._run({name: x[i : i + fixed] for name, x in arrays.items()})
                for i in range(0, n, fixed)
            ]
            outputs = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
        return outputs[0] if len(outputs) == 1 else outputs

    def _checked(self, name, x):
        expected = tuple(int(n) for n in self._inputs[name]["shape_signature"])
        if x.ndim != len(expected) or any(
            e not in (-1, n) for e, n in zip(expected[1:], x.shape[1:], strict=True)
        ):
            raise ValueError(
                f"Input {name!r} of {self.path.name} has shape {expected} (-1 for any), received "
                f"{x.shape}."
            )
        return x

    def _run(self, arrays):
        shapes = {name: x.shape for name, x in arrays.items()}
        if shapes != self._shapes:
            for name, shape in shapes.items():
                self._interpreter.resize_tensor_input(self._inputs[name]["index"], shape)
            self._interpreter.allocate_tensors()
            self._shapes = shapes
        for name, x in arrays.items():
            detail = self._inputs[name]
            self._interpreter.set_tensor(detail["index"], _to_integers(x, detail))
        self._interpreter.invoke()
        return [
            _to_floats(self._interpreter.get_tensor(detail["index"]), detail)
            for detail in self._outputs
        ]


def _to_integers(x, detail):
    dtype, (scale, zero_point) = detail["dtype"], detail["quantization"]
    if not np.issubdtype(dtype, np.integer) or not scale:
        return x.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.round(x / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _to_floats(q, detail):
    scale, zero_point = detail["quantization"]
    if not np.issubdtype(q.dtype, np.integer) or not scale:
        return q
    return ((q.astype(np.int32) - zero_point) * scale).astype(np.float32)


def _natural(name):
    """A sorting key that puts output_10 behind output_9."""
    digits = "".join(filter(str.isdigit, name))
    return int(digits or 0), name


def _require_exportable(layer):
    if layer.scheme.weight_bits != 8:
        raise ValueError(
            f"Layer {layer.name!r} has {layer.scheme.weight_bits}-bit weights "
            f"({type(layer.scheme).__name__}), which a LiteRT file would store and compute in 8 "
            "bits. Quantize the float model with Int8() to export it."
        )
    for quantizer in layer.quantizers:
        _ = quantizer.range  # Raises a ValueError naming the layer if no data has been seen.


def _plain(model):
    """Returns a model that computes in float32 and lives on no distribution strategy."""
    policies = {layer.compute_dtype for _, layer in graphs.walk(model)}
    mirrored = any(isinstance(v.value, tf.distribute.DistributedValues) for v in model.variables)
    if policies <= {"float32", None} and not mirrored:
        return model
    copy = graphs.rebuild(model, lambda path, layer: None)
    for _, layer in graphs.walk(copy):
        layer.dtype_policy = "float32"
    return copy


def _convert(model, batch_size, quantized, allow_float) -> bytes:
    with _quiet() as log, freezing(), tempfile.TemporaryDirectory() as folder:
        try:
            converter = _converter(model, batch_size, folder)
            if quantized:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
                if not allow_float:
                    converter.inference_input_type = converter.inference_output_type = tf.int8
            return converter.convert()
        except Exception as error:
            raise ValueError(
                f"TensorFlow's converter to LiteRT failed on model {model.name!r}: "
                f"{str(error)[-500:]}\n{log()[-1000:]}"
            ) from error


def _converter(model, batch_size, folder):
    if not isinstance(model, (keras.Sequential, Functional)):
        if batch_size is not None:
            raise ValueError("a fixed batch size needs a functional or sequential model.")
        return tf.lite.TFLiteConverter.from_keras_model(model)
    specs = [
        tf.TensorSpec((batch_size or t.shape[0], *t.shape[1:]), t.dtype, name=t.name)
        for t in model.inputs
    ]

    def forward(*tensors):
        single = isinstance(model, keras.Sequential)
        packed = tensors[0] if single else keras.tree.pack_sequence_as(model.input, tensors)
        return model(packed, training=False)

    # A graph without variables is saved and read back in a third of the time that a model takes,
    # and that is where a conversion spends it.
    graph = tf.function(forward, autograph=False).get_concrete_function(*specs)
    module = tf.Module()
    module.graph = convert_variables_to_constants_v2(graph)
    tf.saved_model.save(module, folder, signatures=module.graph)
    return tf.lite.TFLiteConverter.from_saved_model(folder)


def _inspect(content: bytes, path: pathlib.Path) -> LiteRTFile:
    _require_litert(content, path)
    schema = _litert_module("schema_py_generated")
    names = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    types = {code: name.lower() for name, code in vars(schema.TensorType).items()}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    # The code field outgrew a byte; files for old readers carry it in the field of that name.
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]

    def dtypes(graph, indices):
        return tuple(types[graph.tensors[i].type] for i in indices if i >= 0)

    operators = tuple(
        Operator(names[codes[op.opcodeIndex]], dtypes(graph, op.inputs), dtypes(graph, op.outputs))
        for graph in model.subgraphs
        for op in graph.operators
    )
    main = model.subgraphs[0]
    return LiteRTFile(
        path, len(content), dtypes(main, main.inputs), dtypes(main, main.outputs), operators
    )


def _require_litert(content, path):
    if content[4:8] != b"TFL3":
        raise ValueError(
            f"{path} is not a LiteRT model: it has no TFL3 mark in bytes 4 to 8, received "
            f"{content[4:8]!r}. Write one with accel_tf.export.litert."
        )


def _litert_module(name):
    try:
        return importlib.import_module(f"ai_edge_litert.{name}")
    except ImportError as error:
        raise ImportError(
            "LiteRT files are read and run by ai_edge_litert, which is not installed. "
            "Install it with: pip install 'accel-tf[litert]'"
        ) from error


@contextlib.contextmanager
def _quiet():
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
