"""R² on held-out rows with what surrounds it: intervals over images, and how it differs between dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..usae import USAE, Codes, Matrix, ReconstructionSums
from .intervals import Interval, Resamples

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class HeldOutSums(ReconstructionSums):
    """Sums for R², also by group of images and by dimension.

    Args:
        usae: the USAE.
        groups: of images.
    """

    def __init__(self, usae: USAE, groups: int) -> None:
        super().__init__(usae)
        m, total = len(usae.sites), sum(usae.d_in.values())
        self._group = torch.zeros(0, dtype=torch.long)
        self._n = torch.zeros(groups, dtype=torch.float64)
        self._errors = torch.zeros(groups, m, m, dtype=torch.float64)
        self._squares = torch.zeros(groups, m, dtype=torch.float64)
        self._sums = torch.zeros(groups, total, dtype=torch.float64)
        self._by_dimension = torch.zeros(m, total, dtype=torch.float64)

    def add_rows(self, rows: Mapping[str, np.ndarray], group: np.ndarray) -> dict[str, Codes]:
        """Add paired rows of every site with the group of each row's image; returns each site's codes."""
        self._group = torch.from_numpy(group.astype(np.int64))
        return self.add(rows)

    def intervals(self, resamples: Resamples) -> dict[str, dict[str, Interval]]:
        """Return the 95 % interval of every R²; see `Resamples.r2`."""
        sites, scale = self.usae.sites, self.usae.scale.double().cpu().numpy()
        mean, n = self._sums.sum(0) / max(float(self._n.sum()), 1.0), self._n[:, None]
        cross, mass = (self._sums * mean), mean.square()
        of_sites = [self.usae.columns[site] for site in sites]
        sst = torch.stack(
            [
                self._squares[:, j] - 2 * cross[:, columns].sum(1) + n[:, 0] * mass[columns].sum()
                for j, columns in enumerate(of_sites)
            ],
            dim=1,
        )
        low, high = resamples.r2(self._errors.numpy() * scale**2, sst.clamp_min(0).numpy() * scale**2)
        return {
            source: {target: Interval(float(low[i, j]), float(high[i, j])) for j, target in enumerate(sites)}
            for i, source in enumerate(sites)
        }

    def quantiles(self) -> dict[str, dict[str, list[float]]]:
        """Return, per source and target, quantiles over the target's dimensions of R² of a single dimension.

        R²_d = 1 − SSE_d / SST_d; dimensions that do not vary are left out. Levels: 5, 25, 50, 75 and 95 %.
        """
        return {
            source: {target: self._of_dimensions(i, j, target) for j, target in enumerate(self.usae.sites)}
            for i, source in enumerate(self.usae.sites)
        }

    def _of_dimensions(self, source: int, j: int, target: str) -> list[float]:
        total = self._moments[target].m2
        errors = self._by_dimension[source, self.usae.columns[target]].numpy() * float(self.usae.scale[j]) ** 2
        varies = total > 0
        if not varies.any():
            return [float("nan")] * len(QUANTILES)
        found: list[float] = np.quantile(1.0 - errors[varies] / total[varies], QUANTILES).tolist()
        return found

    def _add_errors(self, source: int, error: Tensor) -> None:
        squares = error.square().cpu()
        self._by_dimension[source] += squares.sum(0, dtype=torch.float64)
        by_site = [squares[:, self.usae.columns[site]].sum(1, dtype=torch.float64) for site in self.usae.sites]
        self._errors[:, source].index_add_(0, self._group, torch.stack(by_site, dim=1))
        sums = torch.stack(by_site).sum(1) * self.usae.scale.double().cpu() ** 2
        self._sse[source] += sums.numpy()

    def _add_stacked(self, stacked: Tensor) -> None:
        values = stacked.double().cpu()
        self._n.index_add_(0, self._group, torch.ones(len(values), dtype=torch.float64))
        self._sums.index_add_(0, self._group, values)
        squares = [values[:, self.usae.columns[site]].square().sum(1) for site in self.usae.sites]
        self._squares.index_add_(0, self._group, torch.stack(squares, dim=1))


def share_of(r2: Matrix, reference: Matrix) -> Matrix:
    """Return R² as a share of a reference's, by source and target; NaN where the reference is not above 0."""
    return {
        source: {
            target: value / reference[source][target] if reference[source][target] > 0 else float("nan")
            for target, value in row.items()
        }
        for source, row in r2.items()
    }
