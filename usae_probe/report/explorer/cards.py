"""A latent's card as the page holds it: numbers, and small images inside the text."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from ...probes import NaturalActivations, finite
from ...probes.cam import CamPicture
from ...probes.records import jsonable
from ..card import Card, CardImage, said
from ..page import Picture

_BINS = 40
_POINTS = 160  # of a curve
_HEAT_SIDE = 24
_QUALITY = 82
_PICTURE_SIDE = 224
_LEAST_SIDE, _MOST_SIDE = 64, 160
_BUDGET = 14_000_000  # bytes of all exemplars of a page, before base64 makes four of three
_PER_PIXEL = 0.25  # bytes, of a small WebP


def image_side(n: int) -> int:
    """Return how large exemplars may be, in pixels, so that `n` of them fit into one page."""
    return int(min(max((_BUDGET / (_PER_PIXEL * max(n, 1))) ** 0.5, _LEAST_SIDE), _MOST_SIDE))


def card_data(card: Card, natural: NaturalActivations, side: int) -> dict[str, Any]:
    """Return a card as JSON can hold it; images are WebP in data URIs.

    Args:
        card: the card.
        natural: activations of the latent, for the histograms.
        side: the longest side of an exemplar, in pixels; small ones are not enlarged.
    """
    sites = {}
    for site, shown in card.sites.items():
        lists = {
            kind: [
                _image(image, f"{name}, {i + 1} of latent {card.latent} in {site}", side)
                for i, image in enumerate(getattr(shown, kind))
            ]
            for kind, name in (
                ("top", "image that fires it most"),
                ("only", "image that fires it in this model alone"),
                ("across", "image drawn from a band of its activation"),
            )
        }
        histogram = _histogram(natural, site, card.latent)
        sites[site] = {**lists, "strongest": finite(shown.strongest), "histogram": histogram}
    return {
        "latent": card.latent,
        "verdict": said(card.verdict),
        "n_natural": card.n_natural,
        "unit": card.unit,
        "sites": sites,
        "pictures": [_picture(picture, side) for picture in card.pictures],
    }


def _image(image: CardImage, alt: str, side: int) -> dict[str, Any]:
    found: dict[str, Any] = {"src": _webp(image.picture, side), "text": image.text, "alt": alt}
    if image.heat is not None:
        found["heat"] = _heat_png(image.heat)
    return found


def _picture(picture: CamPicture, side: int) -> dict[str, Any]:
    scores = {site: jsonable(score._asdict()) for site, score in picture.scores.items()}
    return {
        "mode": picture.mode,
        "sites": list(picture.sites),
        "src": _webp(picture.pixels, max(side, _PICTURE_SIDE)),
        "failed": picture.failed,
        "ratio": finite(picture.own.ratio),
        "scores": scores,
        "curves": {site: _curve(curve) for site, curve in picture.curves.items()},
    }


def _curve(curve: Float[np.ndarray, " steps"]) -> list[tuple[int, float]]:
    """Return (step, σ) where the model looked, at most so many of them, the last one too."""
    there = np.flatnonzero(np.isfinite(curve))
    if len(there) > _POINTS:
        there = there[np.unique(np.linspace(0, len(there) - 1, _POINTS).round().astype(int))]
    return [(int(step), float(f"{curve[step]:.4g}")) for step in there]


def _histogram(natural: NaturalActivations, site: str, latent: int) -> dict[str, Any]:
    """Count natural activations, in standard deviations above their mean: all, and those that fire the latent."""
    found = natural.sites[site]
    sigma = found.standardised(latent, found.of(latent))
    fires = found.fires(latent) > 0
    if len(fires) != len(sigma):
        fires = natural.strongest(found.fires(latent)) > 0
    edges = np.linspace(sigma.min(), max(float(sigma.max()), float(sigma.min()) + 1e-6), _BINS + 1)
    return {
        "low": float(f"{edges[0]:.4g}"),
        "high": float(f"{edges[-1]:.4g}"),
        "all": np.histogram(sigma, edges)[0].tolist(),
        "fires": np.histogram(sigma[fires], edges)[0].tolist(),
    }


def _webp(picture: Picture, side: int) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    small = max(image.size) <= _LEAST_SIDE  # of so few pixels none is to be smeared
    out = io.BytesIO()
    image.save(out, "WEBP", lossless=False, quality=95 if small else _QUALITY, method=4)
    return data_uri("webp", out.getvalue())


def _heat_png(heat: Float[np.ndarray, "_ _"]) -> str:
    """Draw the positive part of a map in inferno, see-through where it is low; its own maximum is 1."""
    from matplotlib import colormaps

    hot = np.clip(heat, 0, None)
    small = Image.fromarray(hot.astype(np.float32))
    small.thumbnail((_HEAT_SIDE, _HEAT_SIDE), Image.Resampling.BOX)
    hot = np.asarray(small)
    hot = hot / hot.max() if hot.max() > 0 else hot
    colours = colormaps["inferno"](hot)
    colours[..., 3] = 0.85 * hot**0.5
    out = io.BytesIO()
    Image.fromarray((255 * colours).round().astype(np.uint8)).quantize(64).save(out, "PNG", optimize=True)
    return data_uri("png", out.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Return an image inside the text."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
