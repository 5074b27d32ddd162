"""What the process takes of its machine."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    try:  # on Linux a process that a larger one started has that one's ru_maxrss
        return _status("VmHWM:")
    except (OSError, ValueError, IndexError):
        pass
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def memory() -> int:
    """Return the resident size of this process, in bytes; the largest so far where only that is known."""
    try:
        return _status("VmRSS:")
    except (OSError, ValueError, IndexError):
        return peak_memory()


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder, 0 without one; files that come and go meanwhile may be missed."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(key)[2].split()[0])
