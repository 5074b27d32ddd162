"""The figures of a scan: heat maps of layers by layers, the profile over depth, and where shared latents fire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ..probes.scan import ScanReport
from ..sites import file_stem, layer_of
from ..usae import Matrix
from .figures import rows_measured
from .heat_maps import Layout, Panel, Small, heat_map
from .style import WIDE, captioned, cycle, plain, remove, save, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LATENTS = 24
_CELL = 0.56  # inches, of a heat map with many layers


def scan_figures(report: ScanReport, folder: Path) -> list[Path]:
    """Draw what a scan has data for, a PNG and an SVG each; those that an earlier scan drew are removed.

    Returns:
        The PNGs, heat maps first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("scan-*.png"):
        remove(left)
    paths = []
    models = list(report.models)
    for one, other in combinations(models, 2) if len(models) > 1 else [(models[0], models[0])]:
        paths.append(folder / f"scan-{file_stem(one)}-{file_stem(other)}.png")
        save(heat_maps(report, one, other), paths[-1])
    paths.append(folder / "scan-profile.png")
    save(profile(report), paths[-1])
    if report.followed:
        paths.append(folder / "scan-latents.png")
        save(firing_map(report), paths[-1])
    return paths


def heat_maps(report: ScanReport, one: str, other: str) -> Figure:
    """Return all measures of the layers of one model (rows) and another (columns); the best of a target is framed."""
    rows, columns = report.models[one], report.models[other]
    panels = list(_panels(report, one, other))
    wide = max(WIDE, 2 * (_CELL * len(columns) + 0.15) + 1.6)
    layout = Layout.of([layer_of(s) for s in rows], 2, across=[layer_of(s) for s in columns], width=wide)
    cell_width, cell_height = layout.cell
    lines = -(-len(panels) // 2)
    width = layout.label + 2 * (len(columns) * cell_width + 0.15)
    height = lines * (len(rows) * cell_height + 0.85)
    usae = "one USAE over all layers" if report.joint else "a USAE for each two layers"
    n_nulls = report.similarity.nulls if report.similarity else 0
    caption = (
        f"{_rows(report)}. R²: code of the first layer decoded to the second, by {usae}; "
        f"below: ridge regression. CKA (debiased) and mutual k-NN: no USAE; below: the largest of {n_nulls} shuffled "
        "pairings. Universal: latents that fire in both layers on the same images; below: shuffled, in the mean. "
        f"Closest: those of them that fire at the layer of {other} most like at this one of {one}. Framed: the best "
        "source of each target."
    )
    title = f"{one} and {other}, layer by layer"
    if layout.ticks[0] == "1":
        title += f"\n{other}: " + ", ".join(f"{i} {layer_of(site)}" for i, site in enumerate(columns, start=1))
    figure = captioned(max(width, 6.0), height + 0.2 * title.count("\n"), title, caption)
    for at, panel in enumerate(panels):
        axis = figure.add_subplot(lines, 2, at + 1)
        heat_map(axis, panel, rows, layout, across=columns, first=at % 2 == 0, axes=(one, other))
    return figure


def _panels(report: ScanReport, one: str, other: str) -> Sequence[Panel]:
    rows, columns = report.models[one], report.models[other]
    codes, linear, alike = report.codes, report.linear, report.similarity
    panels = []
    for reverse in (False, True):
        if not codes:
            break
        title = f"R², {other} → {one}" if reverse else f"R², {one} → {other}"
        values = _turned(codes.r2) if reverse else codes.r2
        small = linear and _small(_turned(linear.r2) if reverse else linear.r2, rows, columns)
        panels.append(
            Panel(title, values, small or None, digits=2, framed=_best(values, rows, columns, by_row=reverse))
        )
    if alike:
        for name, title in (("cka", "Debiased CKA"), ("mutual_knn", f"Mutual {alike.k}-NN")):
            values = getattr(alike, name)
            small = _small(getattr(alike, f"{name}_null"), rows, columns)
            framed = _best(values, rows, columns)
            panels.append(Panel(title, values, small, top=_top(values, rows, columns), digits=2, framed=framed))
    if codes:
        small = _small(codes.universal_null, rows, columns, 1)
        top = _top(codes.universal, rows, columns)
        panels.append(Panel("Universal latents", codes.universal, small, top=top, digits=0))
        top = _top(codes.closest, rows, columns)
        framed = _best(codes.closest, rows, columns)
        panels.append(Panel(f"Closest, to {other}", codes.closest, None, top=top, digits=0, framed=framed))
    return panels


def profile(report: ScanReport) -> Figure:
    """Return, over relative depth, the best that any layer of another model reaches for each layer."""
    with_codes = report.codes is not None
    titles = [("r2", "linear", "R² from the best layer elsewhere")] if with_codes or report.linear else []
    titles += [("cka", "mutual_knn", "Similarity to the best layer elsewhere")] if report.similarity else []
    titles += [("energy", "", "Energy in universal latents")] if with_codes else []
    names = {"r2": "USAE", "linear": "ridge regression", "cka": "debiased CKA", "mutual_knn": "mutual k-NN"}
    caption = (
        f"{_rows(report)}. Each point is a layer at its relative depth (share of its model's "
        "blocks that are complete); its value is the largest over all layers of the other models, chosen on these rows."
    )
    figure = captioned(3.4 * max(len(titles), 1) + 0.4, 3.2, "Universality over depth", caption)
    rows = report.profile
    colours = dict(zip(report.models, cycle(len(report.models)), strict=True))
    for at, (solid, dashed, title) in enumerate(titles, start=1):
        axis = figure.add_subplot(1, len(titles), at)
        for model, sites in report.models.items():
            own = [row for row in rows if row["site"] in set(sites)]
            depth = [row["depth"] for row in own]
            for measure, style in ((solid, "-o"), (dashed, "--")):
                values = [row[measure] if measure and row[measure] is not None else math.nan for row in own]
                if measure and any(map(math.isfinite, values)):
                    label = f"{model}: {names[measure]}" if measure in names else model
                    axis.plot(depth, values, style, color=colours[model], markersize=4, linewidth=1.4, label=label)
        axis.set_title(title, fontsize=9.5)
        axis.set_xlabel("relative depth", fontsize=8)
        axis.set_xlim(0, 1.03)
        low = min(0.0, axis.get_ylim()[0])
        axis.set_ylim(max(low, -0.5), max(1.03 * axis.get_ylim()[1], 0.1))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False)
    return figure


def firing_map(report: ScanReport) -> Figure:
    """Return where in depth the strongest shared latents fire, a row each: on the same images, and how often."""
    latents, sites = report.followed[:_LATENTS], report.sites
    labels = [f"{one.latent}  {one.follows}".strip() for one in latents]
    width = 0.5 + max(0.075 * max(map(len, labels)), 0.5)
    side = max(0.17, min(0.3, 3.4 / len(sites)))
    longest = max(len(layer_of(site)) for site in sites)
    caption = (
        f"The {len(latents)} strongest of {len(report.followed):,} latents of the joint USAE that all models share, "
        f"{_rows(report)}. Left: φ of a latent's firing at a layer and at its best match in "
        "another model (1: on exactly the same images). Right: share of the rows in which it fires, as a share of its "
        "largest."
    )
    height = len(latents) * 0.2 + 0.075 * longest + 0.5
    figure = captioned(max(6.0, width + 2 * (side * len(sites) + 0.5)), height, "Shared latents through depth", caption)
    largest = [max(one.rate.values()) or 1.0 for one in latents]
    panels = (
        ("fires on the same images (φ)", [[one.phi_at[site] for site in sites] for one in latents]),
        ("how often", [[one.rate[s] / most for s in sites] for one, most in zip(latents, largest, strict=True)]),
    )
    for at, (title, values) in enumerate(panels):
        axis = figure.add_subplot(1, 2, at + 1)
        image = axis.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(sites)), [plain(layer_of(site)) for site in sites], rotation=90, fontsize=6.5)
        axis.set_yticks(range(len(latents)), [plain(label) for label in labels] if not at else [], fontsize=7)
        axis.tick_params(length=2)
        ends = 0
        for model, of_model in report.models.items():
            axis.text(ends + len(of_model) / 2 - 0.5, -0.75, plain(model), ha="center", fontsize=7, color="0.25")
            ends += len(of_model)
            if ends < len(sites):
                axis.axvline(ends - 0.5, color="white", linewidth=2)
        axis.title.set_position((0.5, 1.0))
        axis.set_title(title, fontsize=9, pad=14)
        if at:
            figure.colorbar(image, ax=axis, fraction=0.05).ax.tick_params(labelsize=7)
    return figure


def _rows(report: ScanReport) -> str:
    return f"{report.n_rows:,} {rows_measured(report)} rows"


def _turned(matrix: Matrix) -> Matrix:
    return {a: {b: matrix[b][a] for b in matrix} for a in matrix}


def _small(matrix: Matrix, rows: Sequence[str], columns: Sequence[str], digits: int = 2) -> Small:
    return {a: {b: short(matrix[a][b], digits) if math.isfinite(matrix[a][b]) else "" for b in columns} for a in rows}


def _top(matrix: Matrix, rows: Sequence[str], columns: Sequence[str]) -> float:
    values = [matrix[a][b] for a in rows for b in columns if a != b and math.isfinite(matrix[a][b])]
    return max([value for value in values if value > 0], default=1.0)


def _best(
    matrix: Matrix, rows: Sequence[str], columns: Sequence[str], *, by_row: bool = False
) -> frozenset[tuple[str, str]]:
    """Return the largest cell of each column, or of each row."""
    found = set()
    for fixed in rows if by_row else columns:
        cells = [(fixed, c) for c in columns] if by_row else [(r, fixed) for r in rows]
        known = [(a, b) for a, b in cells if a != b and math.isfinite(matrix[a][b])]
        if known:
            found.add(max(known, key=lambda cell: matrix[cell[0]][cell[1]]))
    return frozenset(found)
