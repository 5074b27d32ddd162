"""A training that goes along with a writer of numbers, so that tests of it need no models.

Run as a script it does such a training in a folder, and goes on where an earlier one was killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from usae_probe.buffer import BufferSpec, BufferWriter, OnlineBuffer, OnlinePlan, OpenShard, Ring, SiteSpec
from usae_probe.config import BufferConfig, TrainConfig, UsaeConfig
from usae_probe.online import along, plan_online
from usae_probe.split import draw_split
from usae_probe.usae import USAE, StepRecord, TrainResult, train

SITES = {"a/x": 12, "b/y": 9}
SHAPE = UsaeConfig(n_latents=32, k=4)
HOW = TrainConfig(batch_size=24, lr=1e-2, validate_every=20, latent_dropout=0.0)
# Held-out rows take 117 kB on disk at most; beside them ten shards of 40 rows fit, of 31 that are harvested.
RING = BufferConfig(mode="ring", capacity="230kB", memory="1kB", warmup_rows=100, dtype="float32")  # type: ignore[arg-type]
STATE = "state.safetensors"


def ring_spec(*, images: int = 1500, rows_per_image: int = 1, shard_images: int = 40) -> BufferSpec:
    """A buffer of two sites that ten common factors explain, of 1,215 training images by default."""
    return BufferSpec(
        sites=tuple(
            SiteSpec(site, *site.split("/"), "pool", d, rows_per_image=rows_per_image) for site, d in SITES.items()
        ),
        source={"kind": "numbers", "location": "", "fingerprint": "f00", "n_images": images},
        split=draw_split(images),
        split_request={},
        dtype="float32",
        shard_images=shard_images,
    )


def rows_of(images: np.ndarray, rows_per_image: int = 1) -> dict[str, np.ndarray]:
    """Rows that depend on their image alone."""
    shared = np.concatenate([np.random.default_rng((9, int(i))).normal(size=(rows_per_image, 10)) for i in images])
    mixing = np.random.default_rng(0)
    return {site: (shared @ mixing.normal(size=(10, d))).astype(np.float32) for site, d in SITES.items()}


def write_all(path: Path, spec: BufferSpec, skip: Callable[[int], bool] = lambda _: False) -> None:
    """Write the whole buffer of a spec, without anybody along."""
    with BufferWriter(path, spec) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                _fill(shard, plan.images, spec, skip)
        writer.close()


def _fill(shard: OpenShard, images: np.ndarray, spec: BufferSpec, skip: Callable[[int], bool]) -> None:
    left = [image for image in images if not skip(int(image))]
    for image in sorted(set(images.tolist()) - set(left)):
        shard.skip(image, f"image {image}", "wanted so")
    if left:
        shard.append(np.array(left), rows_of(np.array(left), spec.sites[0].rows_per_image))


class Along:
    """What happened in a training along with a writer.

    Attributes:
        done: the training's result.
        plan: how it was trained from.
        sizes: bytes in the buffer's folder, after every shard.
        stalls: seconds that the producer spent in waiting for room, and the CPU seconds that it took for that.
    """

    done: TrainResult
    plan: OnlinePlan
    steps: int

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.stalls = [0.0, 0.0]


def train_along(
    folder: Path,
    *,
    store: BufferConfig = RING,
    how: TrainConfig = HOW,
    spec: BufferSpec | None = None,
    resume: bool = True,
    slow_writer: float | Callable[[], float] = 0.0,
    skip: Callable[[int], bool] = lambda _: False,
    fails_at: int = -1,
    progress: Callable[[StepRecord], None] | None = None,
) -> Along:
    """Train while a thread writes; `slow_writer` seconds pass before every shard."""
    online = plan_online(spec or ring_spec(), store, SHAPE, how)
    seen = Along()
    seen.plan, seen.steps = online.plan, online.train.n_steps(online.plan.rows // how.batch_size)

    def filled(writer: BufferWriter, ring: Ring) -> None:
        for plan in writer.pending():
            began, cpu = time.perf_counter(), time.thread_time()
            if not ring.make_room(plan):
                return
            seen.stalls[0] += time.perf_counter() - began
            seen.stalls[1] += time.thread_time() - cpu
            time.sleep(slow_writer() if callable(slow_writer) else slow_writer)
            if plan.index == fails_at:
                raise ValueError("the writer fails")
            with writer.shard(plan) as shard:
                _fill(shard, plan.images, online.spec, skip)
            seen.sizes.append(sum(file.stat().st_size for file in writer.path.glob("shard-*")))
            ring.sealed()

    def trained(buffer: OnlineBuffer) -> TrainResult:
        state = folder / STATE if resume else None
        return train(buffer, usae_config=SHAPE, train_config=online.train, resume=state, progress=progress)

    seen.done = along(folder / "buffer", online, store, filled, trained)
    return seen


def weights(folder: Path) -> USAE:
    """What the script saved."""
    return USAE.load(folder / "usae.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    result = train_along(Path(sys.argv[1]), slow_writer=0.005)
    result.done.usae.save(Path(sys.argv[1]) / "usae.safetensors")
