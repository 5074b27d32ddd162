"""Where in a picture a latent fires: its activation by place, or where one row stands for all, gradient × input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...shapes import Images
from .targets import Target, order_of_places, places_of

HeatMaps = Float[Tensor, "b h w"]


def heat_maps(target: Target, model_input: Images, latents: Sequence[int]) -> HeatMaps:
    """Map where in each picture its latent fires at a site, at the size of the model's input; on CPU.

        several rows:   max(0, z_pre) of every place, enlarged bilinearly
        one row:        Σ_channels ∂z_pre/∂x · x,  x the model's input (gradient × input, Shrikumar et al. 2016)

    A map of the second kind sums to the change of z_pre to first order when the input goes to 0, the mean colour.

    Args:
        target: a site in its live model.
        model_input: pictures behind the model's preprocessing.
        latents: one for each picture.

    Returns:
        [b, h, w]; of the first kind not negative.
    """
    places = places_of(target.model, target.site, target.grid)
    if target.model.rows_per_image(target.site, target.grid) > 1 and places is not None:
        return _by_place(target, model_input, latents, places)
    return gradient_times_input(target, model_input, latents)


@torch.no_grad()
def _by_place(target: Target, model_input: Images, latents: Sequence[int], places: tuple[int, int]) -> HeatMaps:
    rows = target.model.rows(model_input, [target.site], grid=target.grid)[target.name]
    z_pre = target.usae.pre_activation(rows, target.name, list(latents)).reshape(len(model_input), -1, len(latents))
    own = z_pre.diagonal(dim1=0, dim2=2).T  # [b, rows]
    order = torch.tensor(order_of_places(target.model, target.site, places), device=own.device)
    maps = own[:, order].reshape(len(model_input), 1, *places).relu().float()
    return F.interpolate(maps, size=model_input.shape[-2:], mode="bilinear", align_corners=False)[:, 0].cpu()


def gradient_times_input(target: Target, model_input: Images, latents: Sequence[int]) -> HeatMaps:
    """Return Σ_channels ∂z_pre/∂x · x of each picture's latent, on CPU; zeros where there is no gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        model_input = model_input.detach().clone().requires_grad_()
        rows = target.model.rows(model_input, [target.site], grad=True, grid=target.grid)[target.name]
        rows = rows.reshape(len(model_input), -1, rows.shape[-1])
        z_pre = target.own_z_pre(rows if target.row is None else rows[:, target.row : target.row + 1], latents)
        gradient = None
        if z_pre.requires_grad:
            (gradient,) = torch.autograd.grad(z_pre.sum(), model_input, allow_unused=True)
        if gradient is None:
            return torch.zeros(len(model_input), *model_input.shape[-2:])
        return (gradient * model_input).sum(dim=1).detach().float().cpu()
