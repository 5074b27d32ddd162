"""Batches of pictures over modes and sites, and what every model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from ...buffer import ActivationBuffer
from ...config import CamConfig
from ...errors import UsageError
from ...images import ImageSource
from ..natural import NaturalActivations, natural_activations
from .canvases import Canvas, FourierCanvas, MacoCanvas, PixelCanvas
from .climbing import Climbed, Job, Wanted, climb
from .picture import CamPicture, PictureKey
from .starts import Album
from .targets import Target
from .verify import CrossScore, cross_scores, failed


class CamProgress(NamedTuple):
    """Where the work stands: what is at hand, and steps done of those in all."""

    site: str
    done: int
    total: int


def latent_batches(latents: Sequence[int], config: CamConfig) -> Iterator[list[int]]:
    """Cut latents so that all restarts of a batch's latents fit in one forward pass."""
    rest = iter(latents)
    while batch := list(islice(rest, config.max_batch // config.restarts)):
        yield batch


class StepCount:
    """Tells a callback how many steps of how many are done; those that a plateau saved count as done.

    Args:
        callback: may be None.
        total: steps in all.
    """

    def __init__(self, callback: Callable[[CamProgress], None] | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def up_to(self, done: int, what: str) -> None:
        """Say that so many are done."""
        self.done = done
        if self.callback:
            self.callback(CamProgress(what, done, self.total))


class Studio:
    """Makes and checks pictures at some sites, batch of latents by batch.

    Args:
        targets: sites in their live models.
        config: how.
        source: images to start from and to take magnitudes from, where either is asked for.
        natural: whether natural activations will be known. Without them, or with one site, the default of
            `config.modes` is `independent` alone.

    Raises:
        UsageError: when a mode needs several sites or natural activations, or a start images, that there are not.
    """

    def __init__(
        self, targets: Sequence[Target], config: CamConfig, source: ImageSource | None, natural: bool = True
    ) -> None:
        if "modes" not in config.model_fields_set and not (natural and len(targets) > 1):
            config = config.model_copy(update={"modes": ["independent"]})
        self.targets, self.config = tuple(targets), config
        self.album = Album(source, config.seed)
        self.keys = [
            PictureKey(mode, site)
            for mode in config.modes
            for site in ([""] if mode == "joint" else [target.name for target in targets])
        ]
        self._check(natural)

    def _check(self, natural: bool) -> None:
        modes, config = self.config.modes, self.config
        for mode in ("joint", "contrast"):
            if mode in modes and len(self.targets) < 2:
                raise UsageError(
                    f"{mode} pictures compare models, and only {self.targets[0].name} is given",
                    hint="give the other models, or modes = ['independent']",
                )
            if mode in modes and not natural:
                raise UsageError(
                    f"{mode} pictures weigh models against each other by natural activations, which are not given",
                    hint="give buffer=, or modes = ['independent']",
                )
        if config.start == "exemplar" and not (natural and self.album.source):
            raise UsageError(
                "start = 'exemplar' needs natural activations and the images they are of",
                hint="give buffer= and images=, or start = 'noise'",
            )

    def natural(self, latents: Sequence[int], buffer: ActivationBuffer) -> NaturalActivations:
        """Measure natural activations of a batch of latents at all sites.

        Raises:
            NoLatentsError: when no image fires one of them.
        """
        sites, usae = [target.name for target in self.targets], self.targets[0].usae
        found = natural_activations(usae, buffer, latents, sites=sites, per_image=self.config.per_image)
        for latent in latents:
            found.demand_live(latent)
        return found

    def make(
        self, key: PictureKey, latents: Sequence[int], natural: NaturalActivations | None, steps: StepCount
    ) -> Iterator[CamPicture]:
        """Climb the pictures of one mode and site for a batch of latents, and yield them with what is made of them."""
        job = self._job(key, latents, natural)
        begin, done = steps.done, 0

        def step_done() -> None:
            nonlocal done
            done += 1
            steps.up_to(begin + done, str(key))

        found = climb(job, self._canvas(self._size(job)), self.config, natural, step_done)
        if done < self.config.steps:
            steps.up_to(begin + self.config.steps, str(key))
        numbers = [wanted.latent for wanted in job.wanted]
        levels = torch.stack([each.levels for each in found])
        scores = cross_scores(self.targets, levels, numbers, natural, self.config.controls)
        yield from map(partial(_picture, job), job.wanted, found, scores)

    def _job(self, key: PictureKey, latents: Sequence[int], natural: NaturalActivations | None) -> Job:
        own = [target for target in self.targets if target.name == key.site]
        rest = [target for target in self.targets if target.name != key.site]
        aims, others = (own, rest) if key.mode == "independent" else ([*own, *rest], [])
        wanted = tuple(Wanted(latent, restart) for latent in latents for restart in range(self.config.restarts))
        job = Job(key.mode, tuple(aims), tuple(others), wanted)
        if self.config.start == "noise" or natural is None:
            return job
        size = self._size(job)
        starts = {latent: self.album.start(natural, latent, job.climbed, size) for latent in latents}
        return replace(job, starts=tuple(starts[each.latent] for each in wanted))

    def _size(self, job: Job) -> tuple[int, int]:
        """Return the size that the model's preprocessing does not resample; of several models the largest."""
        sizes = [aim.space.size for aim in job.aims if aim.name in job.climbed]
        return max(sizes, key=lambda size: size[0] * size[1])

    def _canvas(self, size: tuple[int, int]) -> Canvas:
        if self.config.parametrisation == "pixels":
            return PixelCanvas(size)
        if self.config.parametrisation == "maco":
            magnitude = self.album.magnitude(size)
            return MacoCanvas(size) if magnitude is None else MacoCanvas(size, magnitude)
        return FourierCanvas(size)


def _picture(job: Job, wanted: Wanted, found: Climbed, scores: dict[str, CrossScore]) -> CamPicture:
    pixels = found.levels.permute(1, 2, 0).contiguous().cpu().numpy()
    verdict = failed(scores, job.climbed, job.mode == "joint")
    return CamPicture(
        wanted.latent,
        job.mode,
        job.climbed,
        wanted.restart,
        pixels,
        found.curves,
        found.best_step,
        scores,
        verdict,
    )
