"""What quantization costs in accuracy, in the files that LiteRT runs: images, signals and text.

Each task trains a float network with one seed, with three in the long form, and compares by their
means: calibrated and fine-tuned 8-bit files, LiteRT's own post-training quantization with the same
data, and 4-bit weights.
"""

import collections
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import accel_tf as at
from accel_tf._litert import quiet

SAMPLES = 512  # to calibrate with


def _block(conv, pool, filters, width):
    return [
        conv(filters, width, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        pool(),
    ]


def _images():
    block = functools.partial(_block, layers.Conv2D, layers.MaxPooling2D, width=3)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *block(16),
            *block(32),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def _signals():
    block = functools.partial(_block, layers.Conv1D, layers.MaxPooling1D, width=5)
    return keras.Sequential(
        [
            keras.Input((40, 1)),
            *block(32),
            *block(64),
            *block(64),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )


def _many_signals():
    return at.datasets.mnist1d(test_samples=10_000)  # so that chance has less of a say


WORDS, LENGTH, WIDTH = 4000, 32, 32


def _text():
    """A block of a transformer, with sinusoids for positions, and the average over all words."""
    words = keras.Input((LENGTH,), dtype="int32")
    angles = np.arange(LENGTH)[:, None] / 1e4 ** (np.arange(0, WIDTH, 2) / WIDTH)
    positions = 0.1 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    x = layers.Embedding(WORDS, WIDTH)(words) + positions[None].astype("float32")
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, WIDTH // 2)(x, x))
    hidden = layers.Dense(2 * WIDTH, activation="gelu")(x)
    x = layers.LayerNormalization()(x + layers.Dense(WIDTH)(hidden))
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(words, layers.Dense(5)(x))


def _docstrings():
    train, test = at.datasets.docstrings()
    vectorize = layers.TextVectorization(WORDS, output_sequence_length=LENGTH)
    vectorize.adapt(train[0].astype(str))
    return tuple((vectorize(x.astype(str)).numpy().astype("int32"), y) for x, y in (train, test))


def _fit(model, data, epochs, rate):
    model.compile(
        keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0)


def _by_litert(model, samples, path):
    """Writes LiteRT's own post-training quantization, with integers all through where it can."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[None]] for x in samples)
    if samples.dtype == np.float32:
        converter.inference_input_type = converter.inference_output_type = tf.int8
    with quiet():
        path.write_bytes(converter.convert())


def _chance(right, other):
    """Two standard errors of the difference between two accuracies on the same inputs, in points.

    As in McNemar's test, only answers that one of both has right count: none where two files compute
    the same, as those of images and of signals nearly do.
    """
    return 200 * np.sqrt(np.sum(right != other)) / right.size


def _decibels(logits, exact):
    """The signal-to-noise ratio of logits to those of the float network."""
    return 10 * np.log10(np.mean(exact**2) / np.mean((logits - exact) ** 2))


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "build, load, epochs, rate, least",
    [
        pytest.param(_images, at.datasets.digits, 10, 1e-3, 97.0, id="images"),
        pytest.param(_signals, _many_signals, 16, 2e-3, 95.0, id="signals"),
        pytest.param(_text, _docstrings, 4, 2e-3, 80.0, id="text"),
    ],
)
def test_quantization_costs_little(build, load, epochs, rate, least, seeds, tmp_path):
    train, (x, y) = load()
    samples, path = train[0][:SAMPLES], tmp_path / "model.tflite"
    right, decibels = collections.defaultdict(list), []
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        model = build()
        _fit(model, train, epochs, rate)
        logits = {"float": model.predict(x, verbose=0)}
        calibrated = at.calibrate(model, samples, verbose=0)
        tuned, four_bits = at.quantize_aware(model), at.quantize_aware(model, at.Int4Weights())
        for quantized in (tuned, four_bits):
            _fit(quantized, train, max(epochs // 5, 1), rate / 10)
        for name, quantized in (("PTQ", calibrated), ("QAT", tuned), ("int4", four_bits)):
            at.export.litert(quantized, path)
            logits[name] = at.export.run_litert(path, x)
        _by_litert(model, samples, path)
        logits["LiteRT"] = at.export.run_litert(path, x)
        for name, z in logits.items():
            right[name] += list(z.argmax(-1) == y)
        decibels.append([_decibels(logits[k], logits["float"]) for k in ("PTQ", "LiteRT")])

    right = {name: np.array(answers) for name, answers in right.items()}
    accuracy = {name: 100 * answers.mean() for name, answers in right.items()}
    assert accuracy["float"] >= least
    assert accuracy["QAT"] >= accuracy["float"] - 0.5, accuracy
    assert accuracy["PTQ"] >= accuracy["float"] - 0.5, accuracy
    assert accuracy["int4"] >= accuracy["float"] - 1.5, accuracy
    ours, theirs = np.mean(decibels, axis=0)
    assert ours >= theirs - 0.02, decibels
    # With one seed, chance has a say in fine-tuning as well.
    chance = {name: _chance(right[name], right["LiteRT"]) for name in ("PTQ", "QAT")}
    if seeds > 1:
        chance["QAT"] = 0.0
    for name in ("PTQ", "QAT"):
        assert accuracy[name] >= accuracy["LiteRT"] - chance[name], (accuracy, chance)
