"""Weights alone in fewer bits: rewrites a float LiteRT file, whose weights lie on their grid already.

The converter has no say in it: TensorFlow's knows no 4-bit weights, and rounds Dense kernels to a
grid of its own.
"""

import copy
import functools

import numpy as np

from accel_tf._litert_file import pack, read_litert
from accel_tf._litert_schema import operator_name, schema, type_name
from accel_tf.export import _grid
from accel_tf.export._graph import nearest
from accel_tf.export._inspect import tensor_names
from accel_tf.export._unfold import unfold

# Kernels that multiply integer weights by activations that they round themselves, and the version
# of the operator that does so per channel and in 4 bits.
_DYNAMIC = {"FULLY_CONNECTED": 12, "CONV_2D": 8}
# The axis of the output channels in each kernel's weights; `None` stands for one scale.
_AXES = {"DEPTHWISE_CONV_2D": (3, None)}
# XNNPACK's kernels for groups take these.
_GROUPS = 32


def shrink(
    content: bytes, schemes: dict, mixed=(), kernels=lambda owner: ()
) -> tuple[bytes, dict[str, int]]:
    """Returns the file with the weights of some layers stored as their schemes say.

    Args:
        content: A LiteRT file.
        schemes: Schemes without integer activations, by the scopes of their layers; `None` for a layer
            in one of these that stays in float.
        mixed: The scopes of layers that hold constants besides those that were rounded.
        kernels: Called with the scope of a layer; returns its rounded kernels as arrays.

    Returns:
        The file, and for each layer how many numbers are stored so. Factors of inputs that the converter
        folded into the weights of a product are an operator of their own again. Weights stay float32
        where they lie on no grid, because the converter folded something else into them.
    """
    file, kernels = _File(content), functools.cache(kernels)
    stored: dict[str, int] = {}
    counted = set()

    def count(owner, graph, index):
        if (id(graph), index) not in counted:
            counted.add((id(graph), index))
            stored[owner] = stored.get(owner, 0) + int(np.prod(_shape(graph, index)))

    for graph in file.model.subgraphs:
        operators, made = list(graph.operators), {}
        graph.operators = []
        for op in operators:
            for place, index in enumerate(op.inputs):
                owner = _owner(file.model, graph, op, index, schemes)
                if owner is None and operator_name(file.model, op) == "FULLY_CONNECTED":
                    owner = _owner_of_values(file.constant(graph, index), schemes, kernels)
                if owner is None or schemes[owner] is None or len(_shape(graph, index)) < 2:
                    continue
                weights = file.constant(graph, index)
                if weights is None:
                    if file.has_integers(graph, index):  # The converter did it by itself.
                        count(owner, graph, index)
                    continue
                key = index, operator_name(file.model, op)
                if key not in made:
                    constant = owner in mixed and not _is_rounded(weights, schemes[owner])
                    scheme, at = schemes[owner], (file, graph, index)
                    made[key] = None if constant else _stored(*at, weights, scheme, key[1])
                    if made[key] is None and not constant and key[1] == "FULLY_CONNECTED":
                        made[key] = _unfolded(*at, weights, scheme, kernels(owner))
                if made[key]:
                    made[key](op, place)
                    count(owner, graph, index)
            graph.operators.append(op)
    return file.content(), stored


def sparse_tensors(content: bytes) -> int:
    """Returns how many tensors of a file are stored as sparse."""
    model = _File(content).model
    return sum(t.sparsity is not None for graph in model.subgraphs for t in graph.tensors)


def without_groups(content: bytes, path) -> bytes:
    """Returns a file in which weights with a scale for each group are float32, the same numbers.

    Only a delegate of LiteRT computes with groups, and with a delegate tensors cannot be looked at.

    Args:
        content: A LiteRT file.
        path: Where the file is, for the error if it is damaged.
    """
    file, found = _File(content, path), False
    for graph in file.model.subgraphs:
        for tensor in graph.tensors or ():
            details = getattr(tensor.quantization, "details", None)
            if not hasattr(details, "blockSize"):
                continue
            data = np.asarray(file.model.buffers[tensor.buffer].data, np.uint8)
            halves = np.stack([data & 15, data >> 4], axis=1).reshape(-1).astype(np.int8)
            integers = np.where(halves > 7, halves - 16, halves)[: np.prod(tensor.shape)]
            scales = graph.tensors[details.scales]
            scales = np.asarray(file.model.buffers[scales.buffer].data, np.uint8).view(np.float16)
            groups = integers.reshape(-1, details.blockSize) * scales.astype(np.float32)[:, None]
            file.model.buffers[tensor.buffer].data = (
                groups.astype(np.float32).reshape(-1).view(np.uint8)
            )
            tensor.type, tensor.quantization = file.schema.TensorType.FLOAT32, None
            found = True
    return file.content() if found else content


def _shape(graph, index):
    shape = graph.tensors[index].shape if index >= 0 else None
    return () if shape is None else shape


def _owner(model, graph, op, index, schemes):
    names = [(graph.tensors[index].name or b"").decode(), *tensor_names(model, graph, op)]
    return next(filter(None, (nearest(name, schemes) for name in names)), None)


def _owner_of_values(weights, schemes, kernels):
    """Returns the layer whose kernel a constant without a telling name was made of, or `None`."""
    if weights is None or min(weights.shape) < 2:  # any vector is another one, scaled
        return None
    return next((owner for owner in schemes if unfold(weights, kernels(owner))), None)


def _is_rounded(weights, scheme) -> bool:
    """Whether a constant looks like weights that were rounded: not so if each number has its own scale."""
    if scheme.weight_type == "float":
        return _grid.is_half(weights)
    return weights.size > 2 * max(weights.shape[0], weights.shape[-1])


def _stored(file, graph, index, weights, scheme, operator):
    """Stores one tensor of weights; returns a function `(op, place)` that makes `op` read it."""
    if scheme.weight_type == "float":
        half = file.tensor(graph, index, "FLOAT16", weights.astype(np.float16))
        return _expanded(file, graph, half, index)
    axes = _AXES.get(operator, (0, weights.ndim - 1, None))
    grid = _grid.find(weights, scheme.weight_bits, scheme.group_size, axes)
    if grid is None:
        return None
    small = _integer_tensor(file, graph, index, grid, scheme.weight_bits)
    if operator in _DYNAMIC and grid.axis == 0 and (grid.group is None or _blocks(grid, operator)):
        return _dynamic(file, small, operator)
    return _expanded(file, graph, small, index, grid)


def _unfolded(file, graph, index, weights, scheme, kernels):
    """As `_stored`, for the weights of a product whose inputs were scaled by constants."""
    found = unfold(weights, kernels)
    stored = found and _stored(file, graph, index, found.weights, scheme, "FULLY_CONNECTED")
    if stored is None:
        return None
    factors = file.tensor(graph, index, "FLOAT32", found.factors, "factors")

    def read(op, place):
        given = op.inputs[0]
        scaled = file.result(graph, given, "scaled", graph.tensors[given].shape)
        graph.tensors[scaled].shapeSignature = graph.tensors[given].shapeSignature
        file.add_operator(graph, "MUL", [given, factors], scaled, 1)
        op.inputs = np.array([scaled, *op.inputs[1:]], np.int32)
        stored(op, place)

    return read


def _blocks(grid, operator) -> bool:
    """Whether LiteRT has a kernel for the groups of these weights; it has their scales in float16."""
    columns = grid.integers.shape[-1]
    fits = grid.group % _GROUPS == 0 and columns % grid.group == 0
    limits = np.finfo(np.float16)
    normal = (grid.scales > limits.tiny) & (grid.scales < limits.max)
    return operator == "FULLY_CONNECTED" and fits and bool(normal.all())


def _integer_tensor(file, graph, index, grid, bits):
    integers = grid.integers
    schema = file.schema
    quantization = schema.QuantizationParametersT()
    if grid.group is None:
        quantization.scale = grid.scales[:, 0]
        quantization.quantizedDimension = grid.axis or 0
    elif _blocks(grid, "FULLY_CONNECTED") and integers.ndim == 2 and grid.axis == 0:
        blocks = schema.BlockwiseQuantizationT()
        blocks.scales = file.tensor(
            graph, index, "FLOAT16", grid.scales.astype(np.float16), "scales"
        )
        blocks.zeroPoints, blocks.blockSize = -1, grid.group
        quantization.details = blocks
        quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
    else:
        # One row for each group, the last of each channel filled up with zeros.
        moved = integers[None] if grid.axis is None else np.moveaxis(integers, grid.axis, 0)
        rows = moved.reshape(len(moved), -1)
        integers = np.pad(rows, ((0, 0), (0, -rows.shape[1] % grid.group))).reshape(-1, grid.group)
        quantization.scale = grid.scales.reshape(-1)
    if quantization.scale is not None:
        quantization.zeroPoint = np.zeros(len(quantization.scale), np.int64)
    kind, data = ("INT4", _packed(integers)) if bits == 4 else ("INT8", integers)
    return file.tensor(graph, index, kind, data, "integers", integers.shape, quantization)


def _packed(integers):
    """Two 4-bit integers to a byte, the first in the lower half."""
    flat = integers.reshape(-1)
    flat = np.append(flat, np.int8(0)) if len(flat) % 2 else flat
    return ((flat[0::2] & 15) | ((flat[1::2] & 15) << 4)).astype(np.uint8)


def _dynamic(file, small, operator):
    def read(op, place):
        op.inputs = np.array([*op.inputs[:place], small, *op.inputs[place + 1 :]], np.int32)
        code = file.model.operatorCodes[op.opcodeIndex]
        code.version = max(code.version, _DYNAMIC[operator])
        if operator == "FULLY_CONNECTED":
            op.builtinOptions.asymmetricQuantizeInputs = True

    return read


def _expanded(file, graph, small, index, grid=None):
    """Makes a tensor of weights the result of operators that expand it to float."""
    tensor = graph.tensors[index]
    tensor.buffer = 0
    stored = tuple(graph.tensors[small].shape)
    if stored == tuple(tensor.shape):
        file.add_operator(graph, "DEQUANTIZE", [small], index, 6)
        return lambda op, place: None
    # Groups are rows of their own, and LiteRT has to put them together again.
    steps = [("DEQUANTIZE", stored)]
    channels, groups = grid.scales.shape
    count = grid.integers.size // channels
    if groups * grid.group > count:
        steps += [("RESHAPE", (channels, groups * grid.group)), ("SLICE", (channels, count))]
    shape, first = tuple(tensor.shape), grid.axis or 0
    moved = (shape[first], *shape[:first], *shape[first + 1 :]) if grid.axis else shape
    if steps[-1][1] != moved:
        steps.append(("RESHAPE", moved))
    if grid.axis:  # The channels are not the first axis.
        steps.append(("TRANSPOSE", shape))
    last = small
    for i, (name, shape) in enumerate(steps):
        result = index if i == len(steps) - 1 else file.result(graph, index, f"rows{i}", shape)
        inputs = [last]
        if name == "SLICE":
            inputs.append(file.tensor(graph, index, "INT32", np.zeros(2, np.int32), "begin"))
        if name == "TRANSPOSE":
            shape = (*range(1, first + 1), 0, *range(first + 1, len(shape)))
        if name != "DEQUANTIZE":
            inputs.append(
                file.tensor(graph, index, "INT32", np.array(shape, np.int32), f"shape{i}")
            )
        file.add_operator(graph, name, inputs, result, 6 if name == "DEQUANTIZE" else 1)
        last = result
    return lambda op, place: None


class _File:
    """A LiteRT file taken apart."""

    def __init__(self, content, path="The converted model"):
        self.schema = schema()
        self.model = read_litert(content, path)

    def constant(self, graph, index):
        """Returns the values of a float32 tensor that is constant, else `None`."""
        if index < 0 or type_name(graph.tensors[index]) != "FLOAT32":
            return None
        tensor = graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if data is None or not len(data):
            return None
        return np.asarray(data, np.uint8).view(np.float32).reshape(tensor.shape)

    def has_integers(self, graph, index) -> bool:
        """Whether a tensor is constant and has integers on a grid for its values."""
        tensor = graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        return type_name(tensor) in ("INT8", "INT4") and data is not None and len(data) > 0

    def tensor(self, graph, like, kind, array, suffix="", shape=None, quantization=None) -> int:
        """Adds a constant tensor, named after the tensor `like`; returns its index."""
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        tensor = copy.copy(graph.tensors[like])
        tensor.buffer = len(self.model.buffers) - 1
        tensor.type = getattr(self.schema.TensorType, kind)
        tensor.shape = np.array(array.shape if shape is None else shape, np.int32)
        tensor.shapeSignature = None
        tensor.quantization = quantization
        tensor.name = (tensor.name or b"") + f"/{suffix or kind.lower()}".encode()
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def result(self, graph, like, suffix, shape) -> int:
        """Adds a tensor of floats that an operator computes; returns its index."""
        index = self.tensor(graph, like, "FLOAT32", np.zeros(0, np.float32), suffix, shape)
        self.model.buffers.pop()
        graph.tensors[index].buffer = 0
        return index

    def add_operator(self, graph, name, inputs, output, version):
        """Adds an operator with one output to the end of a graph."""
        code = getattr(self.schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        place = next((i for i, c in enumerate(codes) if c.builtinCode == code), len(codes))
        if place == len(codes):
            new = self.schema.OperatorCodeT()
            new.builtinCode, new.deprecatedBuiltinCode = code, min(code, 127)
            codes.append(new)
        codes[place].version = max(codes[place].version, version)
        operator = self.schema.OperatorT()
        operator.opcodeIndex = place
        operator.inputs = np.array(inputs, np.int32)
        operator.outputs = np.array([output], np.int32)
        graph.operators.append(operator)

    def content(self) -> bytes:
        """Puts the file together, without the constants that nobody reads any more."""
        read = {entry.buffer for entry in self.model.metadata or ()}
        for graph in self.model.subgraphs:
            used = _used(graph)
            for index, tensor in enumerate(graph.tensors):
                tensor.buffer = tensor.buffer if index in used else 0
                read.add(tensor.buffer)
        for index, buffer in enumerate(self.model.buffers):
            if index not in read:
                buffer.data = None
        return pack(self.model)


def _used(graph) -> set[int]:
    """Returns the tensors that an operator, or the grid of such a tensor, refers to."""
    used = {*graph.inputs, *graph.outputs}
    for op in graph.operators:
        used |= {
            *op.inputs,
            *op.outputs,
            *(op.intermediates if op.intermediates is not None else ()),
        }
    for index in [i for i in used if i >= 0]:
        details = getattr(graph.tensors[index].quantization, "details", None)
        if hasattr(details, "scales"):
            used.add(details.scales)
    return used
