"""From whatever a picture comes as to uint8 [H, W, 3]: files, Pillow images, tensors and arrays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ImageError

Picture = UInt8[np.ndarray, "h w 3"]
"""One decoded picture: red, green, blue; contiguous, writable and owned by the caller."""


def decode_file(file: Path | io.BytesIO, name: str) -> Picture:
    """Decode a picture file, or its bytes as an open file; `name` is what an error calls it.

    Raises:
        ImageError: when the file is missing, empty, truncated, damaged, too large or of a mode without a colour.
    """
    try:
        with Image.open(file) as image:
            return rgb_from_pil(image)
    except MemoryError:  # Says nothing about the picture.
        raise
    except ImageError as error:
        raise ImageError(f"{name}: {error.message}", hint=error.hint) from error
    # Pillow's readers raise whatever their parser meets on damaged bytes: OSError, SyntaxError, struct.error, KeyError…
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded: {type(error).__name__}: {error}") from error


def rgb_from_pil(image: Image.Image) -> Picture:
    """Convert a Pillow image of any mode: EXIF orientation applied, transparency over white, 16 bits scaled to 8.

    Raises:
        ImageError: for more pixels than Pillow's bomb limit, and for modes that do not say what white is.
    """
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow only warns up to twice its limit; a warning filter would be global state shared by all threads.
    if limit is not None and image.width * image.height > limit:
        raise ImageError(
            f"{image.width}×{image.height} pixels exceed Pillow's limit of {limit}",
            hint="scale the picture down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it",
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _rgb_from_gray16(np.asarray(image))
    if image.mode == "F":
        raise ImageError("floating grayscale does not say which value is white", hint="convert it to 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def rgb_from_item(item: Any) -> Picture:
    """Convert a data set's picture: Pillow image, tensor [3, h, w] or [1, h, w], or array [h, w, 3] or [h, w].

    Tensors and arrays are uint8, or floating in [0, 1], which is rounded to the nearest of 256 levels.

    Raises:
        ImageError: for anything else, saying what was found.
    """
    if isinstance(item, Image.Image):
        return rgb_from_pil(item)
    if isinstance(item, Tensor):
        found = f"a tensor of shape {list(item.shape)} and dtype {item.dtype}"
        values = item.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()
        if array.ndim == 3:
            array = array.transpose(1, 2, 0)
    elif isinstance(item, np.ndarray):
        found = f"an array of shape {list(item.shape)} and dtype {item.dtype}"
        array = item
    else:
        raise ImageError(
            f"found a {type(item).__module__}.{type(item).__qualname__}, expected a picture",
            hint="an item is a picture (PIL image, tensor [3, h, w], array [h, w, 3]) or a tuple (picture, label)",
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or array.size == 0:
        raise ImageError(f"found {found}, expected a tensor [3, h, w] or an array [h, w, 3] (1 channel for gray)")
    levels = array if array.dtype == np.uint8 else _levels(array, found)
    return np.array(np.broadcast_to(levels, (*levels.shape[:2], 3)), order="C")


def _levels(array: np.ndarray, found: str) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"found {found}, expected uint8, or floating in [0, 1]")
    # NaN fails this comparison too.
    if not (array.min() >= 0 and array.max() <= 1):
        raise ImageError(
            f"found {found} with values from {array.min():.4g} to {array.max():.4g}, expected [0, 1]",
            hint="leave normalisation out of the data set's transform: preprocessing does it",
        )
    return np.round(array * 255).astype(np.uint8)


def _rgb_from_gray16(gray: np.ndarray) -> Picture:
    """16-bit gray to RGB: 65535 becomes 255. Pillow's own conversion would clip at 255."""
    if gray.min() < 0 or gray.max() > 65535:
        raise ImageError(f"32-bit grayscale with values from {gray.min()} to {gray.max()}, expected 0 to 65535")
    levels = np.round(gray.astype(np.float32) / 257).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)
