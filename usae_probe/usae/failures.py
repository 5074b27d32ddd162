"""What one of several processes that train together says when it fails."""

from __future__ import annotations

import re
from typing import TypeGuard

from ..errors import UsaeProbeError, first_line

_CONNECTION = re.compile("gloo|nccl|peer|connection|socket|timed out", re.IGNORECASE)


def spelled(error: BaseException) -> str:
    """Return what a process that fails tells the others."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, UsaeProbeError):
        return error.message
    if is_lost(error):
        said = re.sub(r"^\[\S*\] *", "", first_line(error)).split(". ")[0]  # without file and line of torch's source
        return f"lost another process ({said})"
    return f"{type(error).__name__}: {first_line(error) if isinstance(error, Exception) else error}"


def is_lost(error: BaseException) -> TypeGuard[RuntimeError]:
    """Say whether an error is only that another process is not there any more."""
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None
