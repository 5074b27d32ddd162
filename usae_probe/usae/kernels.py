"""Kernels: how sparse codes are read off the encoder product and decoded.

`reference` is dense and plain autograd, the oracle. `csr` never makes a dense `[rows, n_latents]` code: values and
gradients go through torch's sparse products on the selected latents only. Both compute, for a support of k latents per
row,

    z_pre = x W_encᵀ + b,   z = relu(z_pre)[support],   x_hat = z W_dec + b_dec.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from ..shapes import Decoder, Encoder, Indices, LatentVector, RowMatrix, SiteVector, Values

PreActivations = Float[Tensor, "b n"]


class Codes(NamedTuple):
    """A sparse code z of n_latents entries per row, k of them stored.

    Attributes:
        values: [b, k], ≥ 0; a selected latent whose z_pre is not positive has value 0 and does not fire.
        indices: [b, k], int64, distinct within a row, in no order.
    """

    values: Values
    indices: Indices


@dataclass(frozen=True)
class Support:
    """Which latents are active in each row, with what the sparse products need of it (made once, used by all).

    Attributes:
        indices: [b, k], int64.
        n_latents: width of z.
    """

    indices: Indices
    n_latents: int

    @cached_property
    def row_pointers(self) -> Tensor:
        """CSR row pointers of z, [b + 1]."""
        rows, k = self.indices.shape
        return torch.arange(0, rows * k + 1, max(k, 1), device=self.indices.device)[: rows + 1]

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """CSR (row pointers [n+1], columns [b·k]) of zᵀ, and the order in which z's values go into it."""
        flat = self.indices.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.n_latents)
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return pointers, order // max(self.indices.shape[1], 1), order

    def matrix(self, values: Values) -> Tensor:
        """Return z as a CSR matrix [b, n]."""
        return _csr(self.row_pointers, self.indices.reshape(-1), values.reshape(-1), (len(values), self.n_latents))

    def matrix_t(self, values: Values) -> Tensor:
        """Return zᵀ as a CSR matrix [n, b]."""
        pointers, columns, order = self.transposed
        return _csr(pointers, columns, values.reshape(-1)[order], (self.n_latents, len(values)))


@runtime_checkable
class Kernel(Protocol):
    """The three operations a USAE is made of."""

    name: str

    def pre(self, x: RowMatrix, w_enc: Encoder, bias: LatentVector) -> PreActivations:
        """Return z_pre = x W_encᵀ + b, [b, n]."""
        ...

    def at(self, z_pre: PreActivations, support: Support, x: RowMatrix, w_enc: Encoder, bias: LatentVector) -> Values:
        """Return relu(z_pre) at the support, [b, k], differentiable in x, w_enc and bias."""
        ...

    def decode(self, values: Values, support: Support, w_dec: Decoder) -> RowMatrix:
        """Return z W_dec, [b, d], differentiable in values and w_dec."""
        ...


class ReferenceKernel:
    """Dense and plain: the oracle for every other kernel. Runs on any device and dtype."""

    name = "reference"

    def pre(self, x: RowMatrix, w_enc: Encoder, bias: LatentVector) -> PreActivations:
        """Return z_pre, with its graph."""
        return x @ w_enc.T + bias

    def at(self, z_pre: PreActivations, support: Support, x: RowMatrix, w_enc: Encoder, bias: LatentVector) -> Values:
        """Gather from z_pre."""
        return torch.relu(z_pre.gather(1, support.indices))

    def decode(self, values: Values, support: Support, w_dec: Decoder) -> RowMatrix:
        """Scatter into a dense z and multiply."""
        z = values.new_zeros(len(values), support.n_latents).scatter(1, support.indices, values)
        return z @ w_dec


class CsrKernel:
    """Sparse products by CSR matrices (MKL on CPU); backward touches the selected latents only."""

    name = "csr"

    def pre(self, x: RowMatrix, w_enc: Encoder, bias: LatentVector) -> PreActivations:
        """Return z_pre without a graph: `at` has the gradient."""
        with torch.no_grad():
            return torch.addmm(bias, x, w_enc.T)

    def at(self, z_pre: PreActivations, support: Support, x: RowMatrix, w_enc: Encoder, bias: LatentVector) -> Values:
        """Gather from z_pre; gradients are sparse products."""
        values: Values = _At.apply(z_pre, support, x, w_enc, bias)
        return values

    def decode(self, values: Values, support: Support, w_dec: Decoder) -> RowMatrix:
        """Multiply the CSR code with W_dec."""
        x_hat: RowMatrix = _Decode.apply(values, support, w_dec)
        return x_hat


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_pre: Tensor, support: Support, x: Tensor, w_enc: Tensor, bias: Tensor) -> Tensor:
        values = torch.relu(z_pre.gather(1, support.indices))
        ctx.support = support
        ctx.save_for_backward(values, x, w_enc)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, x, w_enc = ctx.saved_tensors
        support: Support = ctx.support
        grad = grad * (values > 0)
        _, _, wants_x, wants_w, wants_bias = ctx.needs_input_grad
        grad_x = support.matrix(grad) @ w_enc if wants_x else None
        grad_w = support.matrix_t(grad) @ x if wants_w else None
        grad_bias = None
        if wants_bias:
            grad_bias = grad.new_zeros(support.n_latents).index_add_(0, support.indices.reshape(-1), grad.reshape(-1))
        return None, None, grad_x, grad_w, grad_bias


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, support: Support, w_dec: Tensor) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(values, w_dec)
        return support.matrix(values) @ w_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, w_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad = grad.contiguous()
        wants_values, _, wants_w = ctx.needs_input_grad
        grad_values = None
        if wants_values:
            pattern = support.matrix(torch.zeros_like(values))
            grad_values = torch.sparse.sampled_addmm(pattern, grad, w_dec.T, beta=0.0).values().view_as(values)
        grad_w = support.matrix_t(values) @ grad if wants_w else None
        return grad_values, None, grad_w


def _csr(pointers: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Make a CSR tensor unchecked; the one place that silences torch's one-time beta warning about the layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR tensor support is in beta.*")
        return torch.sparse_csr_tensor(pointers, columns, values, size, check_invariants=False)


def select_topk(z_pre: PreActivations, k: int) -> Indices:
    """Return the indices of the k largest entries of each row, [b, k], in no order."""
    return torch.topk(z_pre.detach(), k, dim=1, sorted=False).indices


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Kernel:
    """Return a kernel by name; `auto` takes `csr` on CPU in float32 and `reference` elsewhere.

    Raises:
        ConfigError: for an unknown name.
    """
    if name == "auto":
        name = "csr" if device.type == "cpu" and dtype == torch.float32 else "reference"
    kernels: dict[str, type[ReferenceKernel] | type[CsrKernel]] = {"reference": ReferenceKernel, "csr": CsrKernel}
    if name not in kernels:
        raise ConfigError(f"unknown kernel '{name}', expected auto, {' or '.join(kernels)}")
    return kernels[name]()


def to_dense(codes: Codes, n_latents: int) -> Float[Tensor, "b n"]:
    """Spread codes into a dense matrix (for inspection of a few rows; nothing in training or evaluation uses it)."""
    dense = codes.values.new_zeros(len(codes.values), n_latents)
    return dense.scatter(1, codes.indices, codes.values)


def fold_bias(w_enc: Encoder, b_enc: LatentVector, b_dec: SiteVector) -> LatentVector:
    """Return b_enc − W_enc b_dec, so that z_pre = (x − b_dec) W_encᵀ + b_enc needs no shifted copy of x."""
    return b_enc - w_enc @ b_dec
