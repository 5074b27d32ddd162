"""A figure that is laid out by hand, in inches from its top left corner: pictures of one size, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from .style import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = UInt8[np.ndarray, "_ _ 3"]

DPI = 130
_SMALL = 128  # pixels: smaller pictures are enlarged without blur


class Page:
    """An empty page.

    Args:
        width, height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure: Figure = new_figure((width, height), dpi=DPI, layout="none")

    def axes(self, name: str, x: float, y: float, width: float, height: float, **more: Any) -> Axes:
        """Add axes with their top left corner at (x, y)."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place, label=name, **more)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write at (x, y). Names and titles are the user's: a $ in them is a $."""
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **style)

    def picture(self, name: str, x: float, y: float, side: float, picture: Picture) -> Axes:
        """Show a picture in a square with its top left corner at (x, y)."""
        axes = self.axes(name, x, y, side, side)
        axes.imshow(picture, interpolation="nearest" if max(picture.shape) < _SMALL else "antialiased")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(linewidth=0.5, color="0.6")
        return axes
