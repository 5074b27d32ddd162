"""What kernels work on: supports, codes, one site's encoder; and the operations that a kernel has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...shapes import Decoder, Encoder, Indices, LatentVector, RowMatrix, SiteVector, Values

PreActivations = Float[Tensor, "b n"]
"""z_pre of all latents."""
Entries = Float[Tensor, " e"]
"""One number per entry of a support, row by row."""
Precision = Literal["fp32", "bf16"]
"""Of the factors of the encoder product; everything is summed in float32."""


class Codes(NamedTuple):
    """A sparse code z of n_latents entries per row, k of them stored.

    Attributes:
        values: [b, k], ≥ 0; a stored latent with value 0 does not fire.
        indices: [b, k], int64; those with a positive value are distinct within a row. In no order.
    """

    values: Values
    indices: Indices


class SiteEncoder(NamedTuple):
    """The parameters that make z_pre of one site's rows."""

    w_enc: Encoder
    b_enc: LatentVector
    b_dec: SiteVector


@dataclass(frozen=True)
class Support:
    """Which latents are active in each row, with what the sparse products need of it (made once, used by all).

    Rows may have different numbers of entries: row r has those from `pointers[r]` to `pointers[r + 1]`.

    Attributes:
        columns: [e] int64, the latents of all rows, row by row.
        pointers: [b + 1] int64.
        n_latents: width of z.
        per_row: entries of each row where all have the same number.
    """

    columns: Int[Tensor, " e"]
    pointers: Int[Tensor, " b1"]
    n_latents: int
    per_row: int | None = None

    @classmethod
    def of(cls, indices: Indices, n_latents: int) -> Support:
        """Make a support of the same number of latents in each row, [b, k]."""
        rows, k = indices.shape
        pointers = torch.arange(rows + 1, device=indices.device) * k
        return cls(indices.reshape(-1), pointers, n_latents, per_row=k)

    @classmethod
    def where(cls, mask: Tensor) -> Support:
        """Make a support of the true entries of a [b, n] mask."""
        counts = mask.sum(1)
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(mask.nonzero()[:, 1], pointers, mask.shape[1])

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.pointers) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " e"]:
        """The row of each entry."""
        every = torch.arange(self.n_rows, device=self.columns.device)
        return every.repeat_interleave(self.pointers.diff(), output_size=len(self.columns))

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same entries latent by latent: pointers [n + 1], rows [e], and the order in which entries go there."""
        order = torch.argsort(self.columns.int(), stable=True)  # half the digits of int64 to sort by
        counts = torch.bincount(self.columns, minlength=self.n_latents)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), self.rows[order], order

    def codes(self, values: Entries) -> Codes:
        """Return values at this support as codes, padded to the longest row (with latent 0, which does not fire)."""
        if self.per_row is not None:
            shape = (self.n_rows, self.per_row)
            return Codes(values.reshape(shape), self.columns.reshape(shape))
        longest = int(self.pointers.diff().max()) if self.n_rows else 0
        place = torch.arange(len(self.columns), device=values.device) - self.pointers[:-1][self.rows]
        dense = values.new_zeros(self.n_rows, longest).index_put((self.rows, place), values)
        indices = self.columns.new_zeros(self.n_rows, longest).index_put((self.rows, place), self.columns)
        return Codes(dense, indices)


@runtime_checkable
class Kernel(Protocol):
    """The three operations a USAE is made of; none of them knows how latents are chosen.

    Attributes:
        name: `reference`, `csr` or `triton`.
        reason: why it runs: asked for, picked by `auto`, or in the place of one that cannot run.
        precision: of the factors of the encoder product.
    """

    name: str
    reason: str
    precision: Precision

    @property
    def dense(self) -> float:
        """Share of its products with z so far for which z was made dense."""
        ...

    def pre(self, x: RowMatrix, encoder: SiteEncoder) -> PreActivations:
        """Return z_pre = (x − b_dec) W_encᵀ + b_enc, [b, n]; without a graph where `at` has the gradient."""
        ...

    def at(self, z_pre: PreActivations | None, support: Support, x: RowMatrix, encoder: SiteEncoder) -> Entries:
        """Return z_pre at the support, [e], differentiable in x and the encoder's parameters; without z_pre, anew."""
        ...

    def decode(self, values: Entries, support: Support, w_dec: Decoder) -> RowMatrix:
        """Return z W_dec, [b, d], differentiable in values and w_dec; entries of one latent in one row add up."""
        ...


def to_dense(codes: Codes, n_latents: int) -> Float[Tensor, "b n"]:
    """Spread codes into a dense matrix (for inspection of a few rows; nothing in training or evaluation uses it)."""
    dense = codes.values.new_zeros(len(codes.values), n_latents)
    return dense.scatter_add(1, codes.indices, codes.values)
