"""One pass over more rows than a ring holds, against the same rows stored. Prints JSON.

    python tests/benchmarks/online.py [--rows 600000] [--share 0.2] [--reuse 1] [--seeds 3]

The rows are those of the planted world of the acceptance test (`tests/planted.py`), drawn shard by shard. The ring
holds `share` of them beside the held-out ones. The stored buffer, of the same rows, is trained on in as many steps. Per
seed of the training: held-out R², universal latents, how many of the 128 shared atoms were found, and seconds: of the
ring (drawing, writing and training at once), and of drawing and writing, then training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.planted import SITES, World, found, planted_rows, planted_world
from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, OnlineBuffer, Ring, SiteSpec
from usae_probe.config import BufferConfig, TrainConfig, UsaeConfig
from usae_probe.online import along, plan_online
from usae_probe.probes import evaluate
from usae_probe.split import draw_split
from usae_probe.usae import TrainResult, train

SHAPE = UsaeConfig(n_latents=512, k=8)
HELD_OUT = 10_000


def spec_of(rows: int) -> BufferSpec:
    share = HELD_OUT / rows
    return BufferSpec(
        sites=tuple(SiteSpec(site, *site.split("/"), "pool", d) for site, d in SITES.items()),
        source={"kind": "planted", "location": "", "fingerprint": "f", "n_images": rows},
        split=draw_split(rows, holdout=share, validation=share),
        split_request={},
        shard_images=4096,
    )


def fill(writer: BufferWriter, world: World, ring: Ring | None = None) -> None:
    """Draw and write all shards that are left."""
    for plan in writer.pending():
        if ring and not ring.make_room(plan):
            return
        with writer.shard(plan) as shard:
            shard.append(plan.images, planted_rows(world, len(plan.images), seed=plan.index))
        if ring:
            ring.sealed()


def by_ring(folder: Path, world: World, spec: BufferSpec, store: BufferConfig, how: TrainConfig) -> TrainResult:
    """Train along."""
    online = plan_online(spec, store, SHAPE, how)

    def trained(buffer: OnlineBuffer) -> TrainResult:
        return train(buffer, usae_config=SHAPE, train_config=online.train, resume=folder / "state")

    done = along(folder / "ring", online, store, lambda writer, ring: fill(writer, world, ring), trained)
    (folder / "state").unlink(missing_ok=True)
    return done


def measured(done: TrainResult, world: World, buffer: ActivationBuffer, seconds: float) -> dict[str, Any]:
    report = evaluate(done.usae, buffer)
    truth = found(world, done.usae, report)
    r2 = {f"{source} -> {target}": round(x, 4) for source, of in report.r2.items() for target, x in of.items()}
    return {
        "steps": done.taken,
        "r2": r2,
        "universal": report.counts["universal"],
        "shared_atoms_found": round(truth.recall, 3),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--reuse", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    world, spec = planted_world(0, n=1), spec_of(args.rows)
    held = 2 * HELD_OUT * spec.row_bytes
    capacity = int(held + args.share * args.rows * spec.row_bytes)
    store = BufferConfig(mode="ring", capacity=capacity, reuse=args.reuse, warmup_rows=65_536)  # type: ignore[arg-type]
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        with BufferWriter(folder / "store", spec) as writer:
            fill(writer, world)
            buffer = writer.close()
        written = time.perf_counter() - started
        for seed in range(args.seeds):
            how = TrainConfig(batch_size=1024, seed=seed)
            started = time.perf_counter()
            ring = by_ring(folder, world, spec, store, how)
            pair = {"ring": measured(ring, world, buffer, time.perf_counter() - started)}
            for file in (folder / "ring").iterdir():
                file.unlink()
            started = time.perf_counter()
            alone = train(buffer, usae_config=SHAPE, train_config=how.model_copy(update={"steps": ring.taken}))
            pair["stored"] = measured(alone, world, buffer, written + time.perf_counter() - started)
            worst = max(abs(pair["ring"]["r2"][cell] - x) for cell, x in pair["stored"]["r2"].items())
            ratio = pair["ring"]["universal"] / max(1, pair["stored"]["universal"])
            runs.append({"seed": seed, **pair, "largest_r2_difference": round(worst, 4), "universal": round(ratio, 3)})
        plan = plan_online(spec, store, SHAPE, how).plan
    result = {
        "benchmark": "online",
        "rows": args.rows,
        "capacity_mb": round(capacity / 1e6),
        "stored_mb": round(buffer.nbytes / 1e6),
        "shards_mixed": f"{plan.window} of {plan.shards}",
        "reuse": args.reuse,
        "runs": runs,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
