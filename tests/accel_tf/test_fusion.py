"""accel_tf.fusion: the fused model computes the same, with fewer layers, whatever kernels it has."""

import keras
import numpy as np
import pytest
from keras import layers

import accel_tf as at


def randomize(model, seed=0):
    """Gives every weight a value that matters: a fresh normalization does nothing, nor does a bias."""
    rng = np.random.default_rng(seed)
    for v in model.weights:
        if v.name in ("moving_variance", "gamma"):
            v.assign(rng.uniform(0.5, 2, v.shape))
        elif v.name in ("bias", "beta", "moving_mean"):
            v.assign(rng.normal(size=v.shape) / 4)
    return model


def agree(model, fused, x, tolerance=1e-5):
    want = np.asarray(model(x, training=False), np.float64)
    got = np.asarray(fused(x, training=False), np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Dense(5), (6,)),
        (layers.Dense(5), (4, 6)),
        (layers.Conv1D(5, 3, dilation_rate=2), (9, 4)),
        (layers.Conv2D(6, 3, strides=2, groups=2), (9, 9, 4)),
        (layers.Conv3D(5, 2, use_bias=False), (4, 4, 4, 3)),
        (layers.Conv1DTranspose(5, 3, strides=2), (6, 4)),
        (layers.Conv2DTranspose(5, 3, strides=2), (5, 5, 4)),
        (layers.Conv3DTranspose(5, 2, use_bias=False), (3, 3, 3, 4)),
        (layers.DepthwiseConv1D(3, depth_multiplier=2), (9, 4)),
        (layers.DepthwiseConv2D(3, depth_multiplier=3, use_bias=False), (9, 9, 4)),
        (layers.SeparableConv1D(5, 3), (9, 4)),
        (layers.SeparableConv2D(5, 3, depth_multiplier=2), (9, 9, 4)),
    ],
    ids=lambda value: (
        type(value).__name__ if isinstance(value, layers.Layer) else "x".join(map(str, value))
    ),
)
def test_each_kernel_takes_in_a_normalization(layer, shape):
    model = randomize(
        keras.Sequential([keras.Input(shape), layer, layers.BatchNormalization(), layers.ReLU(6)])
    )
    fused = at.fuse(model)
    assert kinds(fused) == [type(layer).__name__]
    assert fused.layers[0].name == layer.name and fused.name == model.name
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype("float32")
    agree(model, fused, x)
    (entry,) = at.report_of(fused).done
    assert entry.layer == layer.name
    assert entry.note.startswith("takes in 'batch_norm") and "computes 're_lu" in entry.note


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_without_gamma_or_beta(scale, center):
    normalization = layers.BatchNormalization(scale=scale, center=center, epsilon=0.1)
    model = randomize(keras.Sequential([keras.Input((6,)), layers.Dense(4), normalization]))
    agree(model, at.fuse(model), np.random.default_rng(1).normal(size=(3, 6)).astype("float32"))


@pytest.mark.parametrize(
    ("activation", "fuses"),
    [
        (layers.ReLU(), True),
        (layers.ReLU(6), True),
        (layers.Activation("swish"), True),
        (layers.Activation("softmax"), True),
        (layers.ReLU(max_value=4), False),
        (layers.ReLU(negative_slope=0.1), False),
        (layers.ReLU(threshold=0.5), False),
        (layers.LeakyReLU(), False),
    ],
)
def test_activations(activation, fuses):
    model = randomize(keras.Sequential([keras.Input((6,)), layers.Dense(4), activation]))
    fused = at.fuse(model)
    assert len(fused.layers) == (1 if fuses else 2)
    agree(model, fused, np.random.default_rng(1).normal(size=(9, 6)).astype("float32"))


def test_what_is_read_elsewhere_stays():
    """Three outputs that are needed as they are: by another layer, by the caller, by a second call."""
    inputs = keras.Input((8, 8, 4))
    twice = layers.Conv2D(4, 1, name="twice")
    x = layers.BatchNormalization(name="of_shared")(twice(twice(inputs)))
    read = layers.Conv2D(4, 1, name="read")(x)
    y = layers.Add()([layers.BatchNormalization(name="of_read")(read), read])
    end = layers.Conv2D(4, 1, name="end")(y)
    outputs = [end, layers.BatchNormalization(name="of_end")(end)]
    early = layers.BatchNormalization(name="of_early")(layers.Conv2D(4, 1, activation="relu")(y))
    model = randomize(keras.Model(inputs, [*outputs, early]))
    fused = at.fuse(model)
    assert kinds(fused) == kinds(model)
    report = at.report_of(fused)
    assert not report.done
    notes = dict(report.skipped)
    assert set(notes) == {"of_shared", "of_read", "of_end", "of_early"}
    assert "no kernel stands alone" in notes["of_read"]
    assert "comes before it" in notes["of_early"]
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype("float32")
    for got, want in zip(fused(x), model(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_another_axis_stays():
    model = randomize(
        keras.Sequential([keras.Input((6, 5)), layers.Dense(4), layers.BatchNormalization(axis=1)])
    )
    fused = at.fuse(model)
    assert "axis 1; the channels" in at.report_of(fused).skipped[0].note
    agree(model, fused, np.ones((2, 6, 5), "float32"))


def test_nested_and_shared_models(tmp_path):
    block = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(4, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("relu"),
        ],
        name="block",
    )
    inputs = keras.Input((8, 8, 4))
    model = randomize(keras.Model(inputs, layers.Add()([block(block(inputs)), inputs])))
    fused = at.fuse(model)
    assert kinds(fused.get_layer("block")) == ["Conv2D"]
    assert at.report_of(fused).done[0].layer.startswith("block/conv2d")
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype("float32")
    agree(model, fused, x)
    fused.save(tmp_path / "fused.keras")
    agree(fused, keras.models.load_model(tmp_path / "fused.keras"), x)
    model.layers[1].layers[0].kernel.assign(np.zeros((3, 3, 4, 4)))
    assert np.any(fused.get_layer("block").layers[0].kernel)  # nothing is shared


def test_zeros_stay_and_mixed_precision_too():
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8), layers.BatchNormalization()])
    randomize(model)
    kernel = model.layers[0].kernel.numpy()
    kernel[::2] = 0
    model.layers[0].kernel.assign(kernel)
    fused = at.fuse(model)
    np.testing.assert_array_equal(fused.layers[0].kernel.numpy() == 0, kernel == 0)
    assert fused.layers[0].compute_dtype == "float16"
    agree(model, fused, np.ones((2, 16), "float16"), tolerance=1e-2)


def test_frozen_layers_stay_frozen():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.BatchNormalization()])
    model.layers[0].trainable = False
    assert not at.fuse(model).trainable_weights


@pytest.mark.parametrize(
    ("name", "arguments", "left"),
    [
        ("MobileNet", {}, 0),
        pytest.param("EfficientNetB0", {}, 0, marks=pytest.mark.full),
        # 17 blocks begin with a normalization.
        pytest.param("ResNet50V2", {}, 17, marks=pytest.mark.full),
    ],
)
def test_applications(name, arguments, left):
    make = getattr(keras.applications, name)
    model = randomize(make(weights=None, input_shape=(64, 64, 3), classes=10, **arguments))
    fused = at.fuse(model)
    assert kinds(fused).count("BatchNormalization") == left
    assert fused.count_params() < model.count_params()
    x = np.random.default_rng(1).uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
    agree(model, fused, x, tolerance=1e-4)


def test_models_without_a_graph():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Own()
    with pytest.raises(ValueError, match="fuse needs the weights .* not built yet"):
        at.fuse(model)
    model(np.ones((1, 3)))
    with pytest.raises(ValueError, match="is subclassed"):
        at.fuse(model)


def test_of_a_spectral_normalization_the_layer_inside_remains():
    wrapped = layers.SpectralNormalization(layers.Conv2D(4, 3), name="spectral")
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), wrapped, layers.BatchNormalization(), layers.ReLU()]
    )
    x = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype("float32")
    model(x, training=True)
    fused = at.fuse(randomize(model))
    assert kinds(fused) == ["Conv2D"] and fused.layers[0].name == "spectral"
    assert "Conv2D alone" in str(at.report_of(fused))
    agree(model, fused, x)
    with pytest.raises(
        ValueError, match=r"'spectral': SpectralNormalization .*accel_tf.fuse\(model\)"
    ):
        at.calibrate(model, x, verbose=0)
    assert kinds(at.calibrate(fused, x, verbose=0))[-1] == "QuantizedWeights"
