"""The config of a run: one frozen pydantic model per TOML table, unknown keys refused with the nearest known key."""

from .cam import CamConfig, CamMode
from .checks import checked, settled
from .report import ReportConfig
from .run import RunConfig, default_of, documented_keys
from .scan import ScanConfig, ScanStrategy
from .tables import (
    DEFAULT_EPOCHS,
    BufferConfig,
    ImagesConfig,
    ModelConfig,
    ProbesConfig,
    TrainConfig,
    UsaeConfig,
)

__all__ = [
    "DEFAULT_EPOCHS",
    "BufferConfig",
    "CamConfig",
    "CamMode",
    "ImagesConfig",
    "ModelConfig",
    "ProbesConfig",
    "ReportConfig",
    "RunConfig",
    "ScanConfig",
    "ScanStrategy",
    "TrainConfig",
    "UsaeConfig",
    "checked",
    "default_of",
    "documented_keys",
    "settled",
]
