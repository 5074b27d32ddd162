"""The page in a browser: searched, sorted, filtered, opened by permalink and keyboard, dark, narrow, and alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="the browser tests need the dev extra")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from usae_probe.report.explorer import overview, write_explorer
from usae_probe.report.r2_table import short
from usae_probe.report.style import captioned, save

from .browser import CHROMIUM, DRIVER, chromium, complaints, prefer, requests, resize
from .explorer_pages import ABOUT, METRICS, columns, page
from .test_card import SITES
from .test_explorer import HOSTILE
from .test_summary import CASES, metrics_of, overview_of

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver here (.ci/run installs Debian's)"
)
N = 400
COLUMNS = columns(N)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pages")
    save(captioned(6.0, 2.0, "A figure", "n = 3"), base / "r2.png")
    write_explorer(page(N, 20, figures=[base / "r2.png"]), base / "report.html")
    about = ABOUT | {"models": {"vit": {"name": HOSTILE, "sites": []}, "resnet56": {"name": "x", "sites": []}}}
    labels = [f"class={HOSTILE}", "class=<img src=x onerror=hacked=1>"]
    hostile = page(title=HOSTILE, overview=overview(about, METRICS), latents=columns(60, labels=labels))
    write_explorer(hostile, base / "hostile.html")
    return base


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as started:
        yield started


@pytest.fixture
def browser(driver: webdriver.Chrome, folder: Path) -> Iterator[webdriver.Chrome]:
    """The page, just opened; afterwards it must have asked for nothing but itself, and complained of nothing."""
    resize(driver, 1280)
    prefer(driver, "light")
    driver.get("about:blank")
    requests(driver), complaints(driver)
    visit(driver, folder)
    yield driver
    assert set(requests(driver)) == {(folder / "report.html").as_uri()}
    assert complaints(driver) == []


def visit(driver: webdriver.Chrome, folder: Path, at: str = "") -> None:
    driver.get("about:blank")
    driver.get((folder / "report.html").as_uri() + at)
    driver.execute_script("try { localStorage.clear() } catch {} delete document.documentElement.dataset.theme")


def cells(driver: webdriver.Chrome, key: str) -> list[str]:
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(`#body tr.row td[data-key='${arguments[0]}']`)].map(c => c.textContent)",
        key,
    )
    return found


def count(driver: webdriver.Chrome) -> str:
    return driver.find_element(By.ID, "count").text


def card(driver: webdriver.Chrome) -> str:
    """The heading of the open card; nothing when none is open."""
    title: str = driver.execute_script(
        "const d = document.getElementById('card'); return d.open ? d.querySelector('h2').textContent : ''"
    )
    return title


def press(driver: webdriver.Chrome, *keys: str) -> None:
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


def numbers(name: str) -> dict[int, float]:
    return {i: float(cell) for i, cell in enumerate(COLUMNS[name]) if cell}


def expected(name: str, *, down: bool) -> list[str]:
    known = numbers(name)
    return [str(i) for i in sorted(known, key=lambda i: (-known[i] if down else known[i], i))]


def test_it_opens_sorted_by_energy(browser: webdriver.Chrome) -> None:
    assert browser.title == "a run · usae-probe"
    assert count(browser) == "400 of 400 latents"
    shown = cells(browser, "latent")
    assert 20 < len(shown) < 60  # rows in sight, not all
    assert shown == expected("total_energy", down=True)[: len(shown)]
    pair, rate = f"{SITES[0]}|{SITES[1]}", numbers(f"rate[{SITES[0]}]")
    for i, phi, entropy, percent, name in zip(
        map(int, shown), *(cells(browser, key) for key in ("phi", "entropy", "rate-0", "class")), strict=True
    ):
        assert phi == short(numbers(f"phi[{pair}]")[i])
        assert entropy == short(numbers("entropy")[i])
        assert float(percent.replace("<", "")) == pytest.approx(100 * rate[i], abs=0.51)
        assert name == COLUMNS["category"][i]


def test_sorting_down_up_and_what_is_not_known_last(browser: webdriver.Chrome) -> None:
    phi = f"phi[{SITES[0]}|{SITES[1]}]"
    browser.find_element(By.CSS_SELECTOR, "#head-phi button").click()
    shown = cells(browser, "latent")
    assert shown == expected(phi, down=True)[: len(shown)]
    assert browser.find_element(By.ID, "head-phi").get_attribute("aria-sort") == "descending"
    browser.find_element(By.CSS_SELECTOR, "#head-phi button").click()
    shown = cells(browser, "latent")
    assert shown == expected(phi, down=False)[: len(shown)]
    browser.execute_script("const r = document.getElementById('rows'); r.scrollTop = r.scrollHeight")
    WebDriverWait(browser, 5).until(lambda d: cells(d, "latent")[-1] == "399")
    assert cells(browser, "phi")[-1] == "–"  # the dead ones, in their order
    browser.find_element(By.CSS_SELECTOR, "#head-label button").click()
    assert cells(browser, "label")[0] == "class = horse"


def test_searching(browser: webdriver.Chrome) -> None:
    search = browser.find_element(By.ID, "search")
    search.send_keys("Sailing universal")
    wanted = [
        i for i in range(N) if COLUMNS["follows"][i] == "class=sailing ship" and COLUMNS["category"][i] == "universal"
    ]
    assert count(browser) == f"{len(wanted)} of 400 latents"
    assert {int(text) for text in cells(browser, "latent")} == set(wanted)
    search.clear()
    search.send_keys("#273")
    assert cells(browser, "latent") == ["273"]
    search.send_keys("zzz")
    assert (count(browser), cells(browser, "latent")) == ("0 of 400 latents", [])
    browser.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    WebDriverWait(browser, 5).until(lambda d: count(d) == "400 of 400 latents")


def test_filters(browser: webdriver.Chrome) -> None:
    for name in ("universal", "dead"):
        browser.find_element(By.CSS_SELECTOR, f"#classes input[value={name}]").send_keys(" ")
    assert count(browser) == f"{sum(c in ('universal', 'dead') for c in COLUMNS['category'])} of 400 latents"
    browser.find_element(By.ID, "least-entropy").send_keys("0.9")
    entropy = numbers("entropy")
    wanted = [i for i in range(N) if COLUMNS["category"][i] == "universal" and entropy.get(i, 0) >= 0.9]
    assert count(browser) == f"{len(wanted)} of 400 latents"
    browser.find_element(By.ID, "least-energy").send_keys("1.5")
    wanted = [i for i in wanted if numbers("total_energy")[i] >= 1.5]
    assert wanted
    assert count(browser) == f"{len(wanted)} of 400 latents"
    browser.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    browser.find_element(By.ID, "with-card").click()
    WebDriverWait(browser, 5).until(lambda d: count(d) == "20 of 400 latents")


def test_the_keyboard(browser: webdriver.Chrome) -> None:
    order = expected("total_energy", down=True)
    press(browser, "j", "j", "k")
    assert browser.find_element(By.CSS_SELECTOR, "tr[aria-selected=true]").get_attribute("data-latent") == order[1]
    press(browser, Keys.ENTER)
    assert card(browser) == f"Latent {order[1]}"
    assert browser.current_url.endswith(f"#latent-{order[1]}")
    press(browser, "j")
    assert card(browser) == f"Latent {order[2]}"
    press(browser, "k", "k", "k")  # to the first, and no further
    assert card(browser) == f"Latent {order[0]}"
    press(browser, Keys.ESCAPE)
    WebDriverWait(browser, 5).until(lambda d: not card(d))
    press(browser, "/", "truck", Keys.ENTER)
    first = next(i for i in order if COLUMNS["follows"][int(i)] == "class=truck")
    assert card(browser) == f"Latent {first}"


def test_labels_that_are_not_followed_are_grey(browser: webdriver.Chrome) -> None:
    """Of many values some label always comes out best: under the AUROC of the run it says nothing."""
    browser.get(browser.current_url.partition("#")[0])
    grey = {True: 0, False: 0}
    for row in browser.find_elements(By.CSS_SELECTOR, "#table tr.row"):
        label, auroc = (row.find_element(By.CSS_SELECTOR, f'td[data-key="{key}"]') for key in ("label", "auroc"))
        if label.text:
            faint = "faint" in (label.get_attribute("class") or "")
            assert faint == (float(auroc.text) < 0.9), (label.text, auroc.text)
            grey[faint] += 1
    assert min(grey.values()) > 0


def test_j_scrolls_the_table_along(browser: webdriver.Chrome) -> None:
    press(browser, *"j" * 60)
    selected = browser.find_element(By.CSS_SELECTOR, "tr[aria-selected=true]")
    assert selected.get_attribute("data-latent") == expected("total_energy", down=True)[60]
    assert selected.is_displayed()


def test_a_card_by_permalink(browser: webdriver.Chrome, folder: Path) -> None:
    visit(browser, folder, "#latent-3")
    assert card(browser) == "Latent 3"
    dialog = browser.find_element(By.ID, "card")
    assert [block.text for block in dialog.find_elements(By.CSS_SELECTOR, ".site h3")] == list(SITES)
    images = dialog.find_elements(By.TAG_NAME, "img")
    # of each model four strongest, as often where it fires (two layers), four and four more; three CAM pictures
    assert len(images) == 2 * (4 + 8 + 4 + 4) + 3
    WebDriverWait(browser, 5).until(lambda d: all(image.get_property("naturalWidth") for image in images))
    described = [image.get_attribute("alt") for image in images]
    assert described.count("") == 8  # the maps, which lie over images that say what they are
    assert any("CAM picture of latent 3, joint" in alt for alt in described)
    plots = dialog.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    assert len(plots) == 2 + 3  # histograms, curves
    assert all(plot.get_attribute("aria-label") for plot in plots)
    text = dialog.text
    for part in ("1.4× the strongest image", "87.3 %", "83 %", "above all 10,000", "Verdict:"):
        assert part in text, part
    browser.execute_script("location.hash = 'latent-6'")
    WebDriverWait(browser, 5).until(lambda d: card(d) == "Latent 6")
    browser.back()
    WebDriverWait(browser, 5).until(lambda d: card(d) == "Latent 3")


def test_a_latent_without_images_and_one_that_is_none(browser: webdriver.Chrome, folder: Path) -> None:
    visit(browser, folder, "#latent-4")
    dialog = browser.find_element(By.ID, "card")
    assert "--cards N" in dialog.text
    assert dialog.find_elements(By.TAG_NAME, "img") == []
    assert str(int(float(COLUMNS[f"fires[{SITES[0]}]"][4]))) in dialog.text
    visit(browser, folder, "#latent-400")
    assert "There is no latent 400 in this run: they are numbered 0 to 399." in dialog_text(browser)
    visit(browser, folder, "#latent-399")
    assert "It never fires" in dialog_text(browser)


def dialog_text(driver: webdriver.Chrome) -> str:
    return driver.find_element(By.ID, "card").text


def test_the_gallery(browser: webdriver.Chrome) -> None:
    tiles = browser.find_elements(By.CSS_SELECTOR, "#tiles button")
    assert [tile.find_element(By.TAG_NAME, "b").text for tile in tiles] == [str(3 * i) for i in range(12)]
    browser.execute_script("arguments[0].scrollIntoView()", tiles[0])
    WebDriverWait(browser, 5).until(lambda d: len(tiles[0].find_elements(By.TAG_NAME, "img")) == 4)
    assert len(tiles[5].find_elements(By.TAG_NAME, "img")) == 2  # it has no CAM pictures
    browser.find_element(By.ID, "more").click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "#tiles button")) == 20
    tiles[1].click()
    assert card(browser) == "Latent 3"


def contrast(driver: webdriver.Chrome, selector: str) -> float:
    """Contrast of an element's text with the page's ground, as WCAG has it."""
    colours = driver.execute_script(
        "const of = (e) => getComputedStyle(e); return [of(document.querySelector(arguments[0])).color,"
        " of(document.body).backgroundColor]",
        selector,
    )

    def luminance(colour: str) -> float:
        parts = [int(float(part)) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(colour) for colour in colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


def ground(driver: webdriver.Chrome) -> str:
    found: str = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, browser: webdriver.Chrome) -> None:
    prefer(browser, scheme)
    own = ground(browser)
    assert (own == "rgb(255, 255, 255)") == (scheme == "light")
    for selector in ("h1", ".note", "nav a", ".setting", ".tile li"):
        assert contrast(browser, selector) >= 4.5, selector
    browser.find_element(By.ID, "theme").click()
    assert ground(browser) != own
    browser.find_element(By.ID, "theme").click()
    assert ground(browser) == own


def test_a_phone(browser: webdriver.Chrome, folder: Path) -> None:
    resize(browser, 400, 800)
    for at in ("", "#latent-3"):
        visit(browser, folder, at)
        wide = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.getElementById('card').scrollWidth]"
        )
        assert max(wide) <= 400, (at, wide)
    small: Any = browser.execute_script(
        "return [...document.querySelectorAll('p, td, th, dd, li, button, h1, h2')].filter(e => e.offsetParent &&"
        " e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 11.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert small == []
    images = browser.find_elements(By.CSS_SELECTOR, "#card .strip img")
    assert all(image.size["width"] >= 60 for image in images)


def test_what_users_wrote_does_nothing(driver: webdriver.Chrome, folder: Path) -> None:
    driver.get((folder / "hostile.html").as_uri() + "#latent-0")
    assert HOSTILE in dialog_text(driver)
    assert HOSTILE in driver.find_element(By.CSS_SELECTOR, "#overview h1").text
    assert driver.execute_script("return typeof window.hacked") == "undefined"
    assert driver.title == f"{HOSTILE} · usae-probe"
    assert complaints(driver) == []


@pytest.mark.parametrize("case", ["1 site", "5 models"])
def test_other_numbers_of_models(case: str, driver: webdriver.Chrome, tmp_path: Path) -> None:
    metrics = metrics_of(CASES[case])
    sites = metrics["class_sites"]
    table = columns(30, sites)
    what = {"metrics": metrics, "overview": overview(overview_of(CASES[case]), metrics), "cards": [], "latents": table}
    write_explorer(page(**what), tmp_path / "report.html")
    resize(driver, 1280)
    driver.get((tmp_path / "report.html").as_uri() + "#latent-1")
    assert [block.text for block in driver.find_elements(By.CSS_SELECTOR, "#card .site h3")] == list(sites)
    assert not driver.find_element(By.ID, "gallery").is_displayed()  # there are no cards
    assert len(driver.find_elements(By.ID, "least-phi")) == (len(sites) > 1)
    least = min(
        (float(table[name][1]) for name in table if name.startswith("phi[")), default=float("nan")
    )  # the smallest over the pairs
    press(driver, Keys.ESCAPE)
    row = cells(driver, "latent").index("1")
    assert cells(driver, "phi")[row : row + 1] == ([short(least)] if len(sites) > 1 else [])
    assert complaints(driver) == []


def test_a_figure_grows(browser: webdriver.Chrome) -> None:
    figure = browser.find_element(By.ID, "figure-r2")
    assert figure.find_element(By.TAG_NAME, "img").get_attribute("alt") == "A figure. n = 3"
    browser.execute_script("arguments[0].scrollIntoView()", figure)
    figure.send_keys(Keys.ENTER)
    assert "large" in figure.get_attribute("class")
