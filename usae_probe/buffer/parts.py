"""What each of several processes has written, until process 0 puts it into the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import json_sha256, write_text
from .manifest import SCHEMA, TEMPORARY, ShardEntry

_PART = "manifest.part-{:05d}.json"
_PARTS = "manifest.part-*.json"


def save_part(folder: Path, rank: int, identity: dict[str, Any], entries: Iterable[ShardEntry]) -> None:
    """Replace, atomically, what process `rank` says of the shards that it has sealed."""
    document = {"schema": SCHEMA, "identity": json_sha256(identity), "shards": [asdict(entry) for entry in entries]}
    document["sha256"] = json_sha256(document)
    write_text(folder / _PART.format(rank), json.dumps(document) + "\n")


def read_parts(folder: Path, identity: dict[str, Any]) -> Iterator[ShardEntry]:
    """Yield the shards of all parts of a buffer; a part that is damaged, or of another one, counts as not there.

    Its shards are written again then: nothing but time is lost.
    """
    for path in sorted(folder.glob(_PARTS)):
        try:
            document = json.loads(path.read_bytes())
            given = document.pop("sha256")
            if given != json_sha256(document) or document["schema"] != SCHEMA:
                continue
            if document["identity"] == json_sha256(identity):
                yield from map(ShardEntry.from_dict, document["shards"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue


def remove_parts(folder: Path) -> None:
    """Remove all parts, once the manifest holds what they say, and what is left of one that was being written."""
    for pattern in (_PARTS, f".{_PARTS}{TEMPORARY}-*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
