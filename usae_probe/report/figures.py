"""Figures, one style: colour-blind-safe maps, captions that state the measure and n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..probes import UniversalityReport
from ..probes.fidelity import Fidelity
from ..probes.intervals import Interval
from ..probes.linear import LinearReference
from ..probes.records import or_nan
from ..probes.scan import ScanReport
from ..split import spoken
from ..usae import sources_of
from .heat_maps import Layout, Panel, matrices
from .style import add_caption, cycle, new_figure, percent, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def r2_matrix(report: UniversalityReport, path: Path) -> None:
    """Draw R² of every source site (rows) to every target site (columns), held-out beside training rows.

    Below a held-out value stands its 95 % interval; a third matrix is the linear reference, with the share of it that
    the USAE reaches.
    """
    save(r2_figure(report), path)


def r2_figure(report: UniversalityReport) -> Figure:
    """Return the figure of `r2_matrix`."""
    kind = rows_measured(report)
    n_panels = 2 + _has_numbers(report.linear)
    narrow = Layout.of(report.sites, n_panels).cell[0] < 0.7  # more could not be read
    ends = {
        source: {target: _spelled(interval, narrow=narrow) for target, interval in row.items()}
        for source, row in (report.r2_interval or {}).items()
    }
    panels = [
        Panel(f"USAE, {kind} rows\n(n = {report.n_rows_eval:,})", report.r2, ends or None),
        Panel(f"USAE, training rows\n(n = {report.n_rows_train:,})", report.r2_train),
    ]
    notes = [
        f"n = {report.n_rows_eval:,} {kind} rows. R² = 1 − SSE / SST about the per-dimension mean of the same rows; "
        "the null is 0: no better than that mean."
    ]
    if any(text for row in ends.values() for text in row.values()):
        notes.append(f"Below: 95 % interval, {kind} images resampled.")
    linear, share = report.linear, report.r2_share
    if linear and share and _has_numbers(linear):
        reached = {
            s: {t: f"({percent(v)})" if math.isfinite(v) else "" for t, v in r.items()} for s, r in share.items()
        }
        panels.append(Panel(f"ridge regression, {kind} rows\n(n = {linear.n_rows_eval:,})", linear.r2, reached))
        notes.append(
            f"Ridge regression, without a USAE, was fitted on {linear.n_rows_train:,} training rows; below its R², in "
            "percent: the share of it that the USAE reaches."
        )
    return matrices(panels, report.sites, "R² of reconstruction, own code and other sites' codes", " ".join(notes))


def _spelled(interval: Interval, *, narrow: bool) -> str:
    if not all(map(math.isfinite, interval)):
        return ""
    low, high = (short(end, 2 if narrow else 3) for end in interval)
    return f"{low}, {high}" if narrow else f"[{low}, {high}]"


def _has_numbers(linear: LinearReference | None) -> bool:
    return linear is not None and any(math.isfinite(value) for row in linear.r2.values() for value in row.values())


def rows_measured(report: UniversalityReport | Fidelity | ScanReport) -> str:
    """Return what the rows of a report, or its images, are called."""
    return spoken(report.measured_on)


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
    left.set(xlabel="step", ylabel="normalised MSE", title="Loss by target site")
    right.set(xlabel="step", ylabel="R²", title="R² on validation rows by target site")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    _legend(figure, sites, columns, aligned=bool(aligned))
    figure.set_label("Training")
    rows = "R² is of validation rows, which training never sees. " if any(record["r2"] for record in history) else ""
    steps = max((record["step"] for record in history), default=0)
    add_caption(
        figure,
        f"Loss of training batches, {len(history):,} records of {steps:,} steps. "
        f"{rows}Who predicts the mean of every dimension has a loss of 1 and R² = 0.",
    )
    save(figure, path)


def _legend(figure: Figure, sites: Sequence[str], columns: int, *, aligned: bool) -> None:
    """Put one legend over both panels: a colour per site, a style per code."""
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
        figure.legend(handles=entries, loc="outside upper center", ncols=columns, fontsize=7, frameon=False)


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
    axis.plot(steps, [or_nan(r["r2"][site][site]) for r in measured], color=colour, marker=".")
    if others:
        cross = [sum(or_nan(r["r2"][source][site]) for source in others) / len(others) for r in measured]
        axis.plot(steps, cross, color=colour, marker=".", linestyle="--")
