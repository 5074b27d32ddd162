"""How long training steps take on this machine: a few, on random rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..buffer import ActivationBuffer
from ..config import TrainConfig, UsaeConfig
from ..usae import StepRecord, train


def step_seconds(usae: UsaeConfig, train_config: TrainConfig, widths: Sequence[int], *, steps: int) -> float:
    """Time steps of a training of sites of these widths; the mean of its phases, by their share of the steps.

    Args:
        usae, train_config: the settings; length, validation and what depends on names or labels are left aside.
        widths: d_in of each site.
        steps: how many to take; the first one of each phase does not count.

    Returns:
        Seconds per step.
    """
    n, draw = train_config.batch_size, np.random.default_rng(0)
    rows = {f"m{i}/x": draw.standard_normal((2 * n, width), dtype=np.float32) for i, width in enumerate(widths)}
    ends: list[tuple[str, float]] = []

    def follow(record: StepRecord) -> None:
        ends.append((record.phase, time.perf_counter()))

    how = train_config.model_copy(
        update={"steps": steps, "epochs": None, "validate_every": 0, "early_stop": 0, "keep": "last"}
        | {"tensorboard": False, "source": "random", "site_weights": None, "pairing": "image"}
    )
    with tempfile.TemporaryDirectory() as folder:
        buffer = ActivationBuffer.from_arrays(rows, folder, holdout=0.0, validation=0.0)
        train(buffer, usae_config=usae, train_config=how, progress=follow)
    spent: dict[str, list[float]] = {}
    for (_, before), (phase, after) in pairwise(ends):
        spent.setdefault(phase, []).append(after - before)
    share = how.align_warmup if "align" in spent else 0.0
    align = float(np.median(spent.get("align", [0.0])))
    main = float(np.median(spent.get("main", [0.0])[1:] or spent.get("main", [0.0])))
    return share * align + (1 - share) * main
