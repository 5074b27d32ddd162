"""What is known about one latent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .factors import Follows
from .firing import Pair
from .universality import Category


class PairRecord(NamedTuple):
    """Co-firing of one latent in one pair of sites; see `CoFiring`. q is over the latents firing in both.

    Over rows, but p and q: where images have several rows, those are of one drawn row per image, and q is of the larger
    of p and p_place.
    """

    cofires: int
    share_a: float
    share_b: float
    jaccard: float
    lift: float
    phi: float
    phi_low: float
    phi_high: float
    correlation: float
    p: float
    phi_place: float
    p_place: float
    q: float


@dataclass(frozen=True)
class LatentRecord:
    """One latent.

    Attributes:
        latent: its number.
        category: its class.
        split: marked as one of two one-model latents with equal decoder rows.
        positional: co-fires because it fires at certain places of any image.
        fires_in: class sites it counts as firing in.
        entropy: firing entropy over the class sites; NaN when it never fires there.
        q: of the universality test (maximum p over pairs).
        fires, rate, mean, maximum, energy, decoder_norm: by site, over rows; energy is E|z_k| ‖W_dec,k‖, decoder_norm
            the site's share of the sum of ‖W_dec,k‖ over sites.
        pairs: co-firing by pair of class sites.
        follows: the known value of an image that it follows best, however loosely; None when none is rated.
    """

    latent: int
    category: Category
    split: bool
    positional: bool
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
    follows: Follows | None = None

    @property
    def total_energy(self) -> float:
        """Energy summed over sites."""
        return sum(self.energy.values())

    @property
    def phi(self) -> float:
        """The smallest φ over the pairs of class sites, and within places; NaN without a pair."""
        return min((float(np.fmin(pair.phi, pair.phi_place)) for pair in self.pairs.values()), default=math.nan)

    @property
    def correlation(self) -> float:
        """The smallest correlation of the codes over the pairs of class sites; NaN without a pair."""
        return min((pair.correlation for pair in self.pairs.values()), default=math.nan)

    def to_dict(self, class_sites: Sequence[str]) -> dict[str, Any]:
        """Return what `metrics.json` says about it; what is not a number there is null."""
        return {
            "latent": self.latent,
            "category": self.category,
            "rate": {site: self.rate[site] for site in class_sites},
            "entropy": finite(self.entropy),
            "phi": finite(self.phi),
            "correlation": finite(self.correlation),
            "total_energy": finite(self.total_energy),
            "follows": self.follows._asdict() if self.follows else None,
        }

    def to_row(self, class_sites: Sequence[str]) -> dict[str, str | int]:
        """Return its row of `latents.csv`; what is not a number there is empty."""
        row: dict[str, str | int] = {
            "latent": self.latent,
            "category": self.category,
            "split": int(self.split),
            "positional": int(self.positional),
            "fires_in": " ".join(self.fires_in),
            "entropy": _cell(self.entropy),
            "q": _cell(self.q),
            "total_energy": _cell(self.total_energy),
        }
        for name in ("fires", "rate", "mean", "maximum", "energy", "decoder_norm"):
            row |= {f"{name}[{site}]": _cell(value) for site, value in getattr(self, name).items()}
        for (a, b), pair in self.pairs.items():
            row |= {f"{name}[{a}|{b}]": _cell(value) for name, value in pair._asdict().items()}
        follows = self.follows
        row["follows"] = f"{follows.factor}={follows.value}" if follows else ""
        row |= {f"auroc[{site}]": _cell(follows.auroc[site]) if follows else "" for site in class_sites}
        row |= {f"purity[{site}]": _optional(follows.purity[site]) if follows else "" for site in class_sites}
        row |= {f"best[{site}]": follows.best.get(site, "") if follows else "" for site in class_sites}
        return row


def finite(value: float) -> float | None:
    """Return the number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None


def or_nan(value: float | None) -> float:
    """Return what `finite` was given, NaN for None."""
    return math.nan if value is None else value


def jsonable(value: Any) -> Any:
    """Return a tree of dicts and lists with null for every number that JSON has none for."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def _optional(value: float | None) -> str | int:
    return "" if value is None else _cell(value)


def _cell(value: float | int) -> str | int:
    if isinstance(value, int):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
