"""Online: train on more rows than the disk holds, while they are harvested; stopped at any moment, it goes on.

    python examples/online_ring.py [FOLDER]

A row per place of the picture makes 16 times as many rows as pooled ones; the ring keeps training rows only until they
have been used. Kill the script and start it again: it ends with the weights of an undisturbed run.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import usae_probe as up
from usae_probe.demo import prepare_demo


def size(folder: Path) -> int:
    """Return the bytes of all shards that are there at the moment."""
    total = 0
    for path in folder.glob("shard-*.h5"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # dropped just now
            continue
    return total


def main(folder: Path, *, limit: int = 4000, capacity: str = "6MB") -> tuple[up.UniversalityReport, int]:
    """Harvest and train at once in a bounded folder; return the measures and the most bytes that lay on disk."""
    prepare_demo(folder / "material")
    common = {"image_size": 64, "crop_pct": 1.0}
    vit = {"num_classes": 30, "img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], size(folder / "ring"))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with (
            up.attach(
                "timm:resnet10t",
                name="resnet",
                checkpoint=folder / "material/resnet.safetensors",
                options={"num_classes": 30, "channels": [32, 64, 96, 128]},
                layers=["layer3@patch"],
                **common,
            ) as a,
            up.attach(
                "timm:vit_tiny_patch16_224",
                name="vit",
                checkpoint=folder / "material/vit.safetensors",
                options=vit,
                layers=["blocks.3@patch"],
                **common,
            ) as b,
        ):
            run = up.harvest_and_train(
                [a, b],
                folder / "material/images.npz",
                out=folder / "ring",
                resume=folder / "training.state",
                limit=limit,
                mode="ring",
                capacity=capacity,
                holdout=0.05,
                validation=0.05,
                shard_images=64,
                warmup_rows=4096,
                n_latents=64,
                k=8,
            )
    finally:
        done.set()
        watching.join()
    buffer = up.ActivationBuffer(folder / "ring")
    rows = sum(shard.rows for shard in buffer.shards if shard.split == "train")  # those dropped long ago, too
    bytes_per_row = 2 * sum(run.usae.d_in.values())  # float16
    print(f"{run.taken} steps on {rows:,} training rows, {rows * bytes_per_row / 1e6:.0f} MB in all")
    print(f"never more than {most[0] / 1e6:.1f} MB on disk (capacity {capacity})")
    report = up.evaluate(run.usae, buffer, linear=False)
    print(report.counts)
    return report, most[0]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/online_ring"))
