"""Sheets of CAM pictures, beside the images that fire the same latents."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .page import Page, Picture
from .style import cycle, save, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAD = "#B34700"
_STRONGEST = "strongest image"
_CAPTION = (
    "CAM: gradient ascent on z_pre through the model's own preprocessing; below it, how far above the natural mean the "
    "picture drives the latent there, as a multiple of the strongest image's, and, after →, the per cent of images "
    "that it beats in the other models, of those with one. Orange: a picture that failed, for it beats not every image "
    "in its own model (joint: not 99 % in every one). Images: those that fire the latent most. Curves: of the "
    "transformed picture, in the model that is climbed. Under a latent's number: the label it follows in every model, "
    "where there is one."
)


class SheetCell(NamedTuple):
    """One latent in one row: a site, or all of them jointly.

    Attributes:
        picture: CAM picture, [H, W, 3].
        exemplars: images of the run that fire the latent most, [h, w, 3]; the first four are shown.
        curve: activation in every step of the ascent, in multiples of the strongest image's; may be empty.
        text: what is to be said of the picture.
        failed: whether it is none to show as a finding.
    """

    picture: Picture
    exemplars: Sequence[Picture] = ()
    curve: Sequence[float] = ()
    text: str = ""
    failed: bool = False


class SheetColumn(NamedTuple):
    """One latent.

    Attributes:
        latent: its number.
        title: what is known about it, e.g. `colour = red`; may be empty.
        cells: by row.
    """

    latent: int
    title: str
    cells: Mapping[str, SheetCell]


def cam_sheet(columns: Sequence[SheetColumn], sites: Sequence[str], path: Path) -> None:
    """Draw CAM pictures with exemplars and curves: a column per latent, a row per site, curves below; as PNG.

    Args:
        columns: one to eight latents.
        sites: the rows, in order, `joint` too; a column may lack some.
        path: of the PNG file.
    """
    save(_sheet(columns, sites), path, vector=False)


def _sheet(columns: Sequence[SheetColumn], sites: Sequence[str]) -> Figure:
    plan = _Plan(columns, sites)
    for i, site in enumerate(sites):
        _site_name(plan, site, i)
    for j, column in enumerate(columns):
        middle = plan.x(j) + plan.side / 2
        plan.text(middle, 0.12, str(column.latent), fontsize=11, fontweight="bold", ha="center", va="top")
        title = "\n".join(_title_lines(column.title, plan.side))
        plan.text(middle, 0.31, title, fontsize=8, color="0.25", ha="center", va="top", linespacing=1.1)
        for i, site in enumerate(sites):
            if site in column.cells:
                _draw_cell(plan, column, site, i, plan.x(j))
    _curves(plan, columns)
    _legend(plan)
    plan.text(0.15, plan.caption_top, "\n".join(plan.caption), fontsize=7, color="0.35", va="top", linespacing=1.3)
    return plan.figure


class _Plan(Page):
    """An empty sheet, and where everything stands on it.

    Args:
        columns, sites: what will be drawn.
    """

    left, right, gap = 0.95, 0.15, 0.16
    below = 0.24  # for the text under a CAM picture
    curves_height = 1.1

    def __init__(self, columns: Sequence[SheetColumn], sites: Sequence[str]) -> None:
        self.side = 1.5 if len(columns) > 3 else 1.9
        self.small = (self.side - 0.06) / 2
        cells = {site: [column.cells[site] for column in columns if site in column.cells] for site in sites}
        self.image_rows = [
            -(-min(max((len(cell.exemplars) for cell in of_row), default=0), 4) // 2) for of_row in cells.values()
        ]
        top = 0.38 + 0.14 * max((len(_title_lines(column.title, self.side)) for column in columns), default=0)
        heights = [self.side + self.below + rows * (self.small + 0.06) + 0.14 for rows in self.image_rows]
        self.tops = [top, *(top + np.cumsum(heights)).tolist()]
        self.curves_top = self.tops[-1] + 0.02
        self.curved = [site for site in sites if any(len(cell.curve) for cell in cells[site])]
        width = self.left + len(columns) * (self.side + self.gap) - self.gap + self.right
        longest = max(map(len, [*self.curved, _STRONGEST]))
        self.legend_columns = min(len(self.curved) + 1, max(1, int((width - 0.2) / (0.6 + 0.062 * longest))))
        self.legend_top = self.curves_top + self.curves_height + 0.4
        self.caption_top = self.legend_top + 0.16 * -(-(len(self.curved) + 1) // self.legend_columns) + 0.14
        self.caption = textwrap.wrap(_CAPTION, int((width - 0.3) * 18.5), break_on_hyphens=False)
        super().__init__(width, self.caption_top + 0.13 * len(self.caption) + 0.14)

    def x(self, column: int) -> float:
        """Left edge of a latent's column."""
        return self.left + column * (self.side + self.gap)

    def y(self, row: int) -> float:
        """Top edge of a row's CAM pictures."""
        return float(self.tops[row])

    def images_height(self, row: int) -> float:
        """Height of a row's images."""
        return self.image_rows[row] * (self.small + 0.06) - 0.06


def _site_name(plan: _Plan, site: str, row: int) -> None:
    """Write a site's name, and what its rows are, upwards at the left."""
    y, height = plan.y(row), plan.tops[row + 1] - plan.tops[row] - 0.14
    model, slash, layer = site.partition("/")
    room = int(height / 0.045)  # characters of the smallest size
    lines = [site] if len(site) <= height / 0.08 else textwrap.wrap(model + slash, room) + textwrap.wrap(layer, room)
    size = min(9.0, 9.0 * height / 0.08 / max(map(len, lines)))
    style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center"}
    plan.text(0.33, y + height / 2, "\n".join(lines), fontsize=size, fontweight="bold", **style)
    plan.text(plan.left - 0.14, y + plan.side / 2, "CAM", fontsize=8, color="0.35", **style)
    if plan.image_rows[row]:
        middle = y + plan.side + plan.below + plan.images_height(row) / 2
        plan.text(plan.left - 0.14, middle, "images", fontsize=8, color="0.35", **style)


def _draw_cell(plan: _Plan, column: SheetColumn, site: str, row: int, x: float) -> None:
    """Draw a CAM picture, what is to be said of it, and its exemplars two by two."""
    cell, y = column.cells[site], plan.y(row)
    plan.picture(f"cam {column.latent} {site}", x, y, plan.side, cell.picture)
    style: dict[str, Any] = {"fontsize": 8, "ha": "center", "va": "center"}
    plan.text(x + plan.side / 2, y + plan.side + 0.11, cell.text, color=BAD if cell.failed else "0.1", **style)
    top, step = y + plan.side + plan.below, plan.small + 0.06
    for i, picture in enumerate(cell.exemplars[: 2 * plan.image_rows[row]]):
        name = f"image {column.latent} {site} {i}"
        plan.picture(name, x + i % 2 * step, top + i // 2 * step, plan.small, picture)
    if plan.image_rows[row] and not cell.exemplars:
        plan.text(x + plan.side / 2, top + plan.small / 2, "no image fires it", color="0.45", **style)


def _title_lines(title: str, width: float) -> list[str]:
    return textwrap.wrap(title, int(width * 15), max_lines=2, placeholder=" …")


def _curves(plan: _Plan, columns: Sequence[SheetColumn]) -> None:
    """Draw the activation over the steps for every latent, on one scale, so that columns can be compared."""
    first: Axes | None = None
    for j, column in enumerate(columns):
        name = f"curves {column.latent}"
        axes = plan.axes(name, plan.x(j), plan.curves_top, plan.side, plan.curves_height, sharey=first)
        for site, colour in zip(plan.curved, cycle(len(plan.curved)), strict=True):
            if site in column.cells:
                axes.plot(column.cells[site].curve, color=colour, linewidth=1.2)
        axes.axhline(1.0, color="0.3", linewidth=0.9, linestyle="--", zorder=1)
        axes.locator_params(nbins=3)
        axes.tick_params(labelsize=7, length=2, pad=2, labelleft=j == 0)
        axes.set_xlabel("step", fontsize=7, labelpad=1)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        first = first or axes
    if first:
        middle = plan.curves_top + plan.curves_height / 2
        plan.text(0.48, middle, "× strongest image", fontsize=7, rotation=90, ha="center", va="center")


def _legend(plan: _Plan) -> None:
    from matplotlib.lines import Line2D

    room = int((plan.width - 0.8) / 0.062)
    entries = [
        Line2D([], [], color=colour, label=shortened(site, room))
        for colour, site in zip(cycle(len(plan.curved)), plan.curved, strict=True)
    ]
    entries.append(Line2D([], [], color="0.3", linewidth=0.9, linestyle="--", label=_STRONGEST))
    corner = (0.15 / plan.width, 1 - plan.legend_top / plan.height)
    legend = plan.figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=plan.legend_columns,
        fontsize=7,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
