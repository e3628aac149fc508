"""Reports and tables: what a verb did to each layer, and why it left one alone.

Both render as text (`print`) and as HTML (the last expression of a notebook cell).
"""

import dataclasses
import html
import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_reports: "weakref.WeakKeyDictionary[Any, Report]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, repr=False)
class Table:
    """An immutable table that renders in a terminal and in a notebook.

    Args:
        columns: The column headings.
        rows: One sequence per row, as long as `columns`; cells are `str`-ed, except that floats
            get four significant digits.
        title: A line above the table.
        note: A line below the table: units, host, legend.

    Raises:
        ValueError: A row's length differs from the number of columns.

    Example:

    >>> print(Table(["layer", "sparsity"], [["dense", 0.9]]))
    layer  sparsity
    -----  --------
    dense       0.9
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Row {i} has {len(row)} cells, expected {len(self.columns)} "
                    f"({', '.join(self.columns)}). Received: {row!r}"
                )

    def column(self, name: str) -> list:
        """Returns the cells of the column called `name`, top to bottom, unformatted."""
        if name not in self.columns:
            raise ValueError(f"No column {name!r}; there are {', '.join(self.columns)}.")
        i = list(self.columns).index(name)
        return [row[i] for row in self.rows]

    def __repr__(self) -> str:
        return str(self)  # a prompt shows it as print does

    def __str__(self) -> str:
        grid = [list(self.columns), *([_format(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        right = self._right_aligned()

        def line(row):
            cells = (
                c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
            )
            return "  ".join(cells).rstrip()

        body = [line(grid[0]), "  ".join("-" * w for w in widths), *map(line, grid[1:])]
        return "\n".join([*filter(None, [self.title]), *body, *filter(None, [self.note])])

    def _repr_html_(self) -> str:
        align = ["right" if r else "left" for r in self._right_aligned()]

        def line(row, tag):
            cells = (
                f'<{tag} style="text-align:{a}">{_unbroken(html.escape(c))}</{tag}>'
                for c, a in zip(row, align, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        note = f"<p><small>{html.escape(self.note)}</small></p>" if self.note else ""
        body = "".join(line([_format(c) for c in row], "td") for row in self.rows)
        # Sphinx and Jupyter style the class "dataframe" in light and in dark themes alike.
        return (
            f'<table class="dataframe">{caption}<thead>{line(self.columns, "th")}</thead>'
            f"<tbody>{body}</tbody></table>{note}"
        )

    def _right_aligned(self) -> list[bool]:
        return [
            bool(self.rows) and all(_is_number(row[i]) for row in self.rows)
            for i in range(len(self.columns))
        ]


class Entry(NamedTuple):
    """One line of a report: the path of a layer and what was done to it, or why nothing was."""

    layer: str
    note: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a verb did: the layers it changed, and those it left alone with the reason.

    Attributes:
        verb: The name of the verb, such as `"prune"`.
        done: An `Entry` for each layer that was changed.
        skipped: An `Entry` for each layer that has weights or computes, yet was left alone.
        note: How the result was checked against the model that the verb was given.
    """

    verb: str
    done: tuple[Entry, ...]
    skipped: tuple[Entry, ...] = ()
    note: str = ""

    @property
    def table(self) -> Table:
        """The report as a `Table`: one row per layer."""
        rows = [(e.layer, "yes", e.note) for e in self.done]
        rows += [(e.layer, "no", e.note) for e in self.skipped]
        return Table(("layer", "changed", "note"), rows, title=self.summary, note=self.note)

    @property
    def summary(self) -> str:
        """The report in one line."""
        n = len(self.done)
        changed = f"{n} layer{'' if n == 1 else 's'} changed"
        return f"{self.verb}: {changed}, {len(self.skipped)} left alone"

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def attach(model, report: Report) -> None:
    """Remembers `report` as the last one about `model`, for `report_of`."""
    _reports[model] = report


def report_of(model) -> Report:
    """Returns the report of the last `accel_tf` verb that made or changed `model`.

    Args:
        model: A Keras model that a verb such as `quantize_aware` or `sparsify` returned, or that
            `prune` was applied to, in this process.

    Returns:
        The `Report`; it prints as text and renders as a table in a notebook.

    Raises:
        ValueError: No verb has been applied to this model object in this process.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> attach(model, Report("prune", done=(Entry("dense", "half of 8 weights"),)))  # a verb does
    >>> print(report_of(model))
    prune: 1 layer changed, 0 left alone
    layer  changed  note
    -----  -------  -----------------
    dense  yes      half of 8 weights
    """
    try:
        return _reports[model]
    except KeyError:
        raise ValueError(
            f"No accel_tf verb has been applied to this model object ({model.name!r}) in this "
            "process; a model loaded from disk has no report."
        ) from None


def human_bytes(n: float) -> str:
    """Formats a number of bytes in decimal units: `1.2 kB`, `34.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if abs(n) < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def shorten(names: Iterable[str], limit: int = 6) -> str:
    """Joins names for an error message, eliding all after the first `limit`."""
    names = list(names)
    tail = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + tail


def _unbroken(text: str) -> str:
    """Keeps a number and its unit on one line, as in `1.2 kB`."""
    return re.sub(r"(?<=\d) (?=[^\W\d])", "&nbsp;", text)


def _is_number(cell) -> bool:
    if isinstance(cell, str):
        return cell[:1].isdigit() or cell in ("–", "")
    return cell is None or isinstance(cell, (int, float))


def _format(cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)
