"""Which known factor of the images a latent follows: exact AUROC of its code for every value, in every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..images import Annotation
from ..usae import Codes
from .firing import image_begins

MIN_IMAGES = 10
"""Held-out images that must have a value, and as many that must not, for it to be rated."""


class Follows(NamedTuple):
    """The value of a factor that a latent follows best in every model; the best of many, hence optimistic.

    Attributes:
        factor: the factor's name.
        value: the value's name.
        auroc: AUROC of the latent's code for that value, by class site.
    """

    factor: str
    value: str
    auroc: dict[str, float]


class Fires(NamedTuple):
    """Fires of all latents in one site, [fires] each: latent, code value z > 0, and row; one row per image."""

    latent: np.ndarray
    z: np.ndarray
    row: np.ndarray

    def largest(self) -> Fires:
        """Return the largest z of every latent and row alone."""
        order = np.lexsort((self.z, self.latent, self.row))
        latent, z, row = (part[order] for part in self)
        last = np.append((latent[1:] != latent[:-1]) | (row[1:] != row[:-1]), True)[: len(row)]
        return Fires(latent[last], z[last], row[last])

    def sorted(self) -> Fires:
        """Return them by latent, then by z."""
        order = np.lexsort((self.z, self.latent))
        return Fires(*(part[order] for part in self))


def auroc(fires: Fires, labels: np.ndarray, n_latents: int, n_values: int) -> np.ndarray:
    """Return how well the code of each latent tells rows with each value from all other rows, exactly.

        AUROC = P(z⁺ > z⁻) + ½ P(z⁺ = z⁻) = U / (n⁺ n⁻),   U = R⁺ − n⁺ (n⁺ + 1) / 2

    for z⁺ of a row with the value and z⁻ of one without; R⁺ is the sum of the ranks of z over the n⁺ rows with the
    value, equal ones share their mean rank (Mann & Whitney 1947; Hanley & McNeil 1982). z is 0 in every row without a
    fire: those n₀ rows share the rank (n₀ + 1) / 2, so the fires alone are ranked.

    Args:
        fires: sorted.
        labels: [rows] value of each row, below `n_values`; −1 where unknown: such rows are left out.
        n_latents: latents of the code.
        n_values: values of the factor.

    Returns:
        [n_latents, n_values] float64; .5 is chance; NaN for a value that fewer than `MIN_IMAGES` rows have, or lack.
    """
    known = labels >= 0
    latent, z, row = (part[known[fires.row]] for part in fires)
    n_with, n_without = _with_and_without(labels, n_values)
    n_zero = known.sum() - np.bincount(latent, minlength=n_latents)
    key = latent.astype(np.int64) * n_values + labels[row]
    shape, size = (n_latents, n_values), n_latents * n_values
    n_fired = np.bincount(key, minlength=size).reshape(shape)
    ranks = n_zero[latent] + _mean_places(latent, z)
    rank_sum = np.bincount(key, weights=ranks, minlength=size).reshape(shape)
    rank_sum = rank_sum + (n_with - n_fired) * ((n_zero + 1) / 2)[:, None]
    u = rank_sum - n_with * (n_with + 1) / 2
    rated = np.minimum(n_with, n_without) >= MIN_IMAGES
    return np.where(rated, u / np.maximum(n_with * n_without, 1), np.nan)


class FactorScores:
    """Collects the fires on held-out images and says which value of which factor each latent follows.

    Values are those of whole images: where one has several rows, its largest z of each latent counts. Memory
    O(rows · k · sites): fires only, never a dense code.

    Args:
        sites: one per model.
        n_latents: latents of the code.
        annotations: what is known about the images of the source.

    Attributes:
        n_images: images added so far.
    """

    def __init__(self, sites: Sequence[str], n_latents: int, annotations: Sequence[Annotation]) -> None:
        self.sites, self.n_latents, self.annotations = tuple(sites), n_latents, tuple(annotations)
        self.n_images = 0
        self._images: list[np.ndarray] = []
        self._fires: dict[str, list[Fires]] = {site: [] for site in self.sites}

    def add(self, codes: Mapping[str, Codes], image_index: np.ndarray) -> None:
        """Add the codes of the same rows by every site, the rows of one image together and in one call.

        Raises:
            UsageError: when an annotation has no value for one of the images.
        """
        for one in self.annotations:
            if len(image_index) and image_index.max() >= len(one.values):
                raise UsageError(
                    f"annotation '{one.name}' has {len(one.values)} values, none for image {image_index.max()}",
                    hint="give the annotations of the image source that was harvested",
                )
        begins = image_begins(image_index)
        number = self.n_images + np.repeat(np.arange(len(begins)), np.diff(begins, append=len(image_index)))
        self._images.append(image_index[begins])
        for site in self.sites:
            values, indices = (part.detach().cpu().numpy() for part in codes[site])
            rows, entries = np.nonzero(values > 0)
            latents = indices[rows, entries].astype(np.int32)
            fires = Fires(latents, values[rows, entries], number[rows].astype(np.int32))
            self._fires[site].append(fires if len(begins) == len(image_index) else fires.largest())
        self.n_images += len(begins)

    @property
    def n_values(self) -> int:
        """Values that are rated, over all annotations: those that enough of the rows have, and enough lack."""
        counts = [_with_and_without(self._labels_of(one), len(one.names)) for one in self.annotations]
        return sum(int((np.minimum(*both) >= MIN_IMAGES).sum()) for both in counts)

    def auroc(self, site: str) -> np.ndarray:
        """Return `auroc` for every value of every annotation, one after the other, [n_latents, values]."""
        fires = Fires(*(np.concatenate(parts) for parts in zip(*self._fires[site], strict=True))).sorted()
        tables = [auroc(fires, self._labels_of(one), self.n_latents, len(one.names)) for one in self.annotations]
        return np.hstack(tables)

    def follows(self) -> list[Follows | None]:
        """Return, per latent, the value whose smallest AUROC over the sites is largest.

        As the best of `n_values` values it is optimistic. Among equals (a latent that fires in one site only has .5 at
        best) the one with the largest sum over sites is named, then the first.

        Returns:
            [n_latents]; None for a latent that fires in no site, and for all where no value is rated.
        """
        found: list[Follows | None] = [None] * self.n_latents
        if not self.n_values:
            return found
        scores = np.nan_to_num(np.stack([self.auroc(site) for site in self.sites]), nan=-1.0)
        smallest = scores.min(0)
        equals = smallest == smallest.max(1, keepdims=True)
        best = np.where(equals, scores.sum(0), -np.inf).argmax(1)
        names = [(annotation.name, value) for annotation in self.annotations for value in annotation.names]
        fired = np.unique(np.concatenate([fires.latent for parts in self._fires.values() for fires in parts]))
        for k in fired.tolist():
            (factor, value), column = names[best[k]], scores[:, k, best[k]].tolist()
            found[k] = Follows(factor, value, dict(zip(self.sites, column, strict=True)))
        return found

    def _labels_of(self, annotation: Annotation) -> np.ndarray:
        return np.concatenate([annotation.values[images] for images in self._images] or [np.empty(0, dtype=np.int64)])


def _with_and_without(labels: np.ndarray, n_values: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the rows with each value, and those with another; [n_values] each."""
    n_with = np.bincount(labels[labels >= 0], minlength=n_values)
    return n_with, n_with.sum() - n_with


def _mean_places(latent: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the place of every fire among those of its latent, from 1; equal values share their mean place."""
    if not len(latent):
        return np.empty(0)
    new_latent = np.append(True, latent[1:] != latent[:-1])
    new_value = new_latent | np.append(True, z[1:] != z[:-1])
    begins = np.flatnonzero(new_latent)[np.cumsum(new_latent) - 1]
    first, tie = np.flatnonzero(new_value), np.cumsum(new_value) - 1
    mean = first - begins[first] + 1 + (np.bincount(tie) - 1) / 2
    return np.asarray(mean[tie])
