"""The `triton` kernel: sparse products on CUDA. The programs themselves are imported when they are first needed."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import first_line
from .base import Entries, Precision, Support
from .sparse import SparseKernel

_BLOCK = 256  # columns per program
_ENTRIES = 16  # entries per program of the sampled product
_DTYPES = (torch.float32, torch.float64)


class TritonKernel(SparseKernel):
    """Sparse products on CUDA; the encoder product is cuBLAS's. Deterministic: no atomics.

    Args:
        precision: of the encoder product.
        reason: why this kernel was picked.
    """

    def __init__(self, precision: Precision = "fp32", reason: str = "asked for") -> None:
        super().__init__("triton", TritonProducts(), precision, reason)


class TritonProducts:
    """Products with a sparse z by two programs: sums of weighted rows, and products at the support."""

    def rows_product(self, values: Entries, support: Support, w: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """Return z W."""
        return _weighted_sums(support.pointers, support.columns, values, w)

    def columns_product(self, values: Entries, support: Support, x: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
        """Return zᵀ x, latent by latent over the transposed pattern."""
        pointers, rows, order = support.transposed
        return _weighted_sums(pointers, rows, values.detach()[order], x)

    def entry_products(self, support: Support, x: Float[Tensor, "b d"], w: Float[Tensor, "n d"]) -> Entries:
        """Return (x Wᵀ) at the support."""
        x, w = _columns_adjacent(x), _columns_adjacent(w)
        out = x.new_empty(len(support.columns))
        if len(out):
            grid = (-(-len(out) // _ENTRIES),)
            with _on(out):
                _programs().entry_products[grid](
                    support.rows, support.columns.contiguous(), x, w, out,
                    len(out), x.shape[1], x.stride(0), w.stride(0),
                    ENTRIES=_ENTRIES, BLOCK=_block(x.shape[1], 64), TOTAL=_total(out),
                )  # fmt: skip
        return out

    def latent_sums(self, values: Entries, support: Support) -> Float[Tensor, " n"]:
        """Return the sum of each latent's entries, in the order of the rows."""
        return self.columns_product(values, support, values.new_ones(support.n_rows, 1)).squeeze(1)


def _weighted_sums(pointers: Tensor, columns: Tensor, values: Tensor, source: Tensor) -> Tensor:
    source, (rows, width) = source.detach(), (len(pointers) - 1, source.shape[1])
    out = source.new_empty(rows, width)
    if out.numel():
        block = _block(width, _BLOCK)
        with _on(out):
            _programs().weighted_sums[(rows, -(-width // block))](
                pointers, columns.contiguous(), values.detach().contiguous(), source, out,
                width, source.stride(0), source.stride(1), BLOCK=block, TOTAL=_total(out),
            )  # fmt: skip
    return out


def _columns_adjacent(matrix: Tensor) -> Tensor:
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _block(width: int, most: int) -> int:
    return int(min(most, 1 << max(4, (width - 1).bit_length())))  # a power of two, as Triton wants it


def _on(tensor: Tensor) -> Any:
    # Triton launches on the current device; for a CPU tensor this does nothing
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def _total(out: Tensor) -> Any:
    tl = importlib.import_module("triton.language")
    return tl.float64 if out.dtype == torch.float64 else tl.float32


def _programs() -> Any:
    from . import triton_programs

    return triton_programs


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the `triton` kernel cannot run there, or None. Compiles and runs the programs once per device."""
    if dtype not in _DTYPES:
        return f"it computes in float32 or float64, not in {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.type != "cuda" and not is_interpreted():
        return f"it runs on CUDA, not on {device.type}"
    return _trial(device, dtype)


def is_interpreted() -> bool:
    """Return whether Triton runs its programs in Python, on any device, as TRITON_INTERPRET=1 makes it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        support = Support.of(torch.tensor([[0, 2], [2, 1]], device=device), 3)
        w = torch.arange(6.0, dtype=dtype, device=device).view(3, 2)
        z = torch.tensor([[1.0, 0.0, 2.0], [0.0, 4.0, 3.0]], dtype=dtype, device=device)
        values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype, device=device)
        products = TritonProducts()
        right = products.rows_product(values, support, w).equal(z @ w)
        right &= products.columns_product(values, support, z @ w).equal(z.T @ z @ w)
        right &= products.entry_products(support, z @ w, w).equal(
            (z @ w @ w.T).gather(1, support.columns.view(2, 2)).flatten()
        )
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        return f"{type(error).__name__}: {first_line(error)}"
    return None if right else "it computed a wrong result on this device"
