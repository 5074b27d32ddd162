"""A smaller USAE out of a larger one that was trained with nested dictionaries."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .model import USAE


def truncated(usae: USAE, n_latents: int, k: int | None) -> USAE:
    """Return a copy of the first latents of a USAE; see `USAE.truncated`.

    Raises:
        ConfigError: for a size that was not trained, or a k that does not fit.
    """
    if n_latents not in usae.matryoshka:
        sizes = ", ".join(map(str, usae.matryoshka))
        raise ConfigError(
            f"the first {n_latents} of {usae.n_latents} latents were not trained to reconstruct by themselves",
            hint=f"sizes: {sizes}" if sizes else "train with usae.matryoshka = [sizes]",
        )
    smaller = type(usae)(
        usae.d_in,
        n_latents,
        min(usae.k, n_latents) if k is None else k,
        kernel=usae.kernel_name,
        precision=usae.precision,
        grid=usae.grid,
        sparsity=usae.sparsity.name,
        sparsity_settings=usae.sparsity.settings,
        matryoshka=[size for size in usae.matryoshka if size <= n_latents],
    ).to(usae.W_dec)
    with torch.no_grad():
        whole = usae.state_dict()
        for name, value in smaller.state_dict().items():
            value.copy_(whole[name][tuple(slice(size) for size in value.shape)])
    return smaller
