"""Draw how rows of `@patch` sites pair up: one picture, three layers with grids of their own, one place in all of them.

    python examples/patch_pairing.py [examples/patch_pairing.png]

The values are captures of untrained timm models, so that no weights are needed: a place is the darker, the nearer its
row is to that of the highlighted place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image, ImageDraw

import usae_probe as up
from usae_probe.hooks import coarsest

SIZE = 224
SITES = {
    "resnet": ("timm:resnet18", "layer4@patch", "ResNet-18"),
    "vit14": ("timm:vit_small_patch14_dinov2", "blocks.0@patch", "ViT, patches of 14 pixels"),
    "vit16": ("timm:vit_tiny_patch16_224", "blocks.0@patch", "ViT, patches of 16 pixels"),
}
PLACE = (4, 1)  # row and column in the common grid: on the red door
MARK, INK, NEAR = "#d1495b", "#333333", "Blues"


def picture() -> np.ndarray:
    """Draw a house under a sun, uint8 [224, 224, 3]."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), "#bfe3f2")
    draw = ImageDraw.Draw(image)

    def scaled(*numbers: int) -> list[int]:
        return [4 * number for number in numbers]

    draw.rectangle(scaled(0, 160, 224, 224), fill="#8cb369")
    draw.ellipse(scaled(158, 18, 206, 66), fill="#f4d35e")
    draw.rectangle(scaled(24, 96, 136, 192), fill="#f3e9dc")
    draw.polygon(scaled(12, 98, 80, 38, 148, 98), fill="#9c6644")
    draw.rectangle(scaled(36, 126, 66, 192), fill="#c8553d")
    draw.rectangle(scaled(86, 116, 118, 146), fill="#3d5a80")
    draw.rectangle(scaled(180, 128, 190, 186), fill="#7f5539")
    draw.ellipse(scaled(160, 86, 210, 140), fill="#588157")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def nearness(rows: torch.Tensor, target: torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Return 1 for the row nearest to `target`, 0 for the farthest, as a map of `shape`."""
    rank = torch.cdist(rows.float(), target[None].float())[:, 0]
    scaled: np.ndarray = (1 - (rank - rank.min()) / (rank.max() - rank.min())).reshape(shape).numpy()
    return scaled


def framed(axes: Any, shape: tuple[int, int], grid: tuple[int, int], title: str) -> None:
    """Frame the highlighted place of the common grid, on a map of `shape` drawn in units of the picture."""
    height, width = SIZE / grid[0], SIZE / grid[1]
    corner = (PLACE[1] * width, PLACE[0] * height)
    for count, line in ((shape[0], axes.axhline), (shape[1], axes.axvline)):
        for i in range(count + 1):
            line(i * SIZE / count, color="white", linewidth=0.8)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=MARK, linewidth=2.6, zorder=5))
    axes.set(xlim=(0, SIZE), ylim=(SIZE, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=10, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def arrow(figure: Any, upper: Any, lower: Any, text: str) -> None:
    """Lead from a layer's own grid to the common one."""
    how: dict[str, Any] = {"coordsA": "axes fraction", "coordsB": "axes fraction"}
    ends = ConnectionPatch((0.5, -0.03), (0.5, 1.12), axesA=upper, axesB=lower, arrowstyle="-|>", color=INK, **how)
    figure.add_artist(ends)
    upper.text(0.53, -0.11, text, transform=upper.transAxes, fontsize=9, color=INK, va="center")


def main(path: Path) -> None:
    """Capture the three layers and draw."""
    drawn = picture()
    pixels = torch.from_numpy(drawn.copy()).permute(2, 0, 1)
    models = {}
    for name, (spec, layer, _) in SITES.items():
        options = {"img_size": SIZE} if "14" in name else {}
        # One crop for all: places coincide only in models that see the same part of a picture.
        models[name] = up.attach(
            spec, name=name, layers=[layer], pretrained=False, options=options, image_size=SIZE, crop_pct=1.0
        )
    grids = {name: model.layout(model.sites[0]).grid or (1, 1) for name, model in models.items()}
    common = coarsest(list(grids.values()))
    place = PLACE[0] * common[1] + PLACE[1]

    figure, axes = plt.subplots(2, 4, figsize=(11.2, 6.4), gridspec_kw={"hspace": 0.34, "wspace": 0.16})
    axes[0, 0].imshow(drawn, extent=(0, SIZE, SIZE, 0))
    framed(axes[0, 0], common, common, "the picture\nin the common grid")
    note = "\n".join(
        [
            f"The coarsest grid, {common[0]} × {common[1]}, is",
            "common to all sites.",
            "",
            f"Place ({PLACE[0]}, {PLACE[1]}) is row {place}:",
            f"token_index = {PLACE[0]} · {common[1]} + {PLACE[1]}.",
            f"Row {place} of every site is of the",
            "framed part of the picture.",
            "",
            "Colour: the darker, the nearer",
            f"a row is to row {place}.",
        ]
    )
    axes[1, 0].text(0, 0.5, note, transform=axes[1, 0].transAxes, fontsize=10, color=INK, va="center", linespacing=1.35)
    axes[1, 0].axis("off")
    for column, (name, model) in enumerate(models.items(), start=1):
        with torch.no_grad():
            batch = model.preprocess([pixels])
        site, grid = str(model.sites[0]), grids[name]
        own, paired = model.rows(batch)[site], model.rows(batch, grid=common)[site]
        layout = model.layout(model.sites[0])
        upper, lower = axes[0, column], axes[1, column]
        for panel, rows, shape in ((upper, own, grid), (lower, paired, common)):
            values = nearness(rows, paired[place], shape)
            panel.imshow(values, cmap=NEAR, vmin=-0.15, vmax=1.15, extent=(0, SIZE, SIZE, 0))
        prefix = "cls + " if layout.has_cls else ""
        title = f"{SITES[name][2]}\n{prefix}{grid[0]} × {grid[1]} places"
        framed(upper, grid, common, title)
        framed(lower, common, common, f"rows of {site}")
        arrow(figure, upper, lower, "as it is" if grid == common else "without cls, resampled")
        model.close()
    figure.savefig(path, dpi=140, bbox_inches="tight", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
