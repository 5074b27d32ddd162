"""Decoding many pictures in order: batch after batch, in threads where asked, without losing a failed one silently."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, ImageError
from .sources import ImageSource


class SkippedImage(NamedTuple):
    """A picture that could not be decoded.

    Attributes:
        index: its place in the source.
        name: what the source calls it.
        reason: the error's message.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    name: str
    reason: str


class LoadedImages(NamedTuple):
    """Decoded pictures of a batch.

    Attributes:
        indices: int64 [b], places in the source of the pictures that were decoded, in the order asked for.
        pictures: b tensors uint8 [3, h, w], of any sizes.
        skipped: the others.
    """

    indices: np.ndarray
    pictures: list[Tensor]
    skipped: list[SkippedImage]


def load_images(source: ImageSource, indices: Sequence[int] | np.ndarray, *, workers: int = 0) -> LoadedImages:
    """Decode the pictures at `indices`, each once.

    Args:
        source: where they come from.
        indices: places in the source.
        workers: threads that decode; 0 decodes in the calling thread.

    Raises:
        ConfigError: when `workers` is negative.
    """
    batches = iter_batches(source, indices, max(1, len(indices)), workers=workers)
    return next(batches, LoadedImages(np.empty(0, dtype=np.int64), [], []))


def iter_batches(
    source: ImageSource, indices: Sequence[int] | np.ndarray, batch_size: int, *, workers: int = 0
) -> Iterator[LoadedImages]:
    """Decode the pictures at `indices` in batches; the last one may be smaller.

    A picture that cannot be decoded is listed in its batch's `skipped` and not replaced, so a batch may hold fewer
    pictures, even none. Any exception but `ImageError` passes. With threads one batch is decoded ahead.

    Args:
        source: where they come from.
        indices: places in the source.
        batch_size: pictures per batch, at least 1.
        workers: threads that decode; 0 decodes in the calling thread.

    Raises:
        ConfigError: when `batch_size` or `workers` is out of range.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    if workers < 0:
        raise ConfigError(f"workers is {workers}, expected 0 (no threads) or more")
    wanted = np.asarray(indices, dtype=np.int64).tolist()
    parts = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    if workers == 0:
        return (_collect(part, [_load_one(source, index) for index in part]) for part in parts)
    return _threaded(source, parts, workers)


def _threaded(source: ImageSource, parts: list[list[int]], workers: int) -> Generator[LoadedImages, None, None]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="usae-probe-images")
    ahead: deque[tuple[list[int], list[Future[Tensor | SkippedImage]]]] = deque()
    try:
        for part in parts:
            ahead.append((part, [pool.submit(_load_one, source, index) for index in part]))
            if len(ahead) == 2:
                yield _collect_futures(*ahead.popleft())
        while ahead:
            yield _collect_futures(*ahead.popleft())
    finally:
        # Also when the caller stops early: no thread may outlive the generator.
        pool.shutdown(wait=True, cancel_futures=True)


def _load_one(source: ImageSource, index: int) -> Tensor | SkippedImage:
    try:
        picture = source.load(index)
    except ImageError as error:
        return SkippedImage(index, source.describe(index), str(error))
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def _collect_futures(part: list[int], futures: list[Future[Tensor | SkippedImage]]) -> LoadedImages:
    return _collect(part, [future.result() for future in futures])


def _collect(part: list[int], results: list[Tensor | SkippedImage]) -> LoadedImages:
    kept = [(index, result) for index, result in zip(part, results, strict=True) if isinstance(result, Tensor)]
    return LoadedImages(
        indices=np.array([index for index, _ in kept], dtype=np.int64),
        pictures=[picture for _, picture in kept],
        skipped=[result for result in results if isinstance(result, SkippedImage)],
    )
