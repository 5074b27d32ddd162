"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError, first_line

RESTORE = "restore it, or remove it: `usae-probe run` then makes it again"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on leaving without exception it becomes `path`, durably.

    Raises:
        OSError: what the disk did not take, with `path` as its `filename`, whoever wrote.
    """
    with replacing_all(path) as (temporary,):
        yield temporary


@contextmanager
def replacing_all(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """`replacing` for files that belong together: none gets its name before all are on the disk."""
    temporaries = tuple(path.with_name(f".{path.name}.tmp-{os.getpid()}") for path in paths)
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporaries
        for temporary in temporaries:
            temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
            _sync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            _rename(temporary, path)
    except SafetensorError as error:
        raise _of_disk(error, paths[0]) from error
    except OSError as error:
        own = {str(path) for path in (*temporaries, *(path.parent for path in paths))}
        if error.filename is None or str(error.filename) in own:
            raise OSError(error.errno, error.strerror or first_line(error), str(paths[0])) from error
        raise
    finally:
        for temporary in temporaries:
            with suppress(OSError):  # the error that is under way says more
                temporary.unlink(missing_ok=True)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name so that, after a crash at any moment, `final` is whole or not there.

    The order matters: bytes to disk, then the name, then the folder that holds the name.
    """
    _sync(temporary)
    _rename(temporary, final)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _rename(temporary: Path, final: Path) -> None:
    os.replace(temporary, final)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _of_disk(error: SafetensorError, path: Path) -> Exception:
    """Return the OSError that safetensors reports as words; itself when it is none."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(data: Mapping[str, Any]) -> str:
    """Return `data` as indented JSON; NaN and infinity, which JSON does not know, are refused (ValueError)."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace `path` by `data` as indented JSON without NaN, atomically."""
    write_text(path, json_text(data))


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        CheckpointError: when it is not there, or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {first_line(error)}", hint=RESTORE) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, expected an object", hint=RESTORE)
    return content


def csv_text(rows: Sequence[Mapping[str, Any]], *, names: Iterable[str] = ()) -> str:
    """Return rows as CSV under a line of names: all that a row has, in order, or those given where there is no row."""
    text = io.StringIO()
    fields = dict.fromkeys(name for row in rows for name in row) or dict.fromkeys(names)
    writer = csv.DictWriter(text, fieldnames=list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_sha256(data: Any) -> str:
    """Hash data by their JSON, whatever the order of keys; what JSON does not know counts as it prints."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
