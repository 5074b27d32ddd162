"""Row-paired activations of several sites on disk: sealed HDF5 shards plus a manifest. Imports no torch."""

from .joined import JoinedBuffer
from .manifest import SCHEMA, Skipped
from .moments import Moments
from .online import OnlineBuffer, OnlinePlan
from .open_shard import OpenShard
from .reader import Verify
from .ring import Ring
from .rows import BatchDataset, Rows
from .spec import BufferSpec, ShardPlan, SiteSpec, StoredDtype, as_json
from .store import ActivationBuffer
from .writer import BufferWriter, discard_buffer

__all__ = [
    "SCHEMA",
    "ActivationBuffer",
    "BatchDataset",
    "BufferSpec",
    "BufferWriter",
    "JoinedBuffer",
    "Moments",
    "OnlineBuffer",
    "OnlinePlan",
    "OpenShard",
    "Ring",
    "Rows",
    "ShardPlan",
    "SiteSpec",
    "Skipped",
    "StoredDtype",
    "Verify",
    "as_json",
    "discard_buffer",
]
