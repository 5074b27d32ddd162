"""What an evaluation found: the report and its files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..split import SplitName
from ..usae import Matrix
from .records import LatentRecord, PairRecord, finite
from .universality import CATEGORIES, Category

__all__ = ["LatentRecord", "PairRecord", "UniversalityReport"]

SCHEMA = 1
N_TOP = 10
"""Latents that `metrics.json` lists."""


@dataclass(frozen=True)
class UniversalityReport:
    """What the models represent in common, on held-out rows.

    Attributes:
        sites: all sites of the USAE; `class_sites` the one per model that the classes are about.
        r2: {source: {target: R²}} on held-out rows; `r2_train` on training rows;
            `r2_global_mean` about one scalar mean.
        counts: latents per class; they sum to the number of latents.
        n_split: latents marked as split.
        n_rows_train, n_rows_eval: rows behind `r2_train` and everything else.
        latents: one record per latent, by number.
        factors: names of what is known about the images (their annotations); empty when nothing is.
        n_values: values of those factors that latents were compared with.
        auroc: AUROC in every class site from which on a latent counts as following a value.
        measured_on: the rows that are called held-out above: "holdout", or "validation" where a choice is being made.
    """

    sites: tuple[str, ...]
    class_sites: tuple[str, ...]
    r2: Matrix
    r2_train: Matrix
    r2_global_mean: Matrix
    counts: dict[str, int]
    n_split: int
    n_rows_train: int
    n_rows_eval: int
    latents: list[LatentRecord]
    factors: tuple[str, ...] = ()
    n_values: int = 0
    auroc: float = 0.9
    measured_on: SplitName = "holdout"

    @property
    def universal(self) -> list[LatentRecord]:
        """The universal latents, most energy first."""
        return self._by_energy("universal")

    @property
    def following(self) -> list[LatentRecord]:
        """The latents that fire in every class site and follow one value in all of them, most energy first."""
        found = [
            record
            for record in self.latents
            if record.follows
            and set(record.fires_in) == set(self.class_sites)
            and min(record.follows.auroc.values()) >= self.auroc
        ]
        return sorted(found, key=lambda record: -record.total_energy)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `metrics.json`; what is not a number there is null.

        `entropy_histogram` is over the latents that are neither rare nor dead. `top_latents` are the universal ones by
        energy, after them the partial ones.
        """
        top = (self.universal + self._by_energy("partial"))[:N_TOP]
        factors = {
            "names": list(self.factors),
            "n_values": self.n_values,
            "auroc": self.auroc,
            "n_following": len(self.following),
        }
        return {
            "schema": SCHEMA,
            "sites": list(self.sites),
            "class_sites": list(self.class_sites),
            "r2": _jsonable(self.r2),
            "r2_train": _jsonable(self.r2_train),
            "r2_global_mean": _jsonable(self.r2_global_mean),
            "counts": self.counts,
            "n_split": self.n_split,
            "n_latents": len(self.latents),
            "n_rows_train": self.n_rows_train,
            "n_rows_eval": self.n_rows_eval,
            "measured_on": self.measured_on,
            "entropy_histogram": _entropy_histogram(self.latents),
            "top_latents": [record.to_dict(self.class_sites) for record in top],
            "factors": factors if self.factors else None,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """Return the latent table, a row per latent (the content of `latents.csv`)."""
        text = io.StringIO()
        rows = [record.to_row(self.class_sites) for record in self.latents]
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["latent"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.counts[name]} {name}" for name in CATEGORIES)
        kind = "held-out" if self.measured_on == "holdout" else self.measured_on
        return f"UniversalityReport({len(self.latents)} latents: {counts}; {self.n_rows_eval} {kind} rows)"

    def _by_energy(self, category: Category) -> list[LatentRecord]:
        found = [record for record in self.latents if record.category == category]
        return sorted(found, key=lambda record: -record.total_energy)


def _entropy_histogram(latents: list[LatentRecord]) -> dict[str, list[float] | list[int]]:
    """Count firing entropies in tenths, 1 in the last; NaN and latents that hardly fire are left out."""
    edges = [i / 10 for i in range(11)]
    counted = [r for r in latents if r.category not in ("rare", "dead") and finite(r.entropy) is not None]
    universal = [r.entropy for r in counted if r.category == "universal"]
    others = [r.entropy for r in counted if r.category != "universal"]
    # Clipped: the sum of many logarithms can exceed 1 by rounding.
    bins = {
        name: np.histogram(np.clip(values, 0, 1), edges)[0].tolist()
        for name, values in (("universal", universal), ("others", others))
    }
    return {"edges": edges, **bins}


def _jsonable(matrix: Matrix) -> dict[str, dict[str, float | None]]:
    return {s: {t: finite(v) for t, v in row.items()} for s, row in matrix.items()}
