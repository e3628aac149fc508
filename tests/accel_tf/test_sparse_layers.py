"""SparseDense and sparsify: equal to the dense layers they stand for, saved, trained, distributed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at


def zero_out(model, sparsity=0.9, seed=0):
    """Sets a random fraction of each kernel, in every nested layer, to zero; keeps the scale of sums."""
    rng = np.random.default_rng(seed)
    for _, layer in at.layers.walk(model):
        if isinstance(getattr(layer, "kernel", None), keras.Variable):
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            mask = rng.random(kernel.shape) >= sparsity
            layer.kernel.assign(kernel * mask / np.sqrt(1 - sparsity))
    return model


def mlp(**kwargs):
    return zero_out(
        keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(128, activation="relu", name="wide", **kwargs),
                keras.layers.Dense(32, use_bias=False, name="thin", **kwargs),
            ]
        )
    )


def x_of(model, batch=5, seed=1):
    shape = [batch, *(size or 7 for size in model.input_shape[1:])]
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_function(a, b, atol=1e-4):
    x = x_of(a)
    np.testing.assert_allclose(a(x), b(x), rtol=1e-4, atol=atol)


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
    assert [v.name for v in layer.non_trainable_weights] == ["row_pointers", "columns"]


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


def test_keras_file_restores_the_pattern(tmp_path):
    model = at.sparsify(mlp())
    model.compile("adam", "mse")
    model.fit(x_of(model), np.zeros((5, 32)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for old, new in zip(model.layers, loaded.layers, strict=True):
        np.testing.assert_array_equal(new.matrix.to_dense(), old.matrix.to_dense())
    np.testing.assert_array_equal(loaded(x_of(model)), model(x_of(model)))
    loaded.fit(x_of(model), np.zeros((5, 32)), verbose=0)


def test_saved_model_round_trip(tmp_path):
    model = at.sparsify(mlp())
    model.export(str(tmp_path), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_allclose(loaded.serve(x_of(model)), model(x_of(model)), rtol=1e-6, atol=1e-6)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model = mlp()
    fast = at.sparsify(model)
    layer = fast.get_layer("wide")
    assert layer.values.dtype == "float32" and layer.compute_dtype == "float16"
    x = x_of(model)
    assert fast(x).dtype == tf.float16
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-2, atol=1e-2)
    fast.compile("adam", "mse")
    fast.fit(x, np.zeros((5, 32)), verbose=0)


def test_keras_does_not_compile_it_with_xla():
    model = at.sparsify(mlp())
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile("adam", "mse", jit_compile=True)
    assert not model.jit_compile
    model.fit(x_of(model), np.zeros((5, 32)), verbose=0)


def test_two_replicas_train_as_one():
    x, y = x_of(mlp(), batch=32), np.ones((32, 32), np.float32)

    def trained(strategy):
        with strategy.scope():
            model = at.sparsify(mlp())
            model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    keras.utils.set_random_seed(0)
    one = trained(tf.distribute.get_strategy())
    keras.utils.set_random_seed(0)
    two = trained(at.mirrored_strategy(["CPU:0", "CPU:1"]))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- sparsify ----------------------------------------------------------------------------------------


def test_sparsify_reports_every_layer_with_weights():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(16, 3, name="conv")(inputs)
    x = keras.layers.Conv2D(32, 1, activation="relu", name="pointwise")(x)
    x = keras.layers.Conv2D(32, 1, strides=2, name="strided")(x)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(64, name="sparse")(x)
    model = zero_out(keras.Model(inputs, keras.layers.Dense(10, name="dense")(x)))
    model.get_layer("dense").kernel.assign(np.ones((64, 10)))
    before = [w.numpy() for w in model.weights]

    fast = at.sparsify(model)

    report = at.report_of(fast)
    assert {e.layer for e in report.done} == {"pointwise", "sparse"}
    notes = {e.layer: e.note for e in report.skipped}
    assert notes.keys() == {"conv", "strided", "bn", "dense"}
    assert notes["conv"] == "Conv2D 3×3: only 1×1 has a sparse form"
    assert "strides=(2, 2)" in notes["strided"]
    assert notes["bn"] == "BatchNormalization has no sparse form"
    assert notes["dense"] == "Dense (64, 10), 0.0 % zeros, less than min_sparsity = 0.8"
    assert [layer.name for layer in fast.layers[1:]] == [layer.name for layer in model.layers[1:]]
    assert fast.name == model.name
    assert_same_function(model, fast)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_sparsify_nested_and_shared():
    shared = keras.layers.Dense(24, activation="relu", name="shared")
    inner_in = keras.Input((24,))
    inner = keras.Model(
        inner_in, keras.layers.Dense(24, name="in_block")(shared(inner_in)), name="block"
    )
    inputs = keras.Input((24,))
    model = zero_out(keras.Model(inputs, shared(inner(inner(shared(inputs))))))
    fast = at.sparsify(model)
    assert sum(isinstance(layer, at.SparseDense) for _, layer in at.layers.walk(fast)) == 2
    assert_same_function(model, fast)
    assert {e.layer.split("/")[-1] for e in at.report_of(fast).done} == {"shared", "in_block"}


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
    fast = at.sparsify(model)
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
    fast = at.sparsify(model)
    assert fast.layers[0].matrix.nnz == 0
    assert_same_function(model, fast)
    fast.compile("sgd", "mse")
    fast.fit(np.ones((4, 6)), np.ones((4, 4)), verbose=0)


@pytest.mark.parametrize("name", ["MobileNetV2", "EfficientNetV2B0"])
def test_sparsify_applications(name):
    model = zero_out(
        getattr(keras.applications, name)(
            weights=None, input_shape=(96, 96, 3), classes=10, classifier_activation=None
        )
    )
    fast = at.sparsify(model)
    assert len(at.report_of(fast).done) > 20
    x = 255 * np.random.default_rng(0).random((2, 96, 96, 3)).astype(np.float32)
    want = np.asarray(model(x))
    np.testing.assert_allclose(fast(x), want, atol=1e-4 * np.abs(want).max())
    assert np.abs(want[0] - want[1]).max() > 1e-2 * np.abs(want).max()  # the signal gets through


def test_sparsity_counts_the_zeros_that_a_sparse_layer_does_not_store():
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10, name="head")])
    at.prune(model, at.ConstantSparsity(0.9))
    fast = at.sparsify(model)
    assert at.sparsity(fast).rows == at.sparsity(model).rows
    assert at.sparsity(fast).total == 0.9
