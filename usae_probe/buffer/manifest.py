"""The manifest: what a buffer's folder holds, and the one place that decides which shards count."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BufferIntegrityError, BufferMismatchError
from ..files import json_sha256, publish
from ..split import SplitName
from .moments import Moments
from .spec import BufferSpec

SCHEMA = 2  # 1: training shards came first, and held no moments of their own
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Skipped:
    """An image without rows, and why.

    Attributes:
        index: of the image in the source.
        name: of the image, as the source spells it.
        reason: what went wrong with it.
    """

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class ShardEntry:
    """A sealed shard.

    Attributes:
        file: name in the buffer's folder.
        split: the split it belongs to.
        start: position of its first image in that split's list.
        n_images: images with rows.
        rows: rows of every dataset.
        size: bytes of the file.
        crc: CRC32 of each dataset's bytes, by column (a site's key, `image_index` or `token_index`).
        skipped: images of this shard without rows.
        dropped: its rows were used and its file is gone (`ring` only).
    """

    file: str
    split: SplitName
    start: int
    n_images: int
    rows: int
    size: int
    crc: dict[str, int]
    skipped: tuple[Skipped, ...] = ()
    dropped: bool = False

    @property
    def index(self) -> int:
        """Number of the shard in the buffer's plan."""
        return int(self.file.removeprefix("shard-").removesuffix(".h5"))

    @property
    def n_planned(self) -> int:
        """Images that the shard covers, with or without rows."""
        return self.n_images + len(self.skipped)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardEntry:
        """Back from `asdict`.

        Raises:
            ValueError: when its file is no name in a buffer's folder.
        """
        entry = cls(**{**values, "skipped": tuple(Skipped(**image) for image in values["skipped"])})
        if not re.fullmatch(r"shard-[0-9]{5,}\.h5", entry.file):
            raise ValueError(f"'{entry.file}' is no name of a shard")
        return entry


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`.

    Attributes:
        identity: `BufferSpec.identity()`.
        display: `BufferSpec.display()`.
        moments: by site, over the training rows of all sealed shards.
        shards: the sealed shards, in the order of the plan.
        complete: no shard is missing, or in a ring none that a training still waits for.
        frozen: by site, the moments that a training which reads along goes by; None before `warmup_rows`.
        schema: of the file that it was read from.
    """

    identity: dict[str, Any]
    display: dict[str, Any]
    moments: Mapping[str, Moments]
    shards: tuple[ShardEntry, ...] = ()
    complete: bool = False
    frozen: Mapping[str, Moments] | None = None
    schema: int = SCHEMA

    @classmethod
    def of(cls, spec: BufferSpec) -> Manifest:
        """The manifest of a buffer without any shard yet."""
        return cls(spec.identity(), spec.display(), {site.site: Moments(site.d_in) for site in spec.sites})

    @property
    def present(self) -> list[ShardEntry]:
        """The shards whose files are to be there."""
        return [entry for entry in self.shards if not entry.dropped]

    def entries(self, split: SplitName) -> list[ShardEntry]:
        """The sealed shards of a split, the dropped ones too."""
        return [entry for entry in self.shards if entry.split == split]

    def with_shards(self, entries: Iterable[ShardEntry], moments: Mapping[str, Moments]) -> Manifest:
        """This manifest after more shards were sealed; `moments` are those of all."""
        together = sorted([*self.shards, *entries], key=lambda entry: entry.index)
        return replace(self, shards=tuple(together), moments=moments)

    def with_frozen(self, moments: Mapping[str, Moments]) -> Manifest:
        """This manifest after the warm-up."""
        return replace(self, frozen={site: so_far.copy() for site, so_far in moments.items()})

    def without(self, files: Collection[str]) -> Manifest:
        """This manifest after the rows of some shards were used up."""
        return replace(self, shards=tuple(replace(e, dropped=e.dropped or e.file in files) for e in self.shards))

    def with_display(self, spec: BufferSpec) -> Manifest:
        """This manifest with what is shown of `spec`, such as the place that the images have moved to."""
        return replace(self, display=spec.display())

    def completed(self) -> Manifest:
        """This manifest after the last shard."""
        return replace(self, complete=True)

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest atomically: a reader sees the old one or the new one, never a part."""
        document = {"schema": SCHEMA, "identity": self.identity, "display": self.display, "complete": self.complete}
        document["shards"] = [asdict(entry) for entry in self.shards]
        document["moments"] = {site: moments.to_dict() for site, moments in self.moments.items()}
        if self.frozen is not None:
            document["frozen"] = {site: moments.to_dict() for site, moments in self.frozen.items()}
        document["sha256"] = json_sha256(document)
        temporary = folder / (MANIFEST + TEMPORARY)
        try:
            temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
            publish(temporary, folder / MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            BufferIntegrityError: when there is none, or it is damaged or of a newer schema.
        """
        document = _read(folder / MANIFEST)
        try:
            return cls(
                document["identity"],
                document["display"],
                _moments(document["moments"]),
                tuple(map(ShardEntry.from_dict, document["shards"])),
                document["complete"],
                _moments(document["frozen"]) if "frozen" in document else None,
                document["schema"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder / MANIFEST, f"its content is not what it should be ({error})") from error

    def demand_equal(self, spec: BufferSpec, folder: Path) -> None:
        """Check that this manifest is of a buffer made from `spec`.

        Raises:
            BufferMismatchError: naming every field that differs, with both values.
        """
        lines = list(_differences(self.identity, spec.identity()))
        if self.schema != SCHEMA and not self.complete:
            lines.append(f"schema: {self.schema} on disk, {SCHEMA} is what this version can go on with")
        if not lines:
            return
        # Digests of index lists tell a reader nothing; what they were drawn by does.
        if any(line.startswith("split.") for line in lines):
            asked = spec.display()["split_request"]
            lines += _differences(self.display["split_request"], asked, "split_request")
        raise BufferMismatchError(
            f"the buffer {folder} was made from something else than what is asked for:\n  " + "\n  ".join(lines),
            hint="write to another folder, or delete this one to harvest again",
        )


def _moments(values: Mapping[str, Any]) -> dict[str, Moments]:
    return {site: Moments.from_dict(of_site) for site, of_site in values.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
        schema = int(document["schema"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BufferIntegrityError(
            f"{path.parent} is no buffer: it has no {path.name}", hint="give the folder that harvest wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    if schema > SCHEMA:
        raise BufferIntegrityError(
            f"{path} has schema {schema}; this version of usae-probe reads schemas up to {SCHEMA}",
            hint="upgrade usae-probe to read this buffer",
        )
    given = document.pop("sha256", None)
    if given != json_sha256(document):
        raise _damaged(path, f"its content does not give its checksum {given}")
    return dict(document)


def _damaged(path: Path, why: str) -> BufferIntegrityError:
    return BufferIntegrityError(
        f"the manifest {path} is damaged: {why}", hint="restore it from a copy, or delete the folder and harvest again"
    )


_ABSENT = object()


def _differences(on_disk: Any, asked: Any, path: str = "") -> Iterator[str]:
    if isinstance(on_disk, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*on_disk, *asked]):
            below = f"{path}.{key}" if path else key
            yield from _differences(on_disk.get(key, _ABSENT), asked.get(key, _ABSENT), below)
    elif on_disk != asked:
        yield f"{path}: {_shown(on_disk)} on disk, {_shown(asked)} asked for"


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
