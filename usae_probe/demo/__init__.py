"""The embedded default: drawn images of known factors, two networks trained on them, and the config of the demo."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UsageError
from ..files import replacing
from .drawings import FACTOR_NAMES, Drawings, draw_images, save_drawings

N_IMAGES = 4000
SIZE = 64

__all__ = [
    "FACTOR_NAMES",
    "N_IMAGES",
    "SIZE",
    "Drawings",
    "demo_config",
    "draw_images",
    "networks",
    "prepare_demo",
    "save_drawings",
]


def networks() -> dict[str, dict[str, Any]]:
    """Return what is known of the shipped networks: hash, training and held-out accuracy per factor, by name."""
    known: dict[str, dict[str, Any]] = json.loads(_content("networks.json"))
    return known


def demo_config(folder: Path) -> RunConfig:
    """Return the demo's config with its images and weights in `folder`."""
    data = tomllib.loads(_content("demo.toml").decode())
    return RunConfig.from_dict(data, base=folder.resolve(), file=folder / "demo.toml")


def prepare_demo(folder: str | Path) -> RunConfig:
    """Put the demo's images, weights and config into `folder`, as far as they are not there, and return its config.

    The folder can then be moved, and `demo.toml` in it be changed and run.

    Raises:
        UsageError: when `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the demo cannot be put into {folder}: a file is in the way", hint="choose another --out")
    config = demo_config(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (model.checkpoint for model in config.models.values()):
        if name is not None:
            _put(folder / name, _content(name), replace=True)
    _put(folder / "demo.toml", _content("demo.toml"), replace=False)  # people change it
    images = Path(config.image_path)
    if not images.exists():
        save_drawings(images, draw_images(N_IMAGES, size=SIZE, seed=0))
    return config


def _content(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


def _put(path: Path, content: bytes, *, replace: bool) -> None:
    if path.exists() and (not replace or path.read_bytes() == content):
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)
