"""The k · b largest of a batch, and a threshold learnt from them for rows that come alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...shapes import LatentVector
from ..kernels import PreActivations, Support
from .base import Sparsity, largest_of_batch


class BatchTopK(Sparsity):
    """BatchTopK (arXiv 2412.06410): k active latents per row in the mean; rows may have more or fewer.

    Training takes the k · b largest positive z_pre of the b rows together. Inference takes z_pre > θ, with one θ per
    site: the running mean of the smallest z_pre that training batches of the site selected,

        θ ← θ + max(1 / (t + 1), `RATE`) (min_t − θ),

    the plain mean at first. The batches of the alignment warm-up (the k · b largest of the summed z_pre) say nothing
    of θ; until a site has one, inference takes the k largest of each row.

    Attributes:
        theta: [m] thresholds.
        updates: [m] batches that they were learnt from.
    """

    name = "batchtopk"
    RATE = 0.01
    theta: Float[Tensor, " m"]
    updates: Int[Tensor, " m"]

    def __init__(self, k: int, n_latents: int, n_sites: int, settings: Mapping[str, float] | None = None) -> None:
        super().__init__(k, n_latents, n_sites, settings)
        self.register_buffer("theta", torch.zeros(n_sites))
        self.register_buffer("updates", torch.zeros(n_sites, dtype=torch.long))

    def select(self, z_pre: PreActivations, site: int) -> Support:
        """Return the k · b largest positive entries in training (and learn θ), those above θ in evaluation."""
        if self.training:
            chosen = largest_of_batch(z_pre, self.k)
            self.learn(chosen.least, site)
            return chosen.support
        if not self.updates[site]:
            return super().select(z_pre, site)
        return Support.where(z_pre > self.theta[site])

    def thresholds(self, site: int) -> LatentVector | None:
        """Return the site's threshold, for every latent."""
        return self.theta[site].expand(self.n_latents) if self.updates[site] else None

    def select_shared(self, summed: PreActivations) -> Support:
        """Return the k · b largest positive entries of the summed z_pre."""
        return largest_of_batch(summed, self.k).support

    @torch.no_grad()
    def learn(self, least: Float[Tensor, ""], site: int) -> None:
        """Take the smallest selected z_pre of a batch into θ; ∞, where nothing was selected, is left out."""
        found = torch.isfinite(least)
        rate = (1.0 / (self.updates[site] + 1).to(self.theta)).clamp_min(self.RATE)
        moved = self.theta[site] + rate * (least - self.theta[site])
        self.theta[site] = torch.where(found, moved, self.theta[site])
        self.updates[site] += found
