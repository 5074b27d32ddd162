"""The closing screen of a run: what the models share, in words, then the numbers behind it; at most 80 columns wide.

Nothing is said by colour alone: piped, or with `NO_COLOR`, the screen is complete.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from .evidence import beside, evidence, seeds
from .headlines import beyond, n_live
from .published import published_facts
from .r2_table import finite, r2_matrix, short
from .tables import classes_and_entropy, facts_table, strongest_latents

WIDTH = 80
_MANY_RARE = 0.25  # of the live ones


def run_summary(
    overview: Mapping[str, Any],
    metrics: Mapping[str, Any],
    files: Mapping[str, Path],
    hint: str = "",
    *,
    whole: bool = False,
) -> RenderableType:
    """Return the closing screen of a run.

    Args:
        overview: what was compared: `models` {name: {"name", "sites"}}, `images` {"train", "validation", "holdout"},
            `n_latents`, `k`, `published`: entries of `[[published]]`, and `cam`: None or the content of `cam.json`.
        metrics: the content of `metrics.json`; parts that an older version did not write are left out.
        files: where the results are, by what they are.
        hint: what to try next, said last.
        whole: with all evidence as tables, on more than one screen.
    """
    said, cam = answer(overview, metrics), overview.get("cam")
    head = Group(Text.assemble((said[0], "bold"), " ", said[1]), Text(setting(overview, metrics), style="dim"))
    parts: list[RenderableType | None] = [
        head,
        r2_matrix(metrics, WIDTH),
        classes_and_entropy(metrics, 10 if whole else 5),
        *(map(facts_table, evidence(metrics)) if whole else [_beyond(metrics)]),
        *map(facts_table, published_facts(overview.get("published", ()), metrics)),
        strongest_latents(metrics, 8 if whole else 5),
        Text.assemble(("CAM:", "bold"), f" {pictures_said(cam)}") if cam else None,
        (file_table(files) if whole else _files(files)) if files else None,
        Text(hint) if hint else None,
    ]
    there = [part for part in parts if part is not None]
    spaced = [item for part in there for item in (part, Text(""))]
    return Constrain(Group(*spaced[:-1]), WIDTH)


def _beyond(metrics: Mapping[str, Any]) -> RenderableType | None:
    """Say in a line or two each what else is known."""
    found = beyond(metrics)
    if not found:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for value, what, controls in found:
        table.add_row(Text(value, style="bold"), Text(what + (f" ({', '.join(controls)})" if controls else "")))
    return table


def _files(files: Mapping[str, Path]) -> RenderableType:
    """Return where the first of the results is, and the names of the others in the folder of them all."""
    (name, first), *others = files.items()
    if not others:
        return file_table(files)
    folder = Path(os.path.commonpath([path.parent for path in files.values()]))
    names = ", ".join(str(path.relative_to(folder)) for _, path in others)
    return Group(file_table({name: first}), Text(f"also in {folder}: {names}", style="dim"))


def file_table(files: Mapping[str, Path]) -> Table:
    """Return where a run's results are."""
    where = Table.grid(padding=(0, 2))
    where.add_column(style="dim")
    where.add_column(overflow="fold")
    for name, path in files.items():
        where.add_row(Text(name), Text(str(path)))
    return where


# --- what was compared, in words ---


def answer(overview: Mapping[str, Any], metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Answer the question in two sentences: what is shared, and what one model's code explains of another."""
    names = model_names(overview)
    counts, n = metrics["counts"], metrics["n_latents"]
    live = n_live(metrics)
    if len(names) == 1:
        sharing = f"{names[0]}: {live:,} of {n:,} latents are live."
    else:
        shared, all_of_them = counts["universal"], "both" if len(names) == 2 else f"all {len(names)}"
        verb = "none fires" if shared == 0 else "it fires" if shared == 1 else "they fire"
        spread, controls = seeds(metrics), beside(metrics)
        sharing = (
            f"{', '.join(names[:-1])} and {names[-1]} share {shared:,} of {live:,} live latents"
            f"{f' ({spread})' if spread else ''}: {verb} in {all_of_them}, on the same images"
            f"{f' {controls}' if controls else ''}."
        )
    if counts["rare"] >= live * _MANY_RARE:
        sharing += (
            f" Of {counts['rare']:,} more nothing can be told, they fire in too few of {metrics['n_rows_eval']:,}"
            " held-out rows: more images, a larger holdout or fewer latents would."
        )
    return sharing, _explained(metrics)


def model_names(overview: Mapping[str, Any]) -> list[str]:
    """Spell every model with its network: `vit (vit_small_patch14)`."""
    names = []
    for model, entry in overview["models"].items():
        network = network_name(entry["name"])
        names.append(model if network in ("", model) else f"{model} ({network})")
    return names


def network_name(name: str) -> str:
    """Return how a network is called: of one in a Python file without the folder, which is nobody's business.

    >>> network_name("/home/me/nets.py:mine"), network_name("hf-hub:org/model")
    ('nets.py:mine', 'hf-hub:org/model')
    """
    return name.rpartition("/")[2] if ".py:" in name else name


def _explained(metrics: Mapping[str, Any]) -> str:
    """Say what the code of one model explains of another; for many models, of the best and the worst pair."""
    sites, r2 = metrics["class_sites"], metrics["r2"]
    if len(sites) == 1:
        return f"The code of {sites[0]} explains {_share(r2[sites[0]][sites[0]])} of its own variance (held out)."
    if len(sites) == 2:
        a, b = sites
        there, back = (_beside_linear(metrics, *pair) for pair in ((a, b), (b, a)))
        return f"{a}'s code explains {there} of {b}'s variance, the other way {back} (held out)."
    pairs = sorted((r2[a][b], a, b) for a, b in permutations(sites, 2) if finite(r2[a][b]))
    if not pairs:
        return ""
    (least, c, d), (most, a, b) = pairs[0], pairs[-1]
    return (
        f"At best, {a}'s code explains {_share(most)} of {b}'s variance; "
        f"at worst, {c}'s code {_share(least)} of {d}'s (held out)."
    )


def _beside_linear(metrics: Mapping[str, Any], source: str, target: str) -> str:
    """Spell a cross-R², with what a linear map from all of the source's activation explains."""
    linear = (metrics.get("r2_ridge") or {}).get(source, {}).get(target)
    share = _share(metrics["r2"][source][target])
    return f"{share} (a linear map {short(linear)})" if finite(linear) else share


def setting(overview: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Say of how many images, sites and latents: lines that fit the screen."""
    images = overview["images"]
    train, validation, holdout = (images[split] for split in ("train", "validation", "holdout"))
    total = _many(train + validation + holdout, "image")
    lines = [f"{total} ({train:,} train, {validation:,} validation, {holdout:,} held out)"]
    for part in (
        _many(len(metrics["sites"]), "site"),
        f"{_many(overview['n_latents'], 'latent')}, {overview['k']:,} active",
    ):
        if len(f"{lines[-1]} · {part}") <= WIDTH:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def pictures_said(cam: Mapping[str, Any]) -> str:
    """Say what became of the pictures."""
    modes, parts = cam["modes_counted"], []
    images = f"{cam['n_natural']:,} {cam['unit']}"
    for mode in ("independent", "contrast"):
        if found := modes.get(mode):
            kind = "" if mode == "independent" else f"{mode} "
            fire = "fires" if found["pictures"] == 1 else "fire"
            parts.append(
                f"{found['findings']:,} of {_many(found['pictures'], f'{kind}picture')} {fire} the latent above every "
                f"one of {images} in the picture's own model, {found['transferring']:,} in the others too (above 90 % "
                "of them, and of control latents)"
            )
    if found := modes.get("joint"):
        of = _many(found["pictures"], "joint picture")
        parts.append(f"{found['findings']:,} of {of} above the 99th percentile in all models")
    if cam["verdicts"]:
        verdicts = ", ".join(f"{n:,} {judgement}" for judgement, n in cam["verdicts"].items() if n)
        parts.append(f"verdicts: {verdicts}")
    return "; ".join(parts)


def _share(value: float | None) -> str:
    if not finite(value):
        return "an unknown share"
    return short(value) if value >= 0 else f"nothing (R² {short(value)})"


def _many(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
