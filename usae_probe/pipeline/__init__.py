"""The stages of a run in a run folder: harvest → train → evaluate → cam, each redone only when it must be."""

from __future__ import annotations

from .buffers import help_harvest
from .cell import CellResult
from .grid import Combination, parsed_settings
from .outcomes import Progress, RunResult, StageResult
from .record import RunRecord
from .run import Run
from .scan import Scan, ScanPlan, ScanResult
from .stages import MEASURING, STAGES, Stage
from .sweep import Sweep, SweepProgress, SweepResult
from .training import help_train

__all__ = [
    "MEASURING",
    "STAGES",
    "CellResult",
    "Combination",
    "Progress",
    "Run",
    "RunRecord",
    "RunResult",
    "Scan",
    "ScanPlan",
    "ScanResult",
    "Stage",
    "StageResult",
    "Sweep",
    "SweepProgress",
    "SweepResult",
    "help_harvest",
    "help_train",
    "parsed_settings",
]
