"""A writer that is killed at any moment: the buffer opens, and the finished one equals an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, SiteSpec
from usae_probe.split import draw_split

SITES = {"vit/blocks.8": 16, "resnet/layer4": 24}
SHARDS, KILLS = 30, 50


def make_spec(shards: int = SHARDS) -> BufferSpec:
    return BufferSpec(
        sites=tuple(SiteSpec(site, *site.split("/"), "pool", d) for site, d in SITES.items()),
        source={"kind": "folder", "location": "/photos", "fingerprint": "f00", "n_images": 4 * shards},
        split=draw_split(4 * shards, holdout=0.1, validation=0.1, seed=1),
        split_request={"limit": None, "holdout": 0.1, "validation": 0.1, "seed": 1},
        shard_images=4,
    )


def rows_of(images: np.ndarray) -> dict[str, np.ndarray]:
    return {
        site: np.stack([np.random.default_rng((int(image), d)).normal(size=d) for image in images])
        for site, d in SITES.items()
    }


def write(path: Path, shards: int = SHARDS) -> ActivationBuffer:
    with BufferWriter(path, make_spec(shards)) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                shard.append(plan.images, rows_of(plan.images))
        return writer.close()


def content(path: Path) -> dict[str, bytes]:
    """All files but those of the lock, of which a killed writer leaves one more."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if not file.name.startswith(".writer.")}


class Forks:
    """Another process that forks a writer per line: each is killed by itself, and none imports anything again."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, path: Path, shards: int = SHARDS, call: int = 0) -> int:
        """Let a child write a buffer, and end just before its `call`-th fsync or replace; return its process id."""
        return self._ask(f"{shards} {call} {path}")

    def wait(self) -> int:
        """Return the child's exit status; until then its process id is nobody else's."""
        return self._ask("")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    with forks.process:
        yield forks
        assert forks.process.stdin is not None
        forks.process.stdin.close()
        assert forks.process.wait(30) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a buffer of twelve images holds: one shard of validation, one of holdout, three of training."""
    return content(write(tmp_path_factory.mktemp("small") / "acts", shards=3).path)


def demand_sound(path: Path) -> dict[str, int]:
    """The buffer opens and every sealed row is what was written; return when each sealed shard was."""
    buffer = ActivationBuffer(path)
    assert buffer.verify() == []
    for split, images in make_spec().split:
        rows = buffer.read(split)
        np.testing.assert_array_equal(rows.image_index, images[: rows.n])
        if rows.n:
            for site, expected in rows_of(rows.image_index).items():
                np.testing.assert_array_equal(rows.values[site], expected.astype(np.float16).astype(np.float32))
    return {entry.file: (path / entry.file).stat().st_mtime_ns for entry in buffer.shards}


def test_sigkill_at_random_moments(tmp_path: Path, forks: Forks) -> None:
    began = time.monotonic()
    forks.start(tmp_path / "whole")
    assert forks.wait() == 0
    seconds = time.monotonic() - began
    whole = content(tmp_path / "whole")
    rng = np.random.default_rng(0)
    path, killed, finished, middle, half_written, unlisted = tmp_path / "acts-0", 0, 0, 0, 0, 0
    sealed: dict[str, int] = {}
    while killed < KILLS:
        child = forks.start(path)
        time.sleep(rng.uniform(0, seconds / 3))
        os.kill(child, signal.SIGKILL)
        killed += forks.wait() == -signal.SIGKILL
        if not (path / "manifest.json").exists():
            continue
        now = demand_sound(path)
        assert sealed.items() <= now.items()  # what was sealed before is not written again
        sealed = now
        middle += 0 < len(sealed) < len(make_spec().plans())
        files = content(path)
        half_written += any(".tmp" in file for file in files)
        unlisted += any(file.endswith(".h5") and file.startswith("shard") and file not in sealed for file in files)
        if ActivationBuffer(path).complete:
            assert content(path) == whole
            finished += 1
            path, sealed = tmp_path / f"acts-{finished}", {}
    write(path)
    assert content(path) == whole
    assert middle > KILLS / 2
    assert min(half_written, unlisted) > 0  # kills did hit seals: before a file had its name, and before it was listed


@pytest.mark.parametrize("call", range(1, 41))
def test_sigkill_at_every_step_of_a_seal(tmp_path: Path, forks: Forks, small: dict[str, bytes], call: int) -> None:
    """Calls 1–3 publish the first manifest (fsync, replace, fsync of the folder), 4–6 a shard, 7–9 the manifest, …

    After five shards, 34–36 publish `buffer.h5` and 37–39 the last manifest; there is no 40th.
    """
    forks.start(tmp_path / "acts", 3, call)
    assert forks.wait() == (0 if call == 40 else -signal.SIGKILL)
    if (tmp_path / "acts" / "manifest.json").exists():
        assert ActivationBuffer(tmp_path / "acts").verify() == []
    write(tmp_path / "acts", shards=3)
    assert content(tmp_path / "acts") == small


def kill_at(call: int) -> None:
    """End this process just before its `call`-th fsync or replace."""
    left = [call]

    def wrapped(name: str) -> None:
        real = getattr(os, name)

        def run(*args: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        setattr(os, name, run)

    wrapped("fsync")
    wrapped("replace")


def serve() -> None:
    """Per line `SHARDS CALL FOLDER`: fork a writer, print its process id, and at the next line its status."""
    for line in sys.stdin:
        shards, call, folder = line.rstrip("\n").split(" ", 2)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if int(call):
                    kill_at(int(call))
                write(Path(folder), int(shards))
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
