"""What goes wrong on real machines while a run harvests: each says what it is, and costs the unsealed shard at most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from usae_probe import ActivationBuffer, Run, RunConfig
from usae_probe.errors import UsaeProbeError
from usae_probe.pipeline import Progress, measuring
from usae_probe.report import figures

from .command import Command, command
from .tiny_run import FACTORY, changed, put_tiny_run, toml

pytestmark = pytest.mark.usefixtures("one_thread")
SLOW = FACTORY.replace("nn.Conv2d(3,", "Slow(3,").replace(
    "def build",
    """
import time

class Slow(nn.Conv2d):
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return super().forward(x)

def build""",
)
SMALL = {"shard_images": 5}
RING = {"shard_images": 2, "mode": "ring", "capacity": "118kB", "memory": "1kB", "warmup_rows": 9}
ALONG = {"train": {"steps": None, "batch_size": 4}, "images": {"holdout": 0.1, "batch_size": 4}}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "training_curves", lambda _, path: path.touch())
    monkeypatch.setattr(measuring, "universality_figures", lambda *_: [])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    put_tiny_run(tmp_path)
    (tmp_path / "nets.py").write_text(SLOW)
    (tmp_path / "c.toml").write_text(toml(changed(buffer=SMALL, images={"batch_size": 4})))
    (tmp_path / "ring.toml").write_text(toml(changed(buffer=RING, **ALONG)))
    return tmp_path


@contextmanager
def started(base: Path, config: str, slow: str) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, with `slow` seconds in every forward pass; it is gone when the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "usae_probe", "run", config, "--out", "r"],
        env=os.environ | {"SLOW": slow, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=base,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("config", ["c.toml", "ring.toml"])
@pytest.mark.parametrize("apart", [0.0, 0.05])
def test_ctrl_c_twice(base: Path, config: str, apart: float) -> None:
    """The second may come while the first is being seen to; the same command goes on, to the same result."""
    with started(base, config, slow="0.02") as process:
        wait_for(base / "r/buffer/shard-00009.h5", process)
        process.send_signal(signal.SIGINT)
        time.sleep(apart)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), err
    assert ActivationBuffer(base / "r/buffer").verify() == []
    settings = RunConfig.load(base / config)
    Run(settings, base / "r").run()
    Run(settings, base / "whole").run()
    assert (base / "r/usae.safetensors").read_bytes() == (base / "whole/usae.safetensors").read_bytes()


def test_a_clock_that_jumps(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes back a day between any two looks at the clock, and files come from the future."""
    now = iter(range(10**9, 0, -86_400))
    settings = RunConfig.load(base / "c.toml")

    def stop(progress: Progress) -> None:
        if progress.done > 30:
            raise RuntimeError("stopped")

    with monkeypatch.context() as odd:
        odd.setattr(time, "time", lambda: float(next(now)))
        odd.setattr(time, "time_ns", lambda: next(now) * 10**9)
        with pytest.raises(RuntimeError):
            Run(settings, base / "r", progress=stop).run()
        for file in (base / "r/buffer").iterdir():
            os.utime(file, (4e9, 4e9))
        Run(settings, base / "r").run()
    Run(settings, base / "whole").run()
    for file in (base / "whole/buffer").iterdir():
        assert (base / "r/buffer" / file.name).read_bytes() == file.read_bytes()
    assert (base / "r/usae.safetensors").read_bytes() == (base / "whole/usae.safetensors").read_bytes()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """From the 25th time on, nothing that is synced fits the disk."""
    real, left = os.fsync, [25]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield patched


@pytest.mark.parametrize("config", ["c.toml", "ring.toml"])
def test_a_full_disk(base: Path, full: pytest.MonkeyPatch, config: str) -> None:
    settings = RunConfig.load(base / config)
    with pytest.raises((UsaeProbeError, OSError), match="No space left on device"):
        Run(settings, base / "r").run()
    full.undo()
    buffer = ActivationBuffer(base / "r/buffer")
    assert buffer.verify() == []
    assert buffer.shards
    assert not list(buffer.path.glob("*.tmp*"))
    Run(settings, base / "r").run()
    Run(settings, base / "whole").run()
    assert (base / "r/usae.safetensors").read_bytes() == (base / "whole/usae.safetensors").read_bytes()


def test_a_second_process_in_the_same_folder_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with started(base, "c.toml", slow="0.4") as process:
        wait_for(base / "r/buffer/shard-00001.h5", process)
        monkeypatch.chdir(base)
        run: Command = command(monkeypatch, capsys)
        refused = run("run", "c.toml", "--out", "r")
        assert refused.status == 1
        assert f"is being written by process {process.pid} on" in " ".join(refused.err.split())
        assert process.poll() is None
    assert run("harvest", "c.toml", "--out", "r").status == 0
    assert ActivationBuffer(base / "r/buffer").complete
