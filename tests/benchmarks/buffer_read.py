"""Reading a buffer against `numpy.memmap` on flat files of the same bytes, in turn in one run. Prints JSON.

    python tests/benchmarks/buffer_read.py [--mb 1000] [--shard-images 0]

Sequential: all training rows in chunks, as float32. Shuffled: an epoch of batches of 1,024 rows, as float32, the same
rows in the same order from both. `whole`: the buffer fits its memory budget and is loaded; otherwise rows are mixed in
a pool. Checksums are compared before, all data are in the page cache, medians of alternating rounds are given. `mixing`
is the mean share of the pairs of rows of a batch that come from one shard, and of one image, against a perfect shuffle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, SiteSpec
from usae_probe.split import draw_split

SITES = {"vit/blocks.11": 768, "resnet/layer4": 512}
BATCH = 1024
ROWS_PER_IMAGE = 49


def make(folder: Path, megabytes: int, shard_images: int) -> tuple[ActivationBuffer, dict[str, np.ndarray]]:
    """Write a buffer and, of its training rows, a flat file per site."""
    row_bytes = 2 * sum(SITES.values()) + 12
    images = int(megabytes * 1e6 / row_bytes / ROWS_PER_IMAGE)
    spec = BufferSpec(
        sites=tuple(SiteSpec(s, *s.split("/"), "patch", d, rows_per_image=ROWS_PER_IMAGE) for s, d in SITES.items()),
        source={"kind": "numbers", "location": "", "fingerprint": "f", "n_images": images},
        split=draw_split(images, holdout=0.01, validation=0.01),
        split_request={},
        shard_images=shard_images,
    )
    block = np.random.default_rng(0).normal(size=(4096 * 7, max(SITES.values()))).astype(np.float16)
    flat = {site: open(folder / f"{i}.raw", "wb") for i, site in enumerate(SITES)}  # noqa: SIM115
    with BufferWriter(folder / "acts", spec) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                n = len(plan.images) * ROWS_PER_IMAGE
                rows = {s: np.resize(block[:, :d], (n, d)) for s, d in SITES.items()}
                shard.append(plan.images, rows)
                if plan.split == "train":
                    for site, values in rows.items():
                        flat[site].write(values.tobytes())
        writer.close()
    for file in flat.values():
        file.close()
    maps = {
        site: np.memmap(folder / f"{i}.raw", np.float16, "r").reshape(-1, d)
        for i, (site, d) in enumerate(SITES.items())
    }
    return ActivationBuffer(folder / "acts"), maps


def seconds(read: Callable[[], None]) -> float:
    started = time.perf_counter()
    read()
    return time.perf_counter() - started


def compared(ours: Callable[[], None], flat: Callable[[], None], rounds: int) -> dict[str, object]:
    """Return the median of what ours reads per second over what the flat file gives."""
    ours()
    flat()
    pairs = [(seconds(flat), seconds(ours)) for _ in range(rounds)]
    ratios = [plain / own for plain, own in pairs]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ours_s": round(statistics.median(own for _, own in pairs), 3),
        "memmap_s": round(statistics.median(plain for plain, _ in pairs), 3),
    }


def sequential(buffer: ActivationBuffer, flat: dict[str, np.ndarray], rounds: int) -> dict[str, object]:
    def from_flat() -> None:
        n = len(next(iter(flat.values())))
        for start in range(0, n, 4096):
            for values in flat.values():
                values[start : start + 4096].astype(np.float32)

    def from_buffer() -> None:
        for _ in buffer.chunks("train", 4096):
            pass

    return compared(from_buffer, from_flat, rounds)


def shuffled(buffer: ActivationBuffer, flat: dict[str, np.ndarray], rounds: int) -> dict[str, object]:
    steps = buffer.steps_per_epoch("train", BATCH)
    numbers = list(islice(buffer.numbers("train", BATCH, 0, 0), steps))

    def from_flat() -> None:
        for rows in numbers:
            for values in flat.values():
                values[rows].astype(np.float32)

    def from_buffer() -> None:
        for _ in islice(buffer.batches("train", BATCH, seed=0), steps):
            pass

    return compared(from_buffer, from_flat, rounds) | {"pool_shards": buffer.pool()}


def mixing(buffer: ActivationBuffer) -> dict[str, float]:
    """Return the mean share of pairs within a batch from one shard or image, by ours and by a perfect shuffle."""
    entries = [entry for entry in buffer.shards if entry.split == "train"]
    begins = np.cumsum([0, *(entry.rows for entry in entries)])
    n = int(begins[-1])
    steps = buffer.steps_per_epoch("train", BATCH)

    def shares(batches: Iterator[np.ndarray]) -> tuple[float, float]:
        found = []
        for rows in batches:
            shards = np.searchsorted(begins, rows, side="right") - 1
            found.append([_same(shards), _same(rows // ROWS_PER_IMAGE)])
        return tuple(np.mean(found, axis=0))  # type: ignore[return-value]

    ours = shares(islice(buffer.numbers("train", BATCH, 0, 0), steps))
    order = np.random.default_rng(1).permutation(n)
    perfect = shares(order[i * BATCH : (i + 1) * BATCH] for i in range(steps))
    in_order = shares(np.arange(i * BATCH, (i + 1) * BATCH) for i in range(steps))
    return {
        f"same_{what}_{who}": float(f"{value[index]:.3g}")
        for index, what in enumerate(("shard", "image"))
        for who, value in (("ours", ours), ("perfect", perfect), ("unshuffled", in_order))
    }


def _same(groups: np.ndarray) -> float:
    counts = np.unique(groups, return_counts=True)[1].astype(float)
    return float((counts * (counts - 1)).sum() / (len(groups) * (len(groups) - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--shard-images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        buffer, flat = make(Path(name), args.mb, args.shard_images)
        pooled = ActivationBuffer(buffer.path, memory_budget=int(args.mb * 1e6 / 4))
        whole = ActivationBuffer(buffer.path, memory_budget=int(args.mb * 1e6 * 2))
        entries = [entry for entry in buffer.shards if entry.split == "train"]
        result = {
            "benchmark": "buffer_read",
            "mb": args.mb,
            "training_shards": len(entries),
            "shard_mb": round(entries[0].size / 1e6, 1),
            "sequential": sequential(pooled, flat, args.rounds),
            "shuffled_pool": shuffled(pooled, flat, args.rounds),
            "shuffled_whole": shuffled(whole, flat, args.rounds),
            "mixing": mixing(pooled),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
