"""Nested dictionaries (Matryoshka SAEs, arXiv 2503.17547): the first g latents reconstruct by themselves too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..shapes import Decoder
from .kernels import Kernel, Support
from .kernels.base import Entries


def decode_nested(
    kernel: Kernel, values: Entries, support: Support, w_dec: Decoder, sizes: Sequence[int]
) -> Float[Tensor, "g b d"]:
    """Return x_hat_g = Σ_{k < sizes[g]} z_k W_dec,k for every size, all by one product: each entry is decoded once.

    The entries of row r between two sizes make a row of their own, [b · g, d]; their running sums over g are the x_hat.

    Args:
        kernel: what decodes.
        values: z at the support.
        support: which latents are active.
        w_dec: [n, d].
        sizes: rising, the last n; none for n alone.
    """
    if len(sizes) < 2:
        return kernel.decode(values, support, w_dec)[None]
    inner = torch.tensor(sizes[:-1], device=values.device)
    group = torch.bucketize(support.columns, inner, right=True)
    parts = support.rows * len(sizes) + group
    order = torch.argsort(parts, stable=True)
    counts = torch.bincount(parts, minlength=support.n_rows * len(sizes))
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    decoded = kernel.decode(values[order], Support(support.columns[order], pointers, support.n_latents), w_dec)
    return decoded.reshape(support.n_rows, len(sizes), w_dec.shape[1]).cumsum(1).transpose(0, 1)
