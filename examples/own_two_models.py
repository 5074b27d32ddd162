"""Your own two models: from two checkpoints and a folder of pictures to measures, figures and one HTML page.

    python examples/own_two_models.py [FOLDER]

What a config file says (`usae-probe run mine.toml`) can be said from Python, too. The lines marked ← are the ones to
change: here they name two small networks and drawings that come with usae-probe, so that the script runs as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import usae_probe as up
from usae_probe.demo import prepare_demo


def main(folder: Path, *, limit: int = 2000, steps: int = 300) -> up.Run:
    """Do all stages of a run in `folder`; called again, it keeps what is finished."""
    prepare_demo(folder / "material")  # two checkpoints and 4,000 drawings
    vit = {"num_classes": 30, "img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    config = up.RunConfig.from_dict(
        {
            "models": {
                "resnet": {
                    "name": "resnet10t",  # ← any of timm's; with weights from the hub leave out `checkpoint`
                    "checkpoint": "material/resnet.safetensors",  # ← .safetensors, or a .pth of weights alone
                    "options": {"num_classes": 30, "channels": [32, 64, 96, 128]},  # ← what timm.create_model was given
                    "layers": ["layer3", "layer4"],  # ← `usae-probe layers timm:resnet10t` lists them
                    "image_size": 64,
                    "crop_pct": 1.0,
                },
                "vit": {
                    "name": "vit_tiny_patch16_224",
                    "checkpoint": "material/vit.safetensors",
                    "options": vit,
                    "layers": ["blocks.3@mean", "blocks.5"],  # the mean of the patch tokens; the class token
                    "image_size": 64,
                    "crop_pct": 1.0,
                },
            },
            # ← a folder of pictures, .npz, torchvision:CIFAR10, or datasets:NAME
            "images": {
                "source": "material/images.npz",
                "limit": limit,
            },  # ← a folder, torchvision:CIFAR10, datasets:NAME
            "usae": {"n_latents": 64, "k": 8},  # more latents for more images; k well under the layers' width
            "train": {"steps": steps, "batch_size": 256},
            "report": {"cards": 12},
        },
        base=folder,
    )
    run = up.Run(config, folder / "run")
    result = run.run()
    assert result.metrics is not None  # noqa: S101
    metrics = result.metrics
    print(f"universal latents: {metrics['counts']['universal']} of {metrics['n_latents']}")
    print(f"with images exchanged: {max(metrics['nulls'][0]['universal'])} at most")  # what chance would give
    for source, target in (("resnet/layer4", "vit/blocks.5"), ("vit/blocks.5", "resnet/layer4")):
        ridge = metrics["r2_ridge"][source][target]
        print(f"{source} → {target}: R² {metrics['r2'][source][target]:.2f} (a linear map: {ridge:.2f})")
    print(f"page: {folder / 'run/report.html'}")
    return run


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_two_models"))
