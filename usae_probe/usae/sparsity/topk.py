"""The k largest of each row: by themselves, softly at first, or of all sites together."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..kernels import PreActivations, Support, select_topk
from ..kernels.base import Entries
from .base import Sparsity


class TopK(Sparsity):
    """The k largest z_pre of each row, and relu of them (arXiv 2406.04093)."""

    name = "topk"


class GlobalTopK(Sparsity):
    """One support for all sites in every step of training: the k largest of the summed z_pre (SPARC's Global TopK).

        S_r = the k largest of Σ_i z_pre,i[r],   z_i[r] = relu(z_pre,i[r]) on S_r.

    Every site keeps its own values. Evaluation encodes each site alone, by its own k largest. Mind that what only one
    model represents competes with what all of them do, with 1/M of the weight in the sum, and that no site ever learns
    to choose by itself: atoms private to one model stay unfound more often than with `topk`.
    """

    name = "global-topk"
    joint = True


class SoftTopK(Sparsity):
    """Top k whose edge is soft at first and becomes hard.

        z = relu(z_pre) · σ((z_pre − θ_r) / T)   on the `soft_width` · k largest z_pre of the row, else 0,

    θ_r halfway between the row's k-th and (k+1)-th largest z_pre, no gradient through it. The temperature falls
    exponentially, T = temperature · .01^(progress / anneal), over the first `anneal` share of the steps; from then on,
    and in evaluation, the code is that of `topk`. With one support for all sites, z_pre in the gate is the mean over
    the sites, and every site's own relu(z_pre) goes through it.
    """

    name = "soft-topk"
    LAST = 0.01

    @property
    def temperature(self) -> float:
        """T of the present progress; 0 where the code is hard."""
        along = self.progress / self.settings["anneal"] if self.settings["anneal"] > 0 else 1.0
        return self.settings["temperature"] * self.LAST**along if along < 1.0 and self.training else 0.0

    def select(self, z_pre: PreActivations, site: int) -> Support:
        """Return the `soft_width` · k largest while the edge is soft, then the k largest."""
        wide = max(self.k + 1, math.ceil(self.settings["soft_width"] * self.k)) if self.temperature else self.k
        return Support.of(select_topk(z_pre, min(wide, z_pre.shape[1])), z_pre.shape[1])

    def activate(self, at: Entries, support: Support, site: int) -> Entries:
        """Return relu(z_pre) times its gate."""
        return torch.relu(at) * self._gate(at, support)

    def activate_shared(self, at: Float[Tensor, "m e"], support: Support) -> Float[Tensor, "m e"]:
        """Return every site's relu(z_pre), times the gate of the mean over the sites."""
        return torch.relu(at) * self._gate(at.mean(0), support)

    def _gate(self, at: Entries, support: Support) -> Entries:
        wide = support.per_row or 0
        if not self.temperature or wide <= self.k:  # aux-k and k = n_latents have nothing to leave out
            return torch.ones_like(at)
        rows = at.reshape(support.n_rows, wide)
        edge = rows.detach().topk(self.k + 1, dim=1).values[:, -2:].mean(1, keepdim=True)
        return torch.sigmoid((rows - edge) / self.temperature).reshape(-1)
