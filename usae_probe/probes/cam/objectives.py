"""What a picture is climbed for: standardised activations put together over sites, regularisers, diversity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...config import CamConfig, CamMode
from ..natural import NaturalActivations
from .fourier import Pictures
from .targets import PictureRows, Target

PerPicture = Float[Tensor, " b"]


class Standard(NamedTuple):
    """What is natural for every picture's latent at a site, [b] each: mean, standard deviation; median and maximum,
    standardised.
    """

    mean: PerPicture
    sd: PerPicture
    median: PerPicture
    strongest: PerPicture

    @classmethod
    def of(cls, natural: NaturalActivations | None, site: str, latents: Sequence[int], like: Tensor) -> Standard:
        """Read them; 0, 1, 0 and infinity where nothing natural is known."""
        if natural is None:
            zeros = torch.zeros(len(latents)).to(like)
            return cls(zeros, zeros + 1, zeros, zeros + torch.inf)
        found = natural.sites[site]
        medians = np.array([found.score(latent, float(np.median(found.of(latent)))) for latent in latents])
        strongest = np.array([found.strongest(latent) for latent in latents])
        columns = (found.mean[list(latents)], found.sd[list(latents)], medians, strongest)
        return cls(*(torch.from_numpy(column).to(like) for column in columns))

    def at(self, pictures: Sequence[int]) -> Standard:
        """Return those of some of the pictures."""
        chosen = torch.tensor(pictures, dtype=torch.long, device=self.mean.device)
        return Standard(*(column[chosen] for column in self))

    def __call__(self, z_pre: PerPicture) -> PerPicture:
        """Return (z_pre - mean) / sd, where the mean is: on the pictures' device."""
        return (z_pre.to(self.mean.device) - self.mean) / self.sd


class Seen(NamedTuple):
    """What models make of a batch of pictures.

    Attributes:
        score: by site, [b], standardised.
        rows: by site, as they came.
    """

    score: dict[str, PerPicture]
    rows: dict[str, PictureRows]


@dataclass(frozen=True, eq=False)
class Objective:
    """What the pictures of a batch are climbed for.

        independent   s_A
        joint         -T log mean_i exp(-s_i / T), a soft minimum over sites
        contrast      s_A - w Σ_{B ≠ A} max(0, s_B - its natural median)

    s_i = (z_pre - natural mean) / natural standard deviation of the latent at site i. Regularisers are taken off.

    Attributes:
        mode: one of the three.
        aims: the sites that have a part in it; the first is A.
        config: weights and temperature.
    """

    mode: CamMode
    aims: tuple[Target, ...]
    config: CamConfig

    def see(
        self, pictures: Pictures, latents: Sequence[int], standards: Mapping[str, Standard], grad: bool = False
    ) -> Seen:
        """Run the models of all aims on one and the same pictures, each behind its own preprocessing."""
        rows = {aim.name: aim.rows(pictures, grad=grad) for aim in self.aims}
        score = {aim.name: standards[aim.name](aim.own_z_pre(rows[aim.name], latents)) for aim in self.aims}
        return Seen(score, rows)

    def value(self, score: Mapping[str, PerPicture], standards: Mapping[str, Standard]) -> PerPicture:
        """Put the standardised activations of all aims together."""
        own, *others = (aim.name for aim in self.aims)
        if self.mode == "joint":
            return softmin(torch.stack([score[aim.name] for aim in self.aims]), self.config.softmin)
        value = score[own]
        for site in others:
            value = value - self.config.contrast * (score[site] - standards[site].median).relu()
        return value

    def penalty(self, pictures: Pictures, seen: Seen, latents: Sequence[int]) -> PerPicture:
        """Weigh the regularisers of the plain pictures, and how alike the models see restarts of one latent."""
        weighted: list[tuple[float, Callable[[Pictures], PerPicture]]] = [
            (self.config.tv, total_variation),
            (self.config.l2, distance_from_grey),
            (self.config.spectrum, mean_squared_frequency),
        ]
        penalty = pictures.new_zeros(len(pictures))
        for weight, regulariser in weighted:
            if weight:
                penalty = penalty + weight * regulariser(pictures)
        if self.config.diversity:
            for aim in self.aims:
                alike = likeness(apart_from(aim, seen.rows[aim.name], latents), latents)
                penalty = penalty + self.config.diversity * alike.to(penalty) / len(self.aims)
        return penalty


def softmin(scores: Float[Tensor, "m b"], temperature: float) -> PerPicture:
    """Return -T log mean_i exp(-s_i / T): between the minimum and the mean, near the minimum for a small T."""
    m = torch.tensor(float(len(scores)), dtype=scores.dtype, device=scores.device)
    return -temperature * ((-scores / temperature).logsumexp(dim=0) - m.log())


def total_variation(pictures: Pictures) -> PerPicture:
    """Return the mean step from a pixel to the next one below, and to the right, both summed."""
    down, across = pictures.diff(dim=-2).abs(), pictures.diff(dim=-1).abs()
    return down.mean(dim=(1, 2, 3)) + across.mean(dim=(1, 2, 3))


def distance_from_grey(pictures: Pictures) -> PerPicture:
    """Return the mean of (p - 1/2)²."""
    return (pictures - 0.5).square().mean(dim=(1, 2, 3))


def mean_squared_frequency(pictures: Pictures) -> PerPicture:
    """Return Σ |ν|² P(ν) / Σ P(ν) of a picture's power P about its mean colour, ν in cycles per pixel; at most 1/2."""
    height, width = pictures.shape[-2:]
    centred = pictures - pictures.mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.fft2(centred, norm="ortho").abs().square().sum(dim=1)
    down = torch.fft.fftfreq(height, dtype=pictures.dtype, device=pictures.device)
    across = torch.fft.fftfreq(width, dtype=pictures.dtype, device=pictures.device)
    squared = down[:, None].square() + across.square()
    tiny = torch.finfo(pictures.dtype).tiny
    mean: Tensor = (squared * power).sum(dim=(1, 2)) / power.sum(dim=(1, 2)).clamp_min(tiny)
    return mean


def apart_from(aim: Target, rows: PictureRows, latents: Sequence[int]) -> Float[Tensor, "b d"]:
    """Return the direction of every picture's (mean) row with its latent's encoder direction taken out."""
    usae, site = aim.usae, aim.name
    x = usae.normalise(rows.mean(dim=1), site) - usae.b_dec[usae.columns[site]]
    encoder = usae.W_enc[usae.site_index(site)][torch.tensor(latents, device=x.device)]
    unit = torch.nn.functional.normalize(encoder, dim=1)
    return torch.nn.functional.normalize(x - (x * unit).sum(dim=1, keepdim=True) * unit, dim=1)


def likeness(directions: Float[Tensor, "b d"], latents: Sequence[int]) -> PerPicture:
    """Return each picture's mean cosine with the other pictures of its latent; 0 where it has none."""
    number = torch.tensor(latents, device=directions.device)
    same = (number[:, None] == number) & ~torch.eye(len(number), dtype=torch.bool, device=directions.device)
    return ((directions @ directions.T) * same).sum(dim=1) / same.sum(dim=1).clamp_min(1)
