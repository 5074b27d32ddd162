"""Whether a USAE can be made as it is asked for, and whether its code is a bottleneck."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from ..config.sparsities import check_matryoshka
from ..errors import ConfigError, UsaeProbeWarning


def check_shape(d_in: Mapping[str, int], n_latents: int, k: int, sparsity: str, matryoshka: Sequence[int]) -> None:
    """Check what a USAE is made with.

    Raises:
        ConfigError: when k > n_latents, there is no site, or the nested sizes do not fit.
    """
    if not d_in:
        raise ConfigError("a USAE needs at least one site", hint="give d_in = {'model/layer': dimensions}")
    if not 1 <= k <= n_latents:
        raise ConfigError(f"k = {k} is not between 1 and n_latents = {n_latents}", hint="choose k well under n_latents")
    try:
        check_matryoshka(matryoshka, n_latents, sparsity)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    warn_without_bottleneck(d_in, k, sparsity)


def warn_without_bottleneck(d_in: Mapping[str, int], k: int, sparsity: str = "topk") -> None:
    """Warn when k active latents are no fewer than the dimensions of the narrowest site; `l1` does not use k."""
    narrow = min(d_in, key=lambda site: d_in[site])
    if k >= d_in[narrow] and sparsity != "l1":
        warnings.warn(
            f"k = {k} active latents for rows of d_in = {d_in[narrow]} ('{narrow}') is no bottleneck: any dictionary "
            "can reconstruct them; choose k well under the smallest d_in",
            UsaeProbeWarning,
            stacklevel=3,
        )
