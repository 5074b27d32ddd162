"""Parametrisations: what is climbed is not the picture itself, but numbers that a canvas turns into it.

Steepest ascent on other numbers is steepest ascent under another metric, and leads to other pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .fourier import (
    LARGEST_COLUMN,
    Picture,
    Pictures,
    colours,
    frequencies,
    from_picture,
    mixed,
    start_spectrum,
    to_pictures,
)

_EDGE = 1 / 512  # half a level: black and white are no infinite logits


@runtime_checkable
class Canvas(Protocol):
    """A parametrisation of pictures of one size."""

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw the numbers of a nearly grey picture, or of one with nothing to see in it; on CPU."""
        ...

    def of(self, picture: Picture) -> Tensor:
        """Return the numbers of a given picture [3, h, w] in [0, 1], or of the nearest that there are numbers for."""
        ...

    def __call__(self, numbers: Float[Tensor, "b ..."]) -> Pictures:
        """Turn numbers into pictures in [0, 1], differentiably."""
        ...


@dataclass(frozen=True)
class FourierCanvas:
    """Fourier coefficients with decorrelated colours: all frequencies of natural pictures come in at a like pace.

    Olah et al. 2017, *Feature Visualization*; see `fourier.to_pictures`.

    Attributes:
        size: h and w in pixels.
    """

    size: tuple[int, int]

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw normal noise: a nearly grey picture."""
        return start_spectrum(self.size, [generator], dtype)[0]

    def of(self, picture: Picture) -> Tensor:
        """Return the coefficients of a picture, exact but for black and white."""
        return from_picture(picture.clamp(_EDGE, 1 - _EDGE))

    def __call__(self, numbers: Float[Tensor, "b 3 h f 2"]) -> Pictures:
        """Invert the transform."""
        return to_pictures(numbers, self.size)


@dataclass(frozen=True)
class PixelCanvas:
    """Pixels, each by its logit: p = sigmoid(y). What there is without any idea of a picture.

    Attributes:
        size: h and w in pixels.
    """

    size: tuple[int, int]

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw normal noise of σ = .01: a nearly grey picture."""
        return (0.01 * torch.randn((3, *self.size), generator=generator, dtype=torch.float64)).to(dtype)

    def of(self, picture: Picture) -> Tensor:
        """Return the logits, exact but for black and white."""
        return picture.clamp(_EDGE, 1 - _EDGE).logit()

    def __call__(self, numbers: Pictures) -> Pictures:
        """Return p."""
        return numbers.sigmoid()


@dataclass(frozen=True, eq=False)
class MacoCanvas:
    """Phases alone; the magnitudes are those of natural pictures and stay (MACO, Fel et al. 2023, 2306.06805).

        p = sigmoid(C irfft2(M e^{iφ})),   M = E|rfft2(C⁻¹ logit(natural picture))|

    A picture cannot put its power where natural pictures have none, so it needs no regulariser.

    Attributes:
        size: h and w in pixels.
        magnitude: [3, h, w // 2 + 1], M of the three decorrelated colours; default: `natural_law`.
    """

    size: tuple[int, int]
    magnitude: Float[Tensor, "3 h f"] = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if self.magnitude.numel() == 0:
            object.__setattr__(self, "magnitude", natural_law(self.size))

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw phases from -π to π: a natural spectrum with nothing to see in it."""
        drawn = torch.rand(self.magnitude.shape, generator=generator, dtype=torch.float64)
        return (torch.pi * (2 * drawn - 1)).to(dtype)

    def of(self, picture: Picture) -> Tensor:
        """Return the phases of a picture; its own magnitudes are lost."""
        return decorrelated_spectrum(picture[None])[0].angle()

    def __call__(self, numbers: Float[Tensor, "b 3 h f"]) -> Pictures:
        """Put the magnitudes to the phases, and invert the transform."""
        spectrum = torch.polar(self.magnitude.to(numbers).expand_as(numbers), numbers)
        return mixed(torch.fft.irfft2(spectrum, s=self.size, norm="ortho"))


def decorrelated_spectrum(pictures: Pictures) -> Tensor:
    """Return rfft2(C⁻¹ logit(p)), orthonormal and complex, [b, 3, h, w // 2 + 1]."""
    logits = pictures.clamp(_EDGE, 1 - _EDGE).logit()
    decorrelated = torch.einsum("kc,bchw->bkhw", torch.linalg.inv(colours(pictures)), logits)
    spectrum: Tensor = torch.fft.rfft2(decorrelated, norm="ortho")
    return spectrum


def mean_magnitude(pictures: Pictures) -> Float[Tensor, "3 h f"]:
    """Return M of natural pictures of one size, [n, 3, h, w] in [0, 1]: the mean magnitude of their spectra."""
    return decorrelated_spectrum(pictures).abs().mean(dim=0)


def natural_law(size: tuple[int, int]) -> Float[Tensor, "3 h f"]:
    """Return M where no images are at hand: amplitudes that fall as 1 / frequency, in the contrast of ImageNet.

        M(ν) ∝ 1 / |ν|,   M(0) = 0,   Σ_ν M² such that C y has the covariance of ImageNet's colours around grey

    The law is Field's (1987); the covariance is that of `fourier.COLOUR_SQRT`: a sigmoid near grey takes a quarter of
    the logits, so each decorrelated colour has a standard deviation of 4 times the largest column norm.
    """
    height, width = size
    frequency = frequencies(size, torch.zeros((), dtype=torch.float64))
    law = torch.where(frequency > 0, 1 / frequency.clamp_min(1e-12), 0.0)
    twice = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)  # a half plane stands for both
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    power = (law.square() * twice).sum() / (height * width)
    return (law * 4 * LARGEST_COLUMN / power.sqrt()).expand(3, -1, -1).clone()
