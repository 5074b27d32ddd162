"""Latents of a finished evaluation, as `latents.csv` has them: which to make pictures of, and what they follow."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from ..config import CamConfig
from ..errors import CheckpointError, NoLatentsError, UsageError, first_line
from ..files import RESTORE, read_json


def choose_latents(asked: str, folder: Path) -> list[int]:
    """Read `top:8` (universal), `specific:4` (of one model), `factors:8` (those that follow a label) or `273,8`.

    All but numbers are by energy.

    Args:
        asked: the text, as config and command line spell it.
        folder: a run folder with `latents.csv` and `metrics.json`.

    Raises:
        NoLatentsError: when there are none of the kind.
        UsageError: when a number is none of the latents.
    """
    rows = latent_rows(folder)
    for number in (numbers := CamConfig(latents=asked).numbers):
        if number >= len(rows):
            raise UsageError(f"there is no latent {number}", hint=f"latents are numbered 0 to {len(rows) - 1}")
    if numbers:
        return numbers
    kind, _, n = asked.partition(":")
    if kind in (of_class := {"top": "universal", "specific": "specific"}):
        what, found = f"is {of_class[kind]}", [row for row in rows if row["category"] == of_class[kind]]
    else:
        what, found = "follows a label of the images in every model", _following(rows, folder)
    if not found:
        raise NoLatentsError(
            f"no latent of '{folder}' {what}: none to make pictures of",
            hint="choose latents by number, --latents 273,8; latents.csv lists them with their classes",
        )
    found.sort(key=lambda row: -float(row["total_energy"]))
    return [int(row["latent"]) for row in found[: int(n)]]


class Known(NamedTuple):
    """What is known of a latent: its class, and the label it follows in every model, `colour = red`, or nothing."""

    category: str
    label: str


def known_of_latents(folder: Path) -> list[Known]:
    """Return what an evaluation found out about every latent."""
    rows = latent_rows(folder)
    following = {row["latent"] for row in _following(rows, folder)}
    return [
        Known(row["category"], row["follows"].replace("=", " = ", 1) if row["latent"] in following else "")
        for row in rows
    ]


def _following(rows: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """Return the rows of the latents in `UniversalityReport.following`."""
    metrics = read_json(folder / "metrics.json")
    factors, sites = metrics.get("factors"), set(metrics["class_sites"])
    if factors is None:
        return []
    return [
        row
        for row in rows
        if set(row["fires_in"].split()) == sites
        and row["follows"]
        and all(float(row[f"auroc[{site}]"]) >= factors["auroc"] for site in sites)
    ]


def latent_rows(folder: Path) -> list[dict[str, str]]:
    """Read `latents.csv`.

    Raises:
        CheckpointError: when it is not there, or damaged.
    """
    path = folder / "latents.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise CheckpointError(f"'{path}' cannot be read: {first_line(error)}", hint=RESTORE) from error
    whole = rows and "category" in rows[0] and all(None not in row and None not in row.values() for row in rows)
    if not whole:
        raise CheckpointError(f"'{path}' is cut short, or no table of latents", hint=RESTORE)
    return rows
