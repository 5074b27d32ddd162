"""A buffer on disk, opened for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SiteError, StageError, UsageError, nearest
from ..notebook import html_facts, html_table
from ..split import SPLITS, known_split
from .batches import batch_rows, read_ahead, steps_per_epoch
from .manifest import Manifest, ShardEntry, Skipped
from .moments import Moments
from .reader import ColumnReader, Verify, layout_of, problems
from .rows import BatchDataset, Rows
from .shard import demand_present
from .shuffle import pool_of
from .spec import IMAGE_INDEX, TOKEN_INDEX, SiteSpec, StoredDtype

_FLOAT32 = np.dtype(np.float32)
MEMORY = 2**30


class ActivationBuffer:
    """A folder of row-paired activations, opened read-only as it stands now; it may still be growing.

    Args:
        path: the folder.
        verify: compare a dataset's CRC32 with the manifest's when it is first read, at every read, or never.
        memory_budget: bytes up to which the buffer is loaded into memory once rows are gathered. Above, they are
            gathered from the files, and batches are mixed in a pool of as many shards as that memory would hold, 2 to
            64: it is in the page cache, not in the process.

    Attributes:
        path: the folder.
        specs: by site, in the order of the columns.
        complete: every image of the split has been harvested or skipped.

    Raises:
        BufferIntegrityError: when the folder holds no buffer, or one that is damaged or of a newer schema. Damage to
            shards shows when they are read, or by `verify()`.
    """

    def __init__(self, path: str | Path, *, verify: Verify = "first", memory_budget: int = MEMORY) -> None:
        self.path = Path(path)
        self._manifest = Manifest.load(self.path)
        sites = self._manifest.identity["sites"]
        self.specs = {site: SiteSpec.from_identity(sites[site]) for site in self._manifest.identity["site_order"]}
        self.complete = self._manifest.complete
        self._whole = self.nbytes + 8 * sum(entry.rows for entry in self._manifest.present) <= memory_budget
        self._memory_budget = memory_budget
        self._reader = ColumnReader(self.path, self.identity, self._manifest.present, verify=verify, whole=self._whole)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        out: str | Path,
        *,
        image_index: Any = None,
        holdout: float = 0.1,
        validation: float = 0.1,
        seed: int = 0,
        dtype: StoredDtype = "float16",
        shard_images: int = 4096,
    ) -> ActivationBuffer:
        """Make a buffer of activations that were computed elsewhere.

        Args:
            arrays: by site (`model/layer`), [n, d] of anything that `np.asarray` takes, n equal for all.
            out: the folder to write; if it holds a buffer of the same content already, that is opened.
            image_index: [n] which image each row comes from; by default row i is image i. The split is drawn by image,
                and the rows of an image keep their order.
            holdout: share of images for evaluation.
            validation: share of the remaining images for choices.
            seed: of the split.
            dtype: in which rows are stored.
            shard_images: images per shard.

        Raises:
            SiteError: when a key is no site.
            UsageError: when arrays are not [n, d] with one n.
            BufferMismatchError: when `out` holds a buffer of other content.
            NonFiniteError: for NaN or infinity.
            PrecisionError: for a value that `dtype` cannot hold.
        """
        from .arrays import RowsByImage, spec_of_arrays, write_arrays  # here: the writer gives back this class

        rows = RowsByImage.of(arrays, image_index)
        spec = spec_of_arrays(
            rows,
            holdout=float(holdout),
            validation=float(validation),
            seed=seed,
            dtype=dtype,
            shard_images=shard_images,
        )
        return write_arrays(rows, spec, out)

    @classmethod
    def from_npz(cls, path: str | Path, out: str | Path, **settings: Any) -> ActivationBuffer:
        """Make a buffer of an `.npz` file: an array [n, d] under each site's key, and `image_index` if it is there.

        Args:
            path: the file, as `np.savez(path, **{"a/layer": x, "b/layer": y})` writes it.
            out: the folder to write.
            settings: `holdout`, `seed`, `dtype`, … as for `from_arrays`, which also says what it raises.

        Raises:
            UsageError: when the file cannot be read, or holds pickled objects.
        """
        from .arrays import read_npz

        return cls.from_arrays(out=out, **read_npz(Path(path)), **settings)

    @property
    def sites(self) -> list[str]:
        """Keys of the sites, in the order of the columns."""
        return list(self.specs)

    @property
    def d_in(self) -> dict[str, int]:
        """Row length by site."""
        return {site: spec.d_in for site, spec in self.specs.items()}

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the buffer's bits, as `BufferSpec.identity()` gives it."""
        return self._manifest.identity

    @property
    def dtype(self) -> StoredDtype:
        """In which rows are stored; they are read as float32."""
        stored: StoredDtype = self.identity["dtype"]
        return stored

    @property
    def source(self) -> dict[str, Any]:
        """The image source: kind, location, fingerprint, n_images."""
        source: dict[str, Any] = self.identity["source"]
        return source | {"location": self._manifest.display["location"]}

    @property
    def split_request(self) -> dict[str, Any]:
        """Limit, holdout, validation and seed that the split was drawn by."""
        return dict(self._manifest.display["split_request"])

    @property
    def schema(self) -> int:
        """Of its manifest."""
        return self._manifest.schema

    @property
    def skipped(self) -> list[Skipped]:
        """Images without rows, and why."""
        return [image for entry in self._manifest.shards for image in entry.skipped]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as stored."""
        return self._row_bytes * sum(entry.rows for entry in self._manifest.present)

    @property
    def _row_bytes(self) -> int:
        return sum(dtype.itemsize * int(np.prod(width)) for dtype, width in layout_of(self.identity).values())

    @property
    def shards(self) -> list[ShardEntry]:
        """The sealed shards, also those that a ring has dropped."""
        return list(self._manifest.shards)

    def pool(self, split: str = "train") -> int | None:
        """Shards among which `batches` mixes rows; None: all rows at once."""
        entries = [entry for entry in self._manifest.present if entry.split == known_split(split)]
        if self._whole or not entries:
            return None
        window = pool_of(self._memory_budget, self._row_bytes * max(entry.rows for entry in entries))
        return window if window < len(entries) else None

    def n_rows(self, split: str) -> int:
        """Rows of `split` ("train", "validation" or "holdout") sealed so far."""
        return self._reader.n_rows(known_split(split))

    def rows_at_start(self) -> int:
        """Training rows that a training can look at before its first step."""
        return self.n_rows("train")

    def n_images(self, split: str) -> int:
        """Images of `split` with rows, sealed so far."""
        known = known_split(split)
        return sum(entry.n_images for entry in self._manifest.shards if entry.split == known)

    def moments(self, site: str) -> Moments:
        """Count, mean and M2 of the site's training rows, as stored."""
        return self._manifest.moments[self._known_sites([site])[0]].copy()

    def read(self, split: str, sites: Sequence[str] | None = None) -> Rows:
        """All rows of a split, in storage order.

        Args:
            split: "train", "validation" or "holdout".
            sites: which ones; all by default.

        Raises:
            BufferIntegrityError: when a shard is missing or damaged.
            UsageError: for an unknown split (SiteError: for an unknown site).
        """
        return self._slice(split, self._known_sites(sites), 0, self.n_rows(split))

    def chunks(self, split: str, size: int, sites: Sequence[str] | None = None) -> Iterator[Rows]:
        """All rows of a split in storage order, `size` at a time; raises as `read` does."""
        if size < 1:
            raise UsageError(f"chunks of {size} rows were asked for; size must be at least 1")
        known = self._known_sites(sites)
        n = self.n_rows(split)
        return (self._slice(split, known, start, min(start + size, n)) for start in range(0, n, size))

    def gather(self, split: str, rows: np.ndarray, sites: Sequence[str] | None = None) -> Rows:
        """The given rows of a split, in the order given; raises as `read` does.

        Args:
            split: "train", "validation" or "holdout".
            rows: [n] row numbers within the split, in any order.
            sites: which ones; all by default.
        """
        known, n = self._known_sites(sites), self.n_rows(split)
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.ndim != 1 or (len(wanted) and (wanted.min() < 0 or wanted.max() >= n)):
            raise UsageError(
                f"rows of shape {list(wanted.shape)}, {_span(wanted)}, do not lie in 0 … {n - 1} of '{split}'"
            )
        taken = self._reader.take(
            split, dict.fromkeys(known, _FLOAT32) | {IMAGE_INDEX: None, TOKEN_INDEX: None}, wanted
        )
        return Rows({site: taken[site] for site in known}, taken[IMAGE_INDEX], taken[TOKEN_INDEX])

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        sites: Sequence[str] | None = None,
        share: slice = slice(None),
        workers: int = 0,
    ) -> Iterator[Rows]:
        """Shuffled batches without end; each epoch goes through all rows in a new order.

        What step t holds depends on `seed` and t alone (and on `pool`, where the buffer is larger than the memory
        budget). Rows that do not fill a last batch wait for the next epoch; a `batch_size` above the number of rows
        counts as that number.

        Args:
            split: "train", "validation" or "holdout".
            batch_size: rows per batch.
            seed: of the order of rows.
            start_step: number of the first batch; a run resumed there sees what it would have seen.
            sites: which ones; all by default.
            share: the part of every batch that is read, where several processes have one each.
            workers: threads that read the next batches meanwhile; the batches are the same.

        Raises:
            UsageError: at once when the split has no rows or a number is out of range.
        """
        known = self._known_sites(sites)
        if workers < 0:
            raise UsageError(f"workers={workers} must not be negative")
        numbers = self.numbers(split, batch_size, seed, start_step)
        return read_ahead(lambda rows: self.gather(split, rows[share], known), numbers, workers)

    def numbers(self, split: str, batch_size: int, seed: int, start_step: int) -> Iterator[np.ndarray]:
        """The rows of `batches`, by their numbers within the split."""
        begins = self._reader.begins[known_split(split)]
        return batch_rows(begins, batch_size, seed=seed, start_step=start_step, window=self.pool(split))

    def dataset(
        self, split: str, batch_size: int, *, seed: int, steps: int, sites: Sequence[str] | None = None
    ) -> BatchDataset:
        """The batches as a map-style dataset of `steps` entries, for a DataLoader that has `batch_size=None`.

        Entry t is batch t of `batches`, whichever worker reads it: the same for any number of them, forked or spawned.
        """
        return BatchDataset(self, known_split(split), batch_size, seed, steps, self._known_sites(sites))

    def steps_per_epoch(self, split: str, batch_size: int) -> int:
        """Batches per epoch that `batches` gives."""
        return steps_per_epoch(self.n_rows(split), batch_size)

    def demand_present(self) -> None:
        """Check that every sealed shard is there and as long as it was; `verify` also reads them.

        Raises:
            BufferIntegrityError: naming the first that is not.
        """
        for entry in self._manifest.present:
            demand_present(self.path, entry)

    def demand_all_rows(self) -> None:
        """Check that no training rows were dropped.

        Raises:
            StageError: when this is what a ring left.
        """
        dropped = sum(entry.rows for entry in self._manifest.shards if entry.dropped)
        if dropped:
            raise StageError(
                f"{self.path} was a ring: {dropped} of its training rows were dropped once they had been used",
                hint="harvest with [buffer] mode = 'store' to train more than once",
            )

    def verify(self, progress: Callable[[str], None] | None = None) -> list[str]:
        """Read every dataset of every shard and say what is wrong with each that is missing or damaged.

        Args:
            progress: called with the file of each shard that has been read.
        """
        wrong = []
        for file, what in problems(self.path, self.identity, self._manifest.present):
            wrong += [what] if what else []
            if progress:
                progress(file)
        return wrong

    def _slice(self, split: str, sites: list[str], start: int, stop: int) -> Rows:
        piece = self._reader.slice
        return Rows(
            {site: piece(split, site, start, stop, _FLOAT32) for site in sites},
            piece(split, IMAGE_INDEX, start, stop),
            piece(split, TOKEN_INDEX, start, stop),
        )

    def _known_sites(self, sites: Sequence[str] | None) -> list[str]:
        for site in sites or ():
            if site not in self.specs:
                hint = nearest(site, self.specs) or f"it has {', '.join(self.specs)}"
                raise SiteError(f"the buffer {self.path} has no site '{site}'", hint=hint)
        return self.sites if sites is None else list(sites)

    def __repr__(self) -> str:
        rows = " + ".join(f"{self.n_rows(split)} {split}" for split in SPLITS)
        state = "complete" if self.complete else "incomplete"
        size = f"{self.nbytes / 1e6:.1f} MB {self.dtype}"
        return f"ActivationBuffer('{self.path}': {', '.join(self.sites)}; {rows} rows; {size}; {state})"

    def _repr_html_(self) -> str:
        state = f"{self.nbytes / 1e6:,.1f} MB {self.dtype}, {'complete' if self.complete else 'incomplete'}"
        splits = [(split, f"{self.n_rows(split):,}", f"{self.n_images(split):,}") for split in SPLITS]
        sites = html_table(["site", "d_in"], [(site, f"{self.d_in[site]:,}") for site in self.sites])
        facts = {"folder": self.path, "size": state}
        return html_facts(type(self).__name__, facts, html_table(["split", "rows", "images"], splits), sites)


def _span(rows: np.ndarray) -> str:
    return f"{rows.min()} … {rows.max()}" if rows.size else "none"
