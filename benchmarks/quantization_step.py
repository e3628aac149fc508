"""Compares a step of quantization-aware training with a plain one, in Keras 3 and, by TFMOT, in tf_keras.

    .venv/bin/python benchmarks/quantization_step.py            # 12 rounds
    .venv/bin/python benchmarks/quantization_step.py --quick    # a smaller batch, 4 rounds
    .venv/bin/python benchmarks/quantization_step.py --full     # 40 rounds

MobileNetV2 with 96 × 96 pixels and batches of 32, trained by `fit` with Adam. The four trainings take
turns of six steps, in a new order each round, and each is compared with its plain form in the same
round, as neighbours of the machine may slow all of some rounds.
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
from accel_tf.report import Table

SHAPE, CLASSES = (96, 96, 3), 10
TURN = 6  # steps
PAIRS = {"accel_tf": "Keras 3", "TFMOT": "tf_keras"}  # with fake quantization, and the same without


class Training:
    """A model that is being trained, with the median step of each turn so far."""

    def __init__(self, package, data, quantize=None):
        package.utils.set_random_seed(0)
        model = package.applications.MobileNetV2(weights=None, input_shape=SHAPE, classes=CLASSES)
        self.model = quantize(model) if quantize else model
        self.model.compile("adam", "sparse_categorical_crossentropy")
        self.package, self.data, self.seconds = package, data, []

    def turn(self) -> None:
        """Trains some steps. What `fit` does before and after all steps is not timed."""
        steps = []
        self.model.fit(
            self.data,
            steps_per_epoch=TURN,
            shuffle=False,
            verbose=0,
            callbacks=[clock(self.package, steps)],
        )
        self.seconds.append(common.median(steps))


def clock(package, seconds: list[float]):
    """Returns a callback of Keras 3 or tf_keras that appends how long each step took."""

    class Clock(package.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self._start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            seconds.append(time.perf_counter() - self._start)

    return Clock()


def train(rounds: int, batch: int) -> dict[str, list[float]]:
    """Returns the median step of each round of each training."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (batch, *SHAPE)).astype("float32")
    y = rng.integers(0, CLASSES, batch)
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()
    trainings = {
        "Keras 3": Training(keras, data),
        "accel_tf": Training(keras, data, at.quantize_aware),
        "tf_keras": Training(tf_keras, data),
        "TFMOT": Training(tf_keras, data, tfmot.quantization.keras.quantize_model),
    }
    for _ in range(rounds + 1):  # the first traces
        for training in random.sample(list(trainings.values()), len(trainings)):
            training.turn()
    return {name: training.seconds[1:] for name, training in trainings.items()}


def table(seconds: dict[str, list[float]], batch: int) -> Table:
    rows = []
    for quantized, plain in PAIRS.items():
        ratios = np.array(seconds[quantized]) / np.array(seconds[plain])
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        rows.append([f"{plain}, plain", common.spread(seconds[plain]), "1.00"])
        row = [common.spread(seconds[quantized]), f"{middle:.2f} ({low:.2f}–{high:.2f})"]
        rows.append([f"{quantized}, int8", *row])
    return Table(
        ["training", "a step: median (quartiles)", "vs plain, by round"],
        rows,
        title=f"MobileNetV2, 96 × 96, batch {batch}: quantization-aware training",
    )


def main() -> None:
    options = common.options(__doc__, "quantization_step")
    rounds, batch = (4, 8) if options.quick else (40 if options.full else 12, 32)
    host, _ = common.head(options.threads)
    seconds = train(rounds, batch)
    print(table(seconds, batch), end="\n\n")
    common.save({**host, "batch": batch, "turn": TURN, "seconds": seconds}, options.output)


if __name__ == "__main__":
    main()
