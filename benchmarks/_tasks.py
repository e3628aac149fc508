"""Three small tasks with real data and their networks, for Keras 3 and for tf_keras alike."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

import accel_tf as at

WORDS, LENGTH, WIDTH = 4000, 32, 32  # of the text


def _block(layers, kind: str, filters: int, width: int) -> list:
    return [
        getattr(layers, f"Conv{kind}")(filters, width, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        getattr(layers, f"MaxPooling{kind}")(),
    ]


def images(package):
    layers = package.layers
    return package.Sequential(
        [
            package.Input((8, 8, 1)),
            *_block(layers, "2D", 16, 3),
            *_block(layers, "2D", 32, 3),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def signals(package):
    layers = package.layers
    return package.Sequential(
        [
            package.Input((40, 1)),
            *_block(layers, "1D", 32, 5),
            *_block(layers, "1D", 64, 5),
            *_block(layers, "1D", 64, 5),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )


def text(package):
    """A block of a transformer with sinusoids for the positions, and the average over the words."""
    layers = package.layers
    words = package.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(words) + positions()
    attended = layers.MultiHeadAttention(2, WIDTH // 2)(x, x)
    x = layers.LayerNormalization()(layers.Add()([x, attended]))
    hidden = layers.Dense(WIDTH)(layers.Dense(2 * WIDTH, activation="gelu")(x))
    x = layers.LayerNormalization()(layers.Add()([x, hidden]))
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling1D()(x))
    return package.Model(words, layers.Dense(5)(x))


def positions() -> np.ndarray:
    """The sines and cosines of Vaswani et al., "Attention is all you need", section 3.5, scaled."""
    angle = np.arange(LENGTH)[:, None] / 1e4 ** (np.arange(0, WIDTH, 2) / WIDTH)
    return 0.1 * np.concatenate([np.sin(angle), np.cos(angle)], 1)[None].astype("float32")


def docstrings():
    """The docstrings of `accel_tf.datasets` as numbers of words."""
    train, test = at.datasets.docstrings()
    vectorize = keras.layers.TextVectorization(WORDS, output_sequence_length=LENGTH)
    vectorize.adapt(train[0].astype(str))
    return tuple((vectorize(x.astype(str)).numpy().astype("int32"), y) for x, y in (train, test))


def many_signals():
    """MNIST-1D, tested on ten times as many signals, so that chance has less of a say."""
    return at.datasets.mnist1d(test_samples=10_000)


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, its data, and how it is trained: batches of 64, with Adam."""

    build: Callable
    load: Callable
    epochs: int
    rate: float

    def fit(self, package, model, data, tuning: bool = False) -> None:
        """Trains from the start, or fine-tunes in two epochs with a tenth of the learning rate."""
        loss = package.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(package.optimizers.Adam(self.rate / (10 if tuning else 1)), loss)
        model.fit(*data, batch_size=64, epochs=2 if tuning else self.epochs, verbose=0)


TASKS = {
    "digits": Task(images, at.datasets.digits, 10, 1e-3),
    "MNIST-1D": Task(signals, many_signals, 16, 2e-3),
    "text": Task(text, docstrings, 4, 2e-3),
}
