"""The stages, the config keys each depends on, and the file that stands for its result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import RunConfig
from ..errors import UsageError
from ..files import sha256

Stage = Literal["harvest", "train", "evaluate", "cam", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
MEASURING: tuple[Stage, ...] = STAGES[:3]
"""The stages that later ones need; a run without a `[cam]` table does these and the report."""

RESULTS: dict[Stage, tuple[str, ...]] = {
    "harvest": ("buffer/manifest.json",),
    "train": ("usae.safetensors", "usae.json", "history.jsonl"),
    "evaluate": ("metrics.json", "latents.csv"),
    "cam": ("cam/cam.json",),
    "report": ("report.html",),
}
"""Files without which a stage is not finished; the hash of the first stands for the result."""

_TABLES: dict[Stage, tuple[str, ...]] = {
    "harvest": ("models", "images", "buffer"),
    "train": ("usae", "train"),
    "evaluate": ("probes",),
    "cam": ("cam",),
    "report": ("report",),
}
_ALONG = ("memory", "online", "reuse", "warmup_rows")
"""Keys of `[buffer]` that say in which order rows are trained on, and change none of them."""
_WITHOUT_EFFECT = {
    "images": ("workers", "strict"),
    "buffer": ("verify",),
    "train": ("log_every", "kernel", "device", "tensorboard", "workers"),
    "cam": ("max_batch",),
    "report": ("scan",),
}
_OF_EXEMPLARS = ("exemplars", "seed", "place")
"""Keys of `[cam]` that say which images a latent's card shows."""


def earlier(stage: Stage) -> tuple[Stage, ...]:
    """Return the stages whose results a stage cannot do without."""
    return MEASURING[: STAGES.index(stage)]


def depends_on(stage: Stage, config: RunConfig, results: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Return what a stage's result depends on, flattened to `table.key`: config keys and the earlier results' hashes.

    Args:
        stage: the stage.
        config: the config of the run.
        results: {stage: hash of its result}.
        folder: the run folder; images in it may move with it.
    """
    whole = json.loads(config.model_dump_json())
    images = Path(config.image_path)
    whole["images"]["source"] = str(images.relative_to(folder) if images.is_relative_to(folder) else images)
    for name, model in whole["models"].items():
        del model["device"]
        if path := config.checkpoint_path(name):
            model["checkpoint's content"] = content_hash(path)
    for table, idle in _WITHOUT_EFFECT.items():
        for key in idle:
            del whole[table][key]
    tables = [table for done in (*earlier(stage), stage) for table in _TABLES[done]]
    if "train" not in tables:
        for key in _ALONG:
            del whole["buffer"][key]
    keys: dict[str, Any] = dict(_flatten({table: whole[table] for table in tables}))
    if "train" in tables and config.train.pairing == "label":
        keys["probes.within"] = config.probes.within
    if stage == "report":  # it shows the pictures and the scan that there are, and needs neither
        keys |= {f"cam.{key}": whole["cam"][key] for key in _OF_EXEMPLARS}
        scan = scan_folder(config, folder)
        if published := config.published_here():
            keys["published"] = [each.model_dump() for each in published]
        keys |= {"the cam's result": results.get("cam"), "the scan": scan and content_hash(scan / "scan.json")}
    # The same keys with other pictures behind them, say.
    return keys | {f"the {before}'s result": results.get(before) for before in earlier(stage)}


def scan_folder(config: RunConfig, folder: Path) -> Path | None:
    """Return the folder of the scan that a run's page shows; None where there is none.

    Raises:
        UsageError: when the one asked for holds no scan.
    """
    asked, beside = config.report.scan, folder.resolve()
    found = config.base / Path(asked).expanduser() if asked else beside.with_name(f"{beside.name}-scan")
    if (found / "scan.json").is_file():
        return found
    if not asked:
        return None
    raise UsageError(
        f"report.scan names '{found}', which holds no scan: there is no scan.json in it",
        hint="give the folder that `usae-probe scan` wrote to",
    )


def content_hash(path: Path) -> str | None:
    """Hash a file's bytes, once per state of the file; None where there is none."""
    if not path.is_file():
        return None
    state = path.stat()
    return _hashed(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _hashed(path: Path, *_: int) -> str:
    return sha256(path)  # asked for several times in a run: once per state of the file


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
