"""Fake-quantized models compute what the integer kernels do, to the last bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as L

import accel_tf as at
from accel_tf._litert_schema import schema
from accel_tf.quantization import FakeQuantize
from accel_tf.quantization._grids import Grid, grid_of, note_grid


def _stack(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


def _norm():
    return L.BatchNormalization(
        beta_initializer="random_normal",
        moving_mean_initializer="random_normal",
        gamma_initializer=keras.initializers.RandomUniform(0.5, 1.5),
    )


def _read_by_equal_activations():
    image = keras.Input(IMAGE)
    x = _norm()(L.Conv2D(24, 3, use_bias=False)(image))
    pooled = L.MaxPooling2D(2)(L.ReLU()(x))
    return keras.Model(
        image, L.Concatenate()([pooled, L.MaxPooling2D(2)(L.ReLU()(L.Dropout(0.1)(x)))])
    )


def _excited(gate):
    image = keras.Input(IMAGE)
    x = L.Activation("silu")(_norm()(L.Conv2D(24, 3)(image)))
    scale = L.GlobalAveragePooling2D(keepdims=True)(x)
    return keras.Model(image, L.Multiply()([x, L.Conv2D(24, 1, activation=gate)(scale)]))


def _joined_with_others_reading():
    image = keras.Input(IMAGE)
    x = L.MaxPooling2D(2)(L.Conv2D(24, 3, activation="relu", **BIAS)(image))
    y = L.Concatenate()([x, L.Conv2D(8, 3, padding="same", **BIAS)(x)])
    z = L.Conv2D(8, 1)(_norm()(L.Concatenate()([y, L.Conv2D(4, 1, **BIAS)(L.ReLU()(y))])))
    return keras.Model(image, L.Concatenate()([y, z]))


def _joined_by_an_operator():
    image = keras.Input(IMAGE)
    x = L.Conv2D(24, 3, activation="relu", **BIAS)(image)
    return keras.Model(image, keras.ops.concatenate([x, _norm()(x)]))


def _merged(merge, activation="linear"):
    image = keras.Input(IMAGE)
    x, y = (L.Conv2D(24, 3, activation=a)(image) for a in ("relu", "linear"))
    return keras.Model(image, L.Activation(activation)(merge([x, y])))


def _clipped_on_its_way():
    image = keras.Input(IMAGE)
    x = L.Conv2D(48, 3)(image)
    return keras.Model(image, L.Concatenate()([L.ReLU(6.0)(x), L.MaxPooling2D(1)(x)]))


IMAGE, SIGNAL = (16, 16, 8), (64, 8)
BIAS = {"bias_initializer": "random_normal"}
MODELS = {
    "convolution": lambda: _stack(IMAGE, L.Conv2D(24, 3, **BIAS)),
    "normalized": lambda: _stack(IMAGE, L.Conv2D(24, 1, use_bias=False), _norm(), L.ReLU()),
    "normalized, biased": lambda: _stack(IMAGE, L.Conv2D(24, 1, **BIAS), _norm()),
    "depthwise": lambda: _stack(IMAGE, L.DepthwiseConv2D(3, 2, depth_multiplier=2), _norm()),
    "separable": lambda: _stack(IMAGE, L.SeparableConv2D(24, 3, use_bias=False), _norm()),
    "separable, biased": lambda: _stack(IMAGE, L.SeparableConv2D(24, 3, **BIAS)),
    "dilated": lambda: _stack(IMAGE, L.Conv2D(24, 3, dilation_rate=2, **BIAS)),
    "normalization alone": lambda: _stack(IMAGE, _norm()),
    "linear at its end": lambda: _stack(
        IMAGE, L.Conv2D(24, 3), L.Flatten(), L.Activation("linear")
    ),
    "signal": lambda: _stack(SIGNAL, L.Conv1D(32, 3, **BIAS)),
    "positions": lambda: _stack(SIGNAL, L.Dense(32, activation="relu", **BIAS)),
    "einsum": lambda: _stack(
        SIGNAL, L.EinsumDense("abc,cde->abde", (None, 4, 8), bias_axes="de", **BIAS)
    ),
    "grid handed on": lambda: _stack(
        IMAGE, L.ReLU(), L.MaxPooling2D(8), L.Dropout(0.5), L.Flatten(), L.Dense(1024, **BIAS)
    ),
    "means": lambda: _stack(IMAGE, L.AveragePooling2D(2), L.Conv2D(24, 1, use_bias=False)),
    "means of few at the border": lambda: _stack(
        IMAGE, L.ReLU(), L.AveragePooling2D(3, 1, "same"), L.Conv2D(24, 1, use_bias=False)
    ),
    "read by equal activations": _read_by_equal_activations,
    "sum": lambda: _merged(L.Add()),
    "sum, clipped": lambda: _merged(L.Add(), "relu"),
    "difference": lambda: _merged(L.Subtract()),
    "difference of tensors": lambda: _merged(lambda v: v[0] - v[1]),
    "product": lambda: _merged(L.Multiply()),
    "excited, sigmoid": lambda: _excited("sigmoid"),
    "excited, hard sigmoid": lambda: _excited("hard_sigmoid"),
    "hard swish": lambda: _merged(L.Add(), "hard_silu"),
    "global means": lambda: _stack(IMAGE, L.Dense(1024), L.GlobalAveragePooling2D()),
    "global means of a signal": lambda: _stack(SIGNAL, L.Dense(1024), L.GlobalAveragePooling1D()),
    "joined": _joined_with_others_reading,
    "joined by an operator": _joined_by_an_operator,
    "clipped on its way": _clipped_on_its_way,
    "means of a signal": lambda: _stack(SIGNAL, L.AveragePooling1D(4), L.Dense(128)),
    "recurrent": lambda: _stack((12, 6), L.SimpleRNN(48, return_sequences=True, **BIAS)),
    "gated": lambda: _stack((12, 6), L.GRU(48, return_sequences=True, **BIAS)),
    "long memory": lambda: _stack((12, 6), L.LSTM(48, return_sequences=True, go_backwards=True)),
    "both ways": lambda: _stack((12, 6), L.Bidirectional(L.LSTM(24, return_sequences=True))),
    "leaky": lambda: _stack(IMAGE, L.Conv2D(24, 3), L.LeakyReLU(0.1)),
    "leaky, by name": lambda: _stack(IMAGE, L.Conv2D(24, 3, activation="leaky_relu")),
    "parametric": lambda: _stack(IMAGE, L.Conv2D(24, 3), L.PReLU("random_uniform")),
    "resized": lambda: _stack(IMAGE, L.Resizing(23, 13)),
    "doubled": lambda: _stack(IMAGE, L.UpSampling2D(2, interpolation="bilinear")),
    "transposed": lambda: _stack(IMAGE, L.Conv2DTranspose(8, 3, 2, "same", **BIAS), L.ReLU()),
    "transposed, without a bias": lambda: _stack(IMAGE, L.Conv2DTranspose(8, 3), L.ReLU()),
    "transposed, normalized": lambda: _stack(IMAGE, L.Conv2DTranspose(8, 2, 2), _norm(), L.ReLU()),
    "transposed signal": lambda: _stack(SIGNAL, L.Conv1DTranspose(16, 3, use_bias=False), L.ReLU()),
}


def _last_step(quantized):
    return [v.scale for _, v in at.layers.walk(quantized) if hasattr(v, "scale")][-1]


@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_numbers_of_the_model(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    x = np.random.default_rng(0).normal(0.1, 1, (64, *model.input_shape[1:])).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    expected = np.asarray(quantized(x))
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    assert expected.size > 30_000
    # Floats alone would round one sum in some ten thousand the other way, and an eighth of the means.
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bound", [1.0, 1.7, 3.0])
def test_zero_is_on_the_same_integer_where_it_is_halfway_between_two(bound, tmp_path):
    model = _stack(IMAGE, L.Conv2D(24, 3), L.ReLU())
    x = np.random.default_rng(0).uniform(-bound, bound, (16, *IMAGE)).astype("float32")
    x[0, 0, 0, :2] = -bound, bound
    quantized = at.calibrate(model, x, verbose=0)
    quantizer = quantized.layers[0]
    low, high = quantizer.ends
    np.testing.assert_allclose(quantizer.range, (-bound, bound), rtol=1e-6)
    np.testing.assert_allclose((low, high), (-128 * quantizer.scale, 127 * quantizer.scale), 1e-6)
    assert quantizer.zero_point == 0
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    np.testing.assert_array_equal(found, quantized(x))


def test_a_bias_stays_what_it_is_where_activations_are_floats():
    model = _stack((8,), L.Dense(8, name="before"), L.Dense(4, name="after", **BIAS))
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    quantized = at.calibrate(model, x, at.Int8Weights(), verbose=0)
    kernels = [at.quantization.fake_quantize_weights(v.kernel.value) for v in model.layers]
    biases = [v.bias.numpy() for v in model.layers]
    expected = (x @ kernels[0] + biases[0]) @ kernels[1] + biases[1]
    np.testing.assert_allclose(quantized(x), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_moves_by_half_a_step_of_the_sums_at_most():
    model = _stack((8,), L.Dense(4, name="y", **BIAS))
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    wrapper, source = quantized.layers[-1], quantized.layers[0]
    step = source.scale * np.abs(model.layers[0].kernel.numpy()).max(axis=0) / 127
    kernel = wrapper.layer.kernel
    sums = wrapper.sums(source(x), kernel, wrapper.rounded(kernel), (-1,), training=False)
    np.testing.assert_allclose(sums.step, step, rtol=1e-5)
    bias = sums.with_bias(wrapper.layer.bias)[1].numpy()
    exact = model.layers[0].bias.numpy()
    assert np.abs(bias - exact).max() > 0
    assert (np.abs(bias - exact) <= 0.501 * step).all()
    np.testing.assert_allclose(bias / step, np.round(bias / step), atol=1e-2)


@given(
    low=st.integers(-255, 0),
    step=st.floats(1e-3, 1e3),
    window=st.integers(2, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_means_are_rounded_away_from_the_integer_0(low, step, window, seed):
    step = np.float32(step)
    integers = np.random.default_rng(seed).integers(low, low + 256, (40, window))
    zero = -128 - low
    x = tf.constant(integers * step, tf.float32)
    grid = Grid(tf.constant(step, tf.float64), tf.constant(float(zero)))
    found = grid.rounded(lambda v: tf.reduce_mean(v, -1), x).numpy()
    sums = (integers + zero).sum(axis=-1)
    # LiteRT: (sum ± n / 2) / n, where division drops the fraction.
    expected = np.sign(sums) * ((2 * np.abs(sums) + window) // (2 * window)) - zero
    np.testing.assert_allclose(found / step, expected, atol=1e-2)


def test_means_are_exact_where_no_range_is_known_and_have_their_gradient():
    x = tf.constant([[0.3, 0.4]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        grid = Grid(tf.constant(1.0, tf.float64), tf.constant(0.0))
        y = grid.rounded(lambda v: tf.reduce_mean(v, -1), x)
    assert float(y[0]) == 0.0
    np.testing.assert_allclose(tape.gradient(y, x), [[0.5, 0.5]])
    unknown = Grid(tf.constant(0.0, tf.float64), tf.constant(0.0))
    np.testing.assert_allclose(unknown.rounded(lambda v: tf.reduce_mean(v, -1), x), [0.35])
    assert grid_of(x) is None
    assert grid_of(note_grid(x, lambda: unknown)) is unknown


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 5.0, 9.0])
def test_a_hard_swish_of_any_spread_has_the_numbers_of_its_kernel(spread, tmp_path):
    model = _stack(IMAGE, L.Activation("hard_silu"))
    x = np.random.default_rng(0).normal(0.3, spread, (64, *IMAGE)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    np.testing.assert_array_equal(found, quantized(x))


@pytest.mark.parametrize("bound", [None, 6.0])
def test_halves_behind_a_relu_of_what_is_on_a_grid_go_up(bound, tmp_path):
    x = np.random.default_rng(0).uniform(-1, 2, (64, *IMAGE)).astype("float32")
    quantized = at.calibrate(_stack(IMAGE, L.ReLU(bound)), x, verbose=0)
    before, after = (f for _, f in at.layers.walk(quantized) if isinstance(f, FakeQuantize))
    # Steps of 3 / 256 and of 1 / 128, so that every odd number becomes a half.
    before.low.assign(-255 / 256)
    for quantizer in (before, after):
        quantizer.high.assign(255 / 128)
    assert before.scale == 1.5 * after.scale
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    np.testing.assert_array_equal(found, quantized(x))


def test_what_is_rounded_as_the_runtime_does_has_the_gradient_of_a_clip():
    quantize = FakeQuantize()
    quantize(tf.constant([[-1.0, 1.55]]), training=True)
    x = tf.constant([[-2.0, 0.213, 1.5, 3.0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = quantize(x)
    np.testing.assert_allclose(y, [[-1.0, 0.21, 1.5, 1.55]], atol=1e-6)
    np.testing.assert_array_equal(tape.gradient(y, x), [[0.0, 1.0, 1.0, 0.0]])


def test_where_the_grid_of_an_input_is_unknown_floats_are_rounded():
    model = _stack((8,), L.Dense(4, name="y"))
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    quantized = at.quantize_aware(model)
    output = quantized.layers[-1].output_quantizer
    output(model(x), training=True)  # The input's own has seen nothing.
    kernel = at.quantization.fake_quantize_weights(model.layers[0].kernel.value)
    steps = np.clip(
        np.round(x @ kernel / output.scale), *(np.array([-128, 127]) - output.zero_point)
    )
    np.testing.assert_allclose(quantized(x), steps * output.scale, atol=1e-6)


def test_half_precision_is_rounded_as_floats(tmp_path):
    keras.utils.set_random_seed(0)
    model = _stack(IMAGE, L.Conv2D(24, 3, dtype="mixed_float16"), L.ReLU(dtype="float32"))
    x = np.random.default_rng(0).normal(size=(16, *IMAGE)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    assert np.abs(found - quantized(x)).max() < 1.5 * _last_step(quantized)


def test_only_an_integer_file_moves_the_inputs_of_a_concatenation(tmp_path):
    model = _joined_with_others_reading()
    x = np.random.default_rng(0).normal(0.1, 1, (64, *IMAGE)).astype("float32")
    quantized = at.calibrate(model, x, verbose=0)
    names = [op.name for op in at.export.litert(quantized, tmp_path / "m.tflite").operators]
    assert names.count("MUL") == 3 and "QUANTIZE" not in names
    import onnx

    path = at.export.onnx(quantized, tmp_path / "m.onnx")
    assert "Mul" not in [node.op_type for node in onnx.load(path).graph.node]
    assert at.export.verify(quantized, path, x).sqnr > 40


@pytest.mark.parametrize("activation", ["relu", "hard_silu"])
def test_activations_of_a_tensor_on_an_unknown_grid_are_rounded_as_floats(activation):
    quantized = at.quantize_aware(_stack((8,), L.Activation(activation)))
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    output, y = quantized.layers[-1].output_quantizer, keras.activations.get(activation)(x)
    output(y, training=True)
    np.testing.assert_allclose(quantized(x), y, atol=0.51 * output.scale)


@pytest.mark.parametrize("name", ["normalized, biased", "depthwise", "positions", "sum", "dilated"])
def test_weights_have_one_scale_on_request(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = at.fuse(MODELS[name]())
    x = np.random.default_rng(0).normal(size=(32, *model.input_shape[1:])).astype("float32")
    quantized = at.calibrate(model, x, at.Int8(per_channel=False), verbose=0)
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", x)
    np.testing.assert_array_equal(found, quantized(x))
    content = (tmp_path / "m.tflite").read_bytes()
    file = schema().ModelT.InitFromPackedBuf(content, 0)
    grids = [t.quantization for graph in file.subgraphs for t in graph.tensors]
    assert {len(grid.scale) for grid in grids if grid and grid.scale is not None} == {1}
    quantized.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), quantized(x))


def test_one_scale_needs_a_kernel_that_takes_the_scales_of_channels_in():
    x = np.random.default_rng(0).normal(size=(32, *IMAGE)).astype("float32")
    with pytest.raises(
        ValueError, match=r"'batch_normalization'.*accel_tf.fuse\(model\).*exclude="
    ):
        at.calibrate(MODELS["normalized"](), x, at.Int8(per_channel=False), verbose=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, size, length, width", [(1, 2, 3, 6), (2, 32, 24, 48)])
def test_the_file_of_an_attention_has_the_numbers_of_the_model(
    heads, size, length, width, causal, tmp_path
):
    keras.utils.set_random_seed(0)
    x = keras.Input((length, width))
    model = keras.Model(x, L.MultiHeadAttention(heads, size)(x, x, use_causal_mask=causal))
    rng = np.random.default_rng(heads)
    for v in model.weights:
        v.assign(rng.normal(size=v.shape) * (0.3 if len(v.shape) < 2 else 1.2 / np.sqrt(width)))
    data = rng.normal(size=(32, length, width)).astype("float32")
    quantized = at.calibrate(model, data, verbose=0)
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", data)
    np.testing.assert_array_equal(found, quantized(data))


def test_the_file_of_an_attention_with_masks_has_the_numbers_of_the_model(tmp_path):
    keras.utils.set_random_seed(0)
    ids, rng = keras.Input((32,), dtype="int32"), np.random.default_rng(4)
    x = L.Embedding(9, 32, "normal", mask_zero=True)(ids)
    model = keras.Model(ids, L.MultiHeadAttention(8, 16)(x, x))
    data = rng.integers(0, 9, (32, 32)).astype("int32")
    quantized = at.calibrate(model, data, verbose=0)
    at.export.litert(quantized, tmp_path / "m.tflite")
    found = at.export.run_litert(tmp_path / "m.tflite", data)
    np.testing.assert_array_equal(found, quantized(data))
