"""Columns of several buffers of the same images, as if they had been harvested together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import BufferMismatchError, SiteError, UsaeProbeWarning, UsageError, nearest
from ..files import json_sha256
from ..split import SPLITS, SplitName
from .manifest import Skipped
from .online import OnlineBuffer
from .rows import Rows
from .spec import STORED, SiteSpec, as_json
from .store import ActivationBuffer

_BLOCK = 2**20  # rows whose images are compared at a time
_INDEX_BYTES = 12


class _Origin(NamedTuple):
    """Where a column of the view lies."""

    buffer: ActivationBuffer
    site: str


class JoinedBuffer(ActivationBuffer):
    """A read-only view of columns of one or several buffers, under names of its own; nothing is copied.

    It can be trained on and evaluated as any buffer. Batches are those of the first column's buffer: rows are in its
    order, mixed in its pool. Every column keeps the moments, the dtype and the checks of the buffer that it lies in.

    Args:
        columns: by site as it is called here, the buffer and the site as it is called there.

    Attributes:
        path: of the first column's buffer.
        specs: by site, in the order given, under the names here.
        complete: all of the buffers are.

    Raises:
        SiteError: for a column that its buffer does not have, a name that is no site, or columns that do not give the
            same number of rows per image (with `@patch`: at the same places).
        BufferMismatchError: when the buffers' rows are not of the same images and tokens in the same order.
        UsageError: for a buffer that is still being filled by a harvest that goes along.

    Example:
        `JoinedBuffer({"vit/blocks.10": (buffer, "vit/blocks.10"), "again/blocks.10": (buffer, "vit/blocks.10")})`
    """

    def __init__(self, columns: Mapping[str, tuple[ActivationBuffer, str]]) -> None:
        if not columns:
            raise SiteError("a joined buffer needs at least one column and was given none")
        self._first = _rows_like(next(iter(columns.values()))[0])
        self._origins = {site: _origin(site, *column) for site, column in columns.items()}
        self.specs = {site: _renamed(site, origin) for site, origin in self._origins.items()}
        _check_specs(self.specs)
        self._buffers = list({id(b): b for b in (self._first, *(o.buffer for o in self._origins.values()))}.values())
        for buffer in self._buffers[1:]:
            _check_rows(self._first, buffer)
        self.path = self._first.path
        self.complete = all(buffer.complete for buffer in self._buffers)
        moments = {site: origin.buffer.moments(origin.site) for site, origin in self._origins.items()}
        self._manifest = replace(self._first._manifest, identity=self._identity(), moments=moments)

    def _identity(self) -> dict[str, Any]:
        """As `BufferSpec.identity()`, and where every column comes from: digests of the buffers' own identities."""
        digests = {id(buffer): json_sha256(buffer.identity) for buffer in self._buffers}
        dtypes: list[str] = [origin.buffer.dtype for origin in self._origins.values()]
        identity = self._first.identity | {
            "sites": {site: spec.to_identity() for site, spec in self.specs.items()},
            "site_order": list(self.specs),
            "dtype": max(dtypes, key=lambda dtype: STORED[dtype].itemsize),
            "joined": {
                "rows": digests[id(self._first)],
                "columns": {site: [digests[id(o.buffer)], o.site] for site, o in self._origins.items()},
            },
        }
        return as_json(identity, "the identity of the joined buffer")

    @property
    def skipped(self) -> list[Skipped]:
        """Images without rows, and why; each once."""
        return list({image.index: image for buffer in self._buffers for image in buffer.skipped}.values())

    @property
    def _row_bytes(self) -> int:
        stored = (STORED[o.buffer.dtype].itemsize * self.d_in[site] for site, o in self._origins.items())
        return sum(stored) + _INDEX_BYTES

    def pool(self, split: str = "train") -> int | None:
        """Shards among which `batches` mixes rows, as in the first column's buffer."""
        return self._first.pool(split)

    def n_rows(self, split: str) -> int:
        """Rows of `split` ("train", "validation" or "holdout")."""
        return self._first.n_rows(split)

    def numbers(self, split: str, batch_size: int, seed: int, start_step: int) -> Iterator[np.ndarray]:
        """The rows of `batches`, by their numbers within the split."""
        return self._first.numbers(split, batch_size, seed, start_step)

    def gather(self, split: str, rows: np.ndarray, sites: Sequence[str] | None = None) -> Rows:
        """The given rows of a split, in the order given; see `ActivationBuffer.gather`."""
        return self._read(self._known_sites(sites), lambda buffer, columns: buffer.gather(split, rows, columns))

    def demand_present(self) -> None:
        """Check that every sealed shard of all buffers is there and as long as it was.

        Raises:
            BufferIntegrityError: naming the first that is not.
        """
        for buffer in self._buffers:
            buffer.demand_present()

    def demand_all_rows(self) -> None:
        """Check that no training rows were dropped.

        Raises:
            StageError: when one of the buffers is what a ring left.
        """
        for buffer in self._buffers:
            buffer.demand_all_rows()

    def verify(self, progress: Callable[[str], None] | None = None) -> list[str]:
        """Read every dataset of every shard of all buffers, also of columns that are not in the view."""
        return [what for buffer in self._buffers for what in buffer.verify(progress)]

    def _slice(self, split: str, sites: list[str], start: int, stop: int) -> Rows:
        return self._read(sites, lambda buffer, columns: buffer._slice(split, columns, start, stop))

    def _read(self, sites: Sequence[str], read: Callable[[ActivationBuffer, list[str]], Rows]) -> Rows:
        """Read the columns of some sites where they lie, each column once."""
        values: dict[str, np.ndarray] = {}
        index = None
        for buffer in self._buffers:
            mine = {site: self._origins[site].site for site in sites if self._origins[site].buffer is buffer}
            if not mine and (sites or buffer is not self._first):
                continue
            rows = read(buffer, list(dict.fromkeys(mine.values())))
            index = index or rows[1:]
            left = dict(rows.values)
            for site, column in mine.items():  # a column under two names is given twice: rows are free to be changed
                values[site] = left.pop(column) if column in left else rows.values[column].copy()
        return Rows({site: values[site] for site in sites}, *(index or ()))

    def __repr__(self) -> str:
        columns = (f"{site}: {origin.buffer.path} {origin.site}" for site, origin in self._origins.items())
        rows = " + ".join(f"{self.n_rows(split)} {split}" for split in SPLITS)
        return f"JoinedBuffer({', '.join(columns)}; {rows} rows; {'complete' if self.complete else 'incomplete'})"


def _rows_like(buffer: ActivationBuffer) -> ActivationBuffer:
    """Return the buffer whose rows a buffer's are, in its order."""
    if isinstance(buffer, OnlineBuffer):
        raise UsageError(f"{buffer.path} is still being filled by a harvest", hint="open it again once it is complete")
    return buffer._first if isinstance(buffer, JoinedBuffer) else buffer


def _origin(site: str, buffer: ActivationBuffer, column: str) -> _Origin:
    """Return where a column lies: also for a view of a view, in no view."""
    if column not in buffer.specs:
        hint = nearest(column, buffer.specs) or f"it has {', '.join(buffer.specs)}"
        raise SiteError(f"'{site}' is to be '{column}' of the buffer {buffer.path}, which has no such site", hint=hint)
    return buffer._origins[column] if isinstance(buffer, JoinedBuffer) else _Origin(_rows_like(buffer), column)


def _renamed(site: str, origin: _Origin) -> SiteSpec:
    return replace(origin.buffer.specs[origin.site], site=site, model=site.partition("/")[0])


def _check_specs(specs: Mapping[str, SiteSpec]) -> None:
    """Check that rows can pair up.

    Raises:
        SiteError: when images give different numbers of rows, or patches of different grids.
    """
    for one, other in pairwise(specs.values()):
        if one.rows_per_image != other.rows_per_image:
            raise SiteError(
                f"columns of one buffer must give the same number of rows per image, not {one.site}: "
                f"{one.rows_per_image}, {other.site}: {other.rows_per_image}",
                hint="@pool, @cls and @mean give one row per image and pair up; @patch pairs up with @patch",
            )
    patches = [spec for spec in specs.values() if spec.policy == "patch"]
    for one, other in pairwise(patches):
        if one.grid != other.grid:
            raise SiteError(
                f"patches of '{one.site}' are on a grid of {one.grid}, those of '{other.site}' on one of {other.grid}",
                hint="harvest them together: all grids are brought to the coarsest then",
            )


def _check_rows(first: ActivationBuffer, other: ActivationBuffer) -> None:
    """Check that two buffers have rows of the same images and tokens in the same order.

    Raises:
        BufferMismatchError: naming the first row that differs.
    """
    for split in SPLITS:
        if first.n_rows(split) != other.n_rows(split):
            raise _mismatch(
                first, other, f"{first.n_rows(split)} rows of '{split}' here, {other.n_rows(split)} rows there"
            )
        _compare(first, other, split)
    sources = [buffer.source for buffer in (first, other)]
    if len({source["kind"] for source in sources}) == 1 and sources[0]["kind"] != "arrays":
        prints = [source["fingerprint"] for source in sources]
        if prints[0] != prints[1]:
            text = f"{first.path} and {other.path} are joined by image number, but their images have other fingerprints"
            warnings.warn(text, UsaeProbeWarning, stacklevel=3)


def _compare(first: ActivationBuffer, other: ActivationBuffer, split: SplitName) -> None:
    n = first.n_rows(split)
    for start in range(0, n, _BLOCK):
        here, there = (buffer._slice(split, [], start, min(start + _BLOCK, n)) for buffer in (first, other))
        same = (here.image_index == there.image_index) & (here.token_index == there.token_index)
        if not same.all():
            at = int(np.argmin(same))
            shown = (f"image {rows.image_index[at]}, token {rows.token_index[at]}" for rows in (here, there))
            raise _mismatch(first, other, f"row {start + at} of '{split}' is {' here, '.join(shown)} there")


def _mismatch(first: ActivationBuffer, other: ActivationBuffer, what: str) -> BufferMismatchError:
    return BufferMismatchError(
        f"rows of the buffers {first.path} (here) and {other.path} (there) do not pair up: {what}",
        hint="harvest both from the same images, with the same [images] limit, holdout, validation and seed",
    )
