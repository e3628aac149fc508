"""What each operator of a LiteRT file needs: how many tensors, which options, which subgraphs."""

import functools

import numpy as np

from accel_tf._litert_schema import code_name, operator_name, require, schema, type_name

_MANY = 2**31
# Operators by the numbers of their inputs and outputs: least and most of each.
_ARITIES = {
    (1, 1, 1, 1): """ABS AVERAGE_POOL_2D BITCAST BUCKETIZE CAST CEIL COMPLEX_ABS COS DENSIFY
        DEPTH_TO_SPACE DEQUANTIZE ELU EXP FAKE_QUANT FLOOR GELU HARD_SWISH HASHTABLE_SIZE IMAG
        L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LOCAL_RESPONSE_NORMALIZATION LOG LOGICAL_NOT LOGISTIC
        LOG_SOFTMAX MATRIX_DIAG MAX_POOL_2D NEG QUANTIZE RANK READ_VARIABLE REAL RELU RELU6
        RELU_0_TO_1 RELU_N1_TO_1 ROUND RSQRT SHAPE SIGN SIN SOFTMAX SPACE_TO_DEPTH SQRT SQUARE
        SQUEEZE STABLEHLO_ABS STABLEHLO_BROADCAST_IN_DIM STABLEHLO_CBRT STABLEHLO_CONVERT
        STABLEHLO_COSINE STABLEHLO_EXPONENTIAL STABLEHLO_FLOOR STABLEHLO_LOG STABLEHLO_LOGISTIC
        STABLEHLO_NEGATE STABLEHLO_RESHAPE STABLEHLO_RSQRT STABLEHLO_SLICE STABLEHLO_TANH
        STABLEHLO_TRANSPOSE SKIP_GRAM TANH WHERE ZEROS_LIKE""",
    (2, 2, 1, 1): """ADD ARG_MAX ARG_MIN ATAN2 BATCH_MATMUL BITWISE_XOR BROADCAST_ARGS BROADCAST_TO
        CUMSUM DIV EMBEDDING_LOOKUP EQUAL EXPAND_DIMS FILL FLOOR_DIV FLOOR_MOD GATHER GATHER_ND
        GREATER GREATER_EQUAL LESS LESS_EQUAL LOGICAL_AND LOGICAL_OR MATRIX_SET_DIAG MAXIMUM MEAN
        MINIMUM MIRROR_PAD MUL MULTINOMIAL NOT_EQUAL PAD POW PRELU REDUCE_ALL REDUCE_ANY REDUCE_MAX
        REDUCE_MIN REDUCE_PROD RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_SEQUENCE REVERSE_V2
        RFFT2D RIGHT_SHIFT SQUARED_DIFFERENCE STABLEHLO_ADD STABLEHLO_AND STABLEHLO_COMPARE
        STABLEHLO_CONVOLUTION STABLEHLO_DIVIDE STABLEHLO_DOT_GENERAL STABLEHLO_GATHER
        STABLEHLO_MAXIMUM STABLEHLO_MINIMUM STABLEHLO_MULTIPLY STABLEHLO_OR STABLEHLO_PAD
        STABLEHLO_POWER STABLEHLO_REMAINDER STABLEHLO_SHIFT_LEFT STABLEHLO_SUBTRACT SUB SUM TILE
        TRANSPOSE SEGMENT_SUM""",
    (
        3,
        3,
        1,
        1,
    ): """BATCH_TO_SPACE_ND DILATE DYNAMIC_UPDATE_SLICE HASHTABLE_FIND PADV2 RANGE SCATTER_ND
        SELECT SELECT_V2 SLICE SPACE_TO_BATCH_ND STABLEHLO_CLAMP STABLEHLO_SCATTER
        STABLEHLO_SELECT UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_MIN UNSORTED_SEGMENT_PROD
        UNSORTED_SEGMENT_SUM""",
    (1, 2, 1, 1): "RANDOM_STANDARD_NORMAL RANDOM_UNIFORM RESHAPE",
    (2, 3, 1, 1): "CONV_2D CONV_3D DEPTHWISE_CONV_2D LSH_PROJECTION",
    (3, 4, 1, 1): "CONV_3D_TRANSPOSE TRANSPOSE_CONV",
    (2, 3, 1, 2): "FULLY_CONNECTED",
    (4, 4, 1, 1): "ONE_HOT SPARSE_TO_DENSE",
    (4, 5, 1, 1): "STRIDED_SLICE",
    (5, 5, 1, 1): "EMBEDDING_LOOKUP_SPARSE REDUCE_WINDOW RNN SVDF UNIDIRECTIONAL_SEQUENCE_RNN",
    (1, _MANY, 1, 1): "ADD_N CONCATENATION CONCAT_EMBEDDINGS PACK STABLEHLO_CONCATENATE",
    (1, 1, 1, _MANY): "UNPACK",
    (2, 2, 1, _MANY): "SPLIT",
    (3, 3, 1, _MANY): "SPLIT_V",
    (2, 2, 2, 2): "TOPK_V2",
    (1, 1, 2, 2): "UNIQUE STABLEHLO_RNG_BIT_GENERATOR",
    (5, 5, 2, 2): "NON_MAX_SUPPRESSION_V4",
    (6, 6, 3, 3): "NON_MAX_SUPPRESSION_V5",
    (5, 24, 1, 4): "LSTM",
    (20, 24, 1, 1): "UNIDIRECTIONAL_SEQUENCE_LSTM",
    (48, 48, 1, 2): "BIDIRECTIONAL_SEQUENCE_LSTM",
    (12, 12, 1, 2): "BIDIRECTIONAL_SEQUENCE_RNN",
    (3, 3, 2, 2): "HASHTABLE_LOOKUP",
    (0, 0, 1, 1): "HASHTABLE STABLEHLO_IOTA VAR_HANDLE",
    (3, 3, 0, 0): "HASHTABLE_IMPORT",
    (2, 2, 0, 0): "ASSIGN_VARIABLE",
    (0, 0, 0, 0): "CALL_ONCE",
}
# Inputs that may be absent, which is written as tensor -1.
_OPTIONAL = {
    **dict.fromkeys(("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), {2}),
    **dict.fromkeys(("CONV_3D_TRANSPOSE", "SVDF", "TRANSPOSE_CONV"), {3}),
    **dict.fromkeys(
        ("LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM"),
        {1, 5, 9, 10, 11, 12, 16, 17, 20, 21, 22, 23},
    ),
    "BIDIRECTIONAL_SEQUENCE_LSTM": set(range(1, 48)),
    "BIDIRECTIONAL_SEQUENCE_RNN": {9, 10, 11},
}
# Options that a kernel divides by, or allocates by: they are required, and these fields positive.
_POSITIVE = {
    "Conv2DOptions": ("strideW", "strideH", "dilationWFactor", "dilationHFactor"),
    "DepthwiseConv2DOptions": ("strideW", "strideH", "dilationWFactor", "dilationHFactor"),
    "Conv3DOptions": (
        *("strideD", "strideW", "strideH"),
        *("dilationDFactor", "dilationWFactor", "dilationHFactor"),
    ),
    "TransposeConvOptions": ("strideW", "strideH"),
    "Pool2DOptions": ("strideW", "strideH", "filterWidth", "filterHeight"),
    "SpaceToDepthOptions": ("blockSize",),
    "DepthToSpaceOptions": ("blockSize",),
    "SVDFOptions": ("rank",),
    "SplitOptions": ("numSplits",),
    "SplitVOptions": ("numSplits",),
    "PackOptions": ("valuesCount",),
    "UnpackOptions": ("num",),
}
# Options that the kernel cannot do without, though each value that fits their type will do.
_REQUIRED = ("WhileOptions", "IfOptions", "CallOnceOptions", "CallOptions", "VarHandleOptions")
# The options that count an operator's inputs or outputs.
_COUNTS = {
    "SplitOptions": ("numSplits", "outputs"),
    "SplitVOptions": ("numSplits", "outputs"),
    "PackOptions": ("valuesCount", "inputs"),
    "UnpackOptions": ("num", "outputs"),
}
# Operators that share their options with others; the rest have some of their own name, or none.
_SHARED_OPTIONS = {
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D", "L2_POOL_2D"), "Pool2DOptions"),
    **dict.fromkeys(
        ("MEAN", "SUM", "REDUCE_PROD", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_ANY", "REDUCE_ALL"),
        "ReducerOptions",
    ),
    **dict.fromkeys(("MAXIMUM", "MINIMUM"), "MaximumMinimumOptions"),
    **dict.fromkeys(("RANDOM_UNIFORM", "RANDOM_STANDARD_NORMAL", "MULTINOMIAL"), "RandomOptions"),
    "CONV_3D_TRANSPOSE": "Conv3DOptions",
    "L2_NORMALIZATION": "L2NormOptions",
    "UNIDIRECTIONAL_SEQUENCE_RNN": "SequenceRNNOptions",
}


@functools.cache
def _arity(name):
    return next((arity for arity, names in _ARITIES.items() if name in names.split()), None)


@functools.cache
def _options_classes() -> dict[str, str]:
    """Returns the names of all classes of options by the names of their operators, squeezed."""
    names = {*vars(schema().BuiltinOptions), *vars(schema().BuiltinOptions2)}
    return {n.lower().removesuffix("options"): n for n in names if n.endswith("Options")}


def _options_class(name) -> str | None:
    """Returns the name of the class of an operator's options, `None` if it has none."""
    return _SHARED_OPTIONS.get(name) or _options_classes().get(name.replace("_", "").lower())


def check(model, graph, op, where) -> None:
    """Raises a `ValueError` that begins with `where` if an operator would misread its tensors."""
    count = len(model.operatorCodes)
    require(op.opcodeIndex < count, f"{where} has code {op.opcodeIndex}, of {count} codes")
    name = operator_name(model, op)
    where = f"{where} ({name})"
    inputs = [] if op.inputs is None else op.inputs.tolist()
    outputs = [] if op.outputs is None else op.outputs.tolist()
    count = len(graph.tensors or ())
    optional = _OPTIONAL.get(name, set())
    for place, index in enumerate(inputs):
        absent = index == -1 and (place in optional or name == "CUSTOM")
        require(absent or 0 <= index < count, f"{where} reads tensor {index}, of {count} tensors")
    between = [] if op.intermediates is None else op.intermediates.tolist()
    for index in (*outputs, *between):
        require(0 <= index < count, f"{where} writes tensor {index}, of {count} tensors")
    if arity := _arity(name):
        least_in, most_in, least_out, most_out = arity
        fits = least_in <= len(inputs) <= most_in and least_out <= len(outputs) <= most_out
        require(fits, f"{where} has {len(inputs)} inputs and {len(outputs)} outputs")
    if name != "CUSTOM":
        _check_options(name, op, where)


def _check_options(name, op, where):
    expected = _options_class(name)
    options = op.builtinOptions2 if op.builtinOptions is None else op.builtinOptions
    kinds = {op.builtinOptionsType, op.builtinOptions2Type} - {0}
    if options is None:
        require(not kinds, f"{where} has options without content")
        needed = expected in _POSITIVE or expected in _REQUIRED
        require(not needed, f"{where} has no {expected}")
        return
    received = type(options).__name__.removesuffix("T")
    require(
        len(kinds) == 1 and received == expected, f"{where} has {received} instead of {expected}"
    )
    for field in _POSITIVE.get(expected, ()):
        value = getattr(options, field)
        require(value > 0, f"{where} has {field}={value}, which must be positive")
    if expected in _COUNTS:
        field, tensors = _COUNTS[expected]
        value, count = getattr(options, field), len(getattr(op, tensors))
        require(value == count, f"{where} has {field}={value} and {count} {tensors}")


def check_code(code, where) -> None:
    """Raises a `ValueError` if no operator has a code."""
    name = code_name(code)
    require(name is not None, f"{where} stands for no operator of the schema")
    require(
        name != "CUSTOM" or code.customCode, f"{where} is that of a custom operator without name"
    )


def check_calls(model) -> None:
    """Raises a `ValueError` if an operator calls a subgraph that is absent, unfit, or its caller."""
    calls, count = {}, len(model.subgraphs)
    for i, where, op in _operators(model):
        called = _called(op)
        for index in called:
            require(0 <= index < count, f"{where} calls subgraph {index}, of {count} subgraphs")
        calls.setdefault(i, set()).update(called)
    done = set(range(count)) - set(calls)
    while len(done) < count:
        ready = [i for i in calls if i not in done and calls[i] <= done]
        require(ready, "a subgraph calls itself")
        done.update(ready)
    for i, where, op in _operators(model):
        _check_fit(model, model.subgraphs[i], op, where)


def _operators(model):
    """Yields each operator with the index of its subgraph and a text that says where it is."""
    for i, graph in enumerate(model.subgraphs):
        for j, op in enumerate(graph.operators or ()):
            yield i, f"operator {j} of subgraph {i} ({operator_name(model, op)})", op


def _called(op) -> list[int]:
    """Returns the subgraphs that an operator calls."""
    found = []
    for options in filter(None, (op.builtinOptions, op.builtinOptions2)):
        for name, value in vars(options).items():
            if "subgraph" in name.lower():
                found += np.atleast_1d(value).tolist()
    return found


def _check_fit(model, graph, op, where):
    """Checks that the subgraphs of a loop or a condition take and return what it passes on."""
    name = operator_name(model, op)
    if name == "CALL_ONCE":
        called = model.subgraphs[op.builtinOptions.initSubgraphIndex]
        require(not _types(called, called.inputs), f"{where} calls a subgraph that has inputs")
    if name not in ("WHILE", "IF"):
        return
    read, written = _types(graph, op.inputs), _types(graph, op.outputs)
    options = op.builtinOptions
    if name == "IF":
        require(read and read[0] == "BOOL", f"{where} needs a condition of type BOOL")
        read, bodies = read[1:], [options.thenSubgraphIndex, options.elseSubgraphIndex]
    else:
        require(read == written, f"{where} reads {read} and writes {written}")
        bodies = [options.bodySubgraphIndex]
        condition = model.subgraphs[options.condSubgraphIndex]
        fits = _types(condition, condition.inputs) == read
        fits = fits and _types(condition, condition.outputs) == ["BOOL"]
        require(fits, f"{where} has a condition that does not fit")
    for body in (model.subgraphs[index] for index in bodies):
        fits = _types(body, body.inputs) == read and _types(body, body.outputs) == written
        require(fits, f"{where} calls a subgraph with other inputs or outputs")


def _types(graph, indices) -> list[str]:
    return [] if indices is None else [type_name(graph.tensors[i]) for i in indices]
