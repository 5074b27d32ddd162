"""What a step's number decides: phase, source and learning rate. Nothing here depends on what happened before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from ..config import TrainConfig
from ..errors import UsaeProbeWarning
from .draws import draw_aligned, draw_source
from .losses import Phase


def phase_and_source(
    sites: Sequence[str], how: TrainConfig, step: int, steps: int, *, joint: bool = False
) -> tuple[Phase, str]:
    """Return the phase of step 1 … steps and the sites whose encoders learn in it, as `sources_of` takes them.

    A function of settings and step alone, so that what each encoder gets can be counted without training.

    Args:
        sites: all sites, in order.
        how: `align_warmup`, `align_sites`, `source` and `seed`.
        step: from 1.
        steps: of the whole training.
        joint: the sparsity gives all sites one support throughout.
    """
    if joint and len(sites) > 1:
        return "align", "all"
    if len(sites) > 1 and step <= round(how.align_warmup * steps):
        return "align", draw_aligned(sites, how, step)
    return "main", draw_source(sites, how, step)


def learning_rate(step: int, steps: int, how: TrainConfig) -> float:
    """Return the learning rate of step 1 … steps: linear warm-up, then a cosine down to lr · lr_final.

    One global step count drives it, whichever site is the source. Early stopping does not change it: a training that
    stops at half of its steps has seen the first half of the cosine.
    """
    rising = round(how.lr_warmup * steps)
    if step <= rising:
        return how.lr * step / rising
    along = (step - rising) / max(1, steps - rising)
    floor = how.lr * how.lr_final
    return floor + (how.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * along))


def warn_without_stop(how: TrainConfig, steps: int, *, joint: bool = False) -> None:
    """Warn when so few validations count that none of them can end the training early."""
    if not how.early_stop:
        return
    aligned = 0 if joint else round(how.align_warmup * steps)
    counting = sum(validates(step, steps, how) for step in range(aligned + 1, steps))
    if counting <= how.early_stop:
        warnings.warn(
            f"early_stop = {how.early_stop} cannot stop this training: {counting} validations come after the alignment "
            f"warm-up and before the last of {steps} steps; lower validate_every = {how.validate_every}",
            UsaeProbeWarning,
            stacklevel=2,
        )


def validates(step: int, steps: int, how: TrainConfig) -> bool:
    """Say whether R² on validation rows is measured after a step."""
    return step == steps or (how.validate_every > 0 and step % how.validate_every == 0)
