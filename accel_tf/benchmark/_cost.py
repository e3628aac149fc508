"""What a model costs on paper: floating-point operations, parameters, bytes on disk."""

import gzip
import os
import pathlib
import tempfile
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from accel_tf import layers
from accel_tf.benchmark import _runners, _samples
from accel_tf.sparse import SparseLayer


class Parameters(NamedTuple):
    """How many numbers a model's weights hold, and how many of them are not zero."""

    total: int
    nonzero: int


class FileSize(NamedTuple):
    """Bytes of a file as it is, and compressed by gzip."""

    plain: int
    gzipped: int


def parameters(model: keras.Model) -> Parameters:
    """Counts the parameters of a model, and those that are not zero.

    Args:
        model: A built Keras model. Weights that are shared count once. Positions (weights of int32,
            int64, uint16 or bool, such as the index arrays of sparse layers) are not parameters,
            and neither is the padding between the values of sparse layers.

    Returns:
        A named tuple `(total, nonzero)`.

    Raises:
        ValueError: `model` is not a built Keras model.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> at.benchmark.parameters(model).total  # a 3×2 kernel and 2 biases
    8
    """
    layers.require_model(model, "parameters")
    arrays = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
    arrays = [a for a in arrays if a.dtype not in (np.int32, np.int64, np.uint16, np.bool_)]
    padding = sum(
        layer.values.shape[0] - layer.matrix.nnz
        for _, layer in layers.walk(model)
        if isinstance(layer, SparseLayer)
    )
    return Parameters(
        sum(array.size for array in arrays) - padding,
        sum(int(np.count_nonzero(a)) for a in arrays),
    )


def file_size(model) -> FileSize:
    """Measures the size on disk, and gzipped, of what one would ship.

    Args:
        model: A Keras model, which is saved as `.keras` into a temporary folder, without the state
            of its optimizer (Adam's would triple it); or the path of any file, or of a folder, such
            as a SavedModel, whose files are added up.

    Returns:
        A named tuple `(plain, gzipped)`, in bytes. Zeros cost nothing only in the gzipped size.

    Raises:
        ValueError: `model` is not built, or there is no such file or folder.

    Reference:
        Deutsch (1996), GZIP file format specification, RFC 1952.

    Example:

    >>> model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100)])
    >>> at.benchmark.file_size(model).plain > 4 * model.count_params()  # four bytes each, and the container
    True
    """
    if isinstance(model, (str, os.PathLike)):
        path = pathlib.Path(model)
        if not path.exists():
            raise ValueError(f"file_size: there is no file {str(model)!r}.")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        data = b"".join(file.read_bytes() for file in files if file.is_file())
    else:
        layers.require_model(model, "file_size")
        data = _saved_bytes(model)
    return FileSize(len(data), len(gzip.compress(data, mtime=0)))


def flops(model: keras.Model, x=None) -> int:
    """Counts the floating-point operations of one forward pass, a multiply–add as two.

    The graph of the inference pass is traced and its contractions are added up: products of
    matrices, convolutions of all kinds, `einsum`, sparse products. They are counted as often as
    they run, so shared layers count at each use, recurrent layers at each time step. Biases,
    activations, pooling and normalisation are not counted: they are few against the contractions,
    and bound by memory. Zeros count where a kernel multiplies by them: all those of a dense kernel,
    and those with which a sparse one fills up its blocks or slices.

    Args:
        model: A built Keras model; functional, sequential or subclassed, nested or not.
        x: A batch, or a list or dictionary of arrays, of which only shapes and types matter. `None`
            takes the shapes of the model's inputs with a batch of one.

    Returns:
        The number of operations for the whole batch.

    Raises:
        ValueError: The model has dimensions unknown without `x`, or a loop whose number of steps
            depends on the data.

    Reference:
        Hobbhahn and Sevilla (2021), What's the backward-forward FLOP ratio for neural networks?,
        Epoch AI, for the conventions; Chollet (2017), arXiv:1610.02357, for separable convolutions.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> at.benchmark.flops(model)  # 2 · 3 · 2
    12
    """
    layers.require_model(model, "flops")
    if x is None:
        example = _example_inputs(model)
    else:
        example = tf.nest.map_structure(
            lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), _samples.as_arrays(x)
        )
    forward = _runners.compiled(model, example)
    return _count(forward.get_concrete_function(*tf.nest.flatten(example)).graph, model.name)


def _saved_bytes(model) -> bytes:
    optimizer = getattr(model, "optimizer", None)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        try:
            if optimizer is not None:
                model.optimizer = None  # Keras has no other way to leave its state out
            model.save(path)
        finally:
            if optimizer is not None:
                model.optimizer = optimizer
        return pathlib.Path(path).read_bytes()


def _example_inputs(model):
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            f"flops: model {model.name!r} has no symbolic inputs, so their shapes are unknown. "
            "Pass an example batch: flops(model, x)."
        )
    if unknown := [t for t in inputs if None in t.shape[1:]]:
        raise ValueError(
            f"flops: input {unknown[0].name!r} of model {model.name!r} has the shape "
            f"{unknown[0].shape}. Pass an example batch with known sizes: flops(model, x)."
        )
    # A functional model knows its structure of inputs (dictionary, list); a sequential has one.
    structure = model.input if isinstance(model, layers.Functional) else inputs[0]
    return tf.nest.map_structure(
        lambda t: tf.TensorSpec([t.shape[0] or 1, *t.shape[1:]], t.dtype), structure
    )


def _count(graph, where: str) -> int:
    total = 0
    for op in _live(graph):
        if op.type in _COUNTERS:
            total += _COUNTERS[op.type](op)
            continue
        for attribute in ("f", "body", "then_branch", "else_branch", "branches"):
            bodies = _functions(op, attribute)
            if bodies:
                # Of several branches one runs; the most expensive is the honest guess.
                inner = max(_count(body, where) for body in bodies)
                total += inner * _trips(op, where) if inner else 0
    return total


def _live(graph) -> list:
    """The operations that the outputs depend on; TensorFlow drops the others before it runs."""
    found, stack = {}, [tensor.op for tensor in graph.outputs]
    while stack:
        op = stack.pop()
        if op.name not in found:
            found[op.name] = op
            stack += [tensor.op for tensor in op.inputs]
    return list(found.values())


def _functions(op, attribute: str) -> list:
    try:
        value = op.get_attr(attribute)
    except ValueError:
        return []
    names = [v.name for v in (value if isinstance(value, list) else [value]) if hasattr(v, "name")]
    return [op.graph._get_function(name).graph for name in names if name]


def _trips(op, where: str) -> int:
    if op.type not in ("While", "StatelessWhile"):
        return 1
    limit = op.inputs[1]  # tf.while_loop's maximum_iterations
    steps = tf.get_static_value(limit)
    if steps is None and limit.op.type == "Max":  # as Keras' recurrent layers write it
        steps = tf.get_static_value(limit.op.inputs[0])
    if steps is None or np.max(steps) < 0:
        raise ValueError(
            f"flops: model {where!r} has a loop, {op.name!r}, whose number of steps depends on the "
            "data, so its operations cannot be counted."
        )
    return int(np.max(steps))


def _size(shape) -> int:
    if shape.num_elements() is None:
        raise ValueError(
            f"flops: a tensor of the unknown shape {shape}. Pass an example batch: flops(model, x)."
        )
    return shape.num_elements()


def _matmul(op):
    transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
    inner = op.inputs[0].shape[-2 if transposed else -1]
    return 2 * _size(op.outputs[0].shape) * inner


def _convolution(op):
    return 2 * _size(op.outputs[0].shape) * _size(op.inputs[1].shape[:-1])


def _depthwise(op):
    return 2 * _size(op.outputs[0].shape) * _size(op.inputs[1].shape[:-2])


def _transposed_convolution(op):
    # The gradient of a convolution: as many products as that convolution has, whose output is
    # this op's input.
    return 2 * _size(op.inputs[2].shape) * _size(op.inputs[1].shape[:-1])


def _einsum(op):
    left = op.get_attr("equation").decode().split("->")[0].split(",")
    if len(left) < 2:
        return 0
    sizes = {}
    for labels, operand in zip(left, op.inputs, strict=True):
        head, _, tail = labels.partition("...")
        shape = operand.shape.as_list()
        sizes.update(zip(head, shape, strict=False))
        sizes.update(zip(reversed(tail), reversed(shape), strict=False))
        # Broadcast dimensions are named by their distance from the end, to align them.
        broadcast = shape[len(head) : len(shape) - len(tail)] if "..." in labels else []
        for i, size in enumerate(reversed(broadcast)):
            sizes[i] = max(size, sizes.get(i, 1))
    return 2 * _size(tf.TensorShape(sizes.values()))


def _sparse_matmul(op):
    return 2 * _size(op.inputs[3].shape) * _size(op.inputs[0].shape[:-1])


_COUNTERS = {
    "MatMul": _matmul,
    "BatchMatMul": _matmul,
    "BatchMatMulV2": _matmul,
    "BatchMatMulV3": _matmul,
    "Conv2D": _convolution,
    "Conv3D": _convolution,
    "DepthwiseConv2dNative": _depthwise,
    "Conv2DBackpropInput": _transposed_convolution,
    "Conv3DBackpropInputV2": _transposed_convolution,
    "Einsum": _einsum,
    "AccelTfSparseMatMul": _sparse_matmul,
}
