"""Named axes and what views do to them: split, merge, cut, join and broadcast, without a look at any value.

An axis is a number in mixed radix, written as its digits, major first; a digit `(base, size, stride)` is
`index // stride % size` of a base axis. A row axis of length 8 in windows of 4 is `(row, 2, 4)` and `(row, 4, 1)`: two
digits that may stand in two axes of a tensor, and that make the row again where they meet in that order. The empty
axis has length 1 and means nothing. Digits of size 1 are kept where they name something (a map of 1×1, a class token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

Meaning = Literal["batch", "row", "column", "channel", "parameter", "unknown", "joined"]
_RANK = {"batch": 4, "row": 3, "column": 3, "channel": 2, "parameter": 1, "unknown": 0}
PLACES = frozenset({"row", "column"})


@dataclass(frozen=True, eq=False, slots=True)
class Base:
    """An axis as it came into being: two are the same only if they are one object.

    Attributes:
        meaning: what its index counts; `joined` for the parts of a concatenation, one after the other.
        size: its length.
        name: dotted name of the parameter or buffer whose axis it is.
        parts: of a joined base, the axes that follow each other.
    """

    meaning: Meaning
    size: int
    name: str = ""
    parts: tuple[Axis, ...] = ()


class Digit(NamedTuple):
    """`index // stride % size` of a base axis."""

    base: Base
    size: int
    stride: int


Axis = tuple[Digit, ...]
Axes = tuple[Axis, ...]
NOTHING: Axis = ()
_remembered = lru_cache(maxsize=1 << 14)  # the same few axes are asked for at every operation; they hold no tensor


def new_axis(meaning: Meaning, size: int, name: str = "") -> Axis:
    """Return an axis of its own."""
    return (Digit(Base(meaning, size, name), size, 1),)


@_remembered
def length(axis: Axis) -> int:
    """Return the product of the digits' sizes."""
    return prod(digit.size for digit in axis)


@_remembered
def core(axis: Axis) -> Axis:
    """Return the digits that count: those longer than 1, or all where none is."""
    return tuple(digit for digit in axis if digit.size > 1) or axis


@_remembered
def parts_of(axis: Axis) -> tuple[Axis, ...]:
    """Return the axes of which `axis` is the concatenation: itself, unless it is a whole joined base."""
    digits = core(axis)
    if len(digits) == 1 and digits[0].base.parts and digits[0].size == digits[0].base.size:
        return digits[0].base.parts
    return (axis,)


@_remembered
def meanings(axis: Axis) -> frozenset[Meaning]:
    """Return the meanings of the digits that count, those of joined bases looked through."""
    found: set[Meaning] = set()
    for digit in core(axis):
        inner = [meanings(part) for part in digit.base.parts]
        found.update(*inner if inner else [{digit.base.meaning}])
    return frozenset(found)


@_remembered
def rank(axis: Axis) -> int:
    """Return how much is known: batch before places before channels before parameters; -1 for the empty axis."""
    return max((_RANK[meaning] for meaning in meanings(axis)), default=-1)


@_remembered
def is_class_token(axis: Axis) -> bool:
    """Whether `axis` begins with an axis of a parameter named as class tokens are: `cls_token`, `class_embedding`."""
    names = [digit.base.name.rpartition(".")[2].lower() for digit in core(parts_of(axis)[0])]
    return any("cls" in name or "class" in name for name in names)


def like(axis: Axis, size: int) -> Axis:
    """Return a new axis of another length that counts the same: rows after pooling, a part of the channels."""
    found = meanings(axis)
    (only,) = found if len(found) == 1 else ("unknown",)
    if only not in ("row", "column", "channel", "parameter"):
        only = "unknown"
    name = next((digit.base.name for digit in core(axis)), "") if only == "parameter" else ""
    return new_axis(only, size, name)  # type: ignore[arg-type]


def thinned(axis: Axis, size: int) -> Axis:
    """Return a new length for an axis whose places are pooled: every second row of a window is still in its window."""
    digits = core(axis)
    if size > 1 and len(digits) == 1 and digits[0].size % size == 0 and digits[0].base.meaning in PLACES:
        base, old, stride = digits[0]
        return (Digit(base, size, stride * (old // size)),)
    return like(axis, size)


def resized(axes: Axes, shape: Sequence[int]) -> Axes:
    """Return `axes` with a new one (see `thinned`) in the place of each whose length changed."""
    return tuple(axis if length(axis) == n else thinned(axis, n) for axis, n in zip(axes, shape, strict=True))


def merged(digits: Sequence[Digit]) -> Axis:
    """Write digits that follow each other in their base as one: (row,2,4),(row,4,1) is (row,8,1)."""
    done: list[Digit] = []
    ones: list[Digit] = []
    for digit in digits:
        if digit.size == 1:
            ones.append(digit)
        elif done and done[-1].base is digit.base and done[-1].stride == digit.size * digit.stride:
            done[-1] = Digit(digit.base, done[-1].size * digit.size, digit.stride)
        else:
            done, ones = [*done, *ones, digit], []
    return (*done, *ones)


def split_ones(axis: Axis) -> tuple[Axis, Axis, Axis]:
    """Return (leading digits of size 1, the digits between, trailing digits of size 1); all leading when none is."""
    first = next((i for i, digit in enumerate(axis) if digit.size > 1), len(axis))
    last = next((i for i in range(len(axis), first, -1) if axis[i - 1].size > 1), first)
    return axis[:first], axis[first:last], axis[last:]


def regroup(axes: Axes, shape: Sequence[int]) -> Axes:
    """Return the axes of a view: the same digits in the same order, shared out to other lengths.

    Where they cannot be (a digit of 6 among lengths 4 and 9), the axes concerned become new ones. Digits of size 1 go
    to axes of length 1 at their place, else they stay with the axis before.
    """
    queue = [digit for axis in reversed(axes) for digit in reversed(axis)]
    out: list[list[Digit]] = [[] for _ in shape]
    _share_ones(_pop_ones(queue), out, list(range(_run(shape, 0))), after=None)
    at = _run(shape, 0)
    while at < len(shape):
        at = _fill(queue, out, shape, at)
        free = list(range(at, at + _run(shape, at)))
        ones = _pop_ones(queue)
        if not free and at < len(shape) and _one_row(ones, queue):
            out[at].extend(ones)
        else:
            _share_ones(ones, out, free, after=at - 1)
        at += len(free)
    return tuple(merged(digits) for digits in out)


def _run(shape: Sequence[int], start: int) -> int:
    stop = start
    while stop < len(shape) and shape[stop] == 1:
        stop += 1
    return stop - start


def _pop_ones(queue: list[Digit]) -> list[Digit]:
    ones = []
    while queue and queue[-1].size == 1:
        ones.append(queue.pop())
    return ones


def _one_row(ones: list[Digit], queue: list[Digit]) -> bool:
    """Whether digits of size 1 belong to what follows: the one row of a map 1×N whose columns come next."""
    return bool(ones and queue) and all(digit.base.meaning in PLACES for digit in (*ones, queue[-1]))


def _share_ones(ones: list[Digit], out: list[list[Digit]], free: list[int], after: int | None) -> None:
    if not free:
        target = out[after] if after is not None else (out[0] if out else [])
        target.extend(ones)
        return
    # Before the first long axis the last free one is the nearest: [1,1,C] from a class embedding [C].
    targets = free[-len(ones) :] if after is None and ones else free
    for i, digit in enumerate(ones):
        out[targets[min(i, len(targets) - 1)]].append(digit)


def _fill(queue: list[Digit], out: list[list[Digit]], shape: Sequence[int], at: int) -> int:
    """Take digits for axis `at`; return the next axis. When they do not fit, as many axes as it takes become new."""
    have, before = 1, list(queue)
    while have < shape[at]:
        digit = queue.pop()
        need = shape[at] // have
        if need % digit.size == 0:
            out[at].append(digit)
            have *= digit.size
        elif shape[at] % have == 0 and digit.size % need == 0:
            rest = digit.size // need
            out[at].append(Digit(digit.base, need, digit.stride * rest))
            queue.append(Digit(digit.base, rest, digit.stride))
            have *= need
        else:
            queue[:] = before
            return _give_up(queue, out, shape, at)
    return at + 1


def _give_up(queue: list[Digit], out: list[list[Digit]], shape: Sequence[int], at: int) -> int:
    lost = [queue.pop()]
    ones = [digit for digit in out[at] if digit.size == 1 and digit not in lost]
    n_in, n_out, stop = lost[0].size, shape[at], at + 1
    while n_in != n_out:
        if n_in < n_out:
            lost.append(queue.pop())
            n_in *= lost[-1].size
        else:
            n_out *= shape[stop]
            stop += 1
    meaning: Meaning = "channel" if meanings(tuple(lost)) == {"channel"} else "unknown"
    for i in range(at, stop):
        out[i] = list(new_axis(meaning, shape[i])) if shape[i] > 1 else []
    out[at][:0] = ones if at == 0 else []
    return stop


def cut(axis: Axis, start: int, stop: int, step: int = 1) -> Axis:
    """Return `axis[start:stop:step]`: the parts of a concatenation that it takes, else a new axis like it."""
    n = length(axis)
    stop = min(stop, n)
    if start <= 0 and stop == n and step == 1:
        return axis
    parts = parts_of(axis)
    if 0 <= start < step and stop == n and n % step == 0:
        return thinned(axis, n // step)
    if len(parts) == 1 or step != 1:
        return like(axis, max(0, -(-(stop - start) // step)))
    kept, offset = [], 0
    for part in parts:
        here = length(part)
        low, high = max(start - offset, 0), min(stop - offset, here)
        if low < high:
            kept.append(cut(part, low, high))
        offset += here
    return join(kept)


def join(axes: Sequence[Axis]) -> Axis:
    """Return the axis of a concatenation. Channels give channels; anything else keeps its parts."""
    parts = [part for axis in axes for part in parts_of(axis) if length(part) > 0]
    if len(parts) == 1:
        return parts[0]
    size = sum(length(part) for part in parts)
    found = frozenset[Meaning]().union(*(meanings(part) for part in parts))
    if found <= {"channel", "unknown"}:
        return new_axis("channel" if "channel" in found else "unknown", size)
    if len(found) == 1 and found <= PLACES and not any(len(core(part)) > 1 for part in parts):
        return like(parts[0], size)
    return (Digit(Base("joined", size, parts=tuple(parts)), size, 1),)


def unify(first: Axis, second: Axis) -> Axis:
    """Return what is known of an axis that two tensors share: by rank, nothing unknown, class token, number of parts.

    The first where both are as good.
    """

    def key(axis: Axis) -> tuple[int, bool, bool, int]:
        return rank(axis), "unknown" not in meanings(axis), is_class_token(axis), len(parts_of(axis))

    return max(first, second, key=key)


def broadcast(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """Return the axes of a pointwise result of `shape`; new ones where every operand is 1 long."""
    result: list[Axis] = [NOTHING] * len(shape)
    for axes in operands:
        raised = raise_rank(axes, shape)
        for i, axis in enumerate(raised):
            if length(axis) == shape[i] and axis != result[i]:
                result[i] = unify(result[i], axis) if result[i] else axis
    return tuple(axis if length(axis) == n else new_axis("unknown", n) for axis, n in zip(result, shape, strict=True))


def raise_rank(axes: Axes, shape: Sequence[int]) -> Axes:
    """Put empty axes in front, as broadcasting does; the one before a class embedding [C] is its token."""
    missing = len(shape) - len(axes)
    if not missing or not axes:
        return (NOTHING,) * missing + axes
    ones, rest, trailing = split_ones(axes[0])
    if not ones or shape[missing - 1] != 1 or not rest:
        return (NOTHING,) * missing + axes
    return ((NOTHING,) * (missing - 1)) + (ones, (*rest, *trailing), *axes[1:])
