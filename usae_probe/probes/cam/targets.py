"""What is climbed: a latent's z_pre at one site of a live model, as a function of the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...config import CamConfig
from ...errors import SiteError, UsageError, nearest
from ...harvesting import common_grid
from ...hooks import Grid, HookedModel
from ...sites import Site, model_of
from ...usae import USAE
from ..natural import PerImage
from ..records import LatentRecord
from ..rows import one_site_per_model
from .pixels import AnyPictures, PictureSpace, picture_space

PictureRows = Float[Tensor, "b r d"]
"""Rows of b pictures, r of each."""


@dataclass(frozen=True, eq=False)
class Target:
    """A site of a USAE in its live model.

    Attributes:
        usae: on any device.
        model: the hooked model.
        site: a site of both.
        space: from pictures to the model's input.
        grid: places that a `@patch` site is resampled to, as its rows were when the USAE was trained.
        row: the row of every picture that is climbed, where there are several; None where there is one, or all count.
        per_image: how all rows of a picture become one activation; None where one is chosen.
    """

    usae: USAE
    model: HookedModel
    site: Site
    space: PictureSpace
    grid: Grid | None = None
    row: int | None = None
    per_image: PerImage = None

    @property
    def name(self) -> str:
        """The site, as it is spelled."""
        return str(self.site)

    @property
    def device(self) -> torch.device:
        """The model's device: the picture is optimised there."""
        weight = self.model.weight
        return torch.device("cpu") if weight is None else weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The picture's dtype: float64 for a float64 model, else float32."""
        weight = self.model.weight
        return torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32

    def rows(self, pictures: AnyPictures, grad: bool = False) -> PictureRows:
        """Return the site's rows for each picture that count, [b, r, d_in]; differentiable in them when `grad` is set.

        They are all rows where all count, and else the one that is climbed.
        """
        rows = self.model.rows(self.space(pictures), [self.site], grad=grad, grid=self.grid)[self.name]
        rows = rows.reshape(len(pictures), -1, rows.shape[-1])
        return rows if self.row is None else rows[:, self.row : self.row + 1]

    def own_z_pre(self, rows: PictureRows, latents: Sequence[int]) -> Float[Tensor, " b"]:
        """Return the activation of every picture's own latent: that of picture i and `latents[i]`."""
        each = list(dict.fromkeys(latents))
        z_pre = self.usae.pre_activation(rows.flatten(0, 1), self.name, each).reshape(*rows.shape[:2], len(each))
        own = torch.tensor([each.index(latent) for latent in latents], device=z_pre.device)
        return self.of_image(z_pre[torch.arange(len(latents), device=z_pre.device), :, own])

    def of_image(self, z_pre: Float[Tensor, "b r *n"]) -> Float[Tensor, "b *n"]:
        """Return one activation for the rows of each picture that count."""
        return z_pre.amax(dim=1) if self.per_image == "max" else z_pre.mean(dim=1)


def chosen_latents(usae: USAE, latents: Sequence[int | LatentRecord]) -> list[int]:
    """Return the numbers of the latents, each once, in the given order.

    Raises:
        UsageError: when there are none, or one is out of range.
    """
    numbers = [entry.latent if isinstance(entry, LatentRecord) else int(entry) for entry in latents]
    if not numbers:
        raise UsageError("no latents to maximise: the list is empty", hint="give numbers, such as latents=[273, 8]")
    usae.check_latents(numbers)
    return list(dict.fromkeys(numbers))


def chosen_targets(
    usae: USAE, models: Sequence[HookedModel], sites: Sequence[str] | None, config: CamConfig | None = None
) -> list[Target]:
    """Match sites with live models; default: the last listed site of every given model.

    Args:
        usae, models, sites: as of `maximize`.
        config: says which row of an image counts, where there are several.

    Raises:
        SiteError: for a site that the USAE does not have, whose model is not given, or of another width.
        UnknownLayerError: when the model lacks the layer.
        UsageError: when no models are given, two have one name, one has no site in the USAE, or a site has no such
            place.
    """
    by_name = _by_name(usae, models)
    if sites is None:
        sites = [site for site in one_site_per_model(usae.sites) if model_of(site) in by_name]
    if not sites:
        raise SiteError("sites is empty", hint=f"leave it out, or choose from: {', '.join(usae.sites)}")
    wanted = [Site.parse(site) for site in sites]
    for site in wanted:
        _check_site(usae, by_name, site)
    spaces = {name: picture_space(by_name[name]) for name in dict.fromkeys(site.model for site in wanted)}
    grid = usae.grid or common_grid(_given_sites(usae, by_name))
    targets = []
    for site in dict.fromkeys(wanted):
        model = by_name[site.model]
        several = model.rows_per_image(site, grid) > 1
        per_image = config.per_image if config and several else None
        row = row_at(model, site, grid, config.at if config else None) if several and per_image is None else None
        targets.append(Target(usae, model, site, spaces[site.model], grid, row, per_image))
    return targets


def row_at(model: HookedModel, site: Site, grid: Grid | None, at: Grid | None = None) -> int:
    """Return which of the rows of an image stands for a place of the picture.

    Args:
        model, site, grid: a site with several rows per image.
        at: row and column among the site's places; default: the centre, of an even number of places the one right of
            or below the middle. A layer whose places are not known has its middle row taken.

    Raises:
        SiteError: when there is no such place.
    """
    places = places_of(model, site, grid)
    if places is None:
        if at is not None:
            raise SiteError(
                f"place {at[0]},{at[1]} is asked for, but the places of '{site}' are not known",
                hint="give layout= with its grid, or cam.place = 'centre'",
            )
        return model.rows_per_image(site, grid) // 2
    row, column = at or (places[0] // 2, places[1] // 2)
    if row >= places[0] or column >= places[1]:
        raise SiteError(
            f"there is no place {row},{column} in '{site}', which has {places[0]} rows and {places[1]} columns",
            hint=f"cam.place goes from 0,0 (upper left) to {places[0] - 1},{places[1] - 1}",
        )
    return order_of_places(model, site, places)[row * places[1] + column]


def places_of(model: HookedModel, site: Site, grid: Grid | None) -> Grid | None:
    """Return rows and columns of the places of a site that has a row for each; None where they are not known."""
    return grid if site.policy == "patch" and grid else model.layout(site).grid


def order_of_places(model: HookedModel, site: Site, places: Grid) -> list[int]:
    """Return which of the rows of an image each place has, in raster order."""
    raster = list(range(places[0] * places[1]))
    if site.policy == "patch":
        return raster
    layout = model.layout(site)
    return [(layout.prefix or 0) + place for place in (raster if layout.order is None else layout.order)]


def _given_sites(usae: USAE, by_name: dict[str, HookedModel]) -> list[tuple[HookedModel, Site]]:
    sites = [Site.parse(site) for site in usae.sites]
    return [(by_name[site.model], site) for site in sites if site.model in by_name]


def _by_name(usae: USAE, models: Sequence[HookedModel]) -> dict[str, HookedModel]:
    if not models:
        raise UsageError("no models to maximise in: the list is empty", hint="attach the models of the USAE's sites")
    name, times = Counter(model.name for model in models).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{times} of the models given have the name '{name}'", hint="names tell the models apart")
    known = tuple(dict.fromkeys(model_of(site) for site in usae.sites))
    for model in models:
        if model.name not in known:
            hint = f"{nearest(model.name, known)} the USAE's models: {', '.join(known)}; attach with name="
            raise UsageError(f"the USAE has no site of model '{model.name}'", hint=hint.strip())
    return {model.name: model for model in models}


def _check_site(usae: USAE, by_name: dict[str, HookedModel], site: Site) -> None:
    usae.site_index(str(site))
    if site.model not in by_name:
        raise SiteError(
            f"site '{site}' is wanted, but its model '{site.model}' is not among those given: {', '.join(by_name)}",
            hint=f"attach it with name='{site.model}', or leave that site out",
        )
    found, expected = by_name[site.model].d_in(site), usae.d_in[str(site)]
    if found != expected:
        raise SiteError(
            f"site '{site}' has d_in = {expected} in the USAE, but {found} in the model given",
            hint="attach the model that the USAE was trained on",
        )
