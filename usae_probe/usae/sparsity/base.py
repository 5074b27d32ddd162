"""What every sparsity has in common: which latents are active in a row, with what values, and at what price."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...config import TrainConfig
from ...config.sparsities import SPARSITY_KEYS
from ...errors import ConfigError
from ...shapes import Decoder, LatentVector
from ...world import current
from ..kernels import PreActivations, Support, select_topk
from ..kernels.base import Entries
from ..kernels.selection import select_batch_topk


class Sparsity(nn.Module):
    """How z_pre becomes z. By itself: the k largest z_pre of each row, and relu of them.

    In training mode (`train()`) batches may be looked at as a whole and statistics are learnt; in evaluation mode
    (`eval()`) a row's code depends on that row alone.

    Args:
        k: active latents per row, exactly or in the mean.
        n_latents: latents of the code.
        n_sites: number of sites.
        settings: values of the `[train]` keys that it uses; default: the config's defaults.
    """

    name: ClassVar[str]
    joint: ClassVar[bool] = False
    """Whether all steps of training give the sites one support."""

    def __init__(self, k: int, n_latents: int, n_sites: int, settings: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.k, self.n_latents, self.n_sites = k, n_latents, n_sites
        keys = SPARSITY_KEYS.get(self.name, ())
        unused = [key for key in settings or {} if key not in keys]
        if unused:
            raise ConfigError(
                f"sparsity '{self.name}' does not use {', '.join(unused)}", hint=f"it uses {', '.join(keys) or 'none'}"
            )
        self.settings = {key: float(TrainConfig.model_fields[key].default) for key in keys} | dict(settings or {})
        self.progress = 1.0

    def anneal(self, progress: float) -> None:
        """Say how far training is, 0 to 1: what changes on the way is a function of it alone."""
        self.progress = progress

    def select(self, z_pre: PreActivations, site: int) -> Support:
        """Return which latents are active.

        Args:
            z_pre: [b, n], no gradient is wanted.
            site: position of the site that the rows come from.
        """
        return Support.of(select_topk(z_pre, self.k), z_pre.shape[1])

    def select_shared(self, summed: PreActivations) -> Support:
        """Return one support for all sites, of training rows.

        Args:
            summed: [b, n] Σ_i z_pre,i, no gradient is wanted.
        """
        return self.select(summed, 0)

    def thresholds(self, site: int) -> LatentVector | None:
        """Return θ with z = z_pre · H(z_pre − θ) in evaluation; None where the k largest z_pre of a row are active."""
        return None

    def activate(self, at: Entries, support: Support, site: int) -> Entries:
        """Return z at the support, from z_pre there."""
        return torch.relu(at)

    def activate_shared(self, at: Float[Tensor, "m e"], support: Support) -> Float[Tensor, "m e"]:
        """Return every site's own z at a support that was chosen for all of them."""
        return torch.relu(at)

    def penalty(self, at: Entries, values: Entries, support: Support, site: int, w_dec: Decoder) -> Tensor:
        """Return what the loss of a batch gets for its code, 0 without one.

        Args:
            at: z_pre at the support; `values` is z there.
            support: which latents are active.
            site: position of the site that the rows come from.
            w_dec: [n, Σ d_in], all sites' decoders side by side.
        """
        return values.new_zeros(())


class OfBatch(NamedTuple):
    """The largest entries of a batch.

    Attributes:
        support: where they are, in the rows of this process.
        least: the smallest of them, in all processes; ∞ where there are none.
    """

    support: Support
    least: Float[Tensor, ""]


def largest_of_batch(z_pre: PreActivations, k: int) -> OfBatch:
    """Return the k · b largest positive entries of b rows, over all processes that train together."""
    world = current()
    if world.size == 1:
        support = select_batch_topk(z_pre, k)
        at = z_pre[support.rows, support.columns]
        return OfBatch(support, at.min() if len(at) else z_pre.new_full((), torch.inf))
    least = world.kth_largest(z_pre, k * len(z_pre) * world.size)
    if least <= 0:  # fewer positive entries than that: all of them
        least = -world.kth_largest(-z_pre.masked_fill(z_pre <= 0, torch.inf), 1)
    return OfBatch(Support.where(z_pre >= least), least)


def mean_per_row(entries: Entries, support: Support) -> Float[Tensor, ""]:
    """Return the sum of a row's entries, in the mean over the rows."""
    return entries.sum() / max(1, support.n_rows)
