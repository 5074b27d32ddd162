"""One writer per buffer: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from ..errors import BufferLockedError, UsaeProbeError

LOCK, HOLDER = ".writer.lock", ".writer.json"
FILES = (LOCK, HOLDER)


class Holder(NamedTuple):
    """Who writes to a folder."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def holder(folder: Path) -> Holder | None:
    """Return who writes to a folder, as far as can be told without disturbing them.

    A process of this machine that has ended does not; one of another machine is believed.
    """
    try:
        noted = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
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


class WriterLock:
    """The right to write to a folder, held until `release` or the end of the process.

    Args:
        folder: which exists.

    Raises:
        BufferLockedError: when somebody else holds it, with their process's id.
        UsaeProbeError: when the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._holder = folder / HOLDER
        self._lock = FileLock(folder / LOCK, thread_local=False)  # a producer's thread may give it back
        try:
            self._lock.acquire(timeout=0)
            self._holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        except Timeout as error:
            raise BufferLockedError(
                f"{folder} is being written by {holder(folder) or 'another process'}",
                hint="wait until it is done, or stop it; or give another folder",
            ) from error
        except OSError as error:
            self._lock.release()
            raise UsaeProbeError(
                f"the buffer {folder} cannot be written to: {error.strerror or error}",
                hint="see to the folder's permissions and the disk, or write to another folder",
            ) from error

    def release(self) -> None:
        """Let others write; nothing happens when that was done before."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()
