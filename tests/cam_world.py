"""Two small untrained networks, a USAE over them, drawn pictures, and their buffer: what CAM's tests climb in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import nn

import usae_probe as up
from usae_probe.demo import draw_images
from usae_probe.harvesting import common_grid
from usae_probe.probes import natural_activations

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SITES = {"resnet": "resnet/layer4", "vit": "vit/blocks.1"}
DIMS = {"resnet/layer4": 16, "vit/blocks.1": 24}


def network(kind: str) -> nn.Module:
    """A small untrained model with weights that are not at timm's starts (some of those are zero)."""
    module: nn.Module
    if kind == "resnet":
        module = timm.create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8, num_classes=3)
    elif kind == "swin":
        options: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12}
        options |= {"depths": (1, 1), "num_heads": (2, 2), "num_classes": 3}
        module = timm.create_model("swin_tiny_patch4_window7_224", **options)
    else:
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
        module = timm.create_model("vit_tiny_patch16_224", **options)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.Linear, nn.LayerNorm)):
            spread = 1.0 if isinstance(part, nn.BatchNorm2d) else 0.3
            nn.init.normal_(part.weight, std=spread)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=spread)
    return module.eval()


def dictionary(dims: dict[str, int] = DIMS, *, double: bool = True, kernel: str = "auto", k: int = 4) -> up.USAE:
    """A USAE with random biases and a normalisation."""
    g = torch.Generator().manual_seed(1)
    normalisation = {site: (0.3 * torch.randn(d, generator=g), 0.7 + i) for i, (site, d) in enumerate(dims.items())}
    usae = up.USAE(dims, n_latents=40, k=k, normalisation=normalisation, kernel=kernel)
    with torch.no_grad():
        for bias in (*usae.b_enc, usae.b_dec):
            bias.add_(0.2 * torch.randn(bias.shape, generator=g))
    return usae.double() if double else usae


class World(NamedTuple):
    """What there is to climb in; `latents` fire in every site."""

    models: list[up.HookedModel]
    usae: up.USAE
    buffer: up.ActivationBuffer
    images: np.ndarray
    latents: list[int]


@contextmanager
def world(folder: Path, layers: dict[str, str], n: int = 60, **sizes: int) -> Iterator[World]:
    """Attach models ({kind: layer}), harvest n drawings, and make a USAE normalised by them."""
    images = draw_images(n, size=32).images
    with ExitStack() as closing:
        models = []
        for kind, layer in layers.items():
            size = sizes.get(kind, 32)
            given: dict[str, Any] = {"image_size": size, "mean": MEAN, "std": STD, "crop_pct": 1.0}
            models.append(closing.enter_context(up.attach(network(kind), name=kind, layers=[layer], **given)))
        buffer = up.harvest(
            models, images, folder / "acts", holdout=0.3, validation=0.0, batch_size=20, dtype="float32"
        )
        grid = common_grid([(model, site) for model in models for site in model.sites])
        moments = {site: buffer.moments(site) for site in buffer.sites}
        normalisation = {
            site: (torch.from_numpy(m.mean).float(), float(np.sqrt(m.variance.mean()))) for site, m in moments.items()
        }
        usae = up.USAE(buffer.d_in, n_latents=40, k=8, normalisation=normalisation, seed=2, grid=grid)
        yield World(models, usae, buffer, images, firing(usae, buffer))


def firing(usae: up.USAE, buffer: up.ActivationBuffer) -> list[int]:
    """The latents that fire in every site, those that fire most first."""
    found = natural_activations(usae, buffer, [0], sites=usae.sites)
    least = np.min([site.rate for site in found.sites.values()], axis=0)
    return [int(latent) for latent in np.argsort(-least) if least[latent] > 0.02]
