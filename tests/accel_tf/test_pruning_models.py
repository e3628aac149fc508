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
    "conv1d": (lambda: L.Conv1D(8, 3), (8, 4), "kernel", ""),
    "conv3d": (lambda: L.Conv3D(8, 2), (3, 3, 3, 4), "kernel", ""),
    "transposed1d": (lambda: L.Conv1DTranspose(8, 3), (8, 4), "kernel", ""),
    "grouped": (lambda: L.Conv2D(8, 3, groups=2), (8, 8, 4), "kernel", ""),
    "embedding": (lambda: L.Embedding(16, 8), (5,), "", "embeddings"),
    "einsum": (lambda: L.EinsumDense("abc,cd->abd", (4, 8)), (4, 6), "kernel", ""),
    "dense3": (lambda: L.Dense(8), (4, 4), "kernel", ""),
    "rnn": (lambda: L.SimpleRNN(8), (4, 4), "kernel recurrent_kernel", ""),
    "gru": (lambda: L.GRU(8), (4, 4), "kernel recurrent_kernel", ""),
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


@pytest.mark.parametrize("family", ["MobileNetV3Small", "ConvNeXtTiny"])
def test_families(family):
    make = getattr(keras.applications, family)
    model = make(input_shape=(32, 32, 3), weights=None, classes=2)
    at.prune(model, at.ConstantSparsity(0.5))
    step(model)
    for v in pruned(model):
        n = v.shape.num_elements()
        assert np.sum(v.numpy() == 0) == n - max(round(n / 2), 1), v.path
