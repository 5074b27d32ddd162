"""Where pictures come from: one protocol, and `open_source`, which finds the right kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset

from ..errors import ImageError, NotBuiltError
from .arrays import ArraySource
from .datasets import DatasetSource, MapDataset
from .folder import EXTENSIONS, FolderSource

__all__ = ["ArraySource", "DatasetSource", "FolderSource", "ImageSource", "open_source"]


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


def open_source(source: str | Path | np.ndarray | Dataset[Any] | MapDataset) -> ImageSource:
    """Open a folder, a .npy or .npz file, an array in memory, or a map-style data set.

    Args:
        source: a path (`~` is expanded), uint8 [N, H, W, 3], or a data set.

    Raises:
        ImageError: when it is missing, empty or of another kind.
        NotBuiltError: for `torchvision:NAME`.
    """
    if isinstance(source, np.ndarray):
        return ArraySource(source)
    if not isinstance(source, (str, Path)):
        return DatasetSource(source)
    if str(source).startswith("torchvision:"):
        name = str(source).partition(":")[2]
        raise NotBuiltError(
            f"image source {str(source)!r} is not built yet",
            hint=f"from Python pass the data set itself: torchvision.datasets.{name}(root, download=True)",
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise ImageError(f"image source {path} does not exist", hint="give a folder of pictures, a .npy or a .npz file")
    if path.suffix.lower() in (".npy", ".npz"):
        return ArraySource.open(path)
    hint = "give a folder of pictures, a .npy or a .npz file"
    if path.suffix.lower() in EXTENSIONS:
        hint = f"a single picture is no source: give its folder, {path.parent}"
    raise ImageError(f"image source {path} is a file with the unknown ending {path.suffix!r}", hint=hint)
