"""`recipe = "published"`: the training of arXiv 2502.03714, to compare with.

As its code does it (YorkUCVIL/UniversalSAE with the library `overcomplete`), with two exceptions. The schedule is
driven by the step's number; theirs is sized for all steps but moves on only when a site is the source, so that it never
gets to its end. And their auxiliary term is left out: it revives half of the latents that were not chosen, not those
that are dead, and its residual is not detached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from ..config import TrainConfig
from ..errors import ConfigError
from ..shapes import Decoder, RowMatrix
from ..world import current
from .losses import Phase, StepLoss
from .model import USAE


class PublishedSite(nn.Module):
    """Encoder and dictionary of one site.

        z = TopK(relu(BatchNorm(y Wᵀ + b))),   ŷ = z D,   ‖D_k‖ = 1

    y are rows minus one scalar mean, divided by one scalar standard deviation. First weights are drawn as torch's
    Linear draws them (uniform within ±1/√d_in), directions from Glorot's uniform distribution.

    Args:
        d_in: dimensions of the site.
        n_latents: latents of the shared code.
        generator: on CPU.
    """

    def __init__(self, d_in: int, n_latents: int, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(*shape: int, bound: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.weight = uniform(n_latents, d_in, bound=1.0 / math.sqrt(d_in))
        self.bias = uniform(n_latents, bound=1.0 / math.sqrt(d_in))
        self.norm = nn.BatchNorm1d(n_latents)
        self.dictionary = uniform(n_latents, d_in, bound=math.sqrt(6.0 / (n_latents + d_in)))
        self.normalise_dictionary()

    def z_pre(self, y: RowMatrix) -> Float[Tensor, "b n"]:
        """Return BatchNorm(y Wᵀ + b): by the batch's statistics in training, by the running ones else."""
        h = functional.linear(y, self.weight, self.bias)
        z_pre: Tensor = self._of_all(h) if self.training and current().size > 1 else self.norm(h)
        return z_pre

    def _of_all(self, h: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Return BatchNorm(h) by the statistics of the rows of all processes, which are those of the whole batch."""
        norm, world = self.norm, current()
        mean = world.mean(h.mean(0))
        variance = world.mean((h - mean).square().mean(0))
        with torch.no_grad():
            rows = len(h) * world.size
            for name, new in (("mean", mean), ("var", variance * rows / (rows - 1))):
                norm.get_buffer(f"running_{name}").lerp_(new, norm.momentum or 0.0)
            norm.get_buffer("num_batches_tracked").add_(1)
        return (h - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias

    @torch.no_grad()
    def normalise_dictionary(self) -> None:
        """Give every row norm 1, outside the graph as in `overcomplete`: gradients may point along a row."""
        self.dictionary.div_(self.dictionary.norm(dim=1, keepdim=True) + 1e-8)

    def folded(self) -> tuple[Decoder, Float[Tensor, " n"]]:
        """Return A and c with BatchNorm(y Wᵀ + b) = y Aᵀ + c by the running statistics, in float64."""
        norm = self.norm
        mean, variance = (self.norm.get_buffer(f"running_{name}").double() for name in ("mean", "var"))
        gain = norm.weight.double() / (variance + norm.eps).sqrt()
        return gain[:, None] * self.weight.double(), gain * (self.bias.double() - mean) + norm.bias.double()


class PublishedObjective(nn.Module):
    """What a step of the published recipe minimises: Σ_j mean |y_j − ŷ_j|, the code read off the source's rows.

    Dense, as published: autograd goes through the batch's statistics of all latents. Only the source's parameters get a
    gradient. `settle` puts what was learnt into a plain USAE, which then encodes and decodes exactly as this in
    evaluation mode: neither checkpoints nor measures know of it.

    Args:
        usae: what `settle` fills; mean and scale say how rows are standardised.
        how: settings.

    Raises:
        ConfigError: for a USAE with another sparsity than `topk` or nested dictionaries, or batches of one row.
    """

    shift: Tensor
    gain: Tensor

    def __init__(self, usae: USAE, how: TrainConfig) -> None:
        super().__init__()
        _check(usae, how)
        self._filled = (usae,)  # in a tuple: it is no part of what is trained
        generator = torch.Generator().manual_seed(how.seed)
        parts = [PublishedSite(usae.d_in[site], usae.n_latents, generator) for site in usae.sites]
        self.parts = nn.ModuleList(parts)
        shift, gain = _standardisation(usae)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("gain", gain, persistent=False)
        self.to(device=usae.W_dec.device, dtype=usae.W_dec.dtype)

    @property
    def usae(self) -> USAE:
        """The USAE that `settle` fills."""
        return self._filled[0]

    def part(self, site: str) -> PublishedSite:
        """Return encoder and dictionary of a site.

        Raises:
            SiteError: for an unknown site.
        """
        part: PublishedSite = self.parts[self.usae.site_index(site)]  # type: ignore[assignment]
        return part

    def rows(self, x: Float[Tensor, "b D"], site: str) -> RowMatrix:
        """Return the standardised rows y of one site, from normalised rows x̃ of all sites."""
        columns = self.usae.columns[site]
        return x[:, columns] * self.gain[self.usae.site_index(site)] + self.shift[columns]

    def forward(
        self, x: Float[Tensor, "b D"], phase: Phase, source: str, dead: Bool[Tensor, " n"], step: int = 0
    ) -> StepLoss:
        """Return the loss of one batch.

        Args:
            x: normalised rows of all sites side by side.
            phase: always `main`: nothing is aligned.
            source: the site that is encoded.
            dead: not looked at: there is no auxiliary term.
            step: not looked at: nothing is drawn.
        """
        codes = torch.relu(self.part(source).z_pre(self.rows(x, source)))
        top = torch.topk(codes, self.usae.k, dim=1)
        z = torch.zeros_like(codes).scatter(1, top.indices, top.values)
        errors = []
        for site in self.usae.sites:
            dictionary = self.part(site).dictionary
            y_hat = z @ (dictionary if site == source else dictionary.detach())
            errors.append((self.rows(x, site) - y_hat).abs().mean())
        per_site = torch.stack(errors)
        fires, none = z.detach() > 0, per_site.new_zeros(())
        l0 = fires.sum() / none.new_tensor(float(len(z)))
        return StepLoss(per_site.sum(), per_site.detach(), none, fires.any(0), l0, none)

    def updated(self, phase: Phase, source: str) -> tuple[str, ...] | None:
        """Return the sites that a step changes: the source."""
        return (source,)

    @torch.no_grad()
    def settle(self) -> None:
        """Put what was learnt into the USAE's own parameters.

        With y = g x̃ + h (x̃ the USAE's normalised rows) and BatchNorm(y Wᵀ + b) = y Aᵀ + c:
        W_enc = g A, b_dec = −h / g, b_enc = c, W_dec = D / g. Decoder rows keep norm 1 per site in the models' units.
        """
        usae = self.usae
        for index, site in enumerate(usae.sites):
            part, columns, gain = self.part(site), usae.columns[site], self.gain[index].double()
            encoder, bias = part.folded()
            usae.W_enc[index].copy_(gain * encoder)
            usae.b_enc[index].copy_(bias)
            usae.W_dec[:, columns] = (part.dictionary.double() / gain).to(usae.W_dec)
            usae.b_dec[columns] = (-self.shift[columns].double() / gain).to(usae.b_dec)


class PublishedAdamW:
    """One AdamW per site; a step clips and updates those of the given sites alone, and normalises their dictionaries.

    Args:
        objective: whose parameters learn; moved to its device before.
        how: `grad_clip` and `weight_decay`.
    """

    def __init__(self, objective: PublishedObjective, how: TrainConfig) -> None:
        self.objective, self.grad_clip = objective, how.grad_clip
        self.adams = {
            site: torch.optim.AdamW(objective.part(site).parameters(), lr=0.0, weight_decay=float(how.weight_decay))
            for site in objective.usae.sites
        }

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for adam in self.adams.values():
            adam.zero_grad(set_to_none=True)

    def step(self, lr: float, sites: Sequence[str] | None = None) -> Float[Tensor, ""]:
        """Update the given sites' parameters (default: all) from their gradients.

        Gradients that are not finite update nothing: the returned norm says so.

        Returns:
            the largest of the sites' norms, before they are bounded.
        """
        norms = {site: self._clipped(site) for site in sites or self.adams}
        largest = torch.stack(list(norms.values())).max()
        for site in norms if bool(torch.isfinite(largest)) else ():
            (group,) = self.adams[site].param_groups
            group["lr"] = lr
            self.adams[site].step()
            self.objective.part(site).normalise_dictionary()
        return largest

    def tensors(self) -> dict[str, Tensor]:
        """Return moments and step counts, by name."""
        found: dict[str, Tensor] = {}
        for index, adam in enumerate(self.adams.values()):
            for number, entries in adam.state_dict()["state"].items():
                found |= {f"{index}.{number}.{what}": value for what, value in entries.items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        state: dict[int, dict[int, dict[str, Tensor]]] = {}
        for name, value in tensors.items():
            index, number, what = name.split(".")
            state.setdefault(int(index), {}).setdefault(int(number), {})[what] = value
        for at, adam in enumerate(self.adams.values()):
            adam.load_state_dict({"state": state.get(at, {}), "param_groups": adam.state_dict()["param_groups"]})

    def _clipped(self, site: str) -> Tensor:
        return nn.utils.clip_grad_norm_(self.objective.part(site).parameters(), self.grad_clip)


def published_rate(step: int, steps: int, epoch: int, how: TrainConfig) -> float:
    """Return the learning rate of step 1 … steps: up from lr · lr_final to lr in one epoch, then a cosine back down.

    Args:
        step: from 1.
        steps: of the whole training.
        epoch: steps of one pass over the training rows.
        how: `lr` and `lr_final`.
    """
    floor = how.lr * how.lr_final
    rising = min(epoch, steps)
    if step <= rising:
        return floor + (how.lr - floor) * (step - 1) / max(1, rising - 1)
    along = (step - rising) / (steps - rising)
    return floor + (how.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * along))


def _standardisation(usae: USAE) -> tuple[Tensor, Tensor]:
    """Return h [Σ d_in] and g [m] with (x − m) / σ = g x̃ + h, where m and σ are over all entries of a site's rows.

    From x = μ + s x̃ and s² = mean of the dimensions' variances: m = mean(μ), σ² = s² + mean((μ − m)²).
    """
    mean, scale = usae.mean.double(), usae.scale.double()
    shift, gain = torch.zeros_like(mean), torch.zeros_like(scale)
    for index, site in enumerate(usae.sites):
        apart = mean[usae.columns[site]] - mean[usae.columns[site]].mean()
        sigma = (scale[index].square() + apart.square().mean()).sqrt()
        shift[usae.columns[site]], gain[index] = apart / sigma, scale[index] / sigma
    return shift, gain


def _check(usae: USAE, how: TrainConfig) -> None:
    if usae.sparsity.name != "topk" or usae.matryoshka:
        given = f"matryoshka = {list(usae.matryoshka)}" if usae.matryoshka else f"sparsity = '{usae.sparsity.name}'"
        raise ConfigError(
            f"recipe = 'published' with {given}: it is defined with topk and one dictionary",
            hint=f"leave usae.{given.split()[0]} out, or train.recipe",
        )
    if how.batch_size < 2:
        raise ConfigError(
            f"recipe = 'published' with batch_size = {how.batch_size}: BatchNorm needs two rows at least",
            hint="raise train.batch_size",
        )
