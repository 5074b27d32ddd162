"""ReLU codes that a penalty on their size keeps sparse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...shapes import Decoder, LatentVector
from ..kernels import PreActivations, Support
from ..kernels.base import Entries
from .base import Sparsity, mean_per_row


class L1(Sparsity):
    """z = relu(z_pre) for all latents, with a penalty on the decoded size of the code.

        l1_coef · min(1, progress / anneal) · M · mean_r Σ_k z_rk ‖W_dec,k‖ / √(Σ_j d_j)

    ‖W_dec,k‖ is the norm of the concatenated decoder row (√M by the constraint) and √(Σ_j d_j) that of a typical
    concatenated row x̃; M, because the reconstruction is summed over M sites. So the coefficient means the same for
    any number and width of sites. It rises linearly from 0 over the first `anneal` share of the steps. k is not used:
    how many latents are active is the penalty's affair, and the support is dense at first. One support for all sites:
    where Σ_i z_pre,i > 0.
    """

    name = "l1"

    def select(self, z_pre: PreActivations, site: int) -> Support:
        """Return the positive entries."""
        return Support.where(z_pre > 0)

    def thresholds(self, site: int) -> LatentVector | None:
        """Return zeros: every positive z_pre is active."""
        return torch.zeros(self.n_latents)

    def penalty(self, at: Entries, values: Entries, support: Support, site: int, w_dec: Decoder) -> Tensor:
        """Return the weighted size of the code."""
        anneal = self.settings["anneal"]
        rising = min(1.0, self.progress / anneal) if anneal > 0 else 1.0
        sizes = values * w_dec.norm(dim=1)[support.columns]
        weight = self.settings["l1_coef"] * rising * self.n_sites / math.sqrt(w_dec.shape[1])
        return weight * mean_per_row(sizes, support)
