"""A data set of torchvision by name: `torchvision:CIFAR10`, downloaded where there is network."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import ImageError, UsageError, first_line, nearest
from .datasets import DatasetSource

PREFIX = "torchvision:"
_OURS = ("self", "transform", "target_transform", "transforms", "loader", "is_valid_file")


def open_torchvision(name: str, options: Mapping[str, Any]) -> DatasetSource:
    """Open `torchvision.datasets.NAME(**options)`; what is not there yet is downloaded.

    Args:
        name: the class's name, `CIFAR10`.
        options: its arguments, such as `root` (default: `datasets/` in torch's cache), `train`, `split`;
            `download = false` never asks the network.

    Raises:
        UsageError: for a data set or an option that torchvision does not have.
        ImageError: when its files are not there and cannot be downloaded.
    """
    kind = _kind(name)
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in _OURS and key != "kwargs"]
    for key in options:
        if key not in known:
            raise UsageError(
                f"torchvision's {name} has no option '{key}'", hint=f"{nearest(key, known)} {', '.join(known)}"
            )
    given = dict(options)
    if "root" in known:
        given.setdefault("root", str(_cache()))
    may_download = bool(given.pop("download", True)) and "download" in known
    try:
        dataset = kind(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"torchvision's {name} does not take options {dict(options)}: {first_line(error)}") from error
    except Exception as error:  # RuntimeError, FileNotFoundError, …: its files are not there, or not whole
        if not may_download:
            raise ImageError(
                f"torchvision's {name} is not in {given.get('root')}: {first_line(error)}", hint=_advice(kind, given)
            ) from error
        dataset = _downloaded(kind, given)
    return DatasetSource(dataset, location=f"{PREFIX}{name}")


def _downloaded(kind: Any, given: Mapping[str, Any]) -> Any:
    root = Path(given["root"])
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One process at a time; what it says belongs on stderr: a command's JSON may go to stdout.
        with FileLock(root / f".{kind.__name__}.lock"), redirect_stdout(sys.stderr):
            return kind(**given, download=True)
    except Exception as error:
        raise ImageError(
            f"torchvision's {kind.__name__} is not in {root}, and cannot be downloaded: {first_line(error)}",
            hint=_advice(kind, given),
        ) from error


def _kind(name: str) -> Any:
    import torchvision.datasets

    kinds = {
        each: kind
        for each in torchvision.datasets.__all__
        if isinstance(kind := getattr(torchvision.datasets, each), type)
    }
    if name not in kinds:
        hint = nearest(name, kinds) or nearest(name.upper(), kinds) or "names are those of torchvision.datasets"
        raise UsageError(f"torchvision has no data set '{name}'", hint=hint)
    return kinds[name]


def _cache() -> Path:
    import torch

    return Path(torch.hub.get_dir()).parent / "datasets"


def _advice(kind: Any, given: Mapping[str, Any]) -> str:
    """Say what to download where."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in given.items() if key != "root")
    call = f"torchvision.datasets.{kind.__name__}('data', {arguments + ', ' if arguments else ''}download=True)"
    urls = getattr(kind, "url", None) or next(iter(getattr(kind, "mirrors", [])), None)
    come_from = f" (from {urls})" if isinstance(urls, str) else ""
    return (
        f"with network: {call}{come_from}; copy its folder here and say where: options = {{root = 'data'}}; "
        "or give a folder of pictures"
    )
