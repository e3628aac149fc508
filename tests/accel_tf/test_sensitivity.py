"""`sensitivity`: drops as from pruning by hand, a model left as it is, a budget spent at its best."""

import itertools

import matplotlib

matplotlib.use("Agg")

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.pruning._sensitivity import _allocate

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = RNG.integers(0, 3, 64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def mlp(metrics=("accuracy",)):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, activation="relu", name="a"),
            keras.layers.Dense(8, activation="relu", name="b"),
            keras.layers.Dense(3, name="c"),
        ]
    )
    model.compile("adam", LOSS, metrics=list(metrics))
    return model


def study(model, data=(X, Y), **kwargs):
    return at.sensitivity(model, data, **({"sparsities": (0.5, 0.75), "verbose": 0} | kwargs))


def by_hand(model, layer, sparsity, metric):
    """How much worse a copy is in which that layer has lost its smallest weights."""
    kernel = model.get_layer(layer).kernel
    before = model.evaluate(X, Y, verbose=0, return_dict=True)[metric]
    saved = kernel.numpy()
    pruned = saved.copy().ravel()
    pruned[np.argsort(np.abs(pruned))[: round(sparsity * pruned.size)]] = 0
    kernel.assign(pruned.reshape(saved.shape))
    after = model.evaluate(X, Y, verbose=0, return_dict=True)[metric]
    kernel.assign(saved)
    return after - before if metric == "loss" else before - after


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_drops_are_those_of_pruning_one_layer_by_hand(metric):
    model = mlp()
    found = study(model, metric=metric, budget=0.05)
    assert found.metric == metric
    assert list(found.drops) == ["a", "b", "c"]
    for layer, sparsity in itertools.product("abc", (0.5, 0.75)):
        expected = by_hand(model, layer, sparsity, metric)
        assert found.drops[layer][sparsity] == pytest.approx(expected, abs=1e-6)
    assert found.column("0.75") == [found.drops[layer][0.75] for layer in "abc"]


def test_the_default_is_the_first_metric_or_the_loss():
    assert study(mlp()).metric == "accuracy"
    assert study(mlp(metrics=())).metric == "loss"


@pytest.mark.parametrize(
    "metric, up",
    [
        (keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2"), True),
        (keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll"), False),
    ],
    ids=["top2", "nll"],
)
def test_it_knows_whether_more_of_a_metric_is_better(metric, up):
    model = mlp(metrics=[metric])
    found = study(model)
    sign = 1 if up else -1
    assert found.metric == metric.name
    expected = sign * by_hand(model, "c", 0.75, metric.name)
    assert found.drops["c"][0.75] == pytest.approx(expected, abs=1e-6)


def test_of_several_outputs_the_metrics_are_known_by_their_full_names():
    start = keras.Input((6,))
    heads = {name: keras.layers.Dense(3, name=name)(start) for name in ("p", "q")}
    model = keras.Model(start, heads)
    model.compile("sgd", {"p": LOSS, "q": LOSS}, metrics={"q": ["accuracy"]})
    found = study(model, (X, {"p": Y, "q": Y}))
    assert found.metric == "q_accuracy"
    assert set(found.drops["p"].values()) == {0.0}  # what p loses, q does not feel
    assert study(model, (X, {"p": Y, "q": Y}), metric="p_loss").drops["q"][0.75] == 0


def test_a_function_of_the_model_is_a_metric_and_needs_no_data_and_no_compiling():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="a")])

    def size(model):
        return float(np.abs(model.get_layer("a").kernel.numpy()).sum())

    found = at.sensitivity(model, metric=size, sparsities=(0.5,), budget=1e9, verbose=0)
    kernel = np.sort(np.abs(model.get_layer("a").kernel.numpy()).ravel())
    assert found.metric == "size"
    assert found.drops["a"][0.5] == pytest.approx(kernel[:9].sum(), rel=1e-5)


def dataset(n=64):
    return tf.data.Dataset.from_tensor_slices((X[:n], Y[:n])).batch(16)


@pytest.mark.parametrize(
    "data",
    [dataset(), dataset().filter(lambda x, y: True), (X, Y, np.ones(64)), [X, Y]],
    ids=["dataset", "dataset of unknown length", "weights", "list"],
)
def test_data_may_come_in_several_forms(data):
    model = mlp()
    drops = study(model, (X, Y), metric="loss").drops
    for layer, levels in study(model, data, metric="loss").drops.items():
        assert levels == pytest.approx(drops[layer], abs=1e-5)


def state(model):
    """All that `sensitivity` could change."""
    variables = [*model.weights, *model.optimizer.variables, *model.metrics_variables]
    return [v.numpy() for v in variables]


def trained():
    model = mlp()
    at.prune(model, at.ConstantSparsity(0.5), include="a")
    model.fit(X, Y, batch_size=16, verbose=0)
    return model


def test_the_model_stays_as_it_is():
    model = trained()
    model.evaluate(X, Y, verbose=0)  # metrics have a state
    before, train_function = state(model), model.train_function
    constraints = [v.constraint for v in model.weights]
    study(model)
    for old, new in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(old, new)
    assert model.train_function is train_function
    assert [v.constraint for v in model.weights] == constraints
    model.fit(X, Y, batch_size=16, verbose=0)
    assert at.sparsity(model).column("sparsity")[0] == 0.5


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_the_weights_come_back_when_it_is_interrupted(error, call):
    model, calls = trained(), itertools.count(1)
    before = state(model)

    def metric(model):
        if next(calls) == call:
            raise error
        return 1.0

    with pytest.raises(error):
        study(model, metric=metric)
    for old, new in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_mixed_precision_and_kernels_of_one_layer_together():
    with keras.DTypePolicy("mixed_bfloat16") and keras.device("cpu"):
        model = keras.Sequential(
            [keras.Input((5, 6)), keras.layers.GRU(4, name="gru"), keras.layers.Dense(3, name="c")]
        )
    model.compile("adam", LOSS)
    x = np.repeat(X[:, None], 5, axis=1)
    found = study(model, (x, Y), budget=1e9)
    assert found.proposal == {"gru/gru_cell": 0.75, "c": 0.75}
    assert found.column("weights") == [4 * 12 + 6 * 12, 12]
    found.prune(model)
    # Not the bias of the GRU, which has rank 2, too.
    assert all(v.constraint is None for v in model.weights if v.name == "bias")
    assert at.sparsity(model).total == 0.75


def test_include_exclude_and_patterns_are_those_of_prune():
    model = mlp()
    assert list(study(model, exclude="c").drops) == ["a", "b"]
    assert "c: excluded" in study(model, exclude="c").note
    assert list(study(model, include="b").drops) == ["b"]
    found = study(model, pattern=at.NM(2, 4), sparsities=(0.5,), budget=1e9)
    found.prune(model)
    kernel = model.get_layer("a").kernel.numpy()
    assert (np.count_nonzero(kernel[:4], axis=0) == 2).all()


def test_the_proposal_is_what_prune_prunes():
    model = mlp()

    def weighed(model):
        pruned = [float(np.mean(model.get_layer(n).kernel.numpy() == 0)) for n in "abc"]
        return -0.02 * pruned[0] - 0.005 * pruned[1] ** 2 - 0.001 * pruned[2]

    found = study(model, metric=weighed, sparsities=(0.1, 0.3, 0.5, 0.7, 0.9))
    assert len(set(found.proposal.values())) > 1
    report = found.prune(model)
    table = at.sparsity(model)
    assert table.total == pytest.approx(found.total)
    sparsities = dict(zip(table.column("layer"), table.column("sparsity"), strict=True))
    for layer, level in found.proposal.items():
        assert sparsities[layer] == pytest.approx(level, abs=0.03)  # whole numbers of weights
    assert at.report_of(model) is report
    assert {e.layer for e in report.done} == {p for p, s in found.proposal.items() if s}


def test_the_proposal_can_be_pruned_gradually_and_leaves_out_what_is_too_sensitive():
    model = mlp()

    def only_b(model):
        return -float(sum(np.sum(model.get_layer(n).kernel.numpy() == 0) for n in "ac"))

    found = study(model, metric=only_b)
    assert found.proposal == {"a": 0.0, "b": 0.75, "c": 0.0}
    report = found.prune(model, lambda s: at.PolynomialDecay(s, end_step=4, frequency=2))
    assert [tuple(entry) for entry in report.skipped] == [
        (layer, "0 proposed: it is too sensitive") for layer in "ac"
    ]
    model.fit(X, Y, batch_size=16, verbose=0)
    assert at.sparsity(model).column("sparsity")[:3] == [0, 0.75, 0]


def test_layers_whose_names_contain_others_are_told_apart():
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, name="dense")], name="in")
    model = keras.Sequential([keras.Input((6,)), inner, keras.layers.Dense(3, name="dense")])
    model.compile("sgd", LOSS)

    def metric(model):
        return -float(np.sum(inner.get_layer("dense").kernel.numpy() == 0))

    found = study(model, metric=metric)
    assert found.proposal == {"in/dense": 0.0, "dense": 0.75}
    found.prune(model)
    assert at.sparsity(model).column("sparsity")[:2] == [
        0,
        14 / 18,
    ]  # 4.5 are kept, rounded to even


layers = st.lists(
    st.lists(
        st.tuples(st.integers(-2, 8).map(lambda n: n / 360), st.integers(1, 50)),
        min_size=2,
        max_size=3,
    ),
    min_size=1,
    max_size=4,
)


@given(layers, st.integers(0, 12).map(lambda n: n / 360))
def test_the_budget_buys_as_many_zeros_as_it_can(options, budget):
    options = [option[: min(map(len, options))] for option in options]
    drops = [[drop for drop, _ in option] for option in options]
    zeros = [list(np.cumsum([n for _, n in option])) for option in options]
    costs = [np.maximum.accumulate(np.maximum(row, 0)) for row in drops]

    def spent(choice):
        return sum(costs[i][k - 1] for i, k in enumerate(choice) if k)

    def gained(choice):
        return sum(zeros[i][k - 1] for i, k in enumerate(choice) if k)

    every = itertools.product(*[range(len(row) + 1) for row in drops])
    best = max(gained(choice) for choice in every if spent(choice) <= budget + 1e-9)
    chosen = _allocate(drops, zeros, budget)
    assert spent(chosen) <= budget + 1e-5
    # A whole 10,000th of the budget is spent or none, so an exact fit may be missed.
    loose = max(
        gained(choice)
        for choice in itertools.product(*[range(len(row) + 1) for row in drops])
        if spent(choice) <= budget * (1 - 1e-3)
    )
    assert loose <= gained(chosen) <= best


def test_luck_at_a_high_sparsity_buys_nothing():
    assert _allocate([[0.005, 0.02, 0.001]], [[5, 7, 9]], 0.01) == [1]
    # Nor does a layer that gets better pay for one that gets worse.
    assert _allocate([[-0.05], [0.02]], [[5], [9]], 0.01) == [1, 0]


def test_no_budget_takes_what_costs_nothing():
    assert _allocate([[0.0, 0.001], [0.002, 0.003]], [[5, 7], [5, 7]], 0.0) == [1, 0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsities": ()}, r"fractions of zeros to try, in \(0, 1\). Received: \(\)"),
        ({"sparsities": (0.5, 1.0)}, r"Received: \(0.5, 1.0\)"),
        ({"budget": -0.1}, "budget is the drop .* Received: -0.1"),
        ({"budget": float("nan")}, "Received: nan"),
        ({"metric": "f1"}, "No metric 'f1': model .* is compiled with accuracy, loss"),
        ({"data": (X[:0], Y[:0])}, "x has no samples"),
        ({"data": dataset(0)}, "no batch"),
        ({"data": dataset().filter(lambda x, y: False)}, "no batch"),
        ({"data": dataset().repeat()}, "finite dataset"),
        ({"data": X}, "read as often.*Received: ndarray"),
        ({"data": None}, "Received: NoneType"),
        ({"include": "z"}, "No layer matches 'z'"),
        ({"metric": lambda model: float("nan")}, "of the model as it is is nan"),
    ],
)
def test_what_cannot_be_studied_is_a_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        study(mlp(), **change)


def test_a_score_that_is_nan_names_the_layer():
    model = mlp()

    def metric(model):
        return float("nan") if np.any(model.get_layer("b").kernel.numpy() == 0) else 1.0

    with pytest.raises(ValueError, match="of layer 'b' at sparsity 0.5 is nan"):
        study(model, metric=metric)
    assert at.sparsity(model).total == 0


def test_models_that_are_not_ready_are_a_clear_error():
    with pytest.raises(ValueError, match="sensitivity needs the weights of model .* not built"):
        study(keras.Sequential([keras.layers.Dense(2)]))
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="is not compiled, so it has no metric"):
        study(model)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, trainable=False)])
    with pytest.raises(ValueError, match="Nothing in model .* can be pruned. dense.*frozen"):
        study(model)


def test_a_metric_whose_direction_keras_does_not_know_is_a_clear_error():
    def spread(y, p):
        return keras.ops.std(p, axis=-1)

    with pytest.raises(ValueError, match="Is more of 'spread' better, or less"):
        study(mlp(metrics=[spread]))


def test_a_proposal_for_another_model_is_a_clear_error():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="other")])
    with pytest.raises(ValueError, match="has no layer a, b, c: the proposal is for another"):
        study(mlp()).prune(model)


def test_progress_is_shown_unless_it_is_not_wanted(capsys):
    study(mlp(), verbose=1)
    assert "7/7" in capsys.readouterr().out
    study(mlp(), verbose=0)
    assert capsys.readouterr().out == ""


def test_the_plot_has_a_line_for_each_layer_a_dot_for_each_proposal_and_the_budget():
    found = study(mlp(), metric="loss", budget=0.02)
    axes = found.plot()
    lines = {line.get_label(): line for line in axes.lines}
    for layer in "abc":
        np.testing.assert_allclose(lines[layer].get_xdata(), [0, 0.5, 0.75])
        np.testing.assert_allclose(lines[layer].get_ydata(), [0, *found.drops[layer].values()])
    assert any(list(line.get_ydata()) == [0.02, 0.02] for line in axes.lines)
    dots = {tuple(dot.get_offsets()[0]) for dot in axes.collections}
    assert dots == {(s, found.drops[p][s]) for p, s in found.proposal.items() if s}
    order = [text.get_text() for text in axes.get_legend().get_texts()]
    assert order == sorted("abc", key=lambda p: -found.drops[p][0.75])


def test_the_legend_of_a_deep_model_names_the_most_sensitive_layers():
    names = [f"layer_{i:02}" for i in range(30)]
    drops = {name: {0.5: i / 1000} for i, name in enumerate(names)}
    proposal = dict.fromkeys(names, 0.0)
    found = at.pruning.Sensitivity((), (), metric="m", drops=drops, budget=0.1, proposal=proposal)
    _, given = plt.subplots()
    assert found.plot(given) is given
    shown = [text.get_text() for text in given.get_legend().get_texts()]
    assert shown == ["10 others", *reversed(names[10:])]


def test_a_model_of_keras_applications():
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=3)
    calls = itertools.count()
    found = study(model, metric=lambda model: -next(calls) / 1000, sparsities=(0.5,))
    assert len(found.drops) == sum(len(v.shape) == 4 for v in model.weights) + 1 - 17
    assert "a depthwise kernel" in found.note
