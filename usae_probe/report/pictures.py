"""CAM pictures: sheets that show them beside the images that fire the same latents, and single pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ..files import replacing
from .style import cycle, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = UInt8[np.ndarray, "_ _ 3"]

_DPI = 130
_SMALL = 128  # pixels: smaller pictures are enlarged without blur
_STRONGEST = "strongest held-out image"
_CAPTION = (
    "CAM: gradient ascent on z_pre from noise, through the model's own preprocessing; below it z of the picture as a "
    "multiple of the largest z on held-out images. Images: those of the run that fire the latent most. "
    "Curves: z_pre of the transformed picture / largest z on held-out images. "
    "Under a latent's number: the label it follows in every model, where there is one."
)
_UNDIVIDED = " Dotted: z_pre itself, where no held-out image fires the latent."


class SheetCell(NamedTuple):
    """One latent in one site.

    Attributes:
        picture: CAM picture, [H, W, 3].
        exemplars: images of the run that fire the latent most, [h, w, 3]; the first four are shown.
        curve: z_pre in every step of the ascent.
        z: of the picture in its own model; 0 where the latent is not selected.
        natural: largest z on held-out images; may be 0.
    """

    picture: Picture
    exemplars: Sequence[Picture]
    curve: Sequence[float]
    z: float
    natural: float


class SheetColumn(NamedTuple):
    """One latent.

    Attributes:
        latent: its number.
        title: what is known about it, e.g. `colour = red`; may be empty.
        cells: by site.
    """

    latent: int
    title: str
    cells: Mapping[str, SheetCell]


def cam_sheet(columns: Sequence[SheetColumn], sites: Sequence[str], path: Path) -> None:
    """Draw CAM pictures with exemplars and curves: a column per latent, two rows per site, curves below; as PNG.

    Args:
        columns: one to eight latents.
        sites: the rows, in order; a column may lack some.
        path: of the PNG file.
    """
    save(_sheet(columns, sites), path)


def save_png(pixels: Picture, path: Path) -> None:
    """Write one picture as PNG, without loss, atomically."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")


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
                _draw_cell(plan, column, site, plan.x(j), plan.y(i))
    _curves(plan, columns, sites)
    _legend(plan, sites)
    plan.text(0.15, plan.caption_top, "\n".join(plan.caption), fontsize=7, color="0.35", va="top", linespacing=1.3)
    return plan.figure


class _Plan:
    """An empty sheet, and where everything stands on it, in inches from its top left corner.

    Args:
        columns, sites: what will be drawn.
    """

    left, right, gap = 0.95, 0.15, 0.16
    below = 0.24  # for the text under a CAM picture
    curves_height = 1.1

    def __init__(self, columns: Sequence[SheetColumn], sites: Sequence[str]) -> None:
        cells = [cell for column in columns for cell in column.cells.values()]
        self.side = 1.5 if len(columns) > 3 else 1.9
        self.small = (self.side - 0.06) / 2
        self.image_rows = -(-min(max((len(cell.exemplars) for cell in cells), default=0), 4) // 2)
        self.top = 0.38 + 0.14 * max((len(_title_lines(column.title, self.side)) for column in columns), default=0)
        self.site_height = self.side + self.below + self.image_rows * (self.small + 0.06) + 0.14
        self.curves_top = self.top + len(sites) * self.site_height + 0.02
        self.width = self.left + len(columns) * (self.side + self.gap) - self.gap + self.right
        longest = max(map(len, [*sites, _STRONGEST]))
        self.legend_columns = min(len(sites) + 1, max(1, int((self.width - 0.2) / (0.6 + 0.062 * longest))))
        self.legend_top = self.curves_top + self.curves_height + 0.4
        self.caption_top = self.legend_top + 0.16 * -(-(len(sites) + 1) // self.legend_columns) + 0.14
        undivided = any(cell.natural <= 0 for cell in cells)
        self.caption = textwrap.wrap(
            _CAPTION + _UNDIVIDED * undivided, int((self.width - 0.3) * 18.5), break_on_hyphens=False
        )
        self.height = self.caption_top + 0.13 * len(self.caption) + 0.14
        self.figure = new_figure((self.width, self.height), dpi=_DPI, layout="none")

    def x(self, column: int) -> float:
        """Left edge of a latent's column."""
        return self.left + column * (self.side + self.gap)

    def y(self, site: int) -> float:
        """Top edge of a site's CAM pictures."""
        return self.top + site * self.site_height

    def axes(self, name: str, x: float, y: float, width: float, height: float, **more: Any) -> Axes:
        """Add axes with their top left corner at (x, y)."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place, label=name, **more)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write at (x, y). Names and titles are the user's: a $ in them is a $."""
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **style)


def _site_name(plan: _Plan, site: str, row: int) -> None:
    """Write a site's name, and what its rows are, upwards at the left."""
    y, height = plan.y(row), plan.site_height - 0.14
    model, slash, layer = site.partition("/")
    room = int(height / 0.045)  # characters of the smallest size
    lines = [site] if len(site) <= height / 0.08 else textwrap.wrap(model + slash, room) + textwrap.wrap(layer, room)
    size = min(9.0, 9.0 * height / 0.08 / max(map(len, lines)))
    style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center"}
    plan.text(0.33, y + height / 2, "\n".join(lines), fontsize=size, fontweight="bold", **style)
    plan.text(plan.left - 0.14, y + plan.side / 2, "CAM", fontsize=8, color="0.35", **style)
    if plan.image_rows:
        images = plan.image_rows * (plan.small + 0.06) - 0.06
        plan.text(
            plan.left - 0.14, y + plan.side + plan.below + images / 2, "images", fontsize=8, color="0.35", **style
        )


def _draw_cell(plan: _Plan, column: SheetColumn, site: str, x: float, y: float) -> None:
    """Draw a CAM picture, what is to be said of it, and its exemplars two by two."""
    cell = column.cells[site]
    _show(plan.axes(f"cam {column.latent} {site}", x, y, plan.side, plan.side), cell.picture)
    beaten = cell.z <= cell.natural
    text = _strength(cell.z, cell.natural)
    style: dict[str, Any] = {"fontsize": 8, "ha": "center", "va": "center"}
    plan.text(x + plan.side / 2, y + plan.side + 0.11, text, color="#B34700" if beaten else "0.1", **style)
    top, step = y + plan.side + plan.below, plan.small + 0.06
    for i, picture in enumerate(cell.exemplars[: 2 * plan.image_rows]):
        place = (x + i % 2 * step, top + i // 2 * step, plan.small, plan.small)
        _show(plan.axes(f"image {column.latent} {site} {i}", *place), picture)
    if plan.image_rows and not cell.exemplars:
        plan.text(x + plan.side / 2, top + plan.small / 2, "no image fires it", color="0.45", **style)


def _show(axes: Axes, picture: Picture) -> None:
    axes.imshow(picture, interpolation="nearest" if max(picture.shape) < _SMALL else "antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color="0.6")


def _strength(z: float, natural: float) -> str:
    if z <= 0:
        return "not selected"
    return f"{z / natural:.1f}× max" if natural > 0 else f"z {z:.2g}, held-out max 0"


def _title_lines(title: str, width: float) -> list[str]:
    return textwrap.wrap(title, int(width * 15), max_lines=2, placeholder=" …")


def _curves(plan: _Plan, columns: Sequence[SheetColumn], sites: Sequence[str]) -> None:
    """Draw z_pre over the steps for every latent, on one scale, so that columns can be compared."""
    first: Axes | None = None
    for j, column in enumerate(columns):
        name = f"curves {column.latent}"
        axes = plan.axes(name, plan.x(j), plan.curves_top, plan.side, plan.curves_height, sharey=first)
        for site, colour in zip(sites, cycle(len(sites)), strict=True):
            if site in column.cells:
                cell = column.cells[site]
                unit, line = (cell.natural, "-") if cell.natural > 0 else (1.0, ":")
                axes.plot(np.asarray(cell.curve) / unit, color=colour, linewidth=1.2, linestyle=line)
        axes.axhline(1.0, color="0.3", linewidth=0.9, linestyle="--", zorder=1)
        axes.locator_params(nbins=3)
        axes.tick_params(labelsize=7, length=2, pad=2, labelleft=j == 0)
        axes.set_xlabel("step", fontsize=7, labelpad=1)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        first = first or axes
    if first:
        middle = plan.curves_top + plan.curves_height / 2
        plan.text(0.48, middle, "z_pre / held-out max", fontsize=7, rotation=90, ha="center", va="center")


def _legend(plan: _Plan, sites: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    room = int((plan.width - 0.8) / 0.062)
    entries = [
        Line2D([], [], color=colour, label=_shortened(site, room))
        for colour, site in zip(cycle(len(sites)), sites, strict=True)
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


def _shortened(name: str, room: int) -> str:
    """Leave out the middle of a name that is too long (the full one stands at its rows)."""
    return name if len(name) <= room else f"{name[: room // 2]}…{name[len(name) - (room - room // 2 - 1) :]}"
