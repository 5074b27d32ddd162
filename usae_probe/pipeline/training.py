"""The train stage: weights, history and, where wanted, TensorBoard's files of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import UsaeProbeWarning
from ..usae import HistoryFile, StepRecord, TensorBoardCallback, TrainResult, World, train
from .source import labels_of

STATE = "training-state.safetensors"


def buffer_of(config: RunConfig, folder: Path) -> ActivationBuffer:
    """Open the buffer of a run folder as a config says."""
    return ActivationBuffer(folder / "buffer", verify=config.buffer.verify, memory_budget=config.buffer.memory)


def train_in(
    folder: Path,
    config: RunConfig,
    buffer: ActivationBuffer,
    progress: Callable[[StepRecord], None],
    world: World | None = None,
    labels: np.ndarray | None = None,
) -> TrainResult:
    """Train, and save the weights that the run keeps; an earlier training that was stopped goes on.

    Args:
        folder: the run folder; made if need be.
        config: `[usae]` and `[train]`.
        buffer: the activations.
        progress: called with every step's record, once it is in the history.
        world: the processes that train together, of which this is process 0; the others are in `help_train`.
        labels: of all images, for `pairing = "label"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, world = folder / STATE, world or World()
    with ExitStack() as closing:
        history = closing.enter_context(HistoryFile(folder / "history.jsonl"))
        board = None
        if config.train.tensorboard:
            board = closing.enter_context(TensorBoardCallback(folder / "tensorboard"))

        def follow(record: StepRecord) -> None:
            history.add(record, keep=record.is_kept(config.train))
            if board:
                board(record)
            progress(record)

        world.tell("train")
        done = train(
            buffer,
            usae_config=config.usae,
            train_config=config.train,
            progress=follow,
            resume=state,
            world=world,
            labels=labels,
        )
    _save(done, folder)
    state.unlink(missing_ok=True)
    return done


def help_train(folder: Path, config: RunConfig, world: World) -> None:
    """Do what processes other than 0 do in a run: wait until process 0 trains or need not, train with it, and leave.

    They need the run folder of process 0, and write nothing into it.

    Raises:
        WorkerError: when process 0 fails.
    """
    if world.hear() == "train":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UsaeProbeWarning)  # process 0 says them
            train(
                buffer_of(config, folder),
                usae_config=config.usae,
                train_config=config.train.model_copy(update={"tensorboard": False}),
                resume=folder / STATE,
                world=world,
                labels=labels_of(config),
            )


def kernel_of(done: TrainResult) -> dict[str, Any] | None:
    """Return which kernel trained, for the record; none for the published recipe, whose products are its own.

    Returns:
        its `name`; its `reason`: asked for, picked by `auto`, or in the place of one that cannot run; its `precision`;
        and `dense`, the share of products for which z was not sparse enough to stay so.
    """
    if done.train_config.recipe == "published":
        return None
    kernel = done.usae.kernel
    return {
        "name": kernel.name,
        "reason": kernel.reason,
        "precision": kernel.precision,
        "dense": round(kernel.dense, 4),
    }


def kernel_note(kernel: Mapping[str, Any] | None) -> str:
    """Say in a few words what `kernel_of` returned."""
    if kernel is None:
        return ""
    said = f"kernel {kernel['name']}{', bf16' if kernel['precision'] == 'bf16' else ''}"
    mixed = f"; {kernel['dense']:.0%} of its products dense" if kernel["name"] == "csr" and kernel["dense"] else ""
    return f"{said} ({kernel['reason']}{mixed})"


def _save(done: TrainResult, folder: Path) -> None:
    """Save the weights that the run keeps, and beside them those of the last step where these are others."""
    last = folder / "usae-last.safetensors"
    if done.last is not None:
        done.last.save(last)
    else:
        for left in (last, last.with_suffix(".json")):
            left.unlink(missing_ok=True)
    done.usae.save(folder / "usae.safetensors")
