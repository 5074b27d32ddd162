"""What stands above the latents on the page: the answer, figures beside their controls, tables; from `metrics.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations
from typing import Any, NamedTuple

from ...sites import model_of
from ..evidence import evidence, said_of_nulls, seeds
from ..facts import Facts
from ..r2_table import RAMP, finite, short
from ..style import CLASS_COLOURS, GREY
from ..summary import answer, model_names, pictures_said, setting
from ..tables import MEANING

Metrics = Mapping[str, Any]
_MOST_TILES = 8


class Tile(NamedTuple):
    """A headline figure.

    Attributes:
        value: as it is spelled.
        what: what it is of.
        beside: what it is to be compared with, a line each.
    """

    value: str
    what: str
    beside: list[str]


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
    tiles: list[Tile]
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
        tiles=_tiles(metrics),
        sites=sites,
        r2=[[_cell(metrics, source, target) for target in sites] for source in sites],
        n_rows=(metrics["n_rows_eval"], metrics["n_rows_train"]),
        bars=_bars(metrics["counts"]),
        bins=_bins(metrics.get("entropy_histogram")),
        facts=evidence(metrics),
        pictures=pictures_said(about["cam"]) if about.get("cam") else "",
    )


def _tiles(metrics: Metrics) -> list[Tile]:
    sites = list(metrics["class_sites"])
    tiles = []
    if len(sites) > 1:
        beside = said_of_nulls(metrics)
        spread = seeds(metrics)
        live = metrics["n_latents"] - metrics["counts"]["dead"] - metrics["counts"]["rare"]
        tiles.append(
            Tile(
                f"{metrics['counts']['universal']:,}",
                f"universal latents, of {live:,} live ones",
                [spread, *beside] if spread else beside,
            )
        )
    cross = [(a, b) for a, b in permutations(sites, 2) if finite(metrics["r2"][a][b])] or [(s, s) for s in sites]
    if len(cross) > 2:
        cross.sort(key=lambda pair: -metrics["r2"][pair[0]][pair[1]])
        cross = [cross[0], cross[-1]]
    tiles += [_r2_tile(metrics, a, b) for a, b in cross]
    tiles += [tile for tile in (_alike_tile(metrics), _tax_tile(metrics), _fidelity_tile(metrics, cross)) if tile]
    return tiles[:_MOST_TILES]


def _r2_tile(metrics: Metrics, source: str, target: str) -> Tile:
    beside = []
    ends = (metrics.get("r2_interval") or {}).get(source, {}).get(target)
    if ends and finite(ends[0]) and finite(ends[1]):
        beside.append(f"95 % [{short(ends[0])}, {short(ends[1])}]")
    linear = (metrics.get("r2_ridge") or {}).get(source, {}).get(target)
    if finite(linear):
        beside.append(f"a linear map {short(linear)}")
    own = metrics["r2"][target][target]
    if source != target and finite(own):
        beside.append(f"its own code {short(own)}")
    what = f"R² of {target} from {source}'s code" if source != target else f"R² of {target} from its own code"
    return Tile(short(metrics["r2"][source][target]), what, beside)


def _alike_tile(metrics: Metrics) -> Tile | None:
    rows = [row for row in metrics.get("platonic") or [] if finite(row.get("cka"))]
    if not rows:
        return None
    most = max(rows, key=lambda row: row["cka"])
    null = f"shuffled {short(most['cka_null'])}" if finite(most["cka_null"]) else ""
    nearest = f"mutual k-NN {short(most['mutual_knn'])}" if finite(most["mutual_knn"]) else ""
    what = f"CKA of {most['source']} and {most['target']}, without a USAE"
    return Tile(short(most["cka"]), what, [part for part in (null, nearest) if part])


def _tax_tile(metrics: Metrics) -> Tile | None:
    taxes = (metrics.get("alignment_tax") or {}).get("steps")
    known = {site: tax["mean"] for site, tax in (taxes or {}).items() if finite(tax["mean"])}
    if not known:
        return None
    mean = sum(known.values()) / len(known)
    beside = [f"{site} {short(value)}" for site, value in known.items()]
    return Tile(short(mean), "alignment tax in R²: an independent SAE of as many steps explains so much more", beside)


def _fidelity_tile(metrics: Metrics, cross: Sequence[tuple[str, str]]) -> Tile | None:
    found = metrics.get("fidelity")
    shares = [found["share_recovered"].get(a, {}).get(b) for a, b in cross] if found else []
    known = [(share, pair) for share, pair in zip(shares, cross, strict=True) if finite(share)] if shares else []
    if not found or not known:
        return None
    share, (source, target) = max(known)
    own = found["share_recovered"][target][target]
    beside = [f"its own code {short(own)}"] if source != target and finite(own) else []
    return Tile(
        short(share),
        f"of {model_of(target)}'s output recovered with {source}'s code in the place of {target}",
        [*beside, "mean ablation 0"],
    )


def _cell(metrics: Metrics, source: str, target: str) -> Cell:
    value, training = metrics["r2"][source][target], metrics["r2_train"][source][target]
    if not finite(value):
        return Cell("–", short(training), "transparent", "inherit")
    ground, ink, _ = RAMP[min(max(int(value * len(RAMP)), 0), len(RAMP) - 1)]
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
