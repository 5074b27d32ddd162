"""A run folder with one damaged file: every command says what is wrong, or makes it anew; nothing else is lost."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from usae_probe.world import one_thread

from .command import Command, command
from .tiny_run import CONFIG, finished_twice, restored, toml

WITH_PICTURES = CONFIG | {
    "cam": {"latents": "0,1", "steps": 2, "exemplars": 2, "controls": 4},
    "report": {"cards": 3},
}
FILES = (
    "buffer/manifest.json",
    "buffer/shard-00000.h5",
    "cam/cam.json",
    "cam/latent-00000.json",
    "cam/latent-00000.npz",
    "history.jsonl",
    "latents.csv",
    "metrics.json",
    "report.html",
    "run.json",
    "usae.json",
    "usae.safetensors",
)
DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(300)),
    "another": lambda path: path.write_text('{"schema": 1}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
COMMANDS = (
    ("report", "run"),
    ("cam", "run", "--latents", "0"),
    ("export", "run", "--force"),
    ("buffer", "info", "run"),
    ("run", "c.toml", "--out", "run"),
)
LONG = ("run", "cam")
"""Given for two kinds of damage alone: they make anew what they find damaged."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return finished_twice(tmp_path_factory, WITH_PICTURES)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(
    name: str, finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli: Command = command(monkeypatch, capsys)
    for kind, damage in DAMAGE.items():
        for given in COMMANDS:
            if given[0] in LONG and kind not in ("cut", "a folder"):
                continue
            run = restored(*finished) / "run"
            (run.parent / "c.toml").write_text(toml(WITH_PICTURES))
            monkeypatch.chdir(run.parent)
            damage(run / name)
            before = contents(run)
            with one_thread():
                result = cli(*given)
            told = f"{name} {kind}, {' '.join(given)}: {result.err}"
            assert result.status in (0, 1, 2), told
            assert "this is a bug" not in result.err, told
            assert "Traceback" not in result.err, told
            if result.status:
                assert "error: " in result.err, told
            if result.status and kind != "a folder":  # which is in the way of results that are made anew
                assert {n: h for n, h in before.items() if contents(run).get(n) != h and n != name} == {}, told
