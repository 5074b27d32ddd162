"""Anonymous memory of writing and reading a buffer that is larger than its budget. Prints JSON.

    python tests/benchmarks/buffer_memory.py [--gb 5] [--budget-gb 1]

Each part runs in a process of its own, whose RssAnon (memory that is no file's, from /proc) is watched every 20 ms and
given above what it was after the imports: a writer of numbers, an epoch of shuffled batches, all rows in order, the
check of all checksums, and the export of a site. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, SiteSpec
from usae_probe.buffer.export import export
from usae_probe.split import draw_split

SITES = {"vit/blocks.11": 768, "vit/blocks.8": 768, "resnet/layer4": 512}
ROWS_PER_IMAGE = 196
BATCH = 1024


def anonymous() -> int:
    """Return this process's RssAnon in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def peak_of(work: Callable[[], object]) -> tuple[int, float]:
    """Return the peak of anonymous memory above what it was before, and the seconds."""
    before, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    work()
    took = time.perf_counter() - started
    over.set()
    watcher.join()
    return peak[0], took


def spec_of(bytes_: float) -> BufferSpec:
    """A buffer of patch rows that takes so much."""
    images = int(bytes_ / ROWS_PER_IMAGE / (2 * sum(SITES.values()) + 12))
    return BufferSpec(
        sites=tuple(SiteSpec(s, *s.split("/"), "patch", d, rows_per_image=ROWS_PER_IMAGE) for s, d in SITES.items()),
        source={"kind": "numbers", "location": "", "fingerprint": "f", "n_images": images},
        split=draw_split(images),
        split_request={},
    )


def write(folder: Path, size: float) -> None:
    block = np.random.default_rng(0).normal(size=(16 * ROWS_PER_IMAGE, max(SITES.values()))).astype(np.float32)
    with BufferWriter(folder, spec_of(size)) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                for first in range(0, len(plan.images), 16):
                    images = plan.images[first : first + 16]
                    rows = {s: block[: len(images) * ROWS_PER_IMAGE, :d] for s, d in SITES.items()}
                    shard.append(images, rows)
        writer.close()


def shuffled(buffer: ActivationBuffer) -> None:
    for _ in islice(buffer.batches("train", BATCH, seed=0), buffer.steps_per_epoch("train", BATCH)):
        pass


def in_order(buffer: ActivationBuffer) -> None:
    for _ in buffer.chunks("train", BATCH):
        pass


def part(name: str, folder: Path, size: float, budget: float) -> None:
    """Do one part in this process and print what it took."""

    def reading(read: Callable[[ActivationBuffer], object]) -> Callable[[], object]:
        return lambda: read(ActivationBuffer(folder, memory_budget=int(budget)))

    parts: dict[str, Callable[[], object]] = {
        "write": lambda: write(folder, size),
        "shuffled_epoch": reading(shuffled),
        "in_order": reading(in_order),
        "verify": reading(lambda buffer: buffer.verify()),
        "export": reading(lambda buffer: export(buffer, buffer.sites[0], folder.parent / "site.npy")),
    }
    peak, took = peak_of(parts[name])
    print(json.dumps({"peak_mb": round(peak / 1e6), "seconds": round(took, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=5)
    parser.add_argument("--budget-gb", type=float, default=1)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part(args.part[0], Path(args.part[1]), args.gb * 1e9, args.budget_gb * 1e9)
        return
    result: dict[str, object] = {"benchmark": "buffer_memory", "gb": args.gb, "budget_mb": round(args.budget_gb * 1000)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "acts"
        for each in ("write", "shuffled_epoch", "in_order", "verify", "export"):
            command = [sys.executable, __file__, "--gb", str(args.gb), "--budget-gb", str(args.budget_gb)]
            done = subprocess.run(
                [*command, "--part", each, str(folder)], check=True, stdout=subprocess.PIPE, text=True
            )
            result[each] = json.loads(done.stdout)
        buffer = ActivationBuffer(folder, memory_budget=int(args.budget_gb * 1e9))
        result |= {"bytes": buffer.nbytes, "shards": len(buffer.shards), "pool_shards": buffer.pool()}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
