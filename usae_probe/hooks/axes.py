"""Axis tracing: what each axis of a live model's intermediate tensors means, found by following them through one pass.

The axes of a picture are known: batch, channels, rows, columns. Every operation that the model performs is seen, and
its result's axes follow from its operands' (`axis_rules`). So windows, heads and class tokens are told apart however
the model is written; where an operation is not known, its results are untracked, and nothing is said of them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import UsageError
from .axis_algebra import PLACES, Axes, Axis, Digit, Meaning, core, is_class_token, length, meanings, new_axis, parts_of
from .axis_rules import POINTWISE, RULES
from .axis_views import Call, LostError, is_list
from .layout import Layout

_PICTURE: tuple[Meaning, ...] = ("batch", "channel", "row", "column")


class AxisTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows named axes through everything that runs inside it; changes no value and keeps no tensor alive.

    Use it around one forward pass with two pictures (an axis of length 1 could be anything), and ask for layouts in
    forward hooks, while the tensors live:

        with torch.no_grad(), AxisTracer(module) as axes:
            axes.picture(batch)
            module(batch)

    Args:
        module: the model; the names of its parameters tell class tokens.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes: Any = WeakTensorKeyDictionary()
        self._names: Any = WeakTensorKeyDictionary()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self._names[tensor] = name

    def picture(self, tensor: Tensor) -> None:
        """Say that `tensor` is a batch of pictures, [b,3,h,w].

        Raises:
            UsageError: when it has another number of axes.
        """
        if tensor.dim() != len(_PICTURE):
            raise UsageError(f"a batch of pictures is [b,3,h,w], got {list(tensor.shape)}", hint="add the missing axes")
        self._axes[tensor] = tuple(new_axis(what, n) for what, n in zip(_PICTURE, tensor.shape, strict=True))

    def axes(self, tensor: Tensor) -> Axes | None:
        """Return the named axes of `tensor`; None when it is untracked."""
        found: Axes | None = self._axes.get(tensor)
        name = self._names.get(tensor) if found is None else None
        if name is None:
            return found
        axes = tuple(new_axis("parameter", n, name) for n in tensor.shape)
        # A class embedding [C] is a token: its axis of length 1 is there before a view makes room for it.
        return (new_axis("parameter", 1, name) + axes[0],) if len(axes) == 1 else axes

    def layout(self, tensor: Tensor) -> Layout | None:
        """Return what the axes of `tensor` mean; None when that is not known, or is none of the layouts."""
        axes = self.axes(tensor)
        if axes is None or tuple(map(length, axes)) != tuple(tensor.shape):
            return None
        return read_layout(axes)

    def forget(self) -> None:
        """Forget the axes of all tensors but the model's own parameters."""
        self._axes.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [item for item in (result if is_list(result) else [result]) if isinstance(item, Tensor)]
        found: list[Axes | None] = [None] * len(tensors)
        try:
            found = self._follow(func, args, kwargs, tensors)
        except Exception:  # whatever a rule stumbles over must not reach the user's forward pass
            found = [None] * len(tensors)
        for tensor, axes in zip(tensors, found, strict=True):
            self._note(tensor, axes)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> list[Axes | None]:
        namespace, _, name = func._schema.name.partition("::")
        name = name if name.endswith("__") else name.removesuffix("_")
        rule = RULES.get(name) if namespace == "aten" else None
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = POINTWISE
        if rule is None:
            return [None] * len(tensors)
        arguments = func._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        given.update(zip((argument.name for argument in arguments), args, strict=False))
        given.update(kwargs)
        call = Call(name, given, tensors, self.axes)
        found: list[Axes | None] = []
        for i in range(len(tensors)):
            try:
                found.append(rule(call, i))
            except LostError:
                found.append(None)
        return found

    def _note(self, tensor: Tensor, axes: Axes | None) -> None:
        if axes is not None and tuple(map(length, axes)) == tuple(tensor.shape):
            self._axes[tensor] = axes
        elif tensor in self._axes:  # changed in place by an operation without a rule
            del self._axes[tensor]


# ---- reading a layout


def read_layout(axes: Axes) -> Layout | None:
    """Return the layout of named axes; None when they are none of the layouts.

    The batch must be whole on one of the first three axes; the others are, after it: [c], [tokens,c], [c,row,column],
    [row,column,c], [heads,tokens,d] or [tokens,heads,d].
    """
    at = [i for i, axis in enumerate(axes) if any(digit.base.meaning == "batch" for digit in core(axis))]
    if len(at) != 1 or at[0] > 2 or len(core(axes[at[0]])) != 1 or not _whole(core(axes[at[0]])[0]):
        return None
    rest = axes[: at[0]] + axes[at[0] + 1 :]
    roles = [_role(axis) for axis in rest]
    layout: Layout | None = None
    if len(rest) == 1:
        layout = Layout("vector", batch_axis=at[0]) if roles[0] in _WIDE else None
    elif len(rest) == 2:
        layout = _tokens(rest[0], roles, at[0])
    elif len(rest) == 3:
        layout = _map_or_heads(rest, roles, at[0])
    return layout


_WIDE = ("channel", "inner", "mixed", "parameter")
_LAST = (*_WIDE, "unknown", "empty")


def _role(axis: Axis) -> str:
    """Return what an axis is good for.

    `row`, `column`: one whole side of a grid; `tokens`: places of both sides; `inner`: what is left of places that
    stand elsewhere (within a patch); `channel`, `parameter`, `unknown`: as their meanings; `mixed`: places times
    channels; `empty`: of length 1 without meaning; `other`: anything else.
    """
    if not axis:
        return "empty"
    found, digits = meanings(axis), core(axis)
    if "batch" in found:
        return "other"
    if len(parts_of(axis)) > 1:
        return "tokens" if found & PLACES or found == {"parameter"} or "channel" not in found else "mixed"
    if any(digit.base.parts for digit in digits):
        return "other"
    if not found & PLACES:
        return next((meaning for meaning in ("channel", "parameter") if meaning in found), "unknown")
    if not any(digit.base.meaning in PLACES and _top(digit) for digit in digits):
        return "inner"
    if not found <= PLACES:
        return "mixed"
    if {digit.base.meaning for digit in axis} >= PLACES:
        return "tokens"
    (side,) = found
    return side if _side(digits) and list(digits) == sorted(digits, key=_stride, reverse=True) else "tokens"


def _stride(digit: Digit) -> int:
    return digit.stride


def _whole(digit: Digit) -> bool:
    return digit.size == digit.base.size


def _top(digit: Digit) -> bool:
    return digit.size * digit.stride == digit.base.size


def _tokens(axis: Axis, roles: list[str], batch_axis: int) -> Layout | None:
    if roles[1] not in _LAST or (roles[0] in ("unknown", "empty") and roles[1] in ("unknown", "empty")):
        return None
    if roles[0] in ("channel", "other"):
        return None
    return read_tokens(axis, batch_axis=batch_axis)


def _map_or_heads(rest: Axes, roles: list[str], batch_axis: int) -> Layout | None:
    shape = tuple(map(length, rest))
    if roles[1:] == ["row", "column"] and roles[0] in _LAST:
        return Layout("nchw", prefix=0, grid=(shape[1], shape[2]), batch_axis=batch_axis)
    if roles[:2] == ["row", "column"] and roles[2] in _LAST:
        return Layout("nhwc", prefix=0, grid=(shape[0], shape[1]), batch_axis=batch_axis)
    head_like = ("channel", "empty")
    if roles[2] != "channel" or ("tokens" not in roles and "parameter" not in roles):
        return None
    if roles[0] in head_like and roles[1] in ("tokens", "parameter"):
        return read_tokens(rest[1], heads="first", batch_axis=batch_axis)
    if roles[1] in head_like and roles[0] in ("tokens", "parameter"):
        return read_tokens(rest[0], heads="last", batch_axis=batch_axis)
    return None


def read_tokens(axis: Axis, **more: Any) -> Layout:
    """Return the tokens layout of an axis: its prefix, class token, grid and order, as far as they are known.

    Args:
        axis: the axis of the tokens.
        more: further fields of the layout.
    """
    parts = parts_of(axis)
    spatial = [i for i, part in enumerate(parts) if meanings(part) & PLACES]
    has_cls = is_class_token(parts[0]) if parts[0] else False
    if not spatial:
        known = all(part and meanings(part) == {"parameter"} for part in parts)
        return Layout("tokens", prefix=length(axis), has_cls=has_cls, **more) if known else Layout("tokens", **more)
    found = _grid(parts[spatial[0]])
    if spatial != [len(parts) - 1] or found is None:
        return Layout("tokens", **more)
    prefix = sum(length(part) for part in parts[:-1])
    grid, order = found
    return Layout("tokens", prefix=prefix, has_cls=has_cls and prefix > 0, grid=grid, order=order, **more)


def _grid(axis: Axis) -> tuple[tuple[int, int], tuple[int, ...] | None] | None:
    """Return (rows, columns) and the token of each place, None for raster order; None when it is no whole grid."""
    rows = _side(tuple(digit for digit in axis if digit.base.meaning == "row"))
    columns = _side(tuple(digit for digit in axis if digit.base.meaning == "column"))
    if not rows or not columns or rows * columns != length(axis):
        return None
    lowest = {
        meaning: min(digit.stride for digit in core(tuple(d for d in axis if d.base.meaning == meaning)))
        for meaning in PLACES
    }
    weights = [
        digit.stride // lowest[digit.base.meaning] * (columns if digit.base.meaning == "row" else 1)
        for digit in (axis_digit for axis_digit in axis if axis_digit.base.meaning in PLACES)
    ]
    sizes = [digit.size for digit in axis if digit.base.meaning in PLACES]
    places = [0]
    for size, weight in zip(sizes, weights, strict=True):
        places = [place + i * weight for place in places for i in range(size)]
    order = [0] * len(places)
    for token, place in enumerate(places):
        order[place] = token
    return (rows, columns), None if order == sorted(order) else tuple(order)


def _side(axis: Axis) -> int:
    """Return how many places the digits of one side have; 0 when they are not each place of one base once."""
    digits = sorted(core(axis), key=_stride, reverse=True)
    if not digits or not _top(digits[0]) or any(digit.base is not digits[0].base for digit in digits):
        return 0
    if any(high.stride != low.stride * low.size for high, low in pairwise(digits)):
        return 0
    return length(tuple(digits))
