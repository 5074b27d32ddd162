"""Matrices of sites by sites, as figures: numbers in coloured cells, with something small below them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..usae import Matrix
from .style import WIDE, captioned, folded, number, plain, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Small = Mapping[str, Mapping[str, str]]
"""{source site: {target site: what is printed small below the number}}."""
_NARROW, _BROAD = 0.54, 1.5  # of a cell, inches
_VALUE, _SMALL, _LABEL = 9.0, 7.0, 8.0  # points
_AXES = ("from (site encoded)", "to (site decoded)")


class Panel(NamedTuple):
    """One matrix of a figure.

    Attributes:
        title: above it, one line or several.
        values: what is drawn, from dark (0) to bright (`top`); NaN is hatched.
        small: printed below the values.
        top: the brightest.
        digits: printed behind the point.
        framed: (row, column) of cells that stand out.
    """

    title: str
    values: Matrix
    small: Small | None = None
    top: float = 1.0
    digits: int = 3
    framed: frozenset[tuple[str, str]] = frozenset()


class Layout(NamedTuple):
    """How matrices of some sites (rows) and the same or others (columns) stand on a page.

    Attributes:
        labels: of the rows.
        ticks: of the columns: names where they fit into a cell, else their numbers in the rows' labels.
        label: inches that the rows' labels take.
        cell: inches, width and height.
        columns: panels side by side: all of them, or one.
    """

    labels: list[str]
    ticks: list[str]
    label: float
    cell: tuple[float, float]
    columns: int

    @classmethod
    def of(
        cls,
        sites: Sequence[str],
        n_panels: int,
        *,
        across: Sequence[str] | None = None,
        width: float = WIDE,
        small: bool = True,
    ) -> Layout:
        """Return a layout that is at most `width` inches wide; `across` are the columns, where they are others."""
        names, gap = [folded(site) for site in sites], 0.15
        headings = names if across is None else [folded(site) for site in across]
        n = len(headings)
        numbered = [f"{i}  {name}" for i, name in enumerate(names, start=1)] if across is None else names
        label = max(text_width(name, _LABEL) for name in numbered) + 0.5  # with ticks and what the axis is
        room = (width - label) / n_panels - gap
        columns = n_panels if room / n >= _NARROW else 1
        broad = min(_BROAD, room / n if columns > 1 else (width - label - gap) / n)
        fit = all(text_width(name, _LABEL) <= broad - 0.06 for name in headings)
        ticks = headings if fit else [str(i) for i in range(1, n + 1)]
        return cls(names if fit else numbered, ticks, label, (broad, 0.44 if small else 0.34), columns)

    def size(self, n: int, n_panels: int, heading: float = 0.25) -> tuple[float, float]:
        """Return the width and height of n_panels of n × n cells, inches."""
        rows = -(-n_panels // self.columns)
        width = self.label + self.columns * (n * self.cell[0] + 0.15)
        return max(width, 6.0), rows * (n * self.cell[1] + heading + 0.62)


def matrices(
    panels: Sequence[Panel], sites: Sequence[str], title: str, caption: str, axes: tuple[str, str] = _AXES
) -> Figure:
    """Return matrices of the same sites, side by side, or one above the other where there are many sites.

    `axes` says what rows and columns are.
    """
    layout = Layout.of(sites, len(panels))
    lines = max(panel.title.count("\n") for panel in panels)
    figure = captioned(*layout.size(len(sites), len(panels), 0.25 + 0.16 * lines), title, caption)
    for at, panel in enumerate(panels):
        axis = figure.add_subplot(-(-len(panels) // layout.columns), layout.columns, at + 1)
        heat_map(axis, panel, sites, layout, first=at % layout.columns == 0, axes=axes)
    return figure


def heat_map(
    axis: Axes,
    panel: Panel,
    sites: Sequence[str],
    layout: Layout,
    *,
    across: Sequence[str] | None = None,
    first: bool = True,
    axes: tuple[str, str] = _AXES,
) -> None:
    """Draw one matrix, source sites (rows) to target sites (columns); only the `first` of a row names the rows.

    The columns are `sites` too, unless others go `across`.
    """
    columns = sites if across is None else across
    values = [[panel.values[source][target] for target in columns] for source in sites]
    small = [[panel.small[source][target] if panel.small else "" for target in columns] for source in sites]
    axis.imshow(values, cmap="cividis", vmin=0.0, vmax=panel.top, aspect="auto")
    axis.set_xticks(range(len(columns)), layout.ticks, fontsize=_LABEL)
    axis.set_yticks(range(len(sites)), layout.labels if first else [], fontsize=_LABEL)
    axis.tick_params(length=2)
    title = _fitting([panel.title], 9.5, len(columns) * layout.cell[0] + 0.1)
    axis.set_title(plain(panel.title), fontsize=title)
    axis.set_xlabel(axes[1], fontsize=_LABEL)
    if first:
        axis.set_ylabel(axes[0], fontsize=_LABEL)
    sizes = [
        _fitting([text for row in texts for text in row], size, layout.cell[0])
        for texts, size in (
            ([[number(value, panel.digits) for value in row] for row in values], _VALUE),
            (small, _SMALL),
        )
    ]
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isfinite(value):
                _hatch(axis, i, j)
            if (sites[i], columns[j]) in panel.framed:
                _frame(axis, i, j)
            ink = (
                "white" if value <= 0.45 * panel.top else "black"
            )  # NaN has no colour of its own: black on the white ground
            below = small[i][j]
            _print(axis, (j, i), number(value, panel.digits), sizes[0], ink, 5 if below else 0)
            if below:
                _print(axis, (j, i), below, sizes[1], ink, -7)


def _print(axis: Axes, cell_at: tuple[int, int], text: str, size: float, ink: str, up: int) -> None:
    """Print in a cell, `up` points above its middle."""
    cell = axis.annotate(
        plain(text), cell_at, (0, up), textcoords="offset points", ha="center", va="center", color=ink, fontsize=size
    )
    cell.set_in_layout(False)  # it lies inside: measuring hundreds of them takes seconds


def _fitting(texts: Sequence[str], size: float, width: float) -> float:
    """Return the size, in points, at which all texts fit into a cell."""
    widest = max(text_width(text, size) for text in texts)
    return size if widest <= width - 0.05 else max(4.5, size * (width - 0.05) / widest)


def _frame(axis: Axes, i: int, j: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.4))


def _hatch(axis: Axes, i: int, j: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="white", edgecolor="0.85", hatch="////", linewidth=0))
