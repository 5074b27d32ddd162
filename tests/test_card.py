"""Cards hold what they are given, say what the numbers say, and nothing runs into a picture or off the page."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import AxesImage
from PIL import Image

from usae_probe.files import json_text
from usae_probe.probes import Exemplar, Exemplars, Overlap
from usae_probe.probes.cam import CamPicture, CrossScore, judge
from usae_probe.report.card import Card, CardImage, CardSite, _card, latent_card
from usae_probe.report.page import Page
from usae_probe.report.sheet import BAD

SITES = ("vit/blocks.8@mean", "resnet56/layer3")


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def picture(mode: Any, sites: tuple[str, ...], of: tuple[str, ...] = SITES, **change: Any) -> CamPicture:
    score = CrossScore(2.0, 1.5, True, 6.2, 100.0, 10_000, True, 1.4, 0.99, 100)
    other = score._replace(selected=False, percentile=87.25, above_all=False, ratio=0.4, score=1.2, transfer=0.83)
    scores = {site: score if site in sites else other for site in of}
    curves = {site: np.linspace(-1, 5, 40) for site in of}
    curves[of[-1]][1::2] = math.nan
    return CamPicture(
        457,
        mode,
        sites,
        0,
        noise(32),
        **({"curves": curves, "best_step": 32, "scores": scores, "failed": False} | change),
    )


def card(
    sites: tuple[str, ...] = SITES, n: int = 4, modes: tuple[str, ...] = ("independent", "joint"), **change: Any
) -> Card:
    images = [CardImage(noise(32, i), f"{5 - i}.25", np.random.default_rng(i).random((16, 16)) - 0.5) for i in range(n)]
    plain = [CardImage(noise(32, i), "12 %") for i in range(n)]
    pictures = [
        picture(mode, of, sites)
        for mode in modes
        for of in ([sites] if mode == "joint" else [(site,) for site in sites])
    ]
    found = {site: [Exemplar(i, 1.0, 99.0, "train") for i in range(n)] for site in sites}
    pairs = list(combinations(sites, 2))
    exemplars = Exemplars(
        found, found, found, {pair: Overlap(6, 20, 0.04) for pair in pairs}, dict.fromkeys(pairs, 0.67)
    )
    shown = {site: CardSite(images, plain, plain, strongest=3.5) for site in sites}
    given: dict[str, Any] = {"category": "universal", "label": "class = horse", "sites": shown, "pictures": pictures}
    given |= {"exemplars": exemplars, "verdict": judge(exemplars, pictures), "n_natural": 10_000, "unit": "images"}
    return Card(457, **(given | change))


def texts(page: Page) -> list[str]:
    return [text.get_text() for text in page.figure.texts if text.get_text()]


def shown(page: Page) -> dict[str, AxesImage]:
    return {str(image.get_label()): image for axes in page.figure.axes for image in axes.images}


def assert_tidy(page: Page) -> None:
    renderer = FigureCanvasAgg(page.figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in page.figure.texts if text.get_text()]
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= page.figure.bbox.width, name
        assert box.y1 <= page.figure.bbox.height, name
    for (name, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (name, other)
    frames = [(name, image.get_window_extent(renderer)) for name, image in shown(page).items() if "heat" not in name]
    frames += [(str(a.get_label()), a.get_tightbbox(renderer)) for a in page.figure.axes if a.get_label() != "pictures"]
    for label, frame in frames:
        assert frame.x1 <= page.figure.bbox.width
        for name, box in boxes:
            assert not box.overlaps(frame), (name, label)
    for (label, frame), (other, other_frame) in combinations(frames, 2):
        assert not frame.overlaps(other_frame), (label, other)


LONG = ("efficientnet_lite/blocks.10.3.conv_pwl@mean", "vit_small_patch14_dinov2/blocks.10.norm1", "r/layer4")


@pytest.mark.parametrize("sites", [SITES, SITES[:1], LONG], ids=len)
@pytest.mark.parametrize("n", [1, 4, 6])
def test_nothing_overlaps_or_is_cut(sites: tuple[str, ...], n: int) -> None:
    modes = ("independent",) if len(sites) == 1 else ("independent", "contrast", "joint")
    assert_tidy(_card(card(sites, n, modes)))


def test_what_a_card_shows() -> None:
    page = _card(card())
    names = [*shown(page), *(str(axes.get_label()) for axes in page.figure.axes)]
    for site in SITES:
        for row in ("strongest", "where", "only here", "across its\nactivation"):
            assert sum(name.startswith(f"{row} {site}") for name in names) == 4
        assert sum(name.startswith(f"heat of where {site}") for name in names) == 4
        assert f"cam independent {site}" in names
        assert f"curves independent {site}" in names
    assert names.count(f"cam joint {SITES[0]}") == 1
    said = texts(page)
    assert said[0] == "latent 457 · universal · class = horse"
    assert " ".join(said[1].split()) == (
        "Verdict: same concept, drawn differently (strongest 20 in common 30 %; codes correlate at .67; 0 of 2 "
        "pictures transfer; least above controls 83 %)"
    )
    assert said.count("above all   6.2 σ   99 %   +") == 4  # each in its own model, the joint one in both
    assert said.count("87.2 %   1.2 σ   83 %") == 2
    assert "in resnet56/layer3, of 10,000 images; above controls" in said
    assert "Same concept: the same images, and all pictures transfer." in " ".join(said[-1].split())


def test_a_failed_picture_says_so_in_orange() -> None:
    pictures = [picture("independent", SITES[:1], failed=True), picture("independent", SITES[1:])]
    page = _card(card(pictures=pictures))
    colours = {text.get_text(): text.get_color() for text in page.figure.texts}
    assert colours["failed: 1.4× the strongest image"] == BAD
    assert colours["1.4× the strongest image"] != BAD


def test_curves_show_every_model_where_it_looked_and_its_strongest_image() -> None:
    page = _card(card())
    (axes,) = (axes for axes in page.figure.axes if axes.get_label() == f"curves independent {SITES[0]}")
    vit, limit, resnet, _, kept = axes.lines
    assert len(np.asarray(vit.get_xdata())) == 40
    assert np.asarray(resnet.get_xdata()).tolist() == list(range(0, 40, 2))  # it looked at every other step
    assert list(np.asarray(limit.get_ydata())) == [3.5, 3.5]
    assert list(np.asarray(kept.get_xdata())) == [32, 32]
    assert vit.get_color() == limit.get_color() != resnet.get_color()


def test_a_site_that_no_image_fires_and_a_run_without_images() -> None:
    one = replace(card(), sites={SITES[0]: card().sites[SITES[0]], SITES[1]: CardSite(strongest=2.0)})
    assert texts(_card(one)).count("no image fires it here") == 1
    without = _card(replace(card(), sites={site: CardSite(strongest=3.0) for site in SITES}))
    assert not any(name.startswith(("strongest", "only", "across")) for name in shown(without))
    assert_tidy(without)


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    _card(card(("a/x$_y$", "b/$z"), label="price = $5$ \\frac")).figure.draw_without_rendering()


def test_a_card_as_json() -> None:
    data = card(verdict=None).to_dict()
    text = json_text(data)
    assert data["pairs"][f"{SITES[0]}|{SITES[1]}"] == {
        "overlap": {"shared": 6, "n": 20, "expected": 0.04}, "correlation": 0.67
    }  # fmt: skip
    assert data["exemplars"]["top"][SITES[0]][0] == {"image": 0, "value": 1.0, "percentile": 99.0, "split": "train"}
    assert '"verdict": null' in text


def test_the_file(tmp_path: Path) -> None:
    latent_card(card(), tmp_path / "cam" / "latent-00457.png")
    with Image.open(tmp_path / "cam" / "latent-00457.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
