"""Pixel statistics: the formulas by slow oracles, gratings in their place, and a harvest like a model's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from usae_probe import attach
from usae_probe.buffer import JoinedBuffer
from usae_probe.demo import draw_images
from usae_probe.errors import BufferMismatchError, ImageError, UsageError
from usae_probe.harvesting import harvest
from usae_probe.images import ArraySource
from usae_probe.probes.pixels import (
    CELLS,
    FREQUENCIES,
    ORIENTATIONS,
    SIZE,
    PixelStatistics,
    _filters,
    attach_pixel_statistics,
    fit_pixel_statistics,
    log_energies,
    thumbnails,
)

N = 160


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return draw_images(N, size=SIZE, seed=0).images


@pytest.fixture(scope="module")
def statistics(drawn: np.ndarray) -> PixelStatistics:
    return fit_pixel_statistics(ArraySource(drawn), np.arange(N))


def pictures(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def grating(frequency: float, angle: float, amplitude: float = 0.25) -> Tensor:
    """A grey picture 0.5 + A cos 2πf(x cos θ + y sin θ), [1, 3, 64, 64]."""
    y, x = torch.meshgrid(torch.arange(float(SIZE)), torch.arange(float(SIZE)), indexing="ij")
    phase = 2 * math.pi * frequency * (x * math.cos(angle) + y * math.sin(angle))
    return (0.5 + amplitude * torch.cos(phase)).expand(1, 3, SIZE, SIZE)


def energies(images: Tensor) -> Tensor:
    """[b, frequency, orientation, row, column], logarithms."""
    filters = [factor.to(images.dtype) for factor in _filters()]
    return log_energies(images, *filters).view(-1, len(FREQUENCIES), ORIENTATIONS, CELLS, CELLS)


# --- by oracle and by hand ---


def slow_log_energies(image: np.ndarray) -> np.ndarray:
    """One picture [3, 64, 64] in float64, by convolution with two-dimensional filters: [3, 4, 4, 4]."""
    luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    out = np.empty((3, 4, 4, 4))
    for i, frequency in enumerate((0.25, 0.125, 0.0625)):
        for j in range(4):
            u, v = frequency * math.cos(j * math.pi / 4), frequency * math.sin(j * math.pi / 4)
            sigma = 0.56 / frequency
            r = math.ceil(3 * sigma)
            t = np.arange(-r, r + 1)
            normal = np.exp(-(t**2) / (2 * sigma**2))
            normal /= normal.sum()
            factors = []
            for w in (u, v):
                wave = np.exp(2j * np.pi * w * t)
                if abs(w) > 1e-9:
                    wave = wave - (normal * wave).sum()
                factors.append(normal * wave)
            kernel = np.outer(factors[1], factors[0])  # rows are y
            windows = np.lib.stride_tricks.sliding_window_view(np.pad(luma, r, mode="reflect"), (2 * r + 1,) * 2)
            energy = np.abs(np.einsum("yxab,ab->yx", windows, kernel, optimize=True)) ** 2
            for row in range(4):
                for column in range(4):
                    cell = energy[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                    out[i, j, row, column] = np.log(cell.mean() + 1e-6)
    return out


def test_energies_are_those_of_two_dimensional_filters(drawn: np.ndarray) -> None:
    images = pictures(drawn[:2]).double()
    expected = np.stack([slow_log_energies(image) for image in images.numpy()])
    np.testing.assert_allclose(energies(images).numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(energies(images.float()).numpy(), expected, rtol=0, atol=2e-3)


def test_the_energy_of_a_grating_by_hand() -> None:
    """A cos 2πfx is half A e^{2πifx} and half its mirror, which the filter does not see: |A / 2|² = .25² / 4 = .015625.

    Reflected at x = 0 the cosine goes on as it was; at x = 63 it does not, which the first two columns do not see:
    they end at pixel 31, and the filter of f = 1/8 reaches 3 · .56 · 8 < 14 pixels further.
    """
    found = energies(grating(1 / 8, 0.0).double()).exp()[0, 1, 0, :, :2]
    np.testing.assert_allclose(found, 0.015625, rtol=2e-3)


@pytest.mark.parametrize("frequency", range(3))
@pytest.mark.parametrize("orientation", range(4))
def test_a_grating_has_its_largest_energy_in_its_frequency_and_orientation(frequency: int, orientation: int) -> None:
    found = energies(grating(FREQUENCIES[frequency], orientation * math.pi / ORIENTATIONS))[0]
    for row in range(1, CELLS - 1):
        for column in range(1, CELLS - 1):  # by the edges a slanted grating meets its reflection
            cell = found[:, :, row, column]
            assert int(cell.argmax()) == frequency * ORIENTATIONS + orientation
            assert float(cell.flatten().sort().values.diff()[-1]) > math.log(4)


def test_vertical_stripes_are_orientation_0_and_stripes_in_one_place_stay_there() -> None:
    stripes = torch.full((1, 3, SIZE, SIZE), 0.5)
    stripes[..., 32:48, 48:] = grating(1 / 4, 0.0)[..., 32:48, 48:]
    found = energies(stripes)[0, 0, 0]
    assert int(found.argmax()) == 2 * CELLS + 3  # row 2, column 3
    assert float(found[0, 0]) == pytest.approx(math.log(1e-6), abs=1e-3)  # uniform light gives nothing
    turned = energies(stripes.transpose(2, 3))[0, 0]
    assert torch.allclose(turned[2], found.T, atol=1e-4)  # 90° are horizontal stripes


def test_scores_are_those_of_numpys_svd(drawn: np.ndarray, statistics: PixelStatistics) -> None:
    images = pictures(drawn)
    small = drawn.reshape(N, 16, 4, 16, 4, 3).mean(axis=(2, 4), dtype=np.float64) / 255
    flat = small.transpose(0, 3, 1, 2).reshape(N, -1)
    u, s, vt = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
    p = statistics.n_components
    assert p == 128
    scale = math.sqrt((s[:p] ** 2).sum() / N / p)
    expected = (u * s * signs)[:, :p] / scale
    with torch.no_grad():
        found = statistics(images)[:, :p].numpy()
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_each_block_has_as_much_variance_as_dimensions(drawn: np.ndarray, statistics: PixelStatistics) -> None:
    values = statistics(pictures(drawn)).double()
    assert values.shape == (N, 128 + 192)
    variance = values.var(dim=0, unbiased=False)
    assert float(variance[:128].sum()) == pytest.approx(128, rel=1e-5)
    assert float(variance[128:].sum()) == pytest.approx(192, rel=1e-5)
    assert float(values.mean(dim=0).abs().max()) < 1e-5
    assert (variance[:127] >= variance[1:128] - 1e-6).all()  # principal axes keep their order: no whitening


# --- what they see ---


@pytest.mark.parametrize("shift", [(0.1, 0.1, 0.1), (0.2, -0.1019, 0.0)], ids=["lighter", "redder, no lighter"])
def test_another_colour_changes_scores_and_no_energy(
    drawn: np.ndarray, statistics: PixelStatistics, shift: tuple[float, float, float]
) -> None:
    before = 0.2 + 0.6 * pictures(drawn[:20])  # room to be shifted without clipping
    after = before + torch.tensor(shift)[:, None, None]
    p = statistics.n_components
    change = (statistics(after) - statistics(before)).abs()
    assert float(change[:, :p].amax(dim=1).min()) > 0.5
    assert float(change[:, p:].max()) < 2e-3


def test_turned_stripes_change_energies_and_no_score(statistics: PixelStatistics) -> None:
    """Gratings of period 4 vanish in the means over 4×4 pixels."""
    upright, lying = grating(1 / 4, 0.0), grating(1 / 4, math.pi / 2)
    torch.testing.assert_close(thumbnails(upright), thumbnails(lying))
    p = statistics.n_components
    change = (statistics(upright) - statistics(lying)).abs()[0]
    assert float(change[:p].max()) < 1e-4
    assert float(change[p:].max()) > 2


# --- fitting ---


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: buffer.numpy().tobytes() for name, buffer in module.named_buffers()}


def test_the_same_pictures_give_the_same_bits(drawn: np.ndarray, statistics: PixelStatistics) -> None:
    source = ArraySource(drawn)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = fit_pixel_statistics(source, np.arange(N)[::-1], batch_size=64)
    finally:
        torch.set_num_threads(threads)
    assert bits(again) == bits(statistics)
    assert list(statistics.parameters()) == []
    images = pictures(drawn[:8])
    assert torch.equal(statistics(images), again(images))
    few = [fit_pixel_statistics(source, np.arange(N), n_images=40, seed=seed) for seed in (0, 0, 1)]
    assert bits(few[0]) == bits(few[1]) != bits(few[2])
    assert few[0].n_components == 39


def test_only_the_given_pictures_are_looked_at(drawn: np.ndarray) -> None:
    changed = drawn.copy()
    changed[100:] = 0
    some, same = (fit_pixel_statistics(ArraySource(images), np.arange(100)) for images in (drawn, changed))
    assert bits(some) == bits(same)


def test_few_pictures_give_few_components(drawn: np.ndarray) -> None:
    few = fit_pixel_statistics(ArraySource(drawn), np.array([3, 5, 9, 11]))
    assert few.n_components == 3
    values = few(pictures(drawn[[3, 5, 9, 11]])).double()
    assert float(values[:, :3].var(dim=0, unbiased=False).sum()) == pytest.approx(3, rel=1e-5)
    assert fit_pixel_statistics(ArraySource(drawn), np.arange(50), n_components=7).n_components == 7
    twice = np.stack([drawn[0], drawn[1], drawn[0], drawn[1]])
    assert fit_pixel_statistics(ArraySource(twice), np.arange(4)).n_components == 1


def test_pictures_without_any_stripes() -> None:
    """Uniform greys: one component, energies that do not vary and are 0 once centred."""
    greys = np.stack([np.full((SIZE, SIZE, 3), level, np.uint8) for level in (0, 51, 102)])
    module = fit_pixel_statistics(ArraySource(greys), np.arange(3))
    values = module(pictures(greys))
    assert module.n_components == 1
    # levels 0, .2, .4 have the variance (.04 + 0 + .04) / 3: standardised they are ∓√1.5
    assert values[:, 0].abs().tolist() == pytest.approx([math.sqrt(1.5), 0, math.sqrt(1.5)], abs=1e-5)
    assert float(values[:, 1:].abs().max()) < 1e-3


def test_what_cannot_be_fitted_is_refused(drawn: np.ndarray) -> None:
    source = ArraySource(drawn)
    with pytest.raises(ImageError, match="1 of 1 pictures could be decoded; statistics need at least 2"):
        fit_pixel_statistics(source, np.array([4, 4]))
    with pytest.raises(ImageError, match="0 of 0 pictures"):
        fit_pixel_statistics(source, np.array([], dtype=np.int64))
    alike = ArraySource(np.repeat(drawn[:1], 3, axis=0))
    with pytest.raises(ImageError, match="all of the 3 pictures look the same at 16×16 pixels"):
        fit_pixel_statistics(alike, np.arange(3))
    with pytest.raises(UsageError, match="n_components=0, batch_size=64 and n_images=2000 must be at least 1, 1 and 2"):
        fit_pixel_statistics(source, np.arange(5), n_components=0)


def test_pictures_of_another_size_are_refused(statistics: PixelStatistics) -> None:
    with pytest.raises(UsageError, match="were given pictures of 32×48 pixels, expected 64×64"):
        statistics(torch.zeros(1, 3, 32, 48))


class Broken(ArraySource):
    """A source with a picture that cannot be decoded."""

    def load(self, index: int) -> np.ndarray:
        if index == 2:
            raise ImageError("broken")
        return super().load(index)


def test_pictures_that_cannot_be_decoded_are_left_out(drawn: np.ndarray) -> None:
    without = fit_pixel_statistics(ArraySource(drawn), np.array([0, 1, 3, 4]))
    assert bits(fit_pixel_statistics(Broken(drawn), np.arange(5))) == bits(without)


# --- as a model ---


def test_harvested_like_a_model(drawn: np.ndarray, statistics: PixelStatistics, tmp_path: Path) -> None:
    larger = np.repeat(np.repeat(drawn[:40], 2, axis=1), 2, axis=2)  # pictures of 128 pixels are scaled down
    settings: dict[str, Any] = {"batch_size": 16, "shard_images": 16, "dtype": "float32"}
    with attach_pixel_statistics(statistics) as model:
        assert list(map(str, model.sites)) == ["pixels/statistics"]
        assert model.d_in(model.sites[0]) == 320
        for images in (drawn[:40], larger):
            buffer = harvest([model], images, tmp_path / str(images.shape[1]), **settings)
            assert buffer.sites == ["pixels/statistics"]
            assert buffer.specs["pixels/statistics"].rows_per_image == 1
        rows = harvest([model], drawn[:40], tmp_path / "64", **settings).read("train")
        with torch.no_grad():
            expected = statistics(pictures(drawn[rows.image_index])).numpy()
        np.testing.assert_allclose(rows.values["pixels/statistics"], expected, atol=1e-5)
    again = fit_pixel_statistics(ArraySource(drawn), np.arange(N))
    with attach_pixel_statistics(again) as model:  # the harvest is found: the weights have the same hash
        harvest([model], drawn[:40], tmp_path / "64", **settings)
    other = fit_pixel_statistics(ArraySource(drawn), np.arange(N - 1))
    with attach_pixel_statistics(other) as model, pytest.raises(BufferMismatchError, match="weights_hash"):
        harvest([model], drawn[:40], tmp_path / "64", **settings)


def test_beside_a_model_that_was_harvested_before(
    drawn: np.ndarray, statistics: PixelStatistics, tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with attach(net, name="net", layers=["2"], image_size=16, mean=(0.0,) * 3, std=(1.0,) * 3) as model:
        first = harvest([model], drawn, tmp_path / "net", shard_images=32)
    with attach_pixel_statistics(statistics, name="floor") as model:
        second = harvest([model], drawn, tmp_path / "pixels", shard_images=50)
    view = JoinedBuffer({"net/2": (first, "net/2"), "floor/statistics": (second, "floor/statistics")})
    rows = view.read("holdout")
    with torch.no_grad():
        expected = statistics(pictures(drawn[rows.image_index])).numpy()
    np.testing.assert_allclose(rows.values["floor/statistics"], expected, atol=0.02)  # stored in half precision
