"""A folder of picture files, walked recursively in a fixed order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import ImageError
from .decode import decode_file

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class FolderSource:
    """Every picture file below a folder, sorted by its path relative to the folder (posix spelling).

    Links are followed, each real folder is walked once; names that begin with a dot are left out.

    Args:
        root: the folder.

    Raises:
        ImageError: when the folder is missing, unreadable or holds no picture.
    """

    kind = "folder"

    def __init__(self, root: str | Path) -> None:
        self.root = root = Path(root)
        self.location = str(root)
        if not root.is_dir():
            raise ImageError(f"{root} is not a folder")
        try:
            self.paths = sorted(path.relative_to(root).as_posix() for path in _picture_files(root))
        except OSError as error:
            raise ImageError(f"folder {error.filename} cannot be read: {error.strerror}") from error
        if not self.paths:
            raise ImageError(f"no pictures in {root}", hint=f"looked in it and below for {' '.join(EXTENSIONS)}")
        self._labels = _first_components(self.paths)
        self.class_names = sorted(set(self._labels)) if self._labels else None

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> np.ndarray:
        """Decode one picture to uint8 [H, W, 3]; see `decode_file`."""
        return decode_file(self.root / self.paths[index], self.paths[index])

    def describe(self, index: int) -> str:
        """The picture's path relative to the folder."""
        return self.paths[index]

    def label(self, index: int) -> int | None:
        """Place in `class_names` of the first folder on the way to the picture; None where pictures lie at the top."""
        if self._labels is None or self.class_names is None:
            return None
        return self.class_names.index(self._labels[index])

    def fingerprint(self) -> str:
        """SHA-256 over the sorted relative paths (labels are part of them) and file sizes."""
        digest = hashlib.sha256(b"folder")
        for name in self.paths:
            try:
                size = (self.root / name).stat().st_size
            except OSError:  # A dangling link stays in the list: loading it says so.
                size = -1
            digest.update(os.fsencode(name) + f"\0{size}\0".encode())
        return digest.hexdigest()


def _picture_files(root: Path) -> Iterator[Path]:
    """Walk real folders first and links after them, so that what a link repeats keeps its own name."""
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        for entry in visible:
            path = folder / entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif path.suffix.lower() in EXTENSIONS and (entry.is_file() or entry.is_symlink()):
                yield path


def _first_components(paths: list[str]) -> list[str] | None:
    """First folder of every path, or None when some picture lies at the top."""
    if any("/" not in path for path in paths):
        return None
    return [path.split("/", 1)[0] for path in paths]
