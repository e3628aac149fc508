"""sparsify: which layers of a model become sparse, and that the model stays the same function."""

import dataclasses
import re

import keras
import numpy as np
import pytest
from pruned_models import assert_same_function, mlp, zero_out

import accel_tf as at


def test_sparsify_reports_every_layer_with_weights():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(16, 3, name="conv")(inputs)
    x = keras.layers.Conv2D(32, 1, activation="relu", name="pointwise")(x)
    x = keras.layers.Conv2D(32, 1, strides=2, name="strided")(x)
    x = keras.layers.Conv2D(32, 1, groups=2, name="grouped")(x)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.Reshape((9, 32))(x)
    x = keras.layers.EinsumDense("abc,cd->abd", (9, 64), bias_axes="d", name="einsum")(x)
    x = keras.layers.EinsumDense("abc,bcd->abd", (9, 16), name="per_position")(x)
    x = keras.layers.MultiHeadAttention(4, 8, name="attention")(x, x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(64, name="sparse")(x)
    model = zero_out(keras.Model(inputs, keras.layers.Dense(10, name="dense")(x)))
    model.get_layer("dense").kernel.assign(np.ones((64, 10)))
    attention = model.get_layer("attention")
    attention.key_dense.kernel.assign(np.ones((16, 4, 8)))
    before = [w.numpy() for w in model.weights]

    fast = at.sparsify(model, min_sparsity=0.8)

    report = at.report_of(fast)
    assert {e.layer for e in report.done} == {
        "conv", "pointwise", "strided", "einsum", "sparse",
        "attention/query", "attention/value", "attention/attention_output",
    }  # fmt: skip
    notes = {e.layer: e.note for e in report.skipped}
    assert notes.keys() == {"grouped", "per_position", "norm", "dense", "attention/key"}
    assert notes["grouped"].startswith("Conv2D with groups=2, data_format='channels_last'; only 1")
    assert notes["grouped"].endswith("; takes in 'bn'")
    assert notes["norm"] == "LayerNormalization has no sparse form"
    assert "'abc,bcd->abd' is no product with a matrix" in notes["per_position"]
    assert notes["dense"] == "Dense (64, 10), 0.0 % zeros, less than min_sparsity = 0.8"
    assert isinstance(fast.get_layer("attention"), at.SparseMultiHeadAttention)
    assert type(fast.get_layer("attention").key_dense) is keras.layers.EinsumDense
    names = [layer.name for layer in model.layers[1:] if layer.name != "bn"]
    assert [layer.name for layer in fast.layers[1:]] == names
    assert fast.name == model.name
    assert_same_function(model, fast)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def wide(sparsity, size=1024, block=1):
    """A model of one large layer, with blocks of outputs that are zero."""
    model = keras.Sequential([keras.Input((size,)), keras.layers.Dense(size, name="wide")])
    rng = np.random.default_rng(0)
    kept = np.repeat(rng.random((size, size // block)) >= sparsity, block, axis=1)
    model.layers[0].kernel.assign(rng.normal(size=(size, size)) * kept)
    return model


def test_by_itself_sparsify_takes_what_is_predicted_to_be_fastest():
    for sparsity, block, format in [
        (0.95, 1, "unstructured"),
        (0.95, 4, "4x1"),
        (0.1, 1, None),
        (0.1, 4, None),
    ]:
        model = wide(sparsity, block=block)
        fast = at.sparsify(model)
        report = at.report_of(fast)
        if format is None:
            assert isinstance(fast.layers[0], keras.layers.Dense)
            promise = re.search(
                r": a sparse form would be ([\d.]+)× as fast", report.skipped[0].note
            )
            assert float(promise[1]) < 1.2
        else:
            assert fast.layers[0].format == format
            speedup = float(report.done[0].note.split(f"{format}, ")[1].split("×")[0])
            assert 3 < speedup < 20  # 1 / density
        assert_same_function(model, fast, atol=1e-2)
    assert not at.report_of(at.sparsify(mlp())).done  # too small to gain anything


def test_the_batch_size_and_the_costs_decide(monkeypatch):
    costs = at.sparse.costs()
    dense = costs.prices["dense"]
    prices = {**costs.prices, "dense": dense._replace(weight=(9.0, *dense.weight[1:]))}
    monkeypatch.setattr(at.sparse._choice, "_costs", dataclasses.replace(costs, prices=prices))
    model = wide(0.2)
    assert at.report_of(at.sparsify(model, batch_size=1)).done
    assert not at.report_of(at.sparsify(model, batch_size=512)).done


def test_a_format_can_be_asked_for():
    model = mlp()
    fast = at.sparsify(model, min_sparsity=0.5, format="16x1")
    assert {layer.format for layer in fast.layers} == {"16x1"}
    assert_same_function(model, fast)
    with pytest.raises(ValueError, match="format must be 'auto', .*Received: 'dense'"):
        at.sparsify(mlp(), format="dense")
    with pytest.raises(ValueError, match="batch_size must be positive. Received: 0"):
        at.sparsify(mlp(), batch_size=0)


def test_a_transformer_block_becomes_sparse_as_a_whole():
    inputs, context = keras.Input((None, 32)), keras.Input((9, 24))
    x = keras.layers.LayerNormalization()(inputs)
    x = inputs + keras.layers.MultiHeadAttention(4, 8, value_dim=6, name="self")(
        x, x, use_causal_mask=True
    )
    x = x + keras.layers.MultiHeadAttention(4, 8, name="cross")(x, context)
    y = keras.layers.Dense(64, activation="gelu", name="up")(x)
    model = zero_out(keras.Model([inputs, context], x + keras.layers.Dense(32, name="down")(y)))
    fast = at.sparsify(model, min_sparsity=0.8)
    assert len(at.report_of(fast).done) == 10 and len(at.report_of(fast).skipped) == 1
    rng = np.random.default_rng(0)
    x = [rng.normal(size=size).astype(np.float32) for size in ((2, 7, 32), (2, 9, 24))]
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_sparsify_nested_and_shared():
    shared = keras.layers.Dense(24, activation="relu", name="shared")
    inner_in = keras.Input((24,))
    inner = keras.Model(
        inner_in, keras.layers.Dense(24, name="in_block")(shared(inner_in)), name="block"
    )
    inputs = keras.Input((24,))
    model = zero_out(keras.Model(inputs, shared(inner(inner(shared(inputs))))))
    fast = at.sparsify(model, min_sparsity=0.8)
    assert sum(isinstance(layer, at.SparseDense) for _, layer in at.layers.walk(fast)) == 2
    assert_same_function(model, fast)
    assert {e.layer.split("/")[-1] for e in at.report_of(fast).done} == {"shared", "in_block"}


class Block(keras.layers.Layer):
    """A layer as users write them: others, and a weight."""

    def build(self, shape):
        self.attention = keras.layers.MultiHeadAttention(2, 8, name="attention")
        self.dense = keras.layers.Dense(24, activation="relu", name="dense")
        self.attention.build(shape, shape)
        self.dense.build(shape)
        self.scale = self.add_weight(shape=(24,), initializer="ones", name="scale")

    def call(self, x):
        return (x + self.attention(x, x)) * self.scale + self.dense(x)


def test_pruned_layers_in_custom_ones_become_sparse(tmp_path):
    inputs, block = keras.Input((6, 24)), Block(name="block")
    model = zero_out(keras.Model(inputs, Block(name="other")(block(block(inputs)))))
    before = keras.Model(inputs, Block(name="dense")(inputs))
    assert type(at.sparsify(before).get_layer("dense")) is Block  # nothing to be gained
    fast = at.sparsify(model, min_sparsity=0.8)
    found = {entry.layer for entry in at.report_of(fast).done}
    assert {"block/dense", "other/dense", "block/attention/query"} <= found and len(found) == 10
    assert_same_function(model, fast)
    trainable = [v.path for v in fast.trainable_variables if "scale" in v.path]
    assert len(trainable) == 2
    fast.save(tmp_path / "fast.keras")  # which needs no class of the user's any more
    assert_same_function(fast, keras.models.load_model(tmp_path / "fast.keras"))


def test_sparsify_says_what_it_cannot_reach():
    model = zero_out(
        keras.Sequential(
            [
                keras.Input((4, 16)),
                keras.layers.TimeDistributed(keras.layers.Dense(8, name="within"), name="each"),
            ]
        )
    )
    report = at.report_of(at.sparsify(model))
    assert not report.done
    notes = {e.layer: e.note for e in report.skipped}
    assert "it belongs to the layer 'each', which is kept whole" in notes["each/within"]


def test_sparsify_keeps_regularizers_and_drops_constraints():
    model = zero_out(
        keras.Sequential(
            [
                keras.Input((16,)),
                keras.layers.Dense(
                    8,
                    kernel_regularizer=keras.regularizers.L2(0.1),
                    kernel_constraint=keras.constraints.NonNeg(),
                ),
            ]
        )
    )
    model.layers[0].trainable = False
    fast = at.sparsify(model, min_sparsity=0.8)
    layer = fast.layers[0]
    assert not layer.trainable
    layer.trainable = model.layers[0].trainable = True
    np.testing.assert_allclose(sum(fast.losses), sum(model.losses), rtol=1e-5)
    assert "constraint is dropped" in at.report_of(fast).done[0].note


def test_sparsify_threshold_and_errors():
    model = zero_out(mlp(), sparsity=0.0)
    assert not at.report_of(at.sparsify(model, min_sparsity=0.99)).done
    assert len(at.report_of(at.sparsify(model, min_sparsity=0.0)).done) == 2
    with pytest.raises(ValueError, match=r"fraction of zeros in \[0, 1\]. Received: 90"):
        at.sparsify(model, min_sparsity=90)

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.fc = keras.layers.Dense(4)

        def call(self, x):
            return self.fc(x)

    subclassed = Subclassed()
    with pytest.raises(ValueError, match="sparsify needs the weights of model .* not built yet"):
        at.sparsify(subclassed)
    subclassed(np.ones((1, 4)))
    with pytest.raises(ValueError, match="is subclassed"):
        at.sparsify(subclassed)


def test_sparsify_all_zero_kernel():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    model.layers[0].set_weights([np.zeros((6, 4)), np.arange(4.0)])
    fast = at.sparsify(model, min_sparsity=0.8)
    assert fast.layers[0].matrix.nnz == 0
    assert_same_function(model, fast)
    fast.compile("sgd", "mse")
    fast.fit(np.ones((4, 6)), np.ones((4, 4)), verbose=0)


@pytest.mark.parametrize(
    "name", ["MobileNetV2", pytest.param("EfficientNetV2B0", marks=pytest.mark.full)]
)
def test_sparsify_applications(name):
    model = zero_out(
        getattr(keras.applications, name)(
            weights=None, input_shape=(64, 64, 3), classes=10, classifier_activation=None
        )
    )
    fast = at.sparsify(model, min_sparsity=0.8)
    assert len(at.report_of(fast).done) > 20
    x = 255 * np.random.default_rng(0).random((2, 64, 64, 3)).astype(np.float32)
    want = np.asarray(model(x))
    np.testing.assert_allclose(fast(x), want, atol=1e-4 * np.abs(want).max())
    assert np.abs(want[0] - want[1]).max() > 1e-2 * np.abs(want).max()  # the signal gets through


def test_sparsity_counts_the_zeros_that_a_sparse_layer_does_not_store():
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10, name="head")])
    at.prune(model, at.ConstantSparsity(0.9))
    fast = at.sparsify(model, min_sparsity=0.8)
    assert at.sparsity(fast).rows == at.sparsity(model).rows
    assert at.sparsity(fast).total == 0.9


def test_normalizations_behind_sparse_layers_are_fused():
    def pointwise(name):
        layer = keras.layers.Conv2D(256, 1, use_bias=False, name=name)
        return [layer, keras.layers.BatchNormalization(), keras.layers.ReLU(6)]

    model = keras.Sequential([keras.Input((16, 16, 256)), *pointwise("a"), *pointwise("b")])
    rng = np.random.default_rng(0)
    for v in model.weights:
        value = rng.uniform(0.5, 2, v.shape)
        v.assign(value if v.name != "kernel" else value * (rng.random(v.shape) < 0.1) - 0.05)
    for name in "ab":
        kernel = model.get_layer(name).kernel.numpy()
        model.get_layer(name).kernel.assign(np.where(kernel < 0, 0, kernel / 10))
    x = rng.normal(size=(2, 16, 16, 256)).astype("float32")
    fast = at.sparsify(model)
    assert [type(layer) for layer in fast.layers] == [at.SparseConv2D] * 2
    assert fast.get_layer("a").activation is keras.activations.relu6
    assert "; takes in 'batch_norm" in at.report_of(fast).done[0].note
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)
    kept = at.sparsify(model, fuse=False)
    assert [type(layer).__name__ for layer in kept.layers] == [
        *("SparseConv2D", "BatchNormalization", "ReLU"),
        *("SparseConv2D", "BatchNormalization", "ReLU"),
    ]
    np.testing.assert_allclose(kept(x), model(x), rtol=1e-4, atol=1e-4)


def test_convolutions_over_time_become_sparse(tmp_path):
    L = keras.layers
    inputs = keras.Input((None, 8))
    x = L.Conv1D(16, 5, padding="causal", dilation_rate=2, name="causal")(inputs)
    x = L.BatchNormalization(name="bn")(x)
    x = L.Conv1D(16, 3, strides=2, padding="same", activation="gelu", name="strided")(x)
    x = L.Conv1D(16, 1, use_bias=False, name="pointwise")(x)
    x = L.Conv1D(16, 3, groups=2, name="grouped")(x)
    model = zero_out(keras.Model(inputs, L.GlobalAveragePooling1D()(x)))
    fast = at.sparsify(model, min_sparsity=0.8)
    assert [e.layer for e in at.report_of(fast).done] == ["causal", "strided", "pointwise"]
    note = at.report_of(fast).done[0].note
    assert note.startswith("Conv1D (5, 8, 16), ") and "→ SparseConv1D, " in note
    notes = {e.layer: e.note for e in at.report_of(fast).skipped}
    assert notes["grouped"].startswith("Conv1D with groups=2, data_format='channels_last'; only 1")
    x = np.random.default_rng(0).normal(size=(4, 21, 8)).astype("float32")
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)
    fast.save(tmp_path / "fast.keras")
    loaded = keras.models.load_model(tmp_path / "fast.keras")
    np.testing.assert_array_equal(loaded(x), fast(x))
    assert at.sparsity(fast).total == pytest.approx(at.sparsity(model).total, abs=0.05)
    # By prediction, only where it is faster: a wide one is, a narrow one is not.
    assert not at.report_of(at.sparsify(model)).done
    wide = keras.Sequential([keras.Input((64, 512)), L.Conv1D(512, 3, name="wide")])
    zero_out(wide)
    assert type(at.sparsify(wide).get_layer("wide")) is at.SparseConv1D
