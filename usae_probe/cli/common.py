"""What all commands share: options, how they show results and warnings, and what becomes of errors."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from ..errors import UsaeProbeError, UsaeProbeWarning, UsageError, WorkerError
from .several import demand_alone


def no_option(place: Path | None) -> Path | None:
    """Refuse an option in the place of a folder, which would else be made under that name."""
    if str(place).startswith("-"):
        raise typer.BadParameter(f"'{place}' is an option, a path was expected (one of that name: ./{place})")
    return place


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Config of the run.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Of all models and the training: auto, cpu, cuda, cuda:1; default: the config's."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Of the forward passes: float32, float16 or bfloat16; default: the config's."),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="An image that cannot be decoded is an error; else it is left out, and named.")
]
Out = Annotated[
    Path | None, typer.Option("--out", callback=no_option, help="Run folder; default: runs/<config's name>.")
]


@contextmanager
def guard(as_json: bool, folder: str = "", *, joins: bool = False) -> Iterator[None]:
    """Turn errors into one clear line (or JSON) and the exit status of the contract.

    Of several processes that torchrun started only commands that say they `join` them run in more than one.
    """
    stopped: list[int] = []
    try:
        if not joins:
            demand_alone()
        with _terminated_as_interrupted(stopped):
            yield
    except WorkerError as error:
        if error.told:
            raise typer.Exit(1) from error
        _fail(as_json, type(error).__name__, error.message, error.hint, 1)
    except UsaeProbeError as error:
        _fail(as_json, type(error).__name__, error.message, error.hint, 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        state = (
            f"kept in {folder}: finished stages, and of this one the shards, the state of the training, the cells or "
            "pictures that were written; give the same command again to go on from there"
            if folder
            else ""
        )
        if stopped:
            _fail(as_json, "Terminated", "terminated", state, 128 + signal.SIGTERM)
        _fail(as_json, "Interrupted", "interrupted", state, 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say
        raise typer.Exit(1) from None
    except OSError as error:
        said = f"{error.strerror}: '{error.filename}'" if error.strerror and error.filename else str(error)
        hint = "see to the disk and the permissions, and give the command again: what was finished is kept"
        _fail(as_json, type(error).__name__, said, hint, 1)
    except Exception as error:
        if os.environ.get("USAE_PROBE_DEBUG"):
            raise
        hint = "this is a bug or an unusual model: add --debug (or set USAE_PROBE_DEBUG=1) to see where it happened"
        _fail(as_json, type(error).__name__, str(error) or repr(error), hint, 1)


@contextmanager
def _terminated_as_interrupted(stopped: list[int]) -> Iterator[None]:
    """Take SIGTERM, by which batch systems announce the end, as Ctrl-C: what is under way is kept.

    Not in one of several processes, which torchrun ends when another has failed: it would wait for that one.

    Args:
        stopped: gets the signal's number when it came.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if not callable(signal.getsignal(signal.SIGINT)):  # ignored, as in what a script starts in the background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    if "MASTER_ADDR" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that Python does not know


def _fail(as_json: bool, kind: str, message: str, hint: str, status: int) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": {"type": kind, "message": message, "hint": hint}}, indent=2) + "\n")
    else:
        from ..report.terminal import consoles, error_text

        consoles()[1].print(error_text(message, hint), soft_wrap=True)
    raise typer.Exit(status)


def show(as_json: bool, data: dict[str, Any], renderable: Callable[[], Any], *, crop: bool = True) -> None:
    """Print JSON on stdout (and the table on stderr), or the table on stdout; `crop` lines to the console's width."""
    from ..report.terminal import consoles

    stdout, stderr = consoles()
    (stderr if as_json else stdout).print(renderable(), crop=crop)
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


@contextmanager
def shown_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Show this package's own warnings as plain lines, each text once."""
    seen: set[str] = set()
    before = warnings.showwarning

    def said(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, UsaeProbeWarning):
            before(message, category, *rest, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UsaeProbeWarning)
        warnings.showwarning = said
        yield
