"""What an evaluation found: the report, its latents, and their files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..usae import Matrix
from .firing import Pair
from .universality import CATEGORIES, Category

SCHEMA = 1


class PairRecord(NamedTuple):
    """Co-firing of one latent in one pair of sites; see `CoFiring`. q is over the latents firing in both."""

    cofires: int
    jaccard: float
    lift: float
    phi: float
    p: float
    q: float


@dataclass(frozen=True)
class LatentRecord:
    """One latent.

    Attributes:
        latent: its number.
        category: its class.
        split: marked as one of two one-model latents with equal decoder rows.
        fires_in: class sites it counts as firing in.
        entropy: firing entropy over the class sites; NaN when it never fires there.
        q: of the universality test (maximum p over pairs).
        fires, rate, mean, maximum, energy, decoder_norm: by site; energy is E|z_k| ‖W_dec,k‖, decoder_norm the site's
            share of the sum of ‖W_dec,k‖ over sites.
        pairs: co-firing by pair of class sites.
    """

    latent: int
    category: Category
    split: bool
    fires_in: tuple[str, ...]
    entropy: float
    q: float
    fires: dict[str, int]
    rate: dict[str, float]
    mean: dict[str, float]
    maximum: dict[str, float]
    energy: dict[str, float]
    decoder_norm: dict[str, float]
    pairs: dict[Pair, PairRecord]

    @property
    def total_energy(self) -> float:
        """Energy summed over sites."""
        return sum(self.energy.values())


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

    @property
    def universal(self) -> list[LatentRecord]:
        """The universal latents, most energy first."""
        found = [record for record in self.latents if record.category == "universal"]
        return sorted(found, key=lambda record: -record.total_energy)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `metrics.json`; what is not a number there is null."""
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
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """Return the latent table, a row per latent (the content of `latents.csv`)."""
        text = io.StringIO()
        rows = list(self._csv_rows())
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["latent"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.counts[name]} {name}" for name in CATEGORIES)
        return f"UniversalityReport({len(self.latents)} latents: {counts}; {self.n_rows_eval} held-out rows)"

    def _csv_rows(self) -> Iterator[dict[str, Any]]:
        for record in self.latents:
            row: dict[str, Any] = {
                "latent": record.latent,
                "category": record.category,
                "split": int(record.split),
                "fires_in": " ".join(record.fires_in),
                "entropy": _cell(record.entropy),
                "q": _cell(record.q),
                "total_energy": _cell(record.total_energy),
            }
            for name in ("fires", "rate", "mean", "maximum", "energy", "decoder_norm"):
                row |= {f"{name}[{site}]": _cell(value) for site, value in getattr(record, name).items()}
            for (a, b), pair in record.pairs.items():
                row |= {f"{name}[{a}|{b}]": _cell(value) for name, value in pair._asdict().items()}
            yield row


def _cell(value: float | int) -> str | int:
    if isinstance(value, int):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def _jsonable(matrix: Matrix) -> dict[str, dict[str, float | None]]:
    return {s: {t: v if math.isfinite(v) else None for t, v in row.items()} for s, row in matrix.items()}
