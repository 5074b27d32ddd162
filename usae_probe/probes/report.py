"""What an evaluation found: the report and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from ..files import csv_text
from ..notebook import html_facts, html_table
from ..split import SplitName, spoken
from ..usae import Matrix
from .controls import Controls
from .fidelity import Fidelity
from .intervals import Interval
from .linear import LinearReference
from .nulls import NullCounts
from .reconstruction import QUANTILES, share_of
from .records import LatentRecord, PairRecord, finite, jsonable
from .similarity import Similarity
from .universality import CATEGORIES, Category

__all__ = ["LabelFacts", "LatentRecord", "PairRecord", "UniversalityReport"]

SCHEMA = 1
N_TOP = 10
"""Latents that `metrics.json` lists."""


class LabelFacts(NamedTuple):
    """What is known of all latents and the labels of the images.

    Attributes:
        bound: the largest AUROC, of any latent in all class sites for any value, with labels permuted over images.
        permutations: of how many.
        agreement: share of the universal latents whose best value is the same in all class sites.
        agreement_chance: the same share if the best values were paired at random; n_agreement: of how many latents.
    """

    bound: float
    permutations: int
    agreement: float
    agreement_chance: float
    n_agreement: int

    def to_dict(self) -> dict[str, Any]:
        """Return it for `metrics.json`."""
        return {key: jsonable(value) for key, value in self._asdict().items()}


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
        thresholds: `entropy`, `phi` and `q` of a universal latent.
        r2_interval: {source: {target: 95 % interval over images}}; `r2_quantiles` of R² over the target's dimensions.
        linear: R² of ridge regression between sites; `similarity` what needs no USAE.
        nulls: counts of the classes with images paired at random: any, then those with equal labels.
        labels: what is known of all latents and labels; None without labels.
        fidelity: what the reconstructions do in the live models; None where it was not asked for.
        controls: what was trained beside the USAE; None where it was not asked for.
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
    thresholds: Mapping[str, float] = field(default_factory=dict)
    r2_interval: dict[str, dict[str, Interval]] | None = None
    r2_quantiles: dict[str, dict[str, list[float]]] | None = None
    linear: LinearReference | None = None
    similarity: Similarity | None = None
    nulls: tuple[NullCounts, ...] = ()
    labels: LabelFacts | None = None
    fidelity: Fidelity | None = None
    controls: Controls | None = None

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

    @property
    def n_live(self) -> int:
        """Latents that are neither rare nor dead."""
        return len(self.latents) - self.counts["rare"] - self.counts["dead"]

    @property
    def n_equal_rates(self) -> int:
        """Latents that firing entropy alone would call universal: live ones at or above its threshold."""
        least = self.thresholds.get("entropy", 0.9)
        return sum(record.entropy >= least for record in self.latents if record.category not in ("rare", "dead"))

    @property
    def universal_energy(self) -> dict[str, float]:
        """Share of a class site's energy that is in universal latents."""
        shares = {}
        for site in self.class_sites:
            total = sum(record.energy[site] for record in self.latents)
            shared = sum(record.energy[site] for record in self.latents if record.category == "universal")
            shares[site] = shared / total if total > 0 else float("nan")
        return shares

    @property
    def r2_share(self) -> Matrix | None:
        """Cross-R² as a share of the linear reference's."""
        return share_of(self.r2, self.linear.r2) if self.linear else None

    @property
    def platonic(self) -> list[dict[str, Any]]:
        """Every ordered pair of class sites: what is alike without a USAE, beside what the USAE shares.

        `cka`, `mutual_knn` with the largest value of shuffled pairings; `r2` of the source's code decoded to the
        target, ridge regression's and the share of it; share of the target's energy in universal latents.
        """
        share, energy = self.r2_share, self.universal_energy
        rows = []
        for source, target in permutations(self.class_sites, 2):
            row: dict[str, Any] = {"source": source, "target": target}
            for name in ("cka", "cka_null", "mutual_knn", "mutual_knn_null"):
                row[name] = finite(getattr(self.similarity, name)[source][target]) if self.similarity else None
            row["r2"] = finite(self.r2[source][target])
            row["r2_ridge"] = finite(self.linear.r2[source][target]) if self.linear else None
            row["r2_share"] = finite(share[source][target]) if share else None
            row["universal_energy"] = finite(energy[target])
            rows.append(row)
        return rows

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
            "r2": jsonable(self.r2),
            "r2_train": jsonable(self.r2_train),
            "r2_global_mean": jsonable(self.r2_global_mean),
            "counts": self.counts,
            "n_split": self.n_split,
            "n_latents": len(self.latents),
            "n_rows_train": self.n_rows_train,
            "n_rows_eval": self.n_rows_eval,
            "measured_on": self.measured_on,
            "entropy_histogram": _entropy_histogram(self.latents),
            "top_latents": [record.to_dict(self.class_sites) for record in top],
            "factors": factors if self.factors else None,
            "thresholds": dict(self.thresholds),
            "n_live": self.n_live,
            "n_equal_rates": self.n_equal_rates,
            "n_positional": sum(record.positional for record in self.latents),
            "r2_interval": jsonable(self.r2_interval),
            "r2_quantiles": self.r2_quantiles and {"levels": list(QUANTILES), **jsonable(self.r2_quantiles)},
            "r2_ridge": jsonable(self.linear.r2) if self.linear else None,
            "r2_share": jsonable(self.r2_share) if self.r2_share else None,
            "similarity": jsonable(self.similarity._asdict()) if self.similarity else None,
            "nulls": [null.to_dict() for null in self.nulls],
            "universal_energy": {site: finite(share) for site, share in self.universal_energy.items()},
            "platonic": self.platonic,
            "labels": self.labels.to_dict() if self.labels else None,
            "fidelity": self.fidelity.to_dict() if self.fidelity else None,
            **(self.controls.to_dict() if self.controls else {}),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """Return the latent table, a row per latent (the content of `latents.csv`)."""
        return csv_text([record.to_row(self.class_sites) for record in self.latents], names=["latent"])

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.counts[name]} {name}" for name in CATEGORIES)
        kind = spoken(self.measured_on)
        return f"UniversalityReport({len(self.latents)} latents: {counts}; {self.n_rows_eval} {kind} rows)"

    def _repr_html_(self) -> str:
        facts = {"live": f"{self.n_live:,} of {len(self.latents):,} latents"}
        facts["measured on"] = f"{self.n_rows_eval:,} {spoken(self.measured_on)} rows"
        facts |= {
            f"universal, shuffled{f' within {null.within}' if null.within else ''}": f"{null.universal:.1f}"
            for null in self.nulls
        }
        r2 = [[source, *(f"{self.r2[source][target]:.3f}" for target in self.sites)] for source in self.sites]
        counts = html_table(["class", "latents"], [(name, f"{self.counts[name]:,}") for name in CATEGORIES])
        matrix = html_table(["R²: code of ↓ decoded to →", *self.sites], r2)
        return html_facts(f"UniversalityReport: {self.counts['universal']:,} universal latents", facts, counts, matrix)

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
