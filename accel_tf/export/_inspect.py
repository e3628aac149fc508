"""What a LiteRT file contains: its operators, their number formats, and what stayed in float and why."""

import dataclasses
import html
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from accel_tf import report
from accel_tf._litert_file import read_litert, shape_of
from accel_tf._litert_schema import has_data, operator_name, type_name
from accel_tf.export._graph import nearest

# No kernel of LiteRT computes these on integers.
_FLOAT_ONLY = ("ELU", "CONV_3D", "CONV_3D_TRANSPOSE", "COS", "SIN", "ERF", "FLOOR_MOD", "CUMSUM")
# They read a tensor's shape and none of its values.
_READ_SHAPES = ("SHAPE", "RANK")
_BORDERS = ("QUANTIZE", "DEQUANTIZE")


class Operator(NamedTuple):
    """One operator of a LiteRT file.

    Attributes:
        name: What it computes, such as `"CONV_2D"`.
        inputs, outputs: The data types of its tensors, constants too.
        layer: The layer that it belongs to, as far as the names in the file tell.
        why: If it computes in float, the reason; otherwise empty.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str = ""
    why: str = ""

    @property
    def kind(self) -> str:
        """The numbers it computes with: `"int8"`, `"int16"`, `"float"`, or `"index"`.

        An operator of kind index works out shapes, positions or masks in int32 or bool. It is no
        part of the network's arithmetic, whatever that is computed in.
        """
        read = () if self.name in _READ_SHAPES else self.inputs
        dtypes = {*read, *self.outputs}
        if any(d.startswith(("float", "bfloat")) for d in dtypes):
            return "float"
        if "int16" in dtypes:
            return "int16"
        return "int8" if dtypes & {"int8", "uint8", "int4"} else "index"

    @property
    def is_int8(self) -> bool:
        """Whether it computes on integers alone: no float goes in or out.

        True as well of 16-bit activations, and of an operator that works out a shape or an index.
        """
        return self.kind != "float"


@dataclasses.dataclass(frozen=True)
class LiteRTFile:
    """What a LiteRT file contains; prints as text and renders as a table in a notebook.

    Attributes:
        path: Where it is.
        size: Its size in bytes.
        inputs, outputs: The data types of the model's inputs and outputs, such as `("int8",)`.
        operators: Each `Operator` in order of execution.
        note: How the file was checked against its model, if `accel_tf.export.litert` wrote it just now.
        float_weights: The paths of layers of which some weights are stored as float32, although the
            scheme of the model stores them in fewer bits. Known when the file is written.
    """

    path: pathlib.Path
    size: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: tuple[Operator, ...]
    note: str = ""
    float_weights: tuple[str, ...] = ()

    @property
    def int8_fraction(self) -> float:
        """The fraction of the operators that compute on integers, those of shapes left aside."""
        counted = [op.is_int8 for op in self.operators if op.kind != "index"]
        return sum(counted) / max(len(counted), 1)

    @property
    def not_int8(self) -> tuple[str, ...]:
        """The names of the operators that compute in float."""
        return tuple(op.name for op in self.operators if not op.is_int8)

    @property
    def table(self) -> report.Table:
        """One row per kind of operator: how many there are, and their data types."""
        counts = Counter(
            (op.name, op.kind, " ".join(op.inputs), " ".join(op.outputs)) for op in self.operators
        )
        rows = [(name, n, kind, i, o) for (name, kind, i, o), n in counts.items()]
        title = (
            f"{self.path.name}: {report.human_bytes(self.size)}, {len(self.operators)} operators, "
            f"{self.int8_fraction:.0%} int8, {' '.join(self.inputs)} in, {' '.join(self.outputs)} out"
        )
        columns = ("operator", "count", "kind", "inputs", "outputs")
        return report.Table(columns, rows, title, self.note)

    @property
    def in_float(self) -> report.Table:
        """One row per layer that computes in float: its operators, and why they are not integers."""
        rows = {}
        for op in self.operators:
            if op.kind == "float":
                rows.setdefault((op.layer, op.why), []).append(op.name)
        cells = [
            (layer or "–", " ".join(dict.fromkeys(names)), why)
            for (layer, why), names in rows.items()
        ]
        return report.Table(("layer", "operators", "why"), cells, "Computed in float")

    @property
    def _tables(self):
        mixed = 0 < len(self.not_int8) and self.int8_fraction > 0
        return (self.table, self.in_float) if mixed else (self.table,)

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self._tables), *self._notes])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes)
        return "".join(table._repr_html_() for table in self._tables) + notes

    @property
    def _notes(self):
        if not self.float_weights:
            return []
        layers = report.shorten(self.float_weights)
        return [f"Weights stored as float32, as the converter folded them: some of {layers}."]


def inspect_litert(path: str | os.PathLike) -> LiteRTFile:
    """Returns what a LiteRT file contains: its operators, data types and what stayed in float.

    Names of layers are those that the file carries: exact ones if `accel_tf.export.litert` wrote it.

    Args:
        path: A `.tflite` file.

    Raises:
        ValueError: The file is not a LiteRT model, or it is damaged.
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
    return inspect(path.read_bytes(), path)


class Known(NamedTuple):
    """What a model tells about one of its layers, for the inspection of its file.

    Attributes:
        path: The layer's path.
        why: The reason why it computes in float, or `""` if it should not.
    """

    path: str
    why: str = ""


def inspect(
    content: bytes, path: pathlib.Path, known: Mapping[str, Known] | None = None
) -> LiteRTFile:
    """Returns what a file contains.

    Args:
        content: Its bytes.
        path: Where it is, or will be.
        known: The model's layers by their scopes in the file, if the model is at hand.
    """
    model = read_litert(content, path)
    operators = []
    for graph in model.subgraphs:
        for op in graph.operators or ():
            name = operator_name(model, op)
            bare = Operator(name, _dtypes(graph, op.inputs), _dtypes(graph, op.outputs))
            layer, reason = layer_of(model, graph, op, known)
            why = _why(bare, reason, known) if bare.kind == "float" else ""
            operators.append(bare._replace(layer=layer, why=why))
    main = model.subgraphs[0]
    io = _dtypes(main, main.inputs), _dtypes(main, main.outputs)
    return LiteRTFile(path, len(content), *io, _only_if_mixed(operators))


def _dtypes(graph, indices) -> tuple[str, ...]:
    present = [i for i in (() if indices is None else indices) if i >= 0]
    return tuple(type_name(graph.tensors[i]).lower() for i in present)


def tensor_names(model, graph, op) -> list[str]:
    """Returns the names of an operator's tensors, those first that tell most about its layer.

    Weights, outputs, then other inputs, the first of which is what the layer before made.
    """

    def is_weights(index):
        tensor = graph.tensors[index]
        return len(shape_of(tensor)) > 1 and has_data(model, tensor)

    read, written = ([] if i is None else i.tolist() for i in (op.inputs, op.outputs))
    inputs = [index for index in (*read[1:], *read[:1]) if index >= 0]
    weights = [index for index in inputs if is_weights(index)]
    return [(graph.tensors[i].name or b"").decode() for i in (*weights, *written, *inputs)]


def layer_of(model, graph, op, known: Mapping[str, Known] | None) -> Known:
    """Returns the layer that an operator belongs to, by the names of its tensors."""
    for name in tensor_names(model, graph, op):
        if known is not None:
            if found := nearest(name, known):
                return known[found]
        elif "/" in name and not name.startswith(("arith.", "tfl.")):
            return Known(name.split(";")[0].rpartition("/")[0])
    return Known("")


def _why(op, reason, known) -> str:
    if op.name in _BORDERS:
        half = "float16" in op.inputs
        return "weights stored as float16" if half else "between integers and floats"
    if reason:
        return reason
    if {"int8", "int4"} & set(op.inputs):
        return "weights alone are integers"
    if op.name in _FLOAT_ONLY:
        return f"LiteRT has no int8 kernel for {op.name}"
    if known is None:
        return "its tensors have no integer grid"
    return "a tensor that it reads or writes has no range: its layer is not quantized"


def _only_if_mixed(operators):
    """In a file of floats alone there is nothing to explain."""
    if any(op.kind in ("int8", "int16") or "int8" in op.inputs for op in operators):
        return tuple(operators)
    if any({"int4", "float16"} & set(op.inputs) for op in operators):
        return tuple(operators)
    return tuple(op._replace(why="") for op in operators)
