"""Several GPUs, or processes: each takes an equal part of every batch.

    torchrun --nproc-per-node 2 examples/several_gpus.py [FOLDER]
    python examples/several_gpus.py [FOLDER]                             # the same in one process

With GPUs each process takes one of its own (nccl), otherwise the CPU (gloo). For a whole run the command line does it:
`torchrun --nproc-per-node 2 -m usae_probe run mine.toml`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import usae_probe as up


def main(folder: Path, *, n: int = 4000, steps: int = 100) -> None:
    """Train on one buffer from all processes; process 0 measures and saves."""
    with up.joined() as world:
        if world.main and not (folder / "acts/manifest.json").exists():
            draw = np.random.default_rng(0)
            concepts = (draw.random((n, 24)) < 0.1) * draw.uniform(0.5, 1.5, (n, 24))
            rows = {"a/x": concepts @ draw.normal(size=(24, 32)), "b/y": concepts @ draw.normal(size=(24, 48))}
            up.ActivationBuffer.from_arrays(
                {site: x.astype(np.float32) for site, x in rows.items()}, out=folder / "acts"
            )
        world.meet()
        buffer = up.ActivationBuffer(folder / "acts")
        run = up.train(buffer, n_latents=48, k=4, steps=steps, batch_size=256, world=world)
        if world.main:
            run.usae.save(folder / "usae.safetensors")
            report = up.evaluate(run.usae, buffer)
            print(f"{world.size} process(es): R² {report.r2['a/x']['b/y']:.3f}, {report.counts['universal']} universal")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/several_gpus"))
