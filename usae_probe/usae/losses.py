"""Losses: normalised MSE to every site, and the auxiliary loss on dead latents."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..config import TrainConfig
from .kernels import Support, select_topk
from .kernels.base import Entries
from .model import USAE

Phase = Literal["align", "main"]


class StepLoss(NamedTuple):
    """The terms of one step.

    Attributes:
        total: what is minimised.
        per_site: normalised MSE of each target, [m], detached.
        aux: the auxiliary term before weighting, detached; 0 when no latent is dead.
        fired: latents with z > 0 in this step, [n] bool.
    """

    total: Tensor
    per_site: Float[Tensor, " m"]
    aux: Tensor
    fired: Bool[Tensor, " n"]


def site_mse(usae: USAE, error: Float[Tensor, "b D"]) -> Float[Tensor, " m"]:
    """Return Σ error² / (b · d_in) per site: 1 for predicting the mean, because E‖x̃‖² = d_in."""
    return torch.stack([error[:, usae.columns[site]].square().mean() for site in usae.sites])


def source_loss(
    usae: USAE, x: Float[Tensor, "b D"], source: str, *, dead: Bool[Tensor, " n"], aux_k: int, aux_coef: float
) -> StepLoss:
    """Encode one site, decode to all: Σ_j ‖x̃_j − x̂_j‖² / (b · d_j), plus aux-k on the dead latents.

    aux-k (arXiv 2406.04093, A.2): the aux_k dead latents with the largest z_pre model the detached residual
    e = x̃ − x̂ of every site; their error is divided by the residual's own.

    Args:
        usae: the model.
        x: normalised rows of all sites side by side.
        source: site that is encoded.
        dead: latents that count as dead.
        aux_k: how many of them are used.
        aux_coef: weight of the term.
    """
    rows = x[:, usae.columns[source]]
    coded = usae.code(rows, source)
    error = x - usae.decode_all(coded.values, coded.support)
    per_site = site_mse(usae, error)
    aux = per_site.new_zeros(())
    n_dead = min(aux_k, int(dead.sum()))
    if n_dead and aux_coef:
        among = coded.z_pre.detach().masked_fill(~dead, -torch.inf)
        spare = Support.of(select_topk(among, n_dead), usae.n_latents)
        values = usae.code_at(rows, source, coded.z_pre, spare)
        guess = usae.kernel.decode(values, spare, usae.W_dec)
        residual = error.detach()
        aux = (site_mse(usae, residual - guess) / site_mse(usae, residual).clamp_min(1e-12)).sum()
    total = per_site.sum() + aux_coef * aux
    return StepLoss(total, per_site.detach(), aux.detach(), fired_latents(coded.values, coded.support))


def alignment_loss(usae: USAE, x: Float[Tensor, "b D"]) -> StepLoss:
    """Give all sites one support, the top k of Σ_i z_pre,i; each keeps its own values there and decodes to all.

    The mean over sources of Σ_j ‖x̃_j − x̂_j‖² / (b · d_j). Without this phase latents split: two latents of one model
    each, with the same decoder rows, take the place of one shared latent.
    """
    rows = {site: x[:, usae.columns[site]] for site in usae.sites}
    z_pre = {site: usae.z_pre(rows[site], site) for site in usae.sites}
    summed = torch.stack([pre.detach() for pre in z_pre.values()]).sum(0)
    support = Support.of(select_topk(summed, usae.k), usae.n_latents)
    per_site, fired = [], torch.zeros(usae.n_latents, dtype=torch.bool, device=x.device)
    for site in usae.sites:
        values = usae.code_at(rows[site], site, z_pre[site], support)
        per_site.append(site_mse(usae, x - usae.decode_all(values, support)))
        fired |= fired_latents(values, support)
    mean = torch.stack(per_site).mean(0)
    return StepLoss(mean.sum(), mean.detach(), mean.new_zeros(()), fired)


def fired_latents(values: Entries, support: Support) -> Bool[Tensor, " n"]:
    """Return which latents have a positive value in any row."""
    fired = torch.zeros(support.n_latents, dtype=torch.bool, device=values.device)
    fired[support.columns[values > 0]] = True
    return fired


class Objective(nn.Module):
    """What one step minimises, as a module: so that torch's wrappers (DistributedDataParallel) can go around it.

    Args:
        usae: the model that is trained.
        how: the objective's settings.
    """

    def __init__(self, usae: USAE, how: TrainConfig) -> None:
        super().__init__()
        self.usae, self.how = usae, how

    def forward(self, x: Float[Tensor, "b D"], phase: Phase, source: str, dead: Bool[Tensor, " n"]) -> StepLoss:
        """Return the loss of one batch.

        Args:
            x: normalised rows of all sites side by side.
            phase: `align` gives all sites one support; `main` decodes each source's own code.
            source: the site that is encoded in the main phase, or `all`.
            dead: latents that count as dead.
        """
        usae, how = self.usae, self.how
        if phase == "align":
            return alignment_loss(usae, x)
        sources = usae.sites if source == "all" else [source]
        losses = [source_loss(usae, x, site, dead=dead, aux_k=how.aux_k, aux_coef=how.aux_coef) for site in sources]
        share = 1.0 / len(losses)
        return StepLoss(
            total=share * torch.stack([loss.total for loss in losses]).sum(),
            per_site=share * torch.stack([loss.per_site for loss in losses]).sum(0),
            aux=share * torch.stack([loss.aux for loss in losses]).sum(),
            fired=torch.stack([loss.fired for loss in losses]).any(0),
        )
