"""Errors: each says what was given, what was expected and what to do.

`UsageError` and its subclasses are everything that can be known from arguments, config and model structure; the
command line turns them into exit status 2, every other `UsaeProbeError` into 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsaeProbeError(Exception):
    """Base of all errors this package raises on purpose.

    Args:
        message: what was given and what was expected, in one line.
        hint: what to do about it; empty when there is nothing useful to add.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(UsaeProbeError):
    """The request itself is wrong: arguments, config or model structure say so before any work starts."""


class ConfigError(UsageError):
    """A config file that cannot be read, has an unknown key or a value out of range."""


class SiteError(UsageError):
    """A site that does not follow the grammar, or that its layer cannot serve."""


class NotBuiltError(UsageError):
    """Part of the design that this version parses but cannot do yet."""


class UnknownAdapterError(UsageError):
    """No installed adapter has that name."""


class UnknownLayerError(UsageError):
    """The model has no such layer, or never runs it."""


class NoLatentsError(UsageError):
    """No latent is of the kind that pictures were asked for."""


class AdapterError(UsaeProbeError):
    """An adapter could not be imported or could not build its model."""


class CheckpointError(UsaeProbeError):
    """Weights that cannot be read or do not fit the model."""


class ImageError(UsaeProbeError):
    """An image source that is missing, empty or unreadable."""


class BufferIntegrityError(UsaeProbeError):
    """A buffer on disk that is missing, damaged or of another schema."""


class BufferMismatchError(UsaeProbeError):
    """A buffer that was made from something else than what is asked for now."""


class FolderLockedError(UsaeProbeError):
    """A buffer, or the folder of a run, that another process is writing to."""


class PrecisionError(UsaeProbeError):
    """A value that the buffer's dtype cannot hold."""


class NonFiniteError(UsaeProbeError):
    """NaN or infinity in activations or in a loss."""


class StageError(UsaeProbeError):
    """A stage was asked for before the stage it needs, or with results of another config."""


class WorkerError(UsaeProbeError):
    """One of several processes that train together failed.

    Args:
        message: which process, and why.
        hint: what to do about it.
        told: process 0 says it, so that this one need not.
    """

    def __init__(self, message: str, *, hint: str = "", told: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.told = told


class UsaeProbeWarning(UserWarning):
    """Something that works but is probably not what was meant; shown once."""


def first_line(error: Exception) -> str:
    """Return the first line of another library's message that says something: what follows is often a page."""
    return next((line for line in str(error).splitlines() if line.strip()), "")


def nearest(name: str, options: Iterable[str], *, n: int = 3) -> str:
    """Return `did you mean a, b or c?` for the options nearest to `name`, or an empty string.

    >>> nearest("layer5", ["layer4", "layer3", "fc"], n=1)
    "did you mean 'layer4'?"
    """
    close = difflib.get_close_matches(name, list(options), n=n, cutoff=0.5)
    if not close:
        return ""
    quoted = [f"'{option}'" for option in close]
    joined = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]
    return f"did you mean {joined}?"
