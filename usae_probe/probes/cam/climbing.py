"""Gradient ascent of one batch of pictures: steps, looks at the plain picture, plateaus, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...config import CamConfig, CamMode
from ...errors import NonFiniteError, UsaeProbeError
from ..natural import NaturalActivations
from .canvases import Canvas
from .fourier import Picture, Pictures, picture_generator, to_levels
from .objectives import Objective, Seen, Standard
from .targets import Target
from .transforms import Jitter

_GAIN = 0.01
"""Share of the gain so far that must come in `patience` looks for a picture not to be on a plateau."""


class Wanted(NamedTuple):
    """A picture of a batch: its latent, and which of the latent's restarts it is."""

    latent: int
    restart: int


@dataclass(frozen=True, eq=False)
class Job:
    """A batch of pictures that are climbed at once.

    Attributes:
        mode: see `Objective`.
        aims: the sites that have a part in the objective.
        others: sites that only look on.
        wanted: the pictures; restarts of a latent together.
        starts: pictures to start from, where not from noise.
    """

    mode: CamMode
    aims: tuple[Target, ...]
    others: tuple[Target, ...]
    wanted: tuple[Wanted, ...]
    starts: tuple[Picture, ...] | None = None

    @property
    def climbed(self) -> tuple[str, ...]:
        """The sites that are driven up: all in `joint` mode, else the first."""
        names = tuple(aim.name for aim in self.aims)
        return names if self.mode == "joint" else names[:1]


@dataclass(frozen=True, eq=False)
class Climbed:
    """A picture that was found.

    Attributes:
        levels: [3, h, w], on the device it was climbed on.
        curves: standardised activation of the transformed picture by site, before each step; NaN where not looked at.
        best_step: steps after which the plain picture was best: what `levels` are.
    """

    levels: UInt8[Tensor, "3 h w"]
    curves: dict[str, Float[np.ndarray, " steps"]]
    best_step: int


def climb(
    job: Job,
    canvas: Canvas,
    config: CamConfig,
    natural: NaturalActivations | None,
    step_done: Callable[[], None] = lambda: None,
) -> list[Climbed]:
    """Climb the pictures of a job by Adam; no picture's steps depend on the others' but by `diversity`.

    Raises:
        UsaeProbeError: when no gradient reaches the pixels from a site.
        NonFiniteError: when numbers stop being finite.
    """
    with torch.inference_mode(False), torch.enable_grad():
        batch = _Batch(job, canvas, config, natural)
        for step in range(config.steps):
            if step % config.check_every == 0:
                batch.look(step)
            if not batch.active:
                break
            batch.step(step)
            step_done()
        batch.look(config.steps)
        return batch.result()


class _Batch:
    """Where the pictures of a job stand.

    Each has a leaf tensor of its own, so that one on a plateau can rest while Adam goes on with the others.

    Attributes:
        active: those that are still climbed.
        standards: by site, of the active pictures.
    """

    def __init__(self, job: Job, canvas: Canvas, config: CamConfig, natural: NaturalActivations | None) -> None:
        self.job, self.canvas, self.config = job, canvas, config
        self.objective = Objective(job.mode, job.aims, config)
        self.jitter = Jitter.of(config)
        self.latents = [wanted.latent for wanted in job.wanted]
        self.generators = [picture_generator(config.seed, *wanted) for wanted in job.wanted]
        device, dtype = job.aims[0].device, job.aims[0].dtype
        drawn = [canvas.draw(generator, dtype) for generator in self.generators]
        if job.starts is not None:
            drawn = [canvas.of(start.to(dtype)) for start in job.starts]
        self.numbers = [each.to(device).requires_grad_() for each in drawn]
        self.optimiser = torch.optim.Adam(self.numbers, lr=config.lr)
        # Standardised in the dtype of the picture: in float64 for a float64 model.
        like = torch.zeros((), dtype=dtype, device=device)
        every = (*job.aims, *job.others)
        self._all = {target.name: Standard.of(natural, target.name, self.latents, like) for target in every}
        self.standards = self._all
        self.curves = {target.name: np.full((len(drawn), config.steps), np.nan) for target in every}
        self.active = list(range(len(drawn)))
        self.stopped = [config.steps] * len(drawn)
        self.best = [_Best() for _ in drawn]

    def pictures(self) -> Pictures:
        """Return the active pictures as they are."""
        return self.canvas(torch.stack([self.numbers[i] for i in self.active]))

    def see(self, pictures: Pictures, grad: bool = False) -> Seen:
        """Show the active pictures to the models that are climbed."""
        return self.objective.see(pictures, self._active_latents(), self.standards, grad=grad)

    def step(self, step: int) -> None:
        """Take one step with the active pictures, and write down how all models saw them before it."""
        plain, latents = self.pictures(), self._active_latents()
        shown = self.jitter(plain, [self.generators[i] for i in self.active])
        seen = self.see(shown, grad=True)
        self._note(step, seen.score)
        if step % self.config.record_every == 0:
            self._watch(step, shown.detach(), latents)
        value = self.objective.value(seen.score, self.standards)
        if step == 0:
            self._check_gradients(seen)
        total = (value - self.objective.penalty(plain, seen, latents).to(value)).sum()
        numbers = [self.numbers[i] for i in self.active]
        # The sum has each picture's own gradient. It is asked for alone: nothing is accumulated in any weight.
        gradients = torch.autograd.grad(total, numbers)
        for each in self.numbers:
            each.grad = None
        for each, gradient in zip(numbers, gradients, strict=True):
            each.grad = -gradient
        self.optimiser.step()

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Look at the plain pictures: keep those that are the best so far, and let latents rest that are done."""
        if not self.active:
            return
        seen = self.see(self.pictures())
        values = self.objective.value(seen.score, self.standards)
        for i, value in zip(self.active, values.tolist(), strict=True):
            if step and not (np.isfinite(value) and bool(self.numbers[i].isfinite().all())):
                raise NonFiniteError(
                    f"the ascent of latent {self.latents[i]} at {self._where()} left the finite numbers",
                    hint="lower cam.lr, or run the model in float32",
                )
            self.best[i].see(value, step, self.numbers[i])
        # In every model of a joint picture; of a contrast picture with what the other models see of it taken off.
        reached = seen.score if self.job.mode == "joint" else {self.job.climbed[0]: values}
        ratios = [value / self.standards[site].strongest for site, value in reached.items()]
        strong = torch.stack(ratios).amin(dim=0).tolist()
        resting = {i for i, ratio in zip(self.active, strong, strict=True) if self._may_rest(i, step, ratio)}
        going_on = {self.latents[i] for i in self.active if i not in resting}  # a latent's restarts rest together
        for i in self.active:
            self.stopped[i] = step
        self.active = [i for i in self.active if self.latents[i] in going_on]
        self.standards = {site: standard.at(self.active) for site, standard in self._all.items()}

    def _may_rest(self, i: int, step: int, ratio: float) -> bool:
        """Say whether a picture is on a plateau, or strong enough."""
        waited = self.config.patience * self.config.check_every
        plateau = bool(waited) and step - self.best[i].gained_at >= waited
        return plateau or (self.config.enough > 0 and ratio >= self.config.enough)

    def result(self) -> list[Climbed]:
        """Return the best look at every picture."""
        best = torch.stack([found.numbers for found in self.best])
        with torch.no_grad():
            levels = to_levels(self.canvas(best))
        return [
            Climbed(
                levels[i],
                {site: curve[i, : self.stopped[i]] for site, curve in self.curves.items()},
                self.best[i].step,
            )
            for i in range(len(levels))
        ]

    def _active_latents(self) -> list[int]:
        return [self.latents[i] for i in self.active]

    def _note(self, step: int, scores: dict[str, Tensor]) -> None:
        for site, score in scores.items():
            self.curves[site][self.active, step] = score.detach().cpu().numpy()

    @torch.no_grad()
    def _watch(self, step: int, shown: Pictures, latents: Sequence[int]) -> None:
        for other in self.job.others:
            self._note(step, {other.name: self.standards[other.name](other.own_z_pre(other.rows(shown), latents))})

    def _check_gradients(self, seen: Seen) -> None:
        """Raise where a model gives nothing to climb: the picture would stay grey, or be another model's."""
        numbers = [self.numbers[i] for i in self.active]
        for site in self.job.climbed:
            score = seen.score[site]
            found = [torch.zeros(1)] * len(numbers)
            if score.requires_grad:
                grads = torch.autograd.grad(score.sum(), numbers, retain_graph=True, allow_unused=True)
                found = [torch.zeros(1) if each is None else each for each in grads]
            for latent, gradient in zip(self._active_latents(), found, strict=True):
                _check_gradient(float(gradient.abs().max()), latent, site)

    def _where(self) -> str:
        return ", ".join(f"site '{site}'" for site in self.job.climbed)


class _Best:
    """The best look at one picture so far."""

    def __init__(self) -> None:
        self.value, self.step = -np.inf, 0
        self.numbers = torch.empty(0)
        self.first = self.gained = -np.inf
        self.gained_at = 0

    def see(self, value: float, step: int, numbers: Tensor) -> None:
        """Take a look into account."""
        if step == 0:
            self.first = self.gained = value
        if value > self.value:
            self.value, self.step, self.numbers = value, step, numbers.detach().clone()
        if value > self.gained + _GAIN * (self.gained - self.first):
            self.gained, self.gained_at = value, step


def _check_gradient(largest: float, latent: int, site: str) -> None:
    if largest == 0:
        raise UsaeProbeError(
            f"the gradient of latent {latent} at site '{site}' to the pixels is exactly zero",
            hint="does a layer up to it detach, round, look numbers up or run under no_grad, "
            "or is the latent's encoder row zero?",
        )
    if not np.isfinite(largest):
        raise NonFiniteError(
            f"the gradient of latent {latent} at site '{site}' to the pixels is {largest}",
            hint="run the model in float32",
        )
