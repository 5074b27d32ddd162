"""What was run, as tables that may be mailed: of files and folders they name the last part alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..report.facts import Facts
from ..report.summary import network_name
from ..split import spoken


def about_run(
    record: Mapping[str, Any], overview: Mapping[str, Any], metrics: Mapping[str, Any] | None
) -> Iterator[Facts]:
    """Yield tables of what was run: models, settings, stages, versions.

    Args:
        record: the content of `run.json`.
        overview: what was compared, as of `run_summary`.
        metrics: the content of `metrics.json`; None where nothing was measured.
    """
    config = record["config"]
    models = [  # of files and folders the name alone: the page may be mailed
        [
            name,
            network_name(model["name"]),
            model["adapter"],
            ", ".join(overview["models"][name]["sites"]) or "–",
        ]
        for name, model in config["models"].items()
    ]
    yield Facts("Models", ["", "network", "adapter", "sites"], models, [])
    usae, train = config["usae"], config["train"]
    settings = {
        "images": Path(config["images"]["source"]).name,
        "latents": f"{usae['n_latents']:,}, {usae['k']:,} active, {usae['sparsity']}",
        "training": f"{train['steps']:,} steps" if train["steps"] else f"{train['epochs']} epochs",
        "batch size, learning rate": f"{train['batch_size']:,}, {train['lr']:g}",
    }
    if metrics is not None:
        settings["measured on"] = f"{metrics['n_rows_eval']:,} {spoken(metrics.get('measured_on', 'holdout'))} rows"
        settings["classes over"] = ", ".join(metrics["class_sites"])
    yield Facts("Settings", ["", ""], [[key, value] for key, value in settings.items()], [])
    spent = [[stage, f"{done['seconds']:,.0f} s"] for stage, done in record["stages"].items() if stage != "report"]
    yield Facts("Stages", ["", ""], spent, [])
    yield Facts("Versions", ["", ""], [[name, text] for name, text in record["versions"].items()], [])
