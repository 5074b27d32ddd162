"""What a run says: how far a stage is, what became of it, and of them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..probes import UniversalityReport
from ..usae import Matrix
from .stages import Stage


class Progress(NamedTuple):
    """How far a stage is: `done` of `total` in `unit`s, and what else is worth a glance; R² where it was measured."""

    stage: Stage
    done: int
    total: int
    unit: str
    note: str = ""
    r2: Matrix | None = None


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        stage: its name.
        kept: it was finished before and its config keys are the same.
        seconds: how long it took when it ran.
        why: why it was redone although it was finished before; empty otherwise.
        note: what is worth saying about its end: early stopping, which kernel trained; empty otherwise.
    """

    stage: Stage
    kept: bool
    seconds: float
    why: str = ""
    note: str = ""


class StageEnd(NamedTuple):
    """What a stage says at its end, in words and for the record."""

    note: str = ""
    about: Mapping[str, Any] = {}


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    Attributes:
        folder: the run folder.
        stages: what became of each stage asked for.
        metrics: the content of `metrics.json`, once evaluated.
        cam: the content of `cam/cam.json`, once pictures were made.
        report: the report, when it was made by this call.
    """

    folder: Path
    stages: list[StageResult]
    metrics: dict[str, Any] | None
    cam: dict[str, Any] | None = None
    report: UniversalityReport | None = None
