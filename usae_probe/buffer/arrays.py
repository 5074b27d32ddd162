"""Buffers of activations that were computed elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SiteError, UsageError
from ..split import Split, draw_split
from .checks import as_stored
from .spec import IMAGE_INDEX, BufferSpec, SiteSpec, StoredDtype
from .store import ActivationBuffer
from .writer import BufferWriter

_BLOCK = 4096  # rows looked at together


@dataclass(frozen=True, eq=False)
class RowsByImage:
    """Arrays and the rows in them that each image has.

    Attributes:
        arrays: by site, [n, d].
        row_images: [n] the image of each row.
        images: [m] image indices, ascending.
        order: [n] row numbers, sorted by image and else as given.
        begins: [m] where each image's rows begin in `order`.
        counts: [m] rows per image.
    """

    arrays: dict[str, np.ndarray]
    row_images: np.ndarray
    images: np.ndarray
    order: np.ndarray
    begins: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, arrays: Mapping[str, Any], image_index: Any) -> RowsByImage:
        """Check the arrays and sort their rows by image.

        Raises:
            UsageError: when they are not [n, d] with one n, or `image_index` is not [n] integers from 0.
        """
        known = {site: np.asarray(values) for site, values in arrays.items()}
        if not known:
            raise SiteError("from_arrays was given no array", hint="give {site: array [n, d]}")
        for site, values in known.items():
            if values.ndim != 2 or values.dtype.kind not in "fiu":
                raise UsageError(
                    f"{site}: an array [n, d] of numbers is expected, not {values.dtype} {list(values.shape)}"
                )
        lengths = {site: len(values) for site, values in known.items()}
        n = next(iter(lengths.values()))
        if set(lengths.values()) != {n}:
            given = ", ".join(f"{site}: {length}" for site, length in lengths.items())
            raise UsageError(f"arrays have different numbers of rows ({given})", hint="row i of each must be one image")
        index = np.arange(n) if image_index is None else np.asarray(image_index)
        if index.shape != (n,) or index.dtype.kind not in "iu" or (n and index.min() < 0):
            raise UsageError(f"image_index must be {n} integers from 0, not {index.dtype} {list(index.shape)}")
        order = np.argsort(index, kind="stable")
        images, begins, counts = np.unique(index[order], return_index=True, return_counts=True)
        return cls(known, index, images.astype(np.int64), order, begins, counts)

    def of_images(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `images`, image by image, and the image of each."""
        places = np.searchsorted(self.images, images)
        counts = self.counts[places]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.order[np.repeat(self.begins[places], counts) + within], np.repeat(images, counts)

    def fingerprint(self) -> str:
        """SHA-256 of all values and of which image each row belongs to."""
        digest = hashlib.sha256()
        for values in (self.images, self.counts, self.order, *self.arrays.values()):
            digest.update(f"{values.dtype.str}{values.shape}".encode())
            for start in range(0, len(values), _BLOCK):
                digest.update(np.ascontiguousarray(values[start : start + _BLOCK]).data)
        return digest.hexdigest()


def read_npz(path: Path) -> dict[str, Any]:
    """Return what `from_arrays` takes: `arrays` of an `.npz` file by site, and its `image_index`.

    Raises:
        UsageError: when the file cannot be read, or holds pickled objects.
    """
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # of a damaged file NumPy and zipfile raise ten kinds and more
        raise UsageError(
            f"'{path}' cannot be read as .npz: {error}",
            hint="write it with np.savez(path, **{'model/layer': array, …}), without pickled objects",
        ) from error
    return {"image_index": arrays.pop(IMAGE_INDEX, None), "arrays": arrays}


def spec_of_arrays(
    rows: RowsByImage, *, holdout: float, validation: float, seed: int, dtype: StoredDtype, shard_images: int
) -> BufferSpec:
    """The spec of a buffer that holds `rows`; `source.fingerprint` stands for their content."""
    drawn = draw_split(len(rows.images), holdout=holdout, validation=validation, seed=seed)
    same = len(np.unique(rows.counts)) == 1
    per_image = int(rows.counts[0]) if same else 0
    return BufferSpec(
        sites=tuple(_site(site, values.shape[1], per_image) for site, values in rows.arrays.items()),
        source={"kind": "arrays", "location": "", "fingerprint": rows.fingerprint(), "n_images": len(rows.images)},
        split=Split(*(rows.images[positions] for _, positions in drawn)),
        split_request={"limit": None, "holdout": holdout, "validation": validation, "seed": seed},
        dtype=dtype,
        shard_images=shard_images,
        batch_size=shard_images,
    )


def write_arrays(rows: RowsByImage, spec: BufferSpec, out: str | Path) -> ActivationBuffer:
    """Write `rows` as a buffer, or open the one of the same content that is there already."""
    _demand_storable(rows, spec)
    with BufferWriter(out, spec) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                taken, row_images = rows.of_images(plan.images)
                images = row_images if spec.sites[0].rows_per_image == 0 else plan.images
                shard.append(images, {site: values[taken] for site, values in rows.arrays.items()})
        return writer.close()


def _demand_storable(rows: RowsByImage, spec: BufferSpec) -> None:
    """Check all values before the first is written: a refused array leaves no half of a buffer in the way."""
    for site in spec.sites:
        values = rows.arrays[site.site]
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            as_stored(site, values[block], spec.dtype, rows.row_images[block], "image {}".format)


def _site(site: str, d_in: int, rows_per_image: int) -> SiteSpec:
    model, _, rest = site.partition("/")
    layer, _, policy = rest.partition("@")
    return SiteSpec(site, model, layer, policy or "pool", d_in, rows_per_image=rows_per_image)
