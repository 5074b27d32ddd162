"""The figure of a sweep: self-R², cross-R² and the dead share against what was set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .style import add_caption, cycle, new_figure, save
from .sweep import rows_measured, shown_key, shown_value

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_PANELS = (
    ("self_r2", "R²", "Self-R²"),
    ("cross_r2", "R²", "Cross-R²"),
    ("dead_share", "share of latents", "Latents that never fire"),
)
_MARKERS = "osD^vP*X"
_WIDE = 4.0  # values that span such a factor are spaced by their ratios


class _Places(NamedTuple):
    """Where the values of the first key stand on the x axis, by how they are spelled."""

    key: str
    x: dict[str, float]
    numeric: bool

    def beside(self, number: int, n_lines: int) -> _Places:
        """Return the places of one of several lines: side by side, where no line leads from one place to the next."""
        off = 0.0 if self.numeric else 0.08 * (number - (n_lines - 1) / 2)
        return self._replace(x={text: x + off for text, x in self.x.items()})


def sweep_figure(data: Mapping[str, Any], path: Path) -> None:
    """Draw means over seeds, with bars from the least to the greatest.

    The first key that was set to several values is the x axis (spaced by ratio where its values span a factor of 4 or
    more, one place each where they are no numbers); every combination of the others is a line.

    Args:
        data: the content of `sweep.json`.
        path: of the PNG; an SVG goes beside it.
    """
    panels = [panel for panel in _PANELS if any(row[panel[0]] for row in data["combinations"])]
    data = {**data, "keys": sorted(data["keys"], key=lambda key: _is_constant(key, data))}
    lines, places = _lines(data), _places(data)
    figure = new_figure((3.4 * max(len(panels), 1), 3.7))
    handles: list[Artist] = []
    for at, (measure, unit, title) in enumerate(panels, start=1):
        axis = figure.add_subplot(1, len(panels), at)
        handles = [
            _line(axis, rows, measure, places.beside(number, len(lines)), colour, _MARKERS[number % len(_MARKERS)])
            for number, (colour, rows) in enumerate(zip(cycle(len(lines)), lines.values(), strict=True))
        ]
        _x_axis(axis, places, shown_key(places.key, data))
        axis.set_ylabel(unit)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if measure == "dead_share":
            top = max(axis.get_ylim()[1], 0.05)
            axis.set_ylim(-0.03 * top, top)
    if len(lines) > 1 and handles:
        columns = max(1, int(9.0 / (0.6 + 0.06 * max(map(len, lines)))))
        figure.legend(handles, list(lines), loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    figure.set_label("Sweep")
    add_caption(figure, _caption(data))
    save(figure, path)


def _is_constant(key: str, data: Mapping[str, Any]) -> bool:
    return len({shown_value(row["settings"][key]) for row in data["combinations"]}) == 1


def _lines(data: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the combinations by line: what all keys but the first are set to."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in data["combinations"]:
        rest = [f"{shown_key(key, data)} = {shown_value(row['settings'][key])}" for key in data["keys"][1:]]
        lines.setdefault(", ".join(rest), []).append(row)
    return lines


def _places(data: Mapping[str, Any]) -> _Places:
    if not data["keys"]:
        return _Places("", {"": 0.0}, numeric=False)
    key = data["keys"][0]
    values = {shown_value(row["settings"][key]): row["settings"][key] for row in data["combinations"]}
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values())
    x = {text: float(value) if numeric else float(at) for at, (text, value) in enumerate(values.items())}
    return _Places(key, x, numeric)


def _line(
    axis: Axes, rows: Sequence[Mapping[str, Any]], measure: str, places: _Places, colour: str, marker: str
) -> Artist:
    spelled = [shown_value(row["settings"][places.key]) if places.key else "" for row in rows]
    points = sorted(
        (places.x[text], row[measure]["mean"], row[measure]["min"], row[measure]["max"])
        for text, row in zip(spelled, rows, strict=True)
        if row[measure]
    )
    mean = [point[1] for point in points]
    drawn = axis.errorbar(
        [point[0] for point in points],
        mean,
        yerr=[[point[1] - point[2] for point in points], [point[3] - point[1] for point in points]],
        color=colour,
        marker=marker,
        markersize=5,
        linestyle="-" if places.numeric else "",  # between names there is nothing
        linewidth=1.4,
        capsize=3,
    )
    return cast("Artist", drawn)  # a container: legends take it


def _x_axis(axis: Axes, places: _Places, label: str) -> None:
    """Put a tick at every value that was set, and nowhere else."""
    x, labels = list(places.x.values()), list(places.x)
    if places.numeric and min(x) > 0 and max(x) / min(x) >= _WIDE:
        axis.set_xscale("log")
    crowded = sum(map(len, labels)) > 24
    axis.set_xticks(x, labels, rotation=25 if crowded else 0, ha="right" if crowded else "center", fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)
    if not places.numeric:
        axis.set_xlim(-0.5, len(x) - 0.5)
    else:
        axis.margins(x=0.12)


def _caption(data: Mapping[str, Any]) -> str:
    seeds, sites = len(data["seeds"]), len(data["sites"])
    over = "R²: mean over sites, over pairs of them; " if sites > 1 else ""
    bars = f"; points: mean of {seeds} seeds, bars: least to greatest" if seeds > 1 else ""
    return f"{over}{rows_measured(data)}{bars}"
