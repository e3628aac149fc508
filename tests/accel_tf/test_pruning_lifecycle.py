"""Pruning from attach to detach: killed and restarted, saved and resumed, compiled anew, stripped."""

import functools
import pathlib
import pickle
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.pruning._constraint import MaskConstraint

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 12)).astype("float32"), RNG.normal(size=(16, 5)).astype("float32")
SCHEDULE = at.PolynomialDecay(0.8, end_step=20, frequency=5)


def mlp(**kwargs):
    """Its rate is so high that pruned weights are not the smallest ones any more after a step."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((12,)), L.Dense(16, "relu", name="a", **kwargs), L.Dense(5, name="b")]
    )
    model.compile(keras.optimizers.Adam(0.3), "mse")
    return model


def nonzero(model):
    kernels = [v.numpy().ravel() for v in model.trainable_variables if len(v.shape) > 1]
    return np.concatenate(kernels) != 0


def train(model, steps):
    """Which weights are not zero after each step."""
    seen = []
    for _ in range(steps):
        model.train_on_batch(X, Y)
        seen.append(nonzero(model))
    return seen


def is_pruned(model):
    return [isinstance(v.constraint, MaskConstraint) for v in model.trainable_variables]


# Killed and restarted


def start(folder, *args):
    folder.mkdir(exist_ok=True)
    script = pathlib.Path(__file__).with_name("interrupted_pruning.py")
    return subprocess.Popen([sys.executable, script, folder, *args], stderr=subprocess.PIPE)


def end(process, folder):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return dict(np.load(folder / "end.npz"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a training that nobody kills ends with; it runs while the test begins."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(folder, "epoch", "30")
    yield functools.cache(lambda: end(process, folder))
    process.kill()
    process.communicate()


@pytest.mark.parametrize("save_freq, resumes_after", [("epoch", 10), ("3", 12)])
def test_killed_and_restarted(uninterrupted, tmp_path, save_freq, resumes_after):
    """Masks at each step, weights, optimizer slots and the step are those of no interruption."""
    process = start(tmp_path, save_freq, "30", "pause")
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "paused").exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()  # SIGKILL: no handler runs, at step 13 of a schedule of 24
        process.communicate()
    assert process.returncode == -9
    assert not (tmp_path / "end.npz").exists()

    restarted = end(start(tmp_path, save_freq, "30"), tmp_path)
    expected = uninterrupted()
    steps = sorted(int(name[5:]) for name in restarted if name.startswith("mask_"))
    assert steps == list(range(resumes_after + 1, 31))
    for name, value in restarted.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    # The masks did change on the way, so that a wrong one would have been seen.
    changes = [t for t in steps[1:] if (expected[f"mask_{t}"] != expected[f"mask_{t - 1}"]).any()]
    assert {16, 20, 24} <= set(changes) <= {12, 16, 20, 24}


# Saved and resumed


def resumed_from(how, model, folder, prune):
    """A new model that has what `model` has, pruned by `prune` before or after it was loaded."""
    if how == "keras":
        model.save(folder / "m.keras")
        new = keras.models.load_model(folder / "m.keras")
        prune(new)
        return new
    new = mlp()
    new.optimizer.build(new.trainable_variables)
    if how.endswith("after prune"):
        prune(new)
    if how.startswith("weights"):
        model.save_weights(folder / "m.weights.h5")
        new.load_weights(folder / "m.weights.h5")
    else:
        tf.train.Checkpoint(model=model).write(folder / "checkpoint")
        tf.train.Checkpoint(model=new).read(folder / "checkpoint").assert_consumed()
    if not how.endswith("after prune"):
        prune(new)
    return new


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "how", ["keras", "weights", "weights after prune", "checkpoint", "checkpoint after prune"]
)
def test_resumed_training_has_the_masks_of_an_uninterrupted_one(how, scope, tmp_path):
    model = mlp()
    at.prune(model, SCHEDULE, scope=scope)
    train(model, 7)

    def prune(new):
        at.prune(new, SCHEDULE, scope=scope, initial_step=int(new.optimizer.iterations))

    resumed = resumed_from(how, model, tmp_path, prune)
    np.testing.assert_array_equal(nonzero(resumed), nonzero(model))
    expected, seen = train(model, 15), train(resumed, 15)
    for step, (a, b) in enumerate(zip(expected, seen, strict=True), start=8):
        np.testing.assert_array_equal(a, b, err_msg=f"step {step}")
    for a, b in zip(model.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_resumed_custom_loop(tmp_path):
    def make(initial_step=0):
        model, optimizer = mlp(), keras.optimizers.Adam(0.3)
        optimizer.build(model.trainable_variables)
        at.prune(model, SCHEDULE, optimizer=optimizer, initial_step=initial_step)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(X) - Y) ** 2)
            grads = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(grads, model.trainable_variables)

        return model, checkpoint, lambda n: [(step(), nonzero(model))[1] for _ in range(n)]

    _, checkpoint, run = make()
    run(7)
    checkpoint.write(tmp_path / "checkpoint")
    expected = run(15)
    _, checkpoint, run = make()
    checkpoint.read(tmp_path / "checkpoint").assert_consumed()
    np.testing.assert_array_equal(run(15), expected)


def test_weights_set_from_elsewhere_are_pruned_by_their_own_magnitude():
    model, dense = mlp(), mlp()
    at.prune(model, at.ConstantSparsity(0.5))
    order = RNG.permutation(192).reshape(12, 16)
    dense.layers[0].kernel.assign(order + 1000.0)
    model.set_weights(dense.get_weights())
    with pytest.warns(UserWarning, match="After prune, these weights were replaced(.|\n)*a/kernel"):
        train(model, 1)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy() != 0, order >= 96)


@pytest.mark.parametrize(
    "copy", [keras.models.clone_model, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_have_the_zeros_and_not_the_schedule(copy):
    model = mlp()
    at.prune(model, at.ConstantSparsity(0.5))
    train(model, 1)
    new = copy(model)
    new.set_weights(model.get_weights())
    assert at.sparsity(new).total == 0.5
    assert is_pruned(model) == [True, False, True, False] and not any(is_pruned(new))
    at.prune(new, at.ConstantSparsity(0.5))
    np.testing.assert_array_equal(nonzero(new), nonzero(model))
    # Each holds masks of its own: training one leaves the other alone.
    before = model.get_weights()
    new.compile("sgd", "mse")
    train(new, 2)
    assert at.sparsity(new).total == 0.5
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Trained by any optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.Adam(0.1),
        lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
        lambda: keras.optimizers.RMSprop(0.1, momentum=0.9, centered=True),
        lambda: keras.optimizers.Lion(0.1, clipnorm=1.0),
        lambda: keras.optimizers.Adagrad(0.1),
        lambda: keras.optimizers.Muon(0.1),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "lion", "adagrad", "muon"],
)
def test_optimizers_step_as_if_the_mask_was_applied_by_hand(make):
    """What they remember of pruned weights revives none of them, and changes no other."""
    model, by_hand = mlp(), mlp()
    at.prune(model, at.ConstantSparsity(0.7))
    masks = [w != 0 if w.ndim > 1 else None for w in model.get_weights()]
    by_hand.set_weights(model.get_weights())
    for m in (model, by_hand):
        m.compile(make(), "mse")
    for _ in range(6):
        model.train_on_batch(X, Y)
        by_hand.train_on_batch(X, Y)
        for v, mask in zip(by_hand.trainable_variables, masks, strict=True):
            if mask is not None:
                v.assign(v * mask)
    for a, b in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        if a.ndim > 1:
            assert np.mean(a == 0) == pytest.approx(0.7, abs=0.01)


def test_masks_survive_another_optimizer():
    model = mlp()
    at.prune(model, at.OneShot(0.7))
    mask = train(model, 2)[-1]
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=True)
    np.testing.assert_array_equal(train(model, 3)[-1], mask)
    model.optimizer = keras.optimizers.RMSprop(0.1)
    model.optimizer.build(model.trainable_variables)
    model.train_function = None
    np.testing.assert_array_equal(train(model, 3)[-1], mask)


@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_schedule_goes_on_when_the_model_is_compiled_anew(scope, accumulate):
    """As with an optimizer that stays: with no momentum, two of them make the same steps as one."""

    def sgd():
        return keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulate)

    def run(anew):
        model = mlp()
        model.compile(sgd(), "mse")
        train(model, 4)  # before pruning: steps that do not count
        at.prune(model, SCHEDULE, scope=scope, initial_step=2)
        seen = []
        for optimizer in (None, sgd, sgd):
            if anew and optimizer:
                model.compile(optimizer(), "mse")
            seen += train(model, 8 * (accumulate or 1))
        return seen

    np.testing.assert_array_equal(run(True), run(False))


def test_another_optimizer_whose_steps_were_restored_is_counted_from_those(tmp_path):
    """A model compiled after `prune`, then restored: nothing has been trained in this process."""
    model = mlp()
    at.prune(model, SCHEDULE)
    expected = train(model, 12)[-1]
    model.save_weights(tmp_path / "m.weights.h5")
    new = mlp()
    at.prune(new, SCHEDULE)
    new.compile(keras.optimizers.Adam(0.3), "mse")
    new.optimizer.build(new.trainable_variables)
    new.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(train(new, 1)[-1], expected)
    assert int(new.optimizer.iterations) == 13


# Free again


def test_strip_pruning_leaves_zeros_which_training_fills():
    model = mlp(kernel_constraint=keras.constraints.MaxNorm(0.1))
    constraint = model.layers[0].kernel.constraint
    at.prune(model, at.ConstantSparsity(0.5))
    train(model, 1)
    report = at.strip_pruning(model)
    assert report is at.report_of(model)
    assert [tuple(e) for e in report.done] == [
        ("a", "kernel (12, 16): 96 of 192 zero, as is"),
        ("b", "kernel (16, 5): 40 of 80 zero, as is"),
    ]
    assert report.skipped == ()
    assert at.sparsity(model).total == 0.5
    train(model, 1)
    assert at.sparsity(model).total < 0.02
    # The constraint that the user gave the layer is back in force.
    assert model.layers[0].kernel.constraint is constraint
    assert np.linalg.norm(model.layers[0].kernel.numpy(), axis=0).max() <= 0.1 + 1e-6
    at.prune(model, at.ConstantSparsity(0.75))
    assert at.sparsity(model).total == 0.75


def test_strip_pruning_of_some_layers():
    model = mlp()
    at.prune(model, SCHEDULE, scope="global")
    report = at.strip_pruning(model, exclude="b")
    assert [e.layer for e in report.done] == ["a"]
    assert [tuple(e) for e in report.skipped] == [("b", "still pruned: excluded")]
    train(model, 21)
    assert at.sparsity(model).column("sparsity")[:2] == pytest.approx([0, 0.8], abs=0.02)
    assert at.sparsity(model).column("zeros")[1] == 64  # of 80, now the only one with the schedule
    with pytest.raises(ValueError, match=r"No weight of model(.|\n)*a +no +not pruned"):
        at.strip_pruning(model, include="a")
    with pytest.raises(ValueError, match="No layer matches 'c'"):
        at.strip_pruning(model, include="c")


def test_strip_pruning_needs_a_pruned_model(tmp_path):
    model = mlp()
    at.prune(model, at.ConstantSparsity(0.5))
    train(model, 1)
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="loaded from a file holds zeros, and nothing keeps them"):
        at.strip_pruning(keras.models.load_model(tmp_path / "m.keras"))


def test_strip_pruning_finds_what_is_pruned_by_choice_only():
    """Depthwise kernels and frozen ones, in a part of the model; and what `train_sparse` holds."""
    part = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            L.DepthwiseConv2D(3, name="depthwise"),
            L.Conv2D(4, 3, name="conv"),
        ]
    )
    model = keras.Sequential([keras.Input((6, 6, 4)), part, L.Flatten(), L.Dense(2, name="head")])
    at.prune(part, at.ConstantSparsity(0.5), include=["depthwise", "conv"])
    at.train_sparse(model, at.SET(0.5, end_step=10, frequency=1), include="head")
    part.get_layer("conv").trainable = False
    report = at.strip_pruning(model)
    assert [e.layer.rpartition("/")[2] for e in report.done] == ["depthwise", "conv", "head"]
    assert not any(v.constraint for v in model.weights)
