"""Row-paired activations of several sites on disk: sealed HDF5 shards plus a manifest. Imports no torch."""

from .manifest import Skipped
from .moments import Moments
from .open_shard import OpenShard
from .spec import BufferSpec, ShardPlan, SiteSpec, StoredDtype
from .store import ActivationBuffer, Rows
from .writer import BufferWriter

__all__ = [
    "ActivationBuffer",
    "BufferSpec",
    "BufferWriter",
    "Moments",
    "OpenShard",
    "Rows",
    "ShardPlan",
    "SiteSpec",
    "Skipped",
    "StoredDtype",
]
