"""Which rows make up which training batch, a function of seed and step alone; and reading them ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ..errors import UsageError
from .shuffle import Pass

Read = TypeVar("Read")
_SHARDS = 3  # of draws


def steps_per_epoch(n_rows: int, batch_size: int) -> int:
    """Whole batches in one pass over `n_rows`; a batch size above `n_rows` counts as `n_rows`.

    Raises:
        UsageError: when there is no row, or no batch size.
    """
    if batch_size < 1 or n_rows < 1:
        raise UsageError(f"no batches of {batch_size} rows can be made from {n_rows} rows; both must be at least 1")
    return n_rows // min(batch_size, n_rows)


def batch_rows(
    begins: np.ndarray, batch_size: int, *, seed: int, start_step: int = 0, window: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the row numbers of batch `start_step`, `start_step + 1`, … without end.

    Epoch e goes through a permutation of all rows drawn from (seed, e), so a run resumed at any step sees what an
    uninterrupted one would. Rows that do not fill a last batch are left out of that epoch.

    Args:
        begins: [shards + 1] the row at which each shard begins, with the row count as last entry.
        batch_size: rows per batch.
        seed: of all epochs.
        start_step: number of the first batch.
        window: shards of the pool that rows are mixed in; the permutation is one of `Pass` then, over shards in an
            order drawn from (seed, e). None: of all rows at once.

    Raises:
        UsageError: when the numbers allow no batch, at the call.
    """
    if seed < 0 or start_step < 0:
        raise UsageError(f"seed={seed} and start_step={start_step} must not be negative")
    n_rows = int(begins[-1])
    steps = steps_per_epoch(n_rows, batch_size)
    return _endless(begins, min(batch_size, n_rows), steps, seed, start_step, window)


def _endless(
    begins: np.ndarray, batch_size: int, steps: int, seed: int, start_step: int, window: int | None
) -> Iterator[np.ndarray]:
    epoch, step = divmod(start_step, steps)
    while True:
        if window is None:
            rows = np.random.default_rng((seed, epoch)).permutation(int(begins[-1]))
            for first in range(step * batch_size, steps * batch_size, batch_size):
                yield rows[first : first + batch_size]
        else:
            yield from epoch_pass(begins, window, seed, epoch).batches(batch_size, step)
        epoch, step = epoch + 1, 0


def epoch_pass(begins: np.ndarray, window: int, seed: int, epoch: int) -> Pass:
    """Return the pass of an epoch over shards that are all there."""
    counts = np.diff(begins)
    return Pass(
        np.random.default_rng((seed, epoch, _SHARDS)).permutation(len(counts)).tolist(),
        rows_of=lambda shard: int(counts[shard]),
        begin_of=lambda shard: int(begins[shard]),
        window=window,
        seed=(seed, epoch),
    )


def read_ahead(read: Callable[[np.ndarray], Read], numbers: Iterator[np.ndarray], workers: int) -> Iterator[Read]:
    """Read batches in their order; with `workers`, so many threads read the next ones meanwhile."""
    if not workers:
        yield from map(read, numbers)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="rows") as pool:
        ahead: deque[Future[Read]] = deque()
        try:
            for rows in numbers:
                ahead.append(pool.submit(read, rows))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for left in ahead:
                left.cancel()
