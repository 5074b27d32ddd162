"""Drawn pictures: every factor is there to be measured, and nothing else decides it."""

from pathlib import Path

import numpy as np
import pytest

from usae_probe.demo.drawings import COLOURS, FACTOR_NAMES, Drawings, _coverage, draw_images, save_drawings
from usae_probe.errors import ConfigError
from usae_probe.images import annotations_of, open_source


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return draw_images(300, seed=1)


def saturation(images: np.ndarray) -> np.ndarray:
    """Difference of the strongest and the weakest channel: the object's pixels have it, the grey stripes do not."""
    return images.max(axis=-1).astype(int) - images.min(axis=-1)


def test_shapes_and_types(drawings: Drawings):
    assert drawings.images.shape == (300, 64, 64, 3)
    assert drawings.images.dtype == np.uint8
    assert list(drawings.factors) == ["shape", "colour", "orientation", "size", "position"]
    assert [len(names) for names in drawings.factor_names.values()] == [6, 8, 4, 3, 9]
    for name, values in drawings.factors.items():
        assert values.dtype == np.int64
        # Every value occurs among 300 drawn evenly from at most 9.
        assert sorted(set(values.tolist())) == list(range(len(FACTOR_NAMES[name])))


def test_factors_are_drawn_independently(drawings: Drawings):
    # |r| of 300 independent pairs is below 3.3 / sqrt(300) = .19 but once in a thousand.
    correlations = np.corrcoef(np.stack(list(drawings.factors.values())))
    assert abs(correlations - np.eye(5)).max() < 0.19


def test_picture_depends_on_seed_and_place_alone(drawings: Drawings):
    fewer = draw_images(7, seed=1)
    assert np.array_equal(fewer.images, drawings.images[:7])
    assert all(np.array_equal(fewer.factors[name], drawings.factors[name][:7]) for name in fewer.factors)
    assert not np.array_equal(draw_images(7, seed=2).images, fewer.images)


def test_position_is_where_the_colour_is(drawings: Drawings):
    strong = saturation(drawings.images) > 75
    rows, columns = np.mgrid[0:64, 0:64]
    weight = strong.sum(axis=(1, 2))
    centre_y, centre_x = ((strong * axis).sum(axis=(1, 2)) / weight / 64 for axis in (rows, columns))
    # Cell centres are at .22, .50 and .78.
    cell = 3 * np.clip(np.round((centre_y - 0.22) / 0.28), 0, 2) + np.clip(np.round((centre_x - 0.22) / 0.28), 0, 2)
    assert (cell == drawings.factors["position"]).mean() > 0.99


def test_colour_is_that_of_the_strongest_pixels(drawings: Drawings):
    palette = np.array(list(COLOURS.values())) * 255
    for image, colour in zip(drawings.images, drawings.factors["colour"], strict=True):
        strong = saturation(image[None])[0]
        seen = np.median(image[strong >= np.quantile(strong, 0.99)], axis=0)
        assert np.argmin(((palette - seen) ** 2).sum(axis=1)) == colour


def test_size_orders_the_area(drawings: Drawings):
    area = (saturation(drawings.images) > 75).sum(axis=(1, 2))
    for shape in range(6):
        chosen = drawings.factors["shape"] == shape
        means = [area[chosen & (drawings.factors["size"] == size)].mean() for size in range(3)]
        # Half extents .10, .14, .19: areas at least (.14 / .10)² ≈ 1.96 and (.19 / .14)² ≈ 1.84 apart, less jitter.
        assert means[1] > 1.5 * means[0]
        assert means[2] > 1.5 * means[1]


def test_orientation_is_that_of_the_stripes(drawings: Drawings):
    grey = drawings.images.astype(float).mean(axis=-1)
    spectrum = abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True)))
    frequency = np.fft.fftfreq(64)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    spectrum[:, (radius < 0.1) | (radius > 0.25)] = 0
    peak_y, peak_x = np.divmod(spectrum.reshape(300, -1).argmax(axis=1), 64)
    # The stripes' normal is (sin a, cos a) in (x, y): a = atan2(fx, fy), modulo half a turn.
    angle = np.arctan2(frequency[peak_x], frequency[peak_y]) % np.pi
    found = np.round(angle / (np.pi / 4)).astype(int) % 4
    assert (found == drawings.factors["orientation"]).mean() > 0.98


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        # Share of the square of side 2·half that the shape covers, by hand.
        ("circle", np.pi / 4),
        ("square", 0.88**2),
        ("triangle", 1.85 * 2 * 1.08 / 2 / 4),
        # Ten triangles with sides 1.15 and .5 and the angle 36° between them.
        ("star", 10 * 0.5 * 1.15 * 0.5 * np.sin(np.pi / 5) / 4),
        ("ring", np.pi * (1.05**2 - 0.6**2) / 4),
        ("cross", (2 * 2 * 0.6 - 0.6**2) / 4),
    ],
)
def test_area_of_a_shape(shape: str, share: float):
    coverage = _coverage(shape, 0.5, 0.5, 0.2, 64)
    assert coverage.sum() == pytest.approx(share * (0.4 * 64) ** 2, rel=0.03)
    assert set(np.unique(coverage[:8])) == {0.0}
    assert ((coverage > 0) & (coverage < 1)).any()  # Soft edges.


def test_saved_file_opens_as_a_source(tmp_path: Path):
    drawings = draw_images(5, size=32)
    path = save_drawings(tmp_path / "new" / "drawn.npz", drawings)
    assert [file.name for file in path.parent.iterdir()] == ["drawn.npz"]
    source = open_source(path)
    assert np.array_equal(source.load(3), drawings.images[3])
    assert source.label(0) is None  # the shape is a factor like the others
    assert list(source.factors) == list(FACTOR_NAMES)
    for annotation in annotations_of(source):
        assert annotation.names == FACTOR_NAMES[annotation.name]
        assert np.array_equal(annotation.values, drawings.factors[annotation.name])


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_drawings(tmp_path / "drawn.npz", draw_images(2, size=32))
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save_drawings(path, draw_images(3, size=32))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["drawn.npz"]


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(ConfigError, match="n is 0"):
        draw_images(0)
    with pytest.raises(ConfigError, match="size is 31 pixels, expected at least 32"):
        draw_images(1, size=31)
    with pytest.raises(ConfigError, match=r"drawn.npy does not end in .npz"):
        save_drawings(tmp_path / "drawn.npy", draw_images(1))
