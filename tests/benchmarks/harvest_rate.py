"""Harvest rate against the bare forward passes of the same models, timed in turn in one run. Prints JSON.

    python tests/benchmarks/harvest_rate.py [CONFIG.toml] [--images 1024]

Bare: the whole forward pass of every model on batches that are already preprocessed, nothing kept. Harvest: decoding,
preprocessing, captured forward passes, pooling, sealed shards on disk. Rounds alternate, medians are compared. The
write path is everything between a batch's rows and a sealed shard on disk: checks, conversion, moments, CRC, fsync.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from usae_probe.attaching import attach
from usae_probe.buffer import BufferWriter, OpenShard
from usae_probe.config import RunConfig
from usae_probe.harvesting import harvest
from usae_probe.hooks import HookedModel
from usae_probe.images import iter_batches, open_source

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10_real.toml"


def attached(config: RunConfig) -> list[HookedModel]:
    """Attach the config's models."""
    return [
        attach(
            entry.name,
            adapter=entry.adapter,
            name=name,
            layers=entry.layers,
            base=config.base,
            **entry.model_dump(exclude={"adapter", "name", "layers"}),
        )
        for name, entry in config.models.items()
    ]


def bare_seconds(models: list[HookedModel], inputs: list[list[torch.Tensor]]) -> float:
    """Return the seconds of plain forward passes over preprocessed batches."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in inputs:
            for model, x in zip(models, batch, strict=True):
                model.module(x)
    return time.perf_counter() - started


def harvest_seconds(models: list[HookedModel], config: RunConfig, images: int) -> float:
    """Return the seconds of a whole harvest into a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        settings = config.images.model_copy(update={"limit": images})
        harvest(models, config.image_path, folder, images_config=settings, buffer_config=config.buffer)
        return time.perf_counter() - started


@contextmanager
def timed_writing() -> Iterator[list[float]]:
    """Count, in the only entry, the seconds that harvests spend in the write path while the block runs."""
    spent = [0.0]

    def timed(of: type, name: str) -> tuple[type, str, Callable[..., Any]]:
        plain: Callable[..., Any] = getattr(of, name)

        def run(*args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain(*args, **more)
            finally:
                spent[0] += time.perf_counter() - started

        setattr(of, name, run)
        return of, name, plain

    before = [timed(OpenShard, "append"), timed(OpenShard, "demand_done"), timed(BufferWriter, "_seal")]
    before += [timed(BufferWriter, "_create"), timed(BufferWriter, "close")]
    try:
        yield spent
    finally:
        for of, name, plain in before:
            setattr(of, name, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default=EXAMPLE, type=Path)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    config = RunConfig.load(args.config)
    models = attached(config)
    source = open_source(config.image_path)
    size = config.images.batch_size
    batches = list(iter_batches(source, np.arange(args.images), size))
    inputs = [[model.preprocess(batch.pictures) for model in models] for batch in batches]
    bare_seconds(models, inputs[:2])  # warm-up
    bare, ours, writing = [], [], []
    for _ in range(args.rounds):
        bare.append(bare_seconds(models, inputs))
        with timed_writing() as spent:
            ours.append(harvest_seconds(models, config, args.images))
        writing.append(spent[0] / ours[-1])
    rates = {"bare": args.images / statistics.median(bare), "harvest": args.images / statistics.median(ours)}
    ratios = [b / h for b, h in zip(bare, ours, strict=True)]
    print(
        json.dumps(
            {
                "benchmark": "harvest_rate",
                "config": args.config.name,
                "images": args.images,
                "sites": [str(site) for model in models for site in model.sites],
                "bare_images_per_s": round(rates["bare"], 1),
                "harvest_images_per_s": round(rates["harvest"], 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "write_path_share": round(statistics.median(writing), 4),
                "write_path_shares": [round(share, 4) for share in writing],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
