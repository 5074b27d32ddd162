"""Classes under the null: the same fires with images paired at random, anywhere or among those with the same label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import ProbesConfig
from ..images import Annotation
from ..usae import exchanged
from .firing import Fires, FiringCounts, Pair, image_begins
from .universality import CATEGORIES, classify

KEPT_ROWS = 100_000
"""Held-out rows whose fires are kept to be paired anew."""
_ALL_ROWS = 200_000
_CHUNK = 1024

Renamed = Callable[[Mapping[str, Fires], int], Mapping[str, Fires]]
"""Of the fires of every site over n rows, the same with other latents."""


class NullCounts(NamedTuple):
    """How many latents of each class there are when images are paired at random.

    Attributes:
        within: name of the label that paired images have in common; empty where any two are paired.
        n_rows: rows that were paired, n_images the images.
        counts: {class: [one number per pairing]}.
    """

    within: str
    n_rows: int
    n_images: int
    counts: dict[str, list[int]]

    @property
    def universal(self) -> float:
        """Universal latents, in the mean."""
        return float(np.mean(self.counts["universal"]))

    def to_dict(self) -> dict[str, Any]:
        """Return it for `metrics.json`."""
        return {
            "within": self.within,
            "n": len(self.counts["universal"]),
            "n_rows": self.n_rows,
            "n_images": self.n_images,
            "universal": self.counts["universal"],
            "partial": self.counts["partial"],
        }


class KeptFires:
    """The fires of some sites on the first held-out rows, to be paired anew.

    Args:
        sites: the class sites, say.
        n_latents: latents of the code.
        most: rows that are kept, at most (those of a call are kept together); default: 100,000.
    """

    def __init__(self, sites: Sequence[str], n_latents: int, most: int | None = None) -> None:
        self.sites, self.n_latents = tuple(sites), n_latents
        self._most = KEPT_ROWS if most is None else most
        self.n_rows = 0
        self._latents: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        self._z: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        self._per_row: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        self._images: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []

    def add(self, fires: Mapping[str, Fires], n: int, image_index: np.ndarray, token_index: np.ndarray) -> None:
        """Keep the fires of n rows of whole images, unless there are enough."""
        if self.n_rows >= self._most:
            return
        for site in self.sites:
            self._latents[site].append(fires[site].latent.int())
            self._z[site].append(fires[site].z)
            self._per_row[site].append(torch.bincount(fires[site].row, minlength=n))
        self._images.append(image_index)
        self._tokens.append(token_index)
        self.n_rows += n

    def nulls(
        self,
        thresholds: ProbesConfig,
        places: int,
        *,
        labels: Annotation | None = None,
        renamed: Renamed | None = None,
    ) -> NullCounts | None:
        """Pair images at random, `thresholds.nulls` times (fewer where rows are many), and classify the latents.

        An image's rows stay together and keep their places, and only images with as many rows are exchanged, so every
        site fires as often as it does; what is left of co-firing is chance.

        Args:
            thresholds: as for `classify`.
            places: rows of each image where they are as many in all; 0 or 1 otherwise.
            labels: exchange only images with the same label.
            renamed: gives the latents of each pairing other numbers, before they are counted.

        Returns:
            None when no rows were kept, or no pairing is asked for.
        """
        found: dict[str, list[int]] = {name: [] for name in CATEGORIES}
        for tally in self.pairings(thresholds, places, labels=labels, renamed=renamed):
            category = classify(tally, self.sites, thresholds).category
            for name in CATEGORIES:
                found[name].append(int((category == name).sum()))
        if not found["universal"]:
            return None
        n_images = len(image_begins(np.concatenate(self._images)))
        return NullCounts(labels.name if labels else "", self.n_rows, n_images, found)

    def pairings(
        self,
        thresholds: ProbesConfig,
        places: int,
        *,
        labels: Annotation | None = None,
        renamed: Renamed | None = None,
        pairs: Sequence[Pair] | None = None,
    ) -> Iterator[FiringCounts]:
        """Yield the firing counts of images paired at random, as `nulls` counts them; `pairs` of sites: default all."""
        if not self.n_rows or not thresholds.nulls or len(self.sites) < 2:
            return
        images, tokens = np.concatenate(self._images), np.concatenate(self._tokens)
        begins = image_begins(images)
        counts = np.diff(begins, append=len(images))
        strata = counts if labels is None else counts + (counts.max() + 1) * (labels.values[images[begins]] + 1)
        kept = {site: _Ragged.of(self._latents[site], self._z[site], self._per_row[site]) for site in self.sites}
        several = len(begins) < len(images)
        for number in range(max(1, min(thresholds.nulls, _ALL_ROWS // self.n_rows))):
            draw = np.random.default_rng((thresholds.seed, 3, number))
            rows = {site: _paired(draw, begins, counts, strata, moves=i > 0) for i, site in enumerate(self.sites)}
            tally = FiringCounts(
                self.sites, self.n_latents, draw=draw if several else None, pairs=pairs, places=places if several else 0
            )
            fires: Mapping[str, Fires] = {site: kept[site].take(rows[site]) for site in self.sites}
            if renamed:
                fires = renamed(fires, len(images))
            for part in _parts(begins, len(images)):
                of_part = {site: fires[site].between(part.start, part.stop) for site in self.sites}
                tally.add_fires(of_part, part.stop - part.start, images[part], tokens[part])
            yield tally


class _Ragged(NamedTuple):
    """The latents that fire in each row, and z."""

    latents: Tensor
    z: Tensor
    begins: Tensor

    @classmethod
    def of(cls, latents: list[Tensor], z: list[Tensor], per_row: list[Tensor]) -> _Ragged:
        counts = torch.cat(per_row)
        return cls(torch.cat(latents), torch.cat(z), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def take(self, rows: np.ndarray) -> Fires:
        """Return the fires of these rows, counted from 0."""
        wanted = torch.from_numpy(rows)
        first = self.begins[wanted]
        counts = self.begins[wanted + 1] - first
        row = torch.arange(len(wanted)).repeat_interleave(counts)
        at = torch.arange(len(row)) - (counts.cumsum(0) - counts - first)[row]
        return Fires(row, self.latents[at].long(), self.z[at])


def _paired(
    draw: np.random.Generator, begins: np.ndarray, counts: np.ndarray, strata: np.ndarray, *, moves: bool
) -> np.ndarray:
    """Return the row that stands at each row's place once images of one stratum are exchanged."""
    partner = exchanged(draw, strata) if moves else np.arange(len(begins))
    return np.repeat(begins[partner] - begins, counts) + np.arange(int(counts.sum()))


def _parts(begins: np.ndarray, n: int) -> Iterator[slice]:
    """Yield parts of about a thousand rows that end where an image ends."""
    start = 0
    while start < n:
        later = begins[begins >= start + _CHUNK]
        stop = int(later[0]) if len(later) else n
        yield slice(start, stop)
        start = stop
