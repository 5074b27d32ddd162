"""One style for all figures: colours that colour-blind readers can tell apart, names and captions that fit."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe–Ito."""
GREY = "#999999"
CLASS_COLOURS = {"universal": COLOURS[0], "partial": COLOURS[4], "chance": GREY, "specific": COLOURS[2]}
WIDE = 9.0
"""Inches: the widest figure of an evaluation. At 1000 pixels its smallest print is still some 10 pixels high."""
DPI = 150
CAPTION = 8.0
_LONG_NAME = 22
_LINE = 36


def cycle(n: int) -> list[str]:
    """Return n colours that can be told apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if n <= len(COLOURS):
        return list(COLOURS[:n])
    return [to_hex(colormaps["viridis"](i / n)) for i in range(n)]


def new_figure(size: tuple[float, float], dpi: int = DPI, layout: str = "constrained") -> Figure:
    """Return an empty figure of `size` inches."""
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the whole process

    return Figure(figsize=size, dpi=dpi, layout=layout)  # type: ignore[arg-type]


def save(figure: Figure, path: Path, *, vector: bool = True) -> None:
    """Write a figure as PNG, atomically, and beside it as SVG unless it is all pictures; title and caption go with it.

    Each is drawn once, where `savefig` draws twice: there are figures of 400 cells.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    title = figure.get_suptitle() or str(figure.get_label())
    texts = {"Title": title, "Description": figure.get_supxlabel()}
    said = {key: " ".join(text.replace(r"\$", "$").split()) for key, text in texts.items() if text}
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata=said)  # type: ignore[no-untyped-call]
    if vector:
        # The same figure is the same bytes: no date, and names of its parts that are not drawn by chance.
        with rc_context({"svg.hashsalt": "usae-probe"}), replacing(path.with_suffix(".svg")) as temporary:
            canvas = FigureCanvasSVG(figure)
            canvas.print_svg(str(temporary), metadata={**said, "Date": None})  # type: ignore[no-untyped-call]


def remove(path: Path) -> None:
    """Remove what `save` wrote, if it is there."""
    for suffix in (".png", ".svg"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def captioned(width: float, height: float, title: str, caption: str) -> Figure:
    """Return an empty figure with a title above and, below, a caption that says what is drawn and of how much.

    Args:
        width: inches.
        height: inches, for what is between title and caption.
        title: one line.
        caption: any length; it is broken into lines.
    """
    lines = _wrapped(caption, width - 0.25)
    figure = new_figure((width, height + 0.35 + 0.165 * len(lines) + 0.1))
    figure.suptitle(plain(title), fontsize=11)
    _caption(figure, lines, width)
    return figure


def add_caption(figure: Figure, caption: str) -> None:
    """Make a figure higher by a caption below all that is in it."""
    width, height = figure.get_size_inches()
    lines = _wrapped(caption, width - 0.25)
    figure.set_size_inches(width, height + 0.165 * len(lines) + 0.05)
    _caption(figure, lines, width)


def _caption(figure: Figure, lines: list[str], width: float) -> None:
    figure.supxlabel(plain("\n".join(lines)), x=0.1 / width, ha="left", fontsize=CAPTION, color="0.25")


def _wrapped(caption: str, width: float) -> list[str]:
    """Break a caption into lines of at most `width` inches; no line ends at a sign like = or −."""
    for sign in "=−≥<":
        caption = caption.replace(f" {sign} ", f"\xa0{sign}\xa0")
    lines: list[str] = []
    for word in caption.split(" "):
        if lines and text_width(f"{lines[-1]} {word}", CAPTION) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Return how wide a text is, in inches, of its widest line; `size` in points."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    font.set_size(size, DPI)
    widths = []
    for line in text.split("\n"):
        font.set_text(line)
        widths.append(float(font.get_width_height()[0]) / 64 / DPI)
    return max(widths)


def plain(text: str) -> str:
    r"""Return a text of which nothing is read as a formula.

    >>> plain("a$b$")
    'a\\$b\\$'
    """
    return text.replace("$", r"\$")


def folded(name: str, line: int = _LINE) -> str:
    r"""Break a name into lines: that of a site after its model, others at blanks, or else after a sign.

    >>> folded("vit/blocks.8@mean")
    'vit/blocks.8@mean'
    >>> folded("vit_small_patch14_dinov2.lvd142m/blocks.10@mean")
    'vit_small_patch14_dinov2.lvd142m/\nblocks.10@mean'
    >>> folded("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k/norm")
    'swin_tiny_patch4_window7_224.\nms_in22k_ft_in1k/\nnorm'
    """
    if len(name) <= _LONG_NAME:
        return plain(name)
    model, slash, layer = name.partition("/")
    rest = [layer, model + slash] if slash and " " not in name else [name]
    lines = []
    while rest:
        part = rest.pop()
        if len(part) > line:
            at = (
                part.rfind(" ", line // 2, line + 1) + 1 or max(part.rfind(sign, 1, line) for sign in " /.") + 1 or line
            )
            rest.append(part[at:])
            part = part[:at]
        lines.append(part.strip())
    return plain("\n".join(lines))


def shortened(name: str, room: int) -> str:
    """Leave out the middle of a name that is too long.

    >>> shortened("vit/blocks.8@mean", 9)
    'vit/…mean'
    """
    return name if len(name) <= room else f"{name[: room // 2]}…{name[len(name) - (room - room // 2 - 1) :]}"


def number(value: float, digits: int = 3) -> str:
    """Spell a number with a real minus; – where there is none.

    >>> number(0.5), number(-0.07, 2), number(-0.0001), number(-1234.5), number(float("nan"))
    ('0.500', '−0.07', '0.000', '−1234', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:z.{digits if abs(value) < 99.5 else 0}f}".replace("-", "−")


def short(value: float, digits: int = 2) -> str:
    """Spell a number without its leading zero.

    >>> short(0.5), short(-0.07), short(1.0), short(12.3)
    ('.50', '−.07', '1.00', '12.30')
    """
    text = number(value, digits)
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("−").startswith("0.") else text


def percent(share: float) -> str:
    """Spell a share in percent.

    >>> percent(0.5), percent(0.0123), percent(0.00004), percent(0.0), percent(float("nan"))
    ('50 %', '1.2 %', '<0.1 %', '0 %', '–')
    """
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{number(100 * share, 1 if 0 < abs(share) < 0.0995 else 0)} %"
