"""Coordinated Activation Maximization: batches of pictures over modes and sites, and what every model makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8

from ...buffer import ActivationBuffer
from ...config import CamConfig, CamMode, settled
from ...errors import UsageError
from ...hooks import HookedModel
from ...images import ImageSource, open_source
from ...usae import USAE
from ..natural import NaturalActivations, natural_activations
from ..records import LatentRecord, jsonable, or_nan
from .canvases import Canvas, FourierCanvas, MacoCanvas, PixelCanvas
from .climbing import Climbed, Job, Wanted, climb
from .starts import Album
from .targets import Target, chosen_latents, chosen_targets
from .verify import CrossScore, cross_scores, failed


@dataclass(frozen=True, eq=False)
class CamPicture:
    """A picture that maximises one latent, and what every model makes of it.

    Attributes:
        latent: its number.
        mode: `independent`, `joint` or `contrast`.
        sites: those it was climbed in: all in `joint` mode, else one.
        restart: which of the latent's pictures of this mode and site.
        pixels: uint8 [h, w, 3], the picture as it is saved; `scores` are of exactly these levels.
        curves: by site of every model, the latent's activation on the transformed picture before each step, in natural
            standard deviations above the natural mean (as it is, where nothing natural is known); NaN where it was not
            looked at.
        best_step: steps after which the plain picture was best, which is `pixels`.
        scores: by site of every model.
        failed: whether the picture is none to show as a finding: not above every natural activation in its own model,
            or, joint, not above 99 per cent of them in every model. None where nothing natural is known.
    """

    latent: int
    mode: CamMode
    sites: tuple[str, ...]
    restart: int
    pixels: UInt8[np.ndarray, "h w 3"]
    curves: dict[str, Float[np.ndarray, " steps"]]
    best_step: int
    scores: dict[str, CrossScore]
    failed: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Return all but the pixels as JSON can hold it; `from_dict` is the inverse."""
        curves = {
            site: [float(f"{value:.6g}") if np.isfinite(value) else None for value in curve.tolist()]
            for site, curve in self.curves.items()
        }
        scores = {site: jsonable(score._asdict()) for site, score in self.scores.items()}
        whole = {name: getattr(self, name) for name in ("latent", "mode", "restart", "best_step", "failed")}
        return {**whole, "sites": list(self.sites), "scores": scores, "curves": curves}

    @classmethod
    def from_dict(cls, data: dict[str, Any], pixels: UInt8[np.ndarray, "h w 3"]) -> CamPicture:
        """Read what `to_dict` wrote."""
        curves = {site: np.array([or_nan(value) for value in curve]) for site, curve in data["curves"].items()}
        scores = {
            site: CrossScore._make(math.nan if score[name] is None else score[name] for name in CrossScore._fields)
            for site, score in data["scores"].items()
        }
        whole = {name: data[name] for name in ("latent", "mode", "restart", "best_step", "failed")}
        return cls(**whole, sites=tuple(data["sites"]), pixels=pixels, curves=curves, scores=scores)

    @property
    def key(self) -> PictureKey:
        """What it was climbed in."""
        return PictureKey(self.mode, "" if self.mode == "joint" else self.sites[0])

    @property
    def own(self) -> CrossScore:
        """What the model it was climbed in makes of it; of a joint picture the one it drives least far."""
        return min((self.scores[site] for site in self.sites), key=lambda score: score.score)


class CamProgress(NamedTuple):
    """Where the work stands: what is at hand, and steps done of those in all."""

    site: str
    done: int
    total: int


class PictureKey(NamedTuple):
    """What pictures of a latent are climbed in: a mode, and the site of it; `joint` has none."""

    mode: CamMode
    site: str

    def __str__(self) -> str:
        return f"{self.mode} {self.site}".strip()


def maximize(
    usae: USAE,
    models: Sequence[HookedModel],
    latents: Sequence[int | LatentRecord],
    *,
    buffer: ActivationBuffer | None = None,
    images: Any = None,
    sites: Sequence[str] | None = None,
    config: CamConfig | None = None,
    progress: Callable[[CamProgress], None] | None = None,
    **settings: Any,
) -> list[CamPicture]:
    """Find pictures that drive latents up in live models, and check them against natural images and other latents.

        max over c of   f(s_1, …, s_M) - regularisers,   s_i = (z_pre,i(x_i(T(p(c)))) - mean_i) / sd_i

    c are a picture's numbers (`parametrisation`), p(c) its pixels in [0, 1], T a random transform in every step, the
    same for all models, x_i the row of site i behind its own preprocessing, mean_i and sd_i those of the latent's z_pre
    on the images of the buffer; f is one site's s (`independent`), a soft minimum over sites (`joint`), or one site's
    held against the others' (`contrast`), see `Objective`. Adam climbs c. z_pre and not z: TopK leaves no gradient
    where the latent is not selected. The best plain picture is kept. Feature visualisation after Olah et al. 2017, in
    several models that share a code after Thasarathan et al. 2025 (arXiv 2502.03714).

    Args:
        usae: a trained USAE, on any device.
        models: live models of its sites, under the names that the sites use; their weights and flags are left alone.
        latents: numbers, or records of a `UniversalityReport`; each counts once.
        buffer: natural activations of the sites. Without it activations are not standardised, nothing is checked, and
            there are only `independent` pictures (the default then).
        images: of the buffer, for `start = "exemplar"` and the magnitudes of `maco`: whatever `harvest` takes.
        sites: sites to climb in; default: the last listed of every given model.
        config: settings as read from a config file (its `latents` is not used); single ones by name as `settings`.
        progress: called after every step.

    Returns:
        pictures: batch of latents by batch; of each all modes, sites, latents and restarts, in that order.

    Raises:
        UsageError: when models, sites, latents and settings do not fit, or a model's own transform cannot be used.
        NoLatentsError: for a latent that no image fires.
        UsaeProbeError: when no gradient reaches the pixels.
        NonFiniteError: when the ascent leaves the finite numbers.
    """
    how: Any = {"buffer": buffer, "images": images, "sites": sites, "config": config, "progress": progress}
    return list(iter_pictures(usae, models, latents, **how, **settings))


def iter_pictures(
    usae: USAE,
    models: Sequence[HookedModel],
    latents: Sequence[int | LatentRecord],
    *,
    buffer: ActivationBuffer | None = None,
    images: Any = None,
    sites: Sequence[str] | None = None,
    config: CamConfig | None = None,
    progress: Callable[[CamProgress], None] | None = None,
    **settings: Any,
) -> Iterator[CamPicture]:
    """Yield what `maximize` returns, as each batch is done; arguments are checked at once, not at the first picture."""
    (how,) = settled((config or CamConfig(),), settings)
    numbers = chosen_latents(usae, latents)
    targets = chosen_targets(usae, models, sites, how)
    source = images if images is None or isinstance(images, ImageSource) else open_source(images)
    studio = Studio(targets, how, source, natural=buffer is not None)
    return _pictures(studio, numbers, buffer, progress)


def _pictures(
    studio: Studio,
    latents: Sequence[int],
    buffer: ActivationBuffer | None,
    progress: Callable[[CamProgress], None] | None,
) -> Iterator[CamPicture]:
    batches = list(latent_batches(latents, studio.config))
    steps = StepCount(progress, len(batches) * len(studio.keys) * studio.config.steps)
    for batch in batches:
        natural = studio.natural(batch, buffer) if buffer else None
        for key in studio.keys:
            yield from studio.make(key, batch, natural, steps)


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
        return Job(job.mode, job.aims, job.others, wanted, tuple(starts[each.latent] for each in wanted))

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
