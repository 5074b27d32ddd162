"""Intervals over images: groups of images are resampled with replacement, and all counts and sums with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .firing import CountsBy, Pair, image_begins

N_GROUPS = 256
LEVEL = 0.95
_BLOCK = 512


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


class ImageGroups:
    """Puts images into at most 256 groups, at random; every image is one of its own where there are no more.

    Args:
        n_images: that will come.
        seed: of the draw.

    Attributes:
        n: groups.
    """

    def __init__(self, n_images: int, seed: int) -> None:
        self.n = max(1, min(n_images, N_GROUPS))
        self._of_image = np.arange(n_images)
        if n_images > N_GROUPS:
            self._of_image = np.random.default_rng((seed, 1)).integers(N_GROUPS, size=n_images)
        self._seen = 0

    def of(self, image_index: np.ndarray) -> np.ndarray:
        """Return the group of each row of the next images, whose rows lie together."""
        begins = image_begins(image_index)
        groups = self._of_image[self._seen : self._seen + len(begins)]
        self._seen += len(begins)
        return np.repeat(groups, np.diff(begins, append=len(image_index)))


class Resamples:
    """How often each group is drawn in each resample (Efron 1979).

    Args:
        groups: how many there are.
        n: resamples.
        seed: of the draw.

    Attributes:
        weights: [n, groups] float64.
    """

    def __init__(self, groups: int, n: int, seed: int) -> None:
        draw = np.random.default_rng((seed, 2))
        self.weights = draw.multinomial(groups, np.full(groups, 1 / groups), size=n).astype(np.float64)

    def interval(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the 95 % interval of values found in each resample, [n, …] to […] each."""
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return low, high

    def phi(self, counts: CountsBy, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of φ's 95 % interval for every latent, [latents] each; NaN with fewer than two groups."""
        size = counts.n_latents
        low, high = np.full(size, np.nan), np.full(size, np.nan)
        if len(counts.n) < 2:
            return low, high
        n = (self.weights @ counts.n)[:, None]
        for start in range(0, size, _BLOCK):
            block = slice(start, start + _BLOCK)
            a, b, c = (
                self.weights @ table[:, block]
                for table in (counts.fires[pair[0]], counts.fires[pair[1]], counts.cofires[pair])
            )
            spread = a * (n - a) * b * (n - b)
            found = np.where(spread > 0, (n * c - a * b) / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)
            low[block], high[block] = self.interval(found)
        return low, high

    def r2(self, sse: np.ndarray, sst: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of R²'s 95 % interval: SSE and SST are summed over the images of each resample.

        Args:
            sse: [groups, sources, targets].
            sst: [groups, targets], about the mean of all held-out rows.

        Returns:
            [sources, targets] each; NaN with fewer than two groups, and for a target that does not vary.
        """
        if len(sse) < 2:
            nothing = np.full(sse.shape[1:], np.nan)
            return nothing, nothing.copy()
        errors = np.tensordot(self.weights, sse, axes=1)
        totals = np.broadcast_to((self.weights @ sst)[:, None, :], errors.shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.where(totals > 0, 1.0 - errors / totals, np.nan)
        return self.interval(found)
