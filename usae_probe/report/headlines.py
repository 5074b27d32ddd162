"""The figures that come first, each with what it is to be compared with; from `metrics.json`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any, NamedTuple

from ..sites import model_of
from .evidence import said_of_nulls, seeds
from .r2_table import finite, short

Metrics = Mapping[str, Any]
_MOST_SITES = 3  # of which each has a number of its own


class Headline(NamedTuple):
    """A figure.

    Attributes:
        value: as it is spelled.
        what: what it is of.
        beside: what it is to be compared with, each in a few words.
    """

    value: str
    what: str
    beside: list[str]


def headlines(metrics: Metrics) -> list[Headline]:
    """Return the universal latents, R² (of many models the best and the worst), and `beyond`."""
    sites = metrics["class_sites"]
    shared = [_universal(metrics)] if len(sites) > 1 else []
    return [*shared, *(_r2(metrics, a, b) for a, b in _pairs(metrics)), *beyond(metrics)]


def beyond(metrics: Metrics) -> list[Headline]:
    """Return what else is known: what is alike without a USAE, the alignment tax, fidelity in the live models."""
    return [found for found in (_alike(metrics), _tax(metrics), _fidelity(metrics)) if found]


def n_live(metrics: Metrics) -> int:
    """Return how many latents are neither rare nor dead."""
    live: int = metrics["n_latents"] - metrics["counts"]["dead"] - metrics["counts"]["rare"]
    return live


def _pairs(metrics: Metrics) -> list[tuple[str, str]]:
    """Return source and target of the R² to show: both ways of two models, else the highest and the lowest."""
    sites, r2 = metrics["class_sites"], metrics["r2"]
    cross = [(a, b) for a, b in permutations(sites, 2) if finite(r2[a][b])]
    if len(cross) > 2:
        cross.sort(key=lambda pair: -r2[pair[0]][pair[1]])
        return [cross[0], cross[-1]]
    return cross or [(site, site) for site in sites if finite(r2[site][site])][:2]


def _universal(metrics: Metrics) -> Headline:
    spread = [text] if (text := seeds(metrics)) else []
    what = f"universal latents, of {n_live(metrics):,} live ones"
    return Headline(f"{metrics['counts']['universal']:,}", what, [*spread, *said_of_nulls(metrics)])


def _r2(metrics: Metrics, source: str, target: str) -> Headline:
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
    return Headline(short(metrics["r2"][source][target]), what, beside)


def _alike(metrics: Metrics) -> Headline | None:
    rows = [row for row in metrics.get("platonic") or [] if finite(row.get("cka"))]
    if not rows:
        return None
    most = max(rows, key=lambda row: row["cka"])
    null, nearest_null = (
        f"shuffled {short(most[key])}" if finite(most[key]) else "" for key in ("cka_null", "mutual_knn_null")
    )
    nearest = [f"mutual k-NN {short(most['mutual_knn'])}", nearest_null] if finite(most["mutual_knn"]) else []
    what = f"CKA of {most['source']} and {most['target']}, without a USAE"
    return Headline(short(most["cka"]), what, [part for part in (null, ", ".join(filter(None, nearest))) if part])


def _tax(metrics: Metrics) -> Headline | None:
    taxes = (metrics.get("alignment_tax") or {}).get("steps")
    known = {site: tax["mean"] for site, tax in (taxes or {}).items() if finite(tax["mean"])}
    if not known:
        return None
    mean = sum(known.values()) / len(known)
    beside = [f"{site} {short(value)}" for site, value in known.items()]
    if len(beside) > _MOST_SITES:
        beside = [f"{short(min(known.values()))} to {short(max(known.values()))} over {len(known)} sites"]
    return Headline(short(mean), "alignment tax: R² that independent SAEs of as many steps have more", beside)


def _fidelity(metrics: Metrics) -> Headline | None:
    found = metrics.get("fidelity")
    if not found:
        return None
    share_of = found["share_recovered"]
    known = [(share, a, b) for a, b in _pairs(metrics) if finite(share := share_of.get(a, {}).get(b))]
    if not known:
        return None
    share, source, target = max(known)
    own = share_of[target][target]
    beside = [f"its own code {short(own)}"] if source != target and finite(own) else []
    what = f"of {model_of(target)}'s output recovered with {source}'s code in the place of {target}"
    return Headline(short(share), what, [*beside, "mean ablation 0"])
