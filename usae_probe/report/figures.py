"""Figures, one style: colour-blind-safe maps, captions that state the measure and n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..probes import UniversalityReport
from ..usae import Matrix, sources_of
from .style import cycle, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def r2_matrix(report: UniversalityReport, path: Path) -> None:
    """Draw R² of every source site (rows) to every target site (columns), held-out beside training rows."""
    size = len(report.sites)
    figure = new_figure((4.2 + 1.5 * size, 1.9 + 0.55 * size))
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ("held-out rows", report.n_rows_eval, report.r2),
        ("training rows", report.n_rows_train, report.r2_train),
    )
    for axis, (name, n, matrix) in zip(axes, panels, strict=True):
        _heat_map(axis, matrix, report.sites)
        axis.set_title(f"{name} (n = {n:,})", fontsize=10)
        axis.set_xlabel("decoded to")
    axes[0].set_ylabel("code of")
    figure.suptitle("R² of reconstruction, about the per-dimension mean", fontsize=11)
    save(figure, path)


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss per target site, and R² on validation rows where it was measured, over the steps.

    Solid lines are reconstructions from a site's own code, dashed ones the mean over the other sites' codes.
    """
    sites = list(history[0]["losses"]) if history else []
    columns = max(1, int(9.0 / (0.6 + 0.06 * max(map(len, sites), default=0))))
    figure = new_figure((9.6, 3.6 + 0.16 * (len(sites) // columns)))
    left, right = figure.subplots(1, 2)
    aligned = [record["step"] for record in history if record["phase"] == "align"]
    if aligned:
        left.axvspan(0, max(aligned), color="0.92")
    for colour, site in zip(cycle(len(sites)), sites, strict=True):
        _loss_lines(left, history, site, colour)
        _validation_lines(right, [record for record in history if record["r2"]], site, sites, colour)
    left.set(xlabel="step", ylabel="normalised MSE", title="Loss by target site (1 = predicting the mean)")
    right.set(xlabel="step", ylabel="R²", title="R² on validation rows, by target site")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    _legend(figure, sites, columns, aligned=bool(aligned))
    save(figure, path)


def _legend(figure: Figure, sites: Sequence[str], columns: int, *, aligned: bool) -> None:
    """Put one legend under both panels: a colour per site, a style per code."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Line2D | Patch] = [
        Line2D([], [], color=colour, label=site) for colour, site in zip(cycle(len(sites)), sites, strict=True)
    ]
    if len(sites) > 1:
        entries.append(Line2D([], [], color="0.4", label="own code"))
        entries.append(Line2D([], [], color="0.4", linestyle="--", label="other codes"))
    if aligned:
        entries.append(Patch(color="0.92", label="alignment warm-up"))
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def _loss_lines(axis: Axes, history: Sequence[Mapping[str, Any]], site: str, colour: str) -> None:
    own = [r for r in history if site in sources_of(r["source"], [site])]
    other = [r for r in history if site not in sources_of(r["source"], [site])]
    axis.plot([r["step"] for r in own], [r["losses"][site] for r in own], color=colour)
    if other:
        axis.plot([r["step"] for r in other], [r["losses"][site] for r in other], color=colour, linestyle="--")


def _validation_lines(
    axis: Axes, measured: Sequence[Mapping[str, Any]], site: str, sites: Sequence[str], colour: str
) -> None:
    steps, others = [r["step"] for r in measured], [source for source in sites if source != site]
    axis.plot(steps, [_number(r["r2"][site][site]) for r in measured], color=colour, marker=".")
    if others:
        cross = [sum(_number(r["r2"][source][site]) for source in others) / len(others) for r in measured]
        axis.plot(steps, cross, color=colour, marker=".", linestyle="--")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _heat_map(axis: Axes, matrix: Matrix, sites: Sequence[str]) -> None:
    values = [[matrix[source][target] for target in sites] for source in sites]
    axis.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_xticks(range(len(sites)), sites, rotation=25, ha="right", fontsize=8)
    axis.set_yticks(range(len(sites)), sites, fontsize=8)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = value <= 0.6  # not so for NaN, which has no colour of its own: black on the white ground
            text = f"{value:.3f}" if math.isfinite(value) else "–"
            cell = axis.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
            cell.set_in_layout(False)  # it lies inside: measuring hundreds of them takes seconds
