"""The page itself: a template, its style and its script, and the data that the script works on."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...files import write_text
from ...probes.cam import RULE
from ..facts import Facts
from ..style import CLASS_COLOURS, GREY, cycle
from .cards import data_uri
from .overview import Overview

MOST_BYTES = 30_000_000
_DUBLIN_CORE = "http://purl.org/dc/elements/1.1/"


class _Figure(NamedTuple):
    name: str
    src: str
    alt: str


@dataclass(frozen=True)
class Explorer:
    """What a page shows.

    Attributes:
        title: of the document: the run's name.
        overview: what stands above the latents.
        metrics: the content of `metrics.json`, which the page holds.
        latents: columns of `latents.csv`: what every latent has there, as text; the page holds them as numbers.
        cards: what `card_data` returned, in the order of the gallery.
        figures: PNGs with an SVG beside them, or alone.
        scan: words and figures of a scan; None where there is none.
        about: what was run: models, images, settings, versions.
    """

    title: str
    overview: Overview
    metrics: Mapping[str, Any]
    latents: Mapping[str, Sequence[str]]
    cards: Sequence[Mapping[str, Any]]
    figures: Sequence[Path] = ()
    scan: tuple[list[str], list[Facts], list[Path]] | None = None
    about: list[Facts] = field(default_factory=list)


def write_explorer(page: Explorer, path: Path, most_bytes: int = MOST_BYTES) -> int:
    """Write the page; as many of the cards, from the first, as it can hold without growing beyond `most_bytes`.

    Returns:
        How many cards it holds.
    """
    cards = {int(card["latent"]): json_block(card) for card in page.cards}
    shown = _shown(page)
    rest = len(_rendered(shown, {}).encode())
    held: dict[int, Markup] = {}
    for latent, text in cards.items():
        rest += len(text.encode()) + 100  # with its tag, and its number in the list of cards
        if rest > most_bytes:
            break
        held[latent] = text
    write_text(path, _rendered(shown, held))
    return len(held)


def json_block(data: Any) -> Markup:
    """Return JSON that can stand inside a script element: no sign in it begins a tag or a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _shown(page: Explorer) -> dict[str, Any]:
    """Return all that the template shows, the cards aside."""
    script = _part("explorer.js")
    sites = list(page.metrics["class_sites"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scan = None
    if page.scan:
        said, facts, figures = page.scan
        scan = {"said": said, "facts": facts, "figures": [_figure(path) for path in figures]}
    return {
        "page": page,
        "o": page.overview,
        "figures": [_figure(path) for path in page.figures],
        "scan": scan,
        "rule": RULE,
        "thresholds": page.metrics.get("thresholds") or {},
        "pictured": any(card["pictures"] for card in page.cards),
        "settings": {
            "class_sites": sites,
            "colours": dict(zip(sites, cycle(len(sites)), strict=True)),
            "classes": {name: CLASS_COLOURS.get(name, GREY) for name in page.metrics["counts"]},
            "auroc": (page.metrics.get("factors") or {}).get("auroc"),
        },
        "metrics": json_block(page.metrics),
        "latents": json_block({name: [_value(cell) for cell in column] for name, column in page.latents.items()}),
        "style": Markup(_part("explorer.css")),
        "script": Markup(script),
        "csp": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    }


def _rendered(shown: Mapping[str, Any], cards: Mapping[int, Markup]) -> str:
    settings = json_block(shown["settings"] | {"cards": list(cards)})
    text: str = _template().render({**shown, "cards": cards, "settings": settings})
    return text


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("usae_probe.report.explorer", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


@cache
def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _value(cell: str) -> str | int | float | None:
    """Return a cell of `latents.csv` as the number it spells; None where it is empty."""
    if cell == "":
        return None
    if re.fullmatch(r"-?\d+", cell):
        return int(cell)
    return float(cell) if re.fullmatch(r"-?\d*\.?\d+(e[+-]?\d+)?", cell) else cell


def _figure(path: Path) -> _Figure:
    """Put a figure into the text: the SVG where there is one, with title and caption as what it says in words."""
    vector = path.with_suffix(".svg")
    if not vector.is_file():
        return _Figure(path.stem, data_uri("png", path.read_bytes()), f"figure {path.stem}")
    whole = ElementTree.fromstring(vector.read_text(encoding="utf-8"))
    found = [whole.find(f".//{{{_DUBLIN_CORE}}}{name}") for name in ("title", "description")]
    said = ". ".join(element.text for element in found if element is not None and element.text)
    return _Figure(path.stem, data_uri("svg+xml", vector.read_bytes()), said or path.stem)
