"""A whole run in a second: two convolutional networks of a file on 60 drawn images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from usae_probe import Run, RunConfig
from usae_probe.demo import draw_images, save_drawings
from usae_probe.world import one_thread

FACTORY = """
import os, torch
from torch import nn

def build(width=8, seed=0):
    torch.manual_seed(seed + int(os.environ.get("OTHER_WEIGHTS", 0)))
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 7),
    )
"""
MODEL: dict[str, Any] = {
    "adapter": "module",
    "name": "nets.py:build",
    "layers": ["2"],
    "image_size": 16,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}
CONFIG: dict[str, Any] = {
    "models": {
        "a": {**MODEL, "layers": ["0", "2"]},
        "b": {**MODEL, "options": {"width": 6, "seed": 1}},
    },
    "images": {"source": "images.npz", "holdout": 0.3, "batch_size": 16},
    "buffer": {"shard_images": 20},
    "usae": {"n_latents": 16, "k": 2},
    "train": {"steps": 8, "batch_size": 16, "log_every": 2, "validate_every": 4},
    "probes": {"min_fires": 2, "fidelity_images": 0},
    "report": {"cards": 0},
}


def changed(**tables: dict[str, Any]) -> dict[str, Any]:
    """CONFIG with some keys replaced."""
    return CONFIG | {table: CONFIG[table] | keys for table, keys in tables.items()}


def put_tiny_run(folder: Path) -> Path:
    """Write the networks and the images that CONFIG names into a folder."""
    (folder / "nets.py").write_text(FACTORY)
    save_drawings(folder / "images.npz", draw_images(60, size=32))
    return folder


def finished_twice(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> tuple[Path, Path]:
    """A folder with a finished run and what it was made from, and a copy that no test touches."""
    base, kept = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("kept") / "run"
    put_tiny_run(base)
    with one_thread():
        Run(RunConfig.from_dict(config, base=base), base / "run").run()
    shutil.copytree(base, kept)
    return base, kept


def restored(base: Path, kept: Path) -> Path:
    """The folder as it was: paths are part of what a run depends on."""
    shutil.rmtree(base)
    shutil.copytree(kept, base)
    return base


def toml(tables: dict[str, Any], prefix: str = "") -> str:
    """Spell a config as TOML; keys that are None are left out."""
    plain = {key: value for key, value in tables.items() if value is not None and not isinstance(value, dict)}
    inner = (
        f"[{prefix}{key}]\n{toml(value, f'{prefix}{key}.')}" for key, value in tables.items() if isinstance(value, dict)
    )
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in plain.items()) + "".join(inner)
