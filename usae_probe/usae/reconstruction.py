"""R² of self- and cross-reconstruction, streaming: memory does not grow with the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..buffer import Moments
from .kernels import Codes
from .model import USAE

Matrix = dict[str, dict[str, float]]
"""{source site: {target site: number}}."""


def empty_matrix(sites: Iterable[str]) -> Matrix:
    """Return a matrix of NaN over some sites."""
    names = list(sites)
    return {source: dict.fromkeys(names, float("nan")) for source in names}


class ReconstructionSums:
    """Running sums for R²[i][j] = 1 − SSE_ij / SST_j, code of site i decoded to site j.

    SSE_ij = Σ_rows ‖x_j − x̂_j(z_i)‖²; SST_j = Σ_rows ‖x_j − mean_j‖² about the per-dimension mean of the same rows.
    For `r2_global_mean` SST is taken about one scalar mean over all rows and dimensions, which makes predicting the
    per-dimension mean look good; it is for comparison with published figures only.
    """

    def __init__(self, usae: USAE) -> None:
        self.usae = usae
        self.n_rows = 0
        self._sse = np.zeros((len(usae.sites), len(usae.sites)))
        self._moments = {site: Moments(d) for site, d in usae.d_in.items()}

    @torch.no_grad()
    def add(self, rows: Mapping[str, np.ndarray]) -> dict[str, Codes]:
        """Add paired rows of every site, [b, d_in] each in the models' own units; returns each site's codes."""
        usae, device = self.usae, self.usae.W_dec.device
        x = {site: usae.normalise(torch.from_numpy(rows[site]).to(device), site) for site in usae.sites}
        stacked = torch.cat(list(x.values()), dim=1)
        self._add_stacked(stacked)
        codes = {}
        for i, site in enumerate(usae.sites):
            coded = usae.code(x[site], site)
            codes[site] = coded.support.codes(coded.values)
            self._add_errors(i, stacked - usae.decode_all(coded.values, coded.support))
        for site, moments in self._moments.items():
            moments.update(rows[site])
        self.n_rows += len(stacked)
        return codes

    def r2(self) -> Matrix:
        """Return R² about the per-dimension mean; NaN where a target does not vary."""
        return self._matrix([self._moments[site].m2.sum() for site in self.usae.sites])

    def r2_global_mean(self) -> Matrix:
        """Return R² about one scalar mean per site."""
        return self._matrix([self._moments[site].pooled_m2() for site in self.usae.sites])

    def _add_errors(self, source: int, error: Tensor) -> None:
        """Take in the errors of one source's code, normalised, [b, Σ d_in]."""
        squares = error.double().square().sum(0)
        sums = [squares[self.usae.columns[site]].sum() for site in self.usae.sites]
        self._sse[source] += (torch.stack(sums) * self.usae.scale.double() ** 2).cpu().numpy()

    def _add_stacked(self, stacked: Tensor) -> None:
        """Take in the normalised rows of all sites, [b, Σ d_in]; the plain sums need nothing of them."""

    def _matrix(self, totals: list[float]) -> Matrix:
        sites = self.usae.sites
        return {
            source: {
                target: float(1.0 - self._sse[i, j] / totals[j]) if totals[j] > 0 else float("nan")
                for j, target in enumerate(sites)
            }
            for i, source in enumerate(sites)
        }
