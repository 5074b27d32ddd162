"""Coordinated Activation Maximization, as one calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...buffer import ActivationBuffer
from ...config import CamConfig, settled
from ...hooks import HookedModel
from ...images import ImageSource, open_source
from ...usae import USAE
from ..records import LatentRecord
from .picture import CamPicture
from .studio import CamProgress, StepCount, Studio, latent_batches
from .targets import chosen_latents, chosen_targets


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
