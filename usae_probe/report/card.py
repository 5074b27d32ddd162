"""The card of one latent: its images in every model, its CAM pictures, what all models make of them, and a verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ..probes import Exemplars, finite, jsonable
from ..probes.cam import RULE, CamPicture, Verdict
from .page import Page, Picture
from .sheet import BAD
from .style import cycle, number, percent, save, short, shortened

_LEFT, _GAP, _IMAGE, _CAM = 1.0, 0.06, 1.0, 2.0
_BETWEEN = 0.4
_BELOW = 0.2  # of a picture, for the text under it
_SECTION = 0.16
_CAPTION = (
    "Where: the latent's activation by place, or for a site with one row per image gradient × input (positive part of "
    "its average over an eighth of the side); of each map its own maximum is 1. Curves: activation of the transformed "
    "picture in natural standard deviations (σ) above the natural mean; dashed: the strongest image of each model. In "
    "the table: percentile among all natural activations; share of control latents, which fire about as often, that "
    "the picture drives less far; + where the latent is among the selected ones. "
)


class CardImage(NamedTuple):
    """An image of a card.

    Attributes:
        picture: as the model sees it, [h, w, 3].
        text: under it.
        heat: [h', w'], where the latent fires in it; None where it is not shown.
    """

    picture: Picture
    text: str
    heat: Float[np.ndarray, "_ _"] | None = None


@dataclass(frozen=True)
class CardSite:
    """What one site's images say of a latent: see `Exemplars`.

    Attributes:
        top, only, across: images, side by side.
        strongest: the largest natural activation, in σ above the natural mean.
    """

    top: Sequence[CardImage] = field(default_factory=list)
    only: Sequence[CardImage] = field(default_factory=list)
    across: Sequence[CardImage] = field(default_factory=list)
    strongest: float = float("nan")


@dataclass(frozen=True, eq=False)
class Card:
    """One latent.

    Attributes:
        latent: its number.
        category: its class.
        label: the label it follows in every model; may be empty.
        sites: by site of every model.
        pictures: the best restart of every mode and site.
        exemplars: as they were chosen.
        verdict: None with one model.
        n_natural, unit: what percentiles are among: so many rows, or images.
    """

    latent: int
    category: str
    label: str
    sites: dict[str, CardSite]
    pictures: list[CamPicture]
    exemplars: Exemplars
    verdict: Verdict | None
    n_natural: int
    unit: str

    @property
    def joint(self) -> CamPicture | None:
        """Its joint picture, if there is one."""
        return next((picture for picture in self.pictures if picture.mode == "joint"), None)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of it besides its pictures, as JSON can hold it."""
        lists = {kind: getattr(self.exemplars, kind) for kind in ("top", "only", "across")}
        pairs = {
            f"{a}|{b}": {
                "overlap": found._asdict(),
                "correlation": finite(self.exemplars.correlation[a, b]),
            }
            for (a, b), found in self.exemplars.overlap.items()
        }
        return {
            "category": self.category,
            "label": self.label,
            "verdict": jsonable(asdict(self.verdict)) if self.verdict else None,
            "pairs": pairs,
            "exemplars": {
                kind: {site: [found._asdict() for found in images] for site, images in by_site.items()}
                for kind, by_site in lists.items()
            },
            "strongest": {site: finite(shown.strongest) for site, shown in self.sites.items()},
            "n_natural": self.n_natural,
            "unit": self.unit,
        }


def latent_card(card: Card, path: Path) -> None:
    """Draw the card of a latent as PNG: models side by side."""
    save(_card(card).figure, path, vector=False)


def _card(card: Card) -> Page:
    plan = _Plan(card.sites, card.pictures, card.verdict)
    title = " · ".join(part for part in (f"latent {card.latent}", card.category, card.label) if part)
    plan.text(0.15, 0.12, title, fontsize=12, fontweight="bold", va="top")
    plan.text(0.15, 0.36, "\n".join(plan.said), fontsize=9, va="top", linespacing=1.25)
    for i, site in enumerate(card.sites):
        name = "\n".join(textwrap.wrap(site, int(plan.block / 0.085)))
        plan.text(plan.x(i), plan.names_top, name, fontsize=9, fontweight="bold", color=plan.colours[site], va="top")
    for row in plan.image_rows:
        _images(plan, row, card.sites)
    for row, shown in plan.picture_rows:
        _pictures(plan, row, shown, card.sites)
    _table(plan, card)
    plan.text(0.15, plan.caption_top, "\n".join(plan.caption), fontsize=7, color="0.35", va="top", linespacing=1.3)
    return plan


class _Row(NamedTuple):
    """A row of images: what it is called, which of a site's lists it shows, and where."""

    name: str
    kind: str
    top: float
    heat: bool = False


class _Plan(Page):
    """Where everything stands."""

    def __init__(self, sites: Mapping[str, CardSite], pictures: Sequence[CamPicture], verdict: Verdict | None) -> None:
        self.colours = dict(zip(sites, cycle(len(sites)), strict=True))
        n = max((len(images) for site in sites.values() for images in (site.top, site.only, site.across)), default=0)
        self.block = max(n * (_IMAGE + _GAP) - _GAP, _CAM + 0.55 + 1.6)
        width = _LEFT + len(sites) * (self.block + _BETWEEN) - _BETWEEN + 0.15
        self.said = textwrap.wrap(said(verdict), int(width * 13.5))
        self.names_top = 0.42 + 0.17 * len(self.said)
        folded = max(len(textwrap.wrap(site, int(self.block / 0.085))) for site in sites)
        top = self.names_top + 0.08 + 0.16 * folded
        self.image_rows: list[_Row] = []
        self.picture_rows: list[tuple[_Row, list[CamPicture]]] = []
        if any(site.top for site in sites.values()):
            self.image_rows.append(_Row("strongest", "top", top))
            top += _IMAGE + _BELOW
            if any(image.heat is not None for site in sites.values() for image in site.top):
                self.image_rows.append(_Row("where", "top", top, heat=True))
                top += _IMAGE + _SECTION
        for mode in ("independent", "contrast", "joint"):
            of_mode = [picture for picture in pictures if picture.mode == mode]
            if of_mode:
                self.picture_rows.append((_Row(mode, mode, top + 0.05), of_mode))
                top += _CAM + _BELOW + _SECTION + 0.12
        for name, kind in (("only here", "only"), ("across its\nactivation", "across")):
            if any(getattr(site, kind) for site in sites.values()):
                self.image_rows.append(_Row(name, kind, top))
                top += _IMAGE + _BELOW + 0.04
        self.table_top = top + 0.1
        self.caption_top = self.table_top + 0.2 * (1 + len(pictures)) + 0.18
        self.caption = textwrap.wrap(_CAPTION + RULE, int((width - 0.3) * 18.5), break_on_hyphens=False)
        super().__init__(width, self.caption_top + 0.13 * len(self.caption) + 0.14)

    def x(self, site: int) -> float:
        """Left edge of a site's block."""
        return _LEFT + site * (self.block + _BETWEEN)


def _images(plan: _Plan, row: _Row, sites: Mapping[str, CardSite]) -> None:
    style: dict[str, Any] = {"color": "0.35", "ha": "center", "va": "center"}
    plan.text(_LEFT / 2, row.top + _IMAGE / 2, row.name, fontsize=8, **style)
    for i, (site, found) in enumerate(sites.items()):
        images: Sequence[CardImage] = getattr(found, row.kind)
        if not images and not row.heat:
            none = "no image fires it here" if row.kind == "top" else "none"
            plan.text(plan.x(i) + 0.1, row.top + _IMAGE / 2, none, fontsize=8, color="0.45", va="center")
        for j, image in enumerate(images):
            x = plan.x(i) + j * (_IMAGE + _GAP)
            name = f"{row.name} {site} {j}"
            if row.heat and image.heat is not None:
                _hot(plan, name, x, row.top, image.picture, image.heat)
            else:
                plan.picture(name, x, row.top, _IMAGE, image.picture)
            if not row.heat:
                plan.text(x + _IMAGE / 2, row.top + _IMAGE + 0.09, image.text, fontsize=7, **style)


def _hot(plan: _Plan, name: str, x: float, y: float, picture: Picture, heat: Float[np.ndarray, "_ _"]) -> None:
    """Show a picture darkened and grey, and over it the positive part of a map."""
    grey = np.repeat((0.55 * picture.mean(axis=2))[..., None], 3, axis=2).astype(np.uint8)
    shown = plan.picture(name, x, y, _IMAGE, grey)
    hot = np.clip(heat, 0, None)
    hot = hot / hot.max() if hot.max() > 0 else hot
    style: dict[str, Any] = {"cmap": "inferno", "alpha": 0.85 * hot**0.5, "vmin": 0, "vmax": 1}
    left, right, bottom, top = shown.get_extent()
    plan.layer(f"heat of {name}", (left, right, bottom, top), hot, interpolation="bilinear", **style)


def _pictures(plan: _Plan, row: _Row, shown: Sequence[CamPicture], sites: Mapping[str, CardSite]) -> None:
    """Draw the pictures of one mode, each with its curves in every model; a joint one stands in the first block."""
    style: dict[str, Any] = {"fontsize": 8, "ha": "center", "va": "center"}
    plan.text(_LEFT / 2, row.top + _CAM / 2, f"CAM\n{row.name}", color="0.35", **style)
    for picture in shown:
        block = 0 if picture.mode == "joint" else list(sites).index(picture.sites[0])
        x, name = plan.x(block), f"{row.name} {picture.sites[0]}"
        plan.picture(f"cam {name}", x, row.top, _CAM, picture.pixels)
        text = f"{short(picture.own.ratio, 1)}× the strongest image"
        if picture.failed:
            text = f"failed: {text}"
        plan.text(x + _CAM / 2, row.top + _CAM + 0.1, text, color=BAD if picture.failed else "0.1", **style)
        left = x + _CAM + 0.5
        axes = plan.axes(f"curves {name}", left, row.top + 0.02, plan.block - _CAM - 0.55, _CAM - 0.3)
        for site, curve in picture.curves.items():
            there = np.flatnonzero(np.isfinite(curve))
            axes.plot(there, curve[there], color=plan.colours[site], linewidth=1.2)
            axes.axhline(sites[site].strongest, color=plan.colours[site], linewidth=0.8, linestyle="--", alpha=0.7)
        axes.axvline(picture.best_step, color="0.6", linewidth=0.7, linestyle=":")
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=7, length=2, pad=2)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step (dotted: kept)", fontsize=7, labelpad=1)
        axes.set_ylabel("σ", fontsize=8, labelpad=0)


def _table(plan: _Plan, card: Card) -> None:
    """Write what every model makes of every picture."""
    y = plan.table_top
    plan.text(_LEFT / 2, y, "picture", fontsize=8, color="0.35", ha="center", va="center")
    for i, site in enumerate(card.sites):
        head = f"in {site}, of {card.n_natural:,} {card.unit}; above controls"
        plan.text(plan.x(i) + 0.9, y, head, fontsize=8, color=plan.colours[site], va="center")
    for picture in card.pictures:
        y += 0.2
        of = "" if picture.mode == "joint" else f" {picture.sites[0].partition('/')[0]}"
        plan.text(
            0.15,
            y,
            shortened(f"{picture.mode}{of}", 24),
            fontsize=8,
            va="center",
            color=BAD if picture.failed else "0.1",
        )
        for i, site in enumerate(card.sites):
            own = site in picture.sites
            style: dict[str, Any] = {"fontsize": 8, "va": "center", "fontweight": "bold" if own else "normal"}
            plan.text(plan.x(i) + 0.9, y, _score(picture, site), **style)


def _score(picture: CamPicture, site: str) -> str:
    score = picture.scores[site]
    place = "above all" if score.above_all else f"{number(score.percentile, 1)} %"
    return f"{place}   {number(score.score, 1)} σ   {percent(score.transfer)}{'   +' if score.selected else ''}"


def said(verdict: Verdict | None) -> str:
    """Spell a verdict with what it rests on; nothing for one model."""
    if verdict is None:
        return ""
    failing = verdict.n_pictures - verdict.n_transferring
    parts = [
        f"strongest 20 in common {percent(verdict.overlap)}",
        f"codes correlate at {short(verdict.correlation)}",
        f"{verdict.n_transferring} of {verdict.n_pictures} pictures transfer" if verdict.n_pictures else "no pictures",
        f"least above controls {percent(verdict.transfer)}" if failing else "",
    ]
    return f"Verdict: {verdict.judgement} ({'; '.join(part for part in parts if part)})"
