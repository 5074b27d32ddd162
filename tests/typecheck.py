"""Types at run time by beartype, on the first calls of every function in every test.

Checking each of the thousands of calls of a training took half of the suite's time. What is called in a loop gets the
same kinds of things in every round, so after `CALLS` of them a function is left alone until the next test begins.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import beartype
import pytest

CALLS = 5
_counts: dict[tuple[str, str], int] = {}
_left_alone: list[Any] = []


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping takes for its type checker: it gives the parameters, then the whole, of each function."""
    check, where = beartype.beartype(function), (function.__module__, function.__qualname__)

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        count = _counts[where] = _counts.get(where, 0) + 1
        if count == CALLS:
            for wrapped in _named(*where):
                wrapped.__no_type_check__ = True  # jaxtyping looks at it in every call
                _left_alone.append(wrapped)
        return check(*args, **kwargs)

    return counting


def _named(module: str, name: str) -> Iterator[Any]:
    """Find the function that jaxtyping made, by name; one inside another function has none, and stays checked."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = found.__dict__.get(part) if hasattr(found, "__dict__") else None
    if isinstance(found, property):
        yield from (part for part in (found.fget, found.fset) if part is not None)
    elif found is not None and not isinstance(found, type):
        yield getattr(found, "__func__", None) or getattr(found, "func", None) or found


@pytest.fixture(autouse=True)
def _checked_anew() -> None:
    for wrapped in _left_alone:
        wrapped.__no_type_check__ = False
    _left_alone.clear()
    _counts.clear()
