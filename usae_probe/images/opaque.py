"""A user's own opaque transform in place of the shared preprocessing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..shapes import Images, Pixels


class OpaqueTransform:
    """Apply a user's transform, PIL image to tensor [3,h,w], picture by picture.

    It harvests; gradients cannot flow through it, so maximisation works in the model's input space.

    Args:
        transform: called with an RGB PIL image.
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Pixels]) -> Images:
        """Transform a batch of pictures.

        Raises:
            ConfigError: when the transform returns no [3,h,w] tensor, or different sizes in one batch.
        """
        results = [self.transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
        for result in results:
            if not isinstance(result, Tensor) or result.dim() != 3 or result.shape != results[0].shape:
                given = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ConfigError(
                    f"the transform returned {given}, expected a tensor [3, h, w] of one size for all pictures",
                    hint="end it with a fixed-size crop and a conversion to tensor",
                )
        return torch.stack(results)

    def to_dict(self) -> dict[str, str]:
        """Describe it for the buffer's manifest; an opaque transform is known by its repr only.

        Without memory addresses: they differ in every process, and an interrupted harvest could not go on.
        """
        return {"opaque": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.transform))}
