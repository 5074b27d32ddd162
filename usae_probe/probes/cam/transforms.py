"""Random transforms of the picture in every step: what a model sees only at one place or size is not climbed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .fourier import Pictures


def jitter(pictures: Pictures, shift: float, scale: float, generators: Sequence[torch.Generator]) -> Pictures:
    """Shift and scale every picture at random by its own numbers (Olah et al. 2017), differentiably.

    Args:
        pictures: [b, 3, h, w].
        shift: at most this share of the side, in each direction.
        scale: the picture grows by a factor from 1 - scale to 1 + scale.
        generators: one per picture, on CPU.

    Returns:
        [b, 3, h, w]; just `pictures` when shift and scale are 0.
    """
    if shift == 0 and scale == 0:
        return pictures
    drawn = torch.stack([torch.rand(3, generator=generator, dtype=torch.float64) for generator in generators])
    drawn = (2 * drawn - 1).to(pictures)
    return shift_and_scale(pictures, shift * drawn[:, :2], 1 + scale * drawn[:, 2])


def shift_and_scale(pictures: Pictures, shift: Float[Tensor, "b 2"], factor: Float[Tensor, " b"]) -> Pictures:
    """Resample pictures bilinearly, mirrored at the border: out(u) = in((u - shift) / factor), u = 0 in the centre.

    Args:
        pictures: [b, 3, h, w].
        shift: to the right and down, as shares of width and height.
        factor: above 1 the picture grows.
    """
    theta = pictures.new_zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / factor
    theta[:, :, 2] = -2 * shift / factor[:, None]  # affine_grid counts a side as 2
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
