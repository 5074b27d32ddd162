"""Parametrisations: pictures come back, MACO keeps its magnitudes, and what stands in for natural images is natural."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from usae_probe.demo import draw_images
from usae_probe.images import at_size, open_source
from usae_probe.probes.cam.canvases import (
    Canvas,
    FourierCanvas,
    MacoCanvas,
    PixelCanvas,
    decorrelated_spectrum,
    mean_magnitude,
    natural_law,
)
from usae_probe.probes.cam.fourier import COLOUR_SQRT, picture_generator
from usae_probe.probes.cam.starts import Album

SIZES = [(8, 8), (9, 7), (6, 11)]

pytestmark = pytest.mark.usefixtures("one_thread")


def canvases(size: tuple[int, int]) -> list[Canvas]:
    return [FourierCanvas(size), PixelCanvas(size), MacoCanvas(size)]


def drawn(size: tuple[int, int]) -> Tensor:
    return 0.05 + 0.9 * torch.rand(3, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_comes_back(size: tuple[int, int]) -> None:
    picture = drawn(size)
    for canvas in (FourierCanvas(size), PixelCanvas(size)):
        torch.testing.assert_close(canvas(canvas.of(picture)[None])[0], picture)
    own = MacoCanvas(size, decorrelated_spectrum(picture[None])[0].abs())
    torch.testing.assert_close(own(own.of(picture)[None])[0], picture)


def test_black_and_white_come_back_to_half_a_level() -> None:
    picture = torch.tensor([0.0, 1.0]).repeat(3, 4, 4)
    for canvas in (FourierCanvas((4, 8)), PixelCanvas((4, 8))):
        found = canvas(canvas.of(picture)[None])[0]
        assert (found - picture).abs().max() <= 1 / 512 + 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_equal_finite_differences(size: tuple[int, int]) -> None:
    for canvas in canvases(size):
        numbers = canvas.draw(picture_generator(0, 1), torch.float64)[None].requires_grad_()
        assert torch.autograd.gradcheck(canvas, numbers)


def test_starts_are_the_pictures_own_and_in_the_dtype_asked_for() -> None:
    for canvas in canvases((16, 12)):
        one, again, other = (canvas.draw(picture_generator(0, latent), torch.float64) for latent in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert not torch.equal(one, canvas.draw(picture_generator(0, 1, 1), torch.float64))  # another restart
        assert torch.equal(canvas.draw(picture_generator(0, 1), torch.float32), one.float())
    for canvas in (FourierCanvas((16, 12)), PixelCanvas((16, 12))):
        picture = canvas(canvas.draw(picture_generator(0, 1), torch.float32)[None])
        assert (picture - 0.5).abs().max() < 0.05


def test_maco_changes_phases_alone() -> None:
    """Whatever the phases, the decorrelated picture has the given magnitudes: but where a frequency must be real."""
    size, magnitude = (8, 9), 0.1 + torch.rand(3, 8, 5, dtype=torch.float64)
    canvas = MacoCanvas(size, magnitude)
    found = decorrelated_spectrum(canvas(canvas.draw(picture_generator(0, 3), torch.float64)[None]))[0].abs()
    free = torch.ones(8, 5, dtype=torch.bool)
    free[:, 0] = False  # a half plane that is its own mirror image
    torch.testing.assert_close(found[:, free], magnitude[:, free])


def test_the_mean_magnitude_by_hand() -> None:
    # two pictures of one colour: their logits are ± 1 in all colours, and only frequency 0 is there:
    # of an orthonormal transform of 4 × 4 numbers y it is 4 y, y = C⁻¹ (1, 1, 1), of both pictures the same magnitude
    level = torch.tensor([1.0, -1.0], dtype=torch.float64).sigmoid()
    found = mean_magnitude(level[:, None, None, None].expand(2, 3, 4, 4))
    mixing = torch.tensor(COLOUR_SQRT, dtype=torch.float64) / math.sqrt(0.26**2 + 2 * 0.27**2)
    y = torch.linalg.solve(mixing, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0, 0], 4 * y.abs())
    assert found.flatten(1)[:, 1:].abs().max() < 1e-12


@pytest.mark.parametrize("size", [(64, 64), (33, 48)], ids=str)
def test_what_stands_in_for_images_falls_with_frequency_and_has_their_contrast(size: tuple[int, int]) -> None:
    law = natural_law(size)
    assert law.shape == (3, size[0], size[1] // 2 + 1)
    assert (law[:, 0, 0] == 0).all()
    torch.testing.assert_close(law[:, 0, 4], law[:, 0, 2] / 2)
    canvas = MacoCanvas(size)
    numbers = torch.stack([canvas.draw(picture_generator(0, latent), torch.float64) for latent in range(40)])
    logits = canvas(numbers).logit()
    # near grey a picture is a quarter of its logits: its covariance is that of ImageNet's colours
    covariance = torch.cov((logits / 4).permute(1, 0, 2, 3).flatten(1))
    root = torch.tensor(COLOUR_SQRT, dtype=torch.float64)
    torch.testing.assert_close(covariance, root @ root.T, rtol=0.1, atol=0.002)


def test_magnitudes_of_the_users_own_images() -> None:
    pictures = draw_images(30, size=32).images
    album = Album(open_source(pictures), seed=0)
    found = album.magnitude((16, 16))
    batch = torch.stack([at_size(picture, (16, 16)) for picture in pictures]).double()
    assert found is not None
    torch.testing.assert_close(found, mean_magnitude(batch))
    assert album.magnitude((16, 16)) is found  # made once
    assert Album(None, 0).magnitude((16, 16)) is None


def test_at_size_covers_and_keeps_the_centre() -> None:
    picture = np.zeros((10, 20, 3), dtype=np.uint8)
    picture[:, 5:15] = 255
    assert at_size(picture, (10, 10)).shape == (3, 10, 10)
    assert (at_size(picture, (10, 10)) == 1).all()
