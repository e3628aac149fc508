"""`prune`: exact sparsity after every step, however the model is trained; selection and reports."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.pruning._constraint import MaskConstraint

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(192, 8, 8, 1)).astype("float32")
Y = RNG.integers(0, 10, 192)
SCHEDULE = at.PolynomialDecay(0.9, end_step=9, initial_sparsity=0.2, begin_step=2, frequency=3)


def cnn(**kwargs):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, name="conv", **kwargs),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ]
    )


def kernels(model):
    return [w for w in model.trainable_variables if isinstance(w.constraint, MaskConstraint)]


def zeros_due(schedule, step, n):
    """How many zeros n weights have after `step`: TFMOT's arithmetic, in float32."""
    update = schedule.latest_update(step)
    if update < 0:
        return 0
    kept = np.round(np.float32(n) * (np.float32(1) - np.float32(schedule.sparsity_at(update))))
    return n - max(int(kept), 1)


def assert_sparse(model, schedule, step, scope="layer"):
    counts = [(w.shape.num_elements(), np.sum(w.numpy() == 0)) for w in kernels(model)]
    assert counts
    if scope == "global":
        counts = [tuple(np.sum(counts, axis=0))]
    for n, zeros in counts:
        assert zeros == zeros_due(schedule, step, n), f"step {step}: {zeros} zeros of {n}"


class Check(keras.callbacks.Callback):
    """Asserts the schedule's sparsity after each batch that `fit` reports."""

    def __init__(self, schedule, scope="layer"):
        super().__init__()
        self.schedule, self.scope, self.seen = schedule, scope, []

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations.numpy())
        assert_sparse(self.model, self.schedule, step, self.scope)
        self.seen.append(step)


def fit(model, check, **kwargs):
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[check], **kwargs)
    return check.seen


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "options",
    [{}, {"jit_compile": True}, {"steps_per_execution": 4}, {"run_eagerly": True}],
    ids=str,
)
def test_fit(options, scope):
    model = cnn()
    at.prune(model, SCHEDULE, scope=scope)
    model.compile("adam", LOSS, **options)
    every = options.get("steps_per_execution", 1)
    assert fit(model, Check(SCHEDULE, scope)) == list(range(every, 13, every))
    assert SCHEDULE.reached_at < 12


@pytest.mark.parametrize("jit_compile", [False, True])
def test_custom_loop(jit_compile):
    model, optimizer = cnn(), keras.optimizers.SGD(0.1)
    at.prune(model, SCHEDULE, optimizer=optimizer)

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for t in range(1, 13):
        step(tf.constant(X[:16]), tf.constant(Y[:16]))
        assert_sparse(model, SCHEDULE, t)


@pytest.mark.parametrize("compiled", [False, True])
def test_custom_loop_without_the_optimizer_names_the_way_out(compiled):
    model, optimizer = cnn(), keras.optimizers.SGD(0.1)
    if compiled:
        model.compile("adam", LOSS)
    at.prune(model, SCHEDULE)
    grads = [tf.zeros(v.shape) for v in model.trainable_variables]
    with pytest.raises(ValueError, match=r"pass optimizer=the_one_that_trains to prune"):
        optimizer.apply(grads, model.trainable_variables)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_mixed_precision_with_skipped_steps(jit_compile):
    keras.config.set_dtype_policy("mixed_float16")
    model = cnn()
    at.prune(model, SCHEDULE)
    # So large a scale overflows float16 at first: those steps are skipped, and do not count.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=2.0**26)
    model.compile(optimizer, LOSS, jit_compile=jit_compile)
    seen = fit(model, Check(SCHEDULE), epochs=2)
    assert seen[0] == 0 and seen[-1] < 24 and seen[-1] > SCHEDULE.reached_at
    assert model.layers[0].kernel.dtype == "float32"


def test_moving_averages_are_refused():
    """At the end of `fit`, Keras puts averages of earlier weights into the model: not zeros."""
    model = cnn()
    at.prune(model, at.ConstantSparsity(0.5))
    model.compile(keras.optimizers.SGD(use_ema=True, name="averaging"), LOSS)
    with pytest.raises(ValueError, match="'averaging' of model 'sequential' has use_ema=True"):
        model.fit(X, Y, verbose=0)


def test_bfloat16_weights():
    """Eight bits of precision: ties everywhere."""
    keras.config.set_dtype_policy("bfloat16")
    model = cnn()
    at.prune(model, SCHEDULE, scope="global")
    model.compile("sgd", LOSS)
    assert model.layers[0].kernel.dtype == "bfloat16"
    assert fit(model, Check(SCHEDULE, "global"))[-1] == 12


def test_gradient_accumulation():
    model = cnn()
    at.prune(model, SCHEDULE)
    model.compile(keras.optimizers.Adam(gradient_accumulation_steps=2), LOSS)
    assert fit(model, Check(SCHEDULE), epochs=2) == [batch // 2 for batch in range(1, 25)]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_mirrored_strategy(scope, policy):
    keras.config.set_dtype_policy(policy)
    strategy = at.mirrored_strategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    with strategy.scope():
        model = cnn()
        model.compile("adam", LOSS)
    at.prune(model, SCHEDULE, scope=scope)
    assert fit(model, Check(SCHEDULE, scope)) == list(range(1, 13))
    for variable in kernels(model):
        mask = variable.constraint.masks.masks[id(variable)]
        masks = [m.numpy() for m in strategy.experimental_local_results(mask)]
        values = [v.numpy() for v in strategy.experimental_local_results(variable.value)]
        assert len(masks) == len(values) == 2
        np.testing.assert_array_equal(*masks)
        np.testing.assert_array_equal(*values)
        np.testing.assert_array_equal(values[0] != 0, masks[0])


def test_ties_are_pruned_exactly_and_zeros_are_positive():
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    model.set_weights([-np.ones((10, 10)), np.zeros(10)])
    at.prune(model, at.ConstantSparsity(0.37))
    kernel = model.layers[0].kernel.numpy()
    assert np.sum(kernel == 0) == 37
    assert not np.signbit(kernel[kernel == 0]).any()
    assert (kernel.ravel()[:63] == -1).all()  # of equal weights the first are kept


def test_constant_sparsity_prunes_without_any_training():
    model = cnn()
    biggest = np.sort(np.abs(model.get_layer("head").kernel.numpy()).ravel())[-576:]
    at.prune(model, at.ConstantSparsity(0.8))
    assert at.sparsity(model).column("sparsity")[:2] == [58 / 72, 2304 / 2880]
    kernel = np.abs(model.get_layer("head").kernel.numpy())
    np.testing.assert_array_equal(np.sort(kernel[kernel > 0]), biggest)


def test_nothing_happens_before_begin_step():
    model = cnn()
    before = model.get_weights()
    at.prune(model, at.ConstantSparsity(0.5, begin_step=3))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "there was none yet" in at.sparsity(model).note
    assert "go on to step 3" in at.sparsity(model).note
    model.compile("sgd", LOSS)
    fit(model, Check(at.ConstantSparsity(0.5, begin_step=3)))
    assert at.sparsity(model).note == ""


def test_global_scope_prunes_the_smallest_weights_of_all():
    model = cnn()
    conv, head = model.get_layer("conv").kernel, model.get_layer("head").kernel
    head.assign(head * 1e-3)
    smallest = max(np.abs(head.numpy()).max(), 0)
    at.prune(model, at.ConstantSparsity(0.9), scope="global")
    assert at.sparsity(model).total == zeros_due(at.ConstantSparsity(0.9), 0, 2952) / 2952
    assert (np.abs(conv.numpy()) > smallest).sum() > 60  # hardly any of the larger ones went


@pytest.mark.parametrize("compile_again", [False, True])
def test_steps_count_from_the_call(compile_again):
    """A model that is trained already is pruned gradually, too."""
    model = cnn()
    model.compile("sgd", LOSS)
    model.fit(X, Y, batch_size=16, verbose=0)  # 12 steps, and a cached training function
    at.prune(model, SCHEDULE)
    assert at.sparsity(model).total == 0
    if compile_again:
        model.compile("sgd", LOSS)
    start = int(model.optimizer.iterations.numpy())
    for t in range(1, 13):
        model.train_on_batch(X[:16], Y[:16])
        assert int(model.optimizer.iterations.numpy()) == start + t
        assert_sparse(model, SCHEDULE, t)


@pytest.mark.filterwarnings("ignore:Training ends at step")
def test_resume_from_a_checkpoint(tmp_path):
    schedule = at.PolynomialDecay(0.9, end_step=20, frequency=5)
    model = cnn()
    model.compile("adam", LOSS)
    at.prune(model, schedule)
    fit(model, Check(schedule))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert not kernels(loaded)
    at.prune(loaded, schedule, initial_step=int(loaded.optimizer.iterations.numpy()))
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    fit(loaded, Check(schedule))
    assert int(loaded.optimizer.iterations.numpy()) == 24
    assert_sparse(loaded, schedule, 24)


def test_restored_optimizer_catches_up_at_the_first_step():
    """As with keras.callbacks.BackupAndRestore, which restores the iterations inside `fit`."""
    schedule = at.PolynomialDecay(0.9, end_step=100, frequency=50)
    model = cnn()
    model.compile("sgd", LOSS)
    at.prune(model, schedule)
    model.optimizer.iterations.assign(73)
    model.train_on_batch(X[:16], Y[:16])
    assert_sparse(model, schedule, 74)


def test_pruning_again_replaces_the_schedule_of_what_it_selects():
    model = cnn(kernel_constraint=keras.constraints.MaxNorm(0.1, axis=(0, 1, 2)))
    at.prune(model, at.ConstantSparsity(0.9), scope="global")
    at.prune(model, at.ConstantSparsity(0.5), include="conv")
    at.prune(model, at.ConstantSparsity(0.25), include="conv")
    model.compile("sgd", LOSS)
    model.fit(X, Y, batch_size=64, verbose=0)
    conv, head = model.get_layer("conv").kernel, model.get_layer("head").kernel
    # Weights that an earlier call set to zero are free again, and have learnt since.
    assert np.sum(conv.numpy() == 0) == 18
    # The head has the global schedule's sparsity alone at its next update.
    assert head.constraint.masks.variables == [head]
    # The constraint that the user gave the layer stays in force, once.
    assert isinstance(conv.constraint.inner, keras.constraints.MaxNorm)
    assert np.sqrt(np.sum(conv.numpy() ** 2, axis=(0, 1, 2))).max() <= 0.1 + 1e-6


def test_global_scope_refuses_weights_frozen_later():
    model = cnn()
    at.prune(model, SCHEDULE, scope="global")
    model.get_layer("conv").trainable = False
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=r"'sequential/conv/kernel' was frozen after prune"):
        model.fit(X, Y, verbose=0)


def test_saved_model_is_plain_keras(tmp_path):
    model = cnn()
    names, config = [w.path for w in model.weights], model.get_config()
    at.prune(model, at.ConstantSparsity(0.75))
    model.compile("adam", LOSS, metrics=["accuracy"])
    model.fit(X, Y, verbose=0)
    assert [w.path for w in model.weights] == names
    assert model.get_config() == config
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "out.npy", model.predict(X[:8], verbose=0))
    np.save(tmp_path / "x.npy", X[:8])
    code = (
        "import sys, keras, numpy as np\n"
        "model = keras.models.load_model('model.keras')\n"
        "np.testing.assert_allclose(model.predict(np.load('x.npy'), verbose=0), np.load('out.npy'),"
        " atol=1e-6)\n"
        "assert np.mean(model.get_layer('head').kernel.numpy() == 0) == 0.75\n"
        "model.fit(np.load('x.npy'), np.zeros(8), verbose=0)\n"
        "assert not any(m.startswith('accel_tf') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


def test_nested_and_shared_layers():
    shared = keras.layers.Dense(8, name="shared")
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="deep")], name="inner")
    a, b = keras.Input((8,)), keras.Input((8,))
    h = keras.layers.Add()([inner(shared(a)), inner(shared(b))])
    model = keras.Model([a, b], keras.layers.Dense(1, name="out")(h))
    report = at.prune(model, at.ConstantSparsity(0.5), exclude="out")
    assert [e.layer for e in report.done] == ["shared", "inner/deep"]
    assert [(e.layer, e.note) for e in report.skipped] == [("out", "excluded")]
    model.compile("sgd", "mse")
    x = RNG.normal(size=(32, 8))
    model.fit([x, x], RNG.normal(size=(32, 1)), verbose=0)
    table = at.sparsity(model)
    assert table.column("layer") == ["shared", "inner/deep", "out", "total"]
    assert table.column("sparsity") == [0.5, 0.5, 0.0, table.total]
    assert table.total == 64 / 136


def test_part_of_a_compiled_model():
    encoder = keras.Sequential([keras.Input((4,)), keras.layers.Dense(10)], name="encoder")
    model = keras.Sequential([keras.Input((4,)), encoder, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    at.prune(encoder, at.ConstantSparsity(0.5), optimizer=model.optimizer)
    model.fit(np.ones((8, 4)), np.ones(8), verbose=0)
    assert at.sparsity(encoder).total == 0.5
    assert at.sparsity(model).total == 20 / 50


def test_subclassed_model():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(16, name="hidden")
            self.out = keras.layers.Dense(1, name="out")
            self.table = self.add_weight((4, 4), name="table")

        def call(self, x):
            return self.out(self.hidden(x @ self.table))

    model = Net()
    with pytest.raises(ValueError, match="not built yet"):
        at.prune(model, at.ConstantSparsity(0.5))
    model(np.ones((2, 4), "float32"))
    report = at.prune(model, at.ConstantSparsity(0.5))
    assert [e.layer for e in report.done] == ["hidden", "out"]
    assert report.skipped == (
        (model.name, "table is not a kernel; name its layer in include if you want it"),
    )
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 4)), np.ones(8), verbose=0)
    assert at.sparsity(model).total == 0.5


def test_what_is_pruned_by_default_and_by_choice():
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(9, 8, name="words")(inputs)
    x = keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True, name="lstm"))(x)
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.SeparableConv1D(8, 3, name="separable")(x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(4, name="frozen", trainable=False)(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="out")(x))

    report = at.prune(model, at.ConstantSparsity(0.5))
    done = {e.layer.rpartition("/")[2]: e.note for e in report.done}
    assert {"query", "key", "value", "attention_output", "separable", "out"} < set(done)
    (cells,) = {n for layer, n in done.items() if "lstm" in layer}
    assert "recurrent_kernel (4, 16)" in cells and "; kernel" not in cells
    assert "pointwise_kernel (1, 8, 8): 0.5" in done["separable"]
    assert "not depthwise_kernel: a depthwise kernel, few weights" in done["separable"]
    left = dict(report.skipped)
    assert set(left) == {"words", "norm", "frozen"}
    assert "embeddings is not a kernel" in left["words"]
    assert left["norm"] == "no weight of rank ≥ 2"
    assert left["frozen"].startswith("frozen")
    assert at.report_of(model) is report

    chosen = at.prune(model, at.ConstantSparsity(0.5), include=["words", "separable"])
    assert [e.layer for e in chosen.done] == ["words", "separable"]
    assert "depthwise_kernel" in chosen.done[1].note
    by_type = at.prune(model, at.ConstantSparsity(0.5), include=keras.layers.LSTM)
    assert len(by_type.done) == 2 and all("lstm_cell" in e.layer for e in by_type.done)
    by_glob = at.prune(model, at.ConstantSparsity(0.5), include="attention/*", exclude="*/key")
    assert [e.layer for e in by_glob.done] == [
        f"attention/{name}" for name in ("query", "value", "attention_output")
    ]
    by_function = at.prune(
        model, at.ConstantSparsity(0.5), include=lambda path, layer: path.startswith("o")
    )
    assert [e.layer for e in by_function.done] == ["out"]
    by_layer = at.prune(model, at.ConstantSparsity(0.5), include=model.get_layer("out"))
    assert by_layer.done == by_function.done


def test_grouped_convolutions():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            keras.layers.Conv2D(4, 3, groups=4, name="depthwise"),
            keras.layers.Conv2D(4, 3, groups=2, name="grouped"),
        ]
    )
    report = at.prune(model, at.ConstantSparsity(0.5))
    assert [e.layer for e in report.done] == ["grouped"]
    assert "a depthwise kernel" in report.skipped[0].note


def test_mobilenet_v2():
    model = keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), weights=None, classes=10, alpha=0.35
    )
    report = at.prune(model, at.ConstantSparsity(0.7))
    assert len(report.done) == 36
    assert sum("depthwise" in e.note for e in report.skipped) == 17
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy())
    model.fit(np.ones((4, 32, 32, 3)), np.zeros(4), batch_size=2, verbose=0)
    assert_sparse(model, at.ConstantSparsity(0.7), 2)


def test_bad_arguments_are_named():
    model = cnn()
    for kwargs, message in [
        ({"schedule": 0.8}, r"Received: 0\.8\. ConstantSparsity\(0\.8\) prunes at once"),
        ({"scope": "model"}, "scope is \"layer\", .*Received: 'model'"),
        ({"pattern": "2:4"}, "a pattern such as Unstructured.*'2:4'"),
        ({"initial_step": -1}, "initial_step must be ≥ 0.*-1"),
        ({"include": "dense"}, "No layer matches 'dense'.*conv, .*head"),
        ({"include": 3}, "A selector is.*Received: 3"),
        ({"exclude": ["conv", "head"]}, "Nothing in model 'sequential'(.|\n)*excluded"),
    ]:
        with pytest.raises(ValueError, match=message):
            at.prune(model, **{"schedule": at.ConstantSparsity(0.5), **kwargs})
    assert not kernels(model)


def test_sparsity_of_a_model_without_kernels():
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    assert at.sparsity(model).total == 0.0
    assert at.sparsity(model).column("layer") == ["total"]


def test_pattern_config():
    pattern = at.Unstructured()
    assert type(pattern).from_config(pattern.get_config()) == pattern
