"""Online training: a USAE learns from activations while they are harvested, on more of them than the disk holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .buffer import BufferSpec, BufferWriter, OnlineBuffer, OnlinePlan, Ring
from .config import BufferConfig, ImagesConfig, TrainConfig, UsaeConfig, settled
from .errors import ConfigError
from .files import json_sha256
from .harvesting import HarvestProgress, buffer_spec, demand_training_rows, fill
from .hooks import HookedModel
from .images import ImageSource, open_source
from .usae import StepRecord, TrainResult, train

_IDLE = {"log_every", "tensorboard", "kernel", "device", "workers"}
"""Settings of a training that its weights do not depend on, or only in their last bits."""


@dataclass(frozen=True, eq=False)
class Online:
    """What a harvest with a training along with it is to do; see `plan_online`.

    Attributes:
        spec: of the buffer.
        plan: how it is trained from.
        train: the training's settings, with their number of steps.
    """

    spec: BufferSpec
    plan: OnlinePlan
    train: TrainConfig


def plan_online(spec: BufferSpec, store: BufferConfig, shape: UsaeConfig, how: TrainConfig) -> Online:
    """Say how a training goes along with the harvest of `spec`.

    Raises:
        ConfigError: when the ring is too small, or the settings ask for rows more often than a ring gives them.
    """
    plan = OnlinePlan.of(
        spec,
        batch_size=how.batch_size,
        memory=store.memory,
        warmup_rows=store.warmup_rows,
        reuse=store.reuse,
        capacity=store.capacity,
    )
    if not plan.drops:
        return Online(spec, plan, how)
    most = max(1, plan.reuse * plan.rows // min(how.batch_size, plan.rows))
    if how.epochs is not None and how.epochs > plan.reuse:
        raise ConfigError(
            f"train.epochs = {how.epochs:g}, but a ring gives every row buffer.reuse = {plan.reuse} times",
            hint=f"leave epochs out: the training then has the {most} steps that the rows are enough for; or set reuse",
        )
    if how.steps is not None and how.steps > most:
        raise ConfigError(
            f"train.steps = {how.steps}, but {plan.rows} training rows, each buffer.reuse = {plan.reuse} times, are "
            f"enough for {most} steps of {how.batch_size}",
            hint="harvest more images, raise buffer.reuse, or lower train.steps",
        )
    steps = most if how.steps is None and how.epochs is None else how.n_steps(most // plan.reuse)
    settings = how.model_dump(exclude=_IDLE) | {"steps": steps, "epochs": None}
    training = json_sha256({"usae": shape.model_dump(), "train": settings})
    how = how.model_copy(update={"steps": steps, "epochs": None})
    return Online(replace(spec, ring=plan.ring(training)), plan, how)


def harvest_and_train(
    models: Sequence[HookedModel],
    images: Any,
    out: str | Path,
    *,
    images_config: ImagesConfig | None = None,
    buffer_config: BufferConfig | None = None,
    usae_config: UsaeConfig | None = None,
    train_config: TrainConfig | None = None,
    resume: str | Path | None = None,
    harvest_progress: Callable[[HarvestProgress], None] | None = None,
    progress: Callable[[StepRecord], None] | None = None,
    **settings: Any,
) -> TrainResult:
    """Harvest into a buffer, and train from its sealed shards meanwhile.

    With `mode="ring"` training rows are dropped once they are used, so that the buffer never takes more than `capacity`
    on disk; otherwise all are kept, and only the first pass over them goes along. Training and harvest wait for one
    another where they have to. The weights depend on seeds, settings and rows, not on which of them was faster.

    Args:
        models: hooked models with layers, with different names.
        images: as for `harvest`.
        out: the buffer's folder.
        images_config, buffer_config, usae_config, train_config: settings as read from a config file.
        resume: file to keep the training's state in, as for `train`. With it an interrupted run goes on when it is
            called again; without it, a ring cannot.
        harvest_progress, progress: called after every batch of images (in another thread), and after every step.
        settings: or single settings by the config's names: `capacity`, `reuse`, `limit`, `n_latents`, `k`, …

    Raises:
        ConfigError: when the ring is too small, or settings do not fit.
        StageError: when a ring has dropped rows that this training needs.
        Exception: as `harvest` and `train` do.

    Example:
        `run = up.harvest_and_train([resnet, vit], "imagenet/", out="ring", mode="ring", capacity="20GB")`
    """
    given = (
        images_config or ImagesConfig(source=""),
        buffer_config or BufferConfig(),
        usae_config or UsaeConfig(),
        train_config or TrainConfig(),
    )
    pictures, store, shape, how = settled(given, _without_seed(settings))
    source = images if isinstance(images, ImageSource) else open_source(images, options=pictures.options)
    online = plan_online(buffer_spec(models, source, pictures, store), store, shape, how)

    def trained(buffer: OnlineBuffer) -> TrainResult:
        return train(buffer, usae_config=shape, train_config=online.train, progress=progress, resume=resume)

    def filled(writer: BufferWriter, ring: Ring) -> None:
        fill(writer, models, source, pictures, progress=harvest_progress, ring=ring)

    return along(out, online, store, filled, trained, describe=source.describe)


def along(
    out: str | Path,
    online: Online,
    store: BufferConfig,
    filled: Callable[[BufferWriter, Ring], None],
    trained: Callable[[OnlineBuffer], TrainResult],
    *,
    describe: Callable[[int], str] | None = None,
) -> TrainResult:
    """Write a buffer in a thread of its own while `trained` trains in this one; returns what that returns.

    Args:
        out: the buffer's folder.
        online: the plan.
        store: `capacity` and `verify`, of the settings that the plan was made of.
        filled: writes the shards that the writer lacks, in the thread: asks the ring for room and tells it of each.
        trained: does the training; the writing is stopped when it raises.
        describe: name of an image by its index, for error messages.
    """
    with BufferWriter(out, online.spec, describe=describe) as writer:
        ring = Ring(writer, store.capacity)

        def produce() -> None:
            try:
                filled(writer, ring)
                ring.end()
            except BaseException as error:  # whatever it is, it is raised where it is waited for
                ring.end(error)

        producer = threading.Thread(target=produce, name="harvest", daemon=True)
        try:
            producer.start()
            done = trained(OnlineBuffer(ring, writer.path, online.plan, verify=store.verify))
            if not online.plan.drops:
                ring.wait_for_end(producer)  # the rest is kept, though this training did not need it
        finally:
            # A thread that computes while the interpreter ends takes the process down with a core dump: a second Ctrl-C
            # waits for its batch too, a third one leaves. Not in a function: it could be interrupted on entering that.
            try:
                ring.stop()
                ring.wait_for_end(producer)
            except KeyboardInterrupt:
                ring.stop()
                ring.wait_for_end(producer)
                raise
        if ring.error:
            raise ring.error
        demand_training_rows(writer.close(early=online.plan.drops))
        return done


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    """`seed` and `batch_size` are keys of images and of the training: one value would go to both."""
    for key in ("seed", "batch_size"):
        if key in settings:
            raise ConfigError(
                f"'{key}' is a setting of the images and of the training",
                hint=f"give images_config=ImagesConfig(source='', {key}=…) or train_config=TrainConfig({key}=…)",
            )
    return settings
