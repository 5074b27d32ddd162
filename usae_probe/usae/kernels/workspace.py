"""Buffers that are used again: large tensors on CPU without asking the system for fresh pages in every step."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST = 4 << 20  # bytes; below, the C library's own allocator hands the same pages out again
_ALIGNED = 64  # bytes, as torch's allocator does
_FORGOTTEN = 64  # requests after which a buffer that nobody took is given back


class _Buffer:
    """Memory, and the last array over it that was handed out: dead once the last tensor over it is."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        memory = np.empty(nbytes + _ALIGNED, dtype=np.uint8)
        start = -memory.ctypes.data % _ALIGNED
        self.memory = memory[start : start + nbytes]
        self.taken: weakref.ref[Any] | None = None
        self.last = 0

    @property
    def is_free(self) -> bool:
        return self.taken is None or self.taken() is None

    def take(self, nbytes: int) -> Tensor:
        array = self.memory[:nbytes]
        self.taken = weakref.ref(array)
        return torch.from_numpy(array)  # the tensor's storage holds the array, every alias holds the storage


class Workspace:
    """Hands out uninitialised CPU tensors, over memory of earlier ones that are gone.

    A fresh tensor above 32 MB costs a page fault per 4 KB, which doubles the time of an encoder product. Memory is
    handed out again only when no tensor, view or graph holds it any more, so nothing has to be given back.
    """

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []
        self._requests = 0
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor; a small one, or one of another device, is torch's own."""
        nbytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or nbytes < SMALLEST:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        with self._lock:
            return self._buffer(nbytes).take(nbytes).view(dtype).view(tuple(shape))

    def _buffer(self, nbytes: int) -> _Buffer:
        self._requests += 1
        fitting = [b for b in self._buffers if b.is_free and nbytes <= b.nbytes <= 2 * nbytes]
        found = min(fitting, key=lambda b: b.nbytes, default=None)
        if found is None:
            oldest = self._requests - _FORGOTTEN
            self._buffers = [b for b in self._buffers if not b.is_free or b.last >= oldest]
            found = _Buffer(nbytes)
            self._buffers.append(found)
        found.last = self._requests
        return found

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return (Workspace, ())  # a copy starts with no memory
