"""The cells of a scan: which sites are compared with which, and a file that keeps every cell that is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ...files import json_sha256
from ...sites import model_of

Pair = tuple[str, str]


def pairs_between(sites: Sequence[str]) -> list[Pair]:
    """Return every two sites of different models, each once; of one model alone every two of its sites.

    >>> pairs_between(["a/1", "a/2", "b/1"]), pairs_between(["a/1", "a/2"])
    ([('a/1', 'b/1'), ('a/2', 'b/1')], [('a/1', 'a/2')])
    """
    every = list(combinations(sites, 2))
    between = [(a, b) for a, b in every if model_of(a) != model_of(b)]
    return between or every


class KeptCells:
    """A file of finished cells, a line each, so that an interrupted scan loses none of them.

    A line that a crash left unfinished, and lines of other settings, count as not there.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["values"]
                except (ValueError, KeyError, TypeError):
                    continue

    def get(self, what: str, cell: Sequence[str], settings: Mapping[str, Any]) -> Any | None:
        """Return what was kept of a measure's cell under these settings; None when nothing was."""
        return self._known.get(_key(what, cell, settings))

    def put(self, what: str, cell: Sequence[str], settings: Mapping[str, Any], values: Any) -> None:
        """Keep a cell; NaN is kept as null."""
        key = _key(what, cell, settings)
        self._known[key] = values
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "what": what, "cell": list(cell), "values": values}, allow_nan=False)
        with self.path.open("ab") as file:
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")  # after a line that a crash cut off
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_with_newline(self) -> bool:
        if self.path is None:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _key(what: str, cell: Sequence[str], settings: Mapping[str, Any]) -> str:
    return json_sha256({"what": what, "cell": list(cell), "settings": settings})
