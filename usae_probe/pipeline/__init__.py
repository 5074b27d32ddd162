"""The stages of a run in a run folder: harvest → train → evaluate → cam, each redone only when it must be."""

from __future__ import annotations

from .record import RunRecord, peak_memory
from .run import Progress, Run, RunResult, StageResult
from .stages import MEASURING, STAGES, Stage

__all__ = [
    "MEASURING",
    "STAGES",
    "Progress",
    "Run",
    "RunRecord",
    "RunResult",
    "Stage",
    "StageResult",
    "peak_memory",
]
