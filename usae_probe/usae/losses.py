"""Losses: reconstruction of every site from a code, the auxiliary loss on dead latents, and what a step minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..config import TrainConfig
from ..shapes import RowMatrix
from ..world import World, current
from .contrastive import contrastive_loss
from .draws import Perturbation, check_weighted_sites, draw_partner, sources_of
from .kernels import Support, select_topk
from .kernels.base import Entries
from .model import USAE
from .nested import decode_nested
from .residual import Loss, Residual, residual

Phase = Literal["align", "main"]


class StepLoss(NamedTuple):
    """The terms of one step.

    Attributes:
        total: what is minimised.
        per_site: error of each target (normalised MSE, or mean absolute error), unweighted, [m], detached.
        aux: the auxiliary term before weighting, detached; 0 when no latent is dead.
        fired: latents with z > 0 in this step, [n] bool.
        l0: active latents (z > 0) of a row, in the mean.
        penalty: what the sparsity added to the total, detached; 0 for most.
        contrastive: the contrastive term before weighting, detached; none where it is switched off.
    """

    total: Tensor
    per_site: Float[Tensor, " m"]
    aux: Tensor
    fired: Bool[Tensor, " n"]
    l0: Float[Tensor, ""]
    penalty: Tensor
    contrastive: Tensor | None = None

    def of_all(self, world: World) -> StepLoss:
        """Return the terms of the whole batch, detached, from each process's terms of its share."""
        given = {name: getattr(self, name).detach().reshape(-1) for name in _MEANS if getattr(self, name) is not None}
        means = torch.split(world.mean(torch.cat(list(given.values()))), [len(term) for term in given.values()])
        terms = {name: mean.reshape(getattr(self, name).shape) for name, mean in zip(given, means, strict=True)}
        return self._replace(fired=world.any(self.fired), **terms)


_MEANS = ("total", "per_site", "aux", "l0", "penalty", "contrastive")


@dataclass(frozen=True)
class Terms:
    """How a step's reconstructions are made and compared with their targets.

    Attributes:
        loss: `mse` or `l1`.
        weights: weight of each target, [m]; none for 1 each.
        self_share: share s of the source's own error: with M targets it counts M s times, each other one
            M (1 − s) / (M − 1) times, M in all as without it; none for all targets alike.
        own_only: gradients of the source's own encoder, decoder columns and biases alone (the published code).
        perturb: noise and dropout of the step; none for neither.
        dropout: share of the active latents that are left out.
    """

    loss: Loss = "mse"
    weights: Float[Tensor, " m"] | None = None
    self_share: float | None = None
    own_only: bool = False
    perturb: Perturbation | None = None
    dropout: float = 0.0

    def residual(
        self, usae: USAE, x: Float[Tensor, "b D"], product: Float[Tensor, "g b D"], b_dec: Float[Tensor, " D"]
    ) -> Residual:
        """Compare rows with what was decoded; b rows by each of g nested dictionaries count alike."""
        return residual(x, product, b_dec, usae.d_in, loss=self.loss, workspace=usae.workspace)

    def summed(self, per_site: Float[Tensor, " m"], source: int) -> Tensor:
        """Return Σ_j w_j · error_j, the source's own error by its share."""
        weighted, m = per_site if self.weights is None else self.weights * per_site, len(per_site)
        total = weighted.sum()
        if self.self_share is None:
            return total
        other = m * (1.0 - self.self_share) / (m - 1)
        return other * total + (m * self.self_share - other) * weighted[source]

    def rows(self, x: RowMatrix) -> RowMatrix:
        """Return what the encoder is given in place of x̃; the target stays x̃."""
        return self.perturb.rows(x) if self.perturb else x

    def values(self, z: Entries) -> Entries:
        """Return what the decoders are given in place of z."""
        return self.perturb.values(z, self.dropout) if self.perturb else z

    def learning(self, usae: USAE, whole: Tensor, source: str) -> Tensor:
        """Return W_dec or b_dec of all sites; under `own_only` only the source's columns of it get a gradient."""
        if not self.own_only:
            return whole
        own = torch.zeros(whole.shape[-1], dtype=torch.bool, device=whole.device)
        own[usae.columns[source]] = True
        return torch.where(own, whole, whole.detach())

    def decode(self, usae: USAE, values: Entries, support: Support, source: str) -> Float[Tensor, "b D"]:
        """Decode a code to every site, without b_dec."""
        return usae.kernel.decode(values, support, self.learning(usae, usae.W_dec, source))

    def decode_nested(self, usae: USAE, values: Entries, support: Support, source: str) -> Float[Tensor, "g b D"]:
        """Decode like `decode`, by each of the nested dictionaries, the full one last."""
        return decode_nested(usae.kernel, values, support, self.learning(usae, usae.W_dec, source), usae.matryoshka)


PLAIN = Terms()


def site_mse(usae: USAE, error: Float[Tensor, "b D"]) -> Float[Tensor, " m"]:
    """Return Σ error² / (b · d_in) per site: 1 for predicting the mean, because E‖x̃‖² = d_in."""
    # one split and not a slice each, whose gradients would each be as large as the error
    return torch.stack([part.square().mean() for part in torch.split(error, list(usae.d_in.values()), dim=1)])


def source_loss(
    usae: USAE,
    x: Float[Tensor, "b D"],
    source: str,
    *,
    dead: Bool[Tensor, " n"],
    aux_k: int,
    aux_coef: float,
    terms: Terms = PLAIN,
) -> StepLoss:
    """Encode one site, decode to all: Σ_j w_j ‖x̃_j − x̂_j‖² / (b · d_j), plus aux-k on the dead latents.

    aux-k (arXiv 2406.04093, A.2): the aux_k dead latents with the largest z_pre model the detached residual
    e = x̃ − x̂ of every site; their squared error is divided by the residual's own, whatever `terms.loss` is.

    Args:
        usae: the model.
        x: normalised rows of all sites side by side.
        source: site that is encoded.
        dead: latents that count as dead.
        aux_k: how many of them are used.
        aux_coef: weight of the term.
        terms: error, weights of the targets, whose parameters learn, noise.
    """
    rows = terms.rows(x[:, usae.columns[source]])
    z_pre = usae.z_pre(rows, source)
    coded = usae.code(rows, source, z_pre)
    x_hat = terms.decode_nested(usae, terms.values(coded.values), coded.support, source)
    left, per_site = terms.residual(usae, x, x_hat, terms.learning(usae, usae.b_dec, source))
    aux = per_site.new_zeros(())
    n_dead = min(aux_k, int(dead.sum()))
    if n_dead and aux_coef:
        among = z_pre.detach().masked_fill(~dead, -torch.inf)
        spare = Support.of(select_topk(among, n_dead), usae.n_latents)
        values = usae.code_at(rows, source, z_pre, spare)
        guess = terms.decode(usae, values, spare, source)
        of_residual = current().mean(site_mse(usae, left[-1])).clamp_min(1e-12)
        aux = (site_mse(usae, left[-1] - guess) / of_residual).sum()
    total = terms.summed(per_site, usae.site_index(source)) + aux_coef * aux + coded.penalty
    fired, l0 = fired_latents(coded.values, coded.support), active_latents(coded.values, coded.support)
    return StepLoss(total, per_site.detach(), aux.detach(), fired, l0, coded.penalty.detach())


def alignment_loss(usae: USAE, x: Float[Tensor, "b D"], source: str = "all", terms: Terms = PLAIN) -> StepLoss:
    """Give several sites one support by Σ_i z_pre,i (its top k); each keeps its own values there and decodes to all.

    The mean over sources of Σ_j w_j ‖x̃_j − x̂_j‖² / (b · d_j). Without this phase latents split: two latents of one
    model each, with the same decoder rows, take the place of one shared latent. Their encoders and all decoders learn.

    Args:
        usae: the model.
        x: normalised rows of all sites side by side.
        source: the sites that share the support.
        terms: error, weights of the targets, noise.
    """
    rows = {site: terms.rows(x[:, usae.columns[site]]) for site in sources_of(source, usae.sites)}
    per_site, totals, fired = [], [], torch.zeros(usae.n_latents, dtype=torch.bool, device=x.device)
    codes = usae.code_shared(rows)
    for site, coded in codes.items():
        values = terms.values(coded.values)
        x_hat = decode_nested(usae.kernel, values, coded.support, usae.W_dec, usae.matryoshka)
        per_site.append(terms.residual(usae, x, x_hat, usae.b_dec).per_site)
        totals.append(terms.summed(per_site[-1], usae.site_index(site)))
        fired |= fired_latents(coded.values, coded.support)
    penalty = torch.stack([coded.penalty for coded in codes.values()]).mean()
    l0 = torch.stack([active_latents(coded.values, coded.support) for coded in codes.values()]).mean()
    mean = torch.stack(per_site).mean(0).detach()
    return StepLoss(torch.stack(totals).mean() + penalty, mean, mean.new_zeros(()), fired, l0, penalty.detach())


def fired_latents(values: Entries, support: Support) -> Bool[Tensor, " n"]:
    """Return which latents have a positive value in any row."""
    fired = torch.zeros(support.n_latents, dtype=torch.bool, device=values.device)
    fired[support.columns[values > 0]] = True
    return fired


def active_latents(values: Entries, support: Support) -> Float[Tensor, ""]:
    """Return L0: the positive values of a row, in the mean over the rows."""
    return (values.detach() > 0).sum() / values.new_tensor(float(max(1, support.n_rows)))


def self_share(how: TrainConfig, n_sites: int) -> float | None:
    """Return the share of the source's own error in the loss, none for all targets alike.

    `auto` counts it as often as there are sites, and each of the others once: M / (2 M − 1).
    """
    if how.self_share == "equal" or n_sites == 1:
        return None
    return n_sites / (2 * n_sites - 1) if how.self_share == "auto" else how.self_share


class Objective(nn.Module):
    """What one step minimises, as a module: so that torch's wrappers (DistributedDataParallel) can go around it.

    Args:
        usae: the model that is trained.
        how: the objective's settings.
        dropout: share of the active latents left out in training, as `regularisation` gives it.

    Raises:
        ConfigError: when `source` or `site_weights` names a site that the model has not.
    """

    target_weights: Tensor | None

    def __init__(self, usae: USAE, how: TrainConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_weighted_sites(usae.sites, how)
        self.usae, self.how, self.dropout = usae, how, dropout
        weights = None
        if how.site_weights is not None and len(usae.sites) > 1:
            weights = usae.W_dec.new_tensor([how.site_weights.get(site, 1.0) for site in usae.sites])
        self.register_buffer("target_weights", weights, persistent=False)
        self._self_share = self_share(how, len(usae.sites))

    def forward(
        self, x: Float[Tensor, "b D"], phase: Phase, source: str, dead: Bool[Tensor, " n"], step: int = 0
    ) -> StepLoss:
        """Return the loss of one batch.

        Args:
            x: normalised rows of all sites side by side.
            phase: `align` gives the sources one support; `main` decodes each source's own code.
            source: the site that is encoded, `all`, or several joined by ` + `.
            dead: latents that count as dead.
            step: number of the step: noise, dropout and the contrastive term's second site depend on it and the seed.
        """
        terms = self._terms(step)
        loss = self._reconstruction(x, phase, source, dead, terms)
        if not self.how.contrastive_coef or len(self.usae.sites) == 1:
            return loss
        term = self._contrastive(x, source, step, terms)
        return loss._replace(total=loss.total + self.how.contrastive_coef * term, contrastive=term.detach())

    def updated(self, phase: Phase, source: str) -> tuple[str, ...] | None:
        """Return the sites whose encoder, decoder columns and biases a step changes; none for all of them."""
        one = self.how.update == "source" and phase == "main" and source != "all"
        return (source,) if one else None

    def settle(self) -> None:
        """Put what was learnt into the USAE; it is there already."""

    def _terms(self, step: int) -> Terms:
        how, training = self.how, self.training
        perturb = Perturbation(how, step) if training and (how.input_noise or self.dropout) else None
        return Terms(how.loss, self.target_weights, self._self_share, how.update == "source", perturb, self.dropout)

    def _reconstruction(
        self, x: Float[Tensor, "b D"], phase: Phase, source: str, dead: Bool[Tensor, " n"], terms: Terms
    ) -> StepLoss:
        usae, how = self.usae, self.how
        if phase == "align":
            return alignment_loss(usae, x, source, terms)
        sources = sources_of(source, usae.sites)
        losses = [
            source_loss(usae, x, site, dead=dead, aux_k=how.aux_k, aux_coef=how.aux_coef, terms=terms)
            for site in sources
        ]
        share = 1.0 / len(losses)
        return StepLoss(
            total=share * torch.stack([loss.total for loss in losses]).sum(),
            per_site=share * torch.stack([loss.per_site for loss in losses]).sum(0),
            aux=share * torch.stack([loss.aux for loss in losses]).sum(),
            fired=torch.stack([loss.fired for loss in losses]).any(0),
            l0=share * torch.stack([loss.l0 for loss in losses]).sum(),
            penalty=share * torch.stack([loss.penalty for loss in losses]).sum(),
        )

    def _contrastive(self, x: Float[Tensor, "b D"], source: str, step: int, terms: Terms) -> Tensor:
        """InfoNCE between all pairs of sources, or between the one and another site drawn by seed and step."""
        usae, how = self.usae, self.how
        if len(sources := sources_of(source, usae.sites)) > 1:
            return contrastive_loss(usae, x, sources, how.contrastive_temperature, noisy=terms.rows)
        pair = (source, draw_partner(usae.sites, source, how, step))
        fixed = pair[1:] if terms.own_only else ()
        return contrastive_loss(usae, x, pair, how.contrastive_temperature, noisy=terms.rows, fixed=fixed)
