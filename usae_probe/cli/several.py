"""Several processes that torchrun started: which commands they may give, and how they work together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, WorkerError

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..pipeline import Stage
    from ..usae import World


def demand_alone() -> None:
    """Refuse to be one of several processes; process 0 says so, for all.

    Raises:
        UsageError: in process 0.
        WorkerError: in the others, marked as told.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if several and os.environ.get("RANK") != "0":
        raise WorkerError("this command works in one process", told=True)
    if several:
        raise UsageError(
            f"this command works in one process, {os.environ['WORLD_SIZE']} were started",
            hint="only run, harvest, train and evaluate can be started by torchrun",
        )


@contextmanager
def together() -> Iterator[World | None]:
    """Join the processes that torchrun started with this one; nothing is imported for a process alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    from ..usae.distributed import joined

    with joined() as world:
        yield world


def help_process_0(config: RunConfig, folder: Path, stages: tuple[Stage, ...] | None, world: World) -> None:
    """Harvest and train with process 0, which does all the rest."""
    from ..pipeline import help_harvest, help_train

    if stages is None or "harvest" in stages:
        help_harvest(folder, config, world)
    if stages is None or "train" in stages:
        help_train(folder, config, world)
