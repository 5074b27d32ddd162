"""What a run's figures stand beside, in the terminal: every number is there, and what is not known is left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from rich.console import Group

from usae_probe.report.evidence import beside, evidence, seeds
from usae_probe.report.summary import run_summary
from usae_probe.report.tables import facts_table

from .test_summary import joined, metrics_of, printed

A, B = "resnet/layer4", "vit/blocks.5"


def spread(mean: float, n: int = 3) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.001, "high": mean + 0.001, "n": n}


def matrix(aa: Any, ab: Any, ba: Any, bb: Any) -> dict[str, dict[str, Any]]:
    return {A: {A: aa, B: ab}, B: {A: ba, B: bb}}


@pytest.fixture
def metrics() -> dict[str, Any]:
    control = {"sites": [A, B], "n_live": 90, "what": "", "seconds": 1.0, "r2": matrix(0.8, 0.11, 0.22, 0.7)}
    pair = {"cka": 0.38, "cka_null": 0.004, "mutual_knn": 0.14, "mutual_knn_null": 0.012, "universal_energy": 0.58}
    return {
        "sites": [A, B],
        "class_sites": [A, B],
        "r2": matrix(0.8, 0.41, 0.31, 0.7),
        "r2_interval": matrix([0.79, 0.81], [0.39, 0.43], [0.30, 0.32], [0.69, 0.71]),
        "counts": {"universal": 144},
        "n_live": 1930,
        "n_equal_rates": 1771,
        "thresholds": {"entropy": 0.9, "phi": 0.2, "q": 0.01},
        "platonic": [
            {"source": A, "target": B, "r2": 0.41, "r2_ridge": 0.45, "r2_share": 0.91, **pair},
            {"source": B, "target": A, "r2": 0.31, "r2_ridge": None, "r2_share": None, **pair},
        ],
        "similarity": {"k": 10, "n_images": 1000, "nulls": 20},
        "nulls": [{"within": "", "universal": [0, 0, 1, 0]}, {"within": "class", "universal": [78, 80]}],
        "controls": {
            "mispaired": {**control, "counts": {"universal": 5}},
            "untrained": {**control, "counts": {"universal": 63}},
            "vit twice": {**control, "counts": {"universal": 1901}},
        },
        "stability": {
            "seeds": [0, 1, 2],
            "universal": [144, 139, 151],
            "live": [1930, 1929, 1940],
            "found_again": [{"share": 0.52, "median": 0.71}, {"share": 0.55, "median": 0.74}],
        },
        "posthoc": [
            {"matched_on": "holdout", "n_pairs": 2042, "counts": {"universal": 99}, "null": 0.0},
            {"matched_on": "train", "n_pairs": 2042, "counts": {"universal": 88}, "null": 0.0},
        ],
        "independent_r2": {kind: {A: spread(0.825), B: spread(0.73)} for kind in ("steps", "encoder", "parts")},
        "alignment_tax": {kind: {A: spread(0.024), B: spread(-0.003)} for kind in ("steps", "encoder", "parts")},
        "counterparts": {A: {"share": 0.31, "random": 0.0, "n": 10, "cosine": 0.7}},
        "fidelity": {
            "n_images": 256,
            "share_recovered": matrix(0.91, 0.35, 0.65, None),
            "top1_recovered": matrix(0.73, 0.18, 0.33, None),
            "cosine": matrix(None, None, None, 0.97),
            "kl_mean": {A: 4.47, B: None},
            "top1_mean": {A: 0.031, B: None},
            "latents": [{"correlation": c, "both_firing": b} for c, b in ((0.5, 0.25), (0.3, None), (None, None))],
            "medians": {
                "correlation": 0.4,
                "null_correlation": 0.05,
                "spearman": 0.3,
                "null_spearman": 0.02,
                "both_firing": 0.25,
            },
        },
        "labels": {"bound": 0.66, "permutations": 20, "agreement": 0.71, "agreement_chance": 0.12, "n_agreement": 144},
    }


def shown(metrics: dict[str, Any]) -> str:
    return joined(printed(Group(*map(facts_table, evidence(metrics)))))


def test_the_headline_stands_beside_its_controls(metrics: dict[str, Any]) -> None:
    assert (
        beside(metrics) == "(shuffled 0.2, shuffled within class 79, mispaired 5, untrained 63)"
    )  # twice is no control
    assert seeds(metrics) == "139–151 over 3 seeds"


def test_every_number_is_there(metrics: dict[str, Any]) -> None:
    text = shown(metrics)
    for part in (
        f"{A} .41 ±.02 .45 .91 .38 (.00) .14 (.01) .58 → {B}",
        f"{B} .31 ±.01 – – .38 (.00)",
        "mutual 10-NN of 1,000 held-out images",
        "this run 144 1,930 .41 .31",
        "3 seeds 139–151 1,929–1,940",
        "shuffled within class, at evaluation 79 1,930",
        "mispaired 5 90 .11 .22",
        "vit twice 1,901 90 .11 .22",
        "independent SAEs, matched on held-out rows 99 2,042 pairs",
        "firing entropy ≥ .90 alone: 1,771; matched SAEs, images shuffled: 0, 0",
        "found again with another seed (cosine ≥ .7 in all decoders): .52–.55, median cosine of the matched .71–.74",
        f"{A} .801 .825 .024 .825 .024",  # .825 − .024
        f"{B} .733 .730 −.003",
        "mean of 3 seeds",
        f"universal counterpart (cosine ≥ .7): {A} .31 (random .00)",
        f"{A} .91 (.73) .35 (.18)",
        f"{B} .65 (.33) cosine .97",
        f"mean ablation: {A} 4.47 nats, .03 top-1 agreement",
        "2 universal latents: their effects on an image correlate at .40 in the median (random latents of equal "
        "energy .05); of 1, over images in which both fire, at .25",
        "Labels permuted 20 times, the best latent reaches AUROC .66.",
        "Of 144 universal latents 71 % have the same best label in all models (12 % by chance).",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("platonic", "What is alike"),
        ("controls", "Controls"),
        ("alignment_tax", "Alignment tax"),
        ("fidelity", "Fidelity"),
        ("labels", "Labels permuted"),
    ],
)
def test_what_is_not_there_is_left_out(metrics: dict[str, Any], missing: str, heading: str) -> None:
    assert heading in shown(metrics)
    less = copy.deepcopy(metrics)
    del less[missing]
    assert heading not in shown(less)
    assert heading not in shown(metrics | {missing: None if missing in ("fidelity", "labels") else {}})


def test_nothing_at_all() -> None:
    old = metrics_of((A, B))  # of a version that wrote none of it
    assert evidence(old) == []
    assert (beside(old), seeds(old)) == ("", "")


def test_many_models_show_the_pairs_with_most_r2(metrics: dict[str, Any]) -> None:
    row = metrics["platonic"][0]
    rows = [row | {"source": f"m{i}/x", "target": f"n{i}/x", "r2": i / 20} for i in range(12)]
    text = shown(metrics | {"platonic": rows})
    assert "m11/x" in text
    assert "m3/x" not in text
    assert "the 4 other pairs are in metrics.json" in text


def test_the_closing_screen_says_it_first(metrics: dict[str, Any]) -> None:
    sites = (A, B)
    known = metrics_of(sites)
    both = known | {key: value for key, value in metrics.items() if key not in ("counts", "r2", "n_live")}
    both |= {"n_live": 102, "r2": metrics["r2"], "r2_ridge": matrix(None, 0.45, None, None)}
    overview = {
        "models": {"resnet": {"name": "resnet10t", "sites": [A]}, "vit": {"name": "vit_tiny", "sites": [B]}},
        "images": {"train": 10, "validation": 1, "holdout": 2},
        "n_latents": 128,
        "k": 4,
        "cam": None,
    }
    text = joined(printed(run_summary(overview, both, {})))
    assert (
        "share 31 of 102 live latents (139–151 over 3 seeds): they fire in both, on the same images (shuffled 0.2"
        in text
    )
    assert f"{A}'s code explains .41 (a linear map .45) of {B}'s variance, the other way .31 (held out)" in text


def test_long_names_fit(metrics: dict[str, Any]) -> None:
    text = str(metrics)
    for site, name in (
        (A, "efficientnet_lite/blocks.10.3.conv_pwl@mean"),
        (B, "vit_small_patch14/blocks.10.attn@mean"),
    ):
        text = text.replace(site, name)
    printed(Group(*map(facts_table, evidence(eval(text)))))  # no line is wider than 80
