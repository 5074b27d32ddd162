"""What an evaluation found, as figures: what is shared, how sure that is, and what it stands beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..probes import UniversalityReport
from ..probes.controls import Controls, Length, Spread
from ..probes.records import LatentRecord
from ..usae import Matrix
from .fidelity_figure import fidelity
from .figures import r2_matrix, rows_measured
from .heat_maps import Panel, Small, matrices
from .style import (
    CLASS_COLOURS,
    COLOURS,
    GREY,
    WIDE,
    captioned,
    folded,
    number,
    percent,
    plain,
    remove,
    save,
    short,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"universal": "o", "partial": "^", "chance": ".", "specific": "s"}
_LABEL = 8.0
_KINDS = {
    "usae": "USAE, one dictionary for all sites",
    "steps": "independent SAE, as many steps",
    "encoder": "independent SAE, as many encoder updates",
    "parts": "independent SAE, n_latents / M latents",
}


def universality_figures(report: UniversalityReport, folder: Path) -> list[Path]:
    """Draw all that a report has data for, and remove what an earlier evaluation drew of what this one lacks.

    Args:
        report: what an evaluation found.
        folder: where the PNGs go, and an SVG beside each.

    Returns:
        The PNGs that are there now, the R² matrix first.
    """
    r2_matrix(report, folder / "r2.png")
    paths = [folder / "r2.png"]
    for name, draw in FIGURES.items():
        path, figure = folder / f"{name}.png", draw(report)
        if figure is None:
            remove(path)
        else:
            save(figure, path)
            paths.append(path)
    return paths


def entropy(report: UniversalityReport) -> Figure | None:
    """Return the histogram of firing entropy over the live latents, by class; None where nothing has one."""
    values = {
        name: [min(r.entropy, 1.0) for r in report.latents if r.category == name and math.isfinite(r.entropy)]
        for name in CLASS_COLOURS
    }
    n = sum(map(len, values.values()))
    if not n:
        return None
    least = _threshold(report, "entropy")
    caption = (
        f"n = {n:,} live latents, on {report.n_rows_eval:,} {rows_measured(report)} rows. Firing entropy compares "
        f"rates alone, not images: FE ≥ {least:g} by itself would call {report.n_equal_rates:,} of them universal. "
        f"{report.counts['universal']:,} are universal, with φ ≥ {_threshold(report, 'phi'):g} and "
        f"q < {_threshold(report, 'q'):g} for firing on the same images as well.{_at_random(report)}"
    )
    figure = captioned(7.5, 3.4, "Firing entropy over the models", caption)
    axis = figure.subplots()
    axis.hist(
        list(values.values()),
        bins=np.linspace(0, 1, 21).tolist(),
        stacked=True,
        color=list(CLASS_COLOURS.values()),
        label=[f"{name} ({len(found):,})" for name, found in values.items()],
        edgecolor="white",
        linewidth=0.4,
    )
    axis.axvline(least, color="black", linestyle="--", linewidth=1, label=f"FE = {least:g}")
    axis.set(
        xlabel="firing entropy FE (0: fires in one model, 1: equally often in all)", ylabel="latents per bin of .05"
    )
    axis.set_xlim(0, 1)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _legend(axis)
    return figure


def phi_energy(report: UniversalityReport) -> Figure | None:
    """Return φ against energy, a point per latent that fires in two class sites or more; None without any."""
    points = {name: _points(report.latents, name) for name in CLASS_COLOURS}
    n, m, least = sum(map(len, points.values())), len(report.class_sites), _threshold(report, "phi")
    if not n:
        return None
    smallest = f"the smallest over the {m * (m - 1) // 2} pairs of {m} models" if m > 2 else "in the two models"
    caption = (
        f"n = {n:,} latents that fire in 2 models or more, on {report.n_rows_eval:,} {rows_measured(report)} rows. "
        f"φ: correlation of firing on the same images (and places), {smallest}; independent firing has φ = 0. A "
        f"universal latent is above the line, and passes the tests of entropy and chance too.{_at_random(report)}"
    )
    figure = captioned(7.5, 3.9, "Co-firing and energy", caption)
    axis = figure.subplots()
    for layer, name in enumerate(("chance", "specific", "universal", "partial")):  # the fewest last, on top
        if points[name]:
            x, y = zip(*points[name], strict=True)
            colour, marker = CLASS_COLOURS[name], _MARKERS[name]
            label = f"{name} ({len(x):,})"
            axis.scatter(
                x, y, s=14, color=colour, marker=marker, alpha=0.65, linewidths=0, label=label, zorder=2 + layer
            )
    axis.axhline(least, color="black", linestyle="--", linewidth=1, label=f"φ = {least:g}")
    _log_axis(axis)
    axis.set(xlabel="energy E|z| ‖W_dec‖, summed over sites (units of the scaled activations)", ylabel="φ")
    axis.grid(alpha=0.3)
    _legend(axis)
    return figure


def controls(report: UniversalityReport) -> Figure | None:
    """Return universal latents of the run and of all its controls; None where it has none."""
    if not report.nulls and not (report.controls and report.controls.controls):
        return None
    bars = _bars(report)
    labels = [folded(bar.label, 46) for bar in bars]
    heights = [0.14 + 0.16 * (1 + label.count("\n")) for label in labels]
    notes = [
        f"Latents that are universal (FE ≥ {_threshold(report, 'entropy'):g}, φ ≥ {_threshold(report, 'phi'):g} for "
        f"all pairs, q < {_threshold(report, 'q'):g}) on n = {report.n_rows_eval:,} {rows_measured(report)} rows; in "
        "percent, of the live ones."
    ]
    seeds = report.controls.seeds if report.controls else ()
    if len(seeds) > 1:
        notes.append(f"This run: mean of n = {len(seeds)} seeds, whisker from the least to the greatest.")
    if report.nulls:
        n = len(report.nulls[0].counts["universal"])
        notes.append(f"At evaluation: mean of n = {n} random pairings, whisker to the greatest.")
    if report.controls and report.controls.controls:
        notes.append("Trained controls: one training each, as the run's; universal: in the sites that each is of.")
    figure = captioned(WIDE, sum(heights) + 0.55, "Universal latents, and what they stand beside", " ".join(notes))
    axis = figure.subplots()
    places = np.cumsum(heights) - np.array(heights) / 2
    for y, height, bar in zip(places, heights, bars, strict=True):
        axis.barh(y, bar.value, height=min(0.24, 0.7 * height), color=bar.colour)
        if bar.high > bar.low:
            axis.plot([bar.low, bar.high], [y, y], color="black", linewidth=1.2, marker="|", markersize=6)
    ends = [(float(y), float(max(bar.value, bar.high)), bar.text) for y, bar in zip(places, bars, strict=True)]
    _finish_bars(axis, WIDE, dict(zip(places.tolist(), labels, strict=True)), ends)
    axis.set_ylim(sum(heights), 0)
    axis.set_xlabel("universal latents", fontsize=9)
    return figure


def tax(report: UniversalityReport) -> Figure | None:
    """Return self-R² of the USAE beside independent SAEs; None where none were trained."""
    lengths = report.controls.independent if report.controls else None
    if not lengths:
        return None
    first = next(iter(lengths.values())).r2
    sites, n = list(first), next(iter(first.values())).n
    caption = (
        f"Self-R²: each site from its own code, on n = {report.n_rows_eval:,} {rows_measured(report)} rows. Alignment "
        "tax: the independent SAE's R² minus the USAE's, seed by seed; above 0, sharing costs. M: sites of the USAE. "
        + (f"Means of n = {n} seeds; whiskers and brackets from the least to the greatest." if n > 1 else "n = 1 seed.")
    )
    thick, shown = 0.19, {"usae": _usae_r2(lengths), **{kind: length.r2 for kind, length in lengths.items()}}
    group = thick * len(shown) + 0.2
    figure = captioned(WIDE, group * len(sites) + 0.95, "What sharing one dictionary costs", caption)
    axis, ends = figure.subplots(), []
    for row, (kind, bars) in enumerate(shown.items()):
        y = group * np.arange(len(sites)) + thick * (row + 0.5) + 0.1
        means = [bars[site].mean for site in sites]
        colour = (COLOURS[0], COLOURS[4], COLOURS[1], COLOURS[2])[row % 4]
        axis.barh(y, means, height=0.88 * thick, color=colour, label=_KINDS.get(kind, kind))
        for at, site in zip(y.tolist(), sites, strict=True):
            mean, low, high, _ = bars[site]
            if high > low:
                axis.plot([low, high], [at, at], color="black", linewidth=1, marker="|", markersize=5)
            if math.isfinite(mean):
                ends.append((at, high, number(mean) + _taxed(lengths, kind, site)))
            else:
                ends.append((at, 0.0, "–"))
    _finish_bars(axis, WIDE, {group * (at + 0.5): folded(site) for at, site in enumerate(sites)}, ends)
    axis.set_ylim(group * len(sites), 0)
    axis.set_xticks([tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick < 1.001])
    axis.set_xlabel("self-R²", fontsize=9)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=_LABEL, frameon=False)
    return figure


def similarity(report: UniversalityReport) -> Figure | None:
    """Return what is alike without a USAE; None where it is not known."""
    found = report.similarity
    if found is None:
        return None
    sites = list(found.cka)
    if not any(math.isfinite(found.cka[a][b]) for a in sites for b in sites if a != b):
        return None
    caption = (
        f"n = {found.n_images:,} {rows_measured(report)} images, one row each. Linear CKA, debiased (may be "
        f"negative). Mutual k-NN: share of the k = {found.k} nearest images in common; chance is "
        f"{number(found.k / max(found.n_images - 1, 1))}."
    )
    if found.nulls:
        caption += f" Null: the greatest of {found.nulls} shuffles of which images are paired."
    panels = [
        Panel("linear CKA", found.cka, _nulls(found.cka_null)),
        Panel(f"mutual k-NN (k = {found.k})", found.mutual_knn, _nulls(found.mutual_knn_null)),
    ]
    return matrices(panels, sites, "Similarity of the activations, without a USAE", caption, ("", ""))


FIGURES: dict[str, Callable[[UniversalityReport], "Figure | None"]] = {
    "entropy": entropy,
    "phi_energy": phi_energy,
    "controls": controls,
    "tax": tax,
    "fidelity": fidelity,
    "similarity": similarity,
}
"""Beside the R² matrix, by the names of their files."""


class _Bar(NamedTuple):
    """One bar: universal latents, `of` so many, with the ends of a whisker."""

    label: str
    value: float
    low: float
    high: float
    of: float
    colour: str
    unit: str = ""

    @property
    def text(self) -> str:
        """What stands at its end."""
        value = f"{self.value:,.{0 if float(self.value).is_integer() else 1}f}"
        return f"{value}  ({percent(self.value / self.of if self.of else math.nan)}{self.unit})"


def _bars(report: UniversalityReport) -> list[_Bar]:
    trained = report.controls or Controls()
    universal, live = trained.universal or (report.counts["universal"],), trained.live or (report.n_live,)
    mean, n_live = float(np.mean(universal)), float(np.mean(live))
    bars = [_Bar("this run", mean, min(universal), max(universal), n_live, COLOURS[0])]
    for null in report.nulls:
        counts = {name: float(np.mean(found)) for name, found in null.counts.items()}
        n_live = sum(counts.values()) - counts["rare"] - counts["dead"]
        among = f" within {null.within}" if null.within else ""
        label, value = f"this run, pairing shuffled{among} at evaluation", null.universal
        bars.append(_Bar(label, value, value, max(null.counts["universal"]), n_live, GREY))
    for control in trained.controls:
        label, value = f"{control.name}: {control.what}" if control.what else control.name, control.counts["universal"]
        bars.append(_Bar(label, value, value, value, control.n_live, COLOURS[4]))
    for found in trained.posthoc:
        shuffled = "" if found.null is None else f"; shuffled: {number(found.null, 1)}"
        rows = "training" if found.matched_on == "train" else rows_measured(report)
        label, value = f"independent SAEs, their latents matched on {rows} rows", found.counts["universal"]
        bars.append(_Bar(label, value, value, value, found.n_pairs, COLOURS[2], f" of pairs{shuffled}"))
    return bars


def _points(latents: Sequence[LatentRecord], category: str) -> list[tuple[float, float]]:
    """Return energy and φ of the latents of one class that have both."""
    found = [(r.total_energy, r.phi) for r in latents if r.category == category and len(r.fires_in) > 1]
    return [(energy, phi) for energy, phi in found if energy > 0 and math.isfinite(phi)]


def _usae_r2(lengths: Mapping[str, Length]) -> dict[str, Spread]:
    """Return the USAE's own R² by site, as the tax was taken from it: in the mean over seeds, its range is not kept."""
    length = next(iter(lengths.values()))
    means = {site: length.r2[site].mean - length.tax[site].mean for site in length.r2}
    return {site: Spread(mean, mean, mean, length.r2[site].n) for site, mean in means.items()}


def _taxed(lengths: Mapping[str, Length], kind: str, site: str) -> str:
    """Return what is printed behind an R²: the tax, with its range where there are several seeds."""
    if kind not in lengths:
        return ""
    tax = lengths[kind].tax[site]
    spelled = [number(value) if value < 0 else f"+{number(value)}" for value in (tax.mean, tax.low, tax.high)]
    return f"   tax {spelled[0]}" + (f"  [{spelled[1]}, {spelled[2]}]" if tax.n > 1 else "")


def _nulls(null: Matrix) -> Small:
    return {
        a: {b: f"null {short(v, 3)}" if math.isfinite(v) else "" for b, v in row.items()} for a, row in null.items()
    }


def _finish_bars(
    axis: Axes, width: float, labels: Mapping[float, str], texts: Sequence[tuple[float, float, str]]
) -> None:
    """Name horizontal bars, {y: label}, and print texts at their ends, (y, x, text), with room for them."""
    axis.set_yticks(list(labels), list(labels.values()), fontsize=_LABEL)
    inside = width - max(text_width(label, _LABEL) for label in labels.values()) - 0.4
    widest = max(text_width(text, _LABEL) for _, _, text in texts) + 0.2
    low, high = min(0.0, axis.get_xlim()[0]), max(*(x for _, x, _ in texts), 1e-9)
    axis.set_xlim(low, low + (high - low) / max(1 - widest / inside, 0.25))
    for y, x, text in texts:
        axis.annotate(plain(text), (max(x, 0.0), y), (5, 0), textcoords="offset points", va="center", fontsize=_LABEL)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _log_axis(axis: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(axis: Axes) -> None:
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=_LABEL, frameon=False, markerscale=1.6)


def _threshold(report: UniversalityReport, name: str) -> float:
    return report.thresholds.get(name, {"entropy": 0.9, "phi": 0.2, "q": 0.01}[name])


def _at_random(report: UniversalityReport) -> str:
    """Return what is universal with images paired at random, as a sentence of a caption."""
    null = next((null for null in report.nulls if not null.within), None)
    if null is None:
        return ""
    found = null.counts["universal"]
    mean = number(null.universal, 1)
    return f" With images paired at random, {mean} are universal (mean of {len(found)} pairings, at most {max(found)})."
