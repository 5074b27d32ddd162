"""Fourier pictures: against a sum of waves, by hand, and what they promise of starts, ranges and gradients."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from usae_probe.probes.cam.fourier import COLOUR_SQRT, picture_generator, start_spectrum, to_levels, to_pictures

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(4, 4), (5, 5), (4, 7), (7, 4), (6, 3)]
# Largest column norm of COLOUR_SQRT: that of the first, (.26, .27, .27).
LARGEST = math.sqrt(0.26**2 + 2 * 0.27**2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def spectrum(size: tuple[int, int], n: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size[0], size[1] // 2 + 1, 2, dtype=dtype)


def sum_of_waves(coefficients: Tensor, size: tuple[int, int]) -> Tensor:
    """p from the definition, pixel by pixel: a real picture's spectrum is its half and that half's mirror image."""
    h, w = size
    full = torch.zeros(len(coefficients), 3, h, w, dtype=torch.complex128)
    half = torch.view_as_complex(coefficients.double())
    for u in range(h):
        for v in range(w // 2 + 1):
            du, dv = min(u, h - u) / h, v / w
            weight = 1 / max(math.sqrt(du**2 + dv**2), 1 / max(h, w))
            # The mirror image has the conjugate; where a frequency is its own mirror image, they share.
            full[:, :, u, v] += weight * half[:, :, u, v] * (0.5 if v in (0, w / 2) else 1)
            full[:, :, -u % h, -v % w] += weight * half[:, :, u, v].conj() * (0.5 if v in (0, w / 2) else 1)
    waves = torch.zeros(len(coefficients), 3, h, w, dtype=torch.complex128)
    for y in range(h):
        for x in range(w):
            for u in range(h):
                for v in range(w):
                    waves[:, :, y, x] += full[:, :, u, v] * cmath.exp(2j * math.pi * (u * y / h + v * x / w))
    assert waves.imag.abs().max() < 1e-9
    grey = waves.real / math.sqrt(h * w) / 4
    colours = [sum(COLOUR_SQRT[c][k] / LARGEST * grey[:, k] for k in range(3)) for c in range(3)]
    return torch.stack([1 / (1 + torch.exp(-colour)) for colour in colours], dim=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_sum_of_waves(size: tuple[int, int], dtype: torch.dtype) -> None:
    coefficients = spectrum(size, dtype=dtype)
    pictures = to_pictures(coefficients, size)
    assert pictures.shape == (2, 3, *size)
    assert pictures.dtype == dtype
    torch.testing.assert_close(pictures.double(), sum_of_waves(coefficients, size), rtol=1e-5, atol=1e-6)


def test_one_frequency_by_hand() -> None:
    # 4 × 4, first colour: constant coefficient 2; frequency 0 counts as 1/4, so it is scaled by 4.
    # y = 2 · 4 / √16 / 4 = .5 everywhere, and red = sigmoid(.26 · .5 / LARGEST), green and blue with .27.
    coefficients = torch.zeros(1, 3, 4, 3, 2, dtype=torch.float64)
    coefficients[0, 0, 0, 0, 0] = 2.0
    red, other = sigmoid(0.26 * 0.5 / LARGEST), sigmoid(0.27 * 0.5 / LARGEST)
    expected = torch.tensor([red, other, other], dtype=torch.float64)[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(to_pictures(coefficients, (4, 4))[0], expected)
    # One wave across (1/4 cycle per pixel, scaled by 4), second colour, real part 1, with its mirror image:
    # y = 2 · 4 cos(2πx/4) / √16 / 4 = .5 (1, 0, −1, 0); red takes .09/LARGEST of it, green nothing, blue −.09.
    coefficients = torch.zeros(1, 3, 4, 3, 2, dtype=torch.float64)
    coefficients[0, 1, 0, 1, 0] = 1.0
    part = 0.09 * 0.5 / LARGEST
    rows = [[sigmoid(part * wave) for wave in (s * 1, 0, s * -1, 0)] for s in (1, 0, -1)]
    expected = torch.tensor(rows, dtype=torch.float64)[:, None, :].expand(3, 4, 4)
    torch.testing.assert_close(to_pictures(coefficients, (4, 4))[0], expected)


@pytest.mark.parametrize("size", [(4, 5), (5, 4)], ids=str)
def test_gradient_equals_finite_differences(size: tuple[int, int]) -> None:
    coefficients = spectrum(size, n=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: to_pictures(c, size), coefficients)


def test_a_start_is_nearly_grey_and_its_own() -> None:
    def start(latents: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return start_spectrum((33, 48), [picture_generator(seed, latent) for latent in latents], dtype)

    starts = start([3, 8, 5])
    assert starts.shape == (3, 3, 33, 25, 2)
    assert starts.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(starts[1], start([8])[0])  # whatever else is in the batch
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], start([3], seed=1)[0])
    assert torch.equal(start([3], dtype=torch.float64).float(), start([3]))
    pictures = to_pictures(starts, (33, 48))
    assert (pictures - 0.5).abs().max() < 0.05
    # (seed, latent) and not a sum of them: the neighbours' pictures are no copies
    assert not torch.equal(start([1], seed=0), start([0], seed=1))


def test_the_callers_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    start_spectrum((8, 8), [picture_generator(0, 1)])
    assert torch.equal(torch.get_rng_state(), before)


def test_colours_of_a_start_vary_mostly_together() -> None:
    # C's first column is brightness: red, green and blue of a random picture correlate as in natural pictures.
    starts = start_spectrum((64, 64), [picture_generator(0, latent) for latent in range(8)], torch.float64)
    pixels = to_pictures(starts, (64, 64)).permute(1, 0, 2, 3).reshape(3, -1)
    correlation = torch.corrcoef(pixels)
    covariance = torch.tensor(COLOUR_SQRT, dtype=torch.float64) @ torch.tensor(COLOUR_SQRT, dtype=torch.float64).T
    deviation = covariance.diagonal().sqrt()
    torch.testing.assert_close(correlation, covariance / torch.outer(deviation, deviation), rtol=0.05, atol=0.02)


def test_levels_are_rounded() -> None:
    # 255 · (0, .25, .5, .501, 1) = 0, 63.75, 127.5 (to even: 128), 127.755, 255
    picture = torch.tensor([0.0, 0.25, 0.5, 0.501, 1.0]).expand(1, 3, 1, 5)
    assert to_levels(picture)[0, 0, 0].tolist() == [0, 64, 128, 128, 255]
