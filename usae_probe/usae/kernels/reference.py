"""The `reference` kernel: dense and plain autograd, the oracle for every other one."""

from __future__ import annotations

from ...shapes import Decoder, RowMatrix
from .base import Entries, PreActivations, Precision, SiteEncoder, Support


class ReferenceKernel:
    """Dense products, any device and dtype.

    Args:
        reason: why this kernel was picked.
    """

    name = "reference"
    precision: Precision = "fp32"
    dense = 1.0

    def __init__(self, reason: str = "asked for") -> None:
        self.reason = reason

    def pre(self, x: RowMatrix, encoder: SiteEncoder) -> PreActivations:
        """Return z_pre, with its graph."""
        return (x - encoder.b_dec) @ encoder.w_enc.T + encoder.b_enc

    def at(self, z_pre: PreActivations | None, support: Support, x: RowMatrix, encoder: SiteEncoder) -> Entries:
        """Gather from z_pre."""
        z_pre = self.pre(x, encoder) if z_pre is None else z_pre
        return z_pre[support.rows, support.columns]

    def decode(self, values: Entries, support: Support, w_dec: Decoder) -> RowMatrix:
        """Scatter into a dense z and multiply."""
        z = values.new_zeros(support.n_rows, support.n_latents)
        return z.index_put((support.rows, support.columns), values, accumulate=True) @ w_dec
