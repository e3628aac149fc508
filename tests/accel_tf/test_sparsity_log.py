"""`SparsityLog`: what it logs, for whom, in any order of callbacks, and when it says training is short."""

import contextlib
import csv
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at

X, Y = np.ones((32, 8), "float32"), np.ones((32, 4), "float32")


def model(schedule=None, **compiled):
    new = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, name="a"), keras.layers.Dense(4, name="b")]
    )
    new.compile("sgd", "mse", **compiled)
    if schedule is not None:
        at.prune(new, schedule)
    return new


def fit(new, *callbacks, epochs=3, **kwargs):
    """Four steps an epoch."""
    arguments = {"batch_size": 8, "epochs": epochs, "verbose": 0} | kwargs
    return new.fit(X, Y, callbacks=list(callbacks), **arguments).history


def test_history_has_the_sparsity_of_the_model_and_of_each_layer():
    new = model(at.OneShot(0.5, begin_step=8))
    at.prune(new, at.ConstantSparsity(0.75), include="b")
    history = fit(new, at.SparsityLog())
    assert history["sparsity"] == [48 / 192, (64 + 48) / 192, (64 + 48) / 192]
    assert history["sparsity/a"] == [0.0, 0.5, 0.5]
    assert history["sparsity/b"] == [0.75] * 3
    assert history["sparsity"][-1] == at.sparsity(new).total


def test_the_kernels_of_one_layer_are_logged_together():
    new = keras.Sequential([keras.Input((4, 3)), keras.layers.LSTM(2, name="lstm")])
    new.compile("sgd", "mse")
    at.prune(new, at.ConstantSparsity(0.5))
    x, y = np.ones((8, 4, 3)), np.ones((8, 2))
    history = new.fit(x, y, verbose=0, callbacks=[at.SparsityLog()]).history
    assert history["sparsity/lstm/lstm_cell"] == [0.5]


@contextlib.contextmanager
def said():
    """What the callback warns of, as a list of strings."""
    # Not `pytest.warns`, which makes errors of warnings of Keras that the tests let pass.
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield told
    told += [text for w in caught if "Training ends" in (text := str(w.message))]


class Others(keras.callbacks.Callback):
    """Notes what it sees at the end of an epoch."""

    def on_epoch_end(self, epoch, logs=None):
        self.seen = dict(logs)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_all_callbacks_see_it_wherever_it_stands(tmp_path, place):
    others = Others()
    callbacks = [keras.callbacks.CSVLogger(tmp_path / "log.csv"), others]
    callbacks.insert(place, at.SparsityLog())
    history = fit(model(at.ConstantSparsity(0.5)), *callbacks, validation_data=(X, Y))
    assert others.seen["sparsity/a"] == others.seen["sparsity"] == 0.5
    assert {"loss", "val_loss", "sparsity", "sparsity/a", "sparsity/b"} == set(history)
    with open(tmp_path / "log.csv") as file:
        assert [row["sparsity/b"] for row in csv.DictReader(file)] == ["0.5"] * 3


def test_callbacks_of_the_user_get_all_their_calls_in_their_order():
    calls = []

    class Noting(keras.callbacks.Callback):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def set_model(self, model):
            super().set_model(model)
            calls.append(self.name)

        def on_epoch_end(self, epoch, logs=None):
            assert self.model is not None
            calls.append(self.name)

    callbacks = [Noting("first"), Noting("second"), at.SparsityLog(), Noting("third")]
    fit(model(at.ConstantSparsity(0.5)), *callbacks, epochs=1)
    assert calls == ["first", "second", "third"] * 2


@pytest.mark.parametrize("given", [False, True], ids=["default bar", "a bar of the user"])
@pytest.mark.parametrize("verbose", [1, 2])
def test_the_progress_bar_shows_the_total_alone(capsys, verbose, given):
    bar = [keras.callbacks.ProgbarLogger()] if given else []
    log = at.SparsityLog()
    history = fit(model(at.ConstantSparsity(0.5)), *bar, log, epochs=2, verbose=verbose)
    out = capsys.readouterr().out
    assert "sparsity: 0.5000" in out and "sparsity/" not in out
    assert history["sparsity/a"] == [0.5, 0.5]


def test_checkpoints_can_monitor_it(tmp_path):
    best = keras.callbacks.ModelCheckpoint(
        tmp_path / "sparsest.keras", monitor="sparsity", mode="max", save_best_only=True
    )
    fit(model(at.OneShot(0.5, begin_step=6)), best, at.SparsityLog())
    assert best.best == 0.5
    assert at.sparsity(keras.models.load_model(tmp_path / "sparsest.keras")).total == 0.5


def test_a_log_directory_has_the_values_for_tensorboard(tmp_path):
    fit(model(at.OneShot(0.5, begin_step=6)), at.SparsityLog(tmp_path / "log"))
    (path,) = (tmp_path / "log").iterdir()
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    names = ("sparsity", "sparsity/a", "sparsity/b")
    assert found == {(name, step): 0.5 if step else 0.0 for name in names for step in range(3)}


def test_a_loop_that_calls_callbacks_itself():
    new, log, logs = model(at.ConstantSparsity(0.5)), at.SparsityLog(), {"loss": 1.0}
    log.set_model(new)
    log.on_train_begin()
    log.on_epoch_begin(0)
    log.on_epoch_end(0, logs)
    log.on_train_end()
    assert logs == {"loss": 1.0, "sparsity": 0.5, "sparsity/a": 0.5, "sparsity/b": 0.5}


def test_a_dense_model_and_one_that_train_sparse_made_are_logged_too():
    assert fit(model(), at.SparsityLog())["sparsity"] == [0.0] * 3
    new = model()
    at.train_sparse(new, at.SET(0.5, end_step=100, frequency=2))
    assert fit(new, at.SparsityLog())["sparsity"] == [0.5] * 3


def test_training_that_ends_before_anything_is_pruned_is_an_error_before_its_first_step():
    new = model(at.ConstantSparsity(0.5, begin_step=13))
    with pytest.raises(
        ValueError, match=r"from step 0 to step 12.* at step 13 of ConstantSparsity"
    ):
        fit(new, at.SparsityLog())
    assert int(new.optimizer.iterations) == 0


def test_a_frequency_beyond_the_training_is_an_error_too():
    schedule = at.PolynomialDecay(0.5, end_step=200, frequency=100)  # updates at step 0: nothing
    with pytest.raises(
        ValueError, match="next update that prunes is at step 100 .*lower frequency"
    ):
        fit(model(schedule), at.SparsityLog())


def test_the_last_step_counts():
    history = fit(model(at.ConstantSparsity(0.5, begin_step=12)), at.SparsityLog())
    assert history["sparsity"] == [0.0, 0.0, 0.5]


def test_training_that_ends_before_the_schedule_is_a_warning_once_and_then_goes_on():
    new, log = model(at.PolynomialDecay(0.75, end_step=20, frequency=2)), at.SparsityLog()
    with said() as told:
        fit(new, log)
        fit(new, log, epochs=1)
    assert len(told) == 1
    assert re.search("ends at step 12, before .* at step 20", told[0])
    assert fit(new, log, epochs=1)["sparsity"] == [0.75]
    fit(new, at.SparsityLog(), epochs=1)  # the schedule is done: nothing to say


def test_a_schedule_that_is_half_done_and_prunes_no_more_is_an_error():
    new = model(at.PolynomialDecay(0.75, end_step=40, frequency=10))
    with said():
        fit(new, at.SparsityLog())  # an update at step 10
    with pytest.raises(ValueError, match="from step 12 to step 16, .* at step 20"):
        fit(new, at.SparsityLog(), epochs=1)


def test_the_first_epoch_counts():
    new = model(at.ConstantSparsity(0.5, begin_step=9))
    with pytest.raises(ValueError, match="from step 0 to step 8"):
        fit(new, at.SparsityLog(), initial_epoch=1)


def test_steps_are_those_of_the_optimizer_with_gradient_accumulation():
    new = model()
    new.compile(keras.optimizers.SGD(gradient_accumulation_steps=4), "mse")
    at.prune(new, at.ConstantSparsity(0.5, begin_step=4))
    with pytest.raises(ValueError, match="from step 0 to step 3"):
        fit(new, at.SparsityLog())


def test_data_of_unknown_length_are_told_of_at_the_end():
    def batches():
        for _ in range(4):
            yield X[:8], Y[:8]

    new = model(at.ConstantSparsity(0.5, begin_step=9))
    with said() as told:
        new.fit(batches(), shuffle=False, verbose=0, callbacks=[at.SparsityLog()])
    assert len(told) == 1 and "reaches its highest sparsity at step 9" in told[0]


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_a_schedule_that_is_done_is_no_error(sparsity):
    fit(model(at.ConstantSparsity(sparsity, end_step=0)), at.SparsityLog(), epochs=1)


def test_it_works_in_a_strategy():
    with at.mirrored_strategy(["CPU:0", "CPU:1"]).scope():
        new = model(at.OneShot(0.5, begin_step=3))
    assert fit(new, at.SparsityLog(), epochs=2)["sparsity"] == [0.5, 0.5]
