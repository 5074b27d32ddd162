"""The closing screen of a run: every number is there, nothing is wider than 80 columns, nothing hangs on colour."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from usae_probe.probes.universality import CATEGORIES
from usae_probe.report import terminal
from usae_probe.report.r2_table import RAMP, finite, r2_matrix, short
from usae_probe.report.summary import file_table, run_summary
from usae_probe.report.tables import strongest_latents

NAN = float("nan")
TWO = ("resnet/layer3", "resnet/layer4", "vit/blocks.3", "vit/blocks.5")
LONG = ("efficientnet_lite/blocks.10.3.conv_pwl@mean", "efficientnet_lite/blocks.9.3.conv_pwl@mean")
NINE = tuple(f"{model}/{LONG[0][18:]}.{i}" for model in ("resnet", "efficientnet_lite", "vit") for i in range(3))
CASES = {
    "2 models, 4 sites": TWO,
    "1 site": ("resnet/layer4",),
    "3 models, 9 sites": NINE,
    "long names": (*LONG, "x/" + "very_long.module.path." * 4 + "end"),
    "5 models": tuple(f"model{i}/blocks.{i}" for i in range(5)),
    "12 sites": tuple(f"m{i % 4}/blocks.{i}.attention.projection@mean" for i in range(12)),
}


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text  # no colours in a pipe
    assert all(len(line) <= 80 for line in text.splitlines())
    return text


def joined(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def class_sites(sites: tuple[str, ...]) -> list[str]:
    return list({site.partition("/")[0]: site for site in sites}.values())


def matrix(sites: tuple[str, ...], offset: float = 0.0) -> dict[str, dict[str, float | None]]:
    n = len(sites)
    return {s: {t: offset + 0.9 * (i * n + j) / n**2 for j, t in enumerate(sites)} for i, s in enumerate(sites)}


def latent(number: int, sites: list[str], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "latent": number,
        "category": "universal",
        "rate": {site: 0.124 if i == 0 else 0.031 for i, site in enumerate(sites)},
        "entropy": 0.98,
        "phi": 0.734,
        "total_energy": 3.0,
        "follows": {"factor": "colour", "value": "red", "auroc": {s: 0.98 - 0.03 * i for i, s in enumerate(sites)}},
    }
    return values | changes


def metrics_of(sites: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    chosen = class_sites(sites)
    values: dict[str, Any] = {
        "sites": list(sites),
        "class_sites": chosen,
        "r2": matrix(sites),
        "r2_train": matrix(sites, 0.05),
        "counts": dict(zip(CATEGORIES, (31, 12, 20, 39, 6, 20), strict=True)),
        "n_split": 4,
        "n_latents": 128,
        "n_rows_train": 1620,
        "n_rows_eval": 200,
        "entropy_histogram": {
            "edges": [i / 10 for i in range(11)],
            "universal": [0] * 9 + [31],
            "others": [39, 1, 0, 2, 3, 5, 4, 6, 4, 7],
        },
        "top_latents": [latent(100 + i, chosen) for i in range(10)],
        "factors": {"names": ["colour"], "n_values": 30, "auroc": 0.9, "n_following": 14},
    }
    return values | changes


def cam_of(**modes: tuple[int, int, int]) -> dict[str, Any]:
    """What `cam.json` says of pictures, findings and transferring ones, by mode."""
    counted = {mode: dict(zip(("pictures", "findings", "transferring"), n, strict=True)) for mode, n in modes.items()}
    verdicts = {"same concept": 5, "different": 0, "undecided": 3}
    return {"modes_counted": counted, "n_natural": 4000, "unit": "images", "verdicts": verdicts}


def overview_of(sites: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    names = dict.fromkeys(site.partition("/")[0] for site in sites)
    values: dict[str, Any] = {
        "models": {m: {"name": f"{m}10t", "sites": [s for s in sites if s.startswith(f"{m}/")]} for m in names},
        "images": {"source": "photos/", "train": 1620, "validation": 180, "holdout": 200},
        "n_latents": 128,
        "k": 8,
        "cam": cam_of(independent=(16, 15, 9), joint=(8, 8, 0)),
    }
    return values | changes


def screen(sites: tuple[str, ...] = TWO, width: int = 80, **changes: Any) -> str:
    return printed(run_summary(overview_of(sites), metrics_of(sites, **changes), {}, whole=True), width)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("sites", CASES.values(), ids=CASES)
def test_the_screen_holds_every_number(sites: tuple[str, ...], width: int) -> None:
    text = screen(sites, width)
    for source, row in matrix(sites).items():
        for target, held_out in row.items():
            assert f"{short(held_out)} {short(matrix(sites, 0.05)[source][target])}" in re.sub(" +", " ", text)
    assert "held out (200 rows) and training (1,620)" in text
    assert "2,000 images (1,620 train, 180 validation, 200 held out)" in text
    assert "128 latents, 8 active" in text
    for site in sites:
        assert "".join(site.split("/")[1]) in text.replace("\n", "") or len(site) > 60
    for name, n in zip(CATEGORIES, (31, 12, 20, 39, 6, 20), strict=True):
        assert re.search(rf"{name} +{n} ", text)
    assert re.search(r"└ split +4 ", text)


def test_the_answer_comes_first_in_words() -> None:
    assert joined(screen()).startswith(
        "resnet (resnet10t) and vit (vit10t) share 31 of 102 live latents: they fire in both, on the same images. "
        "resnet/layer4's code explains .39 of vit/blocks.5's variance, the other way .73 (held out)."
    )  # 128 − 20 dead − 6 rare; .9 · 7/16 and .9 · 13/16
    assert joined(screen(CASES["1 site"])).startswith(
        "resnet (resnet10t): 102 of 128 latents are live. The code of resnet/layer4 explains .00 of its own variance"
    )


def test_of_many_models_the_best_and_the_worst_pair_are_named() -> None:
    sites = ("a/x", "b/y", "c/z")
    r2 = matrix(sites)
    r2["c/z"]["a/x"], r2["b/y"]["a/x"], r2["a/x"]["c/z"] = 0.91, -0.2, None
    text = joined(screen(sites, r2=r2))
    assert "a (a10t), b (b10t) and c (c10t) share 31 of 102 live latents: they fire in all 3," in text
    assert "At best, c/z's code explains .91 of a/x's variance; at worst, b/y's code nothing (R² −.20) of a/x's" in text
    nothing = {s: dict.fromkeys(sites) for s in sites}
    assert "At best" not in screen(sites, r2=nothing)


@pytest.mark.parametrize(
    ("n", "words"), [(0, "0 of 71 live latents: none fires"), (1, "1 of 72 live latents: it fires")]
)
def test_none_or_one_shared_latent(n: int, words: str) -> None:
    counts = dict(zip(CATEGORIES, (n, 12, 20, 39, 6, 51 - n), strict=True))
    assert words in joined(screen(counts=counts, n_latents=128))


@pytest.mark.parametrize("rare", [24, 25])
def test_where_much_is_too_rare_to_tell_the_answer_says_so(rare: int) -> None:
    """From a quarter of the live ones on: few held-out images say little of many latents."""
    counts = dict(zip(CATEGORIES, (31, 12, 20, 37, rare, 0), strict=True))
    text = joined(screen(counts=counts, n_latents=100 + rare))
    said = "Of 25 more nothing can be told, they fire in too few of 200 held-out rows: more images, a larger holdout or"
    assert (said in text) == (rare == 25)


@pytest.mark.parametrize(("other", "dim"), [(0.9, False), (0.89, True)])
def test_a_label_that_is_not_followed_in_every_model_is_dim(other: float, dim: bool) -> None:
    sites = TWO[1], TWO[3]
    follows = {"factor": "colour", "value": "red", "auroc": dict(zip(sites, (0.97, other), strict=True))}
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80, record=True)
    console.print(strongest_latents(metrics_of(sites, top_latents=[latent(1, list(sites), follows=follows)]), 1))
    assert ("\x1b[2mcolour = red" in console.export_text(styles=True)) == dim


def test_a_model_called_like_its_spec_is_named_once() -> None:
    overview = overview_of(TWO) | {
        "models": {"resnet": {"name": "resnet", "sites": []}, "vit": {"name": "", "sites": []}}
    }
    assert joined(printed(run_summary(overview, metrics_of(TWO), {}))).startswith("resnet and vit share")


@pytest.mark.parametrize("none", [NAN, None])
def test_what_is_not_a_number_is_a_dash(none: float | None) -> None:
    values = matrix(TWO)
    values["resnet/layer4"]["vit/blocks.5"] = none
    text = screen(r2=values, r2_train=values)
    assert re.search(r" –   – ", text)
    assert "explains an unknown share of vit/blocks.5's variance" in joined(text)
    assert "nan" not in text.lower()


def test_short_numbers() -> None:
    values = (0.516, 1.0, 0.999, 0.0, -0.001, -0.07, -0.999, -3.21, -9.97, -42.3, -1e6, None, NAN)
    assert [short(value) for value in values] == [
        ".52", "1.00", "1.00", ".00", ".00", "−.07", "−1.0", "−3.2", "−10", "−42", "<−99", "–", "–"
    ]  # fmt: skip
    assert not finite(float("inf"))


def test_histogram_bars_are_in_proportion() -> None:
    text = screen()
    bars = {line[:7]: line[8:30].split() for line in text.splitlines() if re.match(r"\d\.\d–\d\.\d ", line)}
    assert next(iter(bars)) == "0.9–1.0"
    assert bars["0.9–1.0"] == ["█" * 12 + "░" * 3, "38"]  # 15 · 31/39 = 11.9; 15 · 38/39 = 14.6
    assert bars["0.0–0.1"] == ["░" * 15, "39"]
    assert bars["0.1–0.2"] == ["░", "1"]  # what is there is seen
    assert bars["0.2–0.3"] == ["0"]


def test_the_short_screen_is_one_screen() -> None:
    folder = Path("runs/demo")
    names = ("report.html", "metrics.json", "latents.csv", "figures", "usae.safetensors", "buffer", "run.json")
    files = {name: folder / name for name in (*names, "cam/sheet.png")}
    a, b = class_sites(TWO)
    alike = {"source": a, "target": b, "r2": 0.1, "r2_ridge": 0.45, "r2_share": 0.2, "universal_energy": 0.5}
    alike |= {"cka": 0.41, "cka_null": 0.004, "mutual_knn": 0.09, "mutual_knn_null": 0.01}
    tax = {"steps": {site: {"mean": 0.03, "low": 0.0, "high": 0.1, "n": 3} for site in TWO}}
    shares = {"share_recovered": {a: {a: 0.9, b: 0.35}, b: {a: 0.3, b: 0.8}}}
    metrics = metrics_of(TWO, platonic=[alike], alignment_tax=tax, fidelity=shares)
    text = printed(run_summary(overview_of(TWO), metrics, files, hint="Your own models:\nstart from a copy"))
    assert len(text.splitlines()) <= 50
    said = joined(text)
    assert said.startswith("resnet (resnet10t) and vit (vit10t) share 31 of 102 live latents")
    for part in (
        f".41 CKA of {a} and {b}, without a USAE (shuffled .00, mutual k-NN .09, shuffled .01)",
        ".03 alignment tax: R² that independent SAEs of as many steps have more (.03 to .03 over 4 sites)",
        f".35 of vit's output recovered with {a}'s code in the place of {b} (its own code .80, mean ablation 0)",
        "report.html runs/demo/report.html also in runs/demo: metrics.json, latents.csv, figures,",
        "cam/sheet.png",
    ):
        assert part in said, part
    bars = {line[:7]: line[8:30].split() for line in text.splitlines() if re.match(r"\d\.\d–\d\.\d ", line)}
    assert list(bars) == ["0.8–1.0", "0.6–0.8", "0.4–0.6", "0.2–0.4", "0.0–0.2"]
    whole = metrics["entropy_histogram"]
    assert bars["0.0–0.2"][-1] == str(sum(sum(whole[kind][:2]) for kind in ("universal", "others")))
    assert "104 12" in re.sub(" +", " ", text)
    assert "105 12" not in re.sub(" +", " ", text)  # five are shown


def test_strongest_latents_with_labels() -> None:
    lines = [" ".join(line.split()) for line in screen().splitlines()]
    assert "Strongest universal latents numbers side by side: resnet, vit" in lines
    assert "latent fires in % φ AUROC best label" in lines
    assert "100 12 3.1 .73 .98 .95 colour = red" in lines
    assert "107 12 3.1 .73 .98 .95 colour = red" in lines
    assert not any(line.startswith("108 ") for line in lines)  # eight are shown
    assert "14 latents follow a label in every model (AUROC ≥ .90; best of 30 values)" in lines


def test_strongest_latents_of_several_classes_and_without_labels() -> None:
    sites = class_sites(TWO)
    rare = {sites[0]: 0.0001}
    top = [latent(7, sites, follows=None), latent(8, sites, category="partial", phi=None, rate=rare, follows=None)]
    lines = [" ".join(line.split()) for line in screen(top_latents=top).splitlines()]
    assert "Strongest latents numbers side by side: resnet, vit" in lines
    assert "7 universal 12 3.1 .73" in lines
    assert "8 partial <.1 – –" in lines
    top[1]["follows"] = latent(8, sites)["follows"]
    lines = [" ".join(line.split()) for line in screen(top_latents=top).splitlines()]
    assert "7 universal 12 3.1 .73 – –" in lines
    assert "8 partial <.1 – – .98 .95 colour = red" in lines
    assert "AUROC" not in screen(top_latents=top, factors=None)


def test_numbers_of_many_models_are_ranges() -> None:
    text = re.sub(" +", " ", screen(CASES["5 models"]))
    assert "least–greatest of all models" in text
    assert "100 3.1–12 .73 .86–.98 colour = red" in text


def test_parts_that_an_older_version_did_not_write_are_left_out() -> None:
    metrics = metrics_of(TWO)
    for key in ("entropy_histogram", "top_latents", "factors"):
        del metrics[key]
    text = printed(run_summary(overview_of(TWO, cam=None), metrics, {}))
    for word in ("entropy", "Strongest", "follow", "CAM"):
        assert word not in text
    assert "in several, not on the same images" in text
    empty = {"edges": [0.0, 1.0], "universal": [0], "others": [0]}
    assert "entropy" not in screen(entropy_histogram=empty, top_latents=[])


def test_pictures_files_and_hint() -> None:
    files = {"measures": Path("run/metrics.json"), "deep": Path("x" * 100)}
    text = printed(run_summary(overview_of(TWO), metrics_of(TWO), files, hint="next: usae-probe cam"))
    said = joined(text)
    assert "CAM: 15 of 16 pictures fire the latent above every one of 4,000 images in the picture's own model" in said
    assert "9 in the others too (above 90 % of them, and of control latents)" in said
    assert (
        "8 of 8 joint pictures above the 99th percentile in all models; verdicts: 5 same concept, 3 undecided" in said
    )
    assert re.search(r"measures +run/metrics.json", text)
    assert text.count("x") >= 100  # folded, not cut
    assert text.endswith("next: usae-probe cam\n")
    one = overview_of(TWO, cam=cam_of(contrast=(1, 1, 0)))
    assert "1 of 1 contrast picture fires the latent" in joined(printed(run_summary(one, metrics_of(TWO), {})))
    assert "CAM" not in printed(run_summary(overview_of(TWO, cam=None), metrics_of(TWO), {}))
    assert "run/metrics.json" in printed(file_table(files))


def test_markup_in_names_is_shown_as_it_is() -> None:
    sites = ("[red]/x", "m/[bold]y[/bold]")
    files = {"[b]measures": Path("[blue]/metrics.json")}
    follows = {"factor": "[i]", "value": "[/i]", "auroc": dict.fromkeys(sites, 0.95)}
    metrics = metrics_of(sites, top_latents=[latent(1, list(sites), follows=follows)])
    text = printed(run_summary(overview_of(sites), metrics, files, hint="[u]hint"))
    for name in (*sites, "[b]measures", "[blue]/metrics.json", "[u]hint", "[red] ([red]10t)", "[i] = [/i]"):
        assert name in text


def on_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"COLUMNS": "80", "TERM": "xterm-256color", "COLORTERM": "truecolor"} | environment).items():
        monkeypatch.setenv(name, value)
    terminal.consoles()[0].print(run_summary(overview_of(TWO), metrics_of(TWO), {}))
    return capsys.readouterr().out


def test_colours_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NO_COLOR on a forced terminal leaves no escape code at all, and the same words."""
    piped = on_terminal(monkeypatch, capsys)
    coloured = on_terminal(monkeypatch, capsys, FORCE_COLOR="1")
    plain = on_terminal(monkeypatch, capsys, FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b" not in piped + plain
    assert piped == plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert "48;2;" in coloured  # coloured ground


def test_cells_are_coloured_by_the_held_out_value() -> None:
    values: dict[str, dict[str, float | None]] = {"a/x": {"a/x": 0.95, "b/y": -0.5}, "b/y": {"a/x": 1.0, "b/y": None}}
    metrics = metrics_of(("a/x", "b/y"), r2=values)
    console = Console(width=80, force_terminal=True, color_system="truecolor", file=io.StringIO())
    grounds = [
        (segment.text.strip(), segment.style.bgcolor.name)
        for line in console.render_lines(r2_matrix(metrics, 80), console.options)
        for segment in line
        if segment.style and segment.style.bgcolor and segment.style.bold
    ]
    assert grounds == [(".95", RAMP[9][0]), ("−.50", RAMP[0][0]), ("1.00", RAMP[9][0])]


def test_numbers_can_be_read_on_every_ground() -> None:
    """WCAG contrast of at least 4.5 for the held-out value, 3 for the one beside it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for ground, ink, faint in RAMP:
        assert contrast(ground, ink) >= 4.5, ground
        assert contrast(ground, faint) >= 3.0, ground
    luminances = [luminance(ground) for ground, _, _ in RAMP]
    assert luminances == sorted(luminances)
