"""Which rows make up which training batch: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import UsageError


def steps_per_epoch(n_rows: int, batch_size: int) -> int:
    """Whole batches in one pass over `n_rows`; a batch size above `n_rows` counts as `n_rows`.

    Raises:
        UsageError: when there is no row, or no batch size.
    """
    if batch_size < 1 or n_rows < 1:
        raise UsageError(f"no batches of {batch_size} rows can be made from {n_rows} rows; both must be at least 1")
    return n_rows // min(batch_size, n_rows)


def batch_rows(n_rows: int, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[np.ndarray]:
    """Yield the row numbers of batch `start_step`, `start_step + 1`, … without end.

    Epoch e goes through a permutation of all rows drawn from (seed, e), so a run resumed at any step sees what an
    uninterrupted one would. Rows that do not fill a last batch are left out of that epoch.

    Raises:
        UsageError: when the numbers allow no batch, at the call.
    """
    if seed < 0 or start_step < 0:
        raise UsageError(f"seed={seed} and start_step={start_step} must not be negative")
    steps = steps_per_epoch(n_rows, batch_size)
    return _endless(n_rows, min(batch_size, n_rows), steps, seed, start_step)


def _endless(n_rows: int, batch_size: int, steps: int, seed: int, start_step: int) -> Iterator[np.ndarray]:
    epoch, step = divmod(start_step, steps)
    while True:
        rows = np.random.default_rng((seed, epoch)).permutation(n_rows)
        for first in range(step * batch_size, steps * batch_size, batch_size):
            yield rows[first : first + batch_size]
        epoch, step = epoch + 1, 0
