"""Models to quantize, a short training, and the quantizers of what became of them."""

import keras
import numpy as np

import accel_tf as at
from accel_tf.quantization import FakeQuantize

L = keras.layers


def small_cnn():
    """Convolution, normalization and activation in one kernel; pooling; two kinds of dense."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            L.Conv2D(4, 3, padding="same", use_bias=False, name="conv"),
            L.BatchNormalization(name="norm"),
            L.ReLU(name="relu"),
            L.MaxPooling2D(name="pool"),
            L.Flatten(name="flatten"),
            L.Dense(8, activation="relu", name="hidden"),
            L.Dropout(0.1, name="dropout"),
            L.Dense(3, activation="softmax", name="probabilities"),
        ]
    )


def residual(inputs=(6, 6, 2)):
    """Each kind of supported layer, with branches, a nested and a shared model."""
    x = keras.Input(inputs, name="image")
    shared = keras.Sequential(
        [keras.Input(inputs), L.Conv2D(2, 3, padding="same", name="conv"), L.ReLU(6.0)],
        name="shared",
    )
    y = L.Add(name="add")([shared(shared(x)), x])
    y = L.ReLU(name="add_relu")(y)
    y = L.Concatenate(name="concat")([y, L.DepthwiseConv2D(3, padding="same", name="depth")(y)])
    y = L.Activation("relu", name="pre_relu")(L.BatchNormalization(name="pre")(y))
    y = L.ZeroPadding2D(1, name="pad")(L.AveragePooling2D(2, name="average")(y))
    gate = L.Dense(4, activation="sigmoid", name="gate")(L.GlobalAveragePooling2D(name="mean")(y))
    y = L.Multiply(name="scale")([y, L.Reshape((1, 1, 4), name="reshape")(gate)])
    return keras.Model(x, L.Dense(3, name="logits")(L.Flatten(name="flatten")(y)), name="residual")


def fit(model, n=32, **options):
    keras.utils.set_random_seed(1)
    x = np.random.normal(size=(n, *model.inputs[0].shape[1:])).astype("float32")
    y = np.random.randint(0, model.outputs[0].shape[-1], n)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, **options)
    history = model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    return x


def quantizers(model):
    return [layer for _, layer in at.layers.walk(model) if isinstance(layer, FakeQuantize)]
