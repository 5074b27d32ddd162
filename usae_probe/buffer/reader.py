"""Rows of a split by number, whatever shards they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import BufferIntegrityError
from ..split import SPLITS
from .manifest import Manifest
from .shard import ShardMap
from .spec import IMAGE_INDEX, STORED, TOKEN_INDEX

Verify = Literal["first", "always", "never"]

# Python's mmap keeps a file descriptor per map, and a process has 1,024 of them by default.
_MAPPED = 256


class ColumnReader:
    """Reads columns (a site's key, `image_index` or `token_index`) of sealed shards, in the dtype they are stored in.

    Maps are opened when first needed. Nothing of it survives pickling but what it was made from.

    Args:
        folder: the buffer's folder.
        manifest: what it holds.
        verify: check the CRC32 of a dataset when it is first read, always or never.
        memory_budget: bytes of the buffer up to which a split's column is loaded whole when rows of it are first
            gathered.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, verify: Verify, memory_budget: int) -> None:
        self._folder, self._manifest, self._verify = folder, manifest, verify
        dtype = STORED[manifest.identity["dtype"]]
        self._layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            site: (dtype, (values["d_in"],)) for site, values in manifest.identity["sites"].items()
        }
        self._layout |= {IMAGE_INDEX: (np.dtype("<i8"), ()), TOKEN_INDEX: (np.dtype("<i4"), ())}
        # Per split: the numbers of its shards, and the row at which each begins, with the row count as last entry.
        self._shards: dict[str, list[int]] = {}
        self._begins: dict[str, np.ndarray] = {}
        for split in SPLITS:
            numbers = [number for number, entry in enumerate(manifest.shards) if entry.split == split]
            self._shards[split] = numbers
            self._begins[split] = np.cumsum([0, *(manifest.shards[number].rows for number in numbers)])
        self._in_memory = self.nbytes <= memory_budget and verify != "always"  # memory is not read again
        self._maps: dict[int, ShardMap] = {}
        self._mapped: dict[int, None] = {}  # the shards that may hold a file descriptor, the one used last at the end
        self._verified: set[tuple[int, str]] = set()
        self._loaded: dict[tuple[str, str], np.ndarray] = {}

    def n_rows(self, split: str) -> int:
        """Rows of a split."""
        return int(self._begins[split][-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows of all columns."""
        per_row = sum(dtype.itemsize * int(np.prod(width)) for dtype, width in self._layout.values())
        return per_row * sum(entry.rows for entry in self._manifest.shards)

    def slice(self, split: str, column: str, start: int, stop: int, dtype: np.dtype | None = None) -> np.ndarray:
        """Rows `start` to `stop` (exclusive) in storage order, as a copy, in `dtype` or as stored."""
        out = self._empty(column, stop - start, dtype)
        begins = self._begins[split]
        for shard, begin, end in zip(self._shards[split], begins[:-1], begins[1:], strict=True):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                out[first - start : last - start] = self._map(shard, column)[first - begin : last - begin]
        return out

    def take(self, split: str, column: str, rows: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """The given rows, in the order given, as a copy, in `dtype` or as stored."""
        if self._in_memory:
            taken: np.ndarray = self._whole(split, column)[rows]
            return taken if dtype is None else taken.astype(dtype, copy=False)
        out = self._empty(column, len(rows), dtype)
        order = np.argsort(rows, kind="stable")  # shard by shard, and forward through each file
        wanted = rows[order]
        begins = self._begins[split]
        cuts = np.searchsorted(wanted, begins)
        for shard, begin, first, last in zip(self._shards[split], begins[:-1], cuts[:-1], cuts[1:], strict=True):
            if first < last:
                out[order[first:last]] = self._map(shard, column)[wanted[first:last] - begin]
        return out

    def problems(self) -> Iterator[str]:
        """Read every dataset of every shard; say what is wrong with each that is damaged."""
        for entry in self._manifest.shards:
            try:
                mapped = ShardMap(self._folder, entry)
            except BufferIntegrityError as error:
                yield error.message
                continue
            for column, layout in self._layout.items():
                try:
                    mapped.demand_intact(column, mapped.column(column, *layout))
                except BufferIntegrityError as error:
                    yield error.message

    def _whole(self, split: str, column: str) -> np.ndarray:
        if (split, column) not in self._loaded:
            self._loaded[split, column] = self.slice(split, column, 0, self.n_rows(split))
        return self._loaded[split, column]

    def _map(self, shard: int, column: str) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = ShardMap(self._folder, self._manifest.shards[shard])
        self._mapped.pop(shard, None)
        self._mapped[shard] = None
        if len(self._mapped) > _MAPPED:
            oldest = next(iter(self._mapped))
            del self._mapped[oldest]
            self._maps[oldest].close()
        values = self._maps[shard].column(column, *self._layout[column])
        if self._verify == "always" or (self._verify == "first" and (shard, column) not in self._verified):
            self._maps[shard].demand_intact(column, values)
            self._verified.add((shard, column))
        return values

    def _empty(self, column: str, n: int, dtype: np.dtype | None) -> np.ndarray:
        stored, width = self._layout[column]
        return np.empty((n, *width), dtype or stored)

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled as a copy of the whole file.
        return self.__dict__ | {"_maps": {}, "_mapped": {}, "_loaded": {}}
