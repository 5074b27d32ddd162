"""What the process takes of its machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("usae-probe", "torch", "torchvision", "timm", "nnsight", "numpy", "h5py", "scipy")
"""What results depend on."""


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those of these distributions that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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


def installed_memory() -> int | None:
    """Return the bytes of memory of this machine, where the system says so."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


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
