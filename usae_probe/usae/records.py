"""What a training says of itself: a record per step, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..config import TrainConfig, UsaeConfig
from .losses import Phase
from .model import USAE
from .reconstruction import Matrix


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step.

    Attributes:
        step: number of this step, from 1; `steps` is the last.
        phase: `align` (one support for the sources) or `main`.
        source: site whose code was decoded; `all`, or several joined by ` + `.
        lr: learning rate of the step.
        loss: what was minimised; `losses` error per target site, unweighted; `aux` the auxiliary term, unweighted.
        grad_norm: before clipping.
        dead_share: share of latents that have not fired for `dead_after` steps.
        l0: active latents (z > 0) of a row, in the mean; `penalty` what the sparsity added to the loss.
        r2: R² on validation rows, where it was measured.
        contrastive: the contrastive term, unweighted; none where it is switched off.
        stopped: training stops after this step, because R² on validation rows does not get better (`early_stop`).
    """

    step: int
    steps: int
    phase: Phase
    source: str
    lr: float
    loss: float
    losses: dict[str, float]
    aux: float
    grad_norm: float
    dead_share: float
    l0: float
    penalty: float
    r2: Matrix | None = None
    contrastive: float | None = None
    stopped: bool = False

    def is_kept(self, how: TrainConfig) -> bool:
        """Return whether the history keeps this record: every `log_every`-th, the last, and those with R²."""
        return self.step % how.log_every == 0 or self.step == self.steps or self.r2 is not None

    @property
    def note(self) -> str:
        """What is worth a glance in it."""
        phase = "aligning, " if self.phase == "align" else ""
        stopped = ", stopped early" if self.stopped else ""
        return f"{phase}loss {self.loss:.3f}, dead {self.dead_share:.0%}{stopped}"


class Best(NamedTuple):
    """The best validation of a training.

    Attributes:
        step: when.
        cross_r2: R² on validation rows, mean over ordered pairs of different sites (of the one site, if it is alone).
    """

    step: int
    cross_r2: float


class TrainResult(NamedTuple):
    """A trained USAE.

    Attributes:
        usae: the USAE, with the weights that `keep` asked for.
        history: the records kept of its training.
        seconds: how long it took, in all its parts if it was stopped between.
        usae_config, train_config: the settings it was trained with.
        taken: steps taken; `planned` those that the settings asked for.
        best: the best validation; none without validations in the main phase.
        last: with `keep = "best"` the USAE with the weights of the last step; else none.
        resumed: steps that an earlier training, which was stopped, had taken; 0 for one that began anew.
    """

    usae: USAE
    history: list[StepRecord]
    seconds: float
    usae_config: UsaeConfig
    train_config: TrainConfig
    taken: int = 0
    planned: int = 0
    best: Best | None = None
    last: USAE | None = None
    resumed: int = 0

    @property
    def note(self) -> str:
        """What is worth saying: that it went on from a step, stopped early, and which step's weights it has."""
        parts = []
        if self.resumed:
            parts.append(f"went on from step {self.resumed}")
        if self.taken < self.planned:
            parts.append(f"stopped early at step {self.taken} of {self.planned}")
        if self.best and (self.last is not None or self.taken < self.planned):
            kept = "kept" if self.last is not None else "best"
            parts.append(f"{kept} step {self.best.step} (cross-R² {self.best.cross_r2:.3f} on validation rows)")
        return ", ".join(parts)
