"""One style for all figures: colours that colour-blind readers can tell apart, and how a figure is made and saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe–Ito."""


def cycle(n: int) -> list[str]:
    """Return n colours that can be told apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if n <= len(COLOURS):
        return list(COLOURS[:n])
    return [to_hex(colormaps["viridis"](i / n)) for i in range(n)]


def new_figure(size: tuple[float, float], dpi: int = 150, layout: str = "constrained") -> Figure:
    """Return an empty figure of `size` inches."""
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the whole process

    return Figure(figsize=size, dpi=dpi, layout=layout)  # type: ignore[arg-type]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
