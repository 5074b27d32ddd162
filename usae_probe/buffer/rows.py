"""Rows as they are read, and batches of them as a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .store import ActivationBuffer


class Rows(NamedTuple):
    """Row-paired activations: row i of every site comes from the same image and the same place in it.

    Attributes:
        values: by site, [n, d_in] float32; copies, free to be changed.
        image_index: [n] int64, the image in its source.
        token_index: [n] int32, the row's number within its image.
    """

    values: dict[str, np.ndarray]
    image_index: np.ndarray
    token_index: np.ndarray

    @property
    def n(self) -> int:
        """Number of rows (`len` counts a NamedTuple's fields)."""
        return len(self.image_index)


class BatchDataset:
    """What `ActivationBuffer.dataset` gives: entry t is batch t."""

    def __init__(
        self, buffer: ActivationBuffer, split: str, batch_size: int, seed: int, steps: int, sites: list[str]
    ) -> None:
        self._buffer, self._split, self._sites, self._steps = buffer, split, sites, steps
        self._batches = (batch_size, seed)
        self._next, self._numbers = 0, buffer.numbers(split, batch_size, seed, 0)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Rows:
        if not 0 <= step < self._steps:
            raise IndexError(f"batch {step} of {self._steps}")
        if step < self._next:
            self._next, self._numbers = step, self._buffer.numbers(self._split, *self._batches, step)
        for rows in self._numbers:
            self._next += 1
            if self._next > step:
                return self._buffer.gather(self._split, rows, self._sites)
        raise IndexError(f"batch {step} of {self._steps}")  # not reached: the batches have no end

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_next": self._steps, "_numbers": iter(())}  # no generator can be pickled
