"""Compares a step of training with pruning and without, in Keras 3 and, by TFMOT, in tf_keras.

    .venv/bin/python benchmarks/pruning_step.py            # a cycle of the schedule
    .venv/bin/python benchmarks/pruning_step.py --quick    # a smaller batch
    .venv/bin/python benchmarks/pruning_step.py --full     # three cycles

MobileNetV2 with 96 × 96 pixels and batches of 32, trained by `fit` with Adam. Both libraries follow the
same PolynomialDecay, which updates the masks at one step of a hundred; whole cycles are trained. The
four trainings take turns of ten steps, in a new order each time.
"""

import random
import time

import _common as common
import keras
import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

import accel_tf as at
from accel_tf.interop.tfmot import to_tfmot
from accel_tf.report import Table

SHAPE, CLASSES = (96, 96, 3), 10
CYCLE, TURN = 100, 10  # steps
PAIRS = {"accel_tf": "Keras 3", "TFMOT": "tf_keras"}  # with pruning, and the same without


class Training:
    """A model that is being trained, with the time of each step so far."""

    def __init__(self, package, data, schedule=None):
        package.utils.set_random_seed(0)
        self.model = package.applications.MobileNetV2(
            weights=None, input_shape=SHAPE, classes=CLASSES
        )
        self.seconds, self.data = [], data
        self.callbacks = [clock(package, self.seconds)]
        if schedule and package is tf_keras:
            prune = tfmot.sparsity.keras.prune_low_magnitude
            self.model = prune(self.model, to_tfmot(schedule))
            self.callbacks.append(tfmot.sparsity.keras.UpdatePruningStep())
        self.model.compile("adam", "sparse_categorical_crossentropy")
        if schedule and package is keras:
            at.prune(self.model, schedule)

    def turn(self) -> None:
        """Trains some steps. What `fit` does before and after all steps is not timed."""
        self.model.fit(
            self.data, steps_per_epoch=TURN, shuffle=False, verbose=0, callbacks=self.callbacks
        )


def clock(package, seconds: list[float]):
    """Returns a callback of Keras 3 or tf_keras that appends how long each step took."""

    class Clock(package.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self._start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            seconds.append(time.perf_counter() - self._start)

    return Clock()


def train(cycles: int, batch: int) -> dict[str, list[float]]:
    """Returns the seconds of each step of each training; the schedule updates at every 100th."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (batch, *SHAPE)).astype("float32")
    y = rng.integers(0, CLASSES, batch)
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()
    schedule = at.PolynomialDecay(0.8, end_step=CYCLE * cycles, frequency=CYCLE)
    trainings = {
        name: Training(package, data, schedule if name in PAIRS else None)
        for package, names in ((keras, ("Keras 3", "accel_tf")), (tf_keras, ("tf_keras", "TFMOT")))
        for name in names
    }
    for _ in range(cycles * CYCLE // TURN):
        for training in random.sample(list(trainings.values()), len(trainings)):
            training.turn()
    return {name: training.seconds for name, training in trainings.items()}


def by_turn(seconds: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the median step of each turn, and the steps that update the masks with their turns'.

    The first turn is left out, since it traces.
    """
    steps = np.reshape(seconds, (-1, TURN))[1:]
    updating = (np.arange(TURN, len(seconds)).reshape(-1, TURN) + 1) % CYCLE == 0
    usual = np.array([np.median(turn[~u]) for turn, u in zip(steps, updating, strict=True)])
    return usual, np.array([steps[updating], usual[updating.any(axis=1)]])


def slowdown(pruned: list[float], plain: list[float]) -> float:
    """Returns the mean step of a cycle, 99 without and one with an update, over a plain step.

    Steps are compared within a round, as neighbours of the machine may slow all of some rounds.
    """
    usual, updates = by_turn(pruned)
    ratio = common.median(usual / by_turn(plain)[0])
    return ratio * (CYCLE - 1 + common.median(updates[0] / updates[1])) / CYCLE


def table(seconds: dict[str, list[float]], batch: int) -> Table:
    rows = []
    for pruned, plain in PAIRS.items():
        rows.append([f"{plain}, plain", common.spread(by_turn(seconds[plain])[0]), "–", "1.000"])
        usual, (updates, _) = by_turn(seconds[pruned])
        ratio = slowdown(seconds[pruned], seconds[plain])
        row = [common.spread(usual), common.spread(updates), f"{ratio:.3f}"]
        rows.append([f"{pruned}, pruned", *row])
    return Table(
        ["training", "a step", "one that updates", "average of a cycle vs plain"],
        rows,
        title=f"MobileNetV2, 96 × 96, batch {batch}: one update of the masks in {CYCLE} steps",
    )


def main() -> None:
    options = common.options(__doc__, "pruning_step")
    batch = 8 if options.quick else 32
    host, _ = common.head(options.threads)
    seconds = train(3 if options.full else 1, batch)
    print(table(seconds, batch), end="\n\n")
    common.save({**host, "batch": batch, "cycle": CYCLE, "seconds": seconds}, options.output)


if __name__ == "__main__":
    main()
