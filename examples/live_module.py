"""A live module: any `torch.nn.Module` in memory, with no adapter, no config and no checkpoint.

    python examples/live_module.py [FOLDER]

Attach to it, look at its layers, capture and replace activations, and train and measure a USAE beside another model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

import usae_probe as up
from usae_probe.demo import draw_images, prepare_demo


class TwoPaths(nn.Module):
    """A network of somebody's own: a path of edges and a path of colours, put together."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.Sequential(nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2))
        self.colours = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 16, 1), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores."""
        return self.head(torch.cat([self.edges(x).mean((2, 3)), self.colours(x).mean((2, 3))], dim=1))


def main(folder: Path, *, limit: int = 1500, steps: int = 400) -> up.UniversalityReport:
    """Compare the module with a trained network, and look into both."""
    torch.manual_seed(0)
    mine = TwoPaths().eval()
    prepare_demo(folder / "material")
    trained = timm.create_model(
        "resnet10t", num_classes=30, channels=[32, 64, 96, 128], checkpoint_path=folder / "material/resnet.safetensors"
    )
    # What no adapter knows must be said once: how pictures become the module's input (or transform= with your own).
    scale = {"image_size": 64, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    with (
        up.attach(mine, name="mine", layers=["edges", mine.colours], **scale) as a,
        up.attach(trained, name="resnet", layers=["layer3", "layer4"], image_size=64, crop_pct=1.0) as b,
    ):
        print([(layer.name, layer.output_shape) for layer in a.layers()][:4])

        pictures = torch.as_tensor(draw_images(4, size=64).images).permute(0, 3, 1, 2)
        batch = a.preprocess(list(pictures))
        activations = a.capture(batch, ["edges.0", "edges"])  # as plain forward hooks would see them
        print({name: tuple(values.shape) for name, values in activations.items()})
        without = a.splice(batch, "colours", torch.zeros_like)  # the output, had that path said nothing
        print("taking out the colours moves the scores by", f"{(without - mine(batch)).abs().mean():.3f}")

        buffer = up.harvest([a, b], folder / "material/images.npz", out=folder / "acts", limit=limit)
        run = up.train(buffer, n_latents=48, k=6, steps=steps, batch_size=128)
        report = up.evaluate(run.usae, buffer)
        print(f"mine/colours → resnet/layer4: R² {report.r2['mine/colours']['resnet/layer4']:.2f}")
        print(report.counts)
        strongest = (report.universal or report.latents)[:1]  # of a network that is not trained maybe none is universal
        pictures = up.maximize(run.usae, [a, b], latents=strongest, buffer=buffer, steps=32)
        print([(p.latent, p.mode, p.sites, np.round([p.pixels.min(), p.pixels.max()], 2)) for p in pictures])
    # Behind the `with` block the modules are what they were: no hook is left.
    assert "__nnsight__" not in mine.__dict__  # noqa: S101
    return report


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/live_module"))
