"""Tables in the terminal: facts, firing entropy, the six classes, the strongest latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..sites import model_of
from .facts import Facts
from .r2_table import finite, short

_BAR = 16
_SOLID = "not dim #56B4E9"
_MOST_SITES = 4  # with more, a latent's numbers are given as ranges over the models
MEANING = {
    "universal": "in all models, on the same images",
    "partial": "in some, or at unequal rates",
    "chance": "in several, not on the same images",
    "specific": "in one model",
    "rare": "in too few held-out images to tell",
    "dead": "in none",
}
"""Where latents of a class fire."""


def facts_table(facts: Facts) -> Group:
    """Return facts as they stand in the terminal."""
    parts: list[RenderableType] = [Text(facts.title, style="bold")] if facts.title else []
    if facts.rows:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(overflow="fold")
        room = max(10, 44 // max(len(facts.headings) - 1, 1))
        for _ in facts.headings[1:]:
            table.add_column(justify="right", no_wrap=True)
        headings = [facts.headings[0], *(_cut(heading, room) for heading in facts.headings[1:])]
        table.add_row(*(Text(heading, style="dim") for heading in headings))
        for row in facts.rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    return Group(*parts, *(Text(note, style="dim") for note in facts.notes))


def _cut(heading: str, room: int) -> str:
    """Leave out the beginning of lines that are too long: of two sites the layers tell more than the models."""
    return "\n".join(line if len(line) <= room else f"…{line[-(room - 1) :]}" for line in heading.split("\n"))


def classes_and_entropy(metrics: Mapping[str, Any], n_bins: int) -> RenderableType:
    """Return the counts of the six classes; beside them the histogram of firing entropy, in at most n bins."""
    histogram = metrics.get("entropy_histogram")
    classes = _classes(metrics)
    if not histogram or not sum(histogram["universal"]) + sum(histogram["others"]):
        return classes
    both = Table.grid(padding=(0, 2, 0, 0))
    both.add_column(no_wrap=True)
    both.add_column(overflow="fold")
    both.add_row(_entropy_bars(histogram, n_bins), classes)
    return both


def _classes(metrics: Mapping[str, Any]) -> Group:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, n in metrics["counts"].items():
        strong = "bold" if name == "universal" else ""
        table.add_row(Text(name, style=strong), Text(f"{n:,}", style=strong), Text(MEANING[name]))
    if metrics["n_split"]:
        table.add_row("└ split", f"{metrics['n_split']:,}", "specific, but two hold one concept")
    over = f"  over {', '.join(metrics['class_sites'])}"
    return Group(Text.assemble((f"{metrics['n_latents']:,} latents fire", "bold"), (over, "dim")), table)


def _entropy_bars(histogram: Mapping[str, Sequence[Any]], n_bins: int) -> Group:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(width=_BAR, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    each = -(-len(histogram["universal"]) // n_bins)
    counts = [
        [sum(histogram[k][i : i + each]) for i in range(0, len(histogram[k]), each)] for k in ("universal", "others")
    ]
    edges = [*histogram["edges"][:-1:each], histogram["edges"][-1]]
    bins = list(zip(pairwise(edges), *counts, strict=True))
    most = max(universal + others for _, universal, others in bins)
    for (low, high), universal, others in reversed(bins):
        solid = _length(universal, most)
        whole = max(_length(universal + others, most), solid + (others > 0))
        bar = Text.assemble(("█" * solid, _SOLID), "░" * (whole - solid))
        table.add_row(f"{low:.1f}–{high:.1f}", bar, f"{universal + others:,}")
    meaning = Text.assemble(
        "1: equal rates in all models\n",
        ("█", _SOLID),
        " on the same images, ░ not",
        style="dim",
    )
    return Group(Text("Firing entropy", style="bold"), table, meaning)


def _length(n: int, most: int) -> int:
    """Length of a bar; what is there is seen, and there is room for one more."""
    return max(round(n / most * (_BAR - 1)), 1) if n else 0


def strongest_latents(metrics: Mapping[str, Any], n: int) -> Group | None:
    """Return the n latents with most energy: how often they fire, on the same images, and the label that fits best.

    It is dim where the latent does not follow it.
    """
    top = metrics.get("top_latents")
    if not top:
        return None
    sites, top = metrics["class_sites"], top[:n]
    labelled = bool(metrics.get("factors")) and any(latent.get("follows") for latent in top)
    mixed = any(latent["category"] != "universal" for latent in top)
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    headings = ["latent"]
    for heading, wanted in (("class", mixed), ("fires in %", True), ("φ", len(sites) > 1), ("AUROC", labelled)):
        if wanted:
            table.add_column(justify="left" if heading == "class" else "right", no_wrap=True)
            headings.append(heading)
    if labelled:
        table.add_column(overflow="fold")
        headings.append("best label")
    table.add_row(*(Text(heading, style="dim") for heading in headings))
    least = metrics["factors"]["auroc"] if labelled else None
    for latent in top:
        table.add_row(*_row(latent, sites, mixed=mixed, least=least))
    what = "latents" if mixed else "universal latents"
    return Group(Text.assemble((f"Strongest {what}", "bold"), (_order(sites), "dim")), table, *_following(metrics))


def _row(latent: Mapping[str, Any], sites: Sequence[str], *, mixed: bool, least: float | None) -> list[Text]:
    """Return a latent's cells, in the order of the headings; with a label where the least AUROC of one is given."""
    cells = [f"{latent['latent']}"]
    if mixed:
        cells.append(latent["category"])
    cells.append(_per_site([_percent(latent["rate"].get(site)) for site in sites], latent["rate"], sites))
    if len(sites) > 1:
        cells.append(short(latent["phi"]))
    if least is None:
        return [Text(cell) for cell in cells]
    follows = latent.get("follows")
    scores = follows["auroc"] if follows else {}
    cells.append(_per_site([short(scores.get(site)) for site in sites], scores, sites) if follows else "–")
    said = f"{follows['factor']} = {follows['value']}" if follows else "–"
    followed = bool(follows) and all(finite(score) and score >= least for score in scores.values())
    return [*(Text(cell) for cell in cells), Text(said, style="" if followed else "dim")]


def _per_site(spelled: Sequence[str], values: Mapping[str, float | None], sites: Sequence[str]) -> str:
    """Return one number per site in columns, or the least and the greatest of many."""
    if len(sites) <= _MOST_SITES:
        return " ".join(f"{text:>4}" for text in spelled)
    known = sorted(
        (value, text) for site, text in zip(sites, spelled, strict=True) if finite(value := values.get(site))
    )
    return f"{known[0][1]}–{known[-1][1]}" if known else "–"


def _order(sites: Sequence[str]) -> str:
    """Say what several numbers in one cell are."""
    names = [model_of(site) for site in sites]
    names = names if len(set(names)) == len(names) else list(sites)
    if len(sites) == 1:
        return ""
    return (
        f"  numbers side by side: {', '.join(names)}" if len(sites) <= _MOST_SITES else "  least–greatest of all models"
    )


def _percent(rate: float | None) -> str:
    if not finite(rate):
        return "–"
    if rate >= 0.0995 or rate == 0:
        return f"{100 * rate:.0f}"
    return f"{100 * rate:.1f}".removeprefix("0") if rate >= 0.0005 else "<.1"


def _following(metrics: Mapping[str, Any]) -> list[Text]:
    """Say how many latents follow a label, and among how many values each had the choice."""
    factors = metrics.get("factors")
    if not factors:
        return []
    n, values = factors["n_following"], factors["n_values"]
    what = "latent follows" if n == 1 else "latents follow"
    best = f"AUROC ≥ {short(factors['auroc'])}; best of {values:,} value{'' if values == 1 else 's'}"
    return [Text(f"{n:,} {what} a label in every model ({best})", style="dim")]
