"""Drawn pictures with known factors: shape, colour, stripe orientation, size and place, chosen independently.

Picture i depends on the seed and on i alone: more pictures from the same seed begin with the same ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError
from ..files import replacing

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.15, 0.65, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.55, 0.15, 0.75),
    "pink": (1.00, 0.50, 0.75),
}
ORIENTATIONS = ("horizontal", "rising", "vertical", "falling")
SIZES = {"small": 0.10, "medium": 0.14, "large": 0.19}
"""Half the object's extent, as a share of the picture's side."""
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
FACTOR_NAMES: dict[str, list[str]] = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "orientation": list(ORIENTATIONS),
    "size": list(SIZES),
    "position": list(PLACES),
}

SUPERSAMPLING = 3
STRIPE_PERIOD = 0.09
"""Distance between stripes, as a share of the picture's side."""


class Drawings(NamedTuple):
    """Pictures and what they were drawn from.

    Attributes:
        images: uint8 [n, size, size, 3].
        factors: int64 [n] per factor (`shape`, `colour`, `orientation`, `size`, `position`), places in `factor_names`.
        factor_names: names of each factor's values.
    """

    images: np.ndarray
    factors: dict[str, np.ndarray]
    factor_names: dict[str, list[str]]


def draw_images(n: int, *, size: int = 64, seed: int = 0) -> Drawings:
    """Draw n pictures of one coloured object each before a striped background.

    Args:
        n: how many.
        size: side in pixels, at least 32 (stripes cannot be seen in smaller ones).
        seed: another seed, other pictures.

    Raises:
        ConfigError: when `n` or `size` is out of range.
    """
    if n < 1:
        raise ConfigError(f"n is {n}, expected at least 1 picture to draw")
    if size < 32:
        raise ConfigError(f"size is {size} pixels, expected at least 32", hint="stripes cannot be seen in smaller ones")
    images = np.empty((n, size, size, 3), dtype=np.uint8)
    factors = {name: np.empty(n, dtype=np.int64) for name in FACTOR_NAMES}
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        chosen = {name: int(rng.integers(len(values))) for name, values in FACTOR_NAMES.items()}
        for name, value in chosen.items():
            factors[name][i] = value
        images[i] = _draw_one(chosen, size, rng)
    return Drawings(images, factors, {name: list(values) for name, values in FACTOR_NAMES.items()})


def save_drawings(path: str | Path, drawings: Drawings) -> Path:
    """Write a .npz that `open_source` reads: `images`, and per factor its values (integers) and their names.

    The names of the values of `colour` are the strings `colour_names`; value v is called by name v.

    The file appears whole or not at all: it is written under a temporary name in the same folder and renamed.

    Args:
        path: where to; must end in .npz.
        drawings: what to write.

    Raises:
        ConfigError: for another ending.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ConfigError(f"{path} does not end in .npz")
    names = {f"{name}_names": np.array(values) for name, values in drawings.factor_names.items()}
    arrays: dict[str, Any] = {"images": drawings.images, **drawings.factors, **names}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return path


def _sample_places(size: int, samples: int) -> np.ndarray:
    """Places of the samples along one side, in shares of it; `samples` per pixel."""
    places: np.ndarray = (np.arange(size * samples, dtype=np.float32) + 0.5) / (size * samples)
    return places


def _draw_one(chosen: dict[str, int], size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture uint8 [size, size, 3]: background, object over it, noise."""
    half = SIZES[FACTOR_NAMES["size"][chosen["size"]]] * rng.uniform(0.95, 1.05)
    row, column = divmod(chosen["position"], 3)
    centre_x, centre_y = (0.22 + 0.28 * cell + rng.uniform(-0.02, 0.02) for cell in (column, row))
    colour = np.array(list(COLOURS.values())[chosen["colour"]])
    colour = np.clip(colour * rng.uniform(0.9, 1.05) + rng.normal(0, 0.02, 3), 0, 1).astype(np.float32)
    coverage = _coverage(SHAPES[chosen["shape"]], centre_x, centre_y, half, size)[..., None]
    background = _background(chosen["orientation"], size, rng)
    picture = coverage * colour + (1 - coverage) * background
    picture += np.float32(0.02) * rng.standard_normal(picture.shape, dtype=np.float32)
    levels: np.ndarray = np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)
    return levels


def _coverage(shape: str, centre_x: float, centre_y: float, half: float, size: int) -> np.ndarray:
    """Share of every pixel that the object covers, [size, size]."""
    places = _sample_places(size, SUPERSAMPLING)
    reach = 1.2 * half
    # Only the pixels about the object are sampled, whole pixels at a time.
    (x0, x1), (y0, y1) = (
        (max(0, int((centre - reach) * size)), min(size, int((centre + reach) * size) + 1))
        for centre in (centre_x, centre_y)
    )
    u = (places[x0 * SUPERSAMPLING : x1 * SUPERSAMPLING] - centre_x) / half
    v = (places[y0 * SUPERSAMPLING : y1 * SUPERSAMPLING] - centre_y) / half
    coverage = np.zeros((size, size), dtype=np.float32)
    coverage[y0:y1, x0:x1] = _average(_inside(shape, u[None, :], v[:, None]))
    return coverage


def _background(orientation: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Greyish stripes under uneven light, float32 [size, size, 3] in [0, 1]."""
    # Stripes run along the angle, so they vary across it: horizontal ones vary with y.
    angle = orientation * np.pi / 4 + rng.normal(0, 0.04)
    turns = 2 * np.pi / (STRIPE_PERIOD * rng.uniform(0.85, 1.2))
    places = _sample_places(size, SUPERSAMPLING)
    along_x = turns * np.sin(angle) * places[None, :] + rng.uniform(0, 2 * np.pi)
    along_y = turns * np.cos(angle) * places[:, None]
    # sin(a + b) from sines along each side: a sine per sample would take most of the time.
    wave = np.sin(along_x) * np.cos(along_y) + np.cos(along_x) * np.sin(along_y)
    stripes = _average(np.clip(3 * wave, -1, 1))
    tilt_x, tilt_y = rng.uniform(-0.15, 0.15, 2)
    pixels = _sample_places(size, 1) - 0.5
    light = 1 + tilt_x * pixels[None, :] + tilt_y * pixels[:, None]
    tint = rng.uniform(0.45, 0.65) + rng.normal(0, 0.03, 3)
    lit = light * (1 + rng.uniform(0.2, 0.35) * stripes)
    tinted: np.ndarray = (lit[..., None] * tint).astype(np.float32)
    return tinted


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Samples inside a shape of half extent 1 about the origin, u to the right and v downwards."""
    radius = np.hypot(u, v)
    inside: np.ndarray
    if shape == "circle":
        inside = radius < 1
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) < 0.88
    elif shape == "triangle":
        # Half the width grows from 0 at the top to 1.08 at the base.
        inside = (v < 0.85) & (abs(u) < (v + 1) * 1.08 / 1.85)
    elif shape == "ring":
        inside = (radius < 1.05) & (radius > 0.6)
    elif shape == "cross":
        inside = (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)
    else:
        inside = _inside_star(radius, np.arctan2(u, -v))
    return inside


def _inside_star(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Samples inside a star of five points, one of them upwards; angle from there, clockwise."""
    tip, notch, half_point = 1.15, 0.5, np.pi / 5
    folded = abs((angle + half_point) % (2 * half_point) - half_point)
    # Which side of the straight edge from tip to notch: the sign of a cross product.
    edge_x, edge_y = notch * np.cos(half_point) - tip, notch * np.sin(half_point)
    inside: np.ndarray = edge_x * radius * np.sin(folded) - edge_y * (radius * np.cos(folded) - tip) > 0
    return inside


def _average(samples: np.ndarray) -> np.ndarray:
    """Mean over each pixel's samples, float32."""
    rows, columns = (side // SUPERSAMPLING for side in samples.shape)
    blocks = samples.astype(np.float32).reshape(rows, SUPERSAMPLING, columns, SUPERSAMPLING)
    means: np.ndarray = blocks.mean(axis=(1, 3))
    return means
