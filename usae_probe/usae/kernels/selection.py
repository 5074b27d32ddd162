"""Which latents are active: the k largest of each row, or the largest of a whole batch.

z_pre must hold no NaN (a NaN has no place in an order); −inf is allowed. Ties are broken in no particular way, but
what is returned is always distinct.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...shapes import Indices
from .base import PreActivations, Support

_GROUP = 8  # entries whose maximum stands for them
_CHUNK = 1 << 23  # entries of z_pre looked at together: what comes in between stays in the cache
_SAMPLE = 1 << 16  # entries that the bound of a batch is estimated from


def select_topk(z_pre: PreActivations, k: int) -> Indices:
    """Return the indices of the k largest entries of each row, [b, k], distinct and in no order.

    On CPU by grouped maxima: the k largest entries all lie in the k groups with the largest maxima (or ties with one
    that does), so only k · 8 of the n entries are sorted, and the groups are found in the same way.
    """
    z_pre = z_pre.detach()
    if z_pre.device.type != "cpu" or not _is_grouped(z_pre.shape[1], k):
        return torch.topk(z_pre, k, dim=1, sorted=False).indices
    parts = torch.split(z_pre, max(1, _CHUNK // z_pre.shape[1]))
    return torch.cat([_grouped_topk(part, k) for part in parts])


def select_batch_topk(z_pre: PreActivations, k: int) -> Support:
    """Return the k · b largest positive entries of the whole batch (arXiv 2412.06410); fewer where fewer are positive.

    A bound is read off a sample; the entries above it are few, and the largest are chosen among them. If the bound was
    too high, all positive entries are looked at.

    Args:
        z_pre: [b, n].
        k: entries per row, on average.
    """
    z_pre = z_pre.detach()
    flat = z_pre.reshape(-1)
    wanted = min(k * len(z_pre), len(flat))
    places = _above(flat, _bound(flat, wanted))
    if len(places) < wanted:
        places = _above(flat, 0.0)
    if len(places) > wanted:
        largest = torch.topk(flat[places], wanted, sorted=False).indices
        places = places[torch.zeros_like(places, dtype=torch.bool).index_fill_(0, largest, True)]
    n = z_pre.shape[1]
    counts = torch.bincount(places // n, minlength=len(z_pre))
    return Support(places % n, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), n)


def _is_grouped(n: int, k: int) -> bool:
    return n >= 2 * _GROUP * k


def _grouped_topk(z_pre: Tensor, k: int) -> Tensor:
    rows, n = z_pre.shape
    if not _is_grouped(n, k):
        return torch.topk(z_pre, k, dim=1, sorted=False).indices
    groups = n // _GROUP  # group g holds the columns g, g + groups, g + 2 groups, …: maxima of whole rows are fast
    maxima = z_pre[:, : _GROUP * groups].view(rows, _GROUP, groups).amax(1)
    chosen = _grouped_topk(maxima, k)
    steps = torch.arange(0, _GROUP * groups, groups, device=z_pre.device)
    among = (chosen.unsqueeze(1) + steps.view(1, -1, 1)).flatten(1)
    if _GROUP * groups < n:  # columns of no group
        rest = torch.arange(_GROUP * groups, n, device=z_pre.device)
        among = torch.cat([among, rest.expand(rows, -1)], dim=1)
    best = torch.topk(z_pre.gather(1, among), k, dim=1, sorted=False).indices
    return among.gather(1, best)


def _bound(flat: Tensor, wanted: int) -> float:
    """Return a value, ≥ 0, that probably a few more than `wanted` entries lie above; 0 where a sample says nothing."""
    stride = max(1, len(flat) // _SAMPLE) | 1  # odd: no column of a matrix of even width is seen alone
    sample = flat[::stride]
    expected = wanted / stride
    rank = math.ceil(expected + 4.0 * math.sqrt(expected) + 4.0)  # 4 standard deviations of what a sample shows
    if rank >= len(sample):
        return 0.0
    return max(0.0, float(torch.topk(sample, rank, sorted=False).values.min()))


def _above(flat: Tensor, bound: float) -> Tensor:
    return (flat > bound).nonzero().squeeze(1)
