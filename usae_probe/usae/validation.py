"""R² on validation rows while training runs: what early stopping and the best checkpoint go by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..buffer import ActivationBuffer
from ..config import TrainConfig
from ..errors import ConfigError
from ..world import current
from .model import USAE
from .reconstruction import Matrix, ReconstructionSums
from .records import Best

VALIDATION_ROWS = 2048


def validation_r2(usae: USAE, buffer: ActivationBuffer) -> Matrix | None:
    """Return R² on the first `VALIDATION_ROWS` validation rows, always the same; none with fewer than two.

    Of several processes process 0 measures, for all: what stops a training must not differ in its last bit.
    """
    rows, sites = min(buffer.n_rows("validation"), VALIDATION_ROWS), list(usae.sites)
    if rows < 2:
        return None

    def measured() -> Tensor:
        sums = ReconstructionSums(usae)
        sums.add(buffer.gather("validation", np.arange(rows), sites).values)
        r2 = sums.r2()
        return torch.tensor([[r2[source][target] for target in sites] for source in sites], dtype=torch.float64)

    matrix = current().same(measured, (len(sites), len(sites))).tolist()
    return {source: dict(zip(sites, row, strict=True)) for source, row in zip(sites, matrix, strict=True)}


def cross_r2(r2: Matrix) -> float:
    """Return the mean of R² over ordered pairs of different sites, of the one site's own R² if it is alone.

    Pairs whose target does not vary are left out; NaN when none is left.
    """
    alone = len(r2) == 1
    cells = [r2[source][target] for source in r2 for target in r2[source] if alone or source != target]
    finite = [cell for cell in cells if math.isfinite(cell)]
    return sum(finite) / len(finite) if finite else math.nan


class Watch:
    """The best validation so far, and whether training should stop.

    Validations of the alignment warm-up do not count: what it leaves is no finished model. (Where all steps are
    aligned, they count.)

    Args:
        how: `early_stop` and `keep`.
        buffer: whose validation rows are needed for either.

    Raises:
        ConfigError: when there are none.
    """

    def __init__(self, how: TrainConfig, buffer: ActivationBuffer) -> None:
        self.patience, self.keeps = how.early_stop, how.keep == "best"
        self.best: Best | None = None
        self.waited = 0
        self.weights: dict[str, Tensor] = {}
        rows = buffer.n_rows("validation")
        if rows < 2 and (self.patience or self.keeps):
            key = f"early_stop = {self.patience}" if self.patience else "keep = 'best'"
            raise ConfigError(
                f"{key} goes by R² on validation rows, of which the buffer has {rows}",
                hint="harvest with images.validation above 0, or leave the key out",
            )

    @property
    def stops(self) -> bool:
        """Whether `early_stop` validations in a row brought nothing better."""
        return 0 < self.patience <= self.waited

    def saw(self, step: int, r2: Matrix, usae: USAE) -> None:
        """Take in a validation; weights that are the best so far are copied, when they are wanted."""
        found = cross_r2(r2)
        if not (found > (self.best.cross_r2 if self.best else -math.inf)):
            self.waited += 1
            return
        self.best, self.waited = Best(step, found), 0
        if self.keeps:
            self.weights = {name: value.detach().to("cpu", copy=True) for name, value in usae.state_dict().items()}

    def numbers(self) -> dict[str, Any]:
        """Return its state without the weights."""
        return {"best": list(self.best) if self.best else None, "waited": self.waited}

    def load(self, numbers: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Take over a state that `numbers` and `weights` gave."""
        self.best = Best(*numbers["best"]) if numbers["best"] else None
        self.waited, self.weights = numbers["waited"], weights
