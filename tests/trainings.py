"""What the tests of whole trainings share: a small buffer, a way to stop, and whether two USAEs are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.usae import USAE

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


def same(a: USAE, b: USAE) -> bool:
    """Say whether parameters and buffers are the same bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
