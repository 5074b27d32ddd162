"""Pages of runs that never were: as many latents and cards as a test or a benchmark wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from usae_probe.probes import NaturalActivations
from usae_probe.probes.natural import SiteNatural
from usae_probe.report.explorer import Explorer, card_data, overview
from usae_probe.report.facts import Facts

from .test_card import SITES, card
from .test_summary import latent, metrics_of

CLASSES = ("universal", "partial", "chance", "specific", "rare", "dead")
LABELS = ("class=horse", "class=truck", "class=sailing ship", "")
METRICS: dict[str, Any] = metrics_of(
    SITES,
    top_latents=[latent(3, list(SITES))],
    thresholds={"entropy": 0.9, "phi": 0.2, "q": 0.01},
    n_equal_rates=153,
    measured_on="holdout",
)
ABOUT = {
    "models": {
        "vit": {"name": "vit_small", "sites": [SITES[0]]},
        "resnet56": {"name": "nets.py:r", "sites": [SITES[1]]},
    },
    "images": {"train": 8100, "validation": 900, "holdout": 1000, "source": "cifar10"},
    "n_latents": 128,
    "k": 4,
    "cam": None,
}


def columns(
    n: int, sites: Sequence[str] = SITES, labels: Sequence[str] = LABELS, seed: int = 0
) -> dict[str, list[str]]:
    """Columns of a `latents.csv` of n latents; the last few are dead, and have empty cells."""
    draw, dead = np.random.default_rng(seed), np.arange(n) >= n - max(n // 10, 1)
    classes = [CLASSES[-1] if gone else CLASSES[i % 5] for i, gone in enumerate(dead)]

    def spelled(values: np.ndarray) -> list[str]:
        return ["" if gone else f"{value:.6g}" for value, gone in zip(values, dead, strict=True)]

    found = {
        "latent": [str(i) for i in range(n)],
        "category": classes,
        "split": ["0"] * n,
        "positional": ["0"] * n,
        "fires_in": ["" if gone else " ".join(sites) for gone in dead],
        "entropy": spelled(draw.random(n)),
        "q": spelled(10.0 ** -draw.integers(0, 60, n)),
        "total_energy": [
            "0" if gone else f"{value:.6g}" for value, gone in zip(draw.exponential(size=n), dead, strict=True)
        ],
    }
    for name in ("fires", "rate", "mean", "maximum", "energy", "decoder_norm"):
        for site in sites:
            values = draw.integers(0, 900, n) if name == "fires" else draw.random(n)
            found[f"{name}[{site}]"] = [f"{value:.6g}" for value in values * ~dead]
    measures = (
        "cofires",
        "share_a",
        "share_b",
        "jaccard",
        "lift",
        "phi",
        "phi_low",
        "phi_high",
        "correlation",
        "p",
        "q",
    )
    for one, other in combinations(sites, 2):
        found |= {f"{name}[{one}|{other}]": spelled(draw.random(n) * 1.2 - 0.2) for name in measures}
        found |= {f"{name}[{one}|{other}]": [""] * n for name in ("phi_place", "p_place")}
    found["follows"] = ["" if gone else labels[i % len(labels)] for i, gone in enumerate(dead)]
    for name in ("auroc", "purity"):
        for site in sites:
            found[f"{name}[{site}]"] = spelled(0.5 + 0.5 * draw.random(n))
    for site in sites:
        found[f"best[{site}]"] = found["follows"]
    return found


def natural(number: int, n: int = 500) -> NaturalActivations:
    """Activations of one latent on n images."""
    sites = {}
    for i, site in enumerate(SITES):
        activation = np.random.default_rng([number, i]).normal(size=(n, 1)).astype(np.float32)
        moments = np.zeros(number + 1), np.ones(number + 1), np.full(number + 1, 0.1)
        sites[site] = SiteNatural({number: 0}, np.clip(activation - 1, 0, None), activation, *moments)
    return NaturalActivations(sites, np.arange(n), np.zeros(n, dtype=np.int8), None)


def page(n: int = 60, n_cards: int = 6, figures: Sequence[Path] = (), **change: Any) -> Explorer:
    """A page of n latents, of which every third has a card, up to `n_cards`; the first three have CAM pictures."""
    cards = []
    for place in range(n_cards):
        made = replace(card(), latent=3 * place)
        if place >= 3:
            made = replace(made, pictures=[])
        cards.append(card_data(made, natural(made.latent), 96))
    given: dict[str, Any] = {
        "title": "a run",
        "overview": overview(ABOUT, METRICS),
        "metrics": METRICS,
        "latents": columns(n),
        "cards": cards,
        "figures": figures,
        "about": [Facts("Models", ["", "network"], [["vit", "vit_small"]], ["a note"])],
    }
    return Explorer(**(given | change))
