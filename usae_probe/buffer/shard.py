"""Shard files: contiguous HDF5 datasets, written whole and read as memory maps."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np

from ..errors import BufferIntegrityError
from .manifest import ShardEntry
from .moments import Moments
from .spec import MOMENTS, dataset_name

# Fixed format bounds, no time stamps and one alignment: the same rows give the same bytes, whoever writes them and
# when. v110 also puts checksums on HDF5's own structures, so that damage there is an error as well.
FORMAT = {"libver": ("v110", "v110"), "alignment_threshold": 1, "alignment_interval": 64}
RESTORE = "restore the file from a copy, or delete the buffer and harvest again"


def write_shard(path: Path, columns: Iterable[tuple[str, np.ndarray]]) -> dict[str, int]:
    """Write one contiguous dataset per column; return the CRC32 of each dataset's bytes, by column.

    `columns` is consumed lazily, so that only one column need be in memory at a time.
    """
    crc = {}
    with h5py.File(path, "w", **FORMAT) as file:
        for column, values in columns:
            file.create_dataset(dataset_name(column), data=values, track_times=False)
            crc[column] = checksum(values)
    return crc


def checksum(values: np.ndarray) -> int:
    """CRC32 of an array's bytes in row-major order."""
    return zlib.crc32(np.ascontiguousarray(values).data)


def demand_present(folder: Path, entry: ShardEntry) -> None:
    """Check that a sealed shard's file is there, in the folder itself, and as long as it was.

    Raises:
        BufferIntegrityError: when it is missing, a link to somewhere else, or of another size.
    """
    path = folder / entry.file
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise BufferIntegrityError(
            f"shard {path} is a link out of the buffer, to {path.resolve()}",
            hint="put the file itself there, or link the whole folder",
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, list(entry.crc), f"the file is missing or unreadable ({error.strerror})") from error
    if size != entry.size:
        raise _damaged(path, list(entry.crc), f"the file has {size} bytes where the manifest says {entry.size}")


class ShardMap:
    """A sealed shard's datasets as read-only memory maps; no HDF5 handle stays open, so a fork is harmless.

    Args:
        folder: the buffer's folder.
        entry: the shard's entry in the manifest.

    Raises:
        BufferIntegrityError: when the file is missing, or its size or structure is not what the manifest says.
    """

    def __init__(self, folder: Path, entry: ShardEntry) -> None:
        demand_present(folder, entry)
        self._path = folder / entry.file
        self._entry = entry
        self._places = self._read_places()
        self._bytes: np.ndarray | None = None

    def _read_places(self) -> dict[str, tuple[int | None, tuple[int, ...], np.dtype]]:
        columns = list(self._entry.crc)
        try:
            # No lock: sealed files never change, and some network file systems have none.
            with h5py.File(self._path, "r", locking=False) as file:
                datasets = {column: file[dataset_name(column)] for column in columns}
                return {column: (data.id.get_offset(), data.shape, data.dtype) for column, data in datasets.items()}
        # A damaged structure makes h5py raise any of these, depending on where the damage is.
        except (OSError, KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise _damaged(self._path, columns, f"HDF5 cannot read it ({error})") from error

    def close(self) -> None:
        """Let go of the map and the file descriptor that comes with it; the next read maps the file again."""
        self._bytes = None

    def column(self, column: str, dtype: np.dtype, width: tuple[int, ...], *, rows: int | None = None) -> np.ndarray:
        """The dataset of `column`, [rows, *width], without a copy; by default as many rows as the shard has.

        Raises:
            BufferIntegrityError: when its place in the file, shape or dtype is not what the manifest says.
        """
        if self._bytes is None:
            demand_present(self._path.parent, self._entry)  # a map beyond a file's end would kill the process
            self._bytes = np.memmap(self._path, dtype=np.uint8, mode="r").view(np.ndarray)
        offset, shape, stored = self._places[column]
        expected = (self._entry.rows if rows is None else rows, *width)
        size = dtype.itemsize * int(np.prod(expected))
        begin = offset or 0
        misplaced = begin + size > len(self._bytes) or (offset is None and size > 0)  # HDF5 gives no place to no bytes
        if misplaced or shape != expected or stored != dtype:
            found = f"{stored} {list(shape)} at byte {offset} of {len(self._bytes)}"
            raise _damaged(self._path, [column], f"it is {found} where the manifest says {dtype} {list(expected)}")
        view: np.ndarray = self._bytes[begin : begin + size].view(dtype).reshape(expected)
        return view

    def demand_intact(self, column: str, values: np.ndarray) -> None:
        """Check the bytes of `column` against the manifest.

        Raises:
            BufferIntegrityError: when they give another CRC32.
        """
        found, expected = checksum(values), self._entry.crc[column]
        if found != expected:
            raise _damaged(self._path, [column], f"its CRC32 is {found:08x} where the manifest says {expected:08x}")


def merged_moments(folder: Path, entries: Iterable[ShardEntry], d_in: Mapping[str, int]) -> dict[str, Moments]:
    """Merge the moments that training shards hold, by site, in the order of the plan.

    So the last bits do not depend on who wrote the shards, or when.

    Raises:
        BufferIntegrityError: when a shard is missing or damaged.
    """
    total = {site: Moments(d) for site, d in d_in.items()}
    for entry in sorted(entries, key=lambda entry: entry.index):
        if entry.split == "train":
            mapped = ShardMap(folder, entry)
            for site, so_far in total.items():
                values = mapped.column(MOMENTS + site, np.dtype("<f8"), (so_far.d,), rows=2)
                mapped.demand_intact(MOMENTS + site, values)
                so_far.merge(Moments.of(entry.rows, *values))
    return total


def _damaged(path: Path, columns: list[str], why: str) -> BufferIntegrityError:
    return BufferIntegrityError(f"shard {path} is damaged ({', '.join(columns)}): {why}", hint=RESTORE)
