"""The `csr` kernel: sparse products on CPU, row by row over the pattern that pointers and columns give."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from .base import Entries, Precision, Support
from .sparse import SparseKernel, gathered
from .workspace import Workspace

DENSE_SHARE = 0.15
"""Share of z's places that are entries, above which the dense product is faster (measured, see tests/benchmarks)."""
_STRIP = 128  # columns of the right factor taken together where its rows are read often: they then stay in the cache
_OFTEN = 8  # entries per row of the right factor from which that pays
_CACHE = 2 << 20  # bytes of such a strip, at most
_PART = 8 << 20  # bytes of a result made together, before they go to their place: not fresh memory for each


class CsrKernel(SparseKernel):
    """Sparse products on CPU, any floating dtype; fastest in float32.

    Args:
        precision: of the encoder product.
        reason: why this kernel was picked.
        dense_share: share of z's places that are entries, above which products are dense.
    """

    def __init__(
        self, precision: Precision = "fp32", reason: str = "asked for", *, dense_share: float = DENSE_SHARE
    ) -> None:
        products = CsrProducts(dense_share)
        super().__init__("csr", products, precision, reason)
        self._made = products.made

    @property
    def dense(self) -> float:
        """Share of its products with z so far for which z was made dense."""
        return self._made["dense"] / max(1, self._made.total())


class CsrProducts:
    """Products with a sparse z; where z is not sparse, it is made dense for as long as they take.

    z W and zᵀ x are sums of weighted rows, which `embedding_bag` does faster than MKL's CSR product (zᵀ x at 8168
    latents: 12 against 139 ms).

    Args:
        dense_share: share of z's places that are entries, above which it is dense.

    Attributes:
        made: how many products were made `sparse` and `dense`.
    """

    def __init__(self, dense_share: float = DENSE_SHARE) -> None:
        self.dense_share = dense_share
        self.made: Counter[str] = Counter()
        self.workspace = Workspace()

    def rows_product(self, values: Entries, support: Support, w: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """Return z W."""
        if self._is_dense(support):
            return _dense(values, support) @ w
        return self._weighted_sums(support.pointers, support.columns, values, w)

    def columns_product(self, values: Entries, support: Support, x: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
        """Return zᵀ x."""
        if self._is_dense(support):
            return _dense(values, support).T @ x
        pointers, rows, order = support.transposed
        return self._weighted_sums(pointers, rows, values[order], x)

    def entry_products(self, support: Support, x: Float[Tensor, "b d"], w: Float[Tensor, "n d"]) -> Entries:
        """Return (x Wᵀ) at the support; latent by latent, so that a row of W is read once."""
        if self._is_dense(support):
            return gathered(x @ w.T, support)
        pointers, rows, order = support.transposed
        pattern = _csr(pointers, rows, x.new_zeros(len(rows)), (support.n_latents, support.n_rows))
        found = torch.sparse.sampled_addmm(pattern, w, x.T, beta=0.0).values()
        return torch.empty_like(found).index_copy_(0, order, found)

    def latent_sums(self, values: Entries, support: Support) -> Float[Tensor, " n"]:
        """Return the sum of each latent's entries."""
        return values.new_zeros(support.n_latents).index_add_(0, support.columns, values)

    def _is_dense(self, support: Support) -> bool:
        """Decide about one product, and count it."""
        # with more entries than places (latents twice in a row) sampled_addmm refuses the pattern
        dense = len(support.columns) > min(self.dense_share, 1.0) * support.n_rows * support.n_latents
        self.made["dense" if dense else "sparse"] += 1
        return dense

    def _weighted_sums(self, pointers: Tensor, columns: Tensor, values: Tensor, source: Tensor) -> Tensor:
        """Return Σ_e values[e] source[columns[e]] over the entries of each row, [len(pointers) − 1, d]."""
        rows, d = len(pointers) - 1, source.shape[1]
        source, values = source.detach(), values.detach()
        if not len(columns):
            return source.new_zeros(rows, d)
        width = _STRIP * source.itemsize
        fits = len(source) * width <= _CACHE and rows * width <= _PART
        if fits and d > _STRIP and len(columns) >= _OFTEN * len(source):
            out = self.workspace.empty((rows, d), source.dtype, source.device)
            for start in range(0, d, _STRIP):
                strip = slice(start, start + _STRIP)
                out[:, strip] = _bags(pointers, columns, values, source[:, strip])
            return out
        together = max(1, _PART // (d * source.itemsize))
        if rows <= together:
            return _bags(pointers, columns, values, source)
        out = self.workspace.empty((rows, d), source.dtype, source.device)
        starts = list(range(0, rows, together))
        edges = pointers[torch.tensor([*starts, rows])].tolist()
        for start, first, last in zip(starts, edges, edges[1:], strict=False):
            part = pointers[start : start + together + 1] - first
            out[start : start + together] = _bags(part, columns[first:last], values[first:last], source)
        return out


def _bags(pointers: Tensor, columns: Tensor, values: Tensor, source: Tensor) -> Tensor:
    if not len(columns):
        return source.new_zeros(len(pointers) - 1, source.shape[1])
    return embedding_bag(columns, source, pointers, mode="sum", per_sample_weights=values, include_last_offset=True)


def _dense(values: Tensor, support: Support) -> Tensor:
    places = support.rows * support.n_latents + support.columns
    flat = values.new_zeros(support.n_rows * support.n_latents).index_add_(0, places, values.detach())
    return flat.view(support.n_rows, support.n_latents)


def _csr(pointers: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Make a CSR tensor unchecked; the one place that silences torch's one-time beta warning about the layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR tensor support is in beta.*")
        return torch.sparse_csr_tensor(pointers, columns, values, size, check_invariants=False)
