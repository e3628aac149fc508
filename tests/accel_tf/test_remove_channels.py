"""accel_tf.remove_channels: smaller models that compute what the masked ones do, of every kind."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_tf as at

L = keras.layers


def randomized(model, seed=0):
    """Gives normalizations and biases, which start as ones and zeros, numbers as after training."""
    rng = np.random.default_rng(seed)
    for w in model.weights:
        if w.name in ("gamma", "moving_variance", "variable", "alpha"):
            w.assign(rng.uniform(0.5, 1.5, w.shape))
        elif w.name in ("beta", "bias", "moving_mean"):
            w.assign(rng.normal(size=w.shape) * 0.2)
    return model


def data(model, seed=1):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 10, (3, *t.shape[1:]))
        if t.dtype.startswith("int")
        else rng.normal(size=(3, *t.shape[1:])).astype("float32")
        for t in model.inputs
    ]


def outputs(model, x):
    return [
        np.asarray(y, np.float64) for y in keras.tree.flatten(model(x[0] if len(x) == 1 else x))
    ]


def assert_equal(one, other, x):
    for ours, theirs in zip(outputs(one, x), outputs(other, x), strict=True):
        assert np.all(np.isfinite(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def layer_names(model):
    return [path for path, layer in at.layers.walk(model) if not isinstance(layer, L.InputLayer)]


def check(model, amount=0.5, **kwargs):
    """Removes channels of `model`, masks them in it, compares; returns the small model."""
    x = data(model)
    before = outputs(model, x)
    small = at.remove_channels(model, amount, **kwargs)
    np.testing.assert_array_equal(outputs(model, x)[0], before[0])  # a copy, not in place
    at.mask_channels(model, amount, **kwargs)
    assert np.abs(outputs(model, x)[0] - before[0]).max() > 1e-4 * np.abs(before[0]).max()
    assert_equal(small, model, x)
    assert_equal(at.remove_channels(model), model, x)  # what is masked is found
    assert small.count_params() < model.count_params()
    assert type(small) is type(model) and small.name == model.name
    assert layer_names(small) == layer_names(model)
    return small


def litert(path, x):
    """Runs a LiteRT file on a batch; its inputs are named as the model's, in alphabetical order."""
    interpreter = Interpreter(str(path))
    inputs = sorted(interpreter.get_input_details(), key=lambda detail: detail["name"])
    for detail, value in zip(inputs, x, strict=True):
        interpreter.resize_tensor_input(detail["index"], value.shape)
    interpreter.allocate_tensors()
    for detail, value in zip(inputs, x, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def units(model, name):
    return model.get_layer(name).weights[0].shape[-1]


def application(name):
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(64, 64, 3), classes=10, classifier_activation=None)
    return randomized(model)


# Real models


@pytest.mark.parametrize(
    ("name", "parameters", "operations"),
    [
        pytest.param("ResNet50", 0.27, 0.27, marks=pytest.mark.full),
        pytest.param("DenseNet121", 0.27, 0.27, marks=pytest.mark.full),
        ("EfficientNetB0", 0.28, 0.29),
        # Its LayerNormalizations keep the channels of the trunk.
        pytest.param("ConvNeXtTiny", 0.55, 0.55, marks=pytest.mark.full),
    ],
)
def test_half_of_the_channels_of_real_models(name, parameters, operations):
    model = application(name)
    small = at.remove_channels(model, 0.5)
    at.mask_channels(model, 0.5)
    assert_equal(small, model, data(model))
    assert small.count_params() < parameters * model.count_params()
    assert at.benchmark.flops(small) < operations * at.benchmark.flops(model)
    assert layer_names(small) == layer_names(model)


def two_inputs_shared():
    """Two images through the same layers, and a nested model used twice."""
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((8, 8, 3), name="b")
    conv = L.Conv2D(8, 3, padding="same", activation="relu", name="shared")
    x = keras.Input((8, 8, 8))
    y = L.BatchNormalization(name="bn")(L.Conv2D(12, 3, padding="same", name="inner")(x))
    nested = keras.Model(x, L.Conv2D(8, 1, name="back")(L.ReLU()(y)) + x, name="nested")
    one, two = nested(conv(a)), nested(nested(conv(b)))
    z = L.Concatenate()([L.Flatten()(one), L.GlobalAveragePooling2D()(two)])
    z = L.Dense(6, activation="gelu", name="hidden")(L.Dropout(0.5)(z))
    return randomized(keras.Model([a, b], L.Dense(2, name="head")(z), name="twins"))


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("MobileNetV2", 0.5),
        pytest.param("ResNet50", 0.5, marks=pytest.mark.full),
        pytest.param("DenseNet121", 0.5, marks=pytest.mark.full),
        pytest.param("EfficientNetB0", 0.5, marks=pytest.mark.full),
        pytest.param("ConvNeXtTiny", 0.55, marks=pytest.mark.full),
        ("two inputs", 0.5),
    ],
)
def test_a_small_model_is_saved_trained_and_exported(name, operations, tmp_path):
    model = two_inputs_shared() if name == "two inputs" else application(name)
    small = check(model)
    x = data(small)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert_equal(loaded, small, x)
    assert at.benchmark.flops(small) < operations * at.benchmark.flops(model)

    small.export(tmp_path / "saved", verbose=False)
    saved = tf.saved_model.load(tmp_path / "saved")
    served = saved.serve(x[0] if len(x) == 1 else x)
    np.testing.assert_allclose(served, outputs(small, x)[0], rtol=0, atol=1e-4)
    at.export.litert(small, tmp_path / "small.tflite")
    np.testing.assert_allclose(
        litert(tmp_path / "small.tflite", x), outputs(small, x)[0], rtol=0, atol=1e-4
    )

    before = small.get_weights()
    small.compile("sgd", "mse")
    y = np.ones((3, small.output_shape[-1]), "float32")
    history = small.fit(x[0] if len(x) == 1 else x, y, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert any(np.any(a != b) for a, b in zip(before, small.get_weights(), strict=True))


def test_shared_and_nested_layers_stay_shared():
    model = two_inputs_shared()
    small = check(model)
    assert len(small.weights) == len(model.weights)
    nested = small.get_layer("nested")
    assert nested.input_shape == (None, 8, 8, 4)
    assert units(nested, "inner") == 6 and units(small, "hidden") == 3
    # The nested model adds its input to its output: these channels are one family.
    assert units(nested, "back") == units(small, "shared") == 4


# Kinds of layers


def grouped(x):
    x = L.Conv2D(12, 3, name="first")(x)
    x = L.Conv2D(24, 3, groups=3, padding="same", activation="relu", name="grouped")(x)
    return L.Conv2D(4, 1, groups=2, name="last")(x)


def depthwise(x):
    x = L.DepthwiseConv2D(3, depth_multiplier=2, name="dw")(L.Conv2D(6, 1)(x))
    x = L.PReLU(shared_axes=[1, 2])(L.SeparableConv2D(10, 3, depth_multiplier=2, name="sep")(x))
    return L.Conv2D(10, 3, groups=10, padding="same", name="dw2")(L.PReLU()(x))


def squeeze_and_excite(x):
    x = L.Conv2D(8, 3, padding="same", activation="swish")(x)
    gate = L.Reshape((1, 1, 8))(L.GlobalAveragePooling2D()(x))
    gate = L.Conv2D(8, 1, activation="sigmoid")(L.Conv2D(4, 1, activation="swish")(gate))
    return L.Multiply()([x, gate])


def generator(x):
    x = L.Dense(4 * 4 * 6, activation="relu", name="seed")(L.Flatten()(x))
    x = L.UpSampling2D()(L.Reshape((4, 4, 6), name="image")(x))
    x = L.Conv2DTranspose(8, 3, strides=2, padding="same", name="up")(x)
    return L.Reshape((-1, 8))(L.ZeroPadding2D()(L.BatchNormalization()(x)))


def operators(x):
    x = L.Conv2D(8, 3, padding="same")(x)
    y = keras.ops.relu(x + 3.0) * (1 / 6) - L.Conv2D(8, 1)(x)
    y = L.Maximum()([y, L.Average()([x, y])])
    y = L.Concatenate(axis=1)([y, keras.ops.tanh(x)])
    return L.Rescaling(2.0, 1.0)(keras.ops.concatenate([y, L.LeakyReLU()(y)], axis=-1))


def one_gate_for_all(x):
    x = L.Conv2D(8, 3)(x)
    return x * L.Conv2D(1, 1, activation="sigmoid", name="gate")(x)


def sequence(x):
    x = L.Conv1D(8, 3, padding="causal", activation="relu", name="conv")(L.Reshape((64, 3))(x))
    x = L.Dense(6, activation="elu", name="wide")(L.MaxPooling1D()(x))
    x = x + L.Dense(6, name="ffn_out")(L.Dense(12, activation="gelu", name="ffn")(x))
    return L.LSTM(4, return_sequences=True, name="lstm")(x)


KINDS = [
    *(grouped, depthwise, squeeze_and_excite, generator, operators, one_gate_for_all, sequence)
]


def image_model(block):
    x = keras.Input((8, 8, 3))
    y = L.Dense(3, name="head")(L.Flatten()(block(x)))
    return randomized(keras.Model(x, y))


@pytest.mark.parametrize("block", KINDS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("amount", [0.3, 0.75])
def test_kinds_of_layers(block, amount):
    check(image_model(block), amount)


def test_groups_keep_equally_many_channels():
    small = check(image_model(grouped))
    layer = small.get_layer("grouped")
    assert (layer.groups, layer.filters, layer.kernel.shape[-2]) == (3, 12, 2)
    small = check(image_model(depthwise))
    assert small.get_layer("dw2").groups == small.get_layer("dw2").filters == 5
    assert small.get_layer("dw").kernel.shape == (3, 3, 3, 2)


def test_a_reshape_into_an_image_loses_channels_not_pixels():
    small = check(image_model(generator))
    assert small.get_layer("image").target_shape == (4, 4, 3)
    assert units(small, "seed") == 4 * 4 * 3


def test_embeddings_become_narrower():
    ids = keras.Input((5,), dtype="int32")
    x = L.GlobalAveragePooling1D()(L.Embedding(10, 8, name="words")(ids))
    small = check(randomized(keras.Model(ids, L.Dense(2)(x))))
    assert small.get_layer("words").output_dim == 4


def test_a_sequential_model_with_nested_ones_and_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    inner = keras.Sequential([keras.Input((8,)), L.Dense(8, name="inner"), L.ReLU()], name="nest")
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(8, name="in"), inner, L.Dense(2, name="out")]
    )
    small = at.remove_channels(randomized(model), 0.5)
    at.mask_channels(model, 0.5)
    x = data(model)[0]
    np.testing.assert_allclose(small(x), model(x), atol=1e-2)
    assert isinstance(small.get_layer("nest"), keras.Sequential)
    assert small.get_layer("nest").get_layer("inner").kernel.shape == (4, 4)
    assert small.get_layer("in").dtype_policy.name == "mixed_float16"


blocks = st.lists(
    st.sampled_from(["conv", "bn", "depthwise", "residual", "dense", "pool", "fork", "groups"]),
    min_size=1,
    max_size=5,
)


@settings(max_examples=12, derandomize=True)
@given(blocks, st.sampled_from([0.25, 0.5, 0.9]), st.integers(0, 3))
def test_any_composition(names, amount, seed):
    same = {"padding": "same"}
    make = {
        "conv": lambda x: L.Conv2D(6, 3, activation="relu", **same)(x),
        "bn": lambda x: L.ReLU()(L.BatchNormalization()(x)),
        "depthwise": lambda x: L.DepthwiseConv2D(3, activation="tanh", **same)(x),
        "residual": lambda x: L.Add()([x, L.Conv2D(x.shape[-1], 1)(L.ReLU()(x))]),
        "dense": lambda x: L.Dense(8, activation="sigmoid")(x),
        "pool": lambda x: L.AveragePooling2D(2, strides=1, **same)(x),
        "fork": lambda x: L.Concatenate()([L.Conv2D(4, 1)(x), x, L.Dropout(0.1)(x)]),
        "groups": lambda x: L.Conv2D(8, 3, groups=2, **same)(L.Conv2D(4, 1)(x)),
    }
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)
    x = y = keras.Input((4, 4, 3))
    for name in ("conv", *names):
        y = make[name](y)
    model = randomized(keras.Model(x, L.Dense(2)(L.Flatten()(y))), seed)
    small = at.remove_channels(model, amount)
    at.mask_channels(model, amount)
    assert_equal(small, model, data(model))
    assert_equal(at.remove_channels(model), model, data(model))


# What is masked already


def chain(padding="same", size=3, read=None):
    """A convolution whose channels 1 and 4 are zero; what follows may make them constant."""
    x = keras.Input((8, 8, 3))
    y = L.BatchNormalization(name="bn")(L.Conv2D(6, 3, name="conv")(x))
    y = (read or L.Conv2D(4, size, padding=padding, name="read"))(L.ReLU()(y))
    model = randomized(keras.Model(x, L.Dense(2, name="head")(L.Flatten()(y))))
    kernel, bias = model.get_layer("conv").get_weights()
    kernel[..., [1, 4]], bias[[1, 4]] = 0, 0
    model.get_layer("conv").set_weights([kernel, bias])
    return model


def set_shift(model, values):
    """Lets BatchNormalization make `values` of the zeros in channels 1 and 4."""
    bn = model.get_layer("bn")
    gamma, beta, mean, variance = bn.get_weights()
    mean[[1, 4]], beta[[1, 4]] = 0, values
    bn.set_weights([gamma, beta, mean, variance])
    return model


def test_channels_that_stay_zero_are_removed():
    model = set_shift(chain(), [0.0, -0.5])  # ReLU makes zero of the second
    small = at.remove_channels(model)
    assert units(small, "conv") == 4 and small.get_layer("read").kernel.shape[-2:] == (4, 4)
    assert_equal(small, model, data(model))


@pytest.mark.parametrize(("padding", "size"), [("valid", 3), ("same", 1)])
def test_constant_channels_become_a_bias(padding, size):
    model = set_shift(chain(padding, size), [0.5, 0.25])
    small = at.remove_channels(model)
    assert units(small, "conv") == 4
    assert_equal(small, model, data(model))
    notes = dict(at.report_of(small).done)
    assert "constants that it read are in its bias" in notes["read"]


@pytest.mark.parametrize(
    "read",
    [
        lambda: L.Conv2D(4, 3, use_bias=False, name="read"),
        lambda: L.SeparableConv2D(4, 3, use_bias=False, name="read"),
        lambda: L.Conv2D(4, 3, groups=2, use_bias=False, name="read"),
    ],
)
def test_a_layer_without_bias_gets_one_for_constants(read):
    model = set_shift(chain(read=read()), [0.5, 0.25])
    small = at.remove_channels(model)
    assert small.get_layer("read").use_bias
    assert_equal(small, model, data(model))


def test_constants_next_to_padding_stay_and_the_report_says_so():
    model = set_shift(chain("same"), [0.0, 0.25])
    small = at.remove_channels(model)
    assert units(small, "conv") == 5  # the zero one is gone
    assert (
        "1 outputs stay: 'read' reads them, constant but" in dict(at.report_of(small).done)["conv"]
    )
    assert_equal(small, model, data(model))
    with pytest.raises(
        ValueError, match="2 outputs stay: 'read' reads them, constant but not zero"
    ):
        at.remove_channels(set_shift(chain("same"), [0.5, 0.25]))


def test_channels_that_nobody_reads_are_removed():
    model = chain()
    model.get_layer("conv").set_weights([np.ones((3, 3, 3, 6)), np.ones(6)])
    kernel, bias = model.get_layer("read").get_weights()
    kernel[:, :, [0, 2, 5]] = 0
    model.get_layer("read").set_weights([kernel, bias])
    small = at.remove_channels(model)
    assert units(small, "conv") == 3
    assert_equal(small, model, data(model))


def test_a_constant_is_not_one_if_a_shared_reader_gets_others():
    a, b = keras.Input((4,)), keras.Input((4,))
    shared = L.Dense(3, name="shared")
    y = shared(L.Dense(5, name="one")(a)) + shared(L.Dense(5, name="two")(b))
    model = randomized(keras.Model([a, b], y))
    for name, constants in (("one", [2.0, 1.0]), ("two", [2.0, -1.0])):
        kernel, bias = model.get_layer(name).get_weights()
        kernel[:, :2], bias[:2] = 0, constants
        model.get_layer(name).set_weights([kernel, bias])
    small = at.remove_channels(model)
    assert units(small, "one") == units(small, "two") == 4  # 2.0 twice; ±1 differ
    assert_equal(small, model, data(model))


def test_a_constant_is_not_one_if_a_nested_model_gets_others():
    x = keras.Input((3,))
    inner = L.Dense(2, name="read")(keras.layers.ReLU()(x))
    nested = keras.Model(x, inner, name="nested")
    a = keras.Input((4,))
    one, two = L.Dense(3, name="one")(a), L.Dense(3, name="two")(a)
    model = randomized(keras.Model(a, nested(one) + nested(two)))
    for name, constant in (("one", 1.0), ("two", 2.0)):
        kernel, bias = model.get_layer(name).get_weights()
        kernel[:, :2], bias[:2] = 0, [constant, -1.0]  # ReLU makes zero of the second
        model.get_layer(name).set_weights([kernel, bias])
    small = at.remove_channels(model)
    assert units(small, "one") == 2 and small.get_layer("nested").input_shape == (None, 2)
    assert_equal(small, model, data(model))


def test_of_channels_that_are_all_masked_one_remains():
    model = chain()
    model.get_layer("conv").set_weights([np.zeros((3, 3, 3, 6)), np.zeros(6)])
    bn = model.get_layer("bn")
    bn.set_weights([np.zeros(6), np.zeros(6), *bn.get_weights()[2:]])
    small = at.remove_channels(model)
    assert units(small, "conv") == 1
    assert_equal(small, model, data(model))


def test_channels_that_prune_made_zero_are_removed():
    model = mlp()
    for name in ("a", "b"):
        model.get_layer(name).bias.assign(np.zeros(model.get_layer(name).units))
    at.prune(model, at.ConstantSparsity(0.5), pattern=at.Channels(), exclude="head")
    small = at.remove_channels(model)
    assert (units(small, "a"), units(small, "b")) == (5, 3)
    assert_equal(small, model, data(model))


# Which go


def mlp():
    return randomized(
        keras.Sequential(
            [
                keras.Input((4,)),
                L.Dense(10, activation="relu", name="a"),
                L.Dense(6, activation="relu", name="b"),
                L.Dense(2, activation="softmax", name="head"),
            ]
        )
    )


@pytest.mark.parametrize(
    ("criterion", "expected"), [("magnitude", [1, 3]), ("l2", [0, 3]), ("last", [2, 3])]
)
def test_criteria_pick_the_lowest_scores(criterion, expected):
    model = mlp()
    kernel = np.ones((4, 10), "float32") * 5
    kernel[:, 0], kernel[:, 1] = [1, 1, 1, 1], [1.9, 0, 0, 0]  # norms: 4 and 2, 1.9 and 2
    kernel[:, 2], kernel[:, 3] = 3, 0.1
    model.get_layer("a").set_weights([kernel, np.arange(1, 11)])
    if criterion == "l2":
        kernel[0, 1] = 2.5
        model.get_layer("a").set_weights([kernel, np.arange(1, 11)])
    if criterion == "last":
        scores = np.array([9, 9, 1, 0, 9, 9, 9, 9, 9, 9])
        criterion = lambda path, layer: scores[: layer.units]  # noqa: E731
    small = at.remove_channels(model, 0.2, criterion=criterion)
    left = np.delete(np.arange(1, 11), expected)
    np.testing.assert_array_equal(small.get_layer("a").bias, left)


@pytest.mark.parametrize(
    ("amount", "multiple_of", "expected"),
    [(0.5, 1, (5, 3)), (0.5, 4, (8, 4)), (0.99, 1, (1, 1)), (0.9, 1, (1, 1)), (0.2, 1, (8, 5))],
)
def test_how_many_remain(amount, multiple_of, expected):
    small = check(mlp(), amount, multiple_of=multiple_of)
    assert (units(small, "a"), units(small, "b"), units(small, "head")) == (*expected, 2)


def test_include_and_exclude():
    assert units(check(mlp(), include="a"), "b") == 6
    small = check(mlp(), exclude="a")
    assert (units(small, "a"), units(small, "b")) == (10, 3)
    assert ("a", "outputs stay: 'a' is excluded") in at.report_of(small).skipped
    # One of those whose channels are added: they all stay.
    model = two_inputs_shared()
    small = check(model, exclude="nested/back")
    assert units(small, "shared") == 8 and units(small, "hidden") == 3


def test_frozen_layers_stay_frozen_and_the_copy_is_not_compiled():
    model = mlp()
    model.get_layer("a").trainable = False
    model.compile("sgd", "mse")
    small = at.remove_channels(model, 0.5)
    assert not small.get_layer("a").trainable and small.get_layer("b").trainable
    assert model.compiled and not small.compiled


def test_the_report_tells_what_changed_and_what_stays():
    small = at.remove_channels(image_model(sequence), 0.5)
    report = at.report_of(small)
    notes = dict(report.done)
    assert notes["ffn"] == "outputs 12 → 6, weights 84 → 42"
    assert notes["conv"] == "outputs 8 → 4, weights 80 → 40"
    assert "'lstm' reads them: LSTM has no rule" in notes["ffn_out"]
    assert ("lstm", "LSTM has no rule that says what becomes of its channels") in report.skipped
    report = at.mask_channels(mlp(), 0.5)
    assert report.done[0] == ("a", "5 of 10 output channels masked")
    assert report.skipped == (("head", "they are outputs of the model"),)


@pytest.mark.parametrize("axis", [1, -1])
def test_layers_with_no_rule_keep_their_channels(axis):
    x = keras.Input((6, 6, 3))
    y = L.BatchNormalization(axis=axis)(L.Conv2D(4, 3, name="conv")(x))
    y = keras.ops.flip(y, axis=-1) if axis == -1 else y
    y = L.Conv2D(4, 1, name="free")(L.Softmax()(y))
    model = randomized(keras.Model(x, L.Conv2D(2, 1)(y)))
    small = check(model)
    assert units(small, "conv") == 4 and units(small, "free") == 2


# Errors


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.dense = L.Dense(2)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"amount": 1.0}, "above 0 and below 1. Received: 1.0"),
        ({"amount": 0}, "above 0 and below 1. Received: 0"),
        ({"amount": 0.5, "criterion": "l3"}, "'magnitude', 'l2' or a function.*'l3'"),
        ({"amount": 0.5, "multiple_of": 0}, "positive int. Received: 0"),
        ({"amount": 0.5, "include": "c"}, "No layer matches 'c'"),
        ({"amount": 0.5, "criterion": lambda path, layer: [1.0]}, "give 10 numbers for layer 'a'"),
        ({"amount": 0.5, "include": "head"}, "No channel of model .* can be .*outputs of the"),
        ({"amount": 0.5, "multiple_of": 16}, "No channel of model .* can be .*too few to lose"),
    ],
)
@pytest.mark.parametrize("verb", [at.mask_channels, at.remove_channels])
def test_what_is_out_of_range_is_an_error(verb, kwargs, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        verb(mlp(), **kwargs)


def test_models_without_a_graph_or_anything_masked_are_errors():
    model = Subclassed()
    model(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"'own' \(Subclassed\) is subclassed"):
        at.remove_channels(model, 0.5)
    with pytest.raises(
        ValueError, match="(?s)No channel of model .* can be removed.*'b' reads them"
    ):
        at.remove_channels(mlp())
