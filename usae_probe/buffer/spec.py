"""What a buffer is to hold: its sites, images, split and dtype, and the shards that follow from them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import SiteError, UsageError
from ..split import Split, SplitName

StoredDtype = Literal["float16", "float32"]
# Spelled out with the byte order: a buffer written on one machine is read on any other.
STORED: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
IMAGE_INDEX, TOKEN_INDEX = "image_index", "token_index"
MOMENTS = "moments:"
"""Before a site's key: the column of a training shard's mean and M2, [2, d_in]."""
HELD_OUT: tuple[SplitName, ...] = ("validation", "holdout")
_SHARD_BYTES = 2**27


@dataclass(frozen=True)
class SiteSpec:
    """One site of a buffer.

    Attributes:
        site: the key, such as `vit/blocks.8@mean`.
        model: the model's name; the part of `site` before the first `/`.
        layer: the layer as the model spells it.
        policy: the token policy.
        d_in: length of one row.
        grid: rows and columns of spatial places per image, where the policy has them.
        rows_per_image: rows that each image gives, equal for all sites of a buffer; 0 when it varies by image.
        weights_hash: of the model; empty when not known.
        preprocessing: of the images, JSON-able.
        layout: of the layer's output, where the user stated it; empty when it was found.
    """

    site: str
    model: str
    layer: str
    policy: str
    d_in: int
    grid: tuple[int, int] | None = None
    rows_per_image: int = 1
    weights_hash: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    layout: str = ""

    def __post_init__(self) -> None:
        model, slash, layer = self.site.partition("/")
        if not (model and slash and layer):
            raise SiteError(f"'{self.site}' is no site key", hint="write model/layer, such as 'vit/blocks.8@mean'")
        if self.d_in < 1 or self.rows_per_image < 0:
            raise SiteError(f"{self.site}: d_in={self.d_in} and rows_per_image={self.rows_per_image} are out of range")

    def to_identity(self) -> dict[str, Any]:
        """Return its entry in `BufferSpec.identity()`: without a layout where none was stated, as ever."""
        return {key: value for key, value in asdict(self).items() if key != "layout" or value}

    @classmethod
    def from_identity(cls, values: dict[str, Any]) -> SiteSpec:
        """Back from its entry in `BufferSpec.identity()`."""
        grid = values["grid"]
        return cls(**{**values, "grid": None if grid is None else (grid[0], grid[1])})


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """A shard and the images it covers.

    Attributes:
        index: number of the shard in the buffer.
        split: the one split it belongs to.
        start: position of its first image in that split's list.
        images: [n] int64, indices into the image source, in the order in which they are to be appended.
    """

    index: int
    split: SplitName
    start: int
    images: np.ndarray

    @property
    def file(self) -> str:
        """Name of the shard's file."""
        return f"shard-{self.index:05d}.h5"


@dataclass(frozen=True)
class RingSpec:
    """How a training uses up the training shards of a ring while they are written.

    Attributes:
        window: shards that rows are mixed in.
        warmup_shards: training shards after which the normalisation is frozen.
        reuse: times that every row is drawn.
        training: digest of the training's settings; rows that one has used up cannot serve another.
    """

    window: int
    warmup_shards: int
    reuse: int
    training: str


@dataclass(frozen=True, eq=False)
class BufferSpec:
    """Everything that a buffer is made from.

    Attributes:
        sites: at least one, with distinct keys and equal `rows_per_image`.
        source: the image source, JSON-able: kind, location, fingerprint, n_images.
        split: which images are used for what.
        split_request: limit, holdout, validation and seed that `split` was drawn by, JSON-able; shown, not compared.
        dtype: in which rows are stored.
        shard_images: images per shard, at most: see `images_per_shard`.
        batch_size: images per forward pass. It can change the last bits of activations.
        ring: where a training uses rows up while they are written; None to keep all of them.
    """

    sites: tuple[SiteSpec, ...]
    source: dict[str, Any]
    split: Split
    split_request: dict[str, Any]
    dtype: StoredDtype = "float16"
    shard_images: int = 512
    batch_size: int = 64
    ring: RingSpec | None = None

    def __post_init__(self) -> None:
        _check_sites(self.sites)
        if self.dtype not in STORED:
            raise UsageError(f"dtype '{self.dtype}' is not one of {', '.join(STORED)}")
        if self.shard_images < 1 or self.batch_size < 1:
            raise UsageError(f"shard_images={self.shard_images} and batch_size={self.batch_size} must be at least 1")
        images = np.concatenate([indices for _, indices in self.split])
        if len(np.unique(images)) != len(images):
            raise UsageError("the split holds an image more than once", hint="draw it with draw_split")

    def n_images(self, split: SplitName) -> int:
        """Images drawn for a split, decodable or not."""
        return len(self.split[split])

    @property
    def images_per_shard(self) -> int:
        """`shard_images`, or as many as 128 MiB hold where that is fewer: a shard is in memory while it is filled.

        The last shard of a split has the rest.
        """
        return max(1, min(self.shard_images, _SHARD_BYTES // self.image_bytes))

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes on disk, in all columns."""
        return STORED[self.dtype].itemsize * sum(site.d_in for site in self.sites) + 12

    @property
    def image_bytes(self) -> int:
        """Bytes that the rows of one image take on disk; of one row where their number varies."""
        return self.row_bytes * max(1, self.sites[0].rows_per_image)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the buffer's bits, as JSON gives it back.

        The split stands by its digest and counts, and the source's location is left out: a moved folder of images
        gives the same activations.
        """
        identity = {
            "sites": {site.site: site.to_identity() for site in self.sites},
            "site_order": [site.site for site in self.sites],
            "source": {key: value for key, value in self.source.items() if key != "location"},
            "split": {"digest": self.split.digest()} | {name: len(indices) for name, indices in self.split},
            "dtype": self.dtype,
            "shard_images": self.images_per_shard,
            "batch_size": self.batch_size,
        }
        if self.ring:
            identity["ring"] = asdict(self.ring)
        return as_json(identity, "the buffer's identity")

    def display(self) -> dict[str, Any]:
        """What is kept in the manifest for the reader only, and may differ between two equal buffers."""
        display = {"location": self.source.get("location", ""), "split_request": self.split_request}
        return as_json(display, "the split request")

    def plans(self) -> list[ShardPlan]:
        """The shards of this buffer: chunks of `shard_images` of each split; no shard holds images of two splits.

        Held-out images come first, so that a training which reads along can validate from the start.
        """
        size = self.images_per_shard
        chunks = [
            (name, start, self.split[name][start : start + size].astype(np.int64))
            for name in (*HELD_OUT, "train")
            for start in range(0, len(self.split[name]), size)
        ]
        return [ShardPlan(index, *chunk) for index, chunk in enumerate(chunks)]


def dataset_name(column: str) -> str:
    """Name of a column's dataset in a shard; a `/` in the column would make HDF5 groups."""
    group = "moments/" if column.startswith(MOMENTS) else ""
    return group + column.removeprefix(MOMENTS).replace("/", "__")


def as_json(values: dict[str, Any], what: str) -> dict[str, Any]:
    """Return `values` as a JSON round trip gives them (tuples become lists), so that they compare with a file's.

    Raises:
        UsageError: when JSON has no spelling for a value.
    """
    try:
        back: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{what} cannot be written as JSON: {error}", hint="use str, int, float, list, dict"
        ) from error
    return back


def _check_sites(sites: tuple[SiteSpec, ...]) -> None:
    if not sites:
        raise SiteError("a buffer needs at least one site and was given none")
    repeated = [name for name, count in Counter(dataset_name(site.site) for site in sites).items() if count > 1]
    if repeated:
        raise SiteError(f"several sites would be stored as dataset '{repeated[0]}'", hint="rename one of the models")
    if len({site.rows_per_image for site in sites}) > 1:
        given = ", ".join(f"{site.site}: {site.rows_per_image}" for site in sites)
        raise SiteError(
            f"sites of one buffer must give the same number of rows per image, not {given}",
            hint="@pool, @cls and @mean give one row per image and pair up; @patch pairs up with @patch",
        )
