"""`cluster`: k-means against its definition; few values after each step, zeros kept, however it trains."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.clustering import ClusterConstraint, k_means, nearest

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 8, 8, 2)).astype("float32"), RNG.normal(size=(24, 5)).astype("float32")


def cnn():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            L.Conv2D(8, 3, activation="relu", name="conv"),
            L.Flatten(),
            L.Dense(5, name="head"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def kernels(model):
    return [v for v in model.trainable_variables if len(v.shape) > 1]


def values(model):
    return [np.unique(v.numpy().astype("float32")).size for v in kernels(model)]


class Watch(keras.callbacks.Callback):
    """How many values each kernel has after each batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(values(self.model))


# k-means on a line


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e3, 1e3, width=32), max_size=60), st.integers(1, 8))
def test_k_means_is_where_lloyds_algorithm_ends(numbers, k):
    centers = k_means(np.array(numbers), k)
    assert 1 <= len(centers) <= k and (np.diff(centers) >= 0).all()
    if not numbers:
        return
    own = nearest(np.array(numbers), centers)
    distances = np.abs(np.subtract.outer(numbers, centers))
    reached = np.take_along_axis(distances, own[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(reached, distances.min(axis=1), atol=1e-9)  # the nearest
    for i in set(own):
        members = np.array(numbers)[own == i]
        np.testing.assert_allclose(centers[i], members.mean(), rtol=1e-6, atol=1e-6)  # their mean
    if len(set(numbers)) <= k:
        np.testing.assert_array_equal(centers, sorted(set(numbers)))


def test_k_means_is_about_as_good_as_scikit_learns():
    from sklearn.cluster import KMeans

    x = RNG.normal(size=5000)
    peer = KMeans(16, n_init=1, random_state=0).fit(x[:, None])
    centers = k_means(x, 16)
    ours = np.sum((x - centers[nearest(x, centers)]) ** 2)
    assert ours < 1.25 * peer.inertia_


# The constraint


def test_a_step_moves_clusters_by_their_mean_gradient():
    model = cnn()
    at.cluster(model, 4)
    conv, before = model.layers[0].kernel, model.layers[0].kernel.numpy()
    optimizer = keras.optimizers.SGD(0.1)
    gradient = RNG.normal(size=before.shape).astype("float32")
    optimizer.apply([gradient], [conv])
    for value in np.unique(before):
        members = before == value
        moved = conv.numpy()[members]
        np.testing.assert_allclose(moved, value - 0.1 * gradient[members].mean(), rtol=1e-5)
        assert np.unique(moved).size == 1


def test_a_step_that_moves_nothing_moves_nothing():
    """A mean of many equal weights is that weight: there is no drift."""
    model = keras.Sequential([keras.Input((1024,)), L.Dense(1024)])
    at.cluster(model, 4)
    kernel, before = model.layers[0].kernel, model.layers[0].kernel.numpy()
    optimizer = keras.optimizers.SGD(0.1)
    for _ in range(5):
        optimizer.apply([np.zeros(kernel.shape, "float32")], [kernel])
    np.testing.assert_array_equal(kernel.numpy(), before)


@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str
)
def test_fit(options):
    model = cnn()
    report = at.cluster(model, 16)
    assert [e.layer for e in report.done] == ["conv", "head"]
    assert all("16 values, " in e.note and " off" in e.note for e in report.done)
    assert report is at.report_of(model)
    before, watch = [v.numpy() for v in kernels(model)], Watch()
    model.compile(keras.optimizers.Adam(0.01), "mse", **options)
    losses = model.fit(X, Y, batch_size=4, epochs=3, verbose=0, callbacks=[watch]).history["loss"]
    assert watch.seen and all(n <= 16 for seen in watch.seen for n in seen)
    assert watch.seen[-1] == [16, 16]
    assert losses[-1] < losses[0]
    assert all((a != v.numpy()).any() for a, v in zip(before, kernels(model), strict=True))


def test_custom_loop():
    model, optimizer = cnn(), keras.optimizers.SGD(0.01)
    at.cluster(model, 8, exclude="head")

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    for _ in range(3):
        step(X, Y)
        assert values(model)[0] == 8 and values(model)[1] > 100


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_mirrored_strategy_and_low_precision(policy):
    keras.config.set_dtype_policy(policy)
    with at.mirrored_strategy(["CPU:0", "CPU:1"]).scope():
        model = cnn()
        model.compile("sgd", "mse")
    at.cluster(model, 8)
    watch = Watch()
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[watch])
    assert all(n <= 8 for seen in watch.seen for n in seen) and len(watch.seen) == 6
    for v in kernels(model):  # replicas hold the same
        copies = [tf.cast(part, tf.float32).numpy() for part in v.value.values]
        np.testing.assert_array_equal(*copies)


# With pruning


@pytest.mark.filterwarnings("ignore:Training ends at step")
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_pruned_model_stays_sparse_while_it_is_clustered(scope):
    """Also while the schedule goes on: 16 values, one of them zero."""
    model = cnn()
    at.prune(model, at.PolynomialDecay(0.8, end_step=12, frequency=3), scope=scope)
    model.fit(X, Y, batch_size=4, verbose=0)
    so_far = at.sparsity(model).total
    at.cluster(model, 16)
    assert values(model) == [16, 16] and at.sparsity(model).total == so_far
    watch = Watch()
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[watch])
    assert all(n <= 16 for seen in watch.seen for n in seen)
    assert so_far < 0.8 and at.sparsity(model).total == pytest.approx(0.8, abs=2e-3)
    at.strip_pruning(model)  # the clusters stay, and the zeros are no longer held
    assert all(isinstance(v.constraint, ClusterConstraint) for v in kernels(model))


def test_zeros_without_a_mask_stay_zero():
    model = cnn()
    at.prune(model, at.OneShot(0.5))
    at.strip_pruning(model)
    zero = [v.numpy() == 0 for v in kernels(model)]
    at.cluster(model, 4)
    assert values(model) == [4, 4]
    for v, z in zip(kernels(model), zero, strict=True):
        np.testing.assert_array_equal(v.numpy() == 0, z)


def test_a_clustered_model_can_be_pruned():
    model = cnn()
    at.cluster(model, 16)
    at.prune(model, at.ConstantSparsity(0.5))
    model.fit(X, Y, batch_size=4, verbose=0)
    assert at.sparsity(model).total == 0.5
    assert all(n <= 17 for n in values(model))


# The end of it


def test_strip_clustering_frees_the_weights_from_where_they_are():
    model = cnn()
    at.cluster(model, 8)
    model.fit(X, Y, batch_size=4, verbose=0)
    before = [v.numpy() for v in kernels(model)]
    report = at.strip_clustering(model, exclude="head")
    assert report is at.report_of(model) and [e.layer for e in report.done] == ["conv"]
    assert report.done[0].note == "kernel (3, 3, 2, 8): 8 values, as is"
    assert "head: still clustered: excluded" in [f"{e.layer}: {e.note}" for e in report.skipped]
    for a, v in zip(before, kernels(model), strict=True):
        np.testing.assert_array_equal(a, v.numpy())
    model.fit(X, Y, batch_size=4, verbose=0)
    assert values(model)[0] > 100 and values(model)[1] == 8
    at.strip_clustering(model)
    with pytest.raises(ValueError, match="No weight of model .* is clustered"):
        at.strip_clustering(model)
    with pytest.raises(ValueError, match="No layer matches 'heat'"):
        at.strip_clustering(model, include="heat")


def test_what_else_holds_a_weight_outlives_its_clusters():
    model = keras.Sequential(
        [keras.Input((8,)), L.Dense(8, kernel_constraint=keras.constraints.NonNeg())]
    )
    kernel = model.layers[0].kernel
    at.prune(model, at.ConstantSparsity(0.5))
    at.cluster(model, 4)
    at.strip_clustering(model)
    assert isinstance(kernel.constraint.inner, keras.constraints.NonNeg)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(RNG.normal(size=(8, 8)), RNG.normal(size=(8, 8)), verbose=0)
    assert np.mean(kernel.numpy() == 0) >= 0.5 and kernel.numpy().min() >= 0
    at.cluster(model, 4)
    at.strip_pruning(model)
    at.strip_clustering(model)
    assert isinstance(kernel.constraint, keras.constraints.NonNeg)


# From file to file


def test_loaded_and_clustered_again_it_goes_on(tmp_path):
    model = cnn()
    at.prune(model, at.OneShot(0.5))
    at.cluster(model, 8)
    model.fit(X, Y, batch_size=4, verbose=0)
    model.save(tmp_path / "m.keras")
    new = keras.models.load_model(tmp_path / "m.keras")
    assert not any(v.constraint for v in new.weights)
    at.prune(new, at.OneShot(0.5))
    at.cluster(new, 8)
    for a, b in zip(model.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for m in (model, new):
        m.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_clusters_follow_from_weights_that_were_restored():
    model, other = cnn(), cnn()
    for v in kernels(other):
        v.assign(RNG.normal(size=v.shape))
    for m in (model, other):
        at.cluster(m, 8)
    model.set_weights(other.get_weights())
    for m in (model, other):
        m.compile(keras.optimizers.SGD(0.01), "mse")
        m.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_file_shrinks():
    model = keras.Sequential([keras.Input((256,)), L.Dense(256)])
    before = at.benchmark.file_size(model)[1]
    at.cluster(model, 16)
    assert at.benchmark.file_size(model)[1] < before / 4


# Models


def test_nested_shared_and_subclassed_models():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            shared = L.Dense(16, name="shared")
            self.body = keras.Sequential([shared, L.ReLU(), shared, L.LayerNormalization()])
            self.attention = L.MultiHeadAttention(2, 8, name="attention")
            self.lstm = L.LSTM(8, name="lstm")

        def call(self, x):
            x = self.body(x)
            return self.lstm(self.attention(x, x))

    model = Net()
    x = RNG.normal(size=(4, 6, 16)).astype("float32")
    model(x)
    at.cluster(model, 16)
    model.compile("adam", "mse")
    model.fit(x, np.zeros((4, 8)), verbose=0)
    clustered = [v for v in model.weights if isinstance(v.constraint, ClusterConstraint)]
    assert len(clustered) == 1 + 4 + 2
    assert all(np.unique(v.numpy()).size == 16 for v in clustered)


@pytest.mark.parametrize(
    "family", ["MobileNetV3Small", pytest.param("MobileNetV2", marks=pytest.mark.full)]
)
def test_families(family):
    model = getattr(keras.applications, family)(
        input_shape=(32, 32, 3), weights=None, classes=2, classifier_activation=None
    )
    report = at.cluster(model, 16)
    assert len(report.done) > 30
    model.compile("sgd", "mse")
    model.train_on_batch(np.ones((2, 32, 32, 3)), np.zeros((2, 2)))
    clustered = [v for v in model.weights if isinstance(v.constraint, ClusterConstraint)]
    assert all(np.unique(v.numpy()).size <= 16 for v in clustered)


def test_the_constraint_that_was_there_stays_in_force():
    model = keras.Sequential(
        [keras.Input((8,)), L.Dense(8, kernel_constraint=keras.constraints.NonNeg())]
    )
    at.cluster(model, 4)
    at.cluster(model, 3)  # takes the place of the first
    assert isinstance(model.layers[0].kernel.constraint.inner, keras.constraints.NonNeg)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(RNG.normal(size=(8, 8)), RNG.normal(size=(8, 8)), verbose=0)
    kernel = model.layers[0].kernel.numpy()
    assert kernel.min() >= 0 and np.unique(kernel).size <= 3


def test_what_cannot_be_clustered_is_a_clear_error():
    model = cnn()
    for wrong in (1, 2.0, True, "16"):
        with pytest.raises(ValueError, match="clusters must be"):
            at.cluster(model, wrong)
    with pytest.raises(ValueError, match="No layer matches 'heat'"):
        at.cluster(model, include="heat")
    with pytest.raises(ValueError, match=r"can be clustered(.|\n)*excluded"):
        at.cluster(model, exclude=["conv", "head"])
    before = model.layers[0].kernel.numpy()
    model.layers[2].kernel.assign(np.full(model.layers[2].kernel.shape, np.nan))
    with pytest.raises(ValueError, match="of layer 'head' is not finite"):
        at.cluster(model)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), before)
    with pytest.raises(ValueError, match="not built"):
        at.cluster(keras.Sequential([L.Dense(2)]))
