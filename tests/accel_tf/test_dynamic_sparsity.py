"""`train_sparse`: constant sparsity at every step, rewired as SET and RigL say, however it trains."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.pruning._distribution import active_weights

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(192, 8, 8, 1)).astype("float32")
Y = RNG.integers(0, 10, 192)
METHODS = [
    at.SET(0.8, end_step=9, frequency=3),
    at.RigL(0.8, end_step=9, frequency=3, distribution="uniform"),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def cnn():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ]
    )


def mlp(units=24):
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(units, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="head"),
        ]
    )


def kernels(model):
    return [v for v in model.trainable_variables if v.name == "kernel"]


def masks(model):
    return [v.constraint.masks.masks[id(v)].numpy() for v in kernels(model)]


def steps(model, optimizer, n, start=0):
    """A plain training loop; yields the step, the gradients of the kernels, and masks before."""
    for t in range(start, start + n):
        x, y = X[16 * (t % 12) :][:16].reshape(16, -1), Y[16 * (t % 12) :][:16]
        before = masks(model)
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        yield t + 1, [tf.cast(g, tf.float32).numpy() for g in gradients if len(g.shape) > 1], before


class Check(keras.callbacks.Callback):
    """Asserts, after each batch that `fit` reports, that each kernel's zeros are its mask."""

    def __init__(self, method, frozen_after=9):
        super().__init__()
        self.method, self.frozen_after = method, frozen_after
        self.seen, self.history = [], []

    def on_train_begin(self, logs=None):
        self.active = [m.sum() for m in masks(self.model)]
        n = sum(m.size for m in masks(self.model))
        assert sum(self.active) == round(n * (1 - self.method.sparsity))
        self.history.append(masks(self.model))

    def on_train_batch_end(self, batch, logs=None):
        now = masks(self.model)
        for v, mask, active in zip(kernels(self.model), now, self.active, strict=True):
            assert mask.sum() == active
            np.testing.assert_array_equal(v.numpy() != 0, mask)
        self.seen.append(int(self.model.optimizer.iterations.numpy()))
        self.history.append(now)

    @property
    def moved_at(self):
        """The steps that moved a mask."""
        pairs = zip(self.seen, self.history[:-1], self.history[1:], strict=True)
        return [
            step for step, a, b in pairs if any((x != y).any() for x, y in zip(a, b, strict=True))
        ]


def fit(model, check, **kwargs):
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[check], **kwargs)
    return check


def due(method):
    """RigL's last update replaces nothing: its cosine is zero by then."""
    return [3, 6, 9] if type(method) is at.SET else [3, 6]


@each_method
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_fit(method, options):
    model = cnn()
    at.train_sparse(model, method)
    model.compile("adam", LOSS, **options)
    check = fit(model, Check(method))
    assert check.seen == list(range(1, 13)) and check.moved_at == due(method)


@each_method
def test_several_steps_per_execution(method):
    model, plain = cnn(), cnn()
    plain.set_weights(model.get_weights())
    for m, k in ((model, 4), (plain, 1)):
        m.compile("adam", LOSS, steps_per_execution=k)
        at.train_sparse(m, method)
        keras.utils.set_random_seed(1)
        check = fit(m, Check(method), shuffle=False)
    assert check.moved_at == due(method)
    for a, b in zip(masks(model), masks(plain), strict=True):
        np.testing.assert_array_equal(a, b)


@each_method
@pytest.mark.parametrize("jit_compile", [False, True])
def test_custom_loop(method, jit_compile):
    model, optimizer = cnn(), keras.optimizers.SGD(0.1, momentum=0.9)
    at.train_sparse(model, method, optimizer=optimizer)

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    moved = []
    for t in range(1, 13):
        before = masks(model)
        step(tf.constant(X[:16]), tf.constant(Y[:16]))
        for v, old, new in zip(kernels(model), before, masks(model), strict=True):
            np.testing.assert_array_equal(v.numpy() != 0, new)
            assert old.sum() == new.sum()
            moved += [t] * int((old != new).any())
    assert sorted(set(moved)) == due(method)


@each_method
@pytest.mark.parametrize("jit_compile", [False, True])
def test_mixed_precision_with_skipped_steps(method, jit_compile):
    keras.config.set_dtype_policy("mixed_float16")
    model = cnn()
    at.train_sparse(model, method)
    # So large a scale overflows float16 at first: those steps are skipped, and do not count.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=2.0**26)
    model.compile(optimizer, LOSS, jit_compile=jit_compile)
    check = fit(model, Check(method), epochs=2)
    assert check.seen[0] == 0 and 12 < check.seen[-1] < 24
    assert check.moved_at == due(method)


def test_bfloat16_weights():
    """Eight bits of precision: ties everywhere."""
    keras.config.set_dtype_policy("bfloat16")
    model, optimizer = mlp(), keras.optimizers.Adam()
    at.train_sparse(model, METHODS[1], optimizer=optimizer)
    assert kernels(model)[0].dtype == "bfloat16"
    for t, _, before in steps(model, optimizer, 7):
        for v, old, new in zip(kernels(model), before, masks(model), strict=True):
            np.testing.assert_array_equal(v.numpy() != 0, new)
            assert old.sum() == new.sum()
            assert (old != new).any() == (t in (3, 6))


@each_method
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_mirrored_strategy(method, policy):
    keras.config.set_dtype_policy(policy)
    strategy = at.mirrored_strategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = cnn()
        model.compile("adam", LOSS)
    at.train_sparse(model, method)
    assert fit(model, Check(method)).moved_at == due(method)
    local = strategy.experimental_local_results
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    for v in kernels(model):
        copies = [m.numpy() for m in local(v.constraint.masks.masks[id(v)])]
        assert len(copies) == 2
        np.testing.assert_array_equal(*copies)
        np.testing.assert_array_equal(*(value.numpy() for value in local(v.value)))
        momentum = optimizer._momentums[optimizer._get_variable_index(v)]
        first, second = (value.numpy() for value in local(momentum.value))
        np.testing.assert_array_equal(first, second)
        assert not first[~copies[0]].any()


def test_gradient_accumulation():
    """Two batches are a step, whose gradient is the mean of theirs."""
    method = at.RigL(0.8, end_step=9, frequency=3)
    model = mlp()
    optimizer = keras.optimizers.Adam(gradient_accumulation_steps=2)
    at.train_sparse(model, method, optimizer=optimizer)
    total = None
    for t, gradients, before in steps(model, optimizer, 12):
        total = gradients if t % 2 else [a + b for a, b in zip(total, gradients, strict=True)]
        for v, g, old, new in zip(kernels(model), total, before, masks(model), strict=True):
            np.testing.assert_array_equal(v.numpy() != 0, new)
            grown = new & ~old
            assert grown.any() == (t in (6, 12))
            if grown.any():
                assert np.abs(g[grown]).min() >= np.abs(g[~old & ~grown]).max() * (1 - 1e-5)


OPTIMIZERS = {
    "SGD": {"learning_rate": 0.1},
    "momentum": {"learning_rate": 0.1, "momentum": 0.9},
    "nesterov": {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"weight_decay": 1e-2},
    "amsgrad": {"amsgrad": True},
    "AdamW": {"clipnorm": 0.1},
    "Adamax": {},
    "Nadam": {},
    "RMSprop": {},
    "centered": {"centered": True, "momentum": 0.9},
    "Adagrad": {"learning_rate": 0.01},
    "Adadelta": {"learning_rate": 0.1},
    "Ftrl": {"learning_rate": 0.01},
    "Lamb": {},
    "Lion": {},
    "Muon": {},
}
CLASS = {"momentum": "SGD", "nesterov": "SGD", "amsgrad": "Adam", "centered": "RMSprop"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rigl_grows_where_the_gradient_is_largest_and_drops_the_smallest(name):
    optimizer = getattr(keras.optimizers, CLASS.get(name, name))(**OPTIMIZERS[name])
    method = at.RigL(0.8, end_step=40, frequency=10, fraction=0.4)
    model = mlp()
    at.train_sparse(model, method, optimizer=optimizer)
    for t, gradients, before in steps(model, optimizer, 40):
        expected = 0.4 / 2 * (1 + math.cos(math.pi * t / 40)) if t % 10 == 0 else 0.0
        for v, g, old, new in zip(kernels(model), gradients, before, masks(model), strict=True):
            grown, dropped = new & ~old, old & ~new
            assert grown.sum() == dropped.sum() == np.round(np.float32(expected) * old.sum())
            np.testing.assert_array_equal(v.numpy() != 0, new)
            if grown.any():
                assert np.abs(g[grown]).min() >= np.abs(g[~old & ~grown]).max() * (1 - 1e-5)


def test_new_weights_start_at_zero_and_old_ones_go_by_magnitude():
    """In plain SGD every number of a rewiring can be told from the gradient."""
    model, optimizer = mlp(), keras.optimizers.SGD(0.1)
    at.train_sparse(model, at.RigL(0.8, end_step=8, frequency=4), optimizer=optimizer)
    before = kernels(model)[0].numpy()
    for t, (g, _), (old, _) in steps(model, optimizer, 4):
        kernel, new = kernels(model)[0].numpy(), masks(model)[0]
        stepped = np.where(old, before - np.float32(0.1) * g, 0)
        if t == 4:
            grown, kept, dropped = new & ~old, new & old, old & ~new
            assert grown.any()
            np.testing.assert_allclose(kernel[grown], -0.1 * g[grown], rtol=1e-6)
            assert np.abs(stepped[dropped]).max() <= np.abs(stepped[kept]).min()
        before = kernel


def test_the_optimizers_state_of_inactive_weights_is_what_it_was_at_first():
    for optimizer, attributes, initial in (
        (keras.optimizers.Adam(), ("_momentums", "_velocities"), 0.0),
        (keras.optimizers.Adagrad(initial_accumulator_value=0.5), ("_accumulators",), 0.5),
    ):
        model = mlp()
        at.train_sparse(model, METHODS[0], optimizer=optimizer)
        for _ in steps(model, optimizer, 7):
            for v, mask in zip(kernels(model), masks(model), strict=True):
                for attribute in attributes:
                    slot = getattr(optimizer, attribute)[optimizer._get_variable_index(v)].numpy()
                    assert (slot[~mask] == initial).all()
                    assert (slot[mask] != initial).mean() > 0.3  # the others are left alone


def test_set_grows_at_random_by_its_seed():
    def grown(seed):
        keras.utils.set_random_seed(0)
        model, optimizer = mlp(100), keras.optimizers.SGD(0.1)
        at.train_sparse(model, at.SET(0.8, end_step=3, frequency=3, seed=seed), optimizer=optimizer)
        old = masks(model)[0]
        for _ in steps(model, optimizer, 3):
            pass
        return masks(model)[0] & ~old

    first, again, other = grown(0), grown(0), grown(1)
    np.testing.assert_array_equal(first, again)
    assert (first & other).sum() < 0.5 * first.sum()
    halves = first[:32].sum(), first[32:].sum()  # no place is preferred
    assert abs(halves[0] - halves[1]) < 5 * np.sqrt(first.sum())


SHAPES = st.lists(
    st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5
)


@given(
    SHAPES, st.floats(0, 0.999), st.sampled_from(["uniform", "erdos_renyi", "erdos_renyi_kernel"])
)
@settings(max_examples=200)
def test_active_weights_add_up(shapes, sparsity, distribution):
    sizes = np.array([math.prod(shape) for shape in shapes])
    kept = np.array(active_weights(shapes, sparsity, distribution))
    assert kept.sum() == max(round(float(sizes.sum()) * (1 - sparsity)), len(shapes))
    assert (kept >= 1).all() and (kept <= sizes).all()


def test_distributions():
    shapes = [(3, 3, 64, 64), (64, 256), (256, 10)]
    sizes = np.array([math.prod(shape) for shape in shapes])
    uniform = np.array(active_weights(shapes, 0.9, "uniform")) / sizes
    np.testing.assert_allclose(uniform, 0.1, atol=1e-3)
    for name, sums in (("erdos_renyi", [128, 320, 266]), ("erdos_renyi_kernel", [134, 320, 266])):
        products = sizes if name == "erdos_renyi_kernel" else np.array([64 * 64, 64 * 256, 2560])
        density = np.array(active_weights(shapes, 0.9, name)) / sizes
        ratio = density / (np.array(sums) / products)
        np.testing.assert_allclose(ratio / ratio[0], 1, atol=2e-2)
    # What a small kernel cannot take goes to the others.
    assert active_weights([(4, 4), (400, 400)], 0.99, "erdos_renyi") == [16, 1584]


@each_method
def test_resume_from_a_file(method, tmp_path):
    whole, first = cnn(), cnn()
    first.set_weights(whole.get_weights())
    for model in (whole, first):
        model.compile("adam", LOSS)
        at.train_sparse(model, method)
    data = {"x": X, "y": Y, "batch_size": 48, "shuffle": False, "verbose": 0}  # 4 steps an epoch
    whole.fit(**data, epochs=3)
    first.fit(**data)
    first.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    step = int(loaded.optimizer.iterations.numpy())
    at.train_sparse(loaded, method, initial_step=step)
    for a, b in zip(masks(first), masks(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded.fit(**data, epochs=2)
    for a, b in zip(whole.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_array_equal(a != 0, b != 0)


@each_method
@pytest.mark.parametrize("replicas", [1, 2])
def test_backup_and_restore(method, replicas, tmp_path):
    strategy = at.mirrored_strategy([f"CPU:{i}" for i in range(replicas)])
    data = {"x": X, "y": Y, "batch_size": 48, "shuffle": False, "verbose": 0, "epochs": 3}

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def run(*callbacks):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = cnn()
            model.compile("adam", LOSS)
        at.train_sparse(model, method)
        model.fit(**data, callbacks=list(callbacks))
        return model

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(keras.callbacks.BackupAndRestore(tmp_path), Interrupt())
    resumed = run(keras.callbacks.BackupAndRestore(tmp_path))
    assert int(resumed.optimizer.iterations.numpy()) == 12
    for a, b in zip(masks(whole), masks(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rewiring_goes_on_when_the_model_is_compiled_anew():
    model = cnn()
    at.train_sparse(model, METHODS[0])
    for first, last, moves in ((0, 4, [3]), (4, 10, [6, 9]), (10, 12, [])):
        model.compile("adam", LOSS)
        check = Check(METHODS[0])
        part = slice(16 * first, 16 * last)
        model.fit(X[part], Y[part], batch_size=16, verbose=0, callbacks=[check])
        assert [first + step for step in check.moved_at] == moves


def test_pruned_models_keep_their_mask_and_both_verbs_replace_each_other():
    model = cnn()
    at.prune(model, at.ConstantSparsity(0.8))
    before = [v.numpy() for v in kernels(model)]
    at.train_sparse(model, METHODS[1])
    for a, v in zip(before, kernels(model), strict=True):
        np.testing.assert_array_equal(a, v.numpy())
    at.prune(model, at.ConstantSparsity(0.9))
    assert abs(at.sparsity(model).total - 0.9) < 1e-3
    model.compile("adam", LOSS)
    model.fit(X, Y, verbose=0)
    assert abs(at.sparsity(model).total - 0.9) < 1e-3


def test_constraints_of_the_user_stay_in_force():
    """A constraint that makes zeros cannot make the sparsity differ from the mask's."""
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(10, kernel_constraint="non_neg", name="head")]
    )
    at.train_sparse(model, METHODS[0])
    model.compile("sgd", LOSS)
    model.fit(X.reshape(-1, 64), Y, batch_size=16, verbose=0)
    kernel = kernels(model)[0].numpy()
    assert np.mean(kernel == 0) == 0.8 and kernel.min() == 0


def test_other_models_and_the_report():
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(9, 8, name="words")(inputs)
    x = keras.layers.LSTM(4, return_sequences=True, name="lstm")(x)
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    shared = keras.layers.Dense(4, name="shared")
    x = shared(shared(keras.Sequential([keras.layers.Dense(4, name="deep")], name="inner")(x)))
    model = keras.Model(inputs, keras.layers.Dense(2, name="out")(x))
    report = at.train_sparse(model, at.RigL(0.5, end_step=10, frequency=2), exclude="out")
    done = {e.layer.rpartition("/")[2]: e.note for e in report.done}
    assert {"query", "value", "attention_output", "deep", "shared"} < set(done)
    assert " of 16 active, 0." in done["shared"] and "recurrent_kernel" in done["lstm_cell"]
    left = dict(report.skipped)
    assert left["out"] == "excluded" and left["words"].startswith("embeddings is not a kernel")
    assert at.report_of(model) is report
    model.compile("adam", "mse")
    model.fit(np.zeros((8, 6), "int32"), np.ones((8, 6, 2)), verbose=0, epochs=5)
    table = at.sparsity(model)
    (n, zeros) = (
        sum(row[i] for row in table.rows if row[0] not in ("out", "total")) for i in (3, 4)
    )
    assert zeros == n - round(n / 2)
    assert table.note == ""


@pytest.mark.parametrize("kind", [at.SET, at.RigL])
def test_configuration_round_trip(kind):
    method = kind(0.9, end_step=500, frequency=50, fraction=0.2, distribution="uniform", seed=3)
    assert kind.from_config(method.get_config()) == method
    with pytest.raises(AttributeError):
        method.sparsity = 0.5
    for t in (0, 49, 50, 120, 500, 700):
        assert method.latest_update(t) == min(t, 500) // 50 * 50
        assert int(method.latest_update(tf.constant(t, tf.int64))) == method.latest_update(t)
        share = method.fraction_at(tf.constant(t, tf.int64))
        assert float(share) == pytest.approx(method.fraction_at(t), abs=1e-7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 1.0}, r"RigL: sparsity is the fraction of zeros, in \[0, 1\). Received: 1.0"),
        ({"fraction": 0.0}, r"fraction is the share of the active .*, in \(0, 1\).* Received: 0.0"),
        ({"frequency": 0}, "RigL: frequency must be ≥ 1. Received: 0"),
        ({"frequency": 1.5}, "RigL: frequency must be an integer. Received: 1.5"),
        ({"end_step": 50}, "RigL never rewires: end_step=50 comes before the first rewiring"),
        ({"distribution": "erk"}, "distribution is one of 'uniform', .*Received: 'erk'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        at.RigL(**{"sparsity": 0.9, "end_step": 1000, **arguments})


def test_errors_name_the_way_out():
    model = cnn()
    with pytest.raises(ValueError, match=r"expects RigL\(…\) or SET\(…\). Received: Constant"):
        at.train_sparse(model, at.ConstantSparsity(0.5))
    with pytest.raises(ValueError, match="initial_step must be ≥ 0. Received: -1"):
        at.train_sparse(model, METHODS[0], initial_step=-1)
    with pytest.raises(
        ValueError, match="Nothing in model 'sequential' can be made sparse:\ntrain"
    ):
        at.train_sparse(model, METHODS[0], exclude="*")
    at.train_sparse(model, METHODS[0])
    optimizer = keras.optimizers.SGD()
    gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
    with pytest.raises(ValueError, match="'sequential/conv/kernel', but the model is not compiled"):
        optimizer.apply(gradients, model.trainable_variables)
    model.compile("adam", LOSS)
    with pytest.raises(ValueError, match=r"call train_sparse\(…, optimizer=the_one_that_trains\)"):
        keras.optimizers.SGD().apply(gradients, model.trainable_variables)


@pytest.mark.parametrize(
    "method, optimizer, message",
    [
        (METHODS[1], "adafactor", "RigL grows .* which Adafactor divides"),
        (METHODS[0], "schedulefreeadamw", "SET cannot train with ScheduleFreeAdamW"),
    ],
    ids=["adafactor", "schedule_free"],
)
def test_optimizers_that_cannot_be_followed_are_refused(method, optimizer, message):
    model = cnn()
    at.train_sparse(model, method)
    if optimizer == "schedulefreeadamw":
        optimizer = keras.optimizers.ScheduleFreeAdamW()
    model.compile(optimizer, LOSS)
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, verbose=0)


def test_set_trains_with_adafactor():
    model = cnn()
    at.train_sparse(model, METHODS[0])
    model.compile("adafactor", LOSS)
    assert fit(model, Check(METHODS[0])).moved_at == [3, 6, 9]
