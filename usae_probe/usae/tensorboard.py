"""Records for TensorBoard; `torch.utils.tensorboard` is imported when the first record comes, not before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigError
from .records import StepRecord
from .validation import cross_r2


class TensorBoardCallback:
    """Writes each record's figures as scalars: `loss/…`, `validation/…` and `training/…`, by step.

    As a context manager it closes its file. A training that goes on at step t replaces what an earlier one wrote from t
    on (`purge_step`).

    Args:
        folder: where TensorBoard's event files go; `tensorboard --logdir FOLDER` shows them.

    Raises:
        ConfigError: when the package `tensorboard` is not installed.

    Example:
        `run = up.train(buffer, progress=TensorBoardCallback("logs"), steps=4000)`
    """

    def __init__(self, folder: str | Path) -> None:
        check_tensorboard()
        self.folder = Path(folder)
        self._writer: Any = None

    def __call__(self, record: StepRecord) -> None:
        """Write one record."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=record.step)
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, record.step)

    def close(self) -> None:
        """Write what is still in memory, and close the file; a later record opens another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TensorBoardCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_tensorboard() -> None:
    """Check, without importing it, that the package `tensorboard` is there.

    Raises:
        ConfigError: when it is not.
    """
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "the package tensorboard is not installed, which train.tensorboard and TensorBoardCallback need",
            hint="pip install tensorboard, or leave it out",
        )


def scalars(record: StepRecord) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of all figures of a record that are numbers."""
    yield "loss/total", record.loss
    for site, loss in record.losses.items():
        yield f"loss/{site}", loss
    yield "loss/aux", record.aux
    yield "loss/penalty", record.penalty
    if record.contrastive is not None:
        yield "loss/contrastive", record.contrastive
    yield "training/lr", record.lr
    yield "training/gradient norm", record.grad_norm
    yield "training/dead share", record.dead_share
    yield "training/active latents per row", record.l0
    if record.r2 is None:
        return
    cells = [(f"{source} to {target}", value) for source, row in record.r2.items() for target, value in row.items()]
    for name, value in [*cells, ("mean cross-R²", cross_r2(record.r2))]:
        if math.isfinite(value):
            yield f"validation/{name}", value
