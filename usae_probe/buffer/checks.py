"""What may be stored: finite values that the buffer's dtype can hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import NonFiniteError, PrecisionError
from .spec import STORED, SiteSpec, StoredDtype


def as_stored(
    spec: SiteSpec, values: np.ndarray, dtype: StoredDtype, row_images: np.ndarray, named: Callable[[int], str]
) -> np.ndarray:
    """Return `values` [n, d_in] in the dtype of a buffer, as a copy.

    Args:
        spec: the site that they are of.
        values: of any float dtype.
        dtype: the buffer's.
        row_images: [n] the image of each row.
        named: what to call an image in a message.

    Raises:
        NonFiniteError: for NaN or infinity.
        PrecisionError: for a finite value that `dtype` would turn into infinity, or rows that all lie below its
            smallest normal number.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = _first(bad)
        count = f"{bad.any(axis=1).sum()} of {len(values)} rows of this batch are not finite"
        raise NonFiniteError(
            f"{spec.site}: layer '{spec.layer}' of model '{spec.model}' gave {values[row, column]} for "
            f"{named(int(row_images[row]))} ({count})",
            hint="check this image, and the dtype that the model runs in",
        )
    with np.errstate(over="ignore"):  # the check below names the value
        stored = values.astype(STORED[dtype])
    largest = float(np.abs(values).max(initial=0.0))
    if 0.0 < largest < float(np.finfo(stored.dtype).tiny):
        raise PrecisionError(
            f"{spec.site}: no value of these {len(values)} rows is above {largest:.3g}; {dtype} loses them",
            hint='set [buffer] dtype = "float32"' if dtype == "float16" else "scale the activations up",
        )
    lost = ~np.isfinite(stored)
    if lost.any():
        row, column = _first(lost)
        raise PrecisionError(
            f"{spec.site}: {values[row, column]:g} in dimension {column} for {named(int(row_images[row]))} "
            f"does not fit {dtype} (largest {np.finfo(stored.dtype).max:g})",
            hint='set [buffer] dtype = "float32"' if dtype == "float16" else "scale the activations down",
        )
    return stored


def _first(mask: np.ndarray) -> tuple[int, int]:
    row, column = np.unravel_index(int(np.argmax(mask)), mask.shape)
    return int(row), int(column)
