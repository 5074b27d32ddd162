"""Which latents are active: the k largest of each row."""

from __future__ import annotations

import torch

from ...shapes import Indices
from .base import PreActivations


def select_topk(z_pre: PreActivations, k: int) -> Indices:
    """Return the indices of the k largest entries of each row, [b, k], in no order."""
    return torch.topk(z_pre.detach(), k, dim=1, sorted=False).indices
