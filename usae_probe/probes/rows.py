"""Rows as the probes read them: whole images in chunks, some rows of a split, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..buffer import ActivationBuffer, Rows
from ..errors import BufferIntegrityError, SiteError, nearest
from ..sites import model_of
from ..split import SplitName, spoken
from ..usae import USAE
from .firing import image_begins

CHUNK_ROWS = 1024


class RowProgress:
    """Tells a callback how many rows of how many are done.

    Args:
        callback: called with (rows done, rows in all); may be None.
        total: rows in all.
    """

    def __init__(self, callback: Callable[[int, int], None] | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def add(self, rows: int) -> None:
        """Say that so many more rows are done."""
        self.done += rows
        if self.callback:
            self.callback(self.done, self.total)


def one_site_per_model(sites: Sequence[str], asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the sites that the classes are about: those asked for, or the last listed of each model.

    Raises:
        SiteError: for a site the USAE does not have, two of one model, or none at all.
    """
    if asked is None:
        return tuple({model_of(site): site for site in sites}.values())
    if not asked:
        raise SiteError("probes.sites is empty", hint=f"leave it out, or choose from: {', '.join(sites)}")
    for site in asked:
        if site not in sites:
            raise SiteError(
                f"probes.sites names '{site}', which is not trained on",
                hint=f"{nearest(site, sites)} sites: {', '.join(sites)}".strip(),
            )
    models = [model_of(site) for site in asked]
    for model in models:
        if models.count(model) > 1:
            raise SiteError(
                f"probes.sites names model '{model}' twice: {', '.join(asked)}",
                hint="classes compare one site per model",
            )
    return tuple(asked)


def check_sites(usae: USAE, buffer: ActivationBuffer, sites: Sequence[str]) -> None:
    """Check that the buffer has rows of these sites as the USAE was trained on.

    Raises:
        BufferIntegrityError: naming the first site that it has not, or of another width.
    """
    for site in sites:
        if buffer.d_in.get(site) != usae.d_in[site]:
            found = f"d_in {buffer.d_in[site]}" if site in buffer.d_in else "no such site"
            raise BufferIntegrityError(
                f"the USAE was trained on '{site}' with d_in {usae.d_in[site]}, the buffer has {found}",
                hint="evaluate on the buffer it was trained on",
            )


def check_rows(buffer: ActivationBuffer, split: SplitName) -> None:
    """Check that there are rows to measure on.

    Raises:
        BufferIntegrityError: when a split has fewer than two.
    """
    if (n := buffer.n_rows(split)) < 2:
        raise BufferIntegrityError(
            f"the buffer has {n} {spoken(split)} rows, evaluation needs at least 2",
            hint=f"set images.{split} above 0 and harvest again" if split != "train" else "harvest more images",
        )


def rows_per_image(buffer: ActivationBuffer, sites: Sequence[str]) -> int:
    """Return how many rows every image has; 0 where they have different numbers."""
    return int(buffer.specs[sites[0]].rows_per_image)


def whole_images(buffer: ActivationBuffer, split: SplitName, sites: Sequence[str]) -> Iterator[Rows]:
    """Yield the rows of a split in chunks that end where an image ends."""
    per_image = rows_per_image(buffer, sites)
    size = max(1, CHUNK_ROWS // max(per_image, 1)) * max(per_image, 1)
    held: Rows | None = None
    for rows in buffer.chunks(split, size, list(sites)):
        if per_image:
            yield rows
            continue
        joined = rows if held is None else _joined(held, rows)
        last = int(image_begins(joined.image_index)[-1])  # more rows of the last image may follow
        held = _part(joined, slice(last, None))
        if last:
            yield _part(joined, slice(last))
    if held is not None:
        yield held


def some_rows(buffer: ActivationBuffer, split: SplitName, n: int, sites: Sequence[str]) -> Iterator[Rows]:
    """Yield n rows spread evenly over the split (all, where it has no more), in chunks."""
    total = buffer.n_rows(split)
    chosen = np.linspace(0, total, min(n, total), endpoint=False).astype(np.int64)
    for start in range(0, len(chosen), CHUNK_ROWS):
        yield buffer.gather(split, chosen[start : start + CHUNK_ROWS], list(sites))


def _part(rows: Rows, part: slice) -> Rows:
    values = {site: x[part] for site, x in rows.values.items()}
    return Rows(values, rows.image_index[part], rows.token_index[part])


def _joined(first: Rows, then: Rows) -> Rows:
    values = {site: np.concatenate([x, then.values[site]]) for site, x in first.values.items()}
    return Rows(values, *(np.concatenate(pair) for pair in zip(first[1:], then[1:], strict=True)))
