"""Rows of one site as a file that other tools read: `.npy` piece by piece, or `.safetensors` at once."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..errors import PrecisionError, SiteError, UsaeProbeError, UsageError, nearest
from ..files import replacing, replacing_all
from ..split import SPLITS, SplitName
from .checks import as_stored
from .rows import Rows
from .spec import IMAGE_INDEX, STORED, TOKEN_INDEX, SiteSpec, StoredDtype
from .store import ActivationBuffer

SUFFIXES = (".npy", ".safetensors")
ALL = "all"
CODES = {split: code for code, split in enumerate(SPLITS)}
"""What stands for a split in the tensor `split` of a `.safetensors` file."""
AT_ONCE = 2**31
"""Bytes up to which a `.safetensors` file is made."""
_PIECE = 2**24  # bytes of rows in memory
_INDEX: dict[str, np.dtype] = {
    IMAGE_INDEX: np.dtype("<i8"),
    TOKEN_INDEX: np.dtype("<i4"),
    "split": np.dtype(f"<U{max(map(len, SPLITS))}"),
}
_CODE: np.dtype = np.dtype("i1")


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: the file of the rows.
        index_path: the file that says of every row where it comes from; None where `path` does.
        site: the site.
        d_in: length of a row.
        dtype: of the rows in the file.
        rows: how many, by split, in the order of the file.
    """

    path: Path
    index_path: Path | None
    site: str
    d_in: int
    dtype: StoredDtype
    rows: dict[SplitName, int]

    @property
    def n_rows(self) -> int:
        """Rows of all splits."""
        return sum(self.rows.values())


def export(
    buffer: ActivationBuffer,
    site: str,
    to: str | Path,
    *,
    split: str = ALL,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the rows of a site, [n, d_in], into a file that is there whole or not at all.

    Beside `x.npy` comes `x.index.npz` with `image_index`, `token_index` and `split` (a string) of every row. A
    `.safetensors` file has them as tensors beside `values`, `split` as int8; its metadata say which code is which
    split. Every byte that is read is compared with its checksum, unless the buffer was opened without.

    Args:
        buffer: which may be incomplete: what is sealed is written.
        site: its key.
        to: the file, `.npy` or `.safetensors`.
        split: "train", "validation", "holdout", or "all" of them in this order.
        dtype: "float16" or "float32"; None: as stored.
        force: replace a file that exists.
        progress: called with the rows written so far, and all.

    Raises:
        SiteError: when the buffer has no such site.
        UsageError: for an unknown split, dtype or suffix, a file that exists, a split without rows, or more than 2 GiB
            in a `.safetensors` file, which is made in memory.
        BufferIntegrityError: when a shard is missing or damaged.
        PrecisionError: for a value that float16 cannot hold.
        UsaeProbeError: when the file cannot be written.

    Example:
        `export(ActivationBuffer("runs/demo/buffer"), "vit/blocks.5", "vit.npy", split="holdout")`
    """
    job = _job(buffer, site, split, dtype, progress)
    path = _free(Path(to), force)
    write = _write_npy if path.suffix == ".npy" else _write_safetensors
    try:
        index = write(path, job)
    except OSError as error:
        raise UsaeProbeError(
            f"'{path}' could not be written: {error.strerror or error}",
            hint="see to the disk and the folder's permissions; no part of it was left there",
        ) from error
    return Exported(path, index, site, job.spec.d_in, job.dtype, job.rows)


@dataclass(frozen=True)
class _Job:
    """What is to be written."""

    buffer: ActivationBuffer
    spec: SiteSpec
    rows: dict[SplitName, int]
    dtype: StoredDtype
    progress: Callable[[int, int], None]

    @property
    def n(self) -> int:
        return sum(self.rows.values())

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.spec.d_in

    def pieces(self, sites: list[str]) -> Iterator[tuple[SplitName, Rows]]:
        """Yield the rows in the order of the file, as many at a time as 16 MiB hold."""
        size = max(1, _PIECE // (4 * max(self.spec.d_in, 16)))
        for split in self.rows:
            for piece in self.buffer.chunks(split, size, sites):
                yield split, piece

    def index(self, column: str) -> Iterator[np.ndarray]:
        """Yield what a column of the index holds."""
        for split, piece in self.pieces([]):
            yield np.full(piece.n, split, _INDEX[column]) if column == "split" else getattr(piece, column)

    def values(self) -> Iterator[np.ndarray]:
        """Yield the rows in the dtype of the file."""
        done = 0
        for _, piece in self.pieces([self.spec.site]):
            yield self._converted(piece)
            done += piece.n
            self.progress(done, self.n)

    def _converted(self, piece: Rows) -> np.ndarray:
        values = piece.values[self.spec.site]
        if self.dtype == self.buffer.dtype or self.dtype == "float32":  # rows are read as float32: both are exact
            return values.astype(STORED[self.dtype], copy=False)
        try:
            return as_stored(self.spec, values, self.dtype, piece.image_index, "image {}".format)
        except PrecisionError as error:
            raise PrecisionError(error.message, hint="export it as float32, as it is stored") from error


def _job(
    buffer: ActivationBuffer, site: str, split: str, dtype: str | None, progress: Callable[[int, int], None] | None
) -> _Job:
    if site not in buffer.specs:
        hint = nearest(site, buffer.specs) or f"it has {', '.join(buffer.specs)}"
        raise SiteError(f"the buffer {buffer.path} has no site '{site}'", hint=hint)
    _demand_one_of(split, (*SPLITS, ALL), "split")
    _demand_one_of(dtype or buffer.dtype, STORED, "dtype of rows")
    rows = {name: buffer.n_rows(name) for name in SPLITS}
    wanted = {name: n for name, n in rows.items() if split in (name, ALL) and n}
    if not wanted:
        there = ", ".join(f"{name}: {n}" for name, n in rows.items())
        raise UsageError(
            f"the buffer {buffer.path} has no rows{'' if split == ALL else f' of {split}'} ({there})",
            hint="name a split that has rows" if any(rows.values()) else "wait until its first shard is sealed",
        )
    stored: StoredDtype = "float32" if (dtype or buffer.dtype) == "float32" else "float16"
    return _Job(buffer, buffer.specs[site], wanted, stored, progress or (lambda done, total: None))


def _demand_one_of(given: str, options: Iterable[str], what: str) -> None:
    known = list(options)
    if given not in known:
        raise UsageError(f"'{given}' is no {what}", hint=nearest(given, known) or f"one of {', '.join(known)}")


def _free(path: Path, force: bool) -> Path:
    """Return the path after checking that it may be written."""
    if path.suffix not in SUFFIXES:
        hint = nearest(path.suffix, SUFFIXES) or f"e.g. {path.stem}.npy"
        raise UsageError(f"rows are written as {' or '.join(SUFFIXES)}, not as '{path}'", hint=hint)
    for file in (path, _index_of(path)) if path.suffix == ".npy" else (path,):
        if file.is_dir():
            raise UsageError(f"'{file}' is a folder; rows are written to a file", hint="give another name")
        if file.exists() and not force:
            raise UsageError(f"'{file}' exists", hint="give another name, or --force to replace it")
    return path


def _index_of(path: Path) -> Path:
    return path.with_suffix(".index.npz")


def _write_npy(path: Path, job: _Job) -> Path:
    index = _index_of(path)
    # The index comes last, and an old one goes before new rows come: there never is an index of other rows.
    with replacing_all(path, index) as (temporary, temporary_index):
        with temporary.open("wb") as file:
            _write_array(file, STORED[job.dtype], job.shape, job.values())
        with zipfile.ZipFile(temporary_index, "w") as archive:
            for column, dtype in _INDEX.items():
                entry = zipfile.ZipInfo(f"{column}.npy")  # without the time: equal rows give equal files
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as member:
                    _write_array(member, dtype, (job.n,), job.index(column))
        index.unlink(missing_ok=True)
    return index


@runtime_checkable
class _Writable(Protocol):
    """A file, or a member of an archive."""

    def write(self, data: bytes, /) -> object: ...


def _write_array(file: _Writable, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
    """Write an array in NumPy's format as its pieces come.

    Not through a memory map: on a full disk that ends the process, where a write that fails is an error.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for piece in pieces:
        file.write(np.ascontiguousarray(piece, dtype).tobytes())


def _write_safetensors(path: Path, job: _Job) -> None:
    from safetensors.numpy import save_file

    _demand_small(job)
    tensors = {"values": _filled(STORED[job.dtype], job.shape, job.values())}
    for column in (IMAGE_INDEX, TOKEN_INDEX):
        tensors[column] = _filled(_INDEX[column], (job.n,), job.index(column))
    tensors["split"] = np.repeat(np.array([CODES[split] for split in job.rows], _CODE), list(job.rows.values()))
    metadata = {
        "site": job.spec.site,
        "split_codes": json.dumps(CODES),
        "source_fingerprint": str(job.buffer.source["fingerprint"]),
        "weights_hash": job.spec.weights_hash,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _demand_small(job: _Job) -> None:
    row = STORED[job.dtype].itemsize * job.spec.d_in
    row += _INDEX[IMAGE_INDEX].itemsize + _INDEX[TOKEN_INDEX].itemsize + _CODE.itemsize
    if job.n * row > AT_ONCE:
        raise UsageError(
            f"{job.n:,} rows of '{job.spec.site}' take {job.n * row / 2**30:.1f} GiB; a .safetensors file is made in "
            f"memory, up to {AT_ONCE / 2**30:.0f} GiB",
            hint="give a .npy file, which is written piece by piece, or one split",
        )


def _filled(dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> np.ndarray:
    whole = np.empty(shape, dtype)
    begin = 0
    for piece in pieces:
        whole[begin : begin + len(piece)] = piece
        begin += len(piece)
    return whole
