"""Rows of a split by number, whatever shards they lie in."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import BufferIntegrityError
from ..split import SPLITS
from .manifest import ShardEntry
from .shard import ShardMap
from .spec import IMAGE_INDEX, MOMENTS, STORED, TOKEN_INDEX

Verify = Literal["first", "always", "never"]
Columns = Mapping[str, np.dtype | None]
"""Which columns, each in which dtype; None for the one that it is stored in."""

# Python's mmap keeps a file descriptor per map, and a process has 1,024 of them by default.
_MAPPED = 256


class _Piece(NamedTuple):
    """Rows of one shard: which of the sorted rows they are, from `first` to `last`, and their places in the shard."""

    entry: ShardEntry
    first: int
    last: int
    rows: np.ndarray


class ColumnReader:
    """Reads columns (a site's key, `image_index` or `token_index`) of sealed shards.

    Maps are opened when first needed. Several threads may read. Nothing of it survives pickling but what it was made
    from, and no handle is open that a fork could share.

    Args:
        folder: the buffer's folder.
        identity: of the buffer.
        entries: the shards, in the order of the plan.
        verify: check the CRC32 of a dataset when it is first read, always or never.
        whole: load a split's column into memory when rows of it are first gathered.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], entries: Iterable[ShardEntry], *, verify: Verify, whole: bool
    ) -> None:
        self._folder, self._verify = folder, verify
        self.layout = layout_of(identity)
        self._whole_columns = whole and verify != "always"  # memory is not read again
        self._maps: dict[str, ShardMap] = {}
        self._mapped: dict[str, None] = {}  # the shards that may hold a file descriptor, in the order of opening
        self._views: dict[tuple[str, str], np.ndarray] = {}  # of those, what has been looked at
        self._verified: set[tuple[str, str]] = set()
        self._loaded: dict[tuple[str, str], np.ndarray] = {}
        self._lock, self._pid = threading.RLock(), os.getpid()
        self.use(entries)

    def use(self, entries: Iterable[ShardEntry]) -> None:
        """Read these shards from now on; rows keep their numbers as long as shards are only added at the end."""
        self._entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        for entry in entries:
            self._entries[entry.split].append(entry)
            if entry.dropped:
                self._forget(entry.file)
                self._maps.pop(entry.file, None)
        # Per split: the row at which each shard begins, with the row count as last entry.
        self.begins = {
            split: np.cumsum([0, *(entry.rows for entry in of_split)]) for split, of_split in self._entries.items()
        }

    def n_rows(self, split: str) -> int:
        """Rows of a split."""
        return int(self.begins[split][-1])

    def slice(self, split: str, column: str, start: int, stop: int, dtype: np.dtype | None = None) -> np.ndarray:
        """Rows `start` to `stop` (exclusive) in storage order, as a copy, in `dtype` or as stored."""
        begins = self.begins[split]
        first, last = (int(np.searchsorted(begins, row, side="right")) - 1 for row in (start, max(start, stop - 1)))
        if first == last and start < stop:
            within = self._column(self._entries[split][first], column)[start - begins[first] : stop - begins[first]]
            return within.astype(dtype or within.dtype)
        out = self._empty(column, stop - start, dtype)
        for shard in range(first, min(last + 1, len(self._entries[split]))):
            begin, end = max(start, begins[shard]), min(stop, begins[shard + 1])
            if begin < end:
                values = self._column(self._entries[split][shard], column)
                out[begin - start : end - start] = values[begin - begins[shard] : end - begins[shard]]
        return out

    def take(self, split: str, columns: Columns, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The given rows of some columns, in the order given, as copies."""
        if self._whole_columns:
            return {
                column: self._whole(split, column)[rows].astype(dtype or self.layout[column][0], copy=False)
                for column, dtype in columns.items()
            }
        order = None if (rows[:-1] <= rows[1:]).all() else np.argsort(rows, kind="stable")
        pieces = self._pieces(split, rows if order is None else rows[order])
        taken = {}
        for column, dtype in columns.items():
            in_order = self._empty(column, len(rows), None)
            for entry, first, last, in_shard in pieces:
                # clip: the rows are known to be there, and numpy then writes straight to where they belong
                np.take(self._column(entry, column), in_shard, axis=0, out=in_order[first:last], mode="clip")
            if order is None:
                taken[column] = in_order.astype(dtype or in_order.dtype, copy=False)
            else:
                taken[column] = self._empty(column, len(rows), dtype)
                taken[column][order] = in_order
        return taken

    def _pieces(self, split: str, rows: np.ndarray) -> list[_Piece]:
        """Return which of some rows, which are sorted, are in which shard."""
        begins = self.begins[split]
        shards = np.searchsorted(begins, rows, side="right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        return [
            _Piece(self._entries[split][shards[first]], first, last, rows[first:last] - begins[shards[first]])
            for first, last in itertools.pairwise(cuts)
            if first < last
        ]

    def _whole(self, split: str, column: str) -> np.ndarray:
        with self._alone():
            if (split, column) not in self._loaded:
                self._loaded[split, column] = self.slice(split, column, 0, self.n_rows(split))
            return self._loaded[split, column]

    def _column(self, entry: ShardEntry, column: str) -> np.ndarray:
        known = self._views.get((entry.file, column))
        if known is not None and self._verify != "always":
            return known
        with self._alone():
            values = self._map(entry).column(column, *self.layout[column])
            if self._verify == "always" or (self._verify == "first" and (entry.file, column) not in self._verified):
                self._maps[entry.file].demand_intact(column, values)
                self._verified.add((entry.file, column))
            self._views[entry.file, column] = values
            return values

    def _alone(self) -> threading.RLock:
        """Return the lock; in a fork a new one: no thread is there that could give the old one back."""
        if self._pid != os.getpid():
            self._lock, self._pid = threading.RLock(), os.getpid()
        return self._lock

    def _map(self, entry: ShardEntry) -> ShardMap:
        """Return the map of a shard; of too many, the one that was opened first is closed."""
        if entry.file not in self._maps:
            self._maps[entry.file] = ShardMap(self._folder, entry)
        if entry.file not in self._mapped:
            self._mapped[entry.file] = None
            if len(self._mapped) > _MAPPED:
                self._forget(next(iter(self._mapped)))
        return self._maps[entry.file]

    def _forget(self, file: str) -> None:
        self._mapped.pop(file, None)
        for column in self.layout:
            self._views.pop((file, column), None)
        if file in self._maps:
            self._maps[file].close()

    def _empty(self, column: str, n: int, dtype: np.dtype | None) -> np.ndarray:
        stored, width = self.layout[column]
        return np.empty((n, *width), dtype or stored)

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled as a copy of the whole file.
        return self.__dict__ | {"_maps": {}, "_mapped": {}, "_views": {}, "_loaded": {}, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state | {"_lock": threading.RLock(), "_pid": os.getpid()})


def layout_of(identity: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and width of every column of a buffer."""
    dtype = STORED[identity["dtype"]]
    layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        site: (dtype, (identity["sites"][site]["d_in"],)) for site in identity["site_order"]
    }
    return layout | {IMAGE_INDEX: (np.dtype("<i8"), ()), TOKEN_INDEX: (np.dtype("<i4"), ())}


def problems(folder: Path, identity: Mapping[str, Any], entries: Iterable[ShardEntry]) -> Iterator[tuple[str, str]]:
    """Read every dataset of every shard; yield for each shard its file and what is wrong with it, or nothing."""
    layout = layout_of(identity)
    for entry in entries:
        wrong = []
        try:
            mapped = ShardMap(folder, entry)
            for column in entry.crc:
                site = column.removeprefix(MOMENTS)
                try:
                    if column == site:
                        values = mapped.column(column, *layout[column])
                    else:
                        values = mapped.column(column, np.dtype("<f8"), layout[site][1], rows=2)
                    mapped.demand_intact(column, values)
                except BufferIntegrityError as error:
                    wrong.append(error.message)
        except BufferIntegrityError as error:
            wrong.append(error.message)
        yield entry.file, "; ".join(wrong)
