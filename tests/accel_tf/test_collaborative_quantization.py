"""Quantized models keep the zeros and clusters that they were made with, in training and in the file.

Pruning, clustering and quantization together are known as PQAT, CQAT and PCQAT.
"""

import gzip
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

import accel_tf as at
from accel_tf.clustering import constraint_of
from accel_tf.pruning._constraint import MaskConstraint
from accel_tf.quantization._preserve import clusters_of

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 8, 8, 2)).astype("float32"), RNG.normal(size=(24, 5)).astype("float32")


def cnn():
    """Each kind of kernel that the converter writes in its own way, folded and not."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2), name="image"),
            L.Conv2D(24, 3, padding="same", use_bias=False, name="conv"),
            L.BatchNormalization(name="norm"),
            L.ReLU(name="relu"),
            L.DepthwiseConv2D(3, use_bias=False, name="depth"),
            L.BatchNormalization(name="depth_norm"),
            L.Conv2D(8, 1, activation="relu", name="pointwise"),
            L.Flatten(name="flatten"),
            L.Dense(16, use_bias=False, name="hidden"),
            L.BatchNormalization(name="hidden_norm"),
            L.ReLU(name="hidden_relu"),
            L.Dense(5, name="head"),
        ]
    )
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):  # folding multiplies channels by these
            layer.gamma.assign(RNG.uniform(0.3, 3.0, layer.gamma.shape))
            layer.moving_variance.assign(RNG.uniform(0.3, 3.0, layer.gamma.shape))
    return model


def compress(model, kind, clusters=16):
    include = [layer for layer in model.layers if kernels(layer)]
    if "P" in kind:
        at.prune(model, at.ConstantSparsity(0.75), include=include)
    if "C" in kind:
        at.cluster(model, clusters, include=include)
    return model


def fit(model, **options):
    model.compile(keras.optimizers.Adam(0.01), "mse", **options)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)


def kernels(model):
    return [v for v in model.trainable_weights if v.name.endswith("kernel")]


def numbers(variable):
    return tf.cast(variable.value, tf.float32).numpy()


def require_kept(kind, before, model):
    """Fails unless the kernels of `model` changed, but neither their zeros nor their clusters did."""
    assert len(before) == len(kernels(model)) > 0
    for old, v in zip(before, kernels(model), strict=True):
        new = numbers(v)
        assert (old != new).any(), v.path
        if "P" in kind:
            assert np.mean(old == 0) >= 0.7
            np.testing.assert_array_equal(old == 0, new == 0, v.path)
        if "C" in kind:
            assert np.unique(new).size <= np.unique(old).size <= 16, v.path
            for value in np.unique(old):  # what was equal is
                assert np.unique(new[old == value]).size == 1, v.path


def int8_constants(path):
    """Yields the int8 arrays that are stored in a LiteRT file, read from its bytes."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(pathlib.Path(path).read_bytes(), 0))
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if tensor.type == schema.TensorType.INT8 and data is not None and len(data):
            yield np.asarray(data, np.uint8).view(np.int8).reshape(tensor.shape)


def as_in_file(variable):
    w = numbers(variable)
    if w.ndim == 2:
        return w.T
    if "depth" in variable.path:
        return w.reshape(1, *w.shape[:2], -1)
    return np.moveaxis(w, -1, 0)


def require_in_file(kind, model, path):
    """Fails unless each kernel is in the file at `path`, with its zeros and its clusters."""
    stored = list(int8_constants(path))
    for v in kernels(model):
        w = as_in_file(v)
        (q,) = [q for q in stored if q.shape == w.shape]
        assert np.corrcoef(np.abs(q).ravel(), np.abs(w).ravel())[0, 1] > 0.3
        if "P" in kind:
            assert not q[w == 0].any(), v.path
        if "C" in kind:
            assert np.unique(q).size <= 16, v.path
            for value in np.unique(w):
                assert np.unique(q[w == value]).size == 1, v.path


# Training, the file, and from file to file


@pytest.mark.parametrize(
    ("kind", "origin"),
    [("P", "as is"), ("C", "as is"), ("PC", "as is"), ("PC", "stripped"), ("PC", "loaded")],
)
def test_zeros_and_clusters_survive_training_and_are_in_the_file(kind, origin, tmp_path):
    model = compress(cnn(), kind)
    if origin == "stripped":
        if "C" in kind:
            at.strip_clustering(model)
        if "P" in kind:
            at.strip_pruning(model)
        assert not any(v.constraint for v in model.weights)
    elif origin == "loaded":
        model.save(tmp_path / "m.keras")
        model = keras.models.load_model(tmp_path / "m.keras")
    before = [numbers(v) for v in kernels(model)]
    quantized = at.quantize_aware(model)
    report = str(at.report_of(quantized))
    assert report.count("75% zeros") == (5 if "P" in kind else 0)
    assert report.count("16 clusters") == (5 if "C" in kind else 0)
    fit(quantized)
    require_kept(kind, before, quantized)
    file = at.export.litert(quantized, tmp_path / "m.tflite")
    assert file.int8_fraction == 1.0
    require_in_file(kind, quantized, file.path)
    expected = quantized.predict(X, verbose=0)
    error = np.abs(at.export.run_litert(file.path, X) - expected)
    assert error.max() < 3.5 * quantized.layers[-1].output_quantizer.scale


@pytest.mark.parametrize("eagerly", [False, True])
def test_after_a_reload_training_goes_on_keeping_them(eagerly, tmp_path):
    quantized = at.quantize_aware(compress(cnn(), "PC"))
    fit(quantized)
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras", compile=False)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), quantized.predict(X, verbose=0))
    before = [numbers(v) for v in kernels(loaded)]
    fit(loaded, run_eagerly=eagerly)
    require_kept("PC", before, loaded)
    require_in_file("PC", loaded, at.export.litert(loaded, tmp_path / "q.tflite").path)


def test_a_custom_loop_after_a_reload(tmp_path):
    quantized = at.quantize_aware(compress(cnn(), "PC"))
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    before = [numbers(v) for v in kernels(loaded)]
    optimizer = keras.optimizers.SGD(0.1)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((loaded(X, training=True) - Y) ** 2)
        gradients = tape.gradient(loss, loaded.trainable_weights)
        optimizer.apply(gradients, loaded.trainable_weights)

    step()
    step()
    require_kept("PC", before, loaded)


def test_calibrated_models_keep_them_too(tmp_path):
    calibrated = at.calibrate(compress(cnn(), "PC"), X, verbose=0)
    file = at.export.litert(calibrated, tmp_path / "m.tflite")
    require_in_file("PC", calibrated, file.path)
    before = [numbers(v) for v in kernels(calibrated)]
    fit(calibrated)
    require_kept("PC", before, calibrated)


# How it is trained


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_under_a_strategy(policy):
    keras.config.set_dtype_policy(policy)
    with at.mirrored_strategy(["CPU:0", "CPU:1"]).scope():
        model = compress(cnn(), "PC")
        before = [numbers(v) for v in kernels(model)]
        quantized = at.quantize_aware(model)
        quantized.compile("adam", "mse")
    quantized.fit(X, Y, batch_size=8, verbose=0)
    require_kept("PC", before, quantized)
    for v in kernels(quantized):  # replicas hold the same
        np.testing.assert_array_equal(*(part.numpy() for part in v.value.values))


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"steps_per_execution": 2}], ids=str)
def test_compiled_with(options):
    model = compress(cnn(), "PC")
    before = [numbers(v) for v in kernels(model)]
    quantized = at.quantize_aware(model)
    fit(quantized, **options)
    require_kept("PC", before, quantized)


def test_rounding_makes_one_integer_of_each_cluster():
    model = compress(cnn(), "PC")
    quantized = at.quantize_aware(model)
    for layer in quantized.layers:
        for v in kernels(layer):
            w, rounded = numbers(v), layer.rounded(v).numpy()
            step = np.abs(w).max() / 127
            np.testing.assert_allclose(rounded / step, np.round(w / step), atol=1e-3)


def test_the_gradient_passes_straight_through():
    layer = at.quantize_aware(compress(cnn(), "PC")).layers[1]
    kernel = layer.layer.kernel
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(3.0 * layer.rounded(kernel))
    np.testing.assert_array_equal(tape.gradient(y, kernel.value), np.full(kernel.shape, 3.0))


# Normalizations


def test_a_negative_factor_is_not_folded(tmp_path):
    model = compress(cnn(), "PC")
    gamma = model.get_layer("norm").gamma
    gamma.assign(np.where(np.arange(24) == 3, -1.0, gamma.numpy()))
    quantized = at.quantize_aware(model)
    notes = {entry.layer: entry.note for entry in at.report_of(quantized).done}
    assert "folded" not in notes["norm"] and "norm" not in notes["conv"]
    fit(quantized)
    file = at.export.litert(quantized, tmp_path / "m.tflite")
    require_in_file("PC", quantized, file.path)
    # Without clusters, integers of another sign are nothing new.
    kept = at.report_of(at.quantize_aware(compress(cnn(), "P")))
    assert "folded" in str(kept)


def test_a_factor_that_is_folded_stays_positive(tmp_path):
    quantized = at.quantize_aware(compress(cnn(), "PC"))
    quantized.save(tmp_path / "q.keras")
    for model in (quantized, keras.models.load_model(tmp_path / "q.keras")):
        gamma = model.get_layer("norm").layer.gamma
        down = np.where(np.arange(24) % 2, 100.0, 0.0).astype("float32")
        keras.optimizers.SGD(1.0).apply([down], [gamma])
        assert gamma.numpy().min() == np.float32(1e-4) and gamma.numpy().max() >= 0.3
        fit(model)
        require_in_file("PC", model, at.export.litert(model, tmp_path / "m.tflite").path)


# What is taken for zeros and clusters


def test_what_is_neither_pruned_nor_clustered_stays_free():
    """Biases and slopes that start at zero, kernels of zeros, half-precision numbers that coincide."""
    keras.config.set_dtype_policy("bfloat16")
    image = keras.Input((8, 8, 2))
    x = L.Conv2D(16, 3, name="conv", bias_initializer="zeros")(image)
    x = L.Conv2D(16, 3, kernel_initializer="zeros", name="zeros")(x)
    x = L.Conv2D(16, 1, kernel_initializer="ones", name="ones")(x)
    model = keras.Model(image, L.Dense(5, name="head")(L.Flatten()(x)))
    quantized = at.quantize_aware(model)
    assert "kept" not in str(at.report_of(quantized))
    assert not any(v.constraint for v in quantized.weights)


def test_a_few_zeros_are_not_held_and_a_tenth_is():
    model = keras.Sequential([keras.Input((20,)), L.Dense(10, name="head")])
    kernel = model.layers[0].kernel
    for zeros in (19, 20):
        w = RNG.normal(size=200)
        w[:zeros] = 0
        kernel.assign(w.reshape(20, 10))
        note = at.report_of(at.quantize_aware(model)).done[-1].note
        assert ("10% zeros kept" in note) == (zeros == 20)


def test_excluded_layers_keep_their_zeros():
    quantized = at.quantize_aware(compress(cnn(), "P"), exclude=["head"])
    before = [numbers(v) for v in kernels(quantized)]
    fit(quantized)
    require_kept("P", before, quantized)


def test_nested_and_shared_models(tmp_path):
    inner = [L.Conv2D(2, 3, padding="same", name="conv"), L.ReLU()]
    body = keras.Sequential([keras.Input((8, 8, 2)), *inner], name="body")
    shared = L.Conv2D(2, 3, padding="same", activation="relu", name="shared")
    square = L.Dense(5, activation="relu", name="square")
    x = keras.Input((8, 8, 2), name="x")
    y = L.Flatten()(shared(shared(L.Add()([body(x), x]))))
    model = keras.Model(x, square(square(L.Dense(5, name="reduce")(y))))
    at.prune(model, at.ConstantSparsity(0.75), exclude="square")
    at.cluster(model, 4)
    quantized = at.quantize_aware(model)
    assert "body/conv" in str(at.report_of(quantized))
    before = [numbers(v) for v in kernels(quantized)]
    fit(quantized)
    require_kept("C", before, quantized)
    file = at.export.litert(quantized, tmp_path / "m.tflite")
    assert file.int8_fraction == 1.0
    stored = list(int8_constants(file.path))
    assert len(stored) == 4 and all(np.unique(q).size <= 4 for q in stored)


def sequences():
    x = keras.Input((6, 8), name="x")
    y = L.Conv1D(8, 3, padding="same", use_bias=False, name="conv")(x)
    y = L.ReLU()(L.BatchNormalization(name="norm")(y))
    y = L.LSTM(8, return_sequences=True, name="lstm")(y)
    y = L.MultiHeadAttention(2, 4, name="attention")(y, y)
    y = L.EinsumDense("abc,cd->abd", (6, 8), name="einsum")(y)
    return keras.Model(x, L.Dense(5, name="head")(L.Flatten()(y)))


def images():
    x = keras.Input((8, 8, 4), name="x")
    y = L.SeparableConv2D(8, 3, padding="same", name="separable")(x)
    y = L.ReLU()(L.BatchNormalization(name="norm")(y))
    y = L.Conv2DTranspose(8, 3, padding="same", name="transposed")(y)
    y = L.ReLU()(L.BatchNormalization(name="transposed_norm")(y))
    y = L.Conv2D(8, 3, dilation_rate=2, padding="same", name="dilated")(y)
    y = L.BatchNormalization(name="dilated_norm")(y)
    return keras.Model(x, L.Dense(5, name="head")(L.GlobalAveragePooling2D()(y)))


@pytest.mark.parametrize("make", [sequences, images])
def test_every_kind_of_layer(make, tmp_path):
    model = make()
    at.prune(model, at.ConstantSparsity(0.5), include="*")
    at.cluster(model, 8, include="*")
    quantized = at.quantize_aware(model)
    x = RNG.normal(size=(24, *model.inputs[0].shape[1:])).astype("float32")
    for _ in range(2):
        before = [numbers(v) for v in kernels(quantized)]
        quantized.compile("adam", "mse")
        quantized.fit(x, Y, batch_size=8, verbose=0)
        require_kept("C", before, quantized)
        quantized.save(tmp_path / "q.keras")
        quantized = keras.models.load_model(tmp_path / "q.keras")
    file = at.export.litert(quantized, tmp_path / "m.tflite", allow_float=True, batch_size=1)
    found = {q.size: np.unique(q).size for q in int8_constants(file.path) if q.max() != q.min()}
    sizes = {v.shape.num_elements() for v in kernels(quantized)}
    assert sizes <= set(found) and max(found.values()) <= 8


def test_stripping_frees_a_quantized_model_also_after_a_reload(tmp_path):
    quantized = at.quantize_aware(compress(cnn(), "PC"))
    at.strip_clustering(quantized)
    assert not any(clusters_of(v) for v in quantized.weights)
    assert all(isinstance(v.constraint, MaskConstraint) for v in kernels(quantized))
    at.strip_pruning(quantized, exclude="head")
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    assert [bool(v.constraint) for v in kernels(loaded)] == [False] * 4 + [True]
    assert constraint_of(kernels(loaded)[-1]) is None
    fit(loaded)
    assert [np.mean(v.numpy() == 0) > 0.5 for v in kernels(loaded)] == [False] * 4 + [True]


def test_a_quantized_model_can_be_pruned_further():
    quantized = at.quantize_aware(compress(cnn(), "PC"))
    at.prune(quantized, at.ConstantSparsity(0.9), include="head")
    fit(quantized)
    head = kernels(quantized)[-1].numpy()
    assert np.mean(head == 0) == 0.9 and np.unique(head).size <= 16


def test_other_formats_keep_the_model_clustered():
    model = compress(cnn(), "PC")
    before = [numbers(v) for v in kernels(model)]
    quantized = at.quantize_aware(model, at.Int8Weights())
    fit(quantized)
    require_kept("PC", before, quantized)


# All together


def digits_cnn():
    conv = {"padding": "same", "use_bias": False}
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *(L.Conv2D(32, 3, **conv), L.BatchNormalization(momentum=0.9), L.ReLU()),
            *(L.Conv2D(64, 3, **conv), L.BatchNormalization(momentum=0.9), L.ReLU()),
            L.MaxPooling2D(),
            L.Flatten(),
            *(L.Dense(100, use_bias=False), L.BatchNormalization(momentum=0.9), L.ReLU()),
            L.Dense(10),
        ]
    )


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.full)])
def test_ninety_percent_sparse_sixteen_clusters_eight_bits(seeds, digits, tmp_path):
    """A twentieth of the bytes, within a point of accuracy, on average over the seeds."""
    (x, y), (x_test, y_test) = digits
    lost, ratios = [], []

    def train(model, epochs, rate):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(rate), loss)
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)

    def accuracy(path):
        return np.mean(at.export.run_litert(path, x_test).argmax(axis=1) == y_test)

    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        model = digits_cnn()
        train(model, 5, 2e-3)
        before = at.export.litert(model, tmp_path / "float.tflite").path
        at.prune(model, at.PolynomialDecay(0.9, end_step=180, frequency=10))
        train(model, 10, 2e-3)
        at.cluster(model, 16)
        train(model, 2, 1e-3)
        quantized = at.quantize_aware(model)
        train(quantized, 2, 5e-4)
        assert at.sparsity(quantized).total == pytest.approx(0.9, abs=1e-3)
        after = at.export.litert(quantized, tmp_path / "int8.tflite").path
        require_in_file("PC", quantized, after)
        lost.append(accuracy(before) - accuracy(after))
        ratios.append(before.stat().st_size / len(gzip.compress(after.read_bytes(), 9)))
    assert np.mean(lost) < 0.01
    assert min(ratios) > 20
