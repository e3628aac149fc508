"""accel_tf.report: tables as text and HTML, reports, and the memory of which verb did what."""

import gc

import keras
import pytest

from accel_tf import report
from accel_tf.report import Entry, Report, Table


def test_text_aligns_numbers_right_and_words_left():
    table = Table(["layer", "n"], [["a", 1], ["longer", 23]], title="Title", note="Note")
    assert str(table).splitlines() == [
        "Title",
        "layer    n",
        "------  --",
        "a        1",
        "longer  23",
        "Note",
    ]
    assert repr(table) == str(table)


@pytest.mark.parametrize(
    ("cell", "text"), [(0.123456, "0.1235"), (None, "–"), (7, "7"), ("x", "x"), (1e-9, "1e-09")]
)
def test_cells_are_formatted(cell, text):
    assert str(Table(["c"], [[cell]])).splitlines()[-1].strip() == text
    assert f">{text}</td>" in Table(["c"], [[cell]])._repr_html_()


def test_a_missing_number_does_not_turn_its_column_left():
    assert str(Table(["n"], [["12.5 k"], [None], [7]])).splitlines()[2:] == [
        "12.5 k",
        "     –",
        "     7",
    ]


def test_html_escapes_what_users_name():
    page = Table(["<b>"], [["a & b"]], title="<t>", note="<n>")._repr_html_()
    assert "&lt;b&gt;" in page and "a &amp; b" in page
    assert "&lt;t&gt;" in page and "&lt;n&gt;" in page
    assert "<b>" not in page and "<t>" not in page and "<n>" not in page


def test_html_keeps_numbers_and_units_together():
    page = Table(["size"], [["1.2 kB"], ["12 µs ± 3 µs"], ["conv 3 × 3"]])._repr_html_()
    assert "1.2&nbsp;kB" in page and "12&nbsp;µs ± 3&nbsp;µs" in page and "conv 3 × 3" in page


def test_an_empty_table_has_its_headings():
    assert str(Table(["one", "two"], [])).splitlines() == ["one  two", "---  ---"]
    assert "<tbody></tbody>" in Table(["one"], [])._repr_html_()


def test_column_returns_unformatted_cells():
    table = Table(["layer", "sparsity"], [["a", 0.123456], ["b", None]])
    assert table.column("sparsity") == [0.123456, None]
    with pytest.raises(ValueError, match="No column 'nope'; there are layer, sparsity"):
        table.column("nope")


def test_a_ragged_row_is_named():
    with pytest.raises(ValueError, match=r"Row 1 has 1 cells, expected 2 \(a, b\).*\['x'\]"):
        Table(["a", "b"], [["y", 1], ["x"]])


def test_report_lists_what_was_done_and_what_was_not():
    made = Report("prune", (Entry("conv", "50 %"),), (Entry("bn", "no kernel"),))
    assert made.summary == "prune: 1 layer changed, 1 left alone"
    assert made.table.column("layer") == ["conv", "bn"]
    assert made.table.column("changed") == ["yes", "no"]
    assert "no kernel" in str(made) and "no kernel" in made._repr_html_()


def test_report_of_returns_the_last_and_forgets_dead_models():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)], name="mine")
    with pytest.raises(ValueError, match=r"No accel_tf verb.*'mine'.*loaded from disk"):
        report.report_of(model)
    first, second = Report("prune", ()), Report("sparsify", ())
    report.attach(model, first)
    report.attach(model, second)
    assert report.report_of(model) is second
    gc.collect()  # other tests' models
    before = len(report._reports)
    del model
    gc.collect()
    assert len(report._reports) == before - 1


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5e9, "5.0 GB")],
)
def test_human_bytes(n, text):
    assert report.human_bytes(n) == text


def test_shorten():
    assert report.shorten("abc") == "a, b, c"
    assert report.shorten(map(str, range(9)), limit=2) == "0, 1, … (7 more)"
