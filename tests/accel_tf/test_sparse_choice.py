"""The model of costs: its predictions, its measurement, and the choices that follow from it."""

import dataclasses

import numpy as np
import pytest

import accel_tf as at
from accel_tf.sparse import _choice

COSTS = _choice.Costs(
    batches=(1, 10, 100),
    prices={
        "dense": _choice.Price(1000.0, 0.1, (1.0, 0.1, 0.1)),
        "unstructured": _choice.Price(1500.0, 0.5, (4.0, 0.4, 0.2)),
        "4x1": _choice.Price(1500.0, 0.5, (3.0, 0.3, 0.1)),
        "16x1": _choice.Price(1500.0, 0.5, (2.0, 0.3, 0.15)),
    },
    convolution=0.2,
    patches=2.0,
    host="a made-up host",
)


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.setattr(_choice, "_costs", COSTS)
    return COSTS


def test_prediction():
    dense = COSTS.predict("dense", 10, (20, 30), 600)
    assert dense == pytest.approx(1e-9 * (1000 + 10 * (600 * 0.1 + 50 * 0.1)))
    sparse = COSTS.predict("unstructured", 10, (20, 30), 60)
    assert sparse == pytest.approx(1e-9 * (1500 + 10 * (60 * 0.4 + 50 * 0.5)))
    # Between batches prices are interpolated by the logarithm; beyond, they are the last one.
    between = COSTS.predict("4x1", 10**0.5, (0, 0), 10**6)
    assert between == pytest.approx(1e-9 * (1500 + 10**0.5 * 10**6 * 1.65))
    assert COSTS.predict("4x1", 10**4, (0, 0), 100) == pytest.approx(1e-9 * (1500 + 10**5))
    assert COSTS.convolve(7, (3, 3, 4, 5)) == pytest.approx(1e-9 * (1000 + 7 * 180 * 0.2))
    assert COSTS.unroll(7, 36) == pytest.approx(1e-9 * (1000 + 7 * 36 * 2))


def test_break_even():
    sparsity = COSTS.break_even(100)
    shape, weights = (1024, 1024), 1024**2
    sparse = COSTS.predict("unstructured", 100, shape, round((1 - sparsity) * weights))
    assert sparse == pytest.approx(COSTS.predict("dense", 100, shape, weights), rel=1e-3)
    assert 0.5 < sparsity < 0.6


def test_it_prints_as_a_table():
    text = str(COSTS)
    assert text == repr(COSTS) and "<table" in COSTS._repr_html_()
    assert text.startswith("costs of a made-up host")
    assert "unstructured" in text and "batch 100" in text and "break-even" in text


def test_choice_follows_costs(costs):
    rng = np.random.default_rng(0)
    scattered = rng.random((256, 256)) < 0.1
    blocks = np.repeat(rng.random((256, 64)) < 0.1, 4, axis=1)
    tall = np.repeat(rng.random((256, 16)) < 0.1, 16, axis=1)
    for w, format in [
        (scattered, "unstructured"),
        (blocks, "4x1"),
        (tall, "4x1"),
        (rng.random((256, 256)) < 0.9, "dense"),
    ]:
        assert at.SparseMatrix.from_dense(w).format == format
    pattern = at.SparseMatrix.from_dense(tall)._pattern
    assert pattern.choose(1).format == "16x1"
    only = pattern.choose(1, formats=("unstructured",))
    assert only.format == "unstructured" and only.speedup < pattern.choose(1).speedup
    assert pattern.choose(1, dense=1.0).speedup > 1000
    assert pattern.choose(1, extra=1.0).format == "dense"


def test_dense_is_left_by_a_margin_only(costs, monkeypatch):
    """A gain of ten percent is within the error of the prediction."""
    w = np.ones((64, 64))
    for price, format in [(0.101, "dense"), (0.09, "dense"), (0.07, "unstructured")]:
        prices = {**COSTS.prices, "unstructured": _choice.Price(1000, 0.1, (price,) * 3)}
        monkeypatch.setattr(_choice, "_costs", dataclasses.replace(COSTS, prices=prices))
        pattern = at.SparseMatrix.from_dense(w)._pattern
        assert pattern.choose(1000, formats=("dense", "unstructured")).format == format
    # A third of the time, but less than calls of either vary by.
    assert pattern.choose(100, formats=("dense", "unstructured")).format == "dense"


def test_tune_measures_this_host(monkeypatch, capsys):
    monkeypatch.setattr(_choice, "_costs", COSTS)  # restores the built-in ones afterwards
    measured = at.sparse.tune()
    assert "timing" in capsys.readouterr().out
    assert at.sparse.costs() is measured and at.sparse.isa() in measured.host
    for price in measured.prices.values():
        assert len(price.weight) == len(measured.batches)
        assert all(1e-4 < weight < 100 for weight in price.weight)
        assert price.weight[-1] < price.weight[0]  # weights are read once per batch
        assert price.call > 0 and price.move >= 0
    assert measured.break_even(64) < 0.95
    assert measured.convolution > 0 and measured.patches > 0


def test_tune_needs_the_op(monkeypatch):
    monkeypatch.setattr(at.sparse._op, "ops", None)
    with pytest.raises(RuntimeError, match="there is none in this installation"):
        at.sparse.tune()
