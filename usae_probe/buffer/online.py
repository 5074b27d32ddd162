"""A buffer that is trained from while it is being filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, StageError, UsageError
from .batches import epoch_pass
from .moments import Moments
from .reader import Verify
from .ring import Ring, shard_bytes
from .shard import merged_moments
from .shuffle import Pass, pool_of
from .spec import BufferSpec, RingSpec
from .store import ActivationBuffer


@dataclass(frozen=True)
class OnlinePlan:
    """How a training goes along with a harvest.

    Attributes:
        shards: training shards of the whole harvest.
        rows: training rows of the whole harvest, if no image is skipped.
        window: shards that rows are mixed in.
        warmup_shards: training shards after which the normalisation is frozen and training begins.
        reuse: times that every row is drawn.
        tail: last shards that a ring draws from again if images were skipped and rows run out.
        drops: whether shards are dropped once they have been used.
    """

    shards: int
    rows: int
    window: int
    warmup_shards: int
    reuse: int
    tail: int
    drops: bool

    @classmethod
    def of(
        cls,
        spec: BufferSpec,
        *,
        batch_size: int,
        memory: int,
        warmup_rows: int,
        reuse: int = 1,
        capacity: int | None = None,
    ) -> OnlinePlan:
        """Choose what the memory of the pool and the capacity of the ring allow.

        Raises:
            ConfigError: when the ring is too small, with the capacity that would do.
        """
        rows_of_shard = spec.images_per_shard * max(1, spec.sites[0].rows_per_image)
        rows = len(spec.split.train) * max(1, spec.sites[0].rows_per_image)
        shards = -(-rows // rows_of_shard)
        batch = -(-min(batch_size, rows) // rows_of_shard)  # shards that the rows of a batch would fill
        window, warmup = pool_of(memory, spec.images_per_shard * spec.image_bytes), -(-warmup_rows // rows_of_shard)
        if capacity is not None:
            held = (capacity - _held_out_bytes(spec)) // shard_bytes(spec, spec.images_per_shard)
            needed = 2 + 2 + batch  # two to mix, two more for what is being written and what is being waited for
            if held < min(needed, shards):
                raise ConfigError(_too_small(spec, capacity, min(needed, shards)))
            # The more are mixed, the less a row's draws lie together; with the rest either side can be ahead.
            window = max(2, min(window, held - batch - 2, 3 * held // 4))
            warmup = min(warmup, held - 1)
        window = min(window, shards)
        return cls(
            shards=shards,
            rows=rows,
            window=window,
            warmup_shards=max(1, min(warmup, shards)),
            reuse=reuse,
            tail=min(shards, max(window, batch + 1)),
            drops=capacity is not None,
        )

    def ring(self, training: str) -> RingSpec | None:
        """Return what a buffer made for this plan is to know of it; nothing where it keeps all rows."""
        return RingSpec(self.window, self.warmup_shards, self.reuse, training) if self.drops else None


class OnlineBuffer(ActivationBuffer):
    """What a training sees of a buffer that is being filled: training rows as they come, all others at once.

    Opening it waits until the normalisation is known and the first batch can be mixed. Batch t depends on seed, plan
    and t alone, not on timing: see `Pass`, in the order of the shards. A store goes on with passes as
    `ActivationBuffer` makes them, mixed in the same window.

    Args:
        ring: where the shards come from.
        path: the buffer's folder.
        plan: how it is trained from.
        verify: as for `ActivationBuffer`.

    Raises:
        KeyboardInterrupt: when `interrupt` was called.
        BaseException: what the harvest ended with.
    """

    def __init__(self, ring: Ring, path: str | Path, plan: OnlinePlan, *, verify: Verify = "first") -> None:
        self._ring, self._plan = ring, plan
        self._keep: Callable[[], None] = lambda: None
        self._pass: Pass | None = None
        self._batch_size = 1
        ring.wait_for(max(plan.warmup_shards, min(plan.window, plan.shards)), self._keep)
        super().__init__(path, verify=verify, memory_budget=0)
        self._reader.use(self._manifest.shards)

    @property
    def plan(self) -> OnlinePlan:
        """How it is trained from."""
        return self._plan

    def n_rows(self, split: str) -> int:
        """Rows of a split; training rows also those that are still to come, as if no image was skipped."""
        return self._plan.rows if split == "train" else super().n_rows(split)

    def pool(self, split: str = "train") -> int | None:
        """Shards among which training rows are mixed."""
        return self._plan.window if split == "train" else super().pool(split)

    def moments(self, site: str) -> Moments:
        """Of the training rows of the warm-up."""
        known = self._known_sites([site])[0]
        if self._manifest.frozen is not None:
            return self._manifest.frozen[known].copy()
        first = self._manifest.entries("train")[: self._plan.warmup_shards]
        return merged_moments(self.path, first, {known: self.d_in[known]})[known]

    def rows_at_start(self) -> int:
        """Training rows of the first window; 0 when a ring has dropped some, because a training is further on."""
        first = self._manifest.entries("train")[: self._plan.window]
        return 0 if any(entry.dropped for entry in first) else sum(entry.rows for entry in first)

    def numbers(self, split: str, batch_size: int, seed: int, start_step: int) -> Iterator[np.ndarray]:
        """The rows of `batches`, by their numbers within the split; waits for them.

        Raises:
            StageError: when rows that are needed were dropped, in a ring that was used for more than `start_step`.
        """
        if split != "train":
            return super().numbers(split, batch_size, seed, start_step)
        if batch_size < 1 or seed < 0 or start_step < 0:
            raise UsageError(f"batch_size={batch_size}, seed={seed} and start_step={start_step} must not be negative")
        self._batch_size = min(batch_size, self._plan.rows)
        plan = self._plan
        self._pass = Pass(
            range(plan.shards),
            rows_of=self._rows_of,
            begin_of=lambda shard: int(self._reader.begins["train"][shard]),
            window=plan.window,
            seed=(seed, 0),
            reuse=plan.reuse,
        )
        return self._endless(self._pass, seed, start_step)

    def _endless(self, first: Pass, seed: int, start_step: int) -> Iterator[np.ndarray]:
        size = self._batch_size
        self._demand_there(min(first.tick_at(start_step * size), self._plan.shards - self._plan.tail))
        yield from first.batches(size, start_step)
        step = max(0, start_step - first.start(first.n_ticks) // size)
        shards = self._plan.tail if self._plan.drops else self._plan.shards
        begins = self._reader.begins["train"][self._plan.shards - shards :]
        per_epoch = int(begins[-1] - begins[0]) // size
        if not per_epoch:
            raise StageError(
                f"the last {shards} training shards have fewer rows than a batch of {size}, and all others were used",
                hint=f"too many images were skipped ({len(self.skipped)}): lower train.batch_size or train.steps",
            )
        window = shards if self._plan.drops else min(self._plan.window, shards)
        while True:
            epoch, step = divmod(step, per_epoch)
            for rows in epoch_pass(begins - begins[0], window, seed, 1 + epoch).batches(size, step):
                yield rows + begins[0]
            step = (epoch + 1) * per_epoch

    def _rows_of(self, shard: int) -> int:
        while shard + 1 >= len(self._reader.begins["train"]):
            self._manifest = self._ring.wait_for(shard + 1, self._keep)
            self._reader.use(self._manifest.shards)
        return int(np.diff(self._reader.begins["train"][shard : shard + 2])[0])

    def _demand_there(self, first: int) -> None:
        if any(entry.dropped for entry in self._manifest.entries("train")[first:]):
            raise StageError(
                f"the ring {self.path} has dropped rows that this training needs: it was used by one that was further",
                hint="put that training's state back, or delete the buffer to harvest again",
            )

    # For the training loop.

    def keeps_by(self, keep: Callable[[], None]) -> None:
        """Say what makes the training's state durable; called when the harvest waits for room that this would give."""
        self._keep = keep

    def release(self, step: int) -> None:
        """Say that no state before this step will be gone back to."""
        self._ring.release(self._first_needed(step))

    def wants_state(self, step: int) -> bool:
        """Say whether the harvest waits, and a durable state of this step would let it go on for a while."""
        return self._ring.is_short(self._first_needed(step))

    def interrupt(self) -> None:
        """Let whoever waits for rows raise KeyboardInterrupt, with the state kept; a signal's handler may call it."""
        self._ring.interrupt()

    def _first_needed(self, step: int) -> int:
        if self._pass is None:
            return 0
        last = self._plan.shards - self._plan.tail
        return min(self._pass.known_tick_at(step * self._batch_size), last)


def _held_out_bytes(spec: BufferSpec) -> int:
    return sum(shard_bytes(spec, len(plan.images)) for plan in spec.plans() if plan.split != "train")


def _too_small(spec: BufferSpec, capacity: int, needed: int) -> str:
    held_out, shard = _held_out_bytes(spec), shard_bytes(spec, spec.images_per_shard)
    return (
        f"a ring of {capacity / 1e6:.4g} MB is too small: held-out rows take {held_out / 1e6:.4g} MB, and {needed} "
        f"training shards of {shard / 1e6:.4g} MB have to fit beside them: capacity = "
        f"'{(held_out + needed * shard) / 1e6 + 0.1:.1f}MB' or more, or lower images.holdout, images.validation or "
        "buffer.shard_images"
    )
