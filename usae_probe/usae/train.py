"""Training: records are yielded, nothing is printed, and no model's name is known here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..buffer import ActivationBuffer, OnlineBuffer
from ..config import TrainConfig, UsaeConfig, settled
from ..errors import ConfigError
from ..files import json_sha256
from ..world import World
from .interrupts import held_interrupts
from .model import USAE
from .records import Best, StepRecord, TrainResult
from .schedule import learning_rate, phase_and_source
from .start import usae_for
from .state import TrainingState
from .training import Training

__all__ = [
    "Best",
    "StepRecord",
    "TrainResult",
    "learning_rate",
    "phase_and_source",
    "train",
    "train_steps",
    "usae_for",
]


def train(
    buffer: ActivationBuffer,
    *,
    sites: list[str] | None = None,
    usae_config: UsaeConfig | None = None,
    train_config: TrainConfig | None = None,
    progress: Callable[[StepRecord], None] | None = None,
    resume: str | Path | None = None,
    world: World | None = None,
    labels: np.ndarray | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a USAE from a buffer's training rows.

    Args:
        buffer: row-paired activations.
        sites: which of its sites; default: all. One site trains an independent SAE.
        usae_config, train_config: settings as read from a config file.
        progress: called with every step's record.
        resume: file to keep the training's state in, about once a minute and on Ctrl-C. If it holds the state of this
            very training (same buffer, sites and settings), training goes on from there and ends with the same weights,
            on CPU bit for bit, as if it had not been stopped; the records are then those from there on. The caller
            removes it.
        world: the processes that train together, from `usae_probe.usae.distributed.joined`, each of which calls this;
            process 0 alone writes the state. Default: this process alone.
        labels: [images of the source] a whole number for every image, which `pairing = "label"` goes by.
        settings: or single settings by the config's names: `n_latents`, `k`, `epochs`, `steps`, `batch_size`, `lr`, …

    Returns:
        the USAE, the records of every `log_every`-th step, of the last and of those with a validation R², and the
        seconds spent, also before it was stopped.

    Raises:
        ConfigError: for an unknown setting or a value out of range, or batches that `world` cannot divide equally.
        NonFiniteError: when a loss, a gradient or a weight is not finite, naming step, site and the last good state.
        KeyboardInterrupt: at the end of the step in which Ctrl-C was pressed, with the state kept; at once on a second.

    Example:
        `run = up.train(buffer, n_latents=2042, k=64, epochs=100)`
    """
    if settings.get("tensorboard"):
        raise ConfigError(
            "train() has no run folder for TensorBoard's files", hint="give progress=TensorBoardCallback(folder)"
        )
    shape, how = settled((usae_config or UsaeConfig(), train_config or TrainConfig()), settings)
    world = world or World()
    training = Training(usae_for(buffer, shape, how, sites=sites, world=world), buffer, how, world, labels)
    state = None
    if resume:
        state = TrainingState(Path(resume), _depends_on(training, shape, labels), reads_only=not world.main)
        state.restore(training)
    resumed, history = training.step, []
    online = training.buffer if isinstance(training.buffer, OnlineBuffer) else None
    with held_interrupts(*([online.interrupt] if online else [])) as interrupted:
        for record in _kept(training, state, interrupted):
            if record.is_kept(how):
                history.append(record)
            if progress:
                progress(record)
    return TrainResult(
        usae=training.usae,
        history=history,
        seconds=training.seconds,
        usae_config=shape,
        train_config=how,
        taken=training.step,
        planned=training.steps,
        best=training.watch.best,
        last=training.last,
        resumed=resumed,
    )


def train_steps(
    usae: USAE, buffer: ActivationBuffer, how: TrainConfig, state: TrainingState | None = None
) -> Iterator[StepRecord]:
    """Train `usae` in place and yield a record per step; step t depends on seed and t alone.

    Once all records have been taken, the USAE has the weights that `keep` and `ema` ask for, and is in evaluation mode.

    Raises:
        ConfigError: when the settings do not fit the model or the buffer.
        NonFiniteError: when a loss, a gradient or a weight is not finite.
    """
    training = Training(usae, buffer, how)
    if state:
        state.restore(training)
    yield from _kept(training, state, lambda: False)


def _kept(training: Training, state: TrainingState | None, interrupted: Callable[[], bool]) -> Iterator[StepRecord]:
    """Yield the records of the steps that are left, and keep the state after each is out: it never runs ahead of them.

    Raises:
        KeyboardInterrupt: when `interrupted` says so, once the state is kept.
    """
    online = training.buffer if isinstance(training.buffer, OnlineBuffer) else None

    def keep(at_once: bool = True) -> None:
        if state:
            state.keep(training, at_once=at_once)
        if online:  # rows are used up once no durable state goes back to them; without states, at once
            online.release(state.holds if state else training.step)

    if online:
        online.keeps_by(keep)
    for record in training.records(state.last_good if state else None):
        yield record
        stop = training.world.anyone(interrupted())
        keep(stop or (online is not None and online.wants_state(training.step)))
        if stop:
            raise KeyboardInterrupt


def _depends_on(training: Training, shape: UsaeConfig, labels: np.ndarray | None) -> dict[str, Any]:
    how, buffer = training.how, training.buffer
    idle = {"log_every", "tensorboard", "workers"}
    if not how.early_stop and how.keep == "last":
        idle |= {"validate_every"}
    settings = how.model_dump(exclude=idle)
    known = {"buffer": buffer.identity, "sites": training.usae.sites, "usae": shape.model_dump(), "train": settings}
    if how.pairing == "label" and labels is not None:
        known["labels"] = json_sha256(labels.tolist())
    if isinstance(buffer, OnlineBuffer):
        return known | {"online": asdict(buffer.plan)}
    return known if buffer.pool() is None else known | {"pool": buffer.pool()}
