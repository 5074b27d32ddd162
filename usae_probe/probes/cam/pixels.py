"""From a picture to a model's input, differentiably: the shared preprocessing, or the input space itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from ...errors import UsaeProbeWarning, UsageError
from ...hooks import HookedModel
from ...images import Preprocessing
from ...shapes import Images

AnyPictures = Shaped[Tensor, "b 3 _ _"]
"""uint8 levels, or floating in [0, 1]."""

_PROBE_COLOUR = (64, 128, 192)  # three different levels, so that mixed or swapped channels show
_TOLERANCE = 1e-3  # of a channel's range; a quarter of a level


@runtime_checkable
class PictureSpace(Protocol):
    """Where a model's pictures are searched for."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        ...

    def __call__(self, pictures: AnyPictures) -> Images:
        """Turn pictures into model input, differentiable in floating ones."""
        ...


@dataclass(frozen=True)
class PreprocessedSpace:
    """Pictures of the size that the shared preprocessing does not resample.

    A picture that is saved and read again gives the same input.
    """

    preprocessing: Preprocessing

    @property
    def size(self) -> tuple[int, int]:
        """`canvas_size` of the preprocessing."""
        return self.preprocessing.canvas_size

    def __call__(self, pictures: AnyPictures) -> Images:
        """Crop and normalise."""
        return self.preprocessing(pictures)


@dataclass(frozen=True, eq=False)
class InputSpace:
    """Pictures of the size of a model's input, for a transform that gradients cannot flow through.

        input = lo + p (hi - lo) per channel, for a picture p in [0, 1]

    Exact for resize, crop, conversion to tensor and normalisation.

    Attributes:
        size: height and width of the input.
        lo, hi: [3, 1, 1], what a black and a white picture become.
    """

    size: tuple[int, int]
    lo: Float[Tensor, "3 1 1"]
    hi: Float[Tensor, "3 1 1"]

    def __call__(self, pictures: AnyPictures) -> Images:
        """Scale [0, 1] to the channels' ranges; pictures of another size are resampled to the input's first."""
        unit = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
        if tuple(unit.shape[-2:]) != self.size:
            unit = F.interpolate(unit, size=self.size, mode="bilinear", antialias=True)
        lo, hi = self.lo.to(unit), self.hi.to(unit)
        return lo + unit * (hi - lo)


def picture_space(model: HookedModel) -> PictureSpace:
    """Return the space of a model's pictures; warns when that is its input space.

    Raises:
        UsageError: when the model's own transform is more than a resize, crop and normalisation.
    """
    if isinstance(model.preprocess, Preprocessing):
        return PreprocessedSpace(model.preprocess)
    space = _input_space(model)
    warnings.warn(
        f"model '{model.name}' was attached with its own transform, which gradients cannot flow through: its pictures "
        f"are made in its input space, {space.size[0]} x {space.size[1]}, behind that transform's resize and crop",
        UsaeProbeWarning,
        stacklevel=3,
    )
    return space


def _input_space(model: HookedModel) -> InputSpace:
    colours = [(0, 0, 0), (255, 255, 255), _PROBE_COLOUR]
    # 224: the size that the hooked model's own dry run begins with.
    flat = [
        torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 224, 224).contiguous() for colour in colours
    ]
    black, white, probe = model.preprocess(flat).detach().cpu().double()
    lo, hi = (picture.mean(dim=(1, 2), keepdim=True) for picture in (black, white))
    space = InputSpace((black.shape[1], black.shape[2]), lo, hi)
    expected = space(flat[2][None, :, :1, :1])[0].double()
    span = hi - lo
    if not bool((span > 0).all()):
        raise _not_affine(
            model, f"white is not brighter than black in every channel: {_numbers(hi)} and {_numbers(lo)}"
        )
    for name, found, wanted in (("black", black, lo), ("white", white, hi), (str(_PROBE_COLOUR), probe, expected)):
        if not bool(((found - wanted).abs() <= _TOLERANCE * span).all()):
            raise _not_affine(model, f"a picture all {name} becomes {_numbers(found)}, expected {_numbers(wanted)}")
    return space


def _not_affine(model: HookedModel, reason: str) -> UsageError:
    return UsageError(
        f"the transform of model '{model.name}' is more than a resize, crop and normalisation, so pictures cannot be "
        f"made in its input space; {reason}",
        hint="attach the model with image_size, mean and std instead of transform",
    )


def _numbers(picture: Tensor) -> str:
    lo, hi = picture.amin(dim=(1, 2)).tolist(), picture.amax(dim=(1, 2)).tolist()
    return ", ".join(f"{a:.4g}" if a == b else f"{a:.4g} to {b:.4g}" for a, b in zip(lo, hi, strict=True))
