"""One writer per buffer: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import BufferLockedError, UsaeProbeError

_LOCK, _HOLDER = ".writer.lock", ".writer.json"
FILES = (_LOCK, _HOLDER)


class WriterLock:
    """The right to write to a folder, held until `release` or the end of the process.

    Args:
        folder: which exists.

    Raises:
        BufferLockedError: when somebody else holds it, with their process's id.
        UsaeProbeError: when the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._holder = folder / _HOLDER
        self._lock = FileLock(folder / _LOCK, thread_local=False)  # a producer's thread may give it back
        try:
            self._lock.acquire(timeout=0)
            self._holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        except Timeout as error:
            raise BufferLockedError(
                f"{folder} is being written by {self._named()}",
                hint="wait until it is done, or stop it; or give another folder",
            ) from error
        except OSError as error:
            self._lock.release()
            raise UsaeProbeError(
                f"the buffer {folder} cannot be written to: {error.strerror or error}",
                hint="see to the folder's permissions and the disk, or write to another folder",
            ) from error

    def _named(self) -> str:
        try:
            holder = json.loads(self._holder.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Let others write; nothing happens when that was done before."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()
