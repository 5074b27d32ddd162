"""Your own activations: arrays made elsewhere, one row per image or several, into a USAE, measures and files to share.

    python examples/own_activations.py [FOLDER]

Rows of all arrays go together: row i of each is of the same image, and the same place in it. Where an image has several
rows, `image_index` says which image each is of; images are held out whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import usae_probe as up


def activations(n_images: int, per_image: int) -> dict[str, np.ndarray]:
    """Stand for what you have: patch tokens of two models that share 16 of their concepts."""
    draw = np.random.default_rng(0)
    n = n_images * per_image

    def concepts(of: int) -> np.ndarray:
        return (draw.random((n, of)) < 0.1) * draw.uniform(0.5, 1.5, (n, of))

    shared = concepts(16)
    return {
        site: (shared @ draw.normal(size=(16, width)) + concepts(8) @ draw.normal(size=(8, width))).astype(np.float32)
        for site, width in (("clip/visual.11", 40), ("dino/blocks.11", 56))
    }


def main(folder: Path, *, n_images: int = 1500, per_image: int = 4, steps: int = 400) -> up.UniversalityReport:
    """Store, train, measure, export."""
    arrays = activations(n_images, per_image)
    of_image = np.repeat(np.arange(n_images), per_image)
    if not (folder / "acts/manifest.json").exists():
        up.ActivationBuffer.from_arrays(arrays, out=folder / "acts", image_index=of_image)
    buffer = up.ActivationBuffer(folder / "acts")  # on disk: HDF5 that any tool opens, with checksums
    print(buffer)

    usae = up.train(buffer, n_latents=48, k=6, steps=steps, batch_size=256).usae
    report = up.evaluate(usae, buffer)
    print(report.counts, f"R² {report.r2['clip/visual.11']['dino/blocks.11']:.2f}")

    # New rows: encode with one model's encoder, decode to the other's space.
    codes = usae.encode(torch.from_numpy(arrays["clip/visual.11"][:10]), "clip/visual.11")
    print("codes", tuple(codes.indices.shape), "decoded", tuple(usae.decode(codes, "dino/blocks.11").shape))

    usae.save(folder / "usae.safetensors")
    for site in usae.sites:
        up.export_sae(usae, site, folder / "export" / site.replace("/", "__"), force=True)  # as SAELens loads it
    print("exported", sorted(path.name for path in (folder / "export").iterdir()))
    return report


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_activations"))
