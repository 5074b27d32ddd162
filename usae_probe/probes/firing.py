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

    A site fires latent k on a row where z_k > τ. One row per image, so rows count images.

    Attributes:
        n_rows: rows added so far.
        fires: {site: [n] int64}.
        total: {site: [n] float64}, Σ z_k over rows.
        maximum: {site: [n] float64}.
        cofires: {(site, site): [n] int64}, rows in which both sites fire the latent.
    """

    def __init__(self, sites: tuple[str, ...], n_latents: int, tau: float = 0.0) -> None:
        self.sites, self.n_latents, self.tau = sites, n_latents, tau
        self.n_rows = 0
        self.fires = {site: np.zeros(n_latents, dtype=np.int64) for site in sites}
        self.total = {site: np.zeros(n_latents) for site in sites}
        self.maximum = {site: np.zeros(n_latents) for site in sites}
        self.cofires: dict[Pair, np.ndarray] = {
            pair: np.zeros(n_latents, dtype=np.int64) for pair in combinations(sites, 2)
        }

    def add(self, codes: Mapping[str, Codes]) -> None:
        """Add the codes of the same rows by every site."""
        keys = {site: self._add_site(site, codes[site]) for site in self.sites}
        for (a, b), counts in self.cofires.items():
            both = keys[a][torch.isin(keys[a], keys[b], assume_unique=True)]
            counts += self._count(both % self.n_latents)
        self.n_rows += len(codes[self.sites[0]].values)

    def mean(self, site: str) -> np.ndarray:
        """Return E[z_k] over all rows, [n]."""
        return self.total[site] / max(self.n_rows, 1)

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
