"""Where pictures come from: one protocol, and `open_source`, which finds the right kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset

from ..errors import ImageError, UsageError
from .arrays import ArraySource
from .datasets import DatasetSource, MapDataset
from .folder import EXTENSIONS, FolderSource
from .hugging_face import PREFIX as HUGGING_FACE
from .hugging_face import HuggingFaceSource, is_saved, open_hugging_face
from .torchvision_data import PREFIX as TORCHVISION
from .torchvision_data import open_torchvision

__all__ = ["ArraySource", "DatasetSource", "FolderSource", "HuggingFaceSource", "ImageSource", "open_source"]

_SOURCES = "give a folder of pictures, a .npy or .npz file, torchvision:CIFAR10, or datasets:NAME"


@runtime_checkable
class ImageSource(Protocol):
    """Numbered pictures of any sizes, always in the same order."""

    @property
    def kind(self) -> str:
        """`folder`, `array` or `dataset`."""
        ...

    @property
    def location(self) -> str:
        """Where the pictures are, for people to read."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """Names of the labels, where they have names."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> np.ndarray:
        """Decode one picture to uint8 [H, W, 3], contiguous, writable.

        Raises:
            ImageError: naming the picture, when it cannot be decoded.
        """
        ...

    def describe(self, index: int) -> str:
        """Name of one picture for people to read."""
        ...

    def label(self, index: int) -> int | None:
        """Class of one picture, where there are classes."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex): another fingerprint means other pictures, another order or other labels."""
        ...


def open_source(
    source: str | Path | np.ndarray | Dataset[Any] | MapDataset, *, options: Mapping[str, Any] | None = None
) -> ImageSource:
    """Open a folder, a .npy or .npz file, an array in memory, a map-style data set, or a data set by name.

    Args:
        source: a path (`~` is expanded); uint8 [N, H, W, 3]; a data set of torch, torchvision or Hugging Face;
            `torchvision:CIFAR10`; `datasets:NAME_OR_FOLDER` of Hugging Face `datasets`. A folder that its
            `save_to_disk` wrote is recognised.
        options: of a data set by name: the arguments of torchvision's class, of `datasets.load_dataset`, or the columns
            `image` and `label`.

    Raises:
        ImageError: when it is missing, empty or of another kind.
        UsageError: for a data set or an option that there is not.
    """
    given = dict(options or {})
    if isinstance(source, (str, Path)):
        text = str(source)
        if text.startswith(TORCHVISION):
            return open_torchvision(text.removeprefix(TORCHVISION), given)
        if text.startswith(HUGGING_FACE):
            return open_hugging_face(text.removeprefix(HUGGING_FACE), given)
        path = Path(source).expanduser()
        if path.is_dir() and is_saved(path):
            return open_hugging_face(str(path), given)
        if not given:
            return _at(path)
    elif not given:
        return _in_memory(source)
    elif _is_hugging_face(source) and given.keys() <= {"image", "label"}:
        return HuggingFaceSource(source, **given)
    what = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    raise UsageError(
        f"options {given} are given, but {what} takes none",
        hint="options are for data sets by name, torchvision:CIFAR10 or datasets:NAME",
    )


def _in_memory(source: Any) -> ImageSource:
    if isinstance(source, np.ndarray):
        return ArraySource(source)
    return HuggingFaceSource(source) if _is_hugging_face(source) else DatasetSource(source)


def _is_hugging_face(source: Any) -> bool:
    library = sys.modules.get("datasets")  # nobody has such a data set who has not imported it
    return library is not None and isinstance(source, library.Dataset)


def _at(path: Path) -> ImageSource:
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise ImageError(f"image source {path} does not exist", hint=_SOURCES)
    if path.suffix.lower() in (".npy", ".npz"):
        return ArraySource.open(path)
    hint = _SOURCES
    if path.suffix.lower() in EXTENSIONS:
        hint = f"a single picture is no source: give its folder, {path.parent}"
    raise ImageError(f"image source {path} is a file with the unknown ending {path.suffix!r}", hint=hint)
