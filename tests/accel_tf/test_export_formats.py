"""The formats of LiteRT files by scheme, what stays in float and why, and sparse kernels."""

import keras
import numpy as np
import pytest

import accel_tf as at
from accel_tf.export import _grid

L = keras.layers


def sqnr(expected, received):
    expected, received = np.asarray(expected, np.float64), np.asarray(received, np.float64)
    noise = np.square(expected - received).sum()
    return 10 * np.log10(np.square(expected).sum() / noise) if noise else np.inf


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    layers = [
        L.Conv2D(40, 3, name="conv"),
        L.BatchNormalization(),
        L.ReLU(),
        L.DepthwiseConv2D(3, name="depthwise"),
        L.GlobalAveragePooling2D(),
        L.Dense(512, activation="relu", name="hidden"),
        L.Dense(10, name="head"),
    ]
    model = keras.Sequential([keras.Input((10, 10, 8), name="image"), *layers])
    norm = model.layers[1]
    norm.gamma.assign(np.random.default_rng(0).uniform(-2, 2, 40))
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(24, 10, 10, 8)).astype("float32")


@pytest.fixture(scope="module")
def transformer():
    keras.utils.set_random_seed(0)
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = L.Embedding(50, 16, name="embedding")(tokens)
    y = L.MultiHeadAttention(2, 8, name="attention")(x, x)
    x = L.LayerNormalization(name="norm")(L.Add(name="add")([x, y]))
    return keras.Model(tokens, L.Dense(3, name="head")(L.GlobalAveragePooling1D()(x)))


@pytest.fixture(scope="module")
def sentences():
    return np.random.default_rng(0).integers(0, 50, (24, 6)).astype("int32")


def exported(model, scheme, x, path, **options):
    quantized = at.calibrate(model, x, scheme, verbose=0)
    found = at.export.litert(quantized, path, **options)
    return quantized, found, sqnr(quantized(x), at.export.run_litert(path, x))


# Kernels that round what they read to 8 bits are 35 dB and more from the model, which does not.
@pytest.mark.parametrize(
    ("scheme", "stored", "saved", "bound"),
    [
        (at.Int8Weights(), "int8", 2.8, 35),
        (at.Int4Weights(group_size=None), "int4", 4.0, 35),
        (at.Int4Weights(group_size=32), "int4", 2.4, 35),
        (at.Int4Weights(group_size=50), "int4", 3.0, 35),  # the last group is smaller
        (at.Float16(), "float16", 1.7, 70),
    ],
    ids=["int8", "int4", "groups of 32", "groups of 50", "float16"],
)
def test_weights_alone_are_stored_in_fewer_bits(
    scheme, stored, saved, bound, network, images, tmp_path
):
    full = at.export.litert(network, tmp_path / "float.tflite")
    _, found, quality = exported(network, scheme, images, tmp_path / "m.tflite")
    assert quality > bound
    assert full.size / found.size > saved
    assert (found.inputs, found.outputs) == (("float32",), ("float32",))
    readers = [op for op in found.operators if stored in op.inputs]
    assert {op.layer for op in readers} == {"conv", "depthwise", "hidden", "head"}
    assert {op.layer for op in at.inspect_litert(tmp_path / "m.tflite").operators if op.layer}


def test_groups_of_a_dense_kernel_have_a_kernel_of_their_own(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), L.Dense(48, name="a"), L.Dense(5, name="b")])
    x = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")
    _, found, quality = exported(model, at.Int4Weights(32), x, tmp_path / "m.tflite")
    assert [op.name for op in found.operators if op.layer == "a"] == ["FULLY_CONNECTED"]
    assert found.operators[0].inputs[1] == "int4" and quality > 35


@pytest.mark.parametrize("factor", [0.0, 1e-7], ids=["zeros", "tiny"])
def test_groups_of_zeros_or_too_small_for_half_a_float(factor, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), L.Dense(8), L.Rescaling(1e3), L.Dense(8)])
    kernel = model.layers[0].kernel.numpy()
    kernel[:32, :3] *= factor
    model.layers[0].kernel.assign(kernel if not factor else kernel * 1e-4)
    x = np.random.default_rng(0).normal(size=(9, 64)).astype("float32")
    _, _, quality = exported(model, at.Int4Weights(32), x, tmp_path / "m.tflite")
    assert quality > 35


@pytest.mark.parametrize(
    "layer",
    [
        L.DepthwiseConv2D(7, name="layer"),  # 49 weights per channel: more than a group
        L.Conv2D(8, 7, groups=8, name="layer"),
        L.Conv2D(12, 3, groups=2, strides=2, padding="same", name="layer"),
        L.Conv2DTranspose(6, 3, name="layer"),
        L.Conv1D(6, 5, name="layer"),
    ],
    ids=["depthwise", "channels apart", "groups", "transposed", "1-D"],
)
@pytest.mark.parametrize("scheme", [at.Int8Weights(), at.Int4Weights()])
def test_weights_of_every_kind_of_convolution(layer, scheme, tmp_path):
    shape = (12, 8) if isinstance(layer, L.Conv1D) else (12, 12, 8)
    layer = type(layer).from_config(layer.get_config())
    model = keras.Sequential([keras.Input(shape), layer, L.LayerNormalization()])
    x = np.random.default_rng(0).normal(size=(6, *shape)).astype("float32")
    _, found, quality = exported(model, scheme, x, tmp_path / "m.tflite")
    stored = {kind for op in found.operators for kind in op.inputs} & {"int8", "int4"}
    assert stored == {f"int{scheme.weight_bits}"} and quality > 30


@pytest.mark.parametrize("scheme", [at.Int8Weights(), at.Int4Weights(), at.Float16()])
def test_weights_of_attention_and_embeddings_too(scheme, transformer, sentences, tmp_path):
    _, found, quality = exported(transformer, scheme, sentences, tmp_path / "m.tflite")
    small = {"int8", "int4", "float16"}
    layers = {op.layer for op in found.operators if small & set(op.inputs)}
    assert layers == {"embedding", "attention", "head"} and quality > 35


def test_16_bit_activations(network, images, transformer, sentences, tmp_path):
    for model, data in ((network, images), (transformer, sentences)):
        path = tmp_path / "m.tflite"
        quantized, found, quality = exported(model, at.Int16x8(), data, path, data=data)
        assert found.int8_fraction == 1.0 and found.outputs == ("int16",)
        assert any("int16" in op.inputs and "int8" in op.inputs for op in found.operators)
        assert quality > 60
    with pytest.raises(ValueError, match="16-bit activations.*pass data="):
        at.export.litert(quantized, path)


def test_data_for_several_inputs_goes_by_name(tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    model = keras.Model([a, b], L.Dense(2)(L.Concatenate()([L.Dense(4)(a), L.Dense(4)(b)])))
    rng = np.random.default_rng(0)
    data = {"b": rng.normal(size=(9, 3)) * 100, "a": rng.normal(size=(9, 3))}
    data = {name: x.astype("float32") for name, x in data.items()}
    arrays = [data["a"], data["b"]]
    quantized = at.calibrate(model, arrays, at.Int16x8(), verbose=0)
    for given in (data, arrays):
        at.export.litert(quantized, tmp_path / "m.tflite", data=given)
        real = at.export.run_litert(tmp_path / "m.tflite", data)
        assert sqnr(quantized(arrays), real) > 50
    with pytest.raises(ValueError, match=r"data= has 1 arrays, the model has the inputs"):
        at.export.litert(quantized, tmp_path / "m.tflite", data=arrays[0])


def test_mixtures(network, images, tmp_path):
    path = tmp_path / "m.tflite"
    mixed = at.Mixed({"hidden": at.Int4Weights(), "head": at.Int8Weights()})
    _, found, quality = exported(network, mixed, images, path)
    kinds = {op.layer: op.kind for op in found.operators}
    assert kinds["depthwise"] == "int8" and kinds["hidden"] == kinds["head"] == "float"
    rows = {row[0]: row[2] for row in found.in_float.rows}
    assert rows["hidden"] == "Int4Weights leaves activations in float" and quality > 35
    mixed = at.Mixed({"conv": at.Float16(), "head": None}, default=at.Int8Weights())
    _, found, quality = exported(network, mixed, images, path)
    read = {op.layer: set(op.inputs) for op in found.operators if op.name != "CONV_2D"}
    assert read["conv"] == {"float16"} and read["head"] == {"float32"} and quality > 35
    with pytest.raises(ValueError, match="16-bit activations in all of a file or nowhere"):
        exported(network, at.Mixed({"conv": at.Int16x8()}), images, path)


def test_float_islands_are_allowed_and_named(transformer, sentences, tmp_path):
    _, found, quality = exported(transformer, at.Int8(), sentences, tmp_path / "m.tflite")
    assert (found.inputs, found.outputs) == (("int32",), ("int8",)) and quality > 30
    floats = [op for op in found.operators if op.kind == "float" and "QUANTIZE" not in op.name]
    assert {(op.layer, op.why) for op in floats} == {
        ("norm", "LiteRT has no int8 kernel for layer normalization")
    }
    assert "Computed in float" in str(found) and "layer normalization" in found._repr_html_()
    # Read back, the file still tells where.
    again = at.inspect_litert(tmp_path / "m.tflite")
    assert {op.layer for op in again.operators if op.name == "RSQRT"} == {"norm"}
    assert all(op.why for op in again.operators if op.kind == "float")


def test_operators_of_shapes_and_indices_are_neither_int8_nor_float():
    shape = at.export.Operator("SHAPE", ("float32",), ("int32",))
    pack = at.export.Operator("PACK", ("int32", "int32"), ("int32",))
    gather = at.export.Operator("GATHER", ("int8", "int32"), ("int8",))
    cast = at.export.Operator("CAST", ("int32",), ("float32",))
    assert [op.kind for op in (shape, pack, gather, cast)] == ["index", "index", "int8", "float"]
    assert pack.is_int8 and not cast.is_int8


def test_names_in_a_file_are_paths_of_layers(tmp_path):
    block = keras.Sequential([keras.Input((4, 4, 2)), L.Conv2D(3, 3, name="conv")], name="block")
    image = keras.Input((4, 4, 2))
    dense = L.Dense(3, name="dense_1")  # A name as Keras gives to a second layer, or second call.
    y = dense(dense(L.Dense(3, name="dense")(L.Flatten()(block(image)))))
    found = at.export.litert(keras.Model(image, y), tmp_path / "m.tflite")
    named = [(op.name, op.layer) for op in found.operators if op.kind == "float"]
    assert [layer for name, layer in named if name == "FULLY_CONNECTED"] == [
        *("dense", "dense_1", "dense_1")
    ]
    assert ("CONV_2D", "block/conv") in named


def test_sparse_blocks(tmp_path):
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((64,)), L.Dense(64), L.Dense(4)])
    kept = np.repeat(rng.random((16, 64)) > 0.9, 4, axis=0)
    model.layers[0].kernel.assign(kept * rng.normal(size=(64, 64)))
    x = rng.normal(size=(5, 64)).astype("float32")
    full = at.export.litert(model, tmp_path / "full.tflite")
    found = at.export.litert(model, tmp_path / "m.tflite", sparse=True)
    assert found.size < 0.6 * full.size
    assert sqnr(model(x), at.export.run_litert(tmp_path / "m.tflite", x)) > 100
    model.layers[0].kernel.assign(rng.normal(size=(64, 64)))
    with pytest.raises(ValueError, match=r"no Dense kernel .*Block\(\(4, 1\)\)"):
        at.export.litert(model, tmp_path / "none.tflite", sparse=True)
    with pytest.raises(ValueError, match="sparse=True is for float models"):
        at.export.litert(at.calibrate(model, x, verbose=0), tmp_path / "none.tflite", sparse=True)
    assert not (tmp_path / "none.tflite").exists()


def test_recurrent_layers_take_any_batch(tmp_path):
    model = keras.Sequential([keras.Input((5, 3)), L.LSTM(4), L.Dense(2)])
    x = np.random.default_rng(0).normal(size=(7, 5, 3)).astype("float32")
    at.export.litert(model, tmp_path / "m.tflite")
    assert sqnr(model(x), at.export.run_litert(tmp_path / "m.tflite", x)) > 100
    assert not model.layers[0].unroll


@pytest.mark.parametrize("group", [None, 8, 5])
@pytest.mark.parametrize("axis", [0, 2, None])
def test_the_grid_is_read_off_the_weights(axis, group):
    rng = np.random.default_rng(0)
    moved = rng.normal(size=(1, 96) if axis is None else (6, 16)).astype("float32")
    count = moved.shape[1]
    size = group or count
    scales = np.empty_like(moved)
    for start in range(0, count, size):
        part = moved[:, start : start + size]
        scales[:, start : start + size] = np.abs(part).max(1, keepdims=True) / 7
    integers = np.round(moved / scales)
    shape = (6, 4, 4) if axis is not None else (4, 4, 6)
    weights = (integers * scales).astype("float32").reshape(shape)
    if axis is None:
        axes = (None,)
    else:
        weights, axes = np.moveaxis(weights, 0, axis), (axis,)
    grid = _grid.find(weights, 4, group, axes)
    expected = integers.reshape(shape)
    expected = expected if axis is None else np.moveaxis(expected, 0, axis)
    np.testing.assert_array_equal(grid.integers, expected)
    off = weights + 0.3 * np.abs(weights).max() * rng.random(weights.shape).astype("float32")
    assert _grid.find(off, 4, group, axes) is None


def test_a_sum_that_would_end_the_process_is_an_error(tmp_path):
    x = keras.Input((4, 4, 2))
    conv = L.Conv2D(2, 1, name="vanishing")
    model = keras.Model(x, L.Add(name="sum")([x, conv(x)]))
    quantized = at.calibrate(model, np.ones((4, 4, 4, 2), "float32"), verbose=0)
    quantizer = quantized.get_layer("sum").output_quantizer
    quantizer.low.assign(-1e-8)  # As observed on activations that vanished.
    quantizer.high.assign(1e-8)
    with pytest.raises(ValueError, match="sum in layer 'sum' has a range a million times smaller"):
        at.export.litert(quantized, tmp_path / "m.tflite")
    assert not (tmp_path / "m.tflite").exists()
