"""Kernels whose gradients touch the selected latents only: autograd around three sparse products."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...shapes import Decoder, RowMatrix
from .base import Entries, PreActivations, Precision, SiteEncoder, Support
from .precision import encoder_product
from .workspace import Workspace


@runtime_checkable
class SparseProducts(Protocol):
    """The three products with a sparse z (given by its entries at a support) that a sparse kernel is made of."""

    def rows_product(self, values: Entries, support: Support, w: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """Return z W."""
        ...

    def columns_product(self, values: Entries, support: Support, x: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
        """Return zᵀ x, summed in the same order whenever it is called; nobody else may hold the tensor."""
        ...

    def entry_products(self, support: Support, x: Float[Tensor, "b d"], w: Float[Tensor, "n d"]) -> Entries:
        """Return (x Wᵀ) at the support: ⟨x_r, w_c⟩ for every entry (r, c)."""
        ...

    def latent_sums(self, values: Entries, support: Support) -> Float[Tensor, " n"]:
        """Return the sum of each latent's entries."""
        ...


class SparseKernel:
    """A kernel by sparse products; its z_pre has no graph, the gradient goes through `at`.

    With `bf16`, z_pre comes from a product of bfloat16 factors (summed in float32, then rounded) and only decides
    which latents are selected; the values at the support are computed anew from the float32 factors.

    Args:
        name: of the kernel.
        products: how the sparse products are made.
        precision: of the encoder product.
        reason: why this kernel was picked.
    """

    def __init__(self, name: str, products: SparseProducts, precision: Precision, reason: str) -> None:
        self.name, self.reason, self.precision = name, reason, precision
        self._products = products
        self._workspace = Workspace()

    @property
    def dense(self) -> float:
        """Share of its products with z so far for which z was made dense: none, unless the kernel says otherwise."""
        return 0.0

    def pre(self, x: RowMatrix, encoder: SiteEncoder) -> PreActivations:
        """Return z_pre without a graph: `at` has the gradient."""
        with torch.no_grad():
            return encoder_product(x, encoder, self.precision, self._workspace)

    def at(self, z_pre: PreActivations | None, support: Support, x: RowMatrix, encoder: SiteEncoder) -> Entries:
        """Gather from z_pre, or compute anew where it is not there or not precise; gradients are sparse products."""
        exact = self.precision == "fp32"
        values: Entries = _At.apply(z_pre if exact else None, support, self._products, x, *encoder)
        return values

    def decode(self, values: Entries, support: Support, w_dec: Decoder) -> RowMatrix:
        """Multiply the sparse code with W_dec."""
        x_hat: RowMatrix = _Decode.apply(values, support, self._products, w_dec)
        return x_hat


class _At(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_pre: Tensor | None,
        support: Support,
        products: SparseProducts,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
    ) -> Tensor:
        ctx.support, ctx.products = support, products
        ctx.save_for_backward(x, w_enc, b_dec)
        if z_pre is not None:
            return gathered(z_pre, support)
        return products.entry_products(support, x - b_dec, w_enc).add_(b_enc[support.columns])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_enc, b_dec = ctx.saved_tensors
        support: Support = ctx.support
        products: SparseProducts = ctx.products
        grad = grad.contiguous()
        *_, wants_x, wants_w, wants_b_enc, wants_b_dec = ctx.needs_input_grad
        grad_x = products.rows_product(grad, support, w_enc) if wants_x else None
        grad_b_enc = grad_b_dec = None
        if wants_b_enc or wants_b_dec:
            grad_b_enc = products.latent_sums(grad, support)
            grad_b_dec = -(grad_b_enc @ w_enc)
        grad_w = products.columns_product(grad, support, x - b_dec) if wants_w else None
        return None, None, None, grad_x, grad_w, grad_b_enc, grad_b_dec


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, support: Support, products: SparseProducts, w_dec: Tensor) -> Tensor:
        ctx.support, ctx.products = support, products
        ctx.save_for_backward(values, w_dec)
        return products.rows_product(values, support, w_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, w_dec = ctx.saved_tensors
        support: Support = ctx.support
        products: SparseProducts = ctx.products
        grad = grad.contiguous()
        wants_values, _, _, wants_w = ctx.needs_input_grad
        grad_values = products.entry_products(support, grad, w_dec) if wants_values else None
        grad_w = products.columns_product(values, support, grad) if wants_w else None
        return grad_values, None, None, grad_w


def gathered(z_pre: PreActivations, support: Support) -> Entries:
    """Return z_pre at the support, in a tensor of its own."""
    if support.per_row is None:
        return z_pre[support.rows, support.columns]
    return z_pre.gather(1, support.columns.view(support.n_rows, support.per_row)).flatten()
