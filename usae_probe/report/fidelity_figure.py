"""The figure of fidelity: what reconstructions recover of live models' outputs, and what ablating latents does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..probes import UniversalityReport
from ..probes.fidelity import Fidelity
from ..usae import Matrix
from .figures import rows_measured
from .heat_maps import Layout, Panel, heat_map, matrices
from .style import COLOURS, GREY, WIDE, captioned, number, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL = 8.0


def fidelity(report: UniversalityReport) -> Figure | None:
    """Return what is recovered of the live models' outputs, and what ablating latents does; None if not measured."""
    found = report.fidelity
    if found is None or not found.share_recovered:
        return None
    sites = list(found.share_recovered)
    pairs = [(r.null_correlation, r.correlation) for r in found.latents]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    strip = 2.6 if pairs else 0.0
    layout = Layout.of(sites, 1, width=WIDE - strip)
    panel, caption = _recovered(found, [tick.replace("\n", "") for tick in layout.ticks])
    if not pairs:
        return matrices([panel], sites, "Fidelity in the live models", caption)
    width, height = layout.size(len(sites), 1, 0.41)
    medians = found.medians
    caption += (
        f" Right: n = {len(pairs):,} universal latents; Pearson correlation over images of the effect that ablating a "
        "latent has in two models, beside that with another latent of about its energy; black: medians "
        f"({short(medians['correlation'])} against {short(medians['null_correlation'])}; Spearman "
        f"{short(medians['spearman'])} against {short(medians['null_spearman'])}; of those that fire together often "
        f"enough, over images in which both fire {short(medians['both_firing'])})."
    )
    figure = captioned(width + strip, max(height, 3.0), "Fidelity in the live models", caption)
    cells = len(sites) * layout.cell[0]
    left, right = figure.subplots(1, 2, width_ratios=(max(cells, width - layout.label), strip - 0.7))
    heat_map(left, panel, sites, layout)
    _strip(right, pairs)
    return figure


def _recovered(found: Fidelity, names: Sequence[str]) -> tuple[Panel, str]:
    """Return the matrix of what is recovered, and its caption."""
    sites = list(found.share_recovered)
    values: Matrix = {source: dict(row) for source, row in found.share_recovered.items()}
    small = {source: dict.fromkeys(sites, "") for source in sites}
    plain_features = [site for site in sites if not math.isfinite(found.kl_mean[site])]
    for source in sites:
        for target in sites:
            if target in plain_features:
                values[source][target], small[source][target] = found.cosine[source][target], "cosine"
            else:
                small[source][target] = f"top-1 {percent(found.top1_recovered[source][target])}"
    notes = [f"n = {found.n_images:,} {rows_measured(found)} images, other sites' codes off the diagonal."]
    if len(plain_features) < len(sites):
        notes.append(
            "Share recovered: 1 − KL / KL_mean, where KL is that of the clean and the spliced output, KL_mean with the "
            "mean training row instead; small: (a − a_mean) / (1 − a_mean), a: share of images that keep their top-1."
        )
    if plain_features:
        notes.append("Cosine, where a model has no logits: of clean and spliced final features; 1: unchanged.")
    notes.append(f"Denominators, by target: {'; '.join(_denominators(found, names))}.")
    probes = [f"{name} (it finds the label of {percent(a)})" for name, a in _accuracies(found, names)]
    if probes:
        notes.append(f"Logits of a linear probe: {', '.join(probes)}.")
    if not all(math.isfinite(value) for row in values.values() for value in row.values()):
        notes.append("Hatched: no share is given, its denominator is too small.")
    return Panel("share recovered, x̂ in the place\nof the activation", values, small), " ".join(notes)


def _accuracies(found: Fidelity, names: Sequence[str]) -> list[tuple[str, float]]:
    sites = zip(names, found.share_recovered, strict=True)
    return [(name, found.probe_accuracy.get(site, math.nan)) for name, site in sites if found.head[site] == "probe"]


def _denominators(found: Fidelity, names: Sequence[str]) -> Iterator[str]:
    for name, site in zip(names, found.share_recovered, strict=True):
        if math.isfinite(found.kl_mean[site]):
            rest = short(1 - found.top1_mean[site])
            yield f"{name}: KL_mean {number(found.kl_mean[site], 2)} nats, 1 − a_mean {rest}"
        else:
            yield f"{name}: none, cosine with the mean row {short(found.cosine_mean[site])}"


def _strip(axis: Axes, pairs: Sequence[tuple[float, float]]) -> None:
    """Draw pairs (null, own) as points that a line connects, with the medians."""
    for pair in pairs:
        axis.plot((0, 1), pair, color=GREY, linewidth=0.6, alpha=0.4, zorder=1)
    for x, values, colour in zip((0, 1), zip(*pairs, strict=True), (COLOURS[4], COLOURS[0]), strict=True):
        axis.scatter([x] * len(values), values, s=12, color=colour, alpha=0.7, linewidths=0, zorder=2)
        axis.plot((x - 0.18, x + 0.18), [float(np.median(values))] * 2, color="black", linewidth=2.2, zorder=3)
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set_xlim(-0.4, 1.4)
    axis.set_xticks((0, 1), ("another\nlatent", "same\nlatent"), fontsize=_LABEL)
    axis.tick_params(axis="y", labelsize=_LABEL)
    axis.set_ylabel("correlation of effects", fontsize=_LABEL)
    axis.set_title("ablating one latent\nin two models", fontsize=9.5)
