"""`prune` on every kind of layer, by default and by choice, and on models of several families."""

import keras
import numpy as np
import pytest

import accel_tf as at
from accel_tf.pruning._constraint import MaskConstraint

L = keras.layers
# The layer, its input, the kernels pruned by default, those added by choice.
KINDS = {
    "depthwise1d": (lambda: L.DepthwiseConv1D(3, depth_multiplier=2), (8, 4), "", "kernel"),
    "depthwise2d": (lambda: L.DepthwiseConv2D(3), (8, 8, 4), "", "kernel"),
    "separable1d": (
        lambda: L.SeparableConv1D(8, 3),
        (8, 4),
        "pointwise_kernel",
        "depthwise_kernel",
    ),
    "separable2d": (
        lambda: L.SeparableConv2D(8, 3, depth_multiplier=2),
        (8, 8, 4),
        "pointwise_kernel",
        "depthwise_kernel",
    ),
    "conv1d": (lambda: L.Conv1D(8, 3), (8, 4), "kernel", ""),
    "conv3d": (lambda: L.Conv3D(8, 2), (3, 3, 3, 4), "kernel", ""),
    "transposed1d": (lambda: L.Conv1DTranspose(8, 3), (8, 4), "kernel", ""),
    "transposed2d": (lambda: L.Conv2DTranspose(8, 3, strides=2), (4, 4, 4), "kernel", ""),
    "transposed3d": (lambda: L.Conv3DTranspose(8, 2), (3, 3, 3, 4), "kernel", ""),
    "grouped": (lambda: L.Conv2D(8, 3, groups=2), (8, 8, 4), "kernel", ""),
    "embedding": (lambda: L.Embedding(16, 8), (5,), "", "embeddings"),
    "einsum": (lambda: L.EinsumDense("abc,cd->abd", (4, 8)), (4, 6), "kernel", ""),
    "dense3": (lambda: L.Dense(8), (4, 4), "kernel", ""),
    "rnn": (lambda: L.SimpleRNN(8), (4, 4), "kernel recurrent_kernel", ""),
    "gru": (lambda: L.GRU(8), (4, 4), "kernel recurrent_kernel", ""),
    "bidirectional": (lambda: L.Bidirectional(L.LSTM(4)), (4, 4), "kernel recurrent_kernel", ""),
    "convlstm": (lambda: L.ConvLSTM2D(4, 3), (3, 6, 6, 2), "kernel recurrent_kernel", ""),
}


def pruned(model):
    return [v for v in model.trainable_variables if isinstance(v.constraint, MaskConstraint)]


def step(model):
    shape = [2, *model.input_shape[1:]]
    model.compile("sgd", "mse")
    model.train_on_batch(np.ones(shape), np.zeros((2, *model.output_shape[1:])))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    make, shape, default, chosen = KINDS[kind]
    model = keras.Sequential([keras.Input(shape), make()])
    if default:
        at.prune(model, at.ConstantSparsity(0.5))
        assert {v.name for v in pruned(model)} == set(default.split())
    else:
        with pytest.raises(ValueError, match="name (it|its layer) in include"):
            at.prune(model, at.ConstantSparsity(0.5))
    at.prune(model, at.ConstantSparsity(0.5), include=model.layers[0])
    assert {v.name for v in pruned(model)} == set(f"{default} {chosen}".split())
    step(model)
    for v in pruned(model):
        assert np.sum(v.numpy() == 0) == v.shape.num_elements() // 2


RECURRENT = ("rnn", "gru", "bidirectional", "convlstm")


@pytest.mark.parametrize(
    "kind",
    [kind for kind, (_, _, default, _) in KINDS.items() if default and kind not in RECURRENT],
)
def test_channels_are_outputs_of_the_layer(kind):
    """Of every kind of kernel, whatever the order of its axes: half of the outputs are zero."""
    make, shape, _, _ = KINDS[kind]
    model = keras.Sequential([keras.Input(shape), make()])
    at.prune(model, at.ConstantSparsity(0.5), pattern=at.Channels())
    step(model)
    if model.layers[0].bias is not None:
        model.layers[0].bias.assign(np.zeros(8))
    y = model(np.random.default_rng(0).normal(size=(2, *shape))).numpy()
    alive = y.reshape(-1, 8).any(axis=0)
    assert alive.sum() == 4
    assert y[..., alive].all()


@pytest.mark.parametrize("kind", [kind for kind in RECURRENT if kind != "rnn"])
def test_gates_are_not_channels(kind):
    make, shape, _, _ = KINDS[kind]
    model = keras.Sequential([keras.Input(shape), make()])
    with pytest.raises(ValueError, match="a column in the kernel for each gate"):
        at.prune(model, at.ConstantSparsity(0.5), pattern=at.Channels())


def test_biases_of_rank_2_are_never_pruned():
    x = keras.Input((6, 8))
    model = keras.Model(x, L.GRU(4)(L.MultiHeadAttention(2, 4, name="attention")(x, x)))
    report = at.prune(model, at.ConstantSparsity(0.5), include=["attention/*", "*gru_cell"])
    assert all(v.name.endswith("kernel") for v in pruned(model))
    assert "not bias: a bias" in report.done[0].note


def test_neighbours_of_one_name_are_chosen_apart():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [L.Dense(8, name="block") for _ in range(3)]

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Net()
    model(np.ones((2, 8), "float32"))
    at.prune(model, at.ConstantSparsity(0.5), include=model.blocks[1])
    assert [np.mean(b.kernel.numpy() == 0) for b in model.blocks] == [0, 0.5, 0]


@keras.saving.register_keras_serializable("test_pruning_models")
class Block(keras.Layer):
    """A layer of layers: attention by groups, and a feed-forward network in a model of its own."""

    def __init__(self, width=8, **kwargs):
        super().__init__(**kwargs)
        self.attention = L.GroupQueryAttention(4, 4, 2)
        self.norms = [L.LayerNormalization(), L.LayerNormalization()]
        self.feed_forward = keras.Sequential(
            [L.EinsumDense("abc,cd->abd", (None, 4 * width), activation="gelu"), L.Dense(width)]
        )

    def build(self, shape):
        self.attention.build(shape, shape)
        for layer in (*self.norms, self.feed_forward):
            layer.build(shape)

    def call(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y)
        return x + self.feed_forward(self.norms[1](x))


class Transformer(keras.Model):
    """As keras_hub builds them: embeddings, blocks in a list, a head."""

    def __init__(self, blocks=2, words=20, width=8):
        super().__init__()
        self.words, self.places = L.Embedding(words, width), L.Embedding(6, width)
        self.blocks = [Block(width) for _ in range(blocks)]
        self.pool, self.head = L.GlobalAveragePooling1D(), L.Dense(5, name="head")

    def call(self, tokens):
        x = self.words(tokens) + self.places(keras.ops.arange(6))
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_transformer_of_subclassed_layers(jit_compile):
    """Below a list, layers of layers and a model in a layer: each kernel exactly, after each step."""
    model = Transformer()
    tokens = np.random.default_rng(0).integers(0, 20, (8, 6))
    model(tokens)
    at.prune(model, at.PolynomialDecay(0.75, end_step=4, frequency=1), exclude="head")
    assert len(pruned(model)) == 2 * (4 + 2)  # query, key, value, output; feed-forward
    model.compile("adam", "mse", jit_compile=jit_compile)
    model.fit(tokens, np.zeros((8, 5)), batch_size=2, verbose=0)
    for v in pruned(model):
        assert np.mean(v.numpy() == 0) == 0.75, v.path
    at.prune(model, at.ConstantSparsity(0.5), include=L.Embedding)
    model.fit(tokens, np.zeros((8, 5)), batch_size=2, verbose=0)
    assert [np.mean(e.embeddings.numpy() == 0) for e in (model.words, model.places)] == [0.5] * 2
    assert len(pruned(model)) == 14
    assert model.head.kernel.numpy().all()


FAMILIES = [
    "MobileNetV3Small",
    *(pytest.param(name, marks=pytest.mark.full) for name in ("ConvNeXtTiny", "EfficientNetV2B0")),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    make = getattr(keras.applications, family)
    model = make(input_shape=(32, 32, 3), weights=None, classes=2)
    at.prune(model, at.ConstantSparsity(0.5))
    step(model)
    for v in pruned(model):
        n = v.shape.num_elements()
        assert np.sum(v.numpy() == 0) == n - max(round(n / 2), 1), v.path
