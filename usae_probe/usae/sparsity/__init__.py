"""How z_pre becomes the sparse code z: which latents are active, and their values."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import ConfigError
from .base import Sparsity
from .batchtopk import BatchTopK
from .jumprelu import JumpReLU
from .l1 import L1
from .topk import GlobalTopK, SoftTopK, TopK

SPARSITIES: dict[str, type[Sparsity]] = {
    kind.name: kind for kind in (TopK, BatchTopK, JumpReLU, L1, SoftTopK, GlobalTopK)
}


def make_sparsity(
    name: str, k: int, n_latents: int, n_sites: int, settings: Mapping[str, float] | None = None
) -> Sparsity:
    """Return a sparsity by name.

    Raises:
        ConfigError: for an unknown name, or a setting that it does not use.
    """
    if name not in SPARSITIES:
        raise ConfigError(f"unknown sparsity '{name}'", hint=f"expected {', '.join(SPARSITIES)}")
    return SPARSITIES[name](k, n_latents, n_sites, settings)


__all__ = [
    "L1",
    "SPARSITIES",
    "BatchTopK",
    "GlobalTopK",
    "JumpReLU",
    "SoftTopK",
    "Sparsity",
    "TopK",
    "make_sparsity",
]
