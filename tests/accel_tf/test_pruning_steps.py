"""Schedules in a training: functions, cycles, epochs, and a training too short for its schedule."""

import keras
import numpy as np
import pytest

import accel_tf as at

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(48, 10)).astype("float32"), RNG.normal(size=(48, 10)).astype("float32")


def dense():
    return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10, name="head")])


def levels_of(model, **kwargs):
    """The sparsity after each of 12 steps of `fit`."""
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(at.sparsity(self.model).total)

    model.compile(keras.optimizers.SGD(0.1), "mse", **kwargs)
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[Watch()])
    return seen


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_function_that_is_not_tensorflows(jit_compile):
    plan = {0: 0.0, 3: 0.25, 6: 0.75, 9: 0.5, 12: 0.9}
    schedule = at.FunctionSchedule(plan.__getitem__, end_step=12, frequency=3)
    model = dense()
    at.prune(model, schedule)
    expected = [plan[t // 3 * 3] for t in range(1, 13)]
    assert levels_of(model, jit_compile=jit_compile) == pytest.approx(expected)


def test_a_bare_function_is_followed_until_the_end_of_training():
    model = dense()
    report = at.prune(model, lambda step: step / 1000, steps=500)
    assert report.done[0].note == "kernel (10, 10): 0.5 by step 500"
    schedule = model.layers[0].kernel.constraint.masks.schedule
    assert isinstance(schedule, at.FunctionSchedule) and schedule.frequency == 100
    with pytest.raises(ValueError, match=r"Until which step(.|\n)*steps=(.|\n)*FunctionSchedule\("):
        at.prune(model, lambda step: step / 1000)
    with pytest.raises(ValueError, match="a schedule of accel_tf or a function(.|\n)*OneShot"):
        at.prune(model, at.OneShot, steps=500)


def test_cycles_grow_back_what_the_optimizer_moved_most():
    model = dense()
    at.prune(model, at.Cyclical(0.8, 9, cycles=2, initial_sparsity=0.4, power=1, frequency=1))
    rise = [0.4, 0.5, 0.6, 0.7, 0.8]
    assert levels_of(model) == pytest.approx([*rise[1:], *rise, 0.8, 0.8, 0.8])
    model = dense()
    at.prune(model, at.Cyclical(0.8, 3, cycles=2, initial_sparsity=0.4, frequency=1))
    kernel = model.layers[0].kernel
    optimizer = keras.optimizers.SGD(0.01)
    model.compile(optimizer, "mse")
    optimizer.apply([kernel * 0, keras.ops.zeros(10)], model.trainable_variables)  # at 0.8
    pruned = kernel.numpy() == 0
    gradient = RNG.normal(size=(10, 10)).astype("float32")
    optimizer.apply([gradient, np.zeros(10, "float32")], model.trainable_variables)  # at 0.4
    grown = pruned & (kernel.numpy() != 0)
    assert grown.sum() >= 40
    assert np.abs(gradient[grown]).min() > np.abs(gradient[pruned & ~grown]).max()
    np.testing.assert_allclose(kernel.numpy()[grown], -0.01 * gradient[grown], rtol=1e-5)


@pytest.mark.parametrize("kind", [at.CosineDecay, at.ExponentialDecay, at.PolynomialDecay])
def test_epochs(kind):
    model = dense()
    schedule = kind(0.6, begin_epoch=1 / 3, end_epoch=1, initial_sparsity=0.2, frequency=4)
    with pytest.raises(ValueError, match=r"counts in epochs(.|\n)*steps_per_epoch=…"):
        at.prune(model, schedule)
    report = at.prune(model, schedule, steps_per_epoch=12)
    assert report.done[0].note == "kernel (10, 10): 0.6 by step 12"
    seen = levels_of(model)
    assert seen[2:4] == pytest.approx([0, 0.2]) and seen[11] == pytest.approx(0.6)


def test_one_shot_chooses_once():
    model = dense()
    at.prune(model, at.OneShot(0.5, begin_step=2))
    seen = levels_of(model)
    assert seen == pytest.approx([0.0] + [0.5] * 11)
    mask = model.layers[0].kernel.numpy() != 0
    model.fit(X, Y, epochs=3, verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy() != 0, mask)


def test_a_training_too_short_for_its_schedule():
    model = dense()
    for schedule in (
        at.PolynomialDecay(0.9, end_step=1000),
        at.OneShot(0.9, begin_step=1000),
        at.ConstantSparsity(0.9, begin_step=1000),
    ):
        with pytest.raises(ValueError, match="ends at step 999, too early(.|\n)*on to step 1000"):
            at.prune(model, schedule, steps=999)
        at.prune(model, schedule, steps=1000)
    with pytest.raises(ValueError, match="ends at step 23, too early(.|\n)*on to step 24"):
        at.prune(model, at.OneShot(0.9, begin_epoch=2), steps=23, steps_per_epoch=12)
    with pytest.raises(ValueError, match="steps must be ≥ 1. Received: 0"):
        at.prune(model, at.OneShot(0.9), steps=0)
