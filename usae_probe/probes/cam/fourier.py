"""Pictures as Fourier coefficients with decorrelated colours (Olah et al. 2017, Feature Visualization).

Gradient ascent on these coefficients instead of pixels is steepest ascent under another metric: all frequencies and
colours of natural pictures come in at a like pace, and the picture is not high-frequency noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

# Square root of the covariance of ImageNet's colours (rows red, green, blue), as published with the paper.
COLOUR_SQRT = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
LARGEST_COLUMN = math.sqrt(0.26**2 + 0.27**2 + 0.27**2)
"""The largest norm of a column of `COLOUR_SQRT`."""
START_SD = 0.01
_CONTRAST = 1 / 4  # of the published code: with it, START_SD begins at a nearly grey picture of any size

Spectrum = Float[Tensor, "b 3 h f 2"]
"""Real and imaginary coefficients: b pictures, 3 decorrelated colours, h x (w // 2 + 1) frequencies."""
Pictures = Float[Tensor, "b 3 h w"]
"""Pictures in [0, 1]."""
Picture = Float[Tensor, "3 h w"]
"""One of them."""


def picture_generator(seed: int, latent: int, restart: int = 0) -> torch.Generator:
    """Return the random numbers (on CPU) of one picture of a latent: the same whatever else is in its batch."""
    state = np.random.SeedSequence([seed, latent, restart]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def start_spectrum(
    size: tuple[int, int], generators: Sequence[torch.Generator], dtype: torch.dtype = torch.float32
) -> Spectrum:
    """Draw the coefficients to start from: normal noise of standard deviation `START_SD`, a nearly grey picture.

    Args:
        size: height and width of the picture in pixels.
        generators: one per picture.
        dtype: float32 or float64; both start at the same numbers.
    """
    shape = (3, size[0], size[1] // 2 + 1, 2)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in generators]
    return (START_SD * torch.stack(noise)).to(dtype)


def to_pictures(spectrum: Spectrum, size: tuple[int, int]) -> Pictures:
    """Turn coefficients into pictures, differentiably.

        p = sigmoid(C y),   y = irfft2(c / max(|ν|, 1 / max(h, w))) / 4,   C = COLOUR_SQRT / (its largest column norm)

    c are the complex coefficients, |ν| the frequency in cycles per pixel, irfft2 the orthonormal inverse transform of
    every colour; C mixes the three decorrelated colours into red, green and blue.

    Args:
        spectrum: [b, 3, h, w // 2 + 1, 2].
        size: h and w of the picture in pixels, odd or even.

    Returns:
        [b, 3, h, w] in [0, 1], in the spectrum's dtype.
    """
    coefficients = torch.view_as_complex(spectrum) * _spectrum_scale(size, spectrum)
    return mixed(torch.fft.irfft2(coefficients, s=size, norm="ortho") * _CONTRAST)


def from_picture(picture: Picture) -> Float[Tensor, "3 h f 2"]:
    """Return the coefficients of a picture, the inverse of `to_pictures`; black and white have none."""
    size = (picture.shape[-2], picture.shape[-1])
    decorrelated = torch.einsum("kc,chw->khw", torch.linalg.inv(colours(picture)), picture.logit())
    coefficients = torch.fft.rfft2(decorrelated / _CONTRAST, norm="ortho") / _spectrum_scale(size, picture)
    return torch.view_as_real(coefficients).clone()


def colours(like: Tensor) -> Float[Tensor, "3 3"]:
    """Return C, which mixes decorrelated colours: `COLOUR_SQRT` over its largest column norm."""
    return (torch.tensor(COLOUR_SQRT, dtype=torch.float64) / LARGEST_COLUMN).to(device=like.device, dtype=like.dtype)


def mixed(decorrelated: Pictures) -> Pictures:
    """Return sigmoid(C y)."""
    return torch.einsum("ck,bkhw->bchw", colours(decorrelated), decorrelated).sigmoid()


def to_levels(pictures: Pictures) -> UInt8[Tensor, "b 3 h w"]:
    """Round pictures in [0, 1] to the 256 levels a file holds."""
    return (pictures.detach() * 255).round().to(torch.uint8)


def _spectrum_scale(size: tuple[int, int], like: Tensor) -> Float[Tensor, "h f"]:
    """1 / max(|ν|, 1 / max(h, w)): natural pictures have amplitudes that fall with the frequency like this."""
    return 1 / frequencies(size, like).clamp_min(1 / max(size))


def frequencies(size: tuple[int, int], like: Tensor) -> Float[Tensor, "h f"]:
    """Return |ν| in cycles per pixel of every coefficient of a picture's half plane, in a tensor's dtype and device."""
    down = torch.fft.fftfreq(size[0], dtype=like.dtype, device=like.device)
    across = torch.fft.rfftfreq(size[1], dtype=like.dtype, device=like.device)
    return torch.hypot(down[:, None], across)
