"""How z_pre becomes the sparse code z: which latents are active, and their values."""

from __future__ import annotations

import torch
from torch import nn

from .kernels import PreActivations, Support, select_topk
from .kernels.base import Entries


class TopK(nn.Module):
    """The k largest z_pre of each row, and relu of them (arXiv 2406.04093).

    Args:
        k: active latents per row.
    """

    name = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def select(self, z_pre: PreActivations, site: int) -> Support:
        """Return which latents are active.

        Args:
            z_pre: [b, n], no gradient is wanted.
            site: position of the site that the rows come from.
        """
        return Support.of(select_topk(z_pre, self.k), z_pre.shape[1])

    def activate(self, at: Entries, support: Support, site: int) -> Entries:
        """Return z at the support, from z_pre there."""
        return torch.relu(at)
