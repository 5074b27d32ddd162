"""Running moments: how many rows, their mean and their sum of squares, per dimension and in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UsageError

# Rows turned into float64 at a time; the grouping is part of the result's last bits, so it is no option.
_BLOCK = 4096


class Moments:
    """Count, mean and sum of squared deviations of rows seen so far, per dimension.

    Blocks are merged by Chan, Golub and LeVeque (1979): with δ = mean_b − mean_a and n = n_a + n_b,
    mean = mean_a + δ·n_b/n and M2 = M2_a + M2_b + δ²·n_a·n_b/n. Stable for means far from zero, where E[x²] − E[x]²
    cancels.

    Attributes:
        n: rows seen.
        mean: [d] float64; zeros while n = 0.
        m2: [d] float64, Σ (x − mean)² per dimension: SST about the per-dimension mean.

    >>> moments = Moments(2)
    >>> moments.update(np.array([[1.0, 10.0], [3.0, 10.0]]))
    >>> moments.n, moments.mean.tolist(), moments.variance.tolist()
    (2, [2.0, 10.0], [1.0, 0.0])
    """

    def __init__(self, d: int) -> None:
        self.n = 0
        self.mean = np.zeros(d)
        self.m2 = np.zeros(d)

    def update(self, rows: np.ndarray) -> None:
        """Take in `rows` [n, d] of any float dtype.

        Raises:
            UsageError: when `rows` is not [n, d] with this object's d.
        """
        if rows.ndim != 2 or rows.shape[1] != self.d:
            raise UsageError(f"moments of {self.d} dimensions were given rows of shape {list(rows.shape)}")
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK].astype(np.float64)
            shift = block[0].copy()  # sums of differences keep digits that sums of large values lose
            block -= shift
            mean = block.mean(axis=0)
            self._merge(len(block), shift + mean, np.square(block - mean).sum(axis=0))

    def merge(self, other: Moments) -> None:
        """Take in everything that `other` has seen.

        Raises:
            UsageError: when `other` has another number of dimensions.
        """
        if other.d != self.d:
            raise UsageError(f"moments of {self.d} dimensions cannot take in those of {other.d}")
        self._merge(other.n, other.mean, other.m2)

    def _merge(self, n_b: int, mean_b: np.ndarray, m2_b: np.ndarray) -> None:
        if n_b == 0:
            return
        n = self.n + n_b
        delta = mean_b - self.mean
        self.mean = self.mean + delta * (n_b / n)
        self.m2 = self.m2 + m2_b + np.square(delta) * (self.n * n_b / n)
        self.n = n

    @property
    def d(self) -> int:
        """Number of dimensions."""
        return len(self.mean)

    @property
    def variance(self) -> np.ndarray:
        """[d] population variance M2 / n; zeros while n = 0."""
        return self.m2 / max(self.n, 1)

    def pooled_m2(self) -> float:
        """SST about ONE scalar mean over all rows and dimensions: Σ M2 + n·Σ (mean − mean over dimensions)²."""
        return float(self.m2.sum() + self.n * np.square(self.mean - self.mean.mean()).sum())

    def copy(self) -> Moments:
        """An independent copy."""
        return Moments.of(self.n, self.mean, self.m2)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; floats survive a round trip bit for bit."""
        return {"n": self.n, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def of(cls, n: int, mean: np.ndarray, m2: np.ndarray) -> Moments:
        """Moments that were found before; copies are kept."""
        moments = cls(len(mean))
        moments.n, moments.mean, moments.m2 = n, np.array(mean, dtype=np.float64), np.array(m2, dtype=np.float64)
        return moments

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Moments:
        """Back from `to_dict`."""
        return cls.of(int(values["n"]), np.array(values["mean"]), np.array(values["m2"]))

    def __repr__(self) -> str:
        return f"Moments(n={self.n}, d={self.d})"
