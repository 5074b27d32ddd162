"""Sheets of CAM pictures hold what they are given, and nothing overlaps or is cut off."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image

from usae_probe.report.sheet import BAD, SheetCell, SheetColumn, _sheet, cam_sheet

RESNET, VIT, LONG = "resnet/layer4", "vit/blocks.5", "efficientnet_lite/blocks.10.3.conv_pwl@mean"
SIZES = {RESNET: 64, VIT: 224, LONG: 96}


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def cell(size: int = 16, n: int = 4, text: str = "1.5× max → 99 %", failed: bool = False) -> SheetCell:
    return SheetCell(noise(size), [noise(size, i) for i in range(n)], [0.0, 1.0, 3.0], text, failed)


def joint(size: int = 16) -> SheetCell:
    return SheetCell(noise(size), text="resnet 1.2×, vit 1.1×")


def column(latent: int, sites: tuple[str, ...], title: str = "colour = red") -> SheetColumn:
    return SheetColumn(latent, title, {site: cell(SIZES.get(site, 16)) for site in sites})


def named(figure: Figure, start: str) -> dict[str, Axes]:
    return {str(axes.get_label()): axes for axes in figure.axes if str(axes.get_label()).startswith(start)}


def shown(figure: Figure, start: str) -> dict[str, AxesImage]:
    found = [image for axes in figure.axes for image in axes.images if str(image.get_label()).startswith(start)]
    return {str(image.get_label()): image for image in found}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize(
    ("n", "sites"), [(1, (RESNET,)), (1, (RESNET, VIT, LONG)), (3, (RESNET, VIT)), (8, (LONG,)), (8, (RESNET, VIT))]
)
def test_a_sheet_holds_every_picture_and_nothing_is_cut_or_overlaps(n: int, sites: tuple[str, ...]) -> None:
    long = "class = animals that stand in deep snow, and other animals"
    columns = [column(i, sites, long if i % 2 else "") for i in range(n)]
    figure = _sheet(columns, sites)
    assert set(shown(figure, "cam ")) == {f"cam {i} {site}" for i in range(n) for site in sites}
    assert len(shown(figure, "image ")) == 4 * n * len(sites)
    assert len(named(figure, "curves ")) == n
    for i in range(n):
        for site in sites:
            image = shown(figure, "cam ")[f"cam {i} {site}"]
            np.testing.assert_array_equal(image.get_array(), columns[i].cells[site].picture)
            assert image.get_interpolation() == ("antialiased" if site == VIT else "nearest")
    assert_tidy(figure)


@pytest.mark.parametrize("site", [LONG, "x/" + "module.path." * 9 + "end"])
def test_long_names_stay_inside(site: str) -> None:
    assert_tidy(_sheet([column(0, (site, VIT))], (site, VIT)))


def assert_tidy(figure: Figure) -> None:
    """No text leaves the sheet, meets another or runs into a picture."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    drawn: list[Text] = [text for text in figure.texts if text.get_text()]
    for legend in figure.legends:
        legend.draw(renderer)  # only now do its texts have their places
        drawn += legend.get_texts()
    for axes in named(figure, "curves ").values():
        axes.get_tightbbox(renderer)  # nor do tick labels before
        low, high = axes.get_ylim()
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=False)  # only the first axes have labels
        drawn += [axes.xaxis.label, *(label for place, label in ticks if low <= place <= high and label.get_text())]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn]
    pictures = [(name, image.get_window_extent(renderer)) for name, image in shown(figure, "").items()]
    width, height = figure.bbox.width, figure.bbox.height
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= width, name
        assert box.y1 <= height, name
    for (name, box), (other, other_box) in combinations(boxes, 2):
        if name != other:  # tick labels of other columns are hidden, but have places
            assert not box.overlaps(other_box), (name, other)
    for name, box in boxes:
        for other, picture in pictures:
            assert not box.overlaps(picture), (name, other)
    for (name, picture), (other, other_picture) in combinations(pictures, 2):
        assert not picture.overlaps(other_picture), (name, other)


def test_what_is_said_of_a_picture() -> None:
    cells = {"a/x": cell(text="3.1× max"), "b/x": cell(text=".5× max", failed=True), "c/x": cell(text="2×", n=0)}
    figure = _sheet([SheetColumn(273, "colour = red", cells), SheetColumn(1, "", {"c/x": cell()})], tuple(cells))
    found = {text.get_text(): text.get_color() for text in figure.texts}
    for text in ("273", "colour = red", "3.1× max", *cells):
        assert text in found
    assert found[".5× max"] == BAD
    assert found["3.1× max"] != BAD
    assert list(texts(figure)).count("no image fires it") == 1
    assert "gradient ascent on z_pre" in " ".join(texts(figure)[-1].split())


def test_curves_stand_beside_the_strongest_image_in_the_colour_of_their_site() -> None:
    cells = {"a/x": cell(), "b/x": cell(), "joint": joint()}
    figure = _sheet([SheetColumn(1, "", cells), SheetColumn(2, "", {"b/x": cells["b/x"]})], ["a/x", "b/x", "joint"])
    one, two = named(figure, "curves ").values()
    lines = [list(np.asarray(line.get_ydata(), dtype=float)) for line in one.lines]
    assert lines == [[0.0, 1.0, 3.0], [0.0, 1.0, 3.0], [1.0, 1.0]]
    assert one.get_ylim() == two.get_ylim()
    assert one.lines[1].get_color() == two.lines[0].get_color()  # a site keeps its colour
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a/x", "b/x", "strongest image"]  # a joint picture has no curve of its own


def test_a_joint_row_takes_no_room_for_images() -> None:
    sites = (RESNET, VIT, "joint")
    columns = [SheetColumn(i, "", {RESNET: cell(64), VIT: cell(224), "joint": joint(224)}) for i in range(4)]
    figure = _sheet(columns, sites)
    assert len(shown(figure, "cam ")) == 12
    assert len(shown(figure, "image ")) == 4 * 2 * 4
    assert texts(figure).count("images") == 2
    assert_tidy(figure)


def test_a_sheet_without_images_says_nothing_of_them() -> None:
    figure = _sheet([SheetColumn(1, "", {"a/x": cell(n=0)})], ["a/x"])
    assert "images" not in texts(figure)
    assert not shown(figure, "image ")
    assert "images" in texts(_sheet([SheetColumn(1, "", {"a/x": cell(n=1)})], ["a/x"]))


def test_at_most_four_images_are_shown() -> None:
    assert len(shown(_sheet([SheetColumn(1, "", {"a/x": cell(n=9)})], ["a/x"]), "image ")) == 4


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    figure = _sheet([column(1, ("a/x$_y$",), "price = $5$ \\frac")], ("a/x$_y$",))
    figure.draw_without_rendering()  # mathtext would raise
    assert "price = $5$ \\frac" in texts(figure)


def test_the_file_is_small_enough_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "cam" / "sheet.png"
    smooth = np.linspace(0, 255, 224 * 224 * 3).reshape(224, 224, 3).astype(np.uint8) // 2
    grain = np.random.default_rng(0).integers(0, 40, (224, 224, 3), dtype=np.uint8)
    full = SheetCell(smooth + grain, [smooth + grain] * 4, [0.0, 1.0], "1.0× max")
    columns = [SheetColumn(i, "colour = red", {RESNET: full, VIT: full}) for i in range(8)]
    cam_sheet(columns, (RESNET, VIT), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1500
    assert 100_000 < path.stat().st_size < 2_500_000
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
