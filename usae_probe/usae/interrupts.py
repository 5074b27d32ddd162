"""Ctrl-C while training runs: heard at the end of a step, where nothing is half done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts(heard: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Hold back a first SIGINT while the block runs; gives a function that says whether there was one.

    `heard` is called in the signal's handler, to wake whoever waits in the block.

    A second one raises KeyboardInterrupt at once. Whoever gets True raises it in the block; one that nobody asked for
    is raised on leaving. In other threads than the main one, and where somebody handles SIGINT already, nothing is held
    back.

    Raises:
        KeyboardInterrupt: see above.
    """
    asked = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        heard()

    before = signal.getsignal(signal.SIGINT)
    try:
        if before is not signal.default_int_handler:
            raise ValueError("somebody else's")
        signal.signal(signal.SIGINT, hold)
    except ValueError:  # or another thread than the main one
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
