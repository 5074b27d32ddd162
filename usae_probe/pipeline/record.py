"""`run.json`: the config of a run, and of each finished stage what it depended on, its time and its result's hash."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import RunConfig, default_of
from ..errors import CheckpointError, StageError, UsageError
from ..files import sha256, write_json
from ..machine import peak_memory, versions
from .stages import RESULTS, Stage, content_hash, depends_on

SCHEMA = 1
_OF_ALL_STAGES = ("seconds", "peak_memory_bytes", "depends_on")


class RunRecord:
    """The record of a run folder, as far as it goes.

    Args:
        folder: the run folder; without a `run.json` nothing is finished.

    Raises:
        CheckpointError: when `run.json` is damaged.
        StageError: when a newer version wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data = _read(folder / "run.json")

    def finished(self, stage: Stage) -> bool:
        """Say whether a stage has been finished at some time."""
        return stage in self._data["stages"]

    def changed(self, stage: Stage, config: RunConfig) -> list[str]:
        """Return the keys that differ from those a finished stage was done with.

        A run from before a key was there was done with its default.
        """
        return sorted(self._differing(stage, config))

    def changes(self, stage: Stage, config: RunConfig) -> list[str]:
        """Return those keys with both values: what the stage was done with, and what the config says now."""
        differing = self._differing(stage, config)
        return [f"{key}: {then} then, {now} now" for key, (then, now) in sorted(differing.items())]

    def _differing(self, stage: Stage, config: RunConfig) -> dict[str, tuple[Any, Any]]:
        before = self._data["stages"].get(stage, {}).get("depends_on", {})
        now = depends_on(stage, config, self._data["results"], self.folder.resolve())
        then = {key: default_of(key) for key in now.keys() - before.keys()} | before if before else {}
        every = then if before else now
        return {key: (then.get(key), now.get(key)) for key in every if not before or then[key] != now.get(key)}

    def finish(self, stage: Stage, config: RunConfig, seconds: float, about: Mapping[str, Any] | None = None) -> None:
        """Write down that a stage is finished; `about` is what else is worth keeping, on which nothing depends."""
        self._data["config"] = json.loads(config.model_dump_json())
        self._data["base"] = _spell(config.base, self.folder)
        self._data["versions"] = versions()
        self._data["stages"][stage] = {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(),
            **(about or {}),
            "depends_on": depends_on(stage, config, self._data["results"], self.folder.resolve()),
        }
        self._data["results"][stage] = sha256(self.folder / RESULTS[stage][0])
        write_json(self.folder / "run.json", self._data)

    def adopt(self, stage: Stage, result: str) -> None:
        """Take the result of a stage that was done in another folder, by its hash, for what later stages work on."""
        self._data["results"][stage] = result

    def intact(self, stage: Stage) -> bool:
        """Say whether the file that stands for a finished stage's result is the one that was written."""
        return bool(self._data["results"].get(stage) == content_hash(self.folder / RESULTS[stage][0]))

    def seconds(self, stage: Stage) -> float:
        """Return how long a finished stage took."""
        return float(self._data["stages"][stage]["seconds"])

    def about(self, stage: Stage) -> dict[str, Any]:
        """Return what `finish` was told about a finished stage."""
        return {key: value for key, value in self._data["stages"][stage].items() if key not in _OF_ALL_STAGES}

    @property
    def data(self) -> Mapping[str, Any]:
        """The content of `run.json`, as it is written after each stage."""
        return self._data

    def config(self) -> RunConfig:
        """Return the config of the run.

        Raises:
            UsageError: when the folder holds no run.
        """
        if not self._data["stages"]:
            found = "no such folder"
            if self.folder.exists():
                found = "no run.json in it" if self.folder.is_dir() else "it is a file"
            raise UsageError(
                f"'{self.folder}' is no run folder: {found}",
                hint="give the folder that `usae-probe run` or `usae-probe demo` wrote to",
            )
        base = (self.folder / self._data.get("base", ".")).resolve()
        return RunConfig.from_dict(self._data["config"], base=base)


def _spell(base: Path, folder: Path) -> str:
    """Spell the folder of relative paths: relative where the two lie in one another, so that they can move together."""
    base, folder = base.resolve(), folder.resolve()
    together = base.is_relative_to(folder) or folder.is_relative_to(base)
    return os.path.relpath(base, folder) if together else str(base)


def _read(path: Path) -> dict[str, Any]:
    fresh: dict[str, Any] = {"schema": SCHEMA, "config": {}, "versions": {}, "stages": {}, "results": {}}
    if not path.exists():
        return fresh
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise StageError(
                f"'{path}' has schema {record['schema']}, this version reads {SCHEMA}", hint="update usae-probe"
            )
        return {**fresh, **record, "stages": dict(record["stages"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is damaged: {error}", hint="restore it, or remove it to do all stages again"
        ) from error
