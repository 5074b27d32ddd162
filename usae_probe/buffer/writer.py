"""Writing a buffer shard by shard, so that it can be stopped at any moment and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import BufferIntegrityError, StageError, UsaeProbeError, UsageError
from ..files import publish
from .manifest import MANIFEST, TEMPORARY, Manifest, ShardEntry
from .moments import Moments
from .open_shard import OpenShard
from .shard import demand_present, write_shard
from .spec import IMAGE_INDEX, TOKEN_INDEX, BufferSpec, ShardPlan
from .store import ActivationBuffer


class BufferWriter:
    """Creates a buffer, or goes on with one that was made from an equal spec.

    One writer per folder at a time. A shard is in memory until its block ends, so what it needs is bounded by
    `spec.shard_images`.

    Args:
        path: the folder; made if need be.
        spec: what the buffer is to hold.
        describe: name of an image by its index, for error messages.

    Raises:
        BufferMismatchError: when the folder holds a buffer that was made from something else.
        BufferIntegrityError: when the folder's manifest or a sealed shard is damaged or missing.

    Example:
        >>> writer = BufferWriter("acts", spec)  # doctest: +SKIP
        >>> for plan in writer.pending():  # doctest: +SKIP
        ...     with writer.shard(plan) as shard:
        ...         shard.append(plan.images, rows_of(plan.images))
        >>> buffer = writer.close()  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, spec: BufferSpec, *, describe: Callable[[int], str] | None = None) -> None:
        self.path = Path(path)
        self.spec = spec
        self._describe = describe
        self._plans = spec.plans()
        self._open: OpenShard | None = None
        self._manifest = self._resume() if (self.path / MANIFEST).exists() else self._create()

    def _create(self) -> Manifest:
        if any(self.path.glob("shard-*.h5")):
            raise BufferIntegrityError(
                f"{self.path} holds shards but no {MANIFEST}", hint="restore it from a copy, or write to another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"a buffer cannot be written to {self.path}: a file is in the way") from error
        manifest = Manifest.of(self.spec)
        manifest.save(self.path)
        return manifest

    def _resume(self) -> Manifest:
        manifest = Manifest.load(self.path)
        if not manifest.shards:  # nothing would be lost, whatever it was meant to hold
            manifest = Manifest.of(self.spec)
            manifest.save(self.path)
        manifest.demand_equal(self.spec, self.path)
        for entry in manifest.shards:
            demand_present(self.path, entry)
        for pattern in (MANIFEST, "shard-*.h5"):  # what a killed writer left
            for stray in self.path.glob(pattern + TEMPORARY):
                stray.unlink(missing_ok=True)
        return manifest.with_display(self.spec)

    @property
    def n_images(self) -> int:
        """Images that the finished buffer covers."""
        return self.spec.split.n_images

    @property
    def images_done(self) -> int:
        """Images harvested or skipped so far, those of the open shard too."""
        return sum(entry.n_planned for entry in self._manifest.shards) + (self._open.n_done if self._open else 0)

    def pending(self) -> list[ShardPlan]:
        """The shards that are not sealed yet, in the order in which they are to be written."""
        return self._plans[len(self._manifest.shards) :]

    @contextmanager
    def shard(self, plan: ShardPlan) -> Iterator[OpenShard]:
        """Open the shard `plan`; it is sealed when the block ends, and leaves nothing behind if the block raises.

        Raises:
            StageError: when `plan` is not the next pending shard.
            BufferIntegrityError: when the block ends before every image of the plan was appended or skipped.
            UsaeProbeError: when the disk does not take the shard.
        """
        due = len(self._manifest.shards)
        # The moments are cumulative: in another order their last bits would differ from an uninterrupted run's.
        if plan.index != due or due == len(self._plans) or self._open is not None:
            state = "is open" if self._open is not None else "is due" if due < len(self._plans) else "does not exist"
            raise StageError(
                f"shard {plan.index} of {self.path} was started where shard {due} {state}",
                hint="go through pending() in order, one at a time",
            )
        self._open = OpenShard(self._plans[due], self.spec, self._describe)
        try:
            yield self._open
            self._open.demand_done()
            try:
                self._seal(self._open)
            except (OSError, RuntimeError) as error:  # the latter is how h5py reports a full disk
                raise UsaeProbeError(
                    f"shard {plan.file} of {self.path} could not be written: {error}",
                    hint="see to the disk and start again: sealed shards are kept and the rest is gone on with",
                ) from error
        finally:
            self._open = None

    def close(self) -> ActivationBuffer:
        """Mark the buffer complete and open it.

        Raises:
            StageError: when shards are pending.
        """
        if self.pending():
            left = len(self.pending())
            raise StageError(
                f"{self.path} still lacks {left} of {len(self._plans)} shards", hint="write pending() first"
            )
        if not self._manifest.complete:
            self._manifest = self._manifest.completed()
            self._manifest.save(self.path)
        return ActivationBuffer(self.path)

    def _seal(self, shard: OpenShard) -> None:
        plan = shard.plan
        final = self.path / plan.file
        temporary = final.with_name(plan.file + TEMPORARY)
        moments = {site: so_far.copy() for site, so_far in self._manifest.moments.items()}
        try:
            crc = write_shard(temporary, self._columns(shard, moments))
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
        manifest = self._manifest.with_shard(entry, moments)
        manifest.save(self.path)
        self._manifest = manifest

    def _columns(self, shard: OpenShard, moments: dict[str, Moments]) -> Iterator[tuple[str, np.ndarray]]:
        for site in self.spec.sites:
            values = shard.pop_column(site.site)
            if shard.plan.split == "train":
                moments[site.site].update(values)  # of the values as stored: those are what training reads
            yield site.site, values
        yield IMAGE_INDEX, shard.pop_column(IMAGE_INDEX)
        yield TOKEN_INDEX, shard.pop_column(TOKEN_INDEX)
