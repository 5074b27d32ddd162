"""`history.jsonl`: the records of a training, a line each, written as they come."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..files import write_text
from .records import StepRecord


class HistoryFile:
    """Appends records; a training that goes on at step t first cuts off what an earlier run wrote from t on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> HistoryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            with suppress(OSError) if kind else nullcontext():  # a full disk has been told of
                self._file.close()

    def add(self, record: StepRecord, *, keep: bool) -> None:
        """Write the record if `keep`; the first one, kept or not, decides what is cut off."""
        if self._file is None:
            lines = [json.dumps(old) for old in read_history(self.path) if old["step"] < record.step]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
            self._file = self.path.open("a", encoding="utf-8")
        if keep:
            line = json.dumps(_finite(asdict(record)), allow_nan=False) + "\n"
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a history file; a line that was cut off by a kill ends it."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _finite(value: Any) -> Any:
    """Put null where JSON has no number: R² of a target that does not vary."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
