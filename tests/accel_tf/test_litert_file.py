"""Damaged LiteRT files: refused by name, before LiteRT's interpreter, which would crash, sees them."""

import damaged_files
import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import accel_tf as at
from accel_tf._litert_file import pack, read_litert

# One process makes the files for all of these tests.
pytestmark = pytest.mark.xdist_group("damaged files")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    damaged_files.originals(folder)
    return folder


def unpacked(folder, kind):
    content = bytearray((folder / f"{kind}.tflite").read_bytes())
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def operator(model, name, graph=0):
    code = getattr(schema.BuiltinOperator, name)
    codes = [c.builtinCode for c in model.operatorCodes]
    return next(op for op in model.subgraphs[graph].operators if codes[op.opcodeIndex] == code)


def weights(model, name):
    return model.subgraphs[0].tensors[operator(model, name).inputs[1]]


def loop_of(model):
    return operator(model, "WHILE")


def set_input(index):
    return lambda model: operator(model, "CONV_2D").inputs.__setitem__(1, index)


def set_option(name, **values):
    return lambda model: [setattr(operator(model, name).builtinOptions, *v) for v in values.items()]


def set_tensor(index, **values):
    return lambda model: [setattr(model.subgraphs[0].tensors[index], *v) for v in values.items()]


def without_options(model):
    operator(model, "CONV_2D").builtinOptions = None


def reverse(model):
    model.subgraphs[0].operators.reverse()


def fewer_scales(model):
    grid = weights(model, "CONV_2D").quantization
    grid.scale, grid.zeroPoint = grid.scale[:-1], grid.zeroPoint[:-1]


def scale_of_zero(model):
    """Of an activation: a channel of weights that are all 0 may have it."""
    graph = model.subgraphs[0]
    graph.tensors[graph.inputs[0]].quantization.scale[0] = 0


def far_zero_point(model):
    weights(model, "CONV_2D").quantization.zeroPoint[0] = 999


def shorter_weights(model):
    buffer = model.buffers[weights(model, "CONV_2D").buffer]
    buffer.data = buffer.data[:-1]


def fewer_inputs(model):
    operator(model, "CONV_2D").inputs = operator(model, "CONV_2D").inputs[:1]


def groups_of_zero(model):
    weights(model, "FULLY_CONNECTED").quantization.details.blockSize = 0


def other_signature(model):
    model.signatureDefs[0].outputs[0].tensorIndex = 1


FAULTS = {
    "index -1": ("float", set_input(-1), r"CONV_2D\) reads tensor -1, of \d+ tensors"),
    "index beyond": ("float", set_input(999), r"operator \d+ of subgraph 0.* reads tensor 999"),
    "stride 0": ("float", set_option("CONV_2D", strideW=0), "strideW=0, which must be positive"),
    "filter 0": ("float", set_option("MAX_POOL_2D", filterHeight=0), "filterHeight=0, which must"),
    "no options": ("float", without_options, r"\(CONV_2D\) has no Conv2DOptions|without content"),
    "fewer inputs": ("float", fewer_inputs, r"\(CONV_2D\) has 1 inputs and 1 outputs"),
    "order": ("float", reverse, r"reads tensor \d+ before anything writes it"),
    "negative": ("float", set_tensor(0, shape=np.array([1, -8], np.int32)), r"the shape \(1, -8\)"),
    "huge": (
        "float",
        set_tensor(0, shape=np.full(3, 2**20, np.int32)),
        "more than LiteRT can count",
    ),
    "type": ("float", set_tensor(0, type=77), "tensor 0 of subgraph 0 has the unknown type 77"),
    "buffer": ("float", set_tensor(0, buffer=999), r"tensor 0 .* has buffer 999, of \d+ buffers"),
    "weights": ("float", shorter_weights, r"has 863 bytes of data and needs 864"),
    "scales": ("int8", fewer_scales, r"of shape \(8, 3, 3, 3\), has 7 scales on axis 0"),
    "scale 0": ("int8", scale_of_zero, "has a scale that is no positive number"),
    "zero point": ("int8", far_zero_point, "of type INT8, has a zero point that is out of range"),
    "groups": ("mixed", groups_of_zero, r"of shape \(48, 64\), has groups of 0"),
    "no graph": (
        "loop",
        lambda m: setattr(loop_of(m).builtinOptions, "bodySubgraphIndex", 77),
        "77",
    ),
    "graph -1": (
        "loop",
        lambda m: setattr(loop_of(m).builtinOptions, "condSubgraphIndex", -1),
        "-1",
    ),
    "other graph": (
        "loop",
        lambda m: setattr(loop_of(m).builtinOptions, "bodySubgraphIndex", 1),
        r"\(WHILE\) calls a subgraph with other inputs or outputs",
    ),
    "recursion": (
        "loop",
        lambda m: setattr(loop_of(m).builtinOptions, "bodySubgraphIndex", 0),
        "a subgraph calls itself",
    ),
    "signature": ("dictionary", other_signature, "the outputs of signature 'serving_default' are"),
    "version": ("float", lambda m: setattr(m, "version", 2), "its version is 2"),
    "no buffers": ("float", lambda m: setattr(m, "buffers", []), "it has no buffers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_place(fault, folder):
    kind, change, message = FAULTS[fault]
    model = unpacked(folder, kind)
    assert read_litert(pack(model), "whole.tflite")
    change(model)
    with pytest.raises(ValueError, match=f"^part/m.tflite is a damaged LiteRT file: .*{message}"):
        read_litert(pack(model), "part/m.tflite")


@pytest.mark.parametrize("kind", damaged_files.KINDS)
def test_a_file_that_is_cut_off_anywhere_is_refused(kind, folder):
    content = (folder / f"{kind}.tflite").read_bytes()
    rng = np.random.default_rng(0)
    for length in (0, 8, 9, *rng.integers(8, len(content) // 2, 20)):
        with pytest.raises(ValueError, match="m.tflite is (a damaged|not a) LiteRT"):
            read_litert(content[:length], "m.tflite")


def test_a_small_file_cannot_describe_endless_work(folder):
    model = unpacked(folder, "float")
    content = bytearray(pack(model))
    root = schema.Model.GetRootAs(content, 0)
    vector = root._tab.Vector(root._tab.Offset(8)) - 4
    content[vector : vector + 4] = (2**31).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"lists 21474\d+ tables in \d+ bytes"):
        read_litert(bytes(content), "m.tflite")


def test_sparse_weights_are_checked_too(tmp_path):
    rng = np.random.default_rng(0)
    model = dense_with_blocks(rng)
    at.export.litert(model, tmp_path / "m.tflite", sparse=True)
    content = (tmp_path / "m.tflite").read_bytes()
    file = read_litert(bytearray(content), "m.tflite")
    (tensor,) = [t for t in file.subgraphs[0].tensors if t.sparsity is not None]
    level = next(d for d in tensor.sparsity.dimMetadata if d.format == 1)
    level.arrayIndices.values[0] = 255
    with pytest.raises(ValueError, match=r"an index of tensor \d+ of subgraph 0 is out of range"):
        read_litert(pack(file), "m.tflite")


def dense_with_blocks(rng):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    kept = np.repeat(rng.random((16, 64)) > 0.9, 4, axis=0)
    model.layers[0].kernel.assign(kept * rng.normal(size=(64, 64)))
    return model


def faults(found):
    return {key: text for key, text in found.items() if text not in ("result", "refused")}


def test_60_damaged_files_end_in_a_result_or_an_error_that_names_them(folder):
    found = damaged_files.outcomes(folder, range(60))
    assert len(found) == 60 * len(damaged_files.VERBS) and not faults(found)
    assert {"result", "refused"} == set(found.values())


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_2000_damaged_files_end_in_a_result_or_an_error_that_names_them(folder):
    found = damaged_files.outcomes(folder, range(2000))
    assert len(found) == 2000 * len(damaged_files.VERBS) and not faults(found)
