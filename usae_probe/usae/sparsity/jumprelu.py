"""JumpReLU: a threshold per latent, learnt through its jump."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...shapes import Decoder, LatentVector
from ...world import current
from ..kernels import PreActivations, Support
from ..kernels.base import Entries
from .base import Sparsity, largest_of_batch, mean_per_row


class JumpReLU(Sparsity):
    """JumpReLU (arXiv 2407.14435): z = z_pre · H(z_pre − θ), with a threshold θ = exp(log_theta) per site and latent.

    θ learns by straight-through estimates with a rectangle K(u) = 1 for |u| < ½ of bandwidth ε,

        ∂z/∂θ := −(θ/ε) K((z_pre − θ)/ε),   ∂H(z_pre − θ)/∂θ := −(1/ε) K((z_pre − θ)/ε),

    from the reconstruction and from the penalty that keeps k latents active in the mean over the rows,

        l0_coef · (L0 / k − 1)²,   L0 = mean_r Σ_k H(z_pre,rk − θ_k).

    (The paper's target form, appendix; here about the batch's mean L0, so that rows may differ.) In training the
    support also has the entries within the rectangle that do not fire: they have z = 0 and move θ.

    θ starts at the first training batch that a site encodes alone, for all latents at the value that k · b entries of
    the batch exceed. The alignment warm-up chooses the k · b largest of the summed z_pre, as `batchtopk` does, without
    penalty; until a site has its thresholds, inference takes the k largest of each row.

    Attributes:
        log_theta: a parameter [n] per site, so that a step that is one site's changes no other site's.
        started: [m] which sites have thresholds.
    """

    name = "jumprelu"
    log_theta: nn.ParameterList
    started: Bool[Tensor, " m"]

    def __init__(self, k: int, n_latents: int, n_sites: int, settings: Mapping[str, float] | None = None) -> None:
        super().__init__(k, n_latents, n_sites, settings)
        self.log_theta = nn.ParameterList([nn.Parameter(torch.zeros(n_latents)) for _ in range(n_sites)])
        self.register_buffer("started", torch.zeros(n_sites, dtype=torch.bool))

    def select(self, z_pre: PreActivations, site: int) -> Support:
        """Return where z_pre > θ; in training where z_pre > θ − ε/2, for the thresholds' gradient."""
        if self.training and not self.started[site]:
            self.start(largest_of_batch(z_pre, self.k).least, site)
        if not self.started[site]:
            return super().select(z_pre, site)
        reach = self.settings["bandwidth"] / 2 if self.training else 0.0
        return Support.where(z_pre > self.log_theta[site].detach().exp() - reach)

    def thresholds(self, site: int) -> LatentVector | None:
        """Return the site's thresholds."""
        return self.log_theta[site].detach().exp() if self.started[site] else None

    def select_shared(self, summed: PreActivations) -> Support:
        """Return the k · b largest positive entries of the summed z_pre."""
        return largest_of_batch(summed, self.k).support

    @torch.no_grad()
    def start(self, least: Float[Tensor, ""], site: int) -> None:
        """Set a site's thresholds to the smallest selected z_pre of a batch; ∞, where nothing was, is left out."""
        if torch.isfinite(least):
            self.log_theta[site].fill_(least.log())
            self.started[site] = True

    def activate(self, at: Entries, support: Support, site: int) -> Entries:
        """Return z_pre where it exceeds its threshold, else 0."""
        if not self.started[site]:
            return torch.relu(at)
        values: Entries = _Jump.apply(at, self._theta(support, site), self.settings["bandwidth"])
        return values

    def penalty(self, at: Entries, values: Entries, support: Support, site: int, w_dec: Decoder) -> Tensor:
        """Return l0_coef · (L0 / k − 1)²."""
        if not self.started[site]:
            return values.new_zeros(())
        fires = _Step.apply(at.detach(), self._theta(support, site), self.settings["bandwidth"])
        l0 = current().mean(mean_per_row(fires, support))
        return self.settings["l0_coef"] * (l0 / self.k - 1.0).square()

    def _theta(self, support: Support, site: int) -> Entries:
        theta: Entries = self.log_theta[site].exp()[support.columns]
        return theta


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(at, theta)
        return torch.where(at > theta, at, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        at, theta = ctx.saved_tensors
        return torch.where(at > theta, grad, 0.0), -grad * theta * _rectangle(at, theta, ctx.bandwidth), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(at, theta)
        return (at > theta).to(at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        at, theta = ctx.saved_tensors
        return None, -grad * _rectangle(at, theta, ctx.bandwidth), None


def _rectangle(at: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """Return K((z_pre − θ)/ε) / ε."""
    return ((at - theta).abs() < bandwidth / 2).to(at) / bandwidth
