"""Criteria and scopes of `prune`, against their formulas in NumPy and what scikit-learn finds."""

import keras
import numpy as np
import pytest
import sklearn.linear_model
import tensorflow as tf
from pruned_models import mlp

import accel_tf as at
from accel_tf.pruning._constraint import MaskConstraint
from accel_tf.pruning._distribution import active_weights

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 12)).astype("float32")
Y = RNG.integers(0, 5, 64)


def network(optimizer=None, **kwargs):
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, activation="relu", name="a"),
            layers.Dense(5, name="b"),
        ]
    )
    model.compile(optimizer or keras.optimizers.SGD(0.1), LOSS, **kwargs)
    return model


def kernels(model):
    return [layer.kernel for layer in model.layers]


def masks(model):
    return [v.constraint.masks.masks[id(v)].numpy() for v in kernels(model)]


def fit(model, steps, **kwargs):
    model.fit(X, Y, batch_size=64, epochs=steps, shuffle=False, verbose=0, **kwargs)


def gradients(model):
    with tf.GradientTape() as tape:
        loss = LOSS(Y, model(X))
    return [g.numpy() for g in tape.gradient(loss, [v.value for v in kernels(model)])]


def largest(scores, count):
    keep = np.zeros(scores.size, bool)
    keep[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return keep.reshape(scores.shape)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_movement_is_the_sum_of_weight_times_step(scope, jit_compile):
    model, twin = network(jit_compile=jit_compile), network()
    at.prune(model, at.OneShot(0.5, begin_step=4), criterion=at.Movement(), scope=scope)
    scores = [np.zeros(v.shape) for v in kernels(twin)]
    for _ in range(4):
        before = [v.numpy() for v in kernels(twin)]
        slopes = gradients(twin)
        fit(twin, 1)
        for score, w, g in zip(scores, before, slopes, strict=True):
            score -= 0.1 * w * g  # with plain SGD the paper's score
    fit(model, 6)
    if scope == "global":
        every = largest(np.concatenate([s.ravel() for s in scores]), 136)
        expected = [
            part.reshape(s.shape) for part, s in zip(np.split(every, [192]), scores, strict=True)
        ]
    else:
        expected = [largest(s, s.size // 2) for s in scores]
    magnitude = [largest(np.abs(v.numpy()), v.shape.num_elements() // 2) for v in kernels(twin)]
    for mask, mine, others, v in zip(
        masks(model), expected, magnitude, kernels(model), strict=True
    ):
        np.testing.assert_array_equal(mask, mine)
        assert (mask != others).any()
        np.testing.assert_array_equal(v.numpy() != 0, mask)


def test_movement_brings_a_weight_back_when_others_fall_below():
    """A weight of score 0 that was pruned first; then another moves towards zero."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    (w,) = model.weights
    w.assign([[1.0], [1.0]])
    optimizer = keras.optimizers.SGD(0.1)
    at.prune(
        model,
        at.ConstantSparsity(0.5, begin_step=1, frequency=1),
        criterion=at.Movement(),
        optimizer=optimizer,
    )
    optimizer.build(model.trainable_variables)
    optimizer.apply([tf.constant([[-1.0], [0.0]])])  # the first moves away from zero, and stays
    np.testing.assert_allclose(w, [[1.1], [0.0]])
    optimizer.apply([tf.constant([[2.0], [-1.0]])])  # 0.1 − 1.1 · 0.2 is below zero
    np.testing.assert_allclose(w, [[0.0], [0.1]])


def test_movement_goes_on_from_what_is_pruned_already():
    model = network()
    at.prune(model, at.ConstantSparsity(0.5))
    zeros = [v.numpy() == 0 for v in kernels(model)]
    schedule = at.PolynomialDecay(0.8, end_step=8, initial_sparsity=0.2, frequency=4)
    assert schedule.sparsity_at(4) > 0.5
    at.prune(model, at.ConstantSparsity(0.5), criterion=at.Movement(), initial_step=100)
    for v, zero in zip(kernels(model), zeros, strict=True):
        np.testing.assert_array_equal(v.numpy() == 0, zero)


@pytest.mark.parametrize("batch_size", [256, 7])
def test_taylor_is_weight_times_gradient(batch_size):
    rng = np.random.default_rng(3)
    x, w, y = rng.normal(size=(50, 10)), rng.normal(size=(10, 6)), rng.normal(size=(50, 6))
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(6, use_bias=False)])
    model.set_weights([w])
    gradient = 2 / y.size * x.T @ (x @ w - y)
    at.prune(model, at.OneShot(0.7), criterion=at.Taylor(x, y, "mse", batch_size=batch_size))
    np.testing.assert_array_equal(model.weights[0].numpy() != 0, largest(np.abs(w * gradient), 18))


@pytest.mark.filterwarnings("ignore:Training ends at step")
def test_a_gradual_schedule_prunes_in_taylors_order():
    model = network()
    scores = [np.abs(v.numpy() * g) for v, g in zip(kernels(model), gradients(model), strict=True)]
    schedule = at.PolynomialDecay(0.75, end_step=4, frequency=2)
    at.prune(model, schedule, criterion=at.Taylor(X, Y))
    assert at.sparsity(model).total == 0
    for step in (2, 4):
        fit(model, 2)
        for mask, score in zip(masks(model), scores, strict=True):
            kept = round(score.size * (1 - schedule.sparsity_at(step)))
            np.testing.assert_array_equal(mask, largest(score, kept))


def test_taylor_with_several_inputs_and_outputs_leaves_the_metrics_alone():
    a, b = keras.Input((12,), name="left"), keras.Input((12,), name="right")
    joined = keras.layers.Dense(8, name="joined")(keras.layers.Concatenate()([a, b]))
    outputs = {n: keras.layers.Dense(5, name=n)(joined) for n in ("one", "two")}
    model = keras.Model({"left": a, "right": b}, outputs)
    model.compile("sgd", {"one": LOSS, "two": LOSS}, metrics={"one": ["accuracy"], "two": []})
    x, y = {"left": X, "right": 2 * X}, {"one": Y, "two": Y[::-1].copy()}
    at.prune(model, at.OneShot(0.5), criterion=at.Taylor(x, y, batch_size=20))
    assert [row[-1] for row in at.sparsity(model).rows] == [0.5] * 4
    model.evaluate(x, y, verbose=0)  # builds them
    trackers = [m for m in model.metrics if isinstance(m, keras.metrics.Mean)]
    model.reset_metrics()
    at.prune(model, at.OneShot(0.6), criterion=at.Taylor(x, y))
    assert len(trackers) == 3 and all(m.count.numpy() == 0 for m in trackers)


def test_soft_threshold_is_the_lasso():
    """Proximal gradient descent on least squares: the iterates of NumPy, the limit of scikit-learn."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 20))
    truth = np.where(np.arange(20) < 5, rng.normal(size=20) * 2, 0.0)
    y = x @ truth + 0.1 * rng.normal(size=100)
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(1, use_bias=False)])
    rate, strength, w = 0.1, 0.2, np.zeros(20)
    model.set_weights([w[:, None]])
    model.compile(keras.optimizers.SGD(rate), "mse")
    report = at.prune(model, at.ConstantSparsity(0.0), criterion=at.SoftThreshold(strength))
    assert "SoftThreshold(strength=0.2)" in str(report)
    for _ in range(100):
        w = w - rate * 2 / 100 * x.T @ (x @ w - y)
        w = np.sign(w) * np.maximum(np.abs(w) - rate * strength, 0)
    model.fit(x, y, batch_size=100, epochs=100, verbose=0)
    found = model.get_weights()[0][:, 0]
    np.testing.assert_allclose(found, w, atol=1e-5)
    lasso = sklearn.linear_model.Lasso(alpha=strength / 2, fit_intercept=False).fit(x, y)
    np.testing.assert_allclose(found, lasso.coef_, atol=1e-3)
    np.testing.assert_array_equal(found != 0, lasso.coef_ != 0)
    assert 0 < np.sum(found == 0) == round(20 * at.sparsity(model).total)
    assert not np.signbit(found[found == 0]).any()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_soft_threshold_keeps_at_least_the_schedules_sparsity(jit_compile):
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    model = network(keras.optimizers.Adam(rate), jit_compile=jit_compile)
    at.prune(model, at.ConstantSparsity(0.5), criterion=at.SoftThreshold(0.5))
    fit(model, 10)
    assert all(np.mean(v.numpy() == 0) > 0.5 for v in kernels(model))


def test_soft_threshold_counts_steps_not_batches():
    """With gradient accumulation a step is two batches, with one threshold."""
    once = network(keras.optimizers.SGD(0.1))
    twice = network(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    for model in (once, twice):
        at.prune(model, at.ConstantSparsity(0.0), criterion=at.SoftThreshold(1e-2))
    fit(once, 3)
    twice.fit(np.repeat(X, 2, 0), np.repeat(Y, 2), batch_size=64, epochs=0, verbose=0)
    for _ in range(3):
        for _ in range(2):
            twice.train_on_batch(X, Y)
    for a, b in zip(kernels(once), kernels(twice), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
        assert abs(np.mean(a.numpy() == 0) - np.mean(b.numpy() == 0)) < 0.03


@pytest.mark.parametrize("scope", ["erdos_renyi", "erdos_renyi_kernel"])
def test_erdos_renyi_shares_the_sparsity_by_shape(scope):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(8, 3), keras.layers.Conv2D(16, 3), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers, keras.layers.Dense(10)])
    model.compile("adam", LOSS)
    schedule = at.PolynomialDecay(0.8, end_step=4, frequency=2)
    report = at.prune(model, schedule, scope=scope)
    pruned = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    shapes = [tuple(v.shape) for v in pruned]
    x, y = RNG.normal(size=(16, 8, 8, 3)), RNG.integers(0, 10, 16)
    for step in range(1, 7):
        model.train_on_batch(x, y)
        due = schedule.sparsity_at(schedule.latest_update(step))
        kept = [np.count_nonzero(v.numpy()) for v in pruned]
        assert kept == active_weights(shapes, due, scope)
    densities = [k / np.prod(s) for k, s in zip(kept, shapes, strict=True)]
    counted = [s if scope == "erdos_renyi_kernel" else s[-2:] for s in shapes]
    assert (
        np.argsort(densities).tolist()
        == np.argsort([sum(s) / np.prod(s) for s in counted]).tolist()
    )
    assert abs(at.sparsity(model).total - 0.8) < 1e-3
    assert f"kernel {shapes[2]}: {1 - densities[2]:.4g} by step 4" in str(report)


CRITERIA = {
    "magnitude": at.Magnitude(),
    "movement": at.Movement(),
    "taylor": at.Taylor(X, Y),
    "soft_threshold": at.SoftThreshold(1e-3),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str
)
@pytest.mark.filterwarnings("ignore:Training ends at step")
@pytest.mark.filterwarnings("ignore:This training prunes nothing")
def test_training_goes_on_with_the_restored_masks(name, options):
    """Weights that come back when `fit` begins bring their masks: zeros must not move before."""
    schedule = at.PolynomialDecay(0.8, end_step=12, frequency=4)
    model = network(keras.optimizers.Adam(0.05), **options)
    at.prune(model, schedule, criterion=CRITERIA[name])
    fit(model, 9)  # one step after an update
    expected = masks(model)
    state = [v.numpy() for v in model.variables], [v.numpy() for v in model.optimizer.variables]

    class Restore(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            for v, value in zip(self.model.variables, state[0], strict=True):
                v.assign(value)
            for v, value in zip(self.model.optimizer.variables, state[1], strict=True):
                v.assign(value)

    again = network(keras.optimizers.Adam(0.05), **options)
    again.optimizer.build(again.trainable_variables)
    at.prune(again, schedule, criterion=CRITERIA[name])
    fit(again, 2, callbacks=[Restore()])
    for mask, mine, v in zip(masks(again), expected, kernels(again), strict=True):
        np.testing.assert_array_equal(mask, mine)
        assert not v.numpy()[~mine].any()
        assert v.constraint.masks.latest.numpy() == 8
    fit(again, 1)
    assert kernels(again)[0].constraint.masks.latest.numpy() == 12
    assert all(np.mean(v.numpy() == 0) >= 0.79 for v in kernels(again))


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("scope", ["layer", "global", "erdos_renyi"])
def test_replicas_agree(name, scope):
    strategy = at.mirrored_strategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = network(keras.optimizers.SGD(0.1))
    at.prune(
        model,
        at.PolynomialDecay(0.8, end_step=4, frequency=2),
        criterion=CRITERIA[name],
        scope=scope,
    )
    fit(model, 5)
    local = strategy.experimental_local_results
    zeros = 0
    for v in kernels(model):
        copies = [m.numpy() for m in local(v.constraint.masks.masks[id(v)])]
        np.testing.assert_array_equal(*copies)
        np.testing.assert_array_equal(*(value.numpy() for value in local(v.value)))
        assert not v.numpy()[~copies[0]].any()
        zeros += np.sum(~copies[0])
    assert abs(zeros / 272 - 0.8) < 0.01


@pytest.mark.parametrize("pattern", [at.Block((1, 4)), at.NM(2, 4), at.Channels("mean")], ids=str)
@pytest.mark.parametrize("name", ["movement", "taylor"])
def test_patterns_pool_scores(pattern, name):
    """The scores by hand, pooled by the pattern as magnitudes are."""
    model, twin = network(), network()
    at.prune(model, at.OneShot(0.5, begin_step=1), criterion=CRITERIA[name], pattern=pattern)
    expected = []
    for v, g in zip(kernels(twin), gradients(twin), strict=True):
        score = -v.numpy() * g if name == "movement" else np.abs(v.numpy() * g)
        if isinstance(pattern, at.Channels):
            channel = largest(score.mean(axis=0), round(score.shape[1] / 2))
            expected.append(np.broadcast_to(channel, score.shape))
        elif isinstance(pattern, at.NM):
            groups = score.reshape(-1, 4, score.shape[1])
            ranks = np.argsort(np.argsort(-groups, axis=1), axis=1)
            expected.append((ranks < 2).reshape(score.shape))
        elif score.shape[1] % 4 == 0:
            pooled = score.reshape(score.shape[0], -1, 4).mean(axis=2)
            expected.append(np.repeat(largest(pooled, pooled.size // 2), 4, axis=1))
    fit(model, 1)
    for mask, mine in zip(masks(model), expected, strict=False):
        np.testing.assert_array_equal(mask, mine)


def test_a_frozen_half_is_not_asked_for_scores():
    model = network()
    model.get_layer("a").trainable = False
    model.compile("sgd", LOSS)
    at.prune(model, at.OneShot(0.5), criterion=at.Taylor(X, Y))
    assert isinstance(model.get_layer("b").kernel.constraint, MaskConstraint)
    assert model.get_layer("a").kernel.constraint is None


def test_bad_arguments_are_named():
    model = network()
    before = model.get_weights()
    nan = np.full_like(X, np.nan)
    schedule = at.ConstantSparsity(0.5)
    for kwargs, message in [
        ({"criterion": "magnitude"}, "a criterion: Magnitude.*Received: 'magnitude'"),
        (
            {"criterion": at.Movement()},
            r"Movement\(\) has no scores before training.*step 0 already",
        ),
        (
            {"criterion": at.Movement(), "pattern": at.Channels()},
            r'signs, which the norm.*pass Channels\("mean"\)',
        ),
        (
            {"criterion": at.SoftThreshold(1e-3), "pattern": at.Block((1, 4))},
            "single weights to zero, so it cannot keep Block",
        ),
        ({"criterion": at.Taylor(nan, Y)}, "the gradient of the weight '.*a/kernel' is not finite"),
        (
            {"scope": "erdos_renyi", "pattern": at.NM(2, 4)},
            "same sparsity; scope 'erdos_renyi' does",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            at.prune(model, schedule, **kwargs)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(v.constraint is None for v in model.weights)
    with pytest.raises(ValueError, match="is not compiled: compile it first, or pass Taylor"):
        at.prune(mlp(), schedule, criterion=at.Taylor(X, Y))
    with pytest.raises(ValueError, match=r"as many targets y.*\[64, 63\]"):
        at.Taylor(X, Y[1:])
    with pytest.raises(ValueError, match=r"at least one.*\[0, 0\]"):
        at.Taylor(X[:0], Y[:0])
    with pytest.raises(ValueError, match="strength is the weight of the L1 norm, > 0. Received: 0"):
        at.SoftThreshold(0)


def test_config():
    criterion = at.SoftThreshold(1e-3)
    assert at.SoftThreshold.from_config(criterion.get_config()) == criterion
    assert at.Movement.from_config(at.Movement().get_config()) == at.Movement()
    with pytest.raises(TypeError, match="holds samples"):
        at.Taylor(X, Y).get_config()
