"""TransformerLens's hook points as layers: the residual stream, an attention's heads, one head alone.

    python examples/transformer_lens_hooks.py [FOLDER]

A Hugging Face ViT (here a tiny one with random weights, saved to a folder as `save_pretrained` does it; in real use
`google/vit-base-patch16-224`, or a folder of yours) against the trained ResNet of the demo: at which hook point does it
say most of what the ResNet says? Its weights are random, so what you see is a floor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import usae_probe as up
from usae_probe.demo import prepare_demo

HOOKS = ["blocks.0.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.attn.hook_z:0", "blocks.1.hook_out@mean"]


def save_vit(folder: Path) -> Path:
    """Write a folder as the hub's: configuration, weights, and how pictures become input."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=64, patch_size=16
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def main(folder: Path, *, limit: int = 1000, steps: int = 200) -> up.UniversalityReport:
    """Harvest at four hook points and one of the ResNet's layers, and compare them."""
    prepare_demo(folder / "material")
    with (
        up.attach(f"transformer-lens:{save_vit(folder / 'vit')}", name="tl", layers=HOOKS) as vit,
        up.attach(
            "timm:resnet10t",
            name="resnet",
            checkpoint=folder / "material/resnet.safetensors",
            options={"num_classes": 30, "channels": [32, 64, 96, 128]},
            layers=["layer4"],
            image_size=64,
            crop_pct=1.0,
        ) as resnet,
    ):
        buffer = up.harvest([vit, resnet], folder / "material/images.npz", out=folder / "acts", limit=limit)
    usae = up.train(buffer, n_latents=48, k=6, steps=steps, batch_size=128).usae
    report = up.evaluate(usae, buffer)
    for site in vit.sites:
        own, other = report.r2[str(site)][str(site)], report.r2[str(site)]["resnet/layer4"]
        print(f"{site!s:30}  d_in {usae.d_in[str(site)]:3}  R² of itself {own:.2f}, of resnet/layer4 {other:.2f}")
    return report


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/transformer_lens_hooks"))
