"""Random transforms of a picture: by hand, within their bounds, and with a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from usae_probe.probes.cam import transforms
from usae_probe.probes.cam.fourier import picture_generator
from usae_probe.probes.cam.transforms import Jitter

EVERYTHING = Jitter(0.2, 0.1, rotation=20.0, crop=0.3, noise=0.01)
pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(n: int = 2, height: int = 6, width: int = 8) -> Tensor:
    return torch.rand(n, 3, height, width, dtype=torch.float64)


def generators(*latents: int, seed: int = 0) -> list[torch.Generator]:
    return [picture_generator(seed, latent) for latent in latents]


def moved(batch: Tensor, right: float, down: float, factor: float = 1.0) -> Tensor:
    shift = torch.tensor([[right, down]], dtype=batch.dtype).expand(len(batch), 2)
    return transforms.moved(batch, shift, torch.full((len(batch),), factor, dtype=batch.dtype))


def test_whole_pixels_move_the_picture() -> None:
    batch = pictures()  # 6 × 8: 2/8 of the width and −1/6 of the height are whole pixels
    found = moved(batch, right=2 / 8, down=-1 / 6)
    torch.testing.assert_close(found[..., :5, 2:], batch[..., 1:, :6])
    # what comes in is mirrored: column 1 shows column 0 again, column 0 column 1; the last row is itself again
    torch.testing.assert_close(found[..., :5, :2], batch[..., 1:, [1, 0]])
    torch.testing.assert_close(found[..., 5, 2:], batch[..., 5, :6])


def test_half_a_pixel_by_hand() -> None:
    # (0, 1, 4, 9) moved right by half a pixel: means of neighbours, and 0 with its mirror image 0 at the border
    batch = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=torch.float64).expand(1, 3, 2, 4)
    expected = torch.tensor([0.0, 0.5, 2.5, 6.5], dtype=torch.float64).expand(1, 3, 2, 4)
    torch.testing.assert_close(moved(batch, right=0.5 / 4, down=0.0), expected)


def test_twice_the_size_by_hand() -> None:
    # u = (x − 1.5)/2 + 1.5 for x = 0 … 3: places .75, 1.25, 1.75, 2.25 of (0, 1, 4, 9)
    # .75, 1 + .25 · 3 = 1.75, 1 + .75 · 3 = 3.25, 4 + .25 · 5 = 5.25
    batch = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=torch.float64).expand(1, 3, 4, 4)
    expected = torch.tensor([0.75, 1.75, 3.25, 5.25], dtype=torch.float64).expand(1, 3, 4, 4)
    torch.testing.assert_close(moved(batch, 0.0, 0.0, factor=2.0), expected)


def test_a_shift_is_of_the_picture_as_it_is_seen() -> None:
    # scaled by 2 about the centre, then moved by a whole pixel: not by two
    batch = pictures()
    torch.testing.assert_close(moved(batch, 1 / 8, 0.0, 2.0)[..., 1:], moved(batch, 0.0, 0.0, 2.0)[..., :-1])


def test_nothing_to_do_is_the_identity() -> None:
    batch = pictures()
    assert Jitter(0.0, 0.0)(batch, generators(1, 2)) is batch


def test_bounds_are_kept_and_nearly_reached() -> None:
    # A ramp shows where it was read: one pixel per level, far from the mirrored border.
    ramp = torch.arange(101, dtype=torch.float64).expand(1, 3, 101, 101)
    rng = generators(5)
    middle = torch.tensor([Jitter(0.1, 0.0)(ramp, rng)[0, 0, 50, 50].item() for _ in range(300)]) - 50
    assert middle.abs().max() <= 10.1
    assert middle.max() > 9
    assert middle.min() < -9
    steps = [Jitter(0.0, 0.2)(ramp, rng)[0, 0, 50] for _ in range(300)]
    factor = torch.tensor([10 / (step[55] - step[45]).item() for step in steps])
    assert 0.8 - 1e-6 <= factor.min() < 0.82
    assert 1.18 < factor.max() <= 1.2 + 1e-6
    torch.testing.assert_close(torch.stack([step[50] for step in steps]), torch.full((300,), 50.0).double())


def test_random_numbers_belong_to_the_picture() -> None:
    batch = pictures(3)
    together = Jitter(0.2, 0.1)(batch, generators(3, 8, 5))
    alone = Jitter(0.2, 0.1)(batch[1:2], generators(8))
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-12)
    assert not torch.allclose(Jitter(0.2, 0.1)(batch[1:2], generators(8, seed=1))[0], together[1])
    rng = generators(8)
    first, second = (Jitter(0.2, 0.1)(batch[1:2], rng) for _ in range(2))
    assert not torch.allclose(first, second)  # other numbers in every step
    single = Jitter(0.2, 0.1)(batch.float(), generators(3, 8, 5))
    torch.testing.assert_close(single.double(), together, rtol=0, atol=1e-4)


def test_gradient_equals_finite_differences() -> None:
    batch = pictures(1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: Jitter(0.2, 0.1)(p, generators(3)), batch)


def test_a_quarter_turn_is_a_quarter_turn() -> None:
    batch = pictures(2, 6, 6)
    quarter = torch.full((2,), torch.pi / 2, dtype=torch.float64)
    none, one = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    turned = transforms.moved(batch, none, one, quarter)
    torch.testing.assert_close(turned, batch.rot90(-1, dims=(2, 3)))  # clockwise: the top row becomes the right column


def test_a_turn_keeps_lengths_in_pictures_that_are_not_square() -> None:
    # a level that rises to the right by 1 per pixel rises downwards by 1 per pixel after a quarter turn clockwise
    ramp = torch.arange(41, dtype=torch.float64).expand(1, 3, 21, 41)
    angle = torch.tensor([torch.pi / 2], dtype=torch.float64)
    turned = transforms.moved(ramp, torch.zeros(1, 2).double(), torch.ones(1).double(), angle)[0, 0]
    torch.testing.assert_close(turned[:, 20].diff(), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(turned[10], torch.full((41,), 20.0, dtype=torch.float64))


def test_a_crop_fills_the_picture_with_a_window_inside_it() -> None:
    ramp = torch.arange(101, dtype=torch.float64).expand(1, 3, 101, 101)
    rng = generators(5)
    seen = [Jitter(crop=0.5)(ramp, rng)[0, 0, 50] for _ in range(300)]
    widths = torch.tensor([(row[60] - row[40]).item() / 20 for row in seen])  # of a pixel in the picture: the window
    assert 0.5 <= widths.min() < 0.52
    assert 0.98 < widths.max() <= 1.0
    ends = torch.stack([row[[0, -1]] for row in seen])
    assert ends.min() >= 0
    assert ends.max() <= 100  # never what is mirrored
    middles = ends.mean(dim=1)
    assert middles.min() < 35
    assert middles.max() > 65


def test_a_turn_stays_within_its_bounds() -> None:
    ramp = torch.arange(101, dtype=torch.float64).expand(1, 3, 101, 101)
    rng = generators(5)
    seen = [Jitter(rotation=10.0)(ramp, rng)[0, 0] for _ in range(300)]
    angles = torch.tensor(
        [torch.atan2(picture[60, 50] - picture[40, 50], picture[50, 60] - picture[50, 40]).item() for picture in seen]
    )
    degrees = angles.rad2deg()
    assert degrees.abs().max() <= 10 + 1e-6
    assert degrees.max() > 9
    assert degrees.min() < -9


def test_noise_has_the_deviation_asked_for_and_pictures_stay_pictures() -> None:
    grey = torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64)
    found = Jitter(noise=0.1)(grey, generators(1))
    assert (found - grey).std().item() == pytest.approx(0.1, rel=0.02)
    white = Jitter(noise=0.1)(grey + 0.5, generators(1))
    assert white.max() == 1
    assert white.min() < 0.9


def test_every_call_draws_as_many_numbers_whatever_is_set() -> None:
    batch = pictures(1)
    first, second = generators(3), generators(3)
    Jitter()(batch, first)
    Jitter(shift=0.1, rotation=5.0)(batch, second)
    assert torch.equal(torch.rand(4, generator=first[0]), torch.rand(4, generator=second[0]))
