"""What is climbed: a latent's z_pre at one site of a live model, as a function of the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import SiteError, UsageError, nearest
from ...harvesting import common_grid
from ...hooks import Grid, HookedModel
from ...shapes import RowMatrix
from ...sites import Site, model_of
from ...usae import USAE
from ..records import LatentRecord
from ..rows import one_site_per_model
from .pixels import AnyPictures, PictureSpace, picture_space


@dataclass(frozen=True, eq=False)
class Target:
    """A site of a USAE in its live model.

    Attributes:
        usae: on any device.
        model: the hooked model.
        site: a site of both.
        space: from pictures to the model's input.
        grid: places that a `@patch` site is resampled to, as its rows were when the USAE was trained.
        row: the row of every picture that is climbed, where there are several; None where there is one.
    """

    usae: USAE
    model: HookedModel
    site: Site
    space: PictureSpace
    grid: Grid | None = None
    row: int | None = None

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

    def rows(self, pictures: AnyPictures, grad: bool = False) -> RowMatrix:
        """Return the site's row for each picture, [b, d_in]; differentiable in them when `grad` is set."""
        rows = self.model.rows(self.space(pictures), [self.site], grad=grad, grid=self.grid)[str(self.site)]
        return rows if self.row is None else rows.reshape(len(pictures), -1, rows.shape[-1])[:, self.row]

    def own_z_pre(self, rows: RowMatrix, latents: Sequence[int]) -> Float[Tensor, " b"]:
        """Return every row's z_pre of its own latent: that of row i and `latents[i]`."""
        return self.usae.pre_activation(rows, str(self.site), latents).diagonal()


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


def chosen_targets(usae: USAE, models: Sequence[HookedModel], sites: Sequence[str] | None) -> list[Target]:
    """Match sites with live models; default: the last listed site of every given model.

    Raises:
        SiteError: for a site that the USAE does not have, whose model is not given, or of another width.
        UnknownLayerError: when the model lacks the layer.
        UsageError: when no models are given, two have one name, or one has no site in the USAE.
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
        targets.append(Target(usae, model, site, spaces[site.model], grid, centre_row(model, site, grid)))
    return targets


def centre_row(model: HookedModel, site: Site, grid: Grid | None) -> int | None:
    """Return which row of an image stands for the centre of the picture; None where an image has one row.

    Of an even number of places the one right of or below the middle. A layer whose places are not known has its middle
    row taken.
    """
    n = model.rows_per_image(site, grid)
    if n == 1:
        return None
    layout = model.layout(site)
    places = grid if site.policy == "patch" and grid else layout.grid
    if places is None:
        return n // 2
    centre = (places[0] // 2) * places[1] + places[1] // 2
    if site.policy == "patch":
        return centre
    return (layout.prefix or 0) + (centre if layout.order is None else layout.order[centre])


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
