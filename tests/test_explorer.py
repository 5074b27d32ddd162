"""The page holds what the files hold, nothing that a user wrote becomes a tag, and its size is bounded."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from usae_probe.pipeline.explorer import worth_a_card
from usae_probe.report.explorer import card_data, image_side, overview, write_explorer
from usae_probe.report.explorer.page import json_block
from usae_probe.report.r2_table import short
from usae_probe.report.style import captioned, save

from .explorer_pages import ABOUT, METRICS, columns, natural, page
from .test_card import SITES, card
from .test_summary import CASES, metrics_of, overview_of


def embedded(html: str, name: str) -> Any:
    (found,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.S)
    return json.loads(found)


@pytest.fixture
def html(tmp_path: Path) -> str:
    write_explorer(page(), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_data_are_those_of_the_run(html: str) -> None:
    assert embedded(html, "page-metrics") == METRICS
    found, expected = embedded(html, "page-latents"), columns(60)
    assert list(found) == list(expected)
    for name, cells in expected.items():
        for value, cell in zip(found[name], cells, strict=True):
            if value is None:
                assert cell == ""
            elif isinstance(value, str):
                assert value == cell
            else:
                assert value == float(cell)
    assert embedded(html, "page-settings")["cards"] == [0, 3, 6, 9, 12, 15]


def test_every_cell_of_r2_stands_in_the_text(html: str) -> None:
    rows = re.findall(r"<td style=.*?><b>(.*?)</b> <small>(.*?)</small>", html)
    expected = [(short(METRICS["r2"][a][b]), short(METRICS["r2_train"][a][b])) for a in SITES for b in SITES]
    assert rows == expected
    for name, n in METRICS["counts"].items():
        assert re.search(rf'<th scope="row">{name}</th><td class="number">{n:,}</td>', html)


def test_headline_figures_stand_beside_their_controls() -> None:
    a, b = SITES
    nothing = {a: None, b: None}
    ridge = {a: {a: None, b: 0.45}, b: nothing}
    control = {"counts": {"universal": 63}, "sites": [a, b], "n_live": 90, "r2": METRICS["r2"]}
    more = {
        "r2_ridge": ridge,
        "r2_interval": {a: {a: [0.6, 0.7], b: [0.2, 0.25]}, b: {a: None, b: None}},
        "nulls": [{"within": "", "universal": [0, 1]}],
        "controls": {"untrained": control},
        "n_live": 102,
        "n_equal_rates": 1,
        "thresholds": {"entropy": 0.9, "phi": 0.2, "q": 0.01},
        "platonic": [{"source": a, "target": b, "r2": 0.1, "r2_ridge": 0.45, "r2_share": 0.2, "cka": 0.41,
                      "cka_null": 0.004, "mutual_knn": 0.09, "mutual_knn_null": 0.01, "universal_energy": 0.5}],
        "similarity": {"k": 10, "n_images": 100, "nulls": 20},
    }  # fmt: skip
    tiles = {tile.what: tile for tile in overview(ABOUT, METRICS | more).tiles}
    live = METRICS["n_latents"] - METRICS["counts"]["dead"] - METRICS["counts"]["rare"]
    assert tiles[f"universal latents, of {live} live ones"].beside == ["shuffled 0.5", "untrained 63"]
    cross = tiles[f"R² of {b} from {a}'s code"]
    assert cross.value == short(METRICS["r2"][a][b])
    assert cross.beside == ["95 % [.20, .25]", "a linear map .45", f"its own code {short(METRICS['r2'][b][b])}"]
    assert tiles[f"CKA of {a} and {b}, without a USAE"].beside == ["shuffled .00", "mutual k-NN .09, shuffled .01"]


@pytest.mark.parametrize("sites", CASES.values(), ids=CASES)
def test_any_number_of_sites(sites: tuple[str, ...], tmp_path: Path) -> None:
    metrics = metrics_of(sites)
    about = overview_of(sites)
    found = overview(about, metrics)
    of_pairs = [tile for tile in found.tiles if tile.what.startswith("R² of")]
    assert len(of_pairs) == (1 if len(metrics["class_sites"]) == 1 else 2)
    assert len(found.r2) == len(sites)
    write_explorer(
        page(metrics=metrics, overview=found, cards=[], latents=columns(30, metrics["class_sites"])),
        tmp_path / "x.html",
    )
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert all(f'<th scope="row">{site}</th>' in html for site in sites)


HOSTILE = "<script>hacked=1</script>"


def test_what_users_wrote_is_text(tmp_path: Path) -> None:
    about = ABOUT | {"models": {"vit": {"name": HOSTILE, "sites": []}, "resnet56": {"name": "x", "sites": []}}}
    labels = [f"class={HOSTILE}", "class=a</script><img src=x onerror=hacked=1>"]
    hostile = page(title=HOSTILE, overview=overview(about, METRICS), latents=columns(60, labels=labels))
    write_explorer(hostile, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "hacked" in html
    assert "<script>hacked" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;hacked=1&lt;/script&gt;" in html
    assert embedded(html, "page-latents")["follows"][:2] == labels


def test_json_cannot_end_its_element() -> None:
    text = "</script><!-- & \u2028 é"
    block = str(json_block({"x": text}))
    assert not set("<>&\u2028") & set(block)
    assert json.loads(block) == {"x": text}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_block({"x": float("nan")})


def test_the_page_asks_for_nothing(html: str) -> None:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', html)
    assert "default-src &#39;none&#39;" in policy
    outside = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", outside)) <= {"http://www.w3.org/2000/svg"}


def test_cards_that_do_not_fit_are_left_out_from_the_end(tmp_path: Path) -> None:
    whole = page(n_cards=6)
    assert write_explorer(whole, tmp_path / "whole.html") == 6
    size = (tmp_path / "whole.html").stat().st_size
    last = len(str(json_block(whole.cards[-1])))
    assert write_explorer(whole, tmp_path / "less.html", most_bytes=size - last // 2) == 5
    less = (tmp_path / "less.html").read_text(encoding="utf-8")
    assert embedded(less, "page-settings")["cards"] == [0, 3, 6, 9, 12]
    assert len(less.encode()) <= size - last // 2
    with pytest.raises(ValueError, match="not enough"):
        embedded(less, "data-15")


def test_images_of_many_cards_are_smaller() -> None:
    sides = [image_side(n) for n in (0, 100, 4_800, 20_000, 10**6)]
    assert sides == [160, 160, 108, 64, 64]
    pictures, side = 4_800, image_side(4_800)
    assert 0.25 * pictures * side**2 < 15e6


def test_a_card_as_data() -> None:
    data = card_data(card(), natural(457), 96)
    assert set(data["sites"]) == set(SITES)
    first = data["sites"][SITES[0]]
    assert [len(first[kind]) for kind in ("top", "only", "across")] == [4, 4, 4]
    image = Image.open(io.BytesIO(base64.b64decode(first["top"][0]["src"].partition(",")[2])))
    assert (image.format, image.size) == ("WEBP", (32, 32))  # not enlarged
    heat = Image.open(io.BytesIO(base64.b64decode(first["top"][0]["heat"].partition(",")[2]))).convert("RGBA")
    alpha = np.asarray(heat)[..., 3]
    assert alpha.min() == 0  # where the map is not positive
    assert abs(int(alpha.max()) - 217) <= 2  # .85 at its largest
    assert "heat" not in first["only"][0]
    histogram, sigma = first["histogram"], natural(457).sites[SITES[0]].activation[:, 0]
    assert sum(histogram["all"]) == 500
    assert sum(histogram["fires"]) == (sigma > 1).sum()
    assert (histogram["low"], histogram["high"]) == pytest.approx((sigma.min(), sigma.max()), rel=1e-3)
    independent = data["pictures"][0]
    assert independent["scores"][SITES[1]]["percentile"] == 87.25
    curve = dict(independent["curves"][SITES[1]])
    assert sorted(curve) == list(range(0, 40, 2))  # where the other model looked
    assert curve[38] == pytest.approx(np.linspace(-1, 5, 40)[38], rel=1e-3)
    json.dumps(data, allow_nan=False)


def test_a_long_curve_is_thinned_to_its_ends() -> None:
    made = card()
    long = replace(made.pictures[0], curves={site: np.arange(4000.0) for site in SITES})
    curve = card_data(replace(made, pictures=[long]), natural(457), 96)["pictures"][0]["curves"][SITES[0]]
    assert len(curve) == 160
    assert (curve[0], curve[-1]) == ((0, 0.0), (3999, 3999.0))


def test_latents_worth_a_card() -> None:
    classes = ["dead", "specific", "universal", "rare", "universal", "chance", "partial"]
    table = {"category": classes, "total_energy": ["0", "9", "1", "8", "2", "7", "3"]}
    assert worth_a_card(table, {}, 10) == [4, 2, 6, 1, 5]
    assert worth_a_card(table, {3}, 3) == [3, 4, 2]
    assert worth_a_card(table, {3}, 0) == []


def test_a_figure_says_in_words_what_it_shows(tmp_path: Path) -> None:
    figure = captioned(6.0, 2.0, "Cost in $", "n = 3 <rows>. The null is 0.")
    save(figure, tmp_path / "r2.png")
    write_explorer(page(figures=[tmp_path / "r2.png"]), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'src="data:image/svg+xml;base64,' in html
    assert 'alt="Cost in $. n = 3 &lt;rows&gt;. The null is 0."' in html
    (tmp_path / "r2.svg").unlink()  # drawn by a version that made none
    write_explorer(page(figures=[tmp_path / "r2.png"]), tmp_path / "report.html")
    assert 'src="data:image/png;base64,' in (tmp_path / "report.html").read_text(encoding="utf-8")
