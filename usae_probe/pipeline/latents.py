"""Latents of a finished evaluation, as `latents.csv` has them: which to make pictures of, and what they follow."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError


def choose_latents(asked: str, folder: Path) -> list[int]:
    """Read `top:8` (universal latents by energy), `factors:8` (those that follow a label) or `273,8`.

    Args:
        asked: the text, as config and command line spell it.
        folder: a run folder with `latents.csv` and `metrics.json`.

    Raises:
        UsageError: when there are none of the kind, or a number is none of the latents.
    """
    rows = _latent_rows(folder)
    kind, _, n = asked.partition(":")
    if not n:
        numbers = list(dict.fromkeys(int(number) for number in asked.split(",")))
        for number in numbers:
            if number >= len(rows):
                raise UsageError(f"there is no latent {number}", hint=f"latents are numbered 0 to {len(rows) - 1}")
        return numbers
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    universal = [row for row in rows if row["category"] == "universal"]
    found = universal if kind == "top" else [row for row in universal if _follows(row, metrics)]
    if not found:
        what = "universal" if kind == "top" else "universal and follows a label of the images in every model"
        raise UsageError(
            f"no latent of '{folder}' is {what}: none to make pictures of",
            hint="choose latents by number, --latents 273,8; latents.csv lists them with their classes",
        )
    found.sort(key=lambda row: -float(row["total_energy"]))
    return [int(row["latent"]) for row in found[: int(n)]]


def followed_labels(folder: Path) -> dict[int, str]:
    """Return the label that each latent follows best, `colour = red`, where the images carry labels."""
    labels = {int(row["latent"]): row.get("follows", "") for row in _latent_rows(folder)}
    return {latent: label.replace("=", " = ", 1) for latent, label in labels.items() if label}


def _latent_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "latents.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _follows(row: Mapping[str, str], metrics: Mapping[str, Any]) -> bool:
    """Say whether a universal latent follows a label in every model as closely as the evaluation asked."""
    factors = metrics.get("factors")
    if factors is None:
        return False
    scores = [row.get(f"auroc[{site}]") for site in metrics["class_sites"]]
    return all(score and float(score) >= factors["auroc"] for score in scores)
