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
        purity: of the images (with a known value of the factor) in which the site fires the latent, the share that has
            the value, by class site; None where it fires in none.
        best: `factor=value` that the site's own code follows best, by each class site that fires the latent.
    """

    factor: str
    value: str
    auroc: dict[str, float]
    purity: dict[str, float | None]
    best: dict[str, str]


class LabelAgreement(NamedTuple):
    """Whether sites agree on what latents follow.

    Attributes:
        share: of the latents, those whose best value is the same in all sites; NaN without any.
        chance: the same share if each site's best values were paired with the others' at random.
        n: latents that have a best value in every site.
    """

    share: float
    chance: float
    n: int


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
        self._in_order: dict[str, bool] = {}
        self._auroc: dict[str, np.ndarray] = {}

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
        self._auroc.clear()
        begins = image_begins(image_index)
        number = self.n_images + np.repeat(np.arange(len(begins)), np.diff(begins, append=len(image_index)))
        self._images.append(image_index[begins])
        for site in self.sites:
            values, indices = (part.detach().cpu().numpy() for part in codes[site])
            rows, entries = np.nonzero(values > 0)
            latents = indices[rows, entries].astype(np.int32)
            fires = Fires(latents, values[rows, entries], number[rows].astype(np.int32))
            self._fires[site].append(fires if len(begins) == len(image_index) else fires.largest())
            self._in_order[site] = False
        self.n_images += len(begins)

    @property
    def n_values(self) -> int:
        """Values that are rated, over all annotations: those that enough of the rows have, and enough lack."""
        counts = [_with_and_without(self._labels_of(one), len(one.names)) for one in self.annotations]
        return sum(int((np.minimum(*both) >= MIN_IMAGES).sum()) for both in counts)

    @property
    def names(self) -> list[str]:
        """All values of all annotations, one after the other, as `factor=value`."""
        return [f"{annotation.name}={value}" for annotation in self.annotations for value in annotation.names]

    def auroc(self, site: str) -> np.ndarray:
        """Return `auroc` for every value of every annotation, one after the other, [n_latents, values]."""
        if site not in self._auroc:
            self._auroc[site] = self._tables(site, [self._labels_of(one) for one in self.annotations])
        return self._auroc[site]

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
        scores = np.stack([np.nan_to_num(self.auroc(site), nan=-1.0) for site in self.sites])
        smallest = scores.min(0)
        equals = smallest == smallest.max(1, keepdims=True)
        best = np.where(equals, scores.sum(0), -np.inf).argmax(1)
        names = [(annotation.name, value) for annotation in self.annotations for value in annotation.names]
        own, purity, spelled = self._best(), {site: self._purity(site) for site in self.sites}, self.names
        fired = np.unique(np.concatenate([self._sorted(site).latent for site in self.sites]))
        for k in fired.tolist():
            at = best[k]
            factor, value = names[at]
            found[k] = Follows(
                factor,
                value,
                auroc={site: scores[i, k, at].item() for i, site in enumerate(self.sites)},
                purity={site: None if np.isnan(p := purity[site][k, at]) else p.item() for site in self.sites},
                best={site: spelled[own[site][k]] for site in self.sites if own[site][k] >= 0},
            )
        return found

    def agreement(self, latents: Sequence[int]) -> LabelAgreement:
        """Say for which share of some latents all sites' codes follow the same value best, each by itself.

            chance = Σ_v Π_i p_i(v),   p_i(v) = share of the latents that site i follows best for value v

        Args:
            latents: the universal ones, say.

        Raises:
            UsageError: for a number that is no latent.
        """
        chosen = np.asarray(list(latents), dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self.n_latents:
            raise UsageError(f"latents {chosen.min()} to {chosen.max()} were given: they are 0 to {self.n_latents - 1}")
        if not self.n_values or len(self.sites) < 2:
            return LabelAgreement(float("nan"), float("nan"), 0)
        best = np.stack([own[chosen] for own in self._best().values()])
        best = best[:, (best >= 0).all(0)]
        if not best.shape[1]:
            return LabelAgreement(float("nan"), float("nan"), 0)
        shares = np.stack([np.bincount(row, minlength=len(self.names)) / len(row) for row in best])
        same = (best == best[0]).all(0)
        return LabelAgreement(float(same.mean()), float(shares.prod(0).sum()), best.shape[1])

    def bound(self, permutations: int = 20, seed: int = 0) -> float:
        """Return what AUROC in all sites the best of all latents reaches for any value by chance.

        Labels are permuted over images, those of all annotations together; of every permutation the largest over
        latents and values of the smallest AUROC over sites is taken, and of these the largest. A latent above it
        follows its value at a family-wise level of about 1 / (permutations + 1).

        Args:
            permutations: how many.
            seed: of the permutations.

        Returns:
            NaN where no value is rated, and without permutations.
        """
        if not self.n_values or not permutations:
            return float("nan")
        labels, draw = [self._labels_of(one) for one in self.annotations], np.random.default_rng((seed, 4))
        largest = 0.0
        for _ in range(permutations):
            order = draw.permutation(self.n_images)
            smallest = np.min(
                [np.nan_to_num(self._tables(site, [of[order] for of in labels]), nan=0.0) for site in self.sites],
                axis=0,
            )
            largest = max(largest, float(smallest.max()))
        return largest

    def _best(self) -> dict[str, np.ndarray]:
        """Return by site the value that each latent follows best there, [n_latents]; −1 where nothing tells.

        That is a latent that fires in no image whose value of a factor that is rated is known.
        """
        found = {}
        for site in self.sites:
            scores = np.where(np.isnan(self._purity(site)), np.nan, self.auroc(site))
            found[site] = np.where(np.isnan(scores).all(1), -1, np.nan_to_num(scores, nan=-1.0).argmax(1))
        return found

    def _purity(self, site: str) -> np.ndarray:
        """Return the share of a site's fires that has each value, [n_latents, values]; NaN without fires."""
        fires, tables = self._sorted(site), []
        for one in self.annotations:
            labels, n = self._labels_of(one)[fires.row], len(one.names)
            known = labels >= 0
            key = fires.latent[known].astype(np.int64) * n + labels[known]
            counts = np.bincount(key, minlength=self.n_latents * n).reshape(self.n_latents, n)
            total = counts.sum(1, keepdims=True)
            tables.append(np.where(total > 0, counts / np.maximum(total, 1), np.nan))
        return np.hstack(tables)

    def _tables(self, site: str, labels: Sequence[np.ndarray]) -> np.ndarray:
        fires = self._sorted(site)
        sizes = [len(one.names) for one in self.annotations]
        return np.hstack([auroc(fires, of, self.n_latents, n) for of, n in zip(labels, sizes, strict=True)])

    def _sorted(self, site: str) -> Fires:
        """Return a site's fires, sorted; once for all that ask for them."""
        if len(self._fires[site]) != 1 or not self._in_order.get(site):
            parts = self._fires[site]
            joined = Fires(*(np.concatenate(part) for part in zip(*parts, strict=True))).sorted()
            self._fires[site], self._in_order[site] = [joined], True
        return self._fires[site][0]

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
