"""What the figures of a run are to be believed by: trained controls, independent SAEs, other seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..buffer import ActivationBuffer
from ..split import SplitName
from ..usae import USAE, Matrix, ReconstructionSums
from .matching import Counterparts, FoundAgain
from .posthoc import PostHoc
from .records import jsonable, or_nan
from .rows import some_rows


class Spread(NamedTuple):
    """A figure over several trainings that differ in their seed."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return mean, least and greatest."""
        return cls(float(np.mean(values)), float(min(values)), float(max(values)), len(values))


@dataclass(frozen=True)
class Control:
    """A USAE that was trained on what should share less, or everything.

    Attributes:
        name: `mispaired`, `within class`, `untrained`, `vit twice`, `pixels and vit`.
        what: what was trained on, in words.
        sites: the class sites.
        counts: latents per class.
        n_live: latents that are neither rare nor dead.
        r2: over the class sites.
        seconds: that its training took.
    """

    name: str
    what: str
    sites: tuple[str, ...]
    counts: dict[str, int]
    n_live: int
    r2: Matrix
    seconds: float

    @classmethod
    def of(cls, name: str, what: str, metrics: Mapping[str, Any], seconds: float) -> Control:
        """Take what is wanted of the content of a `metrics.json`."""
        sites, counts = tuple(metrics["class_sites"]), dict(metrics["counts"])
        r2 = {a: {b: or_nan(metrics["r2"][a][b]) for b in sites} for a in sites}
        return cls(name, what, sites, counts, metrics["n_latents"] - counts["rare"] - counts["dead"], r2, seconds)


class Length(NamedTuple):
    """Independent SAEs of one kind.

    Attributes:
        r2: held-out R² by site, over seeds.
        tax: that minus the USAE's self-R², seed by seed: the alignment tax.
    """

    r2: dict[str, Spread]
    tax: dict[str, Spread]


@dataclass(frozen=True)
class Controls:
    """All that was trained beside a run.

    Attributes:
        controls: by what they control for.
        seeds: of the trainings with the run's own settings, its own first.
        universal: universal latents of each; `live` the live ones.
        found_again: for each other seed, the share of this run's universal latents found there, among the universal.
        independent: `steps` (as many), `encoder` (as many updates of the encoder), `parts` (as many steps,
            n_latents / M each).
        posthoc: independent SAEs of as many steps matched afterwards, on held-out and on training rows.
        counterparts: {site: share of the independent SAE's live latents with a universal counterpart}.
    """

    controls: tuple[Control, ...] = ()
    seeds: tuple[int, ...] = ()
    universal: tuple[int, ...] = ()
    live: tuple[int, ...] = ()
    found_again: tuple[FoundAgain, ...] = ()
    independent: dict[str, Length] | None = None
    posthoc: tuple[PostHoc, ...] = ()
    counterparts: dict[str, Counterparts] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what `metrics.json` has of it, by its keys there."""
        independent = self.independent or {}
        return {
            "controls": {control.name: jsonable(vars(control)) for control in self.controls},
            "stability": {
                "seeds": list(self.seeds),
                "universal": list(self.universal),
                "live": list(self.live),
                "found_again": [jsonable(found._asdict()) for found in self.found_again],
            },
            "independent_r2": {kind: _spreads(length.r2) for kind, length in independent.items()},
            "alignment_tax": {kind: _spreads(length.tax) for kind, length in independent.items()},
            "posthoc": [jsonable(found._asdict()) for found in self.posthoc],
            "counterparts": {site: jsonable(found._asdict()) for site, found in (self.counterparts or {}).items()},
        }


def self_r2(usae: USAE, buffer: ActivationBuffer, split: SplitName) -> dict[str, float]:
    """Return a USAE's, or an independent SAE's, R² of each site from its own code, on all rows of a split."""
    sums = ReconstructionSums(usae)
    for rows in some_rows(buffer, split, buffer.n_rows(split), usae.sites):
        sums.add(rows.values)
    r2 = sums.r2()
    return {site: r2[site][site] for site in usae.sites}


def _spreads(by_site: Mapping[str, Spread]) -> dict[str, Any]:
    return {site: jsonable(spread._asdict()) for site, spread in by_site.items()}
