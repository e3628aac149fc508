"""Models that keep state between calls: a SavedModel does so too, and other files are refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at

L = keras.layers
SIGNALS = np.random.default_rng(0).normal(size=(2, 8, 4, 3)).astype("float32")
WRITERS = {"litert": at.export.litert, "onnx": at.export.onnx}


def stateful(layer):
    return keras.Sequential([keras.Input(batch_shape=(8, 4, 3)), layer, L.Dense(2)])


class Counter(L.Layer):
    """Returns how often it was called, in a variable of Keras or of TensorFlow."""

    def __init__(self, of_keras, **kwargs):
        super().__init__(**kwargs)
        self.of_keras = of_keras

    def build(self, shape):
        options = {"initializer": "zeros", "trainable": False, "name": "count"}
        self.count = self.add_weight((), **options) if self.of_keras else tf.Variable(0.0)

    def call(self, x):
        self.count.assign(self.count + 1.0)
        return x + self.count


def counting(of_keras):
    return keras.Sequential([keras.Input((3,)), L.Dense(2), Counter(of_keras, name="counter")])


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "layer, path",
    [
        (lambda: L.GRU(8, stateful=True, name="gru"), "gru"),
        (
            lambda: L.Bidirectional(L.LSTM(2, stateful=True, name="lstm"), name="both"),
            "both/forward_lstm",
        ),
    ],
)
def test_a_file_of_a_stateful_layer_is_refused(writer, layer, path, tmp_path):
    model = stateful(layer())
    model(SIGNALS[0])  # so that the state is not 0
    with pytest.raises(ValueError, match=rf"^Layer '{path}' keeps its state .*stateful=False"):
        WRITERS[writer](model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("of_keras", [True, False])
def test_a_file_of_a_layer_that_counts_is_refused(writer, of_keras, tmp_path):
    with pytest.raises(ValueError, match="^Layer 'counter' changes its variable .* in inference"):
        WRITERS[writer](counting(of_keras), tmp_path / "m")


@pytest.mark.parametrize("writer", WRITERS)
def test_random_layers_keep_no_state(writer, tmp_path):
    # The seeds of dropout within recurrent layers move on, which changes nothing in inference.
    cell = L.GRU(4, dropout=0.5, recurrent_dropout=0.5)
    model = keras.Sequential([keras.Input((4, 3)), L.GaussianNoise(0.1), cell, L.Dropout(0.5)])
    WRITERS[writer](model, tmp_path / f"m.{writer.replace('litert', 'tflite')}")


@pytest.mark.parametrize(
    "make", [lambda: stateful(L.GRU(8, stateful=True)), lambda: counting(True)]
)
def test_a_saved_model_keeps_the_state(make, tmp_path):
    model = make()
    batches = SIGNALS if len(model.input_shape) == 3 else SIGNALS[:, :, 0]
    at.export.saved_model(model, tmp_path)
    run = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    for batch in batches:
        (found,) = run(tf.constant(batch)).values()
        np.testing.assert_allclose(found, model(batch, training=False), rtol=1e-5, atol=1e-6)
