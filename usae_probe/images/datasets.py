"""Any map-style data set (torch, torchvision, a list of pictures) as an image source."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from ..errors import ImageError
from .decode import rgb_from_item


@runtime_checkable
class MapDataset(Protocol):
    """What a map-style data set can do: it has a length and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource:
    """The pictures of a data set whose items are a picture or a tuple (picture, label, …).

    A data set with random transforms gives another picture on every read and no stable fingerprint: leave them out.
    With worker threads its `__getitem__` is called from several threads.

    Args:
        dataset: see `rgb_from_item` for what counts as a picture.
        location: what it is called; default: its class.

    Raises:
        ImageError: when it has no length or is empty.
    """

    kind = "dataset"

    def __init__(self, dataset: Any, *, location: str | None = None) -> None:
        self.dataset = dataset
        self._kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        self.location = location or self._kind
        if not isinstance(dataset, MapDataset):
            raise ImageError(
                f"{self.location} has no length or no items by number, expected a map-style data set",
                hint="iterable data sets have no fixed rows: collect the pictures first",
            )
        if len(dataset) == 0:
            raise ImageError(f"data set {self.location} is empty")
        self.class_names = _class_names(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> np.ndarray:
        """Read one picture as uint8 [H, W, 3].

        Raises:
            ImageError: when its file cannot be read, or the item is no picture. Other exceptions of the data set pass.
        """
        try:
            return rgb_from_item(_split(self.dataset[index])[0])
        except ImageError as error:
            raise ImageError(f"{self.describe(index)}: {error.message}", hint=error.hint) from error
        except OSError as error:
            raise ImageError(f"{self.describe(index)} cannot be read: {type(error).__name__}: {error}") from error

    def describe(self, index: int) -> str:
        """`dataset[17]`."""
        return f"dataset[{index}]"

    def label(self, index: int) -> int | None:
        """The second element of the item where that is a whole number (reads the whole item)."""
        return _split(self.dataset[index])[1]

    def fingerprint(self) -> str:
        """SHA-256 over class name, length, repr (without memory addresses and folders), and the first and last item."""
        described = re.sub(r" at 0x[0-9a-fA-F]+|Root location: .*", "", repr(self.dataset))
        digest = hashlib.sha256(f"dataset\0{self._kind}\0{len(self)}\0{described}\0".encode(errors="replace"))
        for index in (0, len(self) - 1):
            try:
                picture = self.load(index)
            except ImageError:
                digest.update(b"unreadable\0")
                continue
            digest.update(f"{picture.shape}:{self.label(index)}\0".encode() + picture.tobytes())
        return digest.hexdigest()


def _split(item: Any) -> tuple[Any, int | None]:
    """Picture and label of an item."""
    if not isinstance(item, (tuple, list)) or not item:
        return item, None
    label = item[1] if len(item) > 1 else None
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        return item[0], None
    return item[0], int(label)


def _class_names(dataset: Any) -> list[str] | None:
    """torchvision's data sets name their classes in `classes`."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return list(names)
