"""Training state on disk: all that a stopped training needs to go on as if it had not been stopped.

Batches, sources and pairings depend on seed and step alone, so parameters, Adam's moments, the steps for which each
latent has been silent and the step's number are the whole state.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from .model import USAE

SECONDS = 60.0


class TrainingState:
    """A file that is replaced from time to time while training runs, and read when it starts.

    Args:
        path: the safetensors file.
        depends_on: everything the training's numbers depend on; a file written for something else is not used.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]) -> None:
        self.path = path
        self._digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
        self._written = time.monotonic()

    def restore(self, usae: USAE, optimiser: torch.optim.Optimizer, silent: Tensor) -> int:
        """Put the stored state into model, optimiser and counter, in place; returns the steps done, 0 for none."""
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError):
            return 0
        if about.get("digest") != self._digest:
            return 0
        with torch.no_grad():
            for name, parameter in usae.named_parameters():
                parameter.copy_(tensors[f"parameter.{name}"])
            silent.copy_(tensors["silent"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, what = key.split(".")
                moments.setdefault(int(index), {})[what] = value
        optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
        return int(about["step"])

    def keep(self, usae: USAE, optimiser: torch.optim.Optimizer, silent: Tensor, step: int) -> None:
        """Write the state after `step`, if the last write is `SECONDS` ago."""
        if time.monotonic() - self._written < SECONDS:
            return
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in usae.named_parameters()}
        for index, entries in optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{what}": value for what, value in entries.items()}
        tensors["silent"] = silent
        with replacing(self.path) as temporary:
            stored = {key: value.cpu().contiguous() for key, value in tensors.items()}
            save_file(stored, temporary, metadata={"digest": self._digest, "step": str(step)})
        self._written = time.monotonic()
