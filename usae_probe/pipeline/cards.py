"""What a latent's card and its column of the sheet show: images as the models see them, and where it fires in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import CamConfig, RunConfig
from ..errors import ImageError
from ..hooks import HookedModel
from ..images import ImageSource, Preprocessing
from ..probes import Exemplar, NaturalActivations, find_exemplars, one_site_per_model
from ..probes.cam import CamPicture, PictureKey, best_restarts, chosen_targets, heat_maps, judge
from ..probes.cam.targets import Target
from ..report.card import Card, CardImage, CardSite
from ..report.sheet import SheetCell, SheetColumn
from ..report.style import short
from ..sites import model_of
from ..usae import USAE
from .latents import Known

Pixels = Tensor


def live_targets(usae: USAE, models: Sequence[HookedModel], config: RunConfig) -> list[Target]:
    """Return the class sites of a run in its live models; the USAE goes to where they are."""
    sites = one_site_per_model(usae.sites, config.probes.sites)
    given = [model for model in models if model.name in {model_of(site) for site in sites}]
    targets = chosen_targets(usae, given, sites, config.cam)
    usae.to(targets[0].device)
    return targets


class CardMaker:
    """Puts together what is shown of latents.

    Args:
        targets: the sites in their live models.
        config: how many images, and which.
        source: the images of the run; None where they are not there: then none are shown.
        known: what the evaluation found out about every latent.
    """

    def __init__(
        self, targets: Sequence[Target], config: CamConfig, source: ImageSource | None, known: Sequence[Known]
    ) -> None:
        self.targets, self.config, self.source, self.known = targets, config, source, known
        self.sites = [target.name for target in targets]

    def card(
        self,
        latent: int,
        pictures: Sequence[CamPicture],
        natural: NaturalActivations,
        keys: Sequence[PictureKey] | None = None,
    ) -> Card:
        """Choose a latent's images, judge it by all pictures there are, and put its card together; it shows those of
        `keys`, or all.
        """
        asked = [p for key in keys for p in pictures if p.key == key] if keys is not None else pictures
        n, seed = self.config.exemplars, self.config.seed
        exemplars = find_exemplars(natural, latent, source=self.source, n=n, seed=seed)
        sites = {}
        for target in self.targets:
            found = natural.sites[target.name]
            lists: dict[str, Any] = {
                kind: self._images(target, latent, getattr(exemplars, kind)[target.name], kind)
                for kind in ("top", "only", "across")
            }
            sites[target.name] = CardSite(**lists, strongest=found.strongest(latent))
        return Card(
            latent,
            *self.known[latent],
            sites,
            best_restarts(asked),
            exemplars,
            judge(exemplars, pictures),
            natural.n,
            natural.unit,
        )

    def _images(self, target: Target, latent: int, exemplars: Sequence[Exemplar], kind: str) -> list[CardImage]:
        """Return images as the model sees them; of the strongest also where in them the latent fires."""
        loaded = [(found, pixels) for found in exemplars if (pixels := self._load(found.image)) is not None]
        if not loaded:
            return []
        preprocess = target.model.preprocess
        heat: list[np.ndarray | None] = [None] * len(loaded)
        # A map is of the model's input: behind somebody's own transform nobody knows where that lies in the image.
        if kind == "top" and isinstance(preprocess, Preprocessing):
            maps = heat_maps(target, preprocess([pixels for _, pixels in loaded]), [latent] * len(loaded))
            heat = list(smoothed(maps).numpy())
        text: Callable[[Exemplar], str] = lambda found: f"{found.value:.3g}"
        if kind == "across":
            text = lambda found: f"{found.percentile:.0f} %"
        return [
            CardImage(_seen_by(preprocess, pixels), text(found), heat[i]) for i, (found, pixels) in enumerate(loaded)
        ]

    def _load(self, image: int) -> Pixels | None:
        if self.source is None:
            return None
        try:
            return torch.from_numpy(np.array(self.source.load(image))).permute(2, 0, 1)
        except ImageError:
            return None


def sheet_column(card: Card) -> SheetColumn:
    """Return a latent's column of the sheet: its independent pictures (or contrasts), and its joint one."""
    cells = {}
    for site, shown in card.sites.items():
        own = [picture for picture in card.pictures if picture.mode != "joint" and picture.sites == (site,)]
        if own:
            cells[site] = _cell(card, own[0], [image.picture for image in shown.top])
    if card.joint:
        cells["joint"] = _cell(card, card.joint, [])
    return SheetColumn(card.latent, card.label, cells)


def _cell(card: Card, picture: CamPicture, images: Sequence[np.ndarray]) -> SheetCell:
    site = picture.sites[0]
    text = f"{short(picture.own.ratio, 1)}× max"
    elsewhere = [score.percentile for other, score in picture.scores.items() if other not in picture.sites]
    if elsewhere:
        text += f" → {', '.join(f'{value:.0f} %' for value in elsewhere)}"
    if picture.mode == "joint":
        text = ", ".join(f"{model_of(each)} {short(picture.scores[each].ratio, 1)}×" for each in picture.sites)
    curve = [] if picture.mode == "joint" else (picture.curves[site] / card.sites[site].strongest).tolist()
    return SheetCell(picture.pixels, images[:4], curve, text, picture.failed is True)


def smoothed(maps: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Average maps over squares of an eighth of the side: gradients jump from pixel to pixel."""
    window = max(maps.shape[-1] // 16, 1) * 2 + 1
    averaged: Tensor = F.avg_pool2d(maps[:, None], window, stride=1, padding=window // 2, count_include_pad=False)
    return averaged[:, 0]


def _seen_by(preprocess: object, pixels: Pixels) -> np.ndarray:
    """Return an image as a model sees it, before normalisation; as it is where the transform is not ours."""
    if isinstance(preprocess, Preprocessing):
        pixels = (preprocess.resize_crop([pixels])[0] * 255).round().byte()
    seen: np.ndarray = pixels.permute(1, 2, 0).numpy()
    return seen
