"""Reads LiteRT files that may be damaged: everything is checked before anything is interpreted.

LiteRT's interpreter trusts a file: a tensor index that is out of range, or a stride of 0, ends the
process. `read_litert` is the only way in which this library opens a file.
"""

import re
import struct

import flatbuffers
import numpy as np

from accel_tf import _litert_operators as operators
from accel_tf._litert_schema import has_data, require, schema, type_name

# Names of outputs tell no dictionary from a list, since other converters name each output. So a file
# that keeps the keys of a dictionary says so in its metadata.
_KEYS = b"accel_tf.output_keys"
# LiteRT's kernels count elements in 32 bits.
_MAX_ELEMENTS = 2**31 - 1
_BITS = {
    **{"INT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "BOOL": 8, "FLOAT8_E4M3FN": 8},
    **{"FLOAT8_E5M2": 8, "INT16": 16, "UINT16": 16, "FLOAT16": 16, "BFLOAT16": 16, "INT32": 32},
    **{"UINT32": 32, "FLOAT32": 32, "INT64": 64, "UINT64": 64, "FLOAT64": 64, "COMPLEX64": 64},
    **{"COMPLEX128": 128},
}
_ZERO_POINTS = {
    "INT4": (-8, 7),
    "INT8": (-128, 127),
    "UINT8": (0, 255),
    "INT16": (-(2**15), 2**15 - 1),
}


def read_litert(content: bytes, path):
    """Returns the tables of a LiteRT file as the objects of its schema, once all of them are sound.

    Args:
        content: The bytes of the file.
        path: Where the file is; named in the error.

    Returns:
        A `ModelT` of `ai_edge_litert.schema_py_generated`.

    Raises:
        ValueError: The file is not a LiteRT model, or it is damaged.
    """
    if content[4:8] != b"TFL3":
        raise ValueError(
            f"{path} is not a LiteRT model: it has no TFL3 mark in bytes 4 to 8, received "
            f"{content[4:8]!r}. Write one with accel_tf.export.litert."
        )
    try:
        model = _unpack(content)
        _check_model(model, len(content))
    except (ValueError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise ValueError(
            f"{path} is a damaged LiteRT file: {error}. Write the file again with "
            "accel_tf.export.litert, or copy it again from where it came."
        ) from error
    return model


def pack(model) -> bytes:
    """Returns the content of the file that some tables describe."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def with_output_keys(content: bytes) -> bytes:
    """Returns a file that says that its outputs are a dictionary, if they have names of their own.

    Args:
        content: A file of a Keras model, whose converter numbers all other outputs.
    """
    model = read_litert(content, "The converted model")
    names = [e.name.decode() for s in model.signatureDefs or () for e in s.outputs or ()]
    if all(re.fullmatch(r"output_\d+", name) for name in names):
        return content
    entry, buffer = schema().MetadataT(), schema().BufferT()
    entry.name, entry.buffer = _KEYS, len(model.buffers)
    buffer.data = np.ones(1, np.uint8)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or ()), entry]
    return pack(model)


def has_output_keys(model) -> bool:
    """Whether the outputs of a file are a dictionary, by the names of its signature."""
    return any(entry.name == _KEYS for entry in model.metadata or ()) and bool(model.signatureDefs)


def _unpack(content):
    """Reads all tables; each read of the generated code fails outside of the file."""
    root = schema().Model.GetRootAs(content, 0)
    # Tables may overlap in a damaged file, so that a small file could describe endless work.
    count = root.SubgraphsLength() + root.BuffersLength() + root.OperatorCodesLength()
    require(4 * count <= len(content), f"it lists {count} tables in {len(content)} bytes")
    for i in range(root.SubgraphsLength()):
        graph = root.Subgraphs(i)
        count += graph.TensorsLength() + graph.OperatorsLength()
        require(4 * count <= len(content), f"it lists {count} tables in {len(content)} bytes")
    return schema().ModelT.InitFromObj(root)


def _check_model(model, size):
    require(model.version == 3, f"its version is {model.version}, and only version 3 is known")
    for name in ("operatorCodes", "subgraphs", "buffers"):
        require(getattr(model, name), f"it has no {name}")
    for i, code in enumerate(model.operatorCodes):
        operators.check_code(code, f"operator code {i}")
    for i, buffer in enumerate(model.buffers):
        inside = buffer.offset <= 1 or buffer.offset + buffer.size <= size
        require(inside, f"buffer {i} reaches beyond the end of the file")
    count = len(model.buffers)
    for place in [entry.buffer for entry in model.metadata or ()]:
        require(place < count, f"its metadata are in buffer {place}, of {count} buffers")
    for i, graph in enumerate(model.subgraphs):
        where = f"subgraph {i}"
        for j, tensor in enumerate(graph.tensors or ()):
            _check_tensor(model, graph, tensor, f"tensor {j} of {where}")
        _check_order(model, graph, where)
    operators.check_calls(model)
    for signature in model.signatureDefs or ():
        _check_signature(model, signature)


def _check_signature(model, signature):
    key = _text(signature.signatureKey, "the key of a signature")
    require(key, "a signature has no key")
    count = len(model.subgraphs)
    index = signature.subgraphIndex
    require(index < count, f"signature {key!r} is subgraph {index}, of {count} subgraphs")
    graph = model.subgraphs[index]
    for kind, entries, tensors in (
        ("input", signature.inputs, graph.inputs),
        ("output", signature.outputs, graph.outputs),
    ):
        names = [_text(entry.name, f"an {kind} of signature {key!r}") for entry in entries or ()]
        where = f"the {kind}s of signature {key!r}"
        require(
            len(set(names)) == len(names) and "" not in names, f"{where} lack names of their own"
        )
        indices = sorted({entry.tensorIndex for entry in entries or ()})
        expected = sorted({int(i) for i in (tensors if tensors is not None else ())})
        require(indices == expected, f"{where} are tensors {indices}, its subgraph's {expected}")


def _text(name, where) -> str:
    try:
        return (name or b"").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the name of {where} is no text in UTF-8") from error


def _check_tensor(model, graph, tensor, where):
    kind = type_name(tensor)
    require(kind is not None, f"{where} has the unknown type {tensor.type}")
    _text(tensor.name, where)
    shape = shape_of(tensor)
    require(all(n >= 0 for n in shape), f"{where} has the shape {shape}")
    elements = int(np.prod(shape, dtype=object))
    require(elements <= _MAX_ELEMENTS, f"{where} has the shape {shape}, more than LiteRT can count")
    signature = tensor.shapeSignature
    if signature is not None and len(signature):
        fits = len(signature) == len(shape) and all(
            s in (-1, n) for s, n in zip(signature.tolist(), shape, strict=True)
        )
        require(fits, f"{where} has the shape {shape} and the signature {signature.tolist()}")
    count = len(model.buffers)
    require(tensor.buffer < count, f"{where} has buffer {tensor.buffer}, of {count} buffers")
    known = {entry.id for entry in model.externalBuffers or ()}
    outside = tensor.externalBuffer
    require(outside in {0, *known}, f"{where} has the unknown external buffer {outside}")
    if tensor.sparsity is not None:
        elements = _check_sparsity(tensor.sparsity, shape, where)
    _check_data(model.buffers[tensor.buffer], kind, elements, where)
    require(
        not (tensor.isVariable and has_data(model, tensor)),
        f"{where} is a variable and has data",
    )
    if tensor.quantization is not None:
        _check_quantization(model, graph, tensor, kind, where)


def shape_of(tensor) -> tuple[int, ...]:
    """Returns the shape of a tensor of a file; that of a scalar is not written."""
    return () if tensor.shape is None else tuple(int(n) for n in tensor.shape)


def _check_data(buffer, kind, elements, where):
    """Checks that the data of a constant are as long as its type and shape say."""
    length = buffer.size if buffer.offset > 1 else 0 if buffer.data is None else len(buffer.data)
    if not length:
        return
    if kind == "STRING":
        _check_strings(np.asarray(buffer.data, np.uint8).tobytes(), elements, where)
        return
    require(kind in _BITS, f"{where}, of type {kind}, has data")
    expected = -(-elements * _BITS[kind] // 8)
    require(length == expected, f"{where} has {length} bytes of data and needs {expected}")


def _check_strings(data, elements, where):
    """A tensor of strings holds their number, where each begins and the last ends, and the texts."""
    numbers = np.frombuffer(data[: len(data) // 4 * 4], np.int32)
    count = int(numbers[0]) if len(numbers) else -1
    fits = count == elements and count + 2 <= len(numbers)
    require(fits, f"{where} has {count} strings and needs {elements}")
    ends = numbers[1 : count + 2]
    ordered = bool((np.diff(ends) >= 0).all()) and ends[0] == 4 * (count + 2)
    require(ordered and ends[-1] <= len(data), f"the strings of {where} lie outside of its data")


def _check_sparsity(sparsity, shape, where) -> int:
    """Checks how the non-zeros of a tensor are stored; returns how many there are."""
    order = _list(sparsity.traversalOrder)
    blocks = _list(sparsity.blockMap)
    rank = len(shape)
    require(
        sorted(order) == list(range(rank + len(blocks))) and all(0 <= b < rank for b in blocks),
        f"{where} has the sparsity of another shape",
    )
    levels = sparsity.dimMetadata or []
    require(len(levels) == len(order), f"{where} has the sparsity of another shape")
    sizes = list(shape)
    for block, place in zip(blocks, range(rank, len(order)), strict=True):
        size = levels[order.index(place)].denseSize
        divides = size > 0 and sizes[block] % size == 0
        require(divides, f"{where} has blocks of {size} in {sizes[block]}")
        sizes[block] //= size
        sizes.append(size)
    count = 1
    for axis, level in zip(order, levels, strict=True):
        if level.format == 0:
            require(level.denseSize == sizes[axis], f"{where} has the sparsity of another shape")
            count *= level.denseSize
            continue
        segments = _list(getattr(level.arraySegments, "values", None))
        indices = _list(getattr(level.arrayIndices, "values", None))
        increasing = all(a <= b for a, b in zip(segments, segments[1:], strict=False))
        fits = len(segments) == count + 1 and segments[0] == 0 and segments[-1] == len(indices)
        require(increasing and fits, f"the segments of {where} do not fit its indices")
        require(all(0 <= i < sizes[axis] for i in indices), f"an index of {where} is out of range")
        count = len(indices)
    return count


def _list(vector) -> list:
    return [] if vector is None else [int(n) for n in vector]


def _check_quantization(model, graph, tensor, kind, where):
    parameters, shape = tensor.quantization, shape_of(tensor)
    scales = np.asarray([] if parameters.scale is None else parameters.scale, np.float32)
    points = np.asarray([] if parameters.zeroPoint is None else parameters.zeroPoint, np.int64)
    require(
        len(points) == len(scales), f"{where} has {len(scales)} scales, {len(points)} zero points"
    )
    axis = parameters.quantizedDimension
    if len(scales) > 1:
        size = shape[axis] if 0 <= axis < len(shape) else None
        require(
            len(scales) == size,
            f"{where}, of shape {shape}, has {len(scales)} scales on axis {axis}",
        )
    if len(scales) and kind.startswith(("INT", "UINT")):
        # The converter writes 0 for a channel of weights that are all 0.
        positive = (scales > 0) if len(scales) == 1 else (scales >= 0)
        sound = bool((np.isfinite(scales) & positive).all())
        require(sound, f"{where} has a scale that is no positive number")
    low, high = _ZERO_POINTS.get(kind, (-(2**31), 2**31 - 1))
    in_range = bool(((points >= low) & (points <= high)).all())
    require(in_range, f"{where}, of type {kind}, has a zero point that is out of range")
    if hasattr(parameters.details, "scales"):
        _check_groups(model, graph, parameters.details, shape, where)


def _check_groups(model, graph, details, shape, where):
    """Checks weights with a scale for each group of consecutive inputs, stored in a tensor."""
    count = len(graph.tensors)
    for index in (details.scales, details.zeroPoints):
        require(-1 <= index < count, f"{where} has its scales in tensor {index}, of {count}")
    require(details.scales >= 0, f"{where} has no scales")
    size = details.blockSize
    divides = size > 0 and len(shape) > 0 and shape[-1] % size == 0
    require(divides, f"{where}, of shape {shape}, has groups of {size}")
    scales = graph.tensors[details.scales]
    expected = int(np.prod(shape)) // size
    fits = int(np.prod(shape_of(scales))) == expected and has_data(model, scales)
    kind = type_name(scales)
    require(fits and kind == "FLOAT16", f"{where} needs {expected} constant scales in FLOAT16")


def _check_order(model, graph, where):
    """Checks that each tensor is known before it is read, and written once."""
    count = len(graph.tensors or ())
    inputs, outputs = _list(graph.inputs), _list(graph.outputs)
    for kind, indices in (("input", inputs), ("output", outputs)):
        for index in indices:
            require(
                0 <= index < count, f"an {kind} of {where} is tensor {index}, of {count} tensors"
            )
    require(len(set(inputs)) == len(inputs), f"{where} has an input twice")
    constant = {i for i, tensor in enumerate(graph.tensors or ()) if _is_constant(model, tensor)}
    require(not constant & set(inputs), f"an input of {where} is a constant")
    written = constant | set(inputs)
    for i, op in enumerate(graph.operators or ()):
        here = f"operator {i} of {where}"
        operators.check(model, graph, op, here)
        for index in _list(op.inputs):
            known = index < 0 or index in written or graph.tensors[index].isVariable
            require(known, f"{here} reads tensor {index} before anything writes it")
        for index in _list(op.outputs):
            require(index not in written, f"{here} writes tensor {index}, which is written already")
            written.add(index)
    missing = sorted(set(outputs) - written)
    require(not missing, f"nothing writes tensor {missing[:1]}, an output of {where}")


def _is_constant(model, tensor) -> bool:
    return has_data(model, tensor) or 0 in shape_of(tensor)
