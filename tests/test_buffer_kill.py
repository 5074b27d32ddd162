"""A writer that is killed at any moment: the buffer opens, and the finished one equals an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, SiteSpec
from usae_probe.split import draw_split

SITES = {"vit/blocks.8": 16, "resnet/layer4": 24}
SHARDS = 30


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
    writer = BufferWriter(path, make_spec(shards))
    for plan in writer.pending():
        with writer.shard(plan) as shard:
            shard.append(plan.images, rows_of(plan.images))
    return writer.close()


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def demand_sound(path: Path) -> int:
    """The buffer opens and every sealed row is what was written; return how many there are."""
    buffer = ActivationBuffer(path)
    assert buffer.verify() == []
    for split, images in make_spec().split:
        rows = buffer.read(split)
        np.testing.assert_array_equal(rows.image_index, images[: rows.n])
        if rows.n:
            for site, expected in rows_of(rows.image_index).items():
                np.testing.assert_array_equal(rows.values[site], expected.astype(np.float16).astype(np.float32))
    return sum(buffer.n_rows(split) for split, _ in make_spec().split)


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    began = time.monotonic()
    whole = write(tmp_path / "whole").path
    seconds = time.monotonic() - began
    rng = np.random.default_rng(0)
    path, found, round_ = tmp_path / "acts-0", [], 0
    for _ in range(12):
        with start(path) as process:
            assert process.stdout is not None
            process.stdout.readline()  # its imports are done
            time.sleep(rng.uniform(0, seconds / 3))
            process.send_signal(signal.SIGKILL)
        if (path / "manifest.json").exists():
            found.append(demand_sound(path))
            if ActivationBuffer(path).complete:
                assert content(path) == content(whole)
                round_ += 1
                path = tmp_path / f"acts-{round_}"
    write(path)
    assert content(path) == content(whole)
    assert any(0 < rows < 4 * SHARDS for rows in found)  # the kills did hit the middle


@pytest.mark.parametrize("call", range(2, 11))
def test_sigkill_at_every_step_of_a_seal(tmp_path: Path, call: int) -> None:
    """Calls 1–3 publish the first manifest (fsync, replace, fsync of the folder), 4–6 a shard, 7–9 the manifest."""
    write(tmp_path / "whole", shards=3)
    with start(tmp_path / "acts", str(call)) as process:
        assert process.wait(30) == -signal.SIGKILL
    if (tmp_path / "acts" / "manifest.json").exists():
        assert ActivationBuffer(tmp_path / "acts").verify() == []
    write(tmp_path / "acts", shards=3)
    assert content(tmp_path / "acts") == content(tmp_path / "whole")


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


if __name__ == "__main__":
    if len(sys.argv) > 2:
        kill_at(int(sys.argv[2]))
    print("ready", flush=True)
    write(Path(sys.argv[1]), *([3] if len(sys.argv) > 2 else []))
