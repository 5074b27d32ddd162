"""Figures of a paper beside one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .facts import Facts
from .r2_table import short


def published_facts(published: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[Facts]:
    """Return a table per paper: its R², and this run's about one scalar mean and about each dimension's mean.

    Args:
        published: entries of `[[published]]` whose settings are the run's.
        metrics: the content of `metrics.json`.
    """
    note = (
        "R² about one scalar mean, as such figures often are, gives something for predicting each dimension's mean; R² "
        "about each dimension's mean does not. Compare trends, not digits: images, weights and holdout are other ones."
    )
    return [
        Facts(f"Published: {each['source']}", ["held out", "published", "ours, scalar mean", "ours"], rows, [note])
        for each in published
        if (rows := list(_rows(each, metrics)))
    ]


def _rows(published: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[list[str]]:
    for source, row in published["r2"].items():
        for target, value in row.items():
            what = f"{source} of itself" if source == target else f"{source} → {target}"
            own = [(metrics.get(key) or {}).get(source, {}).get(target) for key in ("r2_global_mean", "r2")]
            yield [what, f"{value:.3f}".lstrip("0"), *map(short, own)]
    for site, value in published["independent_r2"].items():
        found = ((metrics.get("independent_r2") or {}).get("steps") or {}).get(site)
        yield [f"independent SAE, {site}", f"{value:.3f}".lstrip("0"), "–", short(found["mean"] if found else None)]
