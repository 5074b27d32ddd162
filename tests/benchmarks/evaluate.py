"""What an evaluation costs: its time against its encoder products alone, and its anonymous memory. Prints JSON.

    python tests/benchmarks/evaluate.py [--rows 1000000] [--n-latents 8168] [--k 64] [--rounds 1]

Two sites of 512 and 768 dimensions, one row per image, rows written once; an untrained USAE, whose latents fire at all
rates. The products are timed over the same chunks of rows, read from the buffer beforehand, in the same run. Memory is
RssAnon of this process above what it was before the call, sampled by a thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, SiteSpec
from usae_probe.probes import evaluate
from usae_probe.probes.rows import CHUNK_ROWS
from usae_probe.split import draw_split
from usae_probe.usae import USAE

SITES = {"left/layer": 512, "right/layer": 768}
HELD_OUT = 0.98


def written(folder: Path, rows: int) -> ActivationBuffer:
    """Write rows that share half of their 256 causes; `rows` of them are held out."""
    rng = np.random.default_rng(0)
    n = round(rows / HELD_OUT)
    mixing = {site: rng.normal(size=(256, d)).astype(np.float32) / 16 for site, d in SITES.items()}
    spec = BufferSpec(
        sites=tuple(SiteSpec(site, site.split("/")[0], "layer", "pool", d) for site, d in SITES.items()),
        source={"kind": "arrays", "location": "", "fingerprint": "benchmark", "n_images": n},
        split=draw_split(n, holdout=rows / n, validation=0.0, seed=0),
        split_request={"limit": None, "holdout": rows / n, "validation": 0.0, "seed": 0},
        shard_images=20_000,
        batch_size=20_000,
    )
    with BufferWriter(folder, spec) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                causes = rng.standard_normal((len(plan.images), 256), dtype=np.float32)
                own = rng.standard_normal((len(plan.images), 256), dtype=np.float32)
                own[:, :128] = causes[:, :128]
                values = {"left/layer": causes @ mixing["left/layer"], "right/layer": own @ mixing["right/layer"]}
                shard.append(plan.images, values)
        return writer.close()


@contextmanager
def watching() -> Iterator[dict[str, float]]:
    """Sample this process's anonymous memory; the largest, in MB above what it was at first."""
    found, stop = {"peak_mb": 0.0}, threading.Event()
    first = anonymous()

    def sample() -> None:
        while not stop.wait(0.05):
            found["peak_mb"] = max(found["peak_mb"], (anonymous() - first) / 1e6)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def anonymous() -> int:
    """Return RssAnon in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def products(usae: USAE, buffer: ActivationBuffer, rows: int) -> float:
    """Time the encoder products of all held-out rows, on chunks that are in memory already."""
    some = [chunk.values for _, chunk in zip(range(32), buffer.chunks("holdout", CHUNK_ROWS), strict=False)]
    x = [{site: usae.normalise(torch.from_numpy(v), site) for site, v in values.items()} for values in some]
    chunks = -(-rows // CHUNK_ROWS)
    with torch.no_grad():
        usae.z_pre(x[0]["left/layer"], "left/layer")
        started = time.perf_counter()
        for i in range(chunks):
            for site, values in x[i % len(x)].items():
                usae.z_pre(values, site)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--n-latents", type=int, default=8168)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(2)
    usae = USAE(SITES, args.n_latents, args.k)
    with tempfile.TemporaryDirectory() as folder:
        buffer = written(Path(folder) / "acts", args.rows)
        rounds = []
        for _ in range(args.rounds):
            alone = products(usae, buffer, args.rows)
            with watching() as memory:
                started = time.perf_counter()
                report = evaluate(usae, buffer)
                seconds = time.perf_counter() - started
            rounds.append(
                {
                    "products_s": round(alone, 2),
                    "evaluate_s": round(seconds, 2),
                    "ratio": round(seconds / alone, 3),
                    "anonymous_mb": round(memory["peak_mb"]),
                }
            )
        document = {
            "benchmark": "evaluate",
            "rows": report.n_rows_eval,
            "sites": SITES,
            "n_latents": args.n_latents,
            "k": args.k,
            "counts": report.counts,
            "rounds": rounds,
        }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
