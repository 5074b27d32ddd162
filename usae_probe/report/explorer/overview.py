"""What stands above the latents on the page: the answer, figures beside their controls, tables; from `metrics.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..evidence import evidence
from ..facts import Facts
from ..headlines import Headline, headlines
from ..published import published_facts
from ..r2_table import finite, ramp, short
from ..style import CLASS_COLOURS, GREY
from ..summary import answer, model_names, pictures_said, setting
from ..tables import MEANING

Metrics = Mapping[str, Any]


class Cell(NamedTuple):
    """A cell of the R² matrix: held-out R², what stands below it, and its colours."""

    value: str
    below: str
    ground: str
    ink: str


class Bar(NamedTuple):
    """A class of latents: how many, what that is, and its share of the longest bar."""

    name: str
    n: int
    meaning: str
    share: float
    colour: str


class Bin(NamedTuple):
    """A bar of the histogram of firing entropy; heights are shares of the highest."""

    low: float
    high: float
    universal: int
    others: int
    universal_height: float
    others_height: float


class Overview(NamedTuple):
    """All that stands above the latents.

    Attributes:
        question, sharing, explained: the question, and two sentences that answer it.
        setting: of how many images, sites and latents, in parts.
        tiles: headline figures.
        sites: of the R² matrix, rows and columns; `r2` its cells; `n_rows` held out, training.
        bars: the classes.
        bins: the histogram of firing entropy; empty without one.
        facts: tables.
        pictures: what became of CAM pictures; may be empty.
    """

    question: str
    sharing: str
    explained: str
    setting: list[str]
    tiles: list[Headline]
    sites: list[str]
    r2: list[list[Cell]]
    n_rows: tuple[int, int]
    bars: list[Bar]
    bins: list[Bin]
    facts: list[Facts]
    pictures: str


def overview(about: Mapping[str, Any], metrics: Metrics) -> Overview:
    """Put together what stands above the latents.

    Args:
        about: what was compared, as of `run_summary`.
        metrics: the content of `metrics.json`.
    """
    sharing, explained = answer(about, metrics)
    names = model_names(about)
    alone = f"What does {names[0]} represent?"
    several = f"What do {', '.join(names[:-1])} and {names[-1]} represent in common?"
    sites = list(metrics["sites"])
    return Overview(
        question=alone if len(names) == 1 else several,
        sharing=sharing,
        explained=explained,
        setting=[part for line in setting(about, metrics).split("\n") for part in line.split(" · ")],
        tiles=headlines(metrics),
        sites=sites,
        r2=[[_cell(metrics, source, target) for target in sites] for source in sites],
        n_rows=(metrics["n_rows_eval"], metrics["n_rows_train"]),
        bars=_bars(metrics["counts"]),
        bins=_bins(metrics.get("entropy_histogram")),
        facts=[*evidence(metrics), *published_facts(about.get("published", ()), metrics)],
        pictures=pictures_said(about["cam"]) if about.get("cam") else "",
    )


def _cell(metrics: Metrics, source: str, target: str) -> Cell:
    value, training = metrics["r2"][source][target], metrics["r2_train"][source][target]
    if not finite(value):
        return Cell("–", short(training), "transparent", "inherit")
    ground, ink, _ = ramp(value)
    return Cell(short(value), short(training), ground, ink)


def _bars(counts: Mapping[str, int]) -> list[Bar]:
    most = max([*counts.values(), 1])
    return [Bar(name, n, MEANING.get(name, ""), n / most, CLASS_COLOURS.get(name, GREY)) for name, n in counts.items()]


def _bins(histogram: Mapping[str, Sequence[Any]] | None) -> list[Bin]:
    if not histogram:
        return []
    universal, others = histogram["universal"], histogram["others"]
    most = max([a + b for a, b in zip(universal, others, strict=True)], default=0)
    if not most:
        return []
    return [
        Bin(low, high, a, b, a / most, b / most)
        for (low, high), a, b in zip(pairwise(histogram["edges"]), universal, others, strict=True)
    ]
