"""The images of a run that say what a latent means: strongest, disagreeing, and at random over its activation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8

from ..errors import ImageError
from ..images import ImageSource, at_size
from ..split import SPLITS, SplitName
from .firing import Pair
from .natural import NaturalActivations

OVERLAP_IMAGES = 20
_THUMBNAIL = (16, 16)
_SAME = 4 / 255
"""Mean difference of thumbnails below which two images are one: another compression, or a few pixels' shift."""


class Exemplar(NamedTuple):
    """An image, and what a latent makes of it.

    Attributes:
        image: its number in the source.
        value: z of the latent, in units of the code; the largest where the image has several rows.
        percentile: per cent of images whose activation is below the image's.
        split: what the image was used for.
    """

    image: int
    value: float
    percentile: float
    split: SplitName


class Overlap(NamedTuple):
    """How many of two sites' strongest images are the same.

    Attributes:
        shared: images that are among the n strongest of both.
        n: 20, or fewer where a site fires on fewer images; 0 where one fires on none.
        expected: how many there would be by chance.
    """

    shared: int
    n: int
    expected: float

    @property
    def share(self) -> float:
        """Shared images over n; NaN without any."""
        return self.shared / self.n if self.n else math.nan


@dataclass(frozen=True)
class Exemplars:
    """Images of one latent; no image, and no two that look the same, stand twice in a site's lists.

    Attributes:
        top: by site, those that fire it most, most active first; images with z = 0 are none.
        only: by site, those that fire it there and in no other site, most active first.
        across: by site, one drawn from each of as many bands of its activation over all images, from low to high.
        overlap: by pair of sites, of the strongest images.
        correlation: by pair of sites, Pearson's, of z over held-out rows; NaN where one does not vary.
    """

    top: dict[str, list[Exemplar]]
    only: dict[str, list[Exemplar]]
    across: dict[str, list[Exemplar]]
    overlap: dict[Pair, Overlap]
    correlation: dict[Pair, float]


def find_exemplars(
    natural: NaturalActivations, latent: int, *, source: ImageSource | None = None, n: int = 4, seed: int = 0
) -> Exemplars:
    """Choose images of a latent.

    Args:
        natural: activations of it.
        latent: its number.
        source: the images: of those that look the same the later ones are left out; without it all differ.
        n: images per list, at most.
        seed: of those that are drawn.
    """
    sites, looks = list(natural.sites), _Looks(source)
    firing = {site: natural.strongest(natural.sites[site].fires(latent)) for site in sites}
    active = {site: natural.strongest(natural.sites[site].of(latent)) for site in sites}
    top, only, across = {}, {}, {}
    for site in sites:
        describe = _Describer(natural, firing[site], active[site])
        seen: list[int] = []
        top[site] = [describe(i) for i in looks.distinct(natural, ranked(firing[site]), n, seen)]
        elsewhere = np.zeros(len(natural.images), dtype=bool)
        for other in sites:
            elsewhere |= (firing[other] > 0) & (other != site)
        alone = ranked(np.where(elsewhere, 0.0, firing[site])) if len(sites) > 1 else []
        only[site] = [describe(i) for i in looks.distinct(natural, alone, n, seen)]
        draw = np.random.default_rng([seed, latent, sites.index(site)])
        bands = np.array_split(np.argsort(active[site], kind="stable"), n)
        drawn = (next(looks.distinct(natural, draw.permutation(band).tolist(), 1, seen), None) for band in bands)
        across[site] = [describe(i) for i in drawn if i is not None]
    pairs = list(combinations(sites, 2))
    return Exemplars(
        top,
        only,
        across,
        {(a, b): overlap(firing[a], firing[b]) for a, b in pairs},
        {pair: _correlation(natural, latent, pair) for pair in pairs},
    )


def ranked(values: Float[np.ndarray, " images"]) -> Sequence[int]:
    """Return the places of positive values, largest first; of equal ones the first comes first."""
    order = np.argsort(-values, kind="stable")
    found: list[int] = order[values[order] > 0].tolist()
    return found


def overlap(a: Float[np.ndarray, " images"], b: Float[np.ndarray, " images"], n: int = OVERLAP_IMAGES) -> Overlap:
    """Count the images that are among the n largest of both; of two random sets n² / N would be."""
    first, second = ranked(a), ranked(b)
    n = min(n, len(first), len(second))
    return Overlap(len(set(first[:n]) & set(second[:n])), n, n * n / max(len(a), 1))


def _correlation(natural: NaturalActivations, latent: int, pair: Pair) -> float:
    held_out = natural.split == SPLITS.index("holdout")
    a, b = (natural.sites[site].fires(latent)[held_out].astype(np.float64) for site in pair)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


class _Describer:
    def __init__(self, natural: NaturalActivations, firing: np.ndarray, active: np.ndarray) -> None:
        self.natural, self.firing, self.active = natural, firing, active
        self.sorted = np.sort(active)

    def __call__(self, i: int) -> Exemplar:
        below = np.searchsorted(self.sorted, self.active[i], side="left") / len(self.sorted)
        split = SPLITS[self.natural.split[self.natural.begins[i]]]
        return Exemplar(int(self.natural.images[i]), float(self.firing[i]), 100 * float(below), split)


class _Looks:
    """Tells images apart by small copies of them."""

    def __init__(self, source: ImageSource | None) -> None:
        self.source = source
        self.thumbnail = lru_cache(maxsize=4096)(self._thumbnail)

    def distinct(self, natural: NaturalActivations, places: Iterable[int], n: int, seen: list[int]) -> Iterator[int]:
        """Yield the first n places whose image looks like none seen yet; they are then seen, too."""
        found = 0
        for place in places:
            if found == n:
                return
            image = int(natural.images[place])
            if not any(self._same(image, other) for other in seen):
                seen.append(image)
                found += 1
                yield place

    def _same(self, a: int, b: int) -> bool:
        if a == b:
            return True
        first, second = self.thumbnail(a), self.thumbnail(b)
        return first is not None and second is not None and float(np.abs(first - second).mean()) < _SAME

    def _thumbnail(self, image: int) -> Float[np.ndarray, "3 h w"] | None:
        if self.source is None:
            return None
        try:
            picture: UInt8[np.ndarray, "_ _ 3"] = self.source.load(image)
        except ImageError:
            return None
        small: np.ndarray = at_size(picture, _THUMBNAIL).to(torch.float32).numpy()
        return small
