"""Is a picture a finding? Its activation against all natural ones, in every model, and against other latents' there.

Pictures that were climbed are unlike any image, and drive many latents up: a large activation in another model says
little by itself. So it is compared with what the same picture does to latents that fire as often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..natural import NaturalActivations, SiteNatural
from .targets import Target

JOINT_PERCENTILE = 99.0


class CrossScore(NamedTuple):
    """What one model makes of a picture.

    Attributes:
        z_pre: of the latent on exactly the picture's levels (as `place` says where there are several rows).
        z: the code's value there; 0 when the latent is not selected, or not positive.
        selected: whether it is among the latents that are, in one of the rows that count.
        score: z_pre in natural standard deviations above the natural mean; NaN where nothing natural is known.
        percentile: per cent of natural activations below it; NaN likewise.
        n: natural activations that it was compared with.
        above_all: whether it is above every one of them.
        ratio: score over that of the largest natural activation; NaN likewise.
        transfer: share of control latents, which fire about as often there, that the picture drives less far, in
            their own standard deviations; NaN likewise.
        n_controls: how many there are.
    """

    z_pre: float
    z: float
    selected: bool
    score: float
    percentile: float
    n: int
    above_all: bool
    ratio: float
    transfer: float
    n_controls: int


@torch.no_grad()
def cross_scores(
    targets: Sequence[Target],
    levels: UInt8[Tensor, "b 3 h w"],
    latents: Sequence[int],
    natural: NaturalActivations | None = None,
    n_controls: int = 100,
) -> list[dict[str, CrossScore]]:
    """Show pictures of one size to every model, and compare what it makes of them; one entry per picture, by site."""
    found: list[dict[str, CrossScore]] = [{} for _ in latents]
    for target in targets:
        site, usae = target.name, target.usae
        rows = target.rows(levels)
        own = target.own_z_pre(rows, latents).tolist()
        codes = usae.encode(rows.flatten(0, 1), site)
        z, selected = _own_codes(codes.values, codes.indices, latents, rows.shape[1])
        everything = target.of_image(
            usae.z_pre(usae.normalise(rows.flatten(0, 1), site), site).reshape(*rows.shape[:2], -1)
        )
        for i, latent in enumerate(latents):
            z_pre = everything[i].double().cpu().numpy()
            found[i][site] = compared(natural, site, latent, own[i], z_pre, n_controls, z[i], selected[i])
    return found


def _own_codes(
    values: Tensor, indices: Tensor, latents: Sequence[int], per_picture: int
) -> tuple[list[float], list[bool]]:
    """Return the largest z of each picture's latent over its rows, and whether it is selected in one."""
    shape = (len(latents), per_picture, -1)
    own = indices.reshape(shape) == torch.tensor(list(latents), device=indices.device)[:, None, None]
    z = (values.reshape(shape).clamp_min(0) * own).flatten(1).amax(dim=1)
    return z.tolist(), (z > 0).tolist()


def compared(
    natural: NaturalActivations | None,
    site: str,
    latent: int,
    z_pre: float,
    all_latents: Float[np.ndarray, " n"],
    n_controls: int,
    z: float = 0.0,
    selected: bool = False,
) -> CrossScore:
    """Compare an activation with natural ones and with controls; `all_latents` is z_pre of every latent there."""
    if natural is None:
        return CrossScore(z_pre, z, selected, math.nan, math.nan, 0, False, math.nan, math.nan, 0)
    found = natural.sites[site]
    values = found.of(latent)
    score, largest = found.score(latent, z_pre), found.strongest(latent)
    controls = rate_matched(found, latent, n_controls)
    others = (all_latents[controls] - found.mean[controls]) / found.sd[controls]
    return CrossScore(
        z_pre,
        z,
        selected,
        score,
        percentile=100 * float((values < z_pre).mean()),
        n=len(values),
        above_all=bool(z_pre > values.max()),
        ratio=score / largest,
        transfer=float((others < score).mean()) if len(controls) else math.nan,
        n_controls=len(controls),
    )


def rate_matched(found: SiteNatural, latent: int, n: int) -> Int[np.ndarray, " controls"]:
    """Return up to n other latents that fire at a site about as often as one does, by the ratio of rates.

    Latents that never fire there are none, but where the latent itself never does: then the rarest are taken.
    """
    live = np.flatnonzero(found.rate > 0)
    live = live[live != latent]
    floor = found.rate[live].min(initial=1.0)
    distance = np.abs(np.log(found.rate[live] / max(found.rate[latent], floor)))
    nearest: np.ndarray = live[np.argsort(distance, kind="stable")[:n]]
    return nearest


def failed(scores: Mapping[str, CrossScore], climbed: Sequence[str], joint: bool) -> bool | None:
    """Say whether a picture is none to show as a finding; None where nothing natural is known.

    A picture of one model must fire its latent there above every natural activation; a joint picture is a compromise,
    and must be above 99 per cent of them in every model.
    """
    own = [scores[site] for site in climbed]
    if any(score.n == 0 for score in own):
        return None
    return not all(score.percentile > JOINT_PERCENTILE if joint else score.above_all for score in own)
