"""The patterns: which weights go together, in kernels of every kind, at every step of a training."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.pruning._forms import form_of
from accel_tf.pruning._patterns import keep_largest

L = keras.layers
RNG = np.random.default_rng(0)
PATTERNS = [
    at.Unstructured(),
    at.Block((1, 4)),
    at.Block([3, 4], pooling="MAX"),
    at.NM(2, 4),
    at.Channels(),
    at.Channels("mean"),
]


def mask_of(weights, pattern, sparsity):
    """The mask of a kernel (inputs, outputs), as `prune` decides it."""
    scores = pattern.scores(tf.abs(tf.constant(weights)))
    return pattern.expand(keep_largest(scores, tf.constant(sparsity)), weights.shape).numpy()


def blocks_of(size, shape):
    """The blocks of a matrix as slices, row by row."""
    starts = [(i, j) for i in range(0, size[0], shape[0]) for j in range(0, size[1], shape[1])]
    return [np.s_[i : i + shape[0], j : j + shape[1]] for i, j in starts]


def mixed():
    """A model with a kernel of every kind of form."""
    image = keras.Input((8, 8, 4))
    x = L.Conv2D(8, 3, name="conv")(image)
    x = L.Conv2DTranspose(6, 2, name="transposed")(x)
    x = L.SeparableConv2D(12, 2, name="separable")(x)
    x = L.Reshape((36, 12))(x)
    x = L.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = L.EinsumDense("abc,dc->abd", (None, 10), name="einsum")(x)
    x = L.LSTM(4, name="lstm")(x)
    return keras.Model(image, L.Dense(5, name="head")(x))


def kernels(model):
    """The path and the values, inputs first, of each kernel."""
    for path, layer in at.layers.walk(model):
        for v in layer._trainable_variables:
            if v.name.endswith("kernel"):
                yield f"{path}/{v.name}", form_of(v, layer).of(tf.constant(v.numpy())).numpy()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_config_round_trip(pattern):
    assert type(pattern).from_config(pattern.get_config()) == pattern
    assert hash(pattern) == hash(type(pattern).from_config(pattern.get_config()))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    pooling=st.sampled_from(["AVG", "MAX"]),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 9),
)
def test_blocks_are_the_definition(rows, columns, height, width, pooling, sparsity, seed):
    """Against loops, for shapes that divide; whole blocks, as many as are due, for all."""
    weights = np.random.default_rng(seed).normal(size=(rows, columns)).astype("float32")
    mask = mask_of(weights, at.Block((height, width), pooling), np.float32(sparsity))
    blocks = blocks_of((rows, columns), (height, width))
    kept = [mask[block].all() for block in blocks]
    assert kept == [mask[block].any() for block in blocks]
    n = np.float32(len(blocks))
    assert sum(kept) == max(round(float(n * (np.float32(1) - np.float32(sparsity)))), 1)
    if rows % height == 0 and columns % width == 0:
        pool = np.mean if pooling == "AVG" else np.max
        scores = [pool(np.abs(weights[block]).astype(float)) for block in blocks]
        dropped = [s for s, k in zip(scores, kept, strict=True) if not k]
        lowest = min(s for s, k in zip(scores, kept, strict=True) if k)
        assert max(dropped, default=0) <= lowest + 1e-6


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    n=st.integers(1, 4),
    more=st.integers(1, 4),
    progress=st.floats(0, 1),
    tied=st.booleans(),
)
def test_n_of_m_is_the_definition(shape, n, more, progress, tied):
    """At its sparsity n of m go, the smallest; before, at most n do, and never one that is to stay."""
    pattern, rng = at.NM(n, n + more), np.random.default_rng(0)
    weights = rng.integers(0, 3, shape) if tied else rng.normal(size=shape)
    weights = weights.astype("float32")
    full = mask_of(weights, pattern, pattern.levels(at.ConstantSparsity(pattern.sparsity))[0])
    part = mask_of(weights, pattern, np.float32(progress * pattern.sparsity))
    assert (full <= part).all()
    for column, m in zip(
        np.moveaxis(np.abs(weights), -2, -1).reshape(-1, shape[-2]),
        np.moveaxis(full, -2, -1).reshape(-1, shape[-2]),
        strict=True,
    ):
        for start in range(0, shape[-2], n + more):
            group, stays = column[start : start + n + more], m[start : start + n + more]
            assert stays.sum() == min(more, group.size)
            assert group[stays].min() >= group[~stays].max(initial=0)


@pytest.mark.parametrize("criterion", ["l2", "mean"])
def test_channels_are_the_definition(criterion):
    weights = RNG.normal(size=(3, 3, 4, 10)).astype("float32") * RNG.uniform(0.5, 2, 10)
    mask = mask_of(weights.astype("float32"), at.Channels(criterion), np.float32(0.4))
    order = 2 if criterion == "l2" else 1
    norms = np.linalg.norm(weights.reshape(36, 10), ord=order, axis=0)
    expected = np.isin(np.arange(10), np.argsort(norms)[4:])
    np.testing.assert_array_equal(mask, np.broadcast_to(expected, weights.shape))


def test_forms_put_inputs_first_and_outputs_last():
    """Shapes of every kind; and a product with the matrix is what the layers compute."""
    forms = dict(kernels(mixed()))
    assert {path: form.shape for path, form in forms.items()} == {
        "conv/kernel": (3, 3, 4, 8),
        "transposed/kernel": (2, 2, 8, 6),  # Keras has (2, 2, 6, 8)
        "separable/depthwise_kernel": (2, 2, 6),
        "separable/pointwise_kernel": (1, 1, 6, 12),
        "attention/query/kernel": (12, 8),
        "attention/key/kernel": (12, 8),
        "attention/value/kernel": (12, 8),
        "attention/attention_output/kernel": (2, 4, 12),
        "einsum/kernel": (12, 10),
        "lstm/lstm_cell/kernel": (10, 16),
        "lstm/lstm_cell/recurrent_kernel": (4, 16),
        "head/kernel": (4, 5),
    }
    layer = L.EinsumDense("abc,dc->abd", (None, 10))
    x = RNG.normal(size=(1, 2, 6)).astype("float32")
    y = layer(x).numpy()
    matrix = form_of(layer.kernel, layer).of(tf.constant(layer.kernel.numpy())).numpy()
    np.testing.assert_allclose(x @ matrix, y, atol=1e-5)
    layer = L.Conv2DTranspose(3, 1)
    x = RNG.normal(size=(1, 2, 2, 5)).astype("float32")
    y = layer(x).numpy()
    matrix = form_of(layer.kernel, layer).of(tf.constant(layer.kernel.numpy())).numpy()
    np.testing.assert_allclose(x @ matrix.reshape(5, 3), y, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv", "transposed", "separable", "einsum"])
def test_forms_come_back_as_they_were(layer):
    layer = mixed().get_layer(layer)
    for v in layer.trainable_variables:
        if len(v.shape) > 1:
            form, kernel = form_of(v, layer), tf.constant(v.numpy())
            np.testing.assert_array_equal(form.back(form.of(kernel), v.shape), kernel)


def assert_pattern(model, pattern):
    """Half of the units of each kernel that has zeros are zero, as a whole; returns how many have."""
    masks = {path: matrix != 0 for path, matrix in kernels(model)}
    masks = {path: mask for path, mask in masks.items() if not mask.all()}
    for path, mask in masks.items():
        if isinstance(pattern, at.NM):
            whole = mask.shape[-2] // pattern.m * pattern.m
            groups = np.moveaxis(mask, -2, -1)[..., :whole]
            groups = groups.reshape(*groups.shape[:-1], -1, pattern.m)
            assert (groups.sum(axis=-1) == pattern.m - pattern.n).all(), path
            continue
        matrix = mask.reshape(-1, mask.shape[-1])
        shape = pattern.shape if isinstance(pattern, at.Block) else (len(matrix), 1)
        units = [matrix[block] for block in blocks_of(matrix.shape, shape)]
        kept = [unit.any() for unit in units]
        assert kept == [unit.all() for unit in units], path
        assert sum(kept) == round(len(units) / 2), path
    return len(masks)


@pytest.mark.parametrize("pattern", PATTERNS[1:5], ids=repr)
def test_fit(pattern):
    """Kernels of every form, on the way and at the schedule's end."""
    model = mixed()
    report = at.prune(model, at.PolynomialDecay(0.5, end_step=4, frequency=2), pattern=pattern)
    assert all(repr(pattern) in entry.note for entry in report.done)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    x, y = RNG.normal(size=(10, 8, 8, 4)), RNG.normal(size=(10, 5))
    model.fit(x, y, batch_size=2, verbose=0)
    assert at.sparsity(model).note == ""
    assert assert_pattern(model, pattern) == (9 if isinstance(pattern, at.Channels) else 11)


@pytest.mark.parametrize("pattern", PATTERNS[1:5], ids=repr)
def test_xla(pattern):
    model = keras.Sequential([keras.Input((4, 4, 4)), L.Conv2D(8, 3), L.Flatten(), L.Dense(5)])
    at.prune(model, at.PolynomialDecay(0.5, end_step=2, frequency=1), pattern=pattern)
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=True)
    model.fit(RNG.normal(size=(6, 4, 4, 4)), RNG.normal(size=(6, 5)), batch_size=2, verbose=0)
    assert assert_pattern(model, pattern) == 2


def test_mirrored_strategy_and_float16():
    keras.config.set_dtype_policy("mixed_float16")
    strategy = at.mirrored_strategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), L.Dense(8), L.Dense(4)])
        model.compile("sgd", "mse")
    at.prune(model, at.ConstantSparsity(0.5, frequency=1), pattern=at.Block((2, 2)))
    model.fit(RNG.normal(size=(8, 8)), RNG.normal(size=(8, 4)), batch_size=4, verbose=0)
    for layer in model.layers:
        blocks = layer.kernel.numpy().reshape(4, 2, -1, 2) != 0
        np.testing.assert_array_equal(blocks.all(axis=(1, 3)), blocks.any(axis=(1, 3)))
        assert blocks.mean() == 0.5


@pytest.mark.parametrize("pattern", [at.Block((1, 4)), at.Channels("mean"), at.NM(1, 2)], ids=repr)
def test_global_scope_counts_the_units_of_all_kernels(pattern):
    model = keras.Sequential([keras.Input((8,)), L.Dense(16, name="a"), L.Dense(8, name="b")])
    a, b = model.get_layer("a").kernel, model.get_layer("b").kernel
    a.assign(np.abs(a) + 1)
    b.assign(np.sign(b) * np.clip(np.abs(b), 1e-3, 0.9))
    at.prune(model, at.ConstantSparsity(0.5), pattern=pattern, scope="global")
    if isinstance(pattern, at.NM):  # half of the neighbours go everywhere
        assert at.sparsity(model).column("sparsity") == [0.5, 0.5, 0.5]
    elif isinstance(pattern, at.Block):  # of 64 units 32 go, and b has the 32 smaller ones, but one
        assert at.sparsity(model).column("zeros") == [0, 128, 128]
    else:  # of 24 channels 12 go, of which b has 8
        assert at.sparsity(model).column("zeros") == [4 * 8, 128, 160]


@pytest.mark.parametrize("block, format", [((1, 4), "4x1"), ((1, 16), "16x1")])
def test_blocks_are_what_sparsify_packs(block, format):
    tokens = keras.Input((8, 512))
    x = L.Dense(1024, name="dense")(tokens)
    x = L.MultiHeadAttention(8, 64, name="attention")(x, x)
    x = L.Conv2D(512, 1, use_bias=False, name="conv")(L.Reshape((2, 4, 1024))(x))
    model = keras.Model(tokens, x)
    at.prune(model, at.ConstantSparsity(0.9), pattern=at.Block(block))
    fast = at.sparsify(model, batch_size=8)
    done = {entry.layer: entry.note for entry in at.report_of(fast).done}
    parts = ("query", "key", "value", "attention_output")
    assert set(done) == {"conv", "dense", *(f"attention/{part}" for part in parts)}
    for name, note in done.items():
        assert f", {format}, " in note, (name, note)


def test_what_cannot_take_a_pattern_is_in_the_report():
    report = at.prune(mixed(), at.ConstantSparsity(0.5), pattern=at.Channels())
    left = dict(report.skipped)
    assert "lstm/lstm_cell" in left and "a column in the kernel for each gate" in str(left)
    gray = keras.Sequential([keras.Input((8, 8, 2)), L.Conv2D(8, 3, name="first"), L.Conv2D(6, 3)])
    report = at.prune(gray, at.ConstantSparsity(0.5), pattern=at.NM(2, 4))
    assert report.skipped == (("first", "NM(n=2, m=4) keeps 2 of 4 inputs, and there are 2"),)
    report = at.prune(gray, at.ConstantSparsity(0.5), pattern=at.Block((4, 4)))
    assert report.done[0].note.endswith("the last blocks of (18, 8) cut off")
    report = at.prune(gray, at.ConstantSparsity(2 / 3), pattern=at.NM(2, 3), exclude="first")
    assert report.done[0].note.endswith("the last groups of 8 inputs cut off")


def test_n_of_m_has_a_sparsity_of_its_own():
    model = mixed()
    before = model.get_weights()
    for schedule in (at.ConstantSparsity(0.9), at.PolynomialDecay(0.4, 1000)):
        with pytest.raises(ValueError, match=r"of its own, 2 / 4 = 0\.5(.|\n)*ends at 0\.[94]"):
            at.prune(model, schedule, pattern=at.NM(2, 4))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: at.Block(4), "shape must be 2 integers. Received: 4"),
        (lambda: at.Block((1, 4, 4)), r"shape must be 2 integers. Received: \(1, 4, 4\)"),
        (lambda: at.Block((1, 4.0)), r"shape must be 2 integers. Received: \(1, 4\.0\)"),
        (lambda: at.Block((0, 4)), r"shape must be ≥ 1 by ≥ 1. Received: \(0, 4\)"),
        (lambda: at.Block((1, 4), "MEAN"), '"AVG" or "MAX". Received: \'MEAN\''),
        (lambda: at.NM(4, 4), "1 ≤ n < m. Received: n=4, m=4"),
        (lambda: at.NM(0, 4), "1 ≤ n < m. Received: n=0, m=4"),
        (lambda: at.NM(True, 4), "must be 2 integers"),
        (lambda: at.Channels("l1"), 'criterion is "l2" or "mean". Received: \'l1\''),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
