"""The sparse layers: equal to the dense ones they stand for, saved, trained, distributed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from pruned_models import mlp, x_of

import accel_tf as at

# --- SparseDense -------------------------------------------------------------------------------------


def test_layer_equals_dense():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(12, 8)).astype(np.float32) * (rng.random((12, 8)) < 0.3)
    b = rng.normal(size=8).astype(np.float32)
    layer = at.SparseDense.from_matrix(at.SparseMatrix.from_dense(w), bias=b, activation="tanh")
    for shape in [(5, 12), (0, 12), (2, 3, 12)]:
        x = rng.normal(size=shape).astype(np.float32)
        np.testing.assert_allclose(layer(x), np.tanh(x @ w + b), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.matrix.to_dense(), w)
    assert [v.name for v in layer.trainable_weights] == ["values", "bias"]
    assert [v.name for v in layer.non_trainable_weights] == ["plan", "columns"]


def test_random_pattern_is_exact_balanced_and_seeded():
    def made(seed):
        layer = at.SparseDense(10, sparsity=0.87, seed=seed)
        layer.build((None, 33))
        return layer.matrix

    matrix = made(3)
    assert matrix.nnz == round(33 * 10 * 0.13)
    per_output = np.diff(matrix.row_pointers)
    assert per_output.max() - per_output.min() <= 1
    assert np.count_nonzero(matrix.to_dense()) == matrix.nnz  # no place twice
    np.testing.assert_array_equal(matrix.to_dense(), made(3).to_dense())
    assert np.any(matrix.to_dense() != made(4).to_dense())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"units": 0}, "units must be a positive integer. Received: 0"),
        ({"units": 4, "sparsity": 1.0}, r"fraction of zeros in \[0, 1\). Received: 1.0"),
        ({"units": 4, "nonzeros": -1}, "nonzeros must not be negative. Received: -1"),
        ({"units": 4, "format": "dense"}, "format must be one of .*Received: 'dense'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        at.SparseDense(**arguments)


def test_wrong_shapes_name_the_layer():
    with pytest.raises(ValueError, match="'fc' has nonzeros=13, more than the 12 weights"):
        at.SparseDense(4, nonzeros=13, name="fc").build((None, 3))
    layer = at.SparseDense.from_matrix(at.SparseMatrix.from_dense(np.eye(4)), name="fc")
    with pytest.raises(ValueError, match=r"'fc' was made from a matrix of shape \(4, 4\)"):
        layer.build((None, 5))
    with pytest.raises(ValueError, match="'fc' needs to know the last dimension"):
        layer.build((None, None))
    with pytest.raises(ValueError, match="'fc' has format='4x1'.* multiples of 4.* 6, 8"):
        at.SparseDense(6, nonzeros=8, format="4x1", name="fc").build((None, 3))
    with pytest.raises(ValueError, match="'fc' has no matrix yet"):
        layer.matrix  # noqa: B018


def test_training_moves_the_values_as_a_masked_dense_layer():
    rng = np.random.default_rng(5)
    w = rng.normal(size=(16, 6)).astype(np.float32) * (rng.random((16, 6)) < 0.4)
    x = rng.normal(size=(64, 16)).astype(np.float32)
    y = rng.normal(size=(64, 6)).astype(np.float32)

    class Masked(keras.constraints.Constraint):
        def __call__(self, kernel):
            return kernel * (w != 0)

    sparse = keras.Sequential(
        [keras.Input((16,)), at.SparseDense.from_matrix(at.SparseMatrix.from_dense(w), np.zeros(6))]
    )
    dense = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(6, kernel_constraint=Masked())]
    )
    dense.layers[0].set_weights([w, np.zeros(6)])
    for model in (sparse, dense):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    trained = sparse.layers[0]
    np.testing.assert_allclose(
        trained.matrix.to_dense(), keras.ops.convert_to_numpy(dense.layers[0].kernel), atol=1e-5
    )
    np.testing.assert_allclose(
        *map(keras.ops.convert_to_numpy, (trained.bias, dense.layers[0].bias)), atol=1e-5
    )
    assert np.abs(trained.matrix.to_dense() - w).max() > 0.01


def test_config_round_trip():
    layer = at.SparseDense(
        8, sparsity=0.7, activation="gelu", use_bias=False, seed=3, name="fc",
        values_regularizer=keras.regularizers.L2(1e-3),
    )  # fmt: skip
    layer.build((None, 20))
    config = layer.get_config()
    again = at.SparseDense.from_config(config)
    assert again.get_config() == config
    again.build((None, 20))
    np.testing.assert_array_equal(again.matrix.to_dense(), layer.matrix.to_dense())


# --- What all sparse layers keep to ---------------------------------------------------------------------


class Attended(keras.layers.Layer):
    """Self-attention as a layer of one input, so that it fits the others' tests."""

    def __init__(self, attention=None, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention or at.SparseMultiHeadAttention(
            2, 8, sparsity=0.7, name="attention"
        )

    def build(self, shape):
        if not self.attention.built:
            self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)

    def get_config(self):
        return {
            **super().get_config(),
            "attention": keras.saving.serialize_keras_object(self.attention),
        }

    @classmethod
    def from_config(cls, config):
        attention = keras.saving.deserialize_keras_object(config.pop("attention"))
        return cls(attention, **config)


KINDS = {
    "dense": ((24,), lambda **k: at.SparseDense(20, sparsity=0.7, activation="relu", **k)),
    "dense 4x1": ((24,), lambda **k: at.SparseDense(20, sparsity=0.7, format="4x1", **k)),
    "conv 3×3": ((8, 8, 5), lambda **k: at.SparseConv2D(12, 3, sparsity=0.7, padding="same", **k)),
    "conv 1×1": ((8, 8, 12), lambda **k: at.SparseConv2D(8, 1, sparsity=0.7, strides=2, **k)),
    "conv 1D": (
        (9, 5),
        lambda **k: at.SparseConv1D(12, 3, sparsity=0.7, padding="causal", dilation_rate=2, **k),
    ),
    "einsum": (
        (6, 16),
        lambda **k: at.SparseEinsumDense(
            "abc,cde->abde", (None, 4, 5), 0.7, bias_axes="de", activation="gelu", **k
        ),
    ),
    "attention": ((6, 16), lambda **k: Attended(**k)),
    "int8": (
        (24,),
        lambda **k: at.SparseDense.from_matrix(some_matrix().quantize(), np.ones(21), **k),
    ),
    "partial blocks": ((24,), lambda **k: at.SparseDense.from_matrix(some_matrix("4x1"), **k)),
}


def some_matrix(format="unstructured"):
    rng = np.random.default_rng(6)
    w = rng.normal(size=(24, 21)) * (rng.random((24, 21)) < 0.3)
    return at.SparseMatrix.from_dense(w, format=format)


def model_of(kind, **kwargs):
    shape, make = KINDS[kind]
    return keras.Sequential([keras.Input(shape), make(name="it", **kwargs), keras.layers.Flatten()])


def batch_of(model, batch=4):
    x = np.random.default_rng(1).normal(size=(batch, *model.input_shape[1:])).astype(np.float32)
    return x, np.zeros((batch, *model.output_shape[1:]), np.float32)


def sparse_layers(model):
    return [layer for _, layer in at.layers.walk(model) if isinstance(layer, at.sparse.SparseLayer)]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_keeps_its_pattern(kind):
    model = model_of(kind)
    before = [layer.matrix.to_dense().numpy() for layer in sparse_layers(model)]
    stored = [np.count_nonzero(layer.values) for layer in sparse_layers(model)]
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    x, y = batch_of(model)
    losses = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for layer, old, count in zip(sparse_layers(model), before, stored, strict=True):
        new = layer.matrix.to_dense().numpy()
        np.testing.assert_array_equal(new != 0, old != 0)
        assert np.count_nonzero(layer.values) == count  # also what matrix does not show: padding
        assert (np.abs(new - old).max() > 1e-3) == (kind != "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    model = model_of(kind)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = batch_of(model)
    model.fit(x, y, verbose=0)
    want = model.predict(x, verbose=0)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"Attended": Attended}
    )
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), want)
    for old, new in zip(sparse_layers(model), sparse_layers(loaded), strict=True):
        np.testing.assert_array_equal(new.matrix.to_dense(), old.matrix.to_dense())
        assert new.get_config() == old.get_config()
    loaded.fit(x, y, verbose=0)

    # Into a model whose functions are traced, and whose pattern was another.
    model.save_weights(tmp_path / "model.weights.h5")
    other = keras.models.clone_model(model)
    other.predict(x, verbose=0)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other.predict(x, verbose=0), want)

    model.export(str(tmp_path / "saved"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(served.serve(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_dtype_policies(kind, policy):
    model = model_of(kind)
    low = model_of(kind, dtype=policy) if kind != "attention" else None
    if low is None:
        keras.config.set_dtype_policy(policy)
        low = model_of(kind)
    low.set_weights(model.get_weights())
    x, _ = batch_of(model)
    y = low(x)
    assert low.get_layer("it").compute_dtype == policy.removeprefix("mixed_")
    np.testing.assert_allclose(tf.cast(y, tf.float32), model(x), rtol=0.05, atol=0.05)
    low.compile("sgd", "mse")
    low.fit(x, np.zeros(y.shape), verbose=0)


def test_weights_of_another_seed_can_be_loaded(tmp_path):
    """Sizes do not depend on the seed, so that a script that makes its model anew can load."""
    one, two = (keras.Sequential([keras.Input((700,)), at.SparseDense(50)]) for _ in range(2))
    assert one.layers[0].seed != two.layers[0].seed
    two(np.ones((1, 700)))
    one.save_weights(tmp_path / "w.weights.h5")
    two.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_array_equal(one.layers[0].matrix.to_dense(), two.layers[0].matrix.to_dense())


def test_weights_of_another_pattern_are_refused(tmp_path):
    def model(matrix):
        return keras.Sequential([keras.Input((24,)), at.SparseDense.from_matrix(matrix, name="fc")])

    rng = np.random.default_rng(7)
    model(some_matrix()).save_weights(tmp_path / "w.weights.h5")
    other = model(at.SparseMatrix.from_dense(rng.random((24, 21)) < 0.5, format="unstructured"))
    with pytest.raises(ValueError, match="'.*fc' cannot load these weights, as they have another"):
        other.load_weights(tmp_path / "w.weights.h5")


@pytest.mark.parametrize("kind", ["einsum", "partial blocks"])
def test_compiled_by_xla(kind):
    model = model_of(kind)
    assert all(layer.supports_jit for _, layer in at.layers.walk(model))
    x, y = batch_of(model)
    want = model.predict(x, verbose=0)
    weights = model.get_weights()
    trained = {}
    for jit_compile in (False, True):
        model.set_weights(weights)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        assert model.jit_compile == jit_compile
        np.testing.assert_allclose(model.predict(x, verbose=0), want, rtol=1e-4, atol=1e-4)
        model.fit(x, y, verbose=0)
        trained[jit_compile] = model.get_weights()
    for a, b in zip(*trained.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_two_replicas_train_as_one():
    x, y = x_of(mlp(), batch=32), np.ones((32, 32), np.float32)

    def trained(strategy):
        with strategy.scope():
            model = at.sparsify(mlp(), min_sparsity=0.8)
            model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    keras.utils.set_random_seed(0)
    one = trained(tf.distribute.get_strategy())
    keras.utils.set_random_seed(0)
    two = trained(at.mirrored_strategy(["CPU:0", "CPU:1"]))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
