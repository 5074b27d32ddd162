"""A picture that was made, and what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ...config import CamMode
from ..records import jsonable, or_nan
from .verify import CrossScore


class PictureKey(NamedTuple):
    """What pictures of a latent are climbed in: a mode, and the site of it; `joint` has none."""

    mode: CamMode
    site: str

    def __str__(self) -> str:
        return f"{self.mode} {self.site}".strip()


@dataclass(frozen=True, eq=False)
class CamPicture:
    """A picture that maximises one latent, and what every model makes of it.

    Attributes:
        latent: its number.
        mode: `independent`, `joint` or `contrast`.
        sites: those it was climbed in: all in `joint` mode, else one.
        restart: which of the latent's pictures of this mode and site.
        pixels: uint8 [h, w, 3], the picture as it is saved; `scores` are of exactly these levels.
        curves: by site of every model, the latent's activation on the transformed picture before each step, in natural
            standard deviations above the natural mean (as it is, where nothing natural is known); NaN where it was not
            looked at.
        best_step: steps after which the plain picture was best, which is `pixels`.
        scores: by site of every model.
        failed: whether the picture is none to show as a finding: not above every natural activation in its own model,
            or, joint, not above 99 per cent of them in every model. None where nothing natural is known.
    """

    latent: int
    mode: CamMode
    sites: tuple[str, ...]
    restart: int
    pixels: UInt8[np.ndarray, "h w 3"]
    curves: dict[str, Float[np.ndarray, " steps"]]
    best_step: int
    scores: dict[str, CrossScore]
    failed: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Return all but the pixels as JSON can hold it; `from_dict` is the inverse."""
        curves = {
            site: [float(f"{value:.6g}") if np.isfinite(value) else None for value in curve.tolist()]
            for site, curve in self.curves.items()
        }
        scores = {site: jsonable(score._asdict()) for site, score in self.scores.items()}
        whole = {name: getattr(self, name) for name in ("latent", "mode", "restart", "best_step", "failed")}
        return {**whole, "sites": list(self.sites), "scores": scores, "curves": curves}

    @classmethod
    def from_dict(cls, data: dict[str, Any], pixels: UInt8[np.ndarray, "h w 3"]) -> CamPicture:
        """Read what `to_dict` wrote."""
        curves = {site: np.array([or_nan(value) for value in curve]) for site, curve in data["curves"].items()}
        scores = {
            site: CrossScore._make(math.nan if score[name] is None else score[name] for name in CrossScore._fields)
            for site, score in data["scores"].items()
        }
        whole = {name: data[name] for name in ("latent", "mode", "restart", "best_step", "failed")}
        return cls(**whole, sites=tuple(data["sites"]), pixels=pixels, curves=curves, scores=scores)

    @property
    def key(self) -> PictureKey:
        """What it was climbed in."""
        return PictureKey(self.mode, "" if self.mode == "joint" else self.sites[0])

    @property
    def own(self) -> CrossScore:
        """What the model it was climbed in makes of it; of a joint picture the one it drives least far."""
        return min((self.scores[site] for site in self.sites), key=lambda score: score.score)
