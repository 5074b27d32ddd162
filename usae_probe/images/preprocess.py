"""The one preprocessing of harvest and CAM: resize, centre crop and normalise as differentiable torch operations.

It follows timm's evaluation transform and Pillow's resampling: antialiased, one axis after
the other, clipped to the range of a picture after each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from ..errors import ConfigError, ImageError, nearest

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
CROP_MODES = ("center", "squash")

Batch = Sequence[Shaped[Tensor, "3 _ _"]] | Shaped[Tensor, "b 3 _ _"]
"""Pictures of different sizes in a list, or of one size in a tensor: uint8, or floating in [0, 1]."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes model input: `x = (crop(resize(picture)) / 255 - mean) / std`.

    The picture is scaled, keeping its aspect ratio, until it covers `floor(image_size / crop_pct)` (`squash`: to just
    that size, whatever its aspect ratio); the centre of `image_size` is kept. A picture that has the right size already
    is not resampled.

    Attributes:
        image_size: height and width of the model input in pixels.
        mean: subtracted per channel, in units of [0, 1] (red, green, blue).
        std: divides per channel, same units.
        interpolation: `bilinear`, `bicubic` (both antialiased) or `nearest`.
        crop_pct: share of the scaled picture's side that the crop keeps, in (0, 1].
        crop_mode: `center` or `squash`, as timm names them.

    Raises:
        ConfigError: for a value out of range.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ConfigError(f"image_size is {self.image_size!r}, expected (height, width) in pixels, each at least 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ConfigError(f"{name} is {values!r}, expected 3 finite numbers (red, green, blue)")
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std!r}, expected 3 numbers above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}",
                hint=nearest(self.interpolation, INTERPOLATIONS, n=1),
            )
        if self.crop_mode not in CROP_MODES:
            raise ConfigError(f"crop_mode is {self.crop_mode!r}, expected one of {', '.join(CROP_MODES)}")
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct is {self.crop_pct!r}, expected a share above 0 and at most 1")

    @property
    def canvas_size(self) -> tuple[int, int]:
        """Height and width of a picture before the crop, `floor(image_size / crop_pct)` per side.

        A picture of just this size is not resampled, whatever the crop mode.
        """
        height, width = self.image_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    def __call__(self, images: Batch) -> Float[Tensor, "b 3 h w"]:
        """Resize, crop and normalise; see `resize_crop` for what `images` may be."""
        return self.normalise(self.resize_crop(images))

    def resize_crop(self, images: Batch) -> Float[Tensor, "b 3 h w"]:
        """Resize and crop without normalisation: values in [0, 1].

        Args:
            images: a list of pictures [3, h, w] of any sizes, or one tensor [b, 3, h, w]; uint8, or floating in
                [0, 1], then the result is differentiable in it. float64 stays float64, everything else gives float32.
                uint8 pictures are rounded to whole levels (at most one level from Pillow's), floating ones are not.

        Raises:
            ImageError: for another shape or dtype.
        """
        if isinstance(images, Tensor):
            if images.ndim != 4 or images.shape[1] != 3:
                raise ImageError(f"a batch of shape {list(images.shape)}, expected [b, 3, h, w]")
            return self._resize_crop_batch(images)
        if not images:
            return torch.empty(0, 3, *self.image_size)
        groups = _group_by_shape(images)
        if len(groups) == 1:
            return self._resize_crop_batch(torch.stack(list(images)))
        done = torch.cat([self._resize_crop_batch(torch.stack([images[i] for i in group])) for group in groups])
        place = torch.empty(len(images), dtype=torch.long)
        place[[i for group in groups for i in group]] = torch.arange(len(images))
        return done[place.to(done.device)]

    def normalise(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """`(x - mean) / std` per channel, for x in [0, 1]."""
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device)
        return (x - mean[:, None, None]) / std[:, None, None]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` is the inverse."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: for an unknown or missing key, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                expected = ", ".join(known)
                raise ConfigError(f"preprocessing has no key {key!r}, only {expected}", hint=nearest(key, known))
        missing = [key for key in ("image_size", "mean", "std") if key not in data]
        if missing:
            raise ConfigError(f"preprocessing lacks {', '.join(missing)}", hint=f"given were: {', '.join(data)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**arguments)

    def _resize_crop_batch(self, batch: Tensor) -> Tensor:
        x = _to_unit(batch)
        size = self._scaled_size(x.shape[-2], x.shape[-1])
        # Pillow resamples the width first and clips in between: so do we, or strong edges differ by 10/255.
        for axis_size in ((x.shape[-2], size[1]), size):
            x = self._resize(x, axis_size)
        height, width = self.image_size
        # round() and not //: torchvision's CenterCrop rounds halves to even.
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
        x = x[..., top : top + height, left : left + width]
        # Pillow also rounds in between, and its ties cannot be reproduced: one rounding at the end stays within one
        # level of it (0.5 * sum|w| < 1 for both filters), two would be off by two levels in places.
        return x.mul(255).round_().div_(255) if batch.dtype == torch.uint8 else x

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Size after scaling and before the crop, rounded as timm does."""
        target_h, target_w = self.canvas_size
        if self.crop_mode == "squash":
            return target_h, target_w
        if target_h == target_w:
            longer = int(target_h * max(height, width) / min(height, width))
            return (longer, target_w) if width <= height else (target_h, longer)
        ratio = min(height / target_h, width / target_w)
        return round(height / ratio), round(width / ratio)

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(x.shape[-2:]) == size:
            return x
        if self.interpolation == "nearest":
            rows, columns = (_nearest_places(n_in, n_out) for n_in, n_out in zip(x.shape[-2:], size, strict=True))
            return x[..., rows, :][..., columns]
        x = F.interpolate(x, size=size, mode=self.interpolation, antialias=True)
        # Only bicubic overshoots.
        return x.clamp(0, 1) if self.interpolation == "bicubic" else x


def _group_by_shape(images: Sequence[Tensor]) -> list[list[int]]:
    """Positions of equal-shaped pictures together: one resize each."""
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ImageError(f"picture {i} of the batch has shape {list(image.shape)}, expected [3, h, w]")
        groups.setdefault((image.shape, image.dtype), []).append(i)
    return list(groups.values())


def _nearest_places(n_in: int, n_out: int) -> list[int]:
    """Source place of every output place along one axis: `floor((i + 1/2) n_in / n_out)`.

    Summed step by step as Pillow does: where that is a whole number, rounding error decides between two neighbours.
    """
    step = n_in / n_out
    return [int(place) for place in accumulate([step] * (n_out - 1), initial=step / 2)]


def _to_unit(batch: Tensor) -> Tensor:
    """Values in [0, 1] as float32, or float64 where given so."""
    if batch.dtype == torch.uint8:
        return batch.float() / 255
    if not batch.is_floating_point():
        raise ImageError(f"a batch of dtype {batch.dtype}, expected uint8 in [0, 255] or floating in [0, 1]")
    return batch if batch.dtype == torch.float64 else batch.float()


def at_size(picture: UInt8[np.ndarray, "_ _ 3"], size: tuple[int, int]) -> Float[Tensor, "3 h w"]:
    """Scale an image until it covers a size, and keep its centre; in [0, 1]."""
    covering = Preprocessing(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return covering.resize_crop([torch.from_numpy(np.array(picture)).permute(2, 0, 1)])[0]
