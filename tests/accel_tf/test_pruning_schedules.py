"""The schedules: values, update steps, validation, configuration."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import accel_tf as at
from accel_tf.pruning._schedules import levels

SCHEDULES = [
    at.ConstantSparsity(0.8),
    at.ConstantSparsity(0.5, begin_step=10, end_step=95, frequency=7),
    at.PolynomialDecay(0.9, 1000),
    at.PolynomialDecay(0.95, 301, initial_sparsity=0.3, begin_step=50, power=1.5, frequency=9),
    at.CosineDecay(0.9, 1000),
    at.ExponentialDecay(0.95, 301, initial_sparsity=0.3, begin_step=50, frequency=9),
    at.Cyclical(0.8, 1001, cycles=4, initial_sparsity=0.2, begin_step=3, frequency=7),
    at.OneShot(0.7, begin_step=30),
    at.FunctionSchedule(lambda step: step / 1001, end_step=1000, begin_step=20, frequency=13),
]

# Not their `repr`: a function's has its address, and each worker of pytest would name it otherwise.
EACH = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=[f"{type(s).__name__}-{i}" for i, s in enumerate(SCHEDULES)]
)


def updates(schedule, until):
    """The definition, step by step."""
    end = schedule.end_step if schedule.end_step >= 0 else until
    return [
        t
        for t in range(until)
        if schedule.begin_step <= t <= end and (t - schedule.begin_step) % schedule.frequency == 0
    ]


@EACH
def test_config_round_trip(schedule):
    assert type(schedule).from_config(schedule.get_config()) == schedule


@EACH
def test_updates_are_at_the_defined_steps(schedule):
    expected, until = updates(schedule, 1200), 1200
    steps = tf.range(until, dtype=tf.int64)
    assert np.flatnonzero(schedule.updates_at(steps)).tolist() == expected
    latest = [max((u for u in expected if u <= t), default=-1) for t in range(until)]
    assert schedule.latest_update(steps).numpy().tolist() == latest
    assert schedule.latest_update(777) == latest[777]
    assert schedule.updates_at(expected[-1]) is True


@EACH
def test_python_graph_and_table_agree(schedule):
    steps = np.arange(1200)
    python = [schedule.sparsity_at(int(t)) for t in steps]
    assert all(type(s) is float for s in python)
    graph = tf.function(schedule.sparsity_at)(tf.constant(steps, tf.int64)).numpy()
    assert graph.dtype == np.float32
    np.testing.assert_allclose(graph, python, atol=3e-7)
    held = updates(schedule, schedule.reached_at + 1)
    assert levels(schedule).tolist() == [python[t] for t in held]
    assert levels(schedule)[-1] == levels(schedule).max()
    assert schedule.updates_at(schedule.reached_at)


@given(
    final=st.floats(0.0, 0.99),
    initial=st.floats(0.0, 0.99),
    begin=st.integers(0, 500),
    length=st.integers(1, 5000),
    power=st.floats(0.5, 6),
    step=st.integers(0, 8000),
)
def test_polynomial_decay_is_the_papers_equation(final, initial, begin, length, power, step):
    schedule = at.PolynomialDecay(final, begin + length, initial, begin, power, frequency=1)
    done = min(max((step - begin) / length, 0.0), 1.0)
    expected = final + (initial - final) * (1 - done) ** power
    assert schedule.sparsity_at(step) == pytest.approx(expected, abs=2e-5)


@given(
    kind=st.sampled_from([at.CosineDecay, at.ExponentialDecay, at.Cyclical]),
    final=st.floats(0.01, 0.999),
    rise=st.floats(0, 0.99),
    begin=st.integers(0, 300),
    frequency=st.integers(1, 50),
    updates=st.integers(2, 40),
    more=st.integers(0, 49),
    cycles=st.integers(1, 20),
)
def test_curves_rise_within_bounds_and_reach_their_end(
    kind, final, rise, begin, frequency, updates, more, cycles
):
    initial = final * rise
    end = begin + (updates - 1) * frequency + min(more, frequency - 1)
    extra = {}
    if kind is at.Cyclical:
        extra = {"cycles": cycles, "power": 0.01}  # steep at the end, where rounding would show
        if updates < 2 * cycles:
            with pytest.raises(ValueError, match=f"its {cycles} cycles.*needs {2 * cycles}"):
                kind(
                    final,
                    end,
                    initial_sparsity=initial,
                    begin_step=begin,
                    frequency=frequency,
                    **extra,
                )
            return
    schedule = kind(
        final, end, initial_sparsity=initial, begin_step=begin, frequency=frequency, **extra
    )
    table = levels(schedule)
    assert len(table) == updates
    assert schedule.reached_at == begin + (updates - 1) * frequency
    low, high = np.float32(initial), np.float32(final)
    assert table[-1] == high == np.float32(schedule.sparsity_at(end + 1000))
    assert table[0] == pytest.approx(low, abs=1e-7)
    assert (table >= low - 1e-7).all() and (table <= high).all()
    falls = np.flatnonzero(np.diff(table) < 0)
    if kind is at.Cyclical:  # each cycle but the last falls after it has reached the end, once
        assert len(falls) == cycles - 1
        assert (table[falls] == high).all()
    else:
        assert len(falls) == 0


@given(final=st.floats(0, 0.999), initial=st.floats(0, 0.999), step=st.integers(0, 2000))
def test_curves_are_their_equations(final, initial, step):
    done = min(step / 1000, 1)
    cosine = final + (initial - final) * (1 + np.cos(np.pi * done)) / 2
    density = (1 - initial) * ((1 - final) / (1 - initial)) ** done
    for kind, expected in ((at.CosineDecay, cosine), (at.ExponentialDecay, 1 - density)):
        level = kind(final, 1000, initial).sparsity_at(step)
        assert level == pytest.approx(expected, abs=1e-6)


def test_cycles_are_polynomial_and_go_back():
    schedule = at.Cyclical(0.9, end_step=700, cycles=2, initial_sparsity=0.5)
    cycle = at.PolynomialDecay(0.9, end_step=300, initial_sparsity=0.5)
    np.testing.assert_allclose(levels(schedule), [*levels(cycle), *levels(cycle)], atol=1e-6)


@given(begin=st.integers(0, 99), frequency=st.integers(1, 60), end=st.integers(0, 400))
def test_a_function_is_followed_at_the_updates(begin, frequency, end):
    asked = []

    def function(step):
        assert type(step) is int
        asked.append(step)
        return np.float64((step % 7) / 7)

    if end - begin < frequency:
        with pytest.raises(ValueError, match="FunctionSchedule never gets past its first value"):
            at.FunctionSchedule(function, end, begin, frequency)
        return
    schedule = at.FunctionSchedule(function, end, begin, frequency)
    due = [t for t in range(end + 1) if schedule.updates_at(t)]
    assert asked == due and schedule.reached_at == due[-1]
    np.testing.assert_array_equal(levels(schedule), [np.float32((t % 7) / 7) for t in due])
    assert schedule.sparsity_at(0) == levels(schedule)[0]
    assert schedule.sparsity_at(end + 500) == levels(schedule)[-1]


@pytest.mark.parametrize("kind", [at.PolynomialDecay, at.CosineDecay, at.ExponentialDecay])
def test_epochs_become_steps(kind):
    schedule = kind(0.9, begin_epoch=1, end_epoch=4.5, frequency=10)
    assert schedule.counts_epochs and "end_epoch=4.5" in repr(schedule)
    assert "end_step" not in repr(schedule)
    assert type(schedule).from_config(schedule.get_config()) == schedule
    # Updates are at 23, 33, …, 103; half a step more is asked for.
    assert schedule.in_steps(23) == kind(0.9, begin_step=23, end_step=103, frequency=10)
    assert schedule.in_steps(23).sparsity_at(103) == pytest.approx(0.9)
    for use in (schedule.sparsity_at, schedule.updates_at, schedule.latest_update):
        with pytest.raises(ValueError, match=r"counts in epochs(.|\n)*steps_per_epoch"):
            use(0)
    with pytest.raises(ValueError, match="never gets past.*end_step=4 .*frequency=10"):
        schedule.in_steps(1)
    with pytest.raises(ValueError, match="steps_per_epoch must be ≥ 1. Received: 0"):
        schedule.in_steps(0)


def test_other_schedules_in_epochs():
    constant = at.ConstantSparsity(0.5, begin_epoch=2, end_epoch=3)
    assert constant.in_steps(200) == at.ConstantSparsity(0.5, begin_step=400, end_step=600)
    assert at.ConstantSparsity(0.5, begin_epoch=1).in_steps(9).end_step == -1
    assert at.OneShot(0.5, begin_epoch=0.5).in_steps(30) == at.OneShot(0.5, begin_step=15)
    cyclical = at.Cyclical(0.5, begin_step=20, end_epoch=3, frequency=5)
    assert cyclical.in_steps(30) == at.Cyclical(0.5, 90, begin_step=20, frequency=5)
    function = at.FunctionSchedule(lambda step: step / 1000, end_epoch=3, frequency=5)
    assert function.in_steps(30).sparsity_at(90) == pytest.approx(0.09)
    assert cyclical.in_steps(30).in_steps(7) == cyclical.in_steps(30)


def test_schedules_cannot_be_changed():
    with pytest.raises(AttributeError):
        SCHEDULES[0].sparsity = 0.1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: at.ConstantSparsity(1.0), r"sparsity is the fraction of zeros.*1\.0"),
        (lambda: at.ConstantSparsity(80), "sparsity is the fraction of zeros.*80"),
        (lambda: at.ConstantSparsity(float("nan")), "fraction of zeros.*nan"),
        (lambda: at.ConstantSparsity(0.5, begin_step=-3), "begin_step must be ≥ 0.*-3"),
        (lambda: at.ConstantSparsity(0.5, frequency=0), "frequency must be ≥ 1.*0"),
        (lambda: at.ConstantSparsity(0.5, begin_step=1.5), r"begin_step must be an integer.*1\.5"),
        (lambda: at.ConstantSparsity(0.5, end_step=-2), "end_step must be ≥ -1.*-2"),
        (lambda: at.ConstantSparsity(0.5, 9, 8), "never prunes: it ends at step 8.*begins at 9"),
        (
            lambda: at.PolynomialDecay(0.9, 50),
            "never gets past initial_sparsity=0.0.*frequency=100",
        ),
        (lambda: at.PolynomialDecay(0.9, -1), "never gets past"),
        (lambda: at.PolynomialDecay(0.9, 500, power=0), "power must be > 0.*0"),
        (lambda: at.PolynomialDecay(0.9, 500, initial_sparsity=-0.1), "initial_sparsity.*-0.1"),
        (lambda: at.PolynomialDecay(0.9), "PolynomialDecay needs end_step or end_epoch"),
        (lambda: at.CosineDecay(0.9), "CosineDecay needs end_step or end_epoch"),
        (lambda: at.CosineDecay(0.9, 50), "never gets past initial_sparsity=0.0.*frequency=100"),
        (lambda: at.ExponentialDecay(1.0, 500), r"final_sparsity is the fraction.*1\.0"),
        (lambda: at.OneShot(1.0), r"sparsity is the fraction of zeros.*1\.0"),
        (lambda: at.OneShot(0.5, begin_step=-1), "begin_step must be ≥ 0.*-1"),
        (lambda: at.Cyclical(0.5, 900, cycles=0), "cycles must be ≥ 1.*0"),
        (lambda: at.Cyclical(0.5, 900, power=0), "power must be > 0.*0"),
        (
            lambda: at.Cyclical(0.5, 900, initial_sparsity=0.5),
            "must be lower than(.|\n)*0.5 and 0.5",
        ),
        (lambda: at.FunctionSchedule(0.5, 900), "expects a function step -> sparsity.*0.5"),
        (
            lambda: at.FunctionSchedule(lambda step: step / 200, 900),
            r"in \[0, 1\)\. At step 200 it returned 1\.0",
        ),
        (lambda: at.FunctionSchedule(lambda step: None, 900), "At step 0 it returned None"),
        (lambda: at.CosineDecay(0.9, 500, end_epoch=3), "end_step or end_epoch, not both"),
        (
            lambda: at.CosineDecay(0.9, begin_step=5, begin_epoch=1, end_epoch=3),
            "begin_step or begin_epoch, not both",
        ),
        (lambda: at.ConstantSparsity(0.9, begin_epoch=-1), "begin_epoch must be ≥ 0.*-1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
