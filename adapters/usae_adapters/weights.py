"""Local weights into live modules: strict, with every misfit shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from usae_probe.errors import CheckpointError, first_line

_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read `.safetensors`, or a weights-only pickle (`.pth`, `.pt`, `.bin`); nothing else is ever unpickled.

    Raises:
        CheckpointError: when the file is missing, damaged or holds more than weights.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{path}' does not exist", hint="give the path of local weights")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint '{path}' cannot be read: {_reason(error)}",
            hint="expected .safetensors, or a .pth that holds only weights",
        ) from error
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping):
        raise CheckpointError(f"checkpoint '{path}' holds a {type(state).__name__}, expected tensors by name")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"checkpoint '{path}' holds no tensors")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def load_checkpoint(module: nn.Module, path: Path, *, model: str) -> None:
    """Load local weights strictly, cast to the module's own dtypes.

    Raises:
        CheckpointError: with both shapes of what does not fit, and the names that are missing or unexpected.
    """
    given, wanted = read_state_dict(path), module.state_dict()
    wrong = [
        f"{key} is {list(given[key].shape)} in the checkpoint, {list(wanted[key].shape)} in the model"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    problems = wrong + listed("missing in the checkpoint", missing) + listed("not in the model", unexpected)
    if problems:
        raise CheckpointError(
            f"checkpoint '{path}' does not fit model '{model}': {joined(problems)}",
            hint="check the model's name and options (num_classes, img_size)",
        )
    module.load_state_dict(given, strict=False)


def _reason(error: Exception) -> str:
    """One line of torch's page of advice, which ends in how to load a pickle with code in it: we never do."""
    unpickling = re.search(r"Unsupported [^\n.]*(\.\w+)*", str(error))
    if unpickling:
        return f"it holds more than weights ({unpickling[0]})"
    return first_line(error) or type(error).__name__


def listed(what: str, keys: list[str]) -> list[str]:
    """Say how many names of weights are `what`, with the first few; nothing when there are none."""
    if not keys:
        return []
    return [f"{len(keys)} {what}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"]


def joined(problems: list[str]) -> str:
    """Join what does not fit, cut short."""
    return "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
