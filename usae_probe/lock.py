"""One writer per folder: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from .errors import FolderLockedError, UsaeProbeError, first_line


class Holder(NamedTuple):
    """Who writes to a folder."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class FolderLock:
    """The right to write to a folder, held until `release` or the end of the process.

    Args:
        folder: which exists.
        name: of the two files there: `.<name>.lock` and, with who holds it, `.<name>.json`.
        what: the folder is, for messages.

    Raises:
        FolderLockedError: when somebody else holds it, with their process's id.
        UsaeProbeError: when the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, name: str = "writer", what: str = "the buffer") -> None:
        lock, self._holder = lock_files(folder, name)
        self._lock = FileLock(lock, thread_local=False)  # a producer's thread may give it back
        try:
            self._lock.acquire(timeout=0)
            self._holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        except Timeout as error:
            raise FolderLockedError(
                f"{folder} is being written by {holder(folder, name) or 'another process'}",
                hint="wait until it is done, or stop it; or give another folder",
            ) from error
        except OSError as error:
            self._lock.release()
            raise UsaeProbeError(
                f"{what} {folder} cannot be written to: {error.strerror or first_line(error)}",
                hint="see to the folder's permissions and the disk, or write to another folder",
            ) from error

    def release(self) -> None:
        """Let others write; nothing happens when that was done before."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()


def lock_files(folder: Path, name: str = "writer") -> tuple[Path, Path]:
    """Return the two files of a lock: what is locked, and who holds it."""
    return folder / f".{name}.lock", folder / f".{name}.json"


def holder(folder: Path, name: str = "writer") -> Holder | None:
    """Return who writes to a folder, as far as can be told without disturbing them.

    A process of this machine that has ended does not; one of another machine is believed.
    """
    try:
        noted = json.loads(lock_files(folder, name)[1].read_text(encoding="utf-8"))
        found = Holder(int(noted["pid"]), str(noted["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found.host == socket.gethostname() and os.name == "posix":  # on Windows signal 0 ends a process
        try:
            os.kill(found.pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass  # another user's
    return found


_RUN = "run"
_claimed: dict[Path, int] = {}  # folder: the thread whose work it is


@contextmanager
def claiming(folder: Path) -> Iterator[None]:
    """Hold the right to do the work of a run, sweep or scan folder; parts of that work may claim it again.

    Where nothing can be written there is nothing to hold: who tries to write says so. A folder that was made for this
    and stayed empty is removed again.

    Raises:
        FolderLockedError: when another process or thread is at work in it.
    """
    place, thread = folder.resolve(), threading.get_ident()
    if _claimed.get(place) == thread:
        yield
        return
    new, lock = not folder.exists(), _lock_of_run(folder)
    if lock is None:
        yield
        return
    _claimed[place] = thread
    try:
        yield
    finally:
        del _claimed[place]
        lock.release()
        if new:
            _remove_if_empty(folder)


def _lock_of_run(folder: Path) -> FolderLock | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FolderLock(folder, name=_RUN, what="the folder")
    except FolderLockedError:
        raise
    except (OSError, UsaeProbeError):
        return None


def _remove_if_empty(folder: Path) -> None:
    lock, _ = lock_files(folder, _RUN)
    with suppress(OSError):
        if not {*folder.iterdir()} - {lock}:
            lock.unlink(missing_ok=True)
            folder.rmdir()
