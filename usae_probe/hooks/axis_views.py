"""What views do to named axes: the rules of the operations that move, split, merge, cut or insert axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .axis_algebra import (
    NOTHING,
    PLACES,
    Axes,
    Axis,
    broadcast,
    cut,
    length,
    like,
    meanings,
    new_axis,
    regroup,
    split_ones,
)


class LostError(Exception):
    """Nothing is known of this output's axes; never leaves the tracer."""


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        name: its name without namespace, overload and the mark of in-place variants.
        given: its arguments by the schema's names, with defaults.
        outputs: the tensors it returned.
        axes_of: axes of a tensor; None when untracked.
    """

    name: str
    given: Mapping[str, Any]
    outputs: Sequence[Tensor]
    axes_of: Callable[[Tensor], Axes | None]

    def axes(self, name: str = "self") -> Axes:
        """Return the axes of an argument.

        Raises:
            LostError: when it is untracked or no tensor.
        """
        value = self.given[name]
        found = self.axes_of(value) if isinstance(value, Tensor) else None
        if found is None:
            raise LostError
        return found

    def axes_or_new(self, name: str) -> Axes:
        """Return the axes of an argument, unknown ones for an untracked tensor."""
        value: Tensor = self.given[name]
        found = self.axes_of(value)
        return found if found is not None else tuple(new_axis("unknown", n) for n in value.shape)

    def operands(self) -> list[Axes]:
        """Return the axes of all tracked tensors among the arguments, lists looked through.

        Raises:
            LostError: when there is none.
        """
        values = [item for value in self.given.values() for item in (value if is_list(value) else [value])]
        found = [axes for value in values if isinstance(value, Tensor) and (axes := self.axes_of(value)) is not None]
        if not found:
            raise LostError
        return found

    def dim(self, name: str = "dim", *, rank: int | None = None) -> int:
        """Return an axis argument, counted from the front."""
        given: int = self.given[name]
        rank = len(self.axes()) if rank is None else rank
        return given % rank if rank else 0


Rule = Callable[[Call, int], Axes]


def is_list(value: Any) -> bool:
    """Whether an argument or a result is a list or a tuple."""
    return isinstance(value, (list, tuple))


def shape_of(call: Call, index: int) -> tuple[int, ...]:
    """Return the shape of an output."""
    return tuple(call.outputs[index].shape)


def replaced(axes: Axes, dim: int, *axis: Axis) -> Axes:
    """Return `axes` with others in the place of the one at `dim`."""
    return (*axes[:dim], *axis, *axes[dim + 1 :])


def _regroup(call: Call, index: int) -> Axes:
    return regroup(call.axes(), shape_of(call, index))


def _unsqueeze(call: Call, index: int) -> Axes:
    axes = call.axes()
    return _inserted(axes, call.dim(rank=len(axes) + 1))


def _inserted(axes: Axes, dim: int) -> Axes:
    """Insert an axis of length 1: the class token that `x[:, 0]` left with the batch comes back with `[:, None]`."""
    if dim == 0:
        leading, rest, trailing = split_ones(axes[0]) if axes and length(axes[0]) > 1 else (NOTHING, NOTHING, NOTHING)
        return (leading, (*rest, *trailing), *axes[1:]) if leading else (NOTHING, *axes)
    before = axes[dim - 1]
    if length(before) > 1:
        leading, rest, ones = split_ones(before)
        kept: Axis = (*leading, *rest)
    else:
        # Two digits of one axis of length 1 (row and column of a 1×1 map, flattened) come apart again.
        kept, ones = before[:1], before[1:]
    return (*axes[: dim - 1], kept, ones, *axes[dim:])


def _squeeze(call: Call, index: int) -> Axes:
    axes, given = call.axes(), call.given.get("dim")
    dims = range(len(axes)) if given is None else given if is_list(given) else [given]
    gone = {dim % len(axes) for dim in dims if length(axes[dim % len(axes)]) == 1} if axes else set()
    for dim in sorted(gone, reverse=True):
        axes = _dropped(axes, dim, keep=PLACES | {"parameter"})
    return axes


def _dropped(axes: Axes, dim: int, keep: frozenset[str]) -> Axes:
    """Drop an axis of length 1; digits that name something stay with the axis before, or else the one after."""
    ones = tuple(digit for digit in axes[dim] if digit.base.meaning in keep)
    if dim > 0:
        return (*axes[: dim - 1], axes[dim - 1] + ones, *axes[dim + 1 :])
    return ((ones + axes[1]), *axes[2:]) if len(axes) > 1 else ()


def _expand(call: Call, index: int) -> Axes:
    shape = shape_of(call, index)
    axes = broadcast([call.axes()], shape)
    old = (NOTHING,) * (len(shape) - len(call.axes())) + call.axes()
    # A row stretched from length 1 is still rows.
    return tuple(
        like(was, n) if length(was) == 1 < n and meanings(was) & PLACES else axis
        for axis, was, n in zip(axes, old, shape, strict=True)
    )


def _repeat(call: Call, index: int) -> Axes:
    return _expand_or_new(call.axes(), shape_of(call, index))


def _expand_or_new(axes: Axes, shape: tuple[int, ...]) -> Axes:
    old = broadcast([axes], (*(1 for _ in range(len(shape) - len(axes))), *map(length, axes)))
    return tuple(axis if length(axis) == n else new_axis("unknown", n) for axis, n in zip(old, shape, strict=True))


def _permute(call: Call, index: int) -> Axes:
    axes = call.axes()
    return tuple(axes[dim] for dim in call.given["dims"])


def _transpose(call: Call, index: int) -> Axes:
    axes = list(call.axes())
    if len(axes) > 1:
        first, second = (0, 1) if call.name == "t" else (call.dim("dim0"), call.dim("dim1"))
        axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def _slice(call: Call, index: int) -> Axes:
    axes, dim = call.axes(), call.dim()
    n, given = length(axes[dim]), call.given
    start, stop, step = slice(given["start"], given["end"], given["step"]).indices(n)
    return replaced(axes, dim, cut(axes[dim], start, max(start, stop), step))


def _select(call: Call, index: int) -> Axes:
    axes, dim = call.axes(), call.dim()
    at = call.given["index"] % length(axes[dim])
    return _selected(axes, dim, at)


def _unbind(call: Call, index: int) -> Axes:
    return _selected(call.axes(), call.dim(), index)


def _selected(axes: Axes, dim: int, at: int) -> Axes:
    if len(axes) == 1:
        return ()
    return _dropped(replaced(axes, dim, cut(axes[dim], at, at + 1)), dim, keep=frozenset({"parameter"}))


def _split(call: Call, index: int) -> Axes:
    axes, dim = call.axes(), call.dim()
    start = sum(call.outputs[i].shape[dim] for i in range(index))
    return replaced(axes, dim, cut(axes[dim], start, start + call.outputs[index].shape[dim]))


def _as_strided(call: Call, index: int) -> Axes:
    same = tuple(call.given["size"]) == tuple(call.given["self"].shape)
    if not same or tuple(call.given["stride"]) != call.given["self"].stride():
        raise LostError
    return call.axes()


def _unfold(call: Call, index: int) -> Axes:
    """`x.unfold(dim, size, step)`: windows along an axis become a last axis; without overlap it is a split."""
    axes, dim = call.axes(), call.dim("dimension")
    size, step, n = call.given["size"], call.given["step"], length(axes[dim])
    count = call.outputs[index].shape[dim]
    if size == step and n == size * count:
        outer, inner = regroup((axes[dim],), (count, size))
    else:
        outer, inner = like(axes[dim], count), new_axis("unknown", size)
    return (*replaced(axes, dim, outer), inner)


VIEWS: list[tuple[Rule, str]] = [
    (_regroup, "view _unsafe_view reshape _reshape_alias flatten unflatten view_copy _reshape_copy view_as reshape_as"),
    (_unsqueeze, "unsqueeze unsqueeze_copy"),
    (_squeeze, "squeeze squeeze_copy"),
    (_expand, "expand expand_copy expand_as"),
    (_repeat, "repeat"),
    (_permute, "permute permute_copy"),
    (_transpose, "transpose t transpose_copy t_copy"),
    (_slice, "slice slice_copy"),
    (_select, "select select_copy"),
    (_unbind, "unbind unbind_copy"),
    (_split, "split split_with_sizes unsafe_split unsafe_split_with_sizes split_copy split_with_sizes_copy chunk"),
    (_as_strided, "as_strided"),
    (_unfold, "unfold unfold_copy"),
]
"""Each rule with the names of its operations."""
