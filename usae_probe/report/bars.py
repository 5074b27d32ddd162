"""Progress bars for calls from Python: one function for all that takes `progress=`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..harvesting import HarvestProgress
from ..probes.cam import CamProgress
from ..usae import StepRecord
from .terminal import StageProgress, consoles


@contextmanager
def bars() -> Iterator[Callable[..., None]]:
    """Show how far calls have come, with rate and remaining time.

    On a terminal bars, one for each kind of work, gone when the block is left; elsewhere (a pipe, a file, `NO_COLOR`) a
    plain line every 30 seconds. On stderr.

    Yields:
        what to give as `progress` to `harvest`, `train`, `train_independent`, `evaluate`, `maximize`, `scan` and `Run`,
        and as `harvest_progress` to `harvest_and_train`.

    Example:
        ```python
        with up.bars() as show:
            buffer = up.harvest([resnet, vit], "photos/", out="acts", progress=show)
            run = up.train(buffer, n_latents=2042, k=64, progress=show)
        ```
    """
    with StageProgress(consoles()[1]) as shown:

        def show(*now: Any) -> None:
            work, done, total, unit, note = _spelled(now)
            shown.update(work, done, total, unit, note)
            if done >= total:
                shown.finish(work)

        yield show


def _spelled(now: tuple[Any, ...]) -> tuple[str, int, int, str, str]:
    """Return what a call of `progress` says: the work, how much of it is done and of how many units, and a note."""
    match now:
        case (HarvestProgress(done, total, skipped),):
            return "harvest", done, total, "images", f"{skipped} skipped" if skipped else ""
        case (StepRecord() as record,):
            return "train", record.step, record.steps, "steps", record.note
        case (str(site), StepRecord() as record):
            return f"train {site}", record.step, record.steps, "steps", record.note
        case (CamProgress(site, done, total),):
            return "cam", done, total, "steps", site
        case (int(done), int(total)):
            return "measure", done, total, "done", ""
    (far,) = now  # of a run or a scan, which name their work themselves
    work, done, total, unit, note = far[:5]
    return work, done, total, unit, note
