"""The buffer of a run folder: opened as the config says, discarded when it is of no use, filled along with training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ..buffer import SCHEMA, ActivationBuffer, BufferSpec, BufferWriter, Ring, discard_buffer
from ..config import RunConfig
from ..errors import BufferIntegrityError, UsaeProbeWarning
from ..harvesting import HarvestProgress, fill, harvest
from ..hooks import HookedModel
from ..images import ImageSource
from ..online import along, plan_online
from ..split import SPLITS
from ..usae import StepRecord, TrainResult
from ..world import World
from .models import attach_all
from .source import images_of, labels_of
from .training import STATE, train_in


def discard_other_buffer(folder: Path, spec: BufferSpec, *, state: Path | None = None) -> None:
    """Remove a buffer that lacks shards or is made from something else; called once all that is new is checked.

    Args:
        folder: the buffer's.
        spec: of what is wanted.
        state: of the training that a ring is for; without it, one that has dropped rows is of no use.

    Raises:
        BufferIntegrityError: for a manifest that cannot be read, of a newer schema say: nothing is removed then.
        FolderLockedError: when another process is writing to it.
    """
    if not folder.is_dir() or ((folder / "manifest.json").exists() and _serves(folder, spec, state)):
        return
    _say_what_goes(folder, spec)
    discard_buffer(folder)


def _say_what_goes(folder: Path, spec: BufferSpec) -> None:
    """Warn of an unfinished harvest of something else; of a finished one the run says why it is redone."""
    with suppress(BufferIntegrityError):
        buffer = ActivationBuffer(folder)
        done = sum(buffer.n_images(split) for split in SPLITS)
        if done and not buffer.complete and buffer.identity != spec.identity():
            warnings.warn(
                f"an unfinished harvest of other images, models or settings is in '{folder}': its {done:,} images are "
                "discarded, and harvested anew",
                UsaeProbeWarning,
                stacklevel=4,
            )


def _serves(folder: Path, spec: BufferSpec, state: Path | None) -> bool:
    buffer = ActivationBuffer(folder)
    try:
        buffer.demand_present()
    except BufferIntegrityError:
        return False
    used_up = any(entry.dropped for entry in buffer.shards) and not (state and state.exists())
    continues = buffer.complete or buffer.schema == SCHEMA  # what an older version began, this one cannot go on with
    return buffer.identity == spec.identity() and continues and not used_up


def train_along(
    folder: Path,
    config: RunConfig,
    source: ImageSource,
    models: Sequence[HookedModel],
    spec: BufferSpec,
    *,
    harvested: Callable[[HarvestProgress], None],
    trained: Callable[[StepRecord], None],
) -> TrainResult:
    """Harvest into a run folder's buffer and train from it meanwhile; goes on where either was stopped.

    Args:
        folder: the run folder.
        config: of the run.
        source: the images.
        models: hooked models with layers.
        spec: of the buffer that these make.
        harvested: called after every batch of images, in another thread.
        trained: called with every step's record.
    """
    online = plan_online(spec, config.buffer, config.usae, config.train)
    discard_other_buffer(folder / "buffer", online.spec, state=folder / STATE)
    settled = config.model_copy(update={"train": online.train})

    def filled(writer: BufferWriter, ring: Ring) -> None:
        fill(writer, models, source, config.images, progress=harvested, ring=ring)

    return along(
        folder / "buffer",
        online,
        config.buffer,
        filled,
        lambda buffer: train_in(folder, settled, buffer, trained, labels=labels_of(settled)),
        describe=source.describe,
    )


def help_harvest(folder: Path, config: RunConfig, world: World) -> None:
    """Do what processes other than 0 do in a run: wait until process 0 harvests or need not, and harvest with it.

    Raises:
        WorkerError: when process 0 fails.
    """
    if world.hear() == "harvest":
        with warnings.catch_warnings(), ExitStack() as closing:
            warnings.simplefilter("ignore", UsaeProbeWarning)  # process 0 says them
            harvest(
                attach_all(config, closing, world),
                images_of(config),
                folder / "buffer",
                images_config=config.images,
                buffer_config=config.buffer,
                world=world,
            )
