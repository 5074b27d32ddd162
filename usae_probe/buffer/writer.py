"""Writing a buffer shard by shard, so that it can be stopped at any moment and gone on with."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import BufferIntegrityError, StageError, UsaeProbeError, UsageError, first_line
from ..files import publish
from ..lock import FolderLock
from .manifest import MANIFEST, TEMPORARY, Manifest, ShardEntry
from .moments import Moments
from .open_shard import OpenShard
from .parts import read_parts, remove_parts, save_part
from .shard import demand_present, merged_moments, write_shard
from .spec import IMAGE_INDEX, MOMENTS, TOKEN_INDEX, BufferSpec, ShardPlan
from .store import ActivationBuffer
from .virtual import VIRTUAL, write_virtual

_UNFINISHED = (MANIFEST + TEMPORARY, "shard-*.h5" + TEMPORARY, f".{VIRTUAL}{TEMPORARY}-*")


class BufferWriter:
    """Creates a buffer, or goes on with one that was made from an equal spec.

    One writer per folder at a time, or one job of several processes: each then writes every `size`-th of the shards
    that are left, and process 0 puts them together in `close`. A shard is in memory until its block ends, so what it
    needs is bounded by `spec.shard_images`.

    Args:
        path: the folder; made if need be.
        spec: what the buffer is to hold.
        describe: name of an image by its index, for error messages.
        rank: number of this process.
        size: how many processes write together; those other than 0 come when process 0's writer has been made.

    Attributes:
        path, spec: as given.
        n_images: images that the finished buffer covers; of several processes, without those that are others' to write.

    Raises:
        BufferMismatchError: when the folder holds a buffer that was made from something else.
        BufferIntegrityError: when the folder's manifest or a sealed shard is damaged or missing.
        FolderLockedError: when another process is writing to the folder.
        UsaeProbeError: when the folder cannot be written to.

    Example:
        >>> with BufferWriter("acts", spec) as writer:  # doctest: +SKIP
        ...     for plan in writer.pending():
        ...         with writer.shard(plan) as shard:
        ...             shard.append(plan.images, rows_of(plan.images))
        ...     buffer = writer.close()
    """

    def __init__(
        self,
        path: str | Path,
        spec: BufferSpec,
        *,
        describe: Callable[[int], str] | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.path = Path(path)
        self.spec = spec
        self._describe = describe
        if not 0 <= rank < size:
            raise UsageError(f"rank={rank} is none of {size} processes: they are numbered from 0")
        self._rank, self._size = rank, size
        self._plans = spec.plans()
        self._d_in = {site.site: site.d_in for site in spec.sites}
        self._open: OpenShard | None = None
        self._own: list[ShardEntry] = []  # sealed by this one of several processes
        self._lock: FolderLock | None = None
        with self._released_on_error():
            self._manifest = self._resume() if (self.path / MANIFEST).exists() else self._create()
        self._due = self._plans
        self._due = self.pending()[rank::size]
        sealed = sum(entry.n_planned for entry in self._manifest.shards)
        self.n_images = sealed + sum(len(plan.images) for plan in self._due)

    def __enter__(self) -> BufferWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others write to the folder; the writer is of no use any more."""
        if self._lock:
            self._lock.release()
        self._lock = None

    def _create(self) -> Manifest:
        self._demand_main()
        if any(self.path.glob("shard-*.h5")):
            raise BufferIntegrityError(
                f"{self.path} holds shards but no {MANIFEST}", hint="restore it from a copy, or write to another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"a buffer cannot be written to {self.path}: a file is in the way") from error
        except OSError as error:
            raise UsaeProbeError(
                f"a buffer cannot be written to {self.path}: {error.strerror}", hint="see to the folder's permissions"
            ) from error
        self._lock = FolderLock(self.path)
        if (self.path / MANIFEST).exists():  # who held the lock has made it
            return self._resume()
        remove_parts(self.path)
        with self._told("the manifest"):
            return self._fresh()

    def _fresh(self) -> Manifest:
        manifest = Manifest.of(self.spec)
        manifest.save(self.path)
        return manifest

    def _resume(self) -> Manifest:
        manifest = Manifest.load(self.path)
        if not (manifest.complete or self._rank):
            self._lock = self._lock or FolderLock(self.path)
            manifest = Manifest.load(self.path)  # who held the lock may have gone on with it
            if not manifest.shards and not any(read_parts(self.path, manifest.identity)):
                manifest = self._fresh()  # nothing would be lost, whatever it was meant to hold
        manifest.demand_equal(self.spec, self.path)
        if not self._rank:
            manifest = self._merged(manifest)
        for entry in manifest.present:
            demand_present(self.path, entry)
        if self._lock:
            self._tidy(manifest)
        return manifest.with_display(self.spec)

    def _tidy(self, manifest: Manifest) -> None:
        """Remove what a killed writer left."""
        for pattern in _UNFINISHED:
            for stray in self.path.glob(pattern):
                stray.unlink(missing_ok=True)
        for entry in manifest.shards:
            if entry.dropped:
                (self.path / entry.file).unlink(missing_ok=True)

    def _demand_main(self) -> None:
        if self._rank:
            raise StageError(
                f"process {self._rank} of {self._size} finds no buffer in {self.path}",
                hint="process 0 has to make it first, in a folder that all processes see",
            )

    @property
    def manifest(self) -> Manifest:
        """What is sealed by now."""
        return self._manifest

    @property
    def images_done(self) -> int:
        """Images harvested or skipped so far, those of the open shard too."""
        sealed = sum(entry.n_planned for entry in (*self._manifest.shards, *self._own))
        return sealed + (self._open.n_done if self._open else 0)

    def pending(self) -> list[ShardPlan]:
        """The shards that are not sealed yet and this process's to write, in the order in which they are written."""
        sealed = {entry.index for entry in (*self._manifest.shards, *self._own)}
        return [plan for plan in self._due if plan.index not in sealed]

    @contextmanager
    def shard(self, plan: ShardPlan) -> Iterator[OpenShard]:
        """Open the shard `plan`; it is sealed when the block ends, and leaves nothing behind if the block raises.

        Raises:
            StageError: when `plan` is not the next pending shard.
            BufferIntegrityError: when the block ends before every image of the plan was appended or skipped.
            UsaeProbeError: when the disk does not take the shard.
        """
        due = next((due for due in self.pending()), None)
        if due is None or plan.index != due.index or self._open is not None:
            state = "is open" if self._open is not None else "does not exist" if due is None else "is due"
            number = len(self._plans) if due is None else due.index
            raise StageError(
                f"shard {plan.index} of {self.path} was started where shard {number} {state}",
                hint="go through pending() in order, one at a time",
            )
        self._open = OpenShard(due, self.spec, self._describe)
        try:
            yield self._open
            self._open.demand_done()
            with self._told(f"shard {plan.file}"):
                self._seal(self._open)
        finally:
            self._open = None

    def drop(self, files: Collection[str]) -> None:
        """Remove shards whose rows have been used; of those the manifest says what they held."""
        if files:
            self._save(self._manifest.without(files))  # first: a shard that is listed as there has to be there
        for file in files:
            (self.path / file).unlink(missing_ok=True)

    def close(self, *, early: bool = False) -> ActivationBuffer:
        """Mark the buffer complete, open it, and let others write. Of several processes this is for process 0.

        Args:
            early: no more training shards are wanted than there are.

        Raises:
            StageError: when shards are pending.
        """
        if self._rank:
            raise StageError(f"process {self._rank} of {self._size} cannot close {self.path}: that is for process 0")
        if not self._manifest.complete:
            manifest = self._merged(self._manifest)
            missing = len(self._plans) - len(manifest.shards)
            if missing and not early:
                raise StageError(
                    f"{self.path} still lacks {missing} of {len(self._plans)} shards", hint="write pending() first"
                )
            with self._told("the end"):
                if self.spec.ring is None:
                    write_virtual(self.path, manifest)
                self._save(manifest.completed())
        self.release()
        return ActivationBuffer(self.path)

    def _save(self, manifest: Manifest) -> None:
        manifest.save(self.path)
        self._manifest = manifest

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Say what the disk did not take; h5py reports a full one as RuntimeError too, and at length."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            number = getattr(error, "errno", None)
            raise UsaeProbeError(
                f"{what} of {self.path} could not be written: {os.strerror(number) if number else first_line(error)}",
                hint="see to the disk and start again: sealed shards are kept and the rest is gone on with",
            ) from error

    def _merged(self, manifest: Manifest) -> Manifest:
        """Put what several processes wrote into the manifest."""
        known = {entry.index for entry in manifest.shards}
        unique = {entry.index: entry for entry in read_parts(self.path, manifest.identity)}
        found = [entry for index, entry in unique.items() if index not in known]
        if found:
            for entry in found:
                demand_present(self.path, entry)
            manifest = manifest.with_shards(found, merged_moments(self.path, [*manifest.shards, *found], self._d_in))
            self._save(manifest)
        if self._lock:
            remove_parts(self.path)
        self._own = []
        return manifest

    def _seal(self, shard: OpenShard) -> None:
        plan = shard.plan
        final = self.path / plan.file
        temporary = final.with_name(plan.file + TEMPORARY)
        own: dict[str, Moments] = {}
        try:
            crc = write_shard(temporary, self._columns(shard, own))
            entry = ShardEntry(
                file=plan.file,
                split=plan.split,
                start=plan.start,
                n_images=len(plan.images) - len(shard.skipped),
                rows=shard.n_rows,
                size=temporary.stat().st_size,
                crc=crc,
                skipped=tuple(shard.skipped),
            )
            publish(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        if self._size > 1:
            save_part(self.path, self._rank, self._manifest.identity, [*self._own, entry])
            self._own.append(entry)
        else:
            self._save(self._with(entry, own))

    def _with(self, entry: ShardEntry, own: dict[str, Moments]) -> Manifest:
        before = self._manifest
        if any(sealed.index > entry.index for sealed in before.shards):  # several processes left a gap
            return before.with_shards([entry], merged_moments(self.path, [*before.shards, entry], self._d_in))
        moments = {site: so_far.copy() for site, so_far in before.moments.items()}
        for site, of_shard in own.items():
            moments[site].merge(of_shard)
        after = before.with_shards([entry], moments)
        return after.with_frozen(moments) if after.frozen is None and self._is_warm(entry) else after

    def _is_warm(self, entry: ShardEntry) -> bool:
        """Say whether a training that uses a ring up goes by the moments of the shards until this one."""
        if self.spec.ring is None or entry.split != "train":
            return False
        train = len(self._manifest.entries("train")) + 1
        return train >= self.spec.ring.warmup_shards or entry.index == self._plans[-1].index

    def _columns(self, shard: OpenShard, own: dict[str, Moments]) -> Iterator[tuple[str, np.ndarray]]:
        for site in self.spec.sites:
            values = shard.pop_column(site.site)
            if shard.plan.split == "train":
                own[site.site] = Moments(site.d_in)
                own[site.site].update(values)  # of the values as stored: those are what training reads
            yield site.site, values
        yield IMAGE_INDEX, shard.pop_column(IMAGE_INDEX)
        yield TOKEN_INDEX, shard.pop_column(TOKEN_INDEX)
        for site_key, moments in own.items():
            yield MOMENTS + site_key, np.stack([moments.mean, moments.m2])


def discard_buffer(path: str | Path) -> None:
    """Remove a buffer's files from a folder, and nothing else in it.

    Raises:
        FolderLockedError: when another process is writing to it.
    """
    folder = Path(path)
    lock = FolderLock(folder)
    try:
        (folder / MANIFEST).unlink(missing_ok=True)  # first: without it there is no buffer
        remove_parts(folder)
        for pattern in ("shard-*.h5", VIRTUAL, *_UNFINISHED):
            for file in folder.glob(pattern):
                file.unlink(missing_ok=True)
    finally:
        lock.release()
