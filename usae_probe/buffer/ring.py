"""Where a harvest and a training that goes along with it meet: each waits for the other where it has to."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..errors import StageError
from .manifest import Manifest, ShardEntry
from .spec import BufferSpec, ShardPlan
from .writer import BufferWriter

_FILE, _SITE = 6144, 1024  # bytes of a shard's file, and of each site in it, that are neither rows nor moments


class Ring:
    """The sealed shards between a producer (a thread that harvests) and a consumer (the one that trains).

    Without `capacity` nothing is dropped and the producer never waits.

    Args:
        writer: the producer's; nobody else uses it until the producer has ended.
        capacity: bytes that the folder may take.

    Attributes:
        error: what ended the producer, if it was not that all shards are there.
    """

    def __init__(self, writer: BufferWriter, capacity: int | None = None) -> None:
        self._writer, self._capacity = writer, capacity
        # Entered as it is, not through the condition, whose code is Python's: an interrupt raised between taking
        # the lock and knowing it would leave it taken, and the other thread waiting for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._manifest = writer.manifest
        self._needed_from = 0  # number of the first training shard that the consumer may need again
        self._full = self._stopped = self._ended = self._interrupted = False
        self.error: BaseException | None = None

    # What the producer calls.

    @property
    def stopped(self) -> bool:
        """Whether the consumer wants no more."""
        return self._stopped

    def make_room(self, plan: ShardPlan) -> bool:
        """Wait until a shard fits, and drop what has been used until it does; False when no more is wanted."""
        wanted = shard_bytes(self._writer.spec, len(plan.images))
        while not self._stopped:
            with self._lock:
                entries = self._manifest.present
                over = 0 if self._capacity is None else sum(entry.size for entry in entries) + wanted - self._capacity
                drop = _oldest(self._manifest, self._needed_from, over)
                self._full = drop is None
                if drop is None:
                    self._changed.notify_all()
                    self._changed.wait()
                    continue
            self._writer.drop([entry.file for entry in drop])
            self._tell(self._writer.manifest)
            return True
        return False

    def sealed(self) -> None:
        """Let the consumer know of a new shard."""
        self._tell(self._writer.manifest)

    def _tell(self, manifest: Manifest) -> None:
        with self._lock:
            self._manifest = manifest
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Let the consumer know that no shard will come any more, and why if it is not because all are there."""
        with self._lock:
            self._ended, self.error = True, error
            self._changed.notify_all()

    # What the consumer calls.

    def wait_for(self, shards: int, keep: Callable[[], None]) -> Manifest:
        """Wait until so many training shards are sealed.

        Args:
            shards: how many.
            keep: called when the producer waits for room meanwhile, to release what it can, and before an interrupt.

        Raises:
            KeyboardInterrupt: when `interrupt` was called.
            StageError: when the ring is too small.
            BaseException: what the producer ended with.
        """
        asked_at = -1
        while True:
            with self._lock:
                if len(self._manifest.entries("train")) >= shards:
                    return self._manifest
                if self.error:
                    raise self.error
                if self._ended and not self._interrupted:
                    raise StageError(f"the harvest ended before training shard {shards - 1} was there")
                if not (self._full or self._interrupted):
                    self._changed.wait()
                    continue
                if self._needed_from == asked_at and not self._interrupted:
                    raise StageError(
                        f"the ring is full, and training shard {shards - 1} is needed together with those from "
                        f"{self._needed_from} on",
                        hint="raise buffer.capacity, or lower buffer.memory or buffer.shard_images",
                    )
                asked_at, interrupted = self._needed_from, self._interrupted
            keep()
            if interrupted:
                raise KeyboardInterrupt

    def release(self, shard: int) -> None:
        """Say that training shards before this one are not needed any more."""
        with self._lock:
            if shard > self._needed_from:
                self._needed_from, self._full = shard, False  # the producer looks again, and says so if it still is
                self._changed.notify_all()

    def is_short(self, shard: int) -> bool:
        """Say whether the producer waits, and releasing what comes before this shard would let it do an eighth more."""
        with self._lock:
            present = sum(not entry.dropped for entry in self._manifest.entries("train"))
            return self._full and shard - self._needed_from >= max(1, present // 8)

    def interrupt(self) -> None:
        """Wake the consumer to end it; may be called by a signal's handler in the consumer's own thread."""
        with self._lock:
            self._interrupted = True
            self._changed.notify_all()

    def wait_for_end(self, producer: threading.Thread) -> None:
        """Wait until the producer has called `end`, if its thread was started.

        Unlike `Thread.join` it can be interrupted and called again: in Python 3.11 a join after an interrupted one
        returns at once, with the thread still at work.
        """
        with self._lock:
            while producer.ident is not None and not self._ended:
                self._changed.wait()

    def stop(self) -> None:
        """Say that no more shards are wanted."""
        self._stopped = True
        with self._lock:
            self._changed.notify_all()


def shard_bytes(spec: BufferSpec, images: int) -> int:
    """Return what a shard of so many images takes on disk, at most: rows, moments, and HDF5's own structures."""
    return images * spec.image_bytes + 16 * sum(site.d_in for site in spec.sites) + _FILE + _SITE * len(spec.sites)


def _oldest(manifest: Manifest, needed_from: int, over: int) -> list[ShardEntry] | None:
    """Return the oldest shards that give back `over` bytes; None when those that are not needed do not."""
    drop: list[ShardEntry] = []
    for entry in manifest.entries("train")[:needed_from]:
        if over <= 0:
            break
        if not entry.dropped:
            drop.append(entry)
            over -= entry.size
    return drop if over <= 0 else None
