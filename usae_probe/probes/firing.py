"""Firing statistics of the latents, streaming: memory O(sites² × n_latents), whatever the number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch

from ..usae import Codes

Pair = tuple[str, str]


class FiringCounts:
    """Per latent: fires, mean and maximum activation by site, and co-fires by pair of sites.

    A site fires latent k on a row where z_k > τ. Rows of one image are not independent, so where images have several,
    images are counted beside rows, and one drawn row per image by itself: what a test against chance may use.

    Args:
        sites: in the order of the pairs.
        n_latents: latents of the code.
        tau: the threshold τ.
        draw: draws the one row of each image, uniformly; None when every row is an image.

    Attributes:
        n_rows: rows added so far.
        fires: {site: [n] int64}.
        total: {site: [n] float64}, Σ z_k over rows.
        maximum: {site: [n] float64}.
        cofires: {(site, site): [n] int64}, rows in which both sites fire the latent.
        images: {site: [n] int64}, images with a row in which the site fires the latent.
        drawn: the same counts over one row of each image; these counts themselves when every row is an image.
    """

    def __init__(
        self, sites: tuple[str, ...], n_latents: int, tau: float = 0.0, draw: np.random.Generator | None = None
    ) -> None:
        self.sites, self.n_latents, self.tau = sites, n_latents, tau
        self.n_rows = 0
        self.fires = {site: np.zeros(n_latents, dtype=np.int64) for site in sites}
        self.total = {site: np.zeros(n_latents) for site in sites}
        self.maximum = {site: np.zeros(n_latents) for site in sites}
        self.cofires: dict[Pair, np.ndarray] = {
            pair: np.zeros(n_latents, dtype=np.int64) for pair in combinations(sites, 2)
        }
        self._draw = draw
        self.images = {site: np.zeros(n_latents, dtype=np.int64) for site in sites} if draw else self.fires
        self.drawn: FiringCounts = FiringCounts(sites, n_latents, tau) if draw else self

    def add(self, codes: Mapping[str, Codes], image_index: np.ndarray | None = None) -> None:
        """Add the codes of the same rows by every site.

        Args:
            codes: by site.
            image_index: [rows] image of each row, the rows of one image together and in one call; needed with `draw`.
        """
        keys = {site: self._add_site(site, codes[site]) for site in self.sites}
        for (a, b), counts in self.cofires.items():
            both = keys[a][torch.isin(keys[a], keys[b], assume_unique=True)]
            counts += self._count(both % self.n_latents)
        self.n_rows += len(codes[self.sites[0]].values)
        if self._draw is not None and image_index is not None:
            self._add_images(codes, keys, image_index, self._draw)

    def mean(self, site: str) -> np.ndarray:
        """Return E[z_k] over all rows, [n]."""
        return self.total[site] / max(self.n_rows, 1)

    def _add_images(
        self,
        codes: Mapping[str, Codes],
        keys: Mapping[str, torch.Tensor],
        image_index: np.ndarray,
        draw: np.random.Generator,
    ) -> None:
        begins = image_begins(image_index)
        counts = np.diff(begins, append=len(image_index))
        # One number per image, whatever the chunks: the rows drawn depend on the seed and the order of images alone.
        rows = torch.from_numpy(begins + (draw.random(len(begins)) * counts).astype(np.int64))
        one = {site: Codes(code.values[rows], code.indices[rows]) for site, code in codes.items()}
        self.drawn.add(one)
        image = torch.from_numpy(np.repeat(np.arange(len(begins)), counts))
        for site, key in keys.items():
            row, latent = key // self.n_latents, key % self.n_latents
            once = torch.unique(image[row] * self.n_latents + latent)
            self.images[site] += self._count(once % self.n_latents)

    def _add_site(self, site: str, codes: Codes) -> torch.Tensor:
        """Add one site's codes; returns row · n_latents + latent for every fire."""
        values, indices = codes.values.detach().cpu(), codes.indices.cpu()
        fired = values > self.tau
        latents, fired_values = indices[fired], values[fired].double()
        self.fires[site] += self._count(latents)
        sums = torch.zeros(self.n_latents, dtype=torch.float64).index_add_(0, latents, fired_values)
        self.total[site] += sums.numpy()
        top = torch.zeros(self.n_latents, dtype=torch.float64)
        top.scatter_reduce_(0, latents, fired_values, "amax", include_self=True)
        np.maximum(self.maximum[site], top.numpy(), out=self.maximum[site])
        rows = torch.arange(len(values)).unsqueeze(1).expand_as(indices)[fired]
        return rows * self.n_latents + latents

    def _count(self, latents: torch.Tensor) -> np.ndarray:
        return torch.bincount(latents, minlength=self.n_latents).numpy()


def image_begins(image_index: np.ndarray) -> np.ndarray:
    """Return the rows at which another image begins; the rows of an image lie together."""
    return np.flatnonzero(np.append(True, image_index[1:] != image_index[:-1])[: len(image_index)])
