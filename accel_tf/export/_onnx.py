"""ONNX files, through tf2onnx: fake quantization becomes QuantizeLinear and DequantizeLinear."""

import importlib.util
import os
import pathlib
import re

import keras
import numpy as np

from accel_tf import layers as graphs
from accel_tf._litert import quiet
from accel_tf.export import _grid
from accel_tf.export._check import draft, require_same_file
from accel_tf.export._graph import (
    NotConstant,
    frozen_graph,
    input_names,
    mixed_scopes,
    nearest,
    output_names,
    plain,
    schemes_by_scope,
    scope,
    unrolled,
)
from accel_tf.export._litert import require_data
from accel_tf.quantization._fake import freezing

# The operators that take weights: which input they are, and the axis of the channels.
_WEIGHTS = {
    "Conv": (1, 0),
    "ConvTranspose": (1, 1),
    "MatMul": (1, 1),
    "Gemm": (1, 1),
    "Gather": (0, 0),
}


def onnx(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    opset: int = 17,
    verify: bool = True,
) -> pathlib.Path:
    """Writes `model` as an ONNX file, for onnxruntime and the other runtimes that read it.

    A quantized model keeps its numbers: each rounded activation is a pair of QuantizeLinear and
    DequantizeLinear, each rounded weight is stored as int8 with a DequantizeLinear per channel
    (4-bit weights too), or as float16. Runtimes compute such pairs in integers where they can. On x86
    processors without VNNI, onnxruntime's kernels then saturate sums of two products at 16 bits, which
    shows in the outputs, unless the session option `session.x64quantprecision` is "1"; onnxruntime
    1.32 cannot load unrolled recurrent layers with it. `verify` sets it, and runs the pairs in float
    where it cannot. Weights in groups are stored as float32, as this opset knows no groups, and so is
    the table of an int8 embedding, whose grid is that of an activation.

    Args:
        model: A functional or sequential Keras model. float16 computation is exported as float32.
        path: Where to write; usually ends in `.onnx`.
        batch_size: Fixes the number of inputs per run; with `None` the file takes any number.
        opset: The version of ONNX's operators, 17 or 18.
        verify: Whether to run the file, if onnxruntime is installed, on a few samples made from the
            input specification of `model`, and to compare the outputs.

    Returns:
        The path. The file's inputs and outputs are named after the model's, a dictionary's after its
        keys. A name that is taken in the file gets an underscore at its end.

    Raises:
        ValueError: The model is subclassed, keeps state between calls, has seen no data, has 16-bit
            activations, or an operator has no counterpart in ONNX; or `opset` is another number; or the
            file does not compute what `model` does. No file is left behind.
        ImportError: tf2onnx is not installed.

    Example:

    >>> import tempfile, keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,), name="x"), keras.layers.Dense(4, name="y")])
    >>> path = at.export.onnx(model, tempfile.mkdtemp() + "/model.onnx")
    >>> path.name
    'model.onnx'
    """
    graphs.require_model(model, "onnx")
    if opset not in (17, 18):
        raise ValueError(f"opset must be 17 or 18, which tf2onnx writes; received {opset!r}.")
    if not graphs.has_graph(model):
        raise ValueError(
            f"Model {model.name!r} ({type(model).__name__}) is subclassed, and an ONNX file is made "
            "of a functional or sequential model. Write it as one."
        )
    schemes = schemes_by_scope(model)
    if any((scheme.activation_bits or 8) != 8 for scheme in schemes.values() if scheme):
        raise ValueError(
            f"Model {model.name!r} has 16-bit activations, which ONNX knows from opset 21 on and "
            "tf2onnx does not write. Use accel_tf.export.litert, or quantize with Int8()."
        )
    require_data(model)
    given = model
    convert = onnx_module("tf2onnx.convert")
    path = pathlib.Path(path)
    with quiet() as log, freezing():
        try:
            model = plain(model)
            with unrolled(model):
                graph = frozen_graph(model, batch_size)
            proto, _ = convert.from_graph_def(
                _without_xla(graph.graph.as_graph_def()),
                input_names=[t.name for t in graph.inputs],
                output_names=[t.name for t in graph.outputs],
                opset=opset,
            )
        except NotConstant:
            raise
        except Exception as error:
            raise ValueError(
                f"tf2onnx failed on model {model.name!r}: {str(error)[-500:]}\n{log()[-1000:]}"
            ) from error
    _rename(proto.graph, model)
    _shrink_weights(proto.graph, schemes, mixed_scopes(model))
    _without_erfc(proto.graph)
    _require_operators(proto, model)
    with draft(path, ".onnx") as made:
        made.write_bytes(proto.SerializeToString())
        if verify and importlib.util.find_spec("onnxruntime"):
            require_same_file("onnx", given, made, batch_size)
    return path


def _require_operators(proto, model):
    """Raises a ValueError if ONNX does not have an operator of the file."""
    try:
        onnx_module("onnx.checker").check_model(proto)
    except Exception as error:
        raise ValueError(
            f"An operator of model {model.name!r} has no counterpart in ONNX"
            f"{_missing(str(error), model)}: {str(error)[:500]}"
        ) from error


def _missing(message, model) -> str:
    """Returns the operator that a message of the checker is about, its layer, and the way out."""
    paths = {scope(path): path for path, _ in graphs.walk(model)}
    found = re.search(r"Name: (\S+) OpType: (\w+)", message)
    if not found:
        return ""
    owner = nearest(found[1], paths)
    where = f"layer {paths[owner]!r}" if owner else "between layers"
    # keras.ops.argmax tells -0.0 from 0.0 by its bits.
    argmax = ", such as tf.argmax(x, axis) in a layer of your own for keras.ops.argmax"
    return (
        f" ({found[2]}, {where}). Write operators that ONNX has instead"
        f"{argmax if found[2].startswith('Bit') else ''}, or use accel_tf.export.saved_model"
    )


def _without_xla(graph):
    """Returns a graph whose functions may all be inlined.

    Keras compiles a grouped convolution with XLA, because TensorFlow cannot train it on every CPU, and
    TensorFlow inlines no function that XLA has to compile.
    """
    for owner in (*graph.node, *graph.library.function):
        for name in ("_XlaMustCompile", "_noinline"):
            owner.attr.pop(name, None)
    return graph


def onnx_module(name):
    """Imports a package for ONNX files, or says how to install it."""
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"ONNX files are written by tf2onnx and run by onnxruntime; {name} is not installed. "
            "Install them with: pip install 'accel-tf[onnx]'"
        ) from error


def _rename(graph, model):
    """Gives the file's inputs and outputs the model's names, and the batch its own."""
    pairs = [*zip(graph.input, input_names(model), strict=True)]
    pairs += zip(graph.output, output_names(model), strict=True)
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    for info, name in pairs:
        while name in taken - {info.name}:
            name += "_"
        for node in graph.node:
            for names in (node.input, node.output):
                for i, old in enumerate(names):
                    if old == info.name:
                        names[i] = name
        taken.add(name)
        info.name = name
        first = info.type.tensor_type.shape.dim[:1]
        if first and first[0].dim_param:
            first[0].dim_param = "batch"


def _without_erfc(graph):
    """Puts 1 − Erf for Erfc, of which TensorFlow's gelu is made and which ONNX does not have."""
    numpy_helper, helper = onnx_module("onnx.numpy_helper"), onnx_module("onnx.helper")
    nodes = list(graph.node)
    if not any(node.op_type == "Erfc" for node in nodes):
        return
    graph.initializer.append(numpy_helper.from_array(np.float32(1.0), "accel_tf_one"))
    del graph.node[:]
    for node in nodes:
        if node.op_type == "Erfc":
            erf = node.name + "_erf"
            graph.node.append(helper.make_node("Erf", node.input, [erf], name=erf))
            node = helper.make_node("Sub", ["accel_tf_one", erf], node.output, name=node.name)
        graph.node.append(node)


def _shrink_weights(graph, schemes, mixed):
    """Stores the weights of quantized layers in their format, in front of an operator that expands."""
    numpy_helper, helper = onnx_module("onnx.numpy_helper"), onnx_module("onnx.helper")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    done, operators = {}, []
    for node in graph.node:
        place, axis = _WEIGHTS.get(node.op_type, (None, None))
        name = node.input[place] if place is not None else None
        if name in stored and name not in done:
            found = [nearest(n, schemes) for n in (name, *node.output, node.name)]
            owner = next(filter(None, found), None)
            weights = numpy_helper.to_array(stored[name])
            rounded = owner and schemes[owner]
            if owner in mixed and rounded and rounded.weight_type == "float":
                # Constants that were not rounded stay as they are.
                rounded = _grid.is_half(weights)
            if rounded and weights.dtype == np.float32 and weights.ndim > 1:
                if node.op_type == "Gemm" and any(
                    a.name == "transB" and a.i for a in node.attribute
                ):
                    axis = 0
                made = _expanding(name, weights, axis, schemes[owner], helper, numpy_helper)
                done[name] = made is not None
                if made is not None:
                    tensors, operator = made
                    graph.initializer.remove(stored[name])
                    graph.initializer.extend(tensors)
                    operators.append(operator)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*operators, *rest])


def _expanding(name, weights, axis, scheme, helper, numpy_helper):
    """Returns the tensors to store for some weights and the operator that makes `name` of them."""
    if scheme.weight_type == "float":
        half = numpy_helper.from_array(weights.astype(np.float16), name + "_float16")
        return [half], helper.make_node("Cast", [half.name], [name], name=name + "_cast", to=1)
    grid = _grid.find(weights, scheme.weight_bits, scheme.group_size, (axis, None))
    if grid is None or grid.group is not None:
        return None
    one = grid.axis is None
    scales = grid.scales[0, 0] if one else grid.scales[:, 0]
    tensors = [
        numpy_helper.from_array(grid.integers, name + "_integers"),
        numpy_helper.from_array(scales, name + "_scale"),
        # Left out it would be 0 as well, but onnxruntime's session.x64quantprecision needs it.
        numpy_helper.from_array(np.zeros(scales.shape, np.int8), name + "_zero"),
    ]
    options = {} if one else {"axis": grid.axis}
    inputs = [tensor.name for tensor in tensors]
    return tensors, helper.make_node(
        "DequantizeLinear", inputs, [name], name=name + "_dequantize", **options
    )
