"""What the tests of whole trainings share: a small buffer, a way to stop, and whether two USAEs are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from usae_probe.buffer import ActivationBuffer
from usae_probe.usae import USAE, losses, train

PLAIN: dict[str, Any] = {"self_share": "equal", "latent_dropout": 0.0}
"""Settings of a training whose loss is the plain sum of its targets' errors."""


class Stopped(Exception):
    """Raised by a progress callback to stop a training."""


def related_rows(path: Path) -> ActivationBuffer:
    """Make a buffer of 400 paired rows that ten common factors explain: a/x [12], b/y [9]."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 10))
    arrays = {"a/x": shared @ rng.normal(size=(10, 12)), "b/y": shared @ rng.normal(size=(10, 9))}
    return ActivationBuffer.from_arrays(arrays, path, dtype="float32")


def batches_seen(monkeypatch: pytest.MonkeyPatch, buffer: ActivationBuffer, **settings: Any) -> list[Tensor]:
    """Train, and return the stacked, normalised rows of every step but the last ones, which do not align."""
    seen: list[Tensor] = []
    original = losses.alignment_loss

    def spying(usae: Any, x: Tensor, *terms: Any) -> Any:
        seen.append(x.clone())
        return original(usae, x, *terms)

    with monkeypatch.context() as patched:
        patched.setattr(losses, "alignment_loss", spying)
        train(buffer, align_warmup=0.9, **settings)
    return seen


def same(a: USAE, b: USAE) -> bool:
    """Say whether parameters and buffers are the same bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
