"""The `csr` kernel: sparse products on CPU; gradients touch the selected latents only."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...shapes import Decoder, RowMatrix
from .base import Entries, PreActivations, SiteEncoder, Support


class CsrKernel:
    """Sparse products by CSR matrices (MKL on CPU)."""

    name = "csr"

    def pre(self, x: RowMatrix, encoder: SiteEncoder) -> PreActivations:
        """Return z_pre without a graph: `at` has the gradient."""
        with torch.no_grad():
            return torch.addmm(encoder.b_enc, x - encoder.b_dec, encoder.w_enc.T)

    def at(self, z_pre: PreActivations, support: Support, x: RowMatrix, encoder: SiteEncoder) -> Entries:
        """Gather from z_pre; gradients are sparse products."""
        values: Entries = _At.apply(z_pre, support, x, *encoder)
        return values

    def decode(self, values: Entries, support: Support, w_dec: Decoder) -> RowMatrix:
        """Multiply the CSR code with W_dec."""
        x_hat: RowMatrix = _Decode.apply(values, support, w_dec)
        return x_hat


class _At(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_pre: Tensor, support: Support, x: Tensor, w_enc: Tensor, b_enc: Tensor, b_dec: Tensor
    ) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(x, w_enc, b_dec)
        return z_pre[support.rows, support.columns]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_enc, b_dec = ctx.saved_tensors
        support: Support = ctx.support
        _, _, wants_x, wants_w, *wants_biases = ctx.needs_input_grad
        grad_x = matrix(support, grad) @ w_enc if wants_x else None
        grad_w = matrix_t(support, grad) @ (x - b_dec) if wants_w else None
        grad_b_enc = grad_b_dec = None
        if any(wants_biases):
            grad_b_enc = grad.new_zeros(support.n_latents).index_add_(0, support.columns, grad)
            grad_b_dec = -(grad_b_enc @ w_enc)
        return None, None, grad_x, grad_w, grad_b_enc, grad_b_dec


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, support: Support, w_dec: Tensor) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(values, w_dec)
        return matrix(support, values) @ w_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, w_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad = grad.contiguous()
        wants_values, _, wants_w = ctx.needs_input_grad
        grad_values = None
        if wants_values:
            pattern = matrix(support, torch.zeros_like(values))
            grad_values = torch.sparse.sampled_addmm(pattern, grad, w_dec.T, beta=0.0).values()
        grad_w = matrix_t(support, values) @ grad if wants_w else None
        return grad_values, None, grad_w


def matrix(support: Support, values: Entries) -> Tensor:
    """Return z as a CSR matrix [b, n]."""
    return _csr(support.pointers, support.columns, values, (support.n_rows, support.n_latents))


def matrix_t(support: Support, values: Entries) -> Tensor:
    """Return zᵀ as a CSR matrix [n, b]."""
    pointers, rows, order = support.transposed
    return _csr(pointers, rows, values[order], (support.n_latents, support.n_rows))


def _csr(pointers: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Make a CSR tensor unchecked; the one place that silences torch's one-time beta warning about the layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR tensor support is in beta.*")
        return torch.sparse_csr_tensor(pointers, columns, values.contiguous(), size, check_invariants=False)
