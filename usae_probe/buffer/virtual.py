"""The whole buffer as one HDF5 file, for any tool that reads HDF5: virtual datasets over the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..files import replacing
from ..split import SPLITS
from .manifest import Manifest, ShardEntry
from .shard import FORMAT
from .spec import IMAGE_INDEX, STORED, TOKEN_INDEX, dataset_name

VIRTUAL = "buffer.h5"


def write_virtual(folder: Path, manifest: Manifest) -> None:
    """Write `buffer.h5`: per split a group with one dataset per site and `image_index`, `token_index`.

    It holds no rows, only which rows of which shard come where, by file names relative to the folder: it stays right
    when the folder is moved. Rows of a shard that is missing read as NaN, and as −1 in the indices. (Open it by a path:
    HDF5 looks for a missing shard in the working directory too, where there should not be another buffer's.)
    """
    dtype = STORED[manifest.identity["dtype"]]
    columns: dict[str, tuple[np.dtype, tuple[int, ...], Any]] = {
        site: (dtype, (manifest.identity["sites"][site]["d_in"],), np.nan) for site in manifest.identity["site_order"]
    }
    columns |= {IMAGE_INDEX: (np.dtype("<i8"), (), -1), TOKEN_INDEX: (np.dtype("<i4"), (), -1)}
    with replacing(folder / VIRTUAL) as temporary, h5py.File(temporary, "w", **FORMAT) as file:
        for split in SPLITS:
            entries = [entry for entry in manifest.present if entry.split == split]
            group = file.create_group(split)
            for column, (kind, width, fill) in columns.items():
                _create(group, dataset_name(column), entries, kind, width, fill)
                group[dataset_name(column)].attrs["column"] = column


def _create(
    group: h5py.Group, name: str, entries: list[ShardEntry], dtype: np.dtype, width: tuple[int, ...], fill: Any
) -> None:
    """Create a virtual dataset without the times that h5py's own way writes: equal buffers give equal bytes."""
    space = h5py.h5s.create_simple((sum(entry.rows for entry in entries), *width))
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_obj_track_times(False)
    how.set_fill_value(np.array([fill], dtype))
    begin = 0
    for entry in entries:
        if entry.rows:
            shape = (entry.rows, *width)
            space.select_hyperslab((begin, *(0 for _ in width)), shape)
            how.set_virtual(space, entry.file.encode(), name.encode(), h5py.h5s.create_simple(shape))
            begin += entry.rows
    space.select_all()
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.py_create(dtype, logical=True), space, how)
