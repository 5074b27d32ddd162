"""The R² matrix in the terminal: coloured cells, in blocks of columns that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

# cividis in ten steps, with the ink (black or white) that has the better contrast, and a fainter one
RAMP = (
    ("#002b62", "#ffffff", "#b3bfd0"), ("#243c6e", "#ffffff", "#bdc5d3"), ("#434e6c", "#ffffff", "#c7cad3"),
    ("#5b606e", "#ffffff", "#d6d7da"), ("#727274", "#ffffff", "#e3e3e3"), ("#888578", "#000000", "#222121"),
    ("#a19975", "#000000", "#30302a"), ("#bcae6c", "#000000", "#3f3c2b"), ("#d6c35d", "#000000", "#4b4424"),
    ("#f3db42", "#000000", "#554d17"),
)  # fmt: skip
_LABEL = 34  # a longer site name is folded
_HEADING = 12


def ramp(share: float) -> tuple[str, str, str]:
    """Return the colour of a cell between 0 and 1, the ink that has the better contrast on it, and a fainter one."""
    return RAMP[min(max(int(share * len(RAMP)), 0), len(RAMP) - 1)]


def finite(value: float | None) -> TypeGuard[float]:
    """Say whether there is a number."""
    return value is not None and math.isfinite(value)


def short(value: float | None) -> str:
    """Spell a measure between −1 and 1 in at most four characters: no leading zero, – where there is none.

    >>> short(0.516), short(-0.07), short(1.0), short(-0.001), short(-1234.5), short(float("nan"))
    ('.52', '−.07', '1.00', '.00', '<−99', '–')
    """
    if not finite(value):
        return "–"
    if value <= -9.5:
        return "<−99" if value < -99.5 else f"−{-value:.0f}"
    text = f"{value:z.2f}" if value > -0.995 else f"{value:.1f}"
    return text.replace("-", "−").replace("0.", ".", 1) if abs(value) < 0.995 else text.replace("-", "−")


class _Layout(NamedTuple):
    """How the matrix stands.

    Attributes:
        labels, headings: of every site, as lines of equal width.
        width: of a cell.
        per_block: cells side by side.
        legend: what the numbers in labels and headings mean, when these hold no names.
    """

    labels: list[list[str]]
    headings: list[list[str]]
    width: int
    per_block: int
    legend: list[str]


def r2_matrix(metrics: Mapping[str, Any], width: int) -> Group:
    """Return R² of every source site (rows) to every target site (columns): held out, training beside it.

    Sites are numbered where their names do not fit above the columns.

    Args:
        metrics: the content of `metrics.json`.
        width: columns of the screen.
    """
    sites, pairs = metrics["sites"], _Pairs(metrics["r2"], metrics["r2_train"])
    layout = _layout(sites, pairs.widest(sites) + 2, width)
    inside = f"held out ({metrics['n_rows_eval']:,} rows) and training ({metrics['n_rows_train']:,})"
    heading = Text.assemble(("R²", "bold"), (f"  code of ↓ decoded to →, {inside}", "dim"))
    legend = [Columns([Text(line) for line in layout.legend], padding=(0, 3))] if layout.legend else []
    return Group(heading, *legend, *_blocks(sites, pairs, layout))


class _Pairs(NamedTuple):
    held_out: Mapping[str, Mapping[str, float | None]]
    training: Mapping[str, Mapping[str, float | None]]

    def widest(self, sites: Sequence[str]) -> int:
        """Width of the widest pair of numbers."""
        return max(len(self.text(source, target)) for source in sites for target in sites)

    def text(self, source: str, target: str) -> str:
        return f"{short(self.held_out[source][target]):>3} {short(self.training[source][target]):>3}"

    def cell(self, source: str, target: str, width: int, height: int) -> Text:
        """Return the pair of numbers, centred on a ground whose colour says how high the held-out one is."""
        held_out, text = self.held_out[source][target], self.text(source, target).center(width)
        cell = Text("\n".join([text, *[" " * width] * (height - 1)]))
        if finite(held_out):
            ground, ink, faint = ramp(held_out)
            middle = text.index(short(held_out)) + len(short(held_out))
            cell.stylize(Style(color=faint, bgcolor=ground))
            cell.stylize(Style(color=ink, bold=True), 0, middle)
        return cell


def _blocks(sites: Sequence[str], pairs: _Pairs, layout: _Layout) -> Iterator[RenderableType]:
    for start in range(0, len(sites), layout.per_block):
        block = range(len(sites))[start : start + layout.per_block]
        table = Table.grid(padding=0)
        table.add_column(width=_widest(layout.labels) + 1, no_wrap=True)
        for _ in block:
            table.add_column(width=layout.width, vertical="bottom", no_wrap=True)
        headings = ["\n".join(line.center(layout.width) for line in layout.headings[j]) for j in block]
        table.add_row("", *(Text(heading, style="dim") for heading in headings))
        for source, label in zip(sites, layout.labels, strict=True):
            cells = [pairs.cell(source, sites[j], layout.width, len(label)) for j in block]
            table.add_row(Text("\n".join(label)), *cells)
        yield table


def _layout(sites: Sequence[str], least: int, width: int) -> _Layout:
    """Choose the most readable layout that fits: names above the columns, else numbers, else numbers everywhere."""
    n, digits = len(sites), len(str(len(sites)))
    names = [_folded(site, _LABEL) for site in sites]
    numbers = [str(i) for i in range(1, n + 1)]
    for longest in (_LABEL, _HEADING):
        headings = [_folded(site, longest) for site in sites]
        cell = max(least, _widest(headings) + 2)
        tall = longest == _HEADING and max(map(len, headings)) > 2
        if _widest(names) + 1 + n * cell <= width and not tall:
            return _Layout(names, headings, cell, n, [])
    labels = [
        [f"{number:>{digits}} {lines[0]}", *(" " * (digits + 1) + line for line in lines[1:])]
        for number, lines in zip(numbers, names, strict=True)
    ]
    headings = [[number] for number in numbers]
    if _widest(labels) + 1 + n * least <= width:
        return _Layout(labels, headings, least, n, [])
    legend = [f"{number:>{digits}} {site}" for number, site in zip(numbers, sites, strict=True)]
    blocks = -(-n // ((width - digits - 1) // least))
    return _Layout([[f"{number:>{digits}}"] for number in numbers], headings, least, -(-n // blocks), legend)


def _folded(name: str, longest: int) -> list[str]:
    """Break a site's name into lines, first behind the model."""
    if len(name) <= longest:
        return [name]
    model, slash, layer = name.partition("/")
    parts = (model + slash, layer)
    return [part[i : i + longest] for part in parts for i in range(0, len(part), longest)]


def _widest(texts: Sequence[Sequence[str]]) -> int:
    return max(len(line) for lines in texts for line in lines)
