"""What pictures take from natural images: where to start, and how strong each frequency is."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ImageError, UsageError
from ...images import ImageSource, at_size
from ..natural import NaturalActivations
from .canvases import mean_magnitude
from .fourier import Picture

MAGNITUDE_IMAGES = 256


class Album:
    """The images of a run, at the sizes that pictures have.

    Args:
        source: may be None: then there is nothing to start from, and no magnitude.
        seed: of the images that magnitudes are the mean of.
    """

    def __init__(self, source: ImageSource | None, seed: int) -> None:
        self.source, self.seed = source, seed
        self._magnitudes: dict[tuple[int, int], Tensor] = {}

    def start(self, natural: NaturalActivations, latent: int, sites: tuple[str, ...], size: tuple[int, int]) -> Picture:
        """Return the image that drives a latent most: in the site of several where it drives it least.

        Raises:
            UsageError: without images.
        """
        if self.source is None:
            raise UsageError("there are no images to start from", hint="start = 'noise'")
        least = np.min(
            [
                natural.strongest(natural.sites[site].standardised(latent, natural.sites[site].of(latent)))
                for site in sites
            ],
            axis=0,
        )
        return at_size(self.source.load(int(natural.images[int(least.argmax())])), size)

    def magnitude(self, size: tuple[int, int]) -> Float[Tensor, "3 h f"] | None:
        """Return the mean magnitude of images of a size; None without images. Images that cannot be read are left out.

        Raises:
            ImageError: when none can be read.
        """
        if self.source is None:
            return None
        if size not in self._magnitudes:
            n = min(MAGNITUDE_IMAGES, len(self.source))
            drawn = np.random.default_rng(self.seed).permutation(len(self.source))[:n]
            parts = [part for part in (self._of_one(int(image), size) for image in drawn) if part is not None]
            if not parts:
                raise ImageError(f"none of {n} images of {self.source.location} can be read")
            self._magnitudes[size] = torch.stack(parts).mean(dim=0)
        return self._magnitudes[size]

    def _of_one(self, image: int, size: tuple[int, int]) -> Tensor | None:
        try:
            picture = self.source.load(image)  # type: ignore[union-attr]
        except ImageError:
            return None
        return mean_magnitude(at_size(picture, size)[None].double())
