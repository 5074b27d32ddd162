"""Random transforms of the picture in every step: what a model sees only at one place or size is not climbed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...config import CamConfig
from .fourier import Pictures


@dataclass(frozen=True)
class Jitter:
    """How much a picture is moved, scaled, turned, cropped and blurred by noise in every step (Olah et al. 2017).

    Attributes:
        shift: at most this share of the side, in each direction.
        scale: the picture grows by a factor from 1 - scale to 1 + scale.
        rotation: degrees, at most, in each direction.
        crop: a window of 1 - crop to 1 of the side, anywhere in the picture, fills it.
        noise: standard deviation of what is added to every value; black to white is 1.
    """

    shift: float = 0.0
    scale: float = 0.0
    rotation: float = 0.0
    crop: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, config: CamConfig) -> Jitter:
        """Read the settings."""
        return cls(config.shift, config.scale, config.rotation, config.crop, config.noise)

    def __call__(self, pictures: Pictures, generators: Sequence[torch.Generator]) -> Pictures:
        """Transform every picture by its own random numbers, differentiably.

        Args:
            pictures: [b, 3, h, w].
            generators: one per picture, on CPU; every call draws as many numbers, whatever is set.

        Returns:
            [b, 3, h, w]; just `pictures` when nothing is set.
        """
        drawn = torch.stack([torch.rand(7, generator=generator, dtype=torch.float64) for generator in generators])
        centred = 2 * drawn - 1
        if self.shift or self.scale or self.rotation or self.crop:
            window = 1 - self.crop * drawn[:, 4]  # share of the side that is seen
            factor = (1 + self.scale * centred[:, 2]) / window
            corner = centred[:, 5:] * (1 - window[:, None]) / 2  # of its middle from the picture's
            shift = self.shift * centred[:, :2] - corner * factor[:, None]
            angle = math.radians(self.rotation) * centred[:, 3]
            pictures = moved(pictures, shift.to(pictures), factor.to(pictures), angle.to(pictures))
        if self.noise:
            shape = pictures.shape[1:]
            grain = torch.stack([torch.randn(shape, generator=each, dtype=torch.float64) for each in generators])
            pictures = (pictures + self.noise * grain.to(pictures)).clamp(0, 1)
        return pictures


def moved(
    pictures: Pictures,
    shift: Float[Tensor, "b 2"],
    factor: Float[Tensor, " b"],
    angle: Float[Tensor, " b"] | None = None,
) -> Pictures:
    """Resample pictures bilinearly, mirrored at the border: out(u) = in(R⁻¹ (u - shift) / factor), u = 0 in the centre.

    Args:
        pictures: [b, 3, h, w].
        shift: to the right and down, as shares of width and height.
        factor: above 1 the picture grows.
        angle: R turns by it, clockwise, in radians; default: not at all.
    """
    height, width = pictures.shape[-2:]
    angle = torch.zeros_like(factor) if angle is None else angle
    cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
    theta = pictures.new_zeros(len(pictures), 2, 3)  # affine_grid counts a side as 2, whatever its length
    theta[:, 0, 0] = theta[:, 1, 1] = cos
    theta[:, 0, 1], theta[:, 1, 0] = sin * height / width, -sin * width / height
    theta[:, :, 2] = -2 * torch.einsum("bij,bj->bi", theta[:, :, :2], shift)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
