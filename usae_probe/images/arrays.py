"""Pictures in one array: in memory, in a .npy file (mapped, not read), or in a .npz file with labels and factors."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from ..errors import ImageError

EXPECTED = "uint8 [N, H, W, 3]"
CHUNK_BYTES = 1 << 24


class ArraySource:
    """Pictures as rows of an array.

    Args:
        images: uint8 [N, H, W, 3], N ≥ 1.
        labels: integers [N], a class per picture.
        factors: further integers [N] by name: what the pictures were drawn from, say.
        value_names: names of the values of a factor, or of `labels`: value v is called `value_names[factor][v]`. The
            values are then places in that list, −1 where unknown.
        location: where the array came from, for people to read.

    Raises:
        ImageError: for other shapes or dtypes, saying what was found; for a name too few, or of nothing.
    """

    kind = "array"

    def __init__(
        self,
        images: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        factors: Mapping[str, np.ndarray] | None = None,
        value_names: Mapping[str, Sequence[str]] | None = None,
        location: str = "memory",
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
            raise ImageError(f"{location} holds {_found(images)}, expected {EXPECTED}", hint=_hint(images))
        if len(images) == 0:
            raise ImageError(f"{location} holds {_found(images)}: no pictures")
        self.images = images
        self.labels = labels
        self.factors = dict(factors or {})
        self.value_names = {name: list(names) for name, names in (value_names or {}).items()}
        self.class_names = self.value_names.get("labels")
        self.location = location
        for name, values in self._annotations().items():
            if not _is_annotation(values, len(images)):
                raise ImageError(f"{name} of {location} is {_found(values)}, expected integers [{len(images)}]")
        for name, names in self.value_names.items():
            self._demand_names(name, names)

    @classmethod
    def open(cls, path: Path) -> ArraySource:
        """Open a .npy or .npz file.

        Of a .npz the pictures are the array `images`, or else the only uint8 array with four axes; `labels` and every
        further array of N integers (a factor) come along, and the names of their values: `colour_names`, an array of
        strings, names the values of `colour`, and `labels_names` the classes.

        Raises:
            ImageError: when the file is damaged or does not hold such arrays.
        """
        try:
            with path.open("rb") as file:
                if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                    return cls(np.load(path, mmap_mode="r", allow_pickle=False), location=str(path))
                file.seek(0)
                # Given the path, numpy would leave a damaged archive open.
                with np.load(file, allow_pickle=False) as stored:
                    arrays = {name: stored[name] for name in stored.files}
        # zipfile and numpy.lib.format raise these on damaged bytes; ValueError also for pickled objects.
        except (OSError, ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile) as error:
            raise ImageError(f"{path} cannot be read as an array file: {type(error).__name__}: {error}") from error
        name = _find_images(arrays, path)
        images = arrays.pop(name)
        labels = arrays.pop("labels", None)
        factors = {key: values for key, values in arrays.items() if _is_annotation(values, len(images))}
        annotated = [*(["labels"] if labels is not None else []), *factors]
        named = [name for name in annotated if f"{name}_names" in arrays and f"{name}_names" not in factors]
        value_names = {name: _names(arrays[f"{name}_names"], f"{name}_names of {path}") for name in named}
        return cls(images, labels=labels, factors=factors, value_names=value_names, location=str(path))

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> np.ndarray:
        """Copy one picture: uint8 [H, W, 3]."""
        return np.array(self.images[index], order="C")

    def describe(self, index: int) -> str:
        """`array[17]`."""
        return f"array[{index}]"

    def label(self, index: int) -> int | None:
        """The class given with the array, if any."""
        return None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 over dtype, shape and bytes of pictures, labels and factors, read in pieces."""
        digest = hashlib.sha256(b"array")
        for name, array in {"images": self.images, **dict(sorted(self._annotations().items()))}.items():
            digest.update(f"\0{name}:{array.dtype.str}:{array.shape}\0".encode())
            rows = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
            for start in range(0, len(array), rows):
                digest.update(np.ascontiguousarray(array[start : start + rows]).data)
        return digest.hexdigest()

    def _demand_names(self, name: str, names: list[str]) -> None:
        known = ({} if self.labels is None else {"labels": self.labels}) | self.factors
        if name not in known:
            raise ImageError(f"value_names of {self.location} name {name!r}, expected one of {', '.join(known)}")
        lowest, highest = int(known[name].min()), int(known[name].max())
        if lowest < -1 or highest >= len(names):
            raise ImageError(
                f"{self.location} has {len(names)} names for the values of {name}, which go from {lowest} to {highest}",
                hint="value v is called by name v; -1 means unknown",
            )

    def _annotations(self) -> dict[str, np.ndarray]:
        labels = {} if self.labels is None else {"labels": self.labels}
        return {**labels, **{f"factor {name}": values for name, values in self.factors.items()}}


def _is_annotation(values: np.ndarray, n: int) -> bool:
    return values.shape == (n,) and np.issubdtype(values.dtype, np.integer)


def _names(array: np.ndarray, what: str) -> list[str]:
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ImageError(f"{what} is {_found(array)}, expected strings (dtype U) along one axis")
    return [str(name) for name in array]


def _find_images(arrays: Mapping[str, np.ndarray], path: Path) -> str:
    if "images" in arrays:
        return "images"
    candidates = [name for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim == 4]
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(f"{name}: {_found(array)}" for name, array in arrays.items()) or "no arrays"
    problem = f"{len(candidates)} uint8 arrays with four axes" if candidates else "no uint8 array with four axes"
    raise ImageError(f"{path} has {problem} ({listed})", hint=f"name the pictures `images`, {EXPECTED}")


def _found(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _hint(images: np.ndarray) -> str:
    if images.ndim == 4 and images.shape[1] == 3 and images.shape[3] != 3:
        return "channels come last: images.transpose(0, 2, 3, 1)"
    if images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1):
        return "repeat gray pictures three times along a last axis"
    if images.dtype != np.uint8:
        return "store pictures as whole numbers from 0 to 255 of dtype uint8"
    return ""
