"""CAM with models and USAE on a GPU: the pictures that the CPU makes, wherever each of them lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from usae_probe import maximize
from usae_probe.probes.cam import CamPicture

from .cam_world import World, world

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LAYERS = {"resnet": "layer4", "vit": "blocks.1"}
TINY: dict[str, Any] = {"steps": 6, "check_every": 3, "controls": 8}


def pictures(here: World, modes: tuple[str, ...], devices: dict[str, str], usae: str) -> list[CamPicture]:
    for model in here.models:
        model.module.to(devices[model.name])
    here.usae.to(usae)
    return maximize(here.usae, here.models, here.latents[:2], buffer=here.buffer, modes=modes, **TINY)


@pytest.mark.parametrize("usae", ["cuda", "cpu"])
@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cpu", "cuda")])
def test_pictures_as_on_the_cpu(devices: tuple[str, str], usae: str, tmp_path: Path) -> None:
    modes = ("independent", "joint", "contrast")
    with world(tmp_path, LAYERS) as here:
        for model in here.models:
            model.module.double()
        here.usae.double()
        expected = pictures(here, modes, dict.fromkeys(LAYERS, "cpu"), "cpu")
        found = pictures(here, modes, dict(zip(LAYERS, devices, strict=True)), usae)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a.latent, a.mode, a.sites) == (b.latent, b.mode, b.sites)
        for site in a.curves:
            assert a.curves[site] == pytest.approx(b.curves[site], rel=1e-4, abs=1e-4)
        assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1
        for site, score in a.scores.items():
            assert score.z_pre == pytest.approx(b.scores[site].z_pre, rel=1e-3, abs=1e-3)
            assert score.percentile == pytest.approx(b.scores[site].percentile, abs=2)


def test_repeatable_in_float32(tmp_path: Path) -> None:
    with world(tmp_path, LAYERS) as here:
        cuda = dict.fromkeys(LAYERS, "cuda")
        first, again = (pictures(here, ("independent",), cuda, "cuda") for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 2
        assert a.own.z_pre == pytest.approx(b.own.z_pre, rel=1e-2)
