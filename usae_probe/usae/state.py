"""Training state on disk: all that a stopped training needs to go on as if it had not been stopped.

Batches, sources, pairings and noise depend on seed and step alone. So parameters and buffers, Adam's moments, the steps
for which each latent has been silent, the averaged weights, the best ones, the counters of early stopping and the
number of the step are the whole state. It is one file, so that no part can be from another step than the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import NonFiniteError
from ..files import json_sha256, replacing

SECONDS = 60.0
_LAYOUT = 3  # of the file; a state of another one is not used


@runtime_checkable
class Stateful(Protocol):
    """What a state is of."""

    step: int

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state, by name."""
        ...

    def numbers(self) -> dict[str, Any]:
        """Return the rest of the state, for JSON."""
        ...

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take over a state that `tensors` and `numbers` gave; tensors are on the CPU."""
        ...


class TrainingState:
    """A file that is replaced from time to time while training runs, and read when it starts.

    Args:
        path: the safetensors file.
        depends_on: everything the training's numbers depend on; a file written for something else is not used.
        reads_only: another process writes the file.

    Attributes:
        holds: the step whose state is in the file; 0 when there is none of this training.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any], *, reads_only: bool = False) -> None:
        self.path, self.reads_only = path, reads_only
        self._digest = json_sha256({"layout": _LAYOUT, **depends_on})
        self._written = time.monotonic()
        self.holds = 0

    def restore(self, training: Stateful) -> None:
        """Put the stored state, if there is one of this training, into `training`."""
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("digest") != self._digest:
                    return
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError):
            return
        training.load(tensors, json.loads(about["numbers"]))
        self.holds = training.step

    def keep(self, training: Stateful, *, at_once: bool = False) -> None:
        """Write the state, if the last write is `SECONDS` ago or it is wanted `at_once`, and it is a new one.

        Raises:
            NonFiniteError: when a weight or a moment is not finite; the file stays as it was.
        """
        if (
            self.reads_only
            or training.step == self.holds
            or (not at_once and time.monotonic() - self._written < SECONDS)
        ):
            return
        tensors = training.tensors()
        check_finite(tensors, training.step, self.last_good())
        about = {"digest": self._digest, "step": str(training.step), "numbers": json.dumps(training.numbers())}
        with replacing(self.path) as temporary:
            stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(stored, temporary, metadata=about)
        self._written, self.holds = time.monotonic(), training.step

    def last_good(self) -> str:
        """Where the last state is, in words."""
        if self.holds:
            return f"the last good state, of step {self.holds}, is in '{self.path}'"
        return f"no state had been kept in '{self.path}' yet"


def check_finite(tensors: Mapping[str, Tensor], step: int, last_good: str) -> None:
    """Check that all weights and moments are numbers.

    Raises:
        NonFiniteError: naming the tensor and the step.
    """
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise NonFiniteError(f"'{bad[0]}' is not finite after step {step}", hint=f"lower train.lr; {last_good}")
