"""`--strict`: an image that cannot be decoded ends the harvest, also one that was left out before; else it is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from usae_probe import ActivationBuffer
from usae_probe.world import one_thread

from .command import Command, command
from .tiny_run import FACTORY, MODEL, toml


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    draw = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(40):
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"photos/{index:02d}.png")
    (tmp_path / "photos/07.png").write_bytes(b"")
    (tmp_path / "photos/23.png").write_bytes((tmp_path / "photos/22.png").read_bytes()[:60])
    (tmp_path / "nets.py").write_text(FACTORY)
    images = {"source": "photos", "batch_size": 8}
    config = {"models": {"a": MODEL}, "images": images, "buffer": {"shard_images": 8}, "usae": {"n_latents": 8, "k": 1}}
    (tmp_path / "c.toml").write_text(toml(config))
    monkeypatch.chdir(tmp_path)
    return command(monkeypatch, capsys)


def test_without_it_such_images_are_left_out_and_named(cli: Command) -> None:
    with one_thread():
        assert cli("harvest", "c.toml", "--out", "run").status == 0
    buffer = ActivationBuffer("run/buffer")
    assert sorted(image.name for image in buffer.skipped) == ["07.png", "23.png"]
    shown = cli("buffer", "info", "run").out
    assert "07.png" in shown
    refused = cli("harvest", "c.toml", "--out", "run", "--strict")  # of what was harvested without it
    assert (refused.status, "images.strict is set" in refused.err) == (1, True)
    assert cli("harvest", "c.toml", "--out", "run").status == 0


def test_with_it_the_first_one_ends_the_harvest_and_what_is_sealed_stays(cli: Command) -> None:
    with one_thread():
        refused = cli("harvest", "c.toml", "--out", "run", "--strict")
    assert refused.status == 1
    assert "images.strict is set, and an image cannot be decoded: " in refused.err
    assert "buffer info" in refused.err
    for name in ("07.png", "23.png"):
        Path("photos", name).write_bytes(Path("photos/22.png").read_bytes())
    with one_thread():
        again = cli("harvest", "c.toml", "--out", "other", "--strict")
    assert again.status == 0
    assert ActivationBuffer("other/buffer").skipped == []
