"""The config of a run: one frozen pydantic model per TOML table, unknown keys refused with the nearest known key."""

from .cam import CamConfig, CamMode
from .checks import checked, settled
from .run import RunConfig, default_of, documented_keys
from .tables import (
    BufferConfig,
    ImagesConfig,
    ModelConfig,
    ProbesConfig,
    TrainConfig,
    UsaeConfig,
)

__all__ = [
    "BufferConfig",
    "CamConfig",
    "CamMode",
    "ImagesConfig",
    "ModelConfig",
    "ProbesConfig",
    "RunConfig",
    "TrainConfig",
    "UsaeConfig",
    "checked",
    "default_of",
    "documented_keys",
    "settled",
]
