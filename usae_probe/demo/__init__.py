"""The embedded default: drawn images, and the config that `usae-probe demo` runs."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

from ..config import RunConfig
from .drawings import Drawings, draw_images, save_drawings

N_IMAGES = 2000
UNTRAINED = (
    "The demo's networks are untrained: what they share here is what untrained networks share. Try your own models."
)

__all__ = ["N_IMAGES", "UNTRAINED", "Drawings", "demo_config", "draw_images", "prepare_demo", "save_drawings"]


def demo_config(folder: Path) -> RunConfig:
    """Return the demo's config with its images in `folder`."""
    text = files(__package__).joinpath("demo.toml").read_text(encoding="utf-8")
    return RunConfig.from_dict(tomllib.loads(text), base=folder.resolve())


def prepare_demo(folder: Path) -> RunConfig:
    """Draw the demo's images into `folder`, unless they are there, and return its config."""
    config = demo_config(folder)
    path = Path(config.image_path)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_drawings(path, draw_images(N_IMAGES, size=64, seed=0))
    return config
