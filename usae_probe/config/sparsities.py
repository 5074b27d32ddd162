"""Which settings a sparsity uses, and what nested dictionaries have to be like."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

SPARSITY_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "jumprelu": ("l0_coef", "bandwidth"),
        "l1": ("l1_coef", "anneal"),
        "soft-topk": ("temperature", "soft_width", "anneal"),
    }
)
"""Keys of `[train]` that only some sparsities use."""

NESTED = ("topk", "batchtopk")
"""Sparsities that nested dictionaries can be combined with."""


def check_matryoshka(sizes: Sequence[int], n_latents: int, sparsity: str) -> None:
    """Check the sizes of nested dictionaries.

    Raises:
        ValueError: saying which sizes there can be.
    """
    if not sizes:
        return
    if sparsity not in NESTED:
        raise ValueError(
            f"matryoshka cannot be combined with sparsity '{sparsity}', only with {' and '.join(NESTED)}: "
            "leave it out, or change the sparsity"
        )
    if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"matryoshka = {list(sizes)}: expected sizes of at least 1, each larger than the one before")
    if sizes[-1] != n_latents:
        raise ValueError(
            f"matryoshka = {list(sizes)} ends with {sizes[-1]}, but n_latents = {n_latents}: the last size must be that"
        )


def check_used(changed: Collection[str], sparsity: str) -> None:
    """Check that the keys of `[train]` which differ from their defaults are used by a sparsity.

    Raises:
        ValueError: naming the first that is not, and which sparsity uses it.
    """
    for key in sorted({key for keys in SPARSITY_KEYS.values() for key in keys} & set(changed)):
        if key not in SPARSITY_KEYS.get(sparsity, ()):
            users = " and ".join(f"'{name}'" for name, keys in SPARSITY_KEYS.items() if key in keys)
            raise ValueError(
                f"train.{key} is used by sparsity {users} only, and usae.sparsity is '{sparsity}': leave it out"
            )
