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
]


def updates(schedule, until):
    """The definition, step by step."""
    end = schedule.end_step if schedule.end_step >= 0 else until
    return [
        t
        for t in range(until)
        if schedule.begin_step <= t <= end and (t - schedule.begin_step) % schedule.frequency == 0
    ]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_config_round_trip(schedule):
    assert type(schedule).from_config(schedule.get_config()) == schedule


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_updates_are_at_the_defined_steps(schedule):
    expected, until = updates(schedule, 1200), 1200
    steps = tf.range(until, dtype=tf.int64)
    assert np.flatnonzero(schedule.updates_at(steps)).tolist() == expected
    latest = [max((u for u in expected if u <= t), default=-1) for t in range(until)]
    assert schedule.latest_update(steps).numpy().tolist() == latest
    assert schedule.latest_update(777) == latest[777]
    assert schedule.updates_at(expected[1]) is True


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
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
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
