"""The shard that is being filled: every batch is checked at the door, so that a sealed shard holds only good rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..errors import BufferIntegrityError, SiteError, UsageError, nearest
from .checks import as_stored
from .manifest import Skipped
from .spec import IMAGE_INDEX, STORED, TOKEN_INDEX, BufferSpec, ShardPlan


class OpenShard:
    """A shard in memory; `BufferWriter.shard` makes and seals it.

    Attributes:
        plan: the shard's split and images.
        skipped: images without rows so far.
        n_rows: rows appended so far.
    """

    def __init__(self, plan: ShardPlan, spec: BufferSpec, describe: Callable[[int], str] | None = None) -> None:
        self.plan = plan
        self.skipped: list[Skipped] = []
        self.n_rows = 0
        self._spec = spec
        self._sites = {site.site: site for site in spec.sites}
        self._describe = describe
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in (*self._sites, IMAGE_INDEX, TOKEN_INDEX)}
        self._position = {int(image): position for position, image in enumerate(plan.images)}
        self._done: set[int] = set()
        self._last = -1

    @property
    def n_done(self) -> int:
        """Images appended or skipped so far."""
        return len(self._done)

    def append(
        self, image_index: np.ndarray, rows: Mapping[str, np.ndarray], token_index: np.ndarray | None = None
    ) -> None:
        """Add the rows of some images; nothing is kept of a batch that is refused.

        Args:
            image_index: [n] images of the plan, in the plan's order. Where `rows_per_image` varies (0): the image of
                every row, the rows of one image together.
            rows: by site, [n * rows_per_image, d_in] of any float dtype, image by image.
            token_index: [n * rows_per_image] place of each row in its image; by default 0, 1, … within each image.

        Raises:
            SiteError: when the sites are not those of the spec.
            UsageError: when shapes do not fit, or images are not in the plan or out of order.
            NonFiniteError: for NaN or infinity, naming site, layer and image.
            PrecisionError: for a value that the buffer's dtype cannot hold, naming site and image.
        """
        images = np.array(image_index, dtype=np.int64).reshape(-1)  # a copy: callers reuse their batch
        per_image = self._spec.sites[0].rows_per_image
        row_images = np.repeat(images, per_image) if per_image else images
        starts = np.arange(len(images)) * per_image if per_image else _starts(images)
        last = self._demand_planned(row_images[starts])
        self._demand_paired(rows, len(row_images))
        tokens = np.arange(len(row_images)) - np.repeat(starts, np.diff([*starts, len(row_images)]))
        if token_index is not None:
            tokens = np.asarray(token_index).reshape(-1)
            if tokens.shape != row_images.shape:
                raise UsageError(f"{len(tokens)} token indices were given for {len(row_images)} rows")
        stored = {
            site: as_stored(spec, rows[site], self._spec.dtype, row_images, self._named)
            for site, spec in self._sites.items()
        }
        for name, values in (stored | {IMAGE_INDEX: row_images, TOKEN_INDEX: tokens.astype("<i4")}).items():
            self._columns[name].append(values)
        self._done.update(int(image) for image in row_images[starts])
        self._last = last
        self.n_rows += len(row_images)

    def skip(self, index: int, name: str, reason: str) -> None:
        """Leave out an image of the plan, for instance because it cannot be read.

        Raises:
            UsageError: when the image is not in the plan, or was appended or skipped before.
        """
        self._position_of(int(index))
        self.skipped.append(Skipped(int(index), name, reason))
        self._done.add(int(index))

    def demand_done(self) -> None:
        """Check that no image of the plan was forgotten.

        Raises:
            BufferIntegrityError: when one was neither appended nor skipped.
        """
        left = [image for image in self._position if image not in self._done]
        if left:
            raise BufferIntegrityError(
                f"shard {self.plan.index} ended with {len(left)} of its {len(self.plan.images)} images neither "
                f"appended nor skipped, the first is {self._named(left[0])}",
                hint="append or skip every image of the plan",
            )
        # In the plan's order, whenever they were reported: the manifest must not depend on the timing of loaders.
        self.skipped.sort(key=lambda image: self._position[image.index])

    def pop_column(self, name: str) -> np.ndarray:
        """Hand over a column as one array, and forget it."""
        pieces = self._columns.pop(name)
        if name in self._sites:
            empty = np.empty((0, self._sites[name].d_in), STORED[self._spec.dtype])
        else:
            empty = np.empty(0, "<i8" if name == IMAGE_INDEX else "<i4")
        return np.concatenate([empty, *pieces])

    def _position_of(self, image: int) -> int:
        if image not in self._position or image in self._done:
            what = "was given before" if image in self._done else "is not in its plan"
            raise UsageError(f"shard {self.plan.index}: {self._named(image)} {what}")
        return self._position[image]

    def _demand_planned(self, images: np.ndarray) -> int:
        positions = [self._position_of(int(image)) for image in images]
        for before, position, image in zip([self._last, *positions], positions, images, strict=False):
            if position <= before:
                raise UsageError(
                    f"shard {self.plan.index}: {self._named(int(image))} came after a later image of the plan",
                    hint="append images in the plan's order, the rows of one image together",
                )
        return positions[-1] if positions else self._last

    def _demand_paired(self, rows: Mapping[str, np.ndarray], n: int) -> None:
        for site in (*self._sites, *rows):
            if site not in self._sites or site not in rows:
                what = "was not given" if site in self._sites else "is not a site of this buffer"
                hint = nearest(site, self._sites if site in rows else rows)
                raise SiteError(f"{site} {what}; it has {', '.join(self._sites)}", hint=hint)
        for site, spec in self._sites.items():
            if rows[site].shape != (n, spec.d_in):
                raise UsageError(
                    f"{site}: rows of shape {list(rows[site].shape)} were given where {[n, spec.d_in]} were expected",
                    hint="row i of every site must come from the same image, and the same place in it",
                )

    def _named(self, image: int) -> str:
        return f"image {image} ({self._describe(image)})" if self._describe else f"image {image}"


def _starts(row_images: np.ndarray) -> np.ndarray:
    """Rows at which another image begins."""
    return np.flatnonzero(np.r_[True, row_images[1:] != row_images[:-1]]) if len(row_images) else np.empty(0, np.int64)
