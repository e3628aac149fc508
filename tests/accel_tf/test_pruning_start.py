"""What `prune`, `train_sparse` and `cluster` say when training starts, and when they say nothing."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.pruning._start import ends_early, prunes_nothing

X, Y = np.ones((64, 8), "float32"), np.ones((64, 4), "float32")
LONG = at.PolynomialDecay(0.9, end_step=1000)


def model(optimizer="sgd", **compiled):
    new = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, name="a"), keras.layers.Dense(4, name="b")]
    )
    new.compile(optimizer, "mse", **compiled)
    return new


def said(train) -> list[str]:
    """The warnings of the library while `train` runs, as strings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train()
    return [str(w.message) for w in caught if "accel_tf" in w.filename]


def fit(new, **kwargs):
    """Sixteen batches an epoch."""
    return said(lambda: new.fit(X, Y, **{"batch_size": 4, "verbose": 0, **kwargs}))


@pytest.mark.parametrize(
    "compiled",
    [{}, {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 5}],
    ids=str,
)
def test_a_schedule_that_never_prunes_is_a_warning_once(compiled):
    new = model(**compiled)
    at.prune(new, LONG)
    (text,) = fit(new)
    assert "prunes nothing: it goes from step 0 to step 16, and the next update that prunes" in text
    assert "at step 100 of PolynomialDecay(final_sparsity=0.9, end_step=1000" in text
    assert "prune(model, PolynomialDecay(final_sparsity=0.9, end_step=12, frequency=1))" in text
    # What it says to write prunes.
    at.prune(new, at.PolynomialDecay(final_sparsity=0.9, end_step=12, frequency=1))
    assert fit(new) == []
    assert at.sparsity(new).total == pytest.approx(0.9, abs=0.01)


def test_a_schedule_that_ends_after_the_training_is_a_warning_with_the_sparsity_to_come():
    new = model()
    at.prune(new, at.PolynomialDecay(0.75, end_step=40, power=1, frequency=8), scope="global")
    (text,) = fit(new)
    assert (
        "ends at step 16, before the schedule does, which reaches its highest sparsity at step 40"
    )
    assert "The sparsity will be 0.3, not 0.75." in text
    assert at.sparsity(new).total == pytest.approx(0.3, abs=0.01)
    # A training that goes on to the end of the schedule.
    new.compile("sgd", "mse")
    assert fit(new, epochs=2) == []
    assert at.sparsity(new).total == 0.75


def test_steps_are_those_of_the_optimizer_with_gradient_accumulation():
    for begin, warned in ((4, 0), (5, 1)):
        new = model(keras.optimizers.SGD(gradient_accumulation_steps=4))
        at.prune(new, at.OneShot(0.5, begin_step=begin))
        texts = fit(new)
        assert len(texts) == warned
    assert "from step 0 to step 4" in texts[0]


def test_nothing_is_said_where_the_length_is_unknown_or_the_history_is_of_another_training():
    new = model()
    assert fit(new) == []
    at.prune(new, LONG)
    # A loop of one's own, after `fit` of the dense model has left its history.
    assert said(lambda: new.train_on_batch(X, Y)) == []
    at.prune(new, LONG)
    batches = ((X[:4], Y[:4]) for _ in range(3))
    assert said(lambda: new.fit(batches, shuffle=False, verbose=0)) == []


def test_nothing_is_said_of_an_optimizer_that_fit_does_not_use():
    new, own = model(), keras.optimizers.SGD()
    own.build(new.trainable_variables)
    at.prune(new, LONG, optimizer=own)
    assert fit(new) == []


def test_each_call_of_prune_has_its_say():
    new = model()
    at.prune(new, at.ConstantSparsity(0.5, begin_step=20), include="a")
    at.prune(new, at.ConstantSparsity(0.5), include="b")
    (text,) = fit(new)
    assert "at step 20 of ConstantSparsity(sparsity=0.5, begin_step=20" in text
    assert "prune(model, ConstantSparsity(sparsity=0.5, begin_step=12))" in text
    at.strip_pruning(new, include="a")
    assert fit(new) == []


def test_sparsity_log_speaks_for_the_masks():
    new = model()
    at.prune(new, at.PolynomialDecay(0.75, end_step=40, frequency=8))
    (text,) = fit(new, callbacks=[at.SparsityLog()])
    assert "ends at step 16" in text


def test_replicas_say_it_once():
    with at.mirrored_strategy(["CPU:0", "CPU:1"]).scope():
        new = model()
    at.prune(new, at.OneShot(0.5, begin_step=20), include="a")
    at.prune(new, at.ConstantSparsity(0.5), include="b")
    new.set_weights([np.ones(v.shape) for v in new.weights])
    short, replaced = sorted(fit(new), reverse=True)
    assert "prunes nothing" in short and "b/kernel" in replaced


@pytest.mark.parametrize("method", [at.SET, at.RigL])
def test_a_method_that_never_rewires_is_a_warning(method):
    new = model()
    at.train_sparse(new, method(0.75, end_step=1000))
    (text,) = set(fit(new))
    assert (
        "rewires nothing: it goes from step 0 to step 16, and the next rewiring is at step 100"
        in text
    )
    assert f"train_sparse(model, {method.__name__}(0.75, end_step=12, frequency=1))" in text
    at.train_sparse(new, method(0.75, end_step=12, frequency=1))
    assert fit(new) == []


@pytest.mark.parametrize(
    "schedule, now, end, nothing, early",
    [
        (LONG, 0, 99, True, True),
        (LONG, 0, 100, False, True),
        (LONG, 0, 1000, False, False),
        (LONG, 1000, 1001, False, False),
        (LONG, 150, 160, True, True),
        (at.ConstantSparsity(0.5), 0, 1, False, False),
        (at.Cyclical(0.8, 90, cycles=2, frequency=10), 0, 89, False, True),
        (at.FunctionSchedule(lambda step: step / 100, end_step=50, frequency=10), 0, 9, True, True),
    ],
)
def test_too_short_or_not(schedule, now, end, nothing, early):
    assert bool(prunes_nothing(schedule, now, end)) == nothing
    assert bool(ends_early(schedule, now, end)) == early
    if now:
        assert nothing is False or f"initial_step={now})" in prunes_nothing(schedule, now, end)


# Weights that were replaced


def dense_weights(new):
    return [np.random.default_rng(1).normal(size=v.shape) for v in new.weights]


HOLD = {
    "prune": lambda new: at.prune(new, at.ConstantSparsity(0.5)),
    "train_sparse": lambda new: at.train_sparse(new, at.SET(0.5, end_step=16, frequency=8)),
    "cluster": lambda new: at.cluster(new, 4),
}


@pytest.mark.parametrize("verb", HOLD)
def test_weights_that_were_replaced_are_told_of_once(verb, tmp_path):
    new = model()
    dense = dense_weights(new)
    HOLD[verb](new)
    new.set_weights(dense)
    (text,) = fit(new)
    assert text.startswith(f"After {verb}, these weights were replaced")
    assert "a/kernel" in text and "b/kernel" in text and "bias" not in text
    assert f"Load weights first, then call {verb}." in text
    # Weights that come back as the training left them hold what they held.
    new.save_weights(tmp_path / "m.weights.h5")
    assert fit(new) == []
    new.compile("sgd", "mse")
    new.load_weights(tmp_path / "m.weights.h5")
    assert fit(new) == []
    # Loaded before the verb: nothing to say.
    new.set_weights(dense)
    HOLD[verb](new)
    assert fit(new) == []


def test_zeros_of_another_step_are_no_replacement(tmp_path):
    """A checkpoint of the same schedule, later or earlier, has as many zeros as are due."""
    schedule = at.PolynomialDecay(0.8, end_step=32, frequency=4)
    new = model()
    at.prune(new, schedule)
    fit(new)
    new.save_weights(tmp_path / "early.weights.h5")
    fit(new)
    new.compile("sgd", "mse")
    new.optimizer.build(new.trainable_variables)
    new.load_weights(tmp_path / "early.weights.h5")
    other = model()
    at.prune(other, schedule)
    other.compile("sgd", "mse")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "early.weights.h5")
    assert fit(other) == []
    assert at.sparsity(other).total == pytest.approx(0.8, abs=0.01)


def test_a_training_restored_to_before_the_first_update_prunes_nothing_yet():
    new = model()
    at.prune(new, at.OneShot(0.5, begin_step=3))
    for _ in range(4):
        new.train_on_batch(X, Y)
    assert at.sparsity(new).total == 0.5
    dense = dense_weights(new)
    new.set_weights(dense)
    new.optimizer.iterations.assign(0)
    new.train_function = None
    said(lambda: new.train_on_batch(X, Y))
    assert at.sparsity(new).total == 0.0


def test_a_loop_of_ones_own_hears_of_replaced_weights_too():
    new, optimizer = model(), keras.optimizers.SGD()
    at.prune(new, at.ConstantSparsity(0.5), optimizer=optimizer)
    optimizer.build(new.trainable_variables)
    new.set_weights(dense_weights(new))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((new(X) - Y) ** 2)
        optimizer.apply(tape.gradient(loss, new.trainable_variables), new.trainable_variables)

    (text,) = said(lambda: (step(), step()))
    assert "a/kernel" in text
