"""What a scan found: matrices over layers, the best match of each, a profile over depth, and latents followed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from scipy import stats

from ...files import csv_text
from ...sites import by_model, model_of
from ...split import SplitName, spoken
from ...usae import Matrix
from ..linear import LinearReference
from ..records import finite, jsonable
from ..similarity import Similarity
from .cells import Pair, pairs_between
from .codes import CodeMatrices, Followed

SCHEMA = 1
MEASURES = ("r2", "linear", "cka", "mutual_knn", "universal", "closest", "phi")
"""Of a cell: USAE cross-R², ridge regression's, debiased CKA, mutual k-NN, universal latents, closest ones, mean φ."""


@dataclass(frozen=True)
class ScanReport:
    """Every layer of each model against every layer of the others.

    Attributes:
        sites: model by model, in the order of depth as they were given.
        depths: {site: share of its model's blocks that are complete at it}.
        measured_on: the split whose rows were measured, `n_rows` of them; `n_rows_train` were trained on.
        similarity: CKA and mutual k-NN, with the largest of shuffled pairings.
        linear: ridge regression; None where it was not asked for, or a ring has dropped its rows.
        joint: what one USAE over all sites says; None without that strategy.
        pairs: what a USAE for each two sites says; None without that strategy.
        followed: latents of the joint USAE that all models share, strongest first.
        trained: `n_latents`, `k`, and the steps of each training.
        seconds: how long the parts took, as far as they were done now.
        floor: the same of untrained networks; None where it was not asked for.
    """

    sites: tuple[str, ...]
    depths: dict[str, float]
    measured_on: SplitName
    n_rows: int
    n_rows_train: int
    similarity: Similarity | None
    linear: LinearReference | None
    joint: CodeMatrices | None
    pairs: CodeMatrices | None
    followed: tuple[Followed, ...] = ()
    trained: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    floor: ScanReport | None = None

    @property
    def models(self) -> dict[str, list[str]]:
        """{model: its sites, in order}."""
        return by_model(self.sites)

    @property
    def cells(self) -> list[Pair]:
        """The pairs of sites that are compared: of different models (of one model alone, all of its sites)."""
        return pairs_between(self.sites)

    @property
    def codes(self) -> CodeMatrices | None:
        """What codes say: the joint USAE's matrices, or those of the pairs."""
        return self.joint or self.pairs

    def matrix(self, measure: str) -> Matrix | None:
        """Return {source: {target: value}} of one of `MEASURES`; None where it was not measured."""
        if measure == "linear":
            return self.linear.r2 if self.linear else None
        if measure in ("cka", "mutual_knn"):
            found: Matrix | None = getattr(self.similarity, measure) if self.similarity else None
            return found
        return getattr(self.codes, measure) if self.codes else None

    def best_source(self, target: str, model: str, measure: str) -> str | None:
        """Return the layer of `model` from which `target` has the largest value; of equals the first."""
        matrix = self.matrix(measure)
        if matrix is None:
            return None
        values = {s: matrix[s][target] for s in self.models[model] if s != target and math.isfinite(matrix[s][target])}
        return max(values, key=lambda site: values[site]) if values else None

    def as_good(self, source: str, target: str) -> int:
        """Return how many other layers of the source's model are not told from it: their intervals of R² overlap."""
        codes = self.codes
        if codes is None or not math.isfinite(codes.r2_low[source][target]):
            return 0
        least = codes.r2_low[source][target]
        others = [site for site in self.models[model_of(source)] if site not in (source, target)]
        return sum(codes.r2_high[site][target] >= least for site in others)

    @property
    def best_matches(self) -> list[dict[str, Any]]:
        """For each layer and each other model: the best layer there by every measure, with what it stands beside."""
        rows = []
        for model, other in self._model_pairs():
            for target in self.models[model]:
                best = {measure: self.best_source(target, other, measure) for measure in MEASURES}
                chosen = best["r2"] or best["cka"]
                if chosen is None:
                    continue
                row: dict[str, Any] = {"target": target, "model": other, "best": best, **self.cell(chosen, target)}
                rows.append({**row, "as_good": self.as_good(chosen, target)})
        return rows

    @property
    def profile(self) -> list[dict[str, Any]]:
        """For each layer: its depth, and the best that any layer of another model reaches, by measure."""
        rows = []
        for site in self.sites:
            others = [m for m in self.models if m != model_of(site)] or list(self.models)
            row: dict[str, Any] = {"site": site, "depth": self.depths[site]}
            for measure in (*MEASURES, "energy"):
                matrix = self.matrix(measure)
                values = (
                    [matrix[s][site] for m in others for s in self.models[m] if s != site and matrix is not None]
                    if matrix
                    else []
                )
                known = [value for value in values if math.isfinite(value)]
                row[measure] = max(known) if known else None
            rows.append(row)
        return rows

    @property
    def order(self) -> dict[str, float | None]:
        """Rank correlation (Spearman) of depth and the depth of the best match in another model, by measure.

        1: matches follow one another in depth; over all layers and models.
        """
        found = {}
        for measure in MEASURES:
            here, there = [], []
            for model, other in self._model_pairs():
                for target in self.models[model]:
                    if best := self.best_source(target, other, measure):
                        here.append(self.depths[target])
                        there.append(self.depths[best])
            found[measure] = rank_correlation(here, there)
        return found

    @property
    def agreement(self) -> dict[str, float | None]:
        """Rank correlation (Spearman) over the cells of each two measures, and of the two strategies' R² and counts."""
        found: dict[str, float | None] = {}
        there = [measure for measure in MEASURES if self.matrix(measure)]
        for i, one in enumerate(there):
            for other in there[i + 1 :]:
                found[f"{one} and {other}"] = self._agree(self.matrix(one), self.matrix(other))
        if self.joint and self.pairs:
            for name in ("r2", "universal", "closest", "phi"):
                found[f"{name}: joint and pairs"] = self._agree(getattr(self.joint, name), getattr(self.pairs, name))
        return found

    def cell(self, source: str, target: str) -> dict[str, Any]:
        """Return everything that is known of a cell; None where something was not measured."""
        values: dict[str, float] = {}
        if self.similarity:
            for name in ("cka", "cka_null", "mutual_knn", "mutual_knn_null"):
                values[name] = getattr(self.similarity, name)[source][target]
        if self.linear:
            values["linear"] = self.linear.r2[source][target]
        for prefix, codes in (("", self.codes), ("pairs_", self.pairs if self.joint else None)):
            for name, matrix in codes._asdict().items() if codes else ():
                values[prefix + name] = matrix[source][target]
        if self.floor:
            for name in MEASURES:
                matrix = self.floor.matrix(name)
                values[f"floor_{name}"] = matrix[source][target] if matrix else math.nan
        return {"source": source, "target": target} | {name: finite(float(value)) for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `scan.json`; what is not a number there is null."""
        return {
            "schema": SCHEMA,
            "sites": list(self.sites),
            "models": self.models,
            "depths": self.depths,
            "measured_on": self.measured_on,
            "n_rows": self.n_rows,
            "n_rows_train": self.n_rows_train,
            "trained": dict(self.trained),
            "seconds": {part: round(spent, 3) for part, spent in self.seconds.items()},
            "similarity": jsonable(self.similarity._asdict()) if self.similarity else None,
            "linear": jsonable(self.linear._asdict()) if self.linear else None,
            "joint": jsonable(self.joint._asdict()) if self.joint else None,
            "pairs": jsonable(self.pairs._asdict()) if self.pairs else None,
            "best_matches": jsonable(self.best_matches),
            "profile": jsonable(self.profile),
            "order": jsonable(self.order),
            "agreement": jsonable(self.agreement),
            "followed": [jsonable(latent._asdict()) for latent in self.followed],
            "floor": self.floor.to_dict() if self.floor else None,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """Return a row per ordered cell (the content of `scan.csv`): code or rows of source, decoded to target."""
        rows = []
        for pair in self.cells:
            for source, target in (pair, pair[::-1]):
                depth = {"source_depth": self.depths[source], "target_depth": self.depths[target]}
                rows.append(self.cell(source, target) | depth)
        return _csv(rows)

    def latents_csv(self) -> str:
        """Return a row per followed latent (the content of `scan-latents.csv`)."""
        rows = []
        for latent in self.followed:
            row = {**latent._asdict(), "best": " ".join(latent.best)}
            for name in ("energy", "rate"):
                row |= {f"{name}[{site}]": value for site, value in row.pop(name).items()}
            rows.append(row)
        return _csv(rows)

    def __repr__(self) -> str:
        sizes = " × ".join(f"{model} ({len(sites)} layers)" for model, sites in self.models.items())
        kind = spoken(self.measured_on)
        return f"ScanReport({sizes}; {len(self.followed)} latents in all models; {self.n_rows} {kind} rows)"

    def _model_pairs(self) -> Iterator[tuple[str, str]]:
        models = list(self.models)
        yield from permutations(models, 2) if len(models) > 1 else [(models[0], models[0])]

    def _agree(self, one: Matrix | None, other: Matrix | None) -> float | None:
        if one is None or other is None:
            return None
        both = [
            (one[s][t], other[s][t])
            for pair in self.cells
            for s, t in (pair, pair[::-1])
            if math.isfinite(one[s][t]) and math.isfinite(other[s][t])
        ]
        return rank_correlation([a for a, _ in both], [b for _, b in both])


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None with fewer than three values, or where one of them does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return finite(float(stats.spearmanr(one, other).statistic))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    spelled = [{key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    return csv_text(spelled) if spelled else ""
