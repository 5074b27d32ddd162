"""Gradient ascent from pixels on a latent's z_pre, through a live model and the USAE's encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...config import CamConfig, settled
from ...errors import NonFiniteError, UsaeProbeError
from ...hooks import HookedModel
from ...usae import USAE
from ..records import LatentRecord
from .fourier import picture_generator, start_spectrum, to_levels, to_pictures
from .targets import Target, chosen_latents, chosen_targets
from .transforms import jitter


@dataclass(frozen=True, eq=False)
class CamPicture:
    """A picture that maximises one latent at one site.

    Attributes:
        latent: its number.
        site: the site whose model and encoder were climbed.
        pixels: uint8 [h, w, 3], the picture as it is saved; `z_pre` and `z` are measured on exactly these levels, where
            a site has several rows per image at the place that was climbed, the centre.
        curve: z_pre of the randomly shifted and scaled picture in every step, before the step.
        z_pre: of `pixels` through the plain preprocessing.
        z: the code's value there: 0 when the latent is not among the k selected, or not positive.
    """

    latent: int
    site: str
    pixels: UInt8[np.ndarray, "h w 3"]
    curve: list[float]
    z_pre: float
    z: float


class CamProgress(NamedTuple):
    """Where the work stands: the site at hand, and steps done of those in all (over all sites and batches)."""

    site: str
    done: int
    total: int


def maximize(
    usae: USAE,
    models: Sequence[HookedModel],
    latents: Sequence[int | LatentRecord],
    *,
    sites: Sequence[str] | None = None,
    config: CamConfig | None = None,
    progress: Callable[[CamProgress], None] | None = None,
    **settings: Any,
) -> list[CamPicture]:
    """Find, for every site and latent, a picture that makes the latent's z_pre large in that site's model.

        max over c of   z_pre(x(T(p(c))))[latent],   z_pre = (x̃ − b_dec) W_encᵀ + b_enc

    c are a picture's Fourier coefficients (see `fourier`), p(c) its pixels in [0, 1], T a random shift and scale in
    every step, x the site's row for it behind the shared preprocessing: that of the place at the centre, for `@patch`
    and `@all` sites. Adam climbs c. z_pre and not z: TopK leaves no
    gradient where the latent is not selected. Feature visualisation after Olah et al. 2017, in several models that
    share a code after Thasarathan et al. 2025 (arXiv 2502.03714).

    Args:
        usae: a trained USAE, on any device.
        models: live models of its sites, under the names that the sites use; their weights and flags are left alone.
        latents: numbers, or records of a `UniversalityReport`; each counts once.
        sites: sites to climb in; default: the last listed of every given model.
        config: settings as read from a config file (its `latents` is not used); single ones by name as `settings`.
        progress: called after every step.

    Returns:
        a picture per site and latent: all latents of the first site, then of the next.

    Raises:
        UsageError: when models, sites and latents do not fit the USAE, or a model's own transform cannot be used.
        UsaeProbeError: when no gradient reaches the pixels.
        NonFiniteError: when the ascent leaves the finite numbers.
    """
    return list(iter_pictures(usae, models, latents, sites=sites, config=config, progress=progress, **settings))


def iter_pictures(
    usae: USAE,
    models: Sequence[HookedModel],
    latents: Sequence[int | LatentRecord],
    *,
    sites: Sequence[str] | None = None,
    config: CamConfig | None = None,
    progress: Callable[[CamProgress], None] | None = None,
    **settings: Any,
) -> Iterator[CamPicture]:
    """Yield what `maximize` returns, as each batch is done; arguments are checked at once, not at the first picture."""
    (config,) = settled((config or CamConfig(),), settings)
    numbers = chosen_latents(usae, latents)
    return _pictures(chosen_targets(usae, models, sites), numbers, config, progress)


def _pictures(
    targets: Sequence[Target],
    latents: Sequence[int],
    config: CamConfig,
    progress: Callable[[CamProgress], None] | None,
) -> Iterator[CamPicture]:
    batches = [latents[start : start + config.batch_size] for start in range(0, len(latents), config.batch_size)]
    done, total = 0, len(targets) * len(batches) * config.steps

    def step_done(target: Target) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(CamProgress(str(target.site), done, total))

    for target in targets:
        for batch in batches:
            levels, curve = _ascend(target, batch, config, step_done)
            yield from _measured(target, batch, levels, curve)


def _ascend(
    target: Target, latents: Sequence[int], config: CamConfig, step_done: Callable[[Target], None]
) -> tuple[UInt8[Tensor, "b 3 h w"], Float[Tensor, "b steps"]]:
    """Climb all latents of a batch at once; return the pictures' levels and curves.

    The sum of the pictures' objectives has each picture's own gradient, and Adam works element by element: no picture
    feels the others. The gradient is asked for the coefficients alone, so nothing is accumulated in any weight.
    """
    generators = [picture_generator(config.seed, latent) for latent in latents]
    size, curve = target.space.size, []
    with torch.inference_mode(False), torch.enable_grad():
        spectrum = start_spectrum(size, generators, target.dtype).to(target.device).requires_grad_()
        optimiser = torch.optim.Adam([spectrum], lr=config.lr)
        for step in range(config.steps):
            pictures = jitter(to_pictures(spectrum, size), config.shift, config.scale, generators)
            z_pre = target.own_z_pre(target.rows(pictures, grad=True), latents)
            curve.append(z_pre.detach())
            gradient = _gradient(z_pre.sum(), spectrum)
            if step == 0:
                _check_gradient(gradient, target, latents)
            spectrum.grad = -gradient
            optimiser.step()
            step_done(target)
    curves = torch.stack(curve, dim=1)
    _check_finite(curves, spectrum.detach(), target, latents)
    return to_levels(to_pictures(spectrum.detach(), size)), curves


def _gradient(objective: Float[Tensor, ""], spectrum: Tensor) -> Tensor:
    """Return the gradient of the objective; zeros where no graph leads to the spectrum."""
    found = torch.autograd.grad(objective, spectrum, allow_unused=True)[0] if objective.requires_grad else None
    return torch.zeros_like(spectrum) if found is None else found


def _check_gradient(gradient: Tensor, target: Target, latents: Sequence[int]) -> None:
    """Raise where there is nothing to climb: the picture would stay grey."""
    largest = gradient.flatten(1).abs().amax(dim=1).tolist()
    for latent, value in zip(latents, largest, strict=True):
        if value == 0:
            raise UsaeProbeError(
                f"the gradient of latent {latent} at site '{target.site}' to the pixels is exactly zero",
                hint="does a layer up to it detach, round or run under no_grad, or is the latent's encoder row zero?",
            )
        if not np.isfinite(value):
            raise NonFiniteError(
                f"the gradient of latent {latent} at site '{target.site}' to the pixels is {value}",
                hint="run the model in float32",
            )


def _check_finite(curves: Tensor, spectrum: Tensor, target: Target, latents: Sequence[int]) -> None:
    finite = curves.isfinite().all(dim=1).to(spectrum.device) & spectrum.flatten(1).isfinite().all(dim=1)
    for latent, ok in zip(latents, finite.tolist(), strict=True):
        if not ok:
            raise NonFiniteError(
                f"the ascent of latent {latent} at site '{target.site}' left the finite numbers",
                hint="lower cam.lr, or run the model in float32",
            )


@torch.no_grad()
def _measured(
    target: Target, latents: Sequence[int], levels: UInt8[Tensor, "b 3 h w"], curves: Float[Tensor, "b steps"]
) -> list[CamPicture]:
    rows = target.rows(levels)
    z_pre = target.own_z_pre(rows, latents)
    codes = target.usae.encode(rows, str(target.site))
    own = codes.indices == torch.tensor(list(latents), device=codes.indices.device)[:, None]
    z = (codes.values * own).sum(dim=1)
    pixels = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    columns = zip(latents, pixels, curves.tolist(), z_pre.tolist(), z.tolist(), strict=True)
    return [CamPicture(latent, str(target.site), picture, *measures) for latent, picture, *measures in columns]
