"""Preprocessing against Pillow, torchvision and timm, and its gradient against finite differences."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from usae_probe.errors import ConfigError, ImageError
from usae_probe.images import Preprocessing

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


def resizer(size: int | tuple[int, int], interpolation: str = "bicubic", crop_pct: float = 1.0) -> Preprocessing:
    size = (size, size) if isinstance(size, int) else size
    return Preprocessing(size, ZERO, ONE, interpolation, crop_pct)


def smooth_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with full range: a few waves of different directions per channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    channels = []
    for _ in range(3):
        waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(-2, 2, (4, 3))]
        total = np.sum(waves, axis=0)
        channels.append((total - total.min()) / np.ptp(total))
    return np.round(np.stack(channels, axis=-1) * 255).astype(np.uint8)


def to_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


def levels_from_pillow(pictures: list[np.ndarray], size: int, interpolation: str) -> Tensor:
    """What Pillow's resize gives, in whole levels."""
    resized = [np.asarray(Image.fromarray(p).resize((size, size), PILLOW[interpolation])) for p in pictures]
    return torch.stack([to_tensor(p) for p in resized]).float()


def natural(shared: Path, n: int) -> list[np.ndarray]:
    files = sorted((shared / "data" / "cifar10").rglob("*.jpg"))
    return [np.asarray(Image.open(f).convert("RGB")) for f in random.Random(0).sample(files, n)]


@pytest.mark.shared
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [9, 16, 24, 47, 112, 224])
def test_within_one_level_of_pillow_on_natural_pictures(shared: Path, size: int, interpolation: str):
    pictures = natural(shared, 50)
    expected = levels_from_pillow(pictures, size, interpolation)
    batch = torch.stack([to_tensor(p) for p in pictures])
    deviation = (resizer(size, interpolation).resize_crop(batch) * 255 - expected).abs()
    assert deviation.max() < 1.001
    assert deviation.mean() < 0.25
    # Floating pixels are not rounded. Pillow rounds between its passes and at the end: up to .62 + .5 levels.
    deviation = (resizer(size, interpolation).resize_crop(batch / 255) * 255 - expected).abs()
    assert deviation.max() < 1.13
    assert deviation.mean() < 0.35


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("source", "size"), [(64, 224), (300, 64), (300, 299), (50, 49), (20, 160)])
def test_within_one_level_of_pillow_on_smooth_pictures(source: int, size: int, interpolation: str):
    pictures = [smooth_picture(source, source, seed) for seed in range(3)]
    expected = levels_from_pillow(pictures, size, interpolation)
    found = resizer(size, interpolation).resize_crop([to_tensor(p) for p in pictures])
    deviation = (found * 255 - expected).abs()
    assert deviation.max() < 1.001
    assert deviation.mean() < 0.25


def test_bicubic_is_clipped_between_the_axes_as_pillow_does():
    # Black and white blocks overshoot most. One clip at the end would be off by about 10 levels.
    block = np.zeros((8, 8, 3), dtype=np.uint8)
    block[2:6, 2:6] = 255
    block[:2, :2] = 255
    expected = levels_from_pillow([block], 40, "bicubic")
    found = resizer(40).resize_crop([to_tensor(block)])
    assert (found * 255 - expected).abs().max() < 1.001
    assert found.min() == 0
    assert found.max() == 1


@pytest.mark.parametrize("size", [5, 9, 16, 24, 31, 33, 112, 224])
def test_nearest_equals_pillow(size: int):
    # 32 → 24 and 32 → 112 put places exactly between two source pixels.
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = resizer(size, "nearest").resize_crop([to_tensor(picture)])
    assert torch.equal((found * 255).round(), levels_from_pillow([picture], size, "nearest"))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("image_size", [(96, 96), (64, 96), (97, 51), (33, 33)])
@pytest.mark.parametrize(
    ("crop_pct", "crop_mode"), [(1.0, "center"), (0.875, "center"), (0.9, "center"), (0.9, "squash")]
)
def test_whole_pipeline_equals_timms(image_size: tuple[int, int], crop_pct: float, crop_mode: str, interpolation: str):
    how = {"interpolation": interpolation, "mean": MEAN, "std": STD, "crop_pct": crop_pct, "crop_mode": crop_mode}
    theirs = create_transform((3, *image_size), is_training=False, **how)
    ours = Preprocessing(image_size, **how)
    pictures = [smooth_picture(h, w, seed=h) for h, w in [(120, 90), (90, 121), (64, 64), (40, 201), (333, 50)]]
    found = ours([to_tensor(p) for p in pictures])
    expected = torch.stack([theirs(Image.fromarray(p)) for p in pictures])
    assert found.shape == expected.shape == (5, 3, *image_size)
    deviation = (found - expected).abs() * torch.tensor(STD)[:, None, None] * 255
    assert deviation.max() < 1.001
    assert deviation.mean() < 0.25


def test_gradient_equals_finite_differences():
    # A tiny picture away from 0 and 1, so that no clip is active.
    x = torch.rand(1, 3, 5, 6, dtype=torch.float64) * 0.2 + 0.4
    for interpolation in ("bilinear", "bicubic", "nearest"):
        for image_size in ((4, 4), (8, 7)):
            preprocess = Preprocessing(image_size, MEAN, STD, interpolation, crop_pct=0.9)
            assert torch.autograd.gradcheck(preprocess, (x.clone().requires_grad_(),))


def test_gradient_by_hand():
    # Nearest from 1×1 to 2×2: every output is (x - .5) / .25, so d(sum)/dx = 4 / .25 = 16 per channel.
    x = torch.full((1, 3, 1, 1), 0.3, requires_grad=True)
    Preprocessing((2, 2), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "nearest")(x).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 3, 1, 1), 16.0))


@pytest.mark.parametrize(
    ("given", "result"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_dtype(given: torch.dtype, result: torch.dtype):
    x = torch.rand(2, 3, 10, 10).to(given)
    assert resizer(7)(x).dtype == result


def test_right_size_is_not_resampled():
    picture = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8)
    assert torch.equal(resizer(12).resize_crop(picture), picture.float() / 255)
    # 12×20 covers 12×12 as it is: the crop starts at round((20 - 12) / 2) = 4.
    wide = torch.randint(0, 256, (1, 3, 12, 20), dtype=torch.uint8)
    assert torch.equal(resizer(12).resize_crop(wide), wide[..., 4:16].float() / 255)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(
    ("image_size", "crop_pct", "canvas"),
    # floor(24/.875) = floor(27.43), floor(31/.95) = floor(32.63), floor(20/.9) = floor(22.2), floor(30/.9) = 33
    [((24, 24), 1.0, (24, 24)), ((24, 24), 0.875, (27, 27)), ((31, 31), 0.95, (32, 32)), ((20, 30), 0.9, (22, 33))],
)
def test_a_picture_of_canvas_size_is_only_cropped(
    image_size: tuple[int, int], crop_pct: float, canvas: tuple[int, int], crop_mode: str
):
    preprocessing = Preprocessing(image_size, ZERO, ONE, crop_pct=crop_pct, crop_mode=crop_mode)
    assert preprocessing.canvas_size == canvas
    picture = torch.randint(0, 256, (1, 3, *canvas), dtype=torch.uint8)
    (height, width), (top, left) = image_size, (round((a - b) / 2) for a, b in zip(canvas, image_size, strict=True))
    expected = picture[..., top : top + height, left : left + width].float() / 255
    assert torch.equal(preprocessing.resize_crop(picture), expected)
    assert torch.equal(preprocessing.resize_crop(picture.double() / 255).float(), expected)


def test_crop_rounds_halves_to_even_as_torchvision():
    # Margins of 1 and 3 pixels: round(.5) = 0 and round(1.5) = 2.
    for width, left in [(13, 0), (15, 2)]:
        picture = torch.randint(0, 256, (1, 3, 12, width), dtype=torch.uint8)
        assert torch.equal(resizer(12).resize_crop(picture), picture[..., left : left + 12].float() / 255)


def test_different_sizes_keep_their_order():
    sizes = [(20, 30), (9, 9), (20, 30), (9, 8)]
    pictures = [to_tensor(smooth_picture(h, w, seed)) for seed, (h, w) in enumerate(sizes)]
    together = resizer(16)(pictures)
    alone = torch.cat([resizer(16)([picture]) for picture in pictures])
    assert torch.allclose(together, alone, atol=1e-6)


def test_equal_shapes_are_resized_together(monkeypatch: pytest.MonkeyPatch):
    calls: list[torch.Size] = []
    real = torch.nn.functional.interpolate

    def counted(x: Tensor, **options: object) -> Tensor:
        calls.append(x.shape)
        return real(x, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", counted)
    resizer(16)([torch.zeros(3, 9, 9, dtype=torch.uint8)] * 5)
    assert [shape[0] for shape in calls] == [5, 5]  # One call per axis.


def test_list_and_batch_agree():
    batch = torch.rand(3, 3, 10, 14)
    assert torch.equal(resizer(8)(batch), resizer(8)(list(batch)))


def test_empty_list():
    assert resizer((4, 6))([]).shape == (0, 3, 4, 6)


def test_normalise_by_hand():
    # (.5 - .4) / .2 = .5, (.5 - .5) / 1 = 0, (.5 - 0) / .25 = 2
    x = Preprocessing((1, 1), (0.4, 0.5, 0.0), (0.2, 1.0, 0.25)).normalise(torch.full((1, 3, 1, 1), 0.5))
    assert torch.allclose(x.flatten(), torch.tensor([0.5, 0.0, 2.0]))


def test_dict_round_trip_through_json():
    preprocess = Preprocessing((224, 192), MEAN, STD, "bilinear", 0.875)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    defaults = Preprocessing.from_dict({"image_size": [8, 8], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]})
    assert (defaults.interpolation, defaults.crop_pct) == ("bicubic", 1.0)


def test_from_dict_names_unknown_and_missing_keys():
    good = resizer(8).to_dict()
    with pytest.raises(ConfigError, match=r"no key 'crop_pc'.*did you mean 'crop_pct'"):
        Preprocessing.from_dict({**good, "crop_pc": 1.0})
    del good["mean"]
    with pytest.raises(ConfigError, match="lacks mean"):
        Preprocessing.from_dict(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (0, 8)}, r"image_size is \(0, 8\)"),
        ({"mean": (0.0, 0.0)}, r"mean is \(0.0, 0.0\), expected 3"),
        ({"mean": (0.0, 0.0, math.nan)}, "nan"),
        ({"std": (1.0, 0.0, 1.0)}, r"std is \(1.0, 0.0, 1.0\), expected 3 numbers above 0"),
        ({"interpolation": "bicubical"}, r"'bicubical'.*did you mean 'bicubic'"),
        ({"interpolation": "lanczos"}, "one of bilinear, bicubic, nearest"),
        ({"crop_pct": 0.0}, r"crop_pct is 0.0"),
        ({"crop_pct": 1.5}, r"crop_pct is 1.5"),
    ],
)
def test_bad_values(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**({"image_size": (8, 8), "mean": ZERO, "std": ONE} | change))


def test_bad_dtype():
    with pytest.raises(ImageError, match=r"dtype torch.int64, expected uint8 in \[0, 255\] or floating"):
        resizer(8)(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
