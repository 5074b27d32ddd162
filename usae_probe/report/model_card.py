"""A model card in markdown: what a USAE was trained on, how far its models share, beside its controls, and its limits.

Of files and folders it names the last part only: it is made to be uploaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .evidence import evidence
from .facts import Facts
from .published import published_facts
from .r2_table import short
from .summary import answer, model_names, setting
from .tables import MEANING

_HEADER = """---
library_name: usae-probe
tags:
- sparse-autoencoder
- universal-sparse-autoencoder
- interpretability
- vision
{more}---
"""
_LIMITS = (
    "The latents are one of many ways to cut up what is shared: with few rows per latent, another seed finds others, "
    "while their number and R² stay alike (see the seeds above, where they were trained).",
    "What is shared need not be abstract: image statistics and untrained networks share latents, too. The controls say "
    "how much; without them read the counts as an upper bound.",
    "R² and classes hold for these images and these layers. Held-out images were not trained on; layers and settings "
    "may have been chosen on validation images.",
)
_CITATION = """```bibtex
@article{thasarathan2025universal,
  title = {Universal Sparse Autoencoders: Interpretable Cross-Model Concept Alignment},
  author = {Thasarathan, Harrish and Forsyth, Julian and Fel, Thomas and Kowal, Matthew and Derpanis, Konstantinos G.},
  journal = {arXiv preprint arXiv:2502.03714},
  year = {2025}
}
```"""


def model_card(
    title: str,
    overview: Mapping[str, Any],
    about: Sequence[Facts],
    exported: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any] | None,
) -> str:
    """Return the card of a run.

    Args:
        title: of the run.
        overview: what was compared, as of `run_summary`.
        about: what was run: models, settings, versions.
        exported: of every site that is beside the card: `site`, `d_in`, `file` (from the card's folder), `architecture`
            and `format`.
        metrics: the content of `metrics.json`; None where nothing was measured.
    """
    folders = [entry for entry in exported if entry["format"] == "saelens"]
    parts = [
        _HEADER.format(more="- saelens\n" if folders else "") + f"# {title}: a universal sparse autoencoder",
        f"One sparse code for the activations of {_listed(model_names(overview))}: an encoder and a decoder per site, "
        "and the same latents for all (arXiv 2502.03714). Made by usae-probe.",
        _files(exported),
        _loading(exported),
        *(_measured(overview, metrics) if metrics is not None else ["It was not measured: no figure is known."]),
        *("\n\n".join([f"## {facts.title}", _table(facts)]) for facts in about if facts.title != "Stages"),
        "\n".join(["## Limits", "", *(f"- {limit}" for limit in _LIMITS)]),
        "## Source of the method\n\n" + _CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _files(exported: Sequence[Mapping[str, Any]]) -> str:
    rows = [[entry["site"], f"{entry['d_in']:,}", entry["architecture"], f"`{entry['file']}`"] for entry in exported]
    return _table(Facts("", ["site", "d_in", "architecture", "where"], rows, []))


def _loading(exported: Sequence[Mapping[str, Any]]) -> str:
    first = exported[0]
    if first["format"] == "saelens":
        load = f'from sae_lens import SAE\n\nsae = SAE.load_from_disk("{first["file"]}")'
        read = "z = sae.encode(rows)  # rows [n, d_in], as the layer gives them\nx_hat = sae.decode(z)"
    else:
        load = f'from safetensors.torch import load_file\n\nw = load_file("{first["file"]}")'
        read = 'z_pre = (rows - w["b_dec"]) @ w["W_enc"] + w["b_enc"]  # rows [n, d_in], as the layer gives them'
        read += '\n# z keeps the active entries of z_pre; x_hat = z @ w["W_dec"] + w["b_dec"]'
    return (
        f"```python\n{load}\n{read}\n```\n\nNormalisation is folded in: encoders take and decoders give activations in "
        "the model's own units. A latent has the same number everywhere, so one site's `encode` and another's `decode` "
        "translate between the models."
    )


def _measured(overview: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    yield "## What they share\n\n" + " ".join(answer(overview, metrics))
    yield " · ".join(setting(overview, metrics).split("\n"))
    sites = metrics["sites"]
    cells = [[source, *(_both(metrics, source, target) for target in sites)] for source in sites]
    note = "code of the row's site decoded to the column's; in brackets on training rows"
    yield "### R², held out\n\n" + _table(Facts("", ["", *sites], cells, [note]))
    classes = [[name, f"{n:,}", MEANING[name]] for name, n in metrics["counts"].items()]
    yield "### Where latents fire\n\n" + _table(Facts("", ["class", "latents", "fires"], classes, []))
    for facts in (*evidence(metrics), *published_facts(overview.get("published", ()), metrics)):
        yield "\n\n".join(part for part in (f"### {facts.title}" if facts.title else "", _table(facts)) if part)


def _both(metrics: Mapping[str, Any], source: str, target: str) -> str:
    training = (metrics.get("r2_train") or {}).get(source, {}).get(target)
    return f"{short(metrics['r2'][source][target])} ({short(training)})"


def _table(facts: Facts) -> str:
    """Return facts as a markdown table with its notes below."""
    lines = []
    if facts.rows:
        lines += [_row(facts.headings), _row(["---"] * len(facts.headings)), *map(_row, facts.rows), ""]
    return "\n".join([*lines, *(f"{note}  " for note in facts.notes)]).strip()


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
