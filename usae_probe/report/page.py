"""A figure that is laid out by hand, in inches from its top left corner: pictures of one size, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from .style import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Picture = UInt8[np.ndarray, "_ _ 3"]
Extent = tuple[float, float, float, float]

DPI = 130
_SMALL = 128  # pixels: smaller pictures are enlarged without blur


class Page:
    """An empty page.

    All pictures lie on one sheet of axes that covers it: axes of their own would take most of the time of drawing.

    Args:
        width, height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure: Figure = new_figure((width, height), dpi=DPI, layout="none")
        self._sheet = self.figure.add_axes((0, 0, 1, 1), label="pictures")
        self._sheet.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self._sheet.axis("off")

    def axes(self, name: str, x: float, y: float, width: float, height: float, **more: Any) -> Axes:
        """Add axes with their top left corner at (x, y)."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place, label=name, **more)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write at (x, y). Names and titles are the user's: a $ in them is a $."""
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **style)

    def picture(self, name: str, x: float, y: float, side: float, picture: Picture, frame: bool = True) -> AxesImage:
        """Show a picture in the middle of a square with its top left corner at (x, y)."""
        longest = max(picture.shape[:2])
        height, width = (side * length / longest for length in picture.shape[:2])
        left, top = x + (side - width) / 2, y + (side - height) / 2
        shown = self.layer(name, (left, left + width, top + height, top), picture)
        if frame:
            from matplotlib.patches import Rectangle

            outline = Rectangle((left, top), width, height, fill=False, linewidth=0.5, edgecolor="0.6")
            self._sheet.add_patch(outline)
        return shown

    def layer(self, name: str, extent: Extent, values: np.ndarray, **style: Any) -> AxesImage:
        """Lay numbers or colours over a part of the page; `extent` is left, right, bottom, top."""
        style.setdefault("interpolation", "nearest" if max(values.shape[:2]) < _SMALL else "antialiased")
        image = self._sheet.imshow(values, extent=extent, aspect="auto", **style)
        image.set_label(name)
        return image
