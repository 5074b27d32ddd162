"""Outputs that are no single tensor: how their tensors are named, and how one of them is replaced."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from ..errors import SiteError


def tensors_in(output: Any) -> dict[str, Tensor]:
    """Name the tensors of a module's output: `""` for the output itself, else by position, key or field.

    >>> import torch
    >>> list(tensors_in((torch.ones(1), {"a": torch.ones(1), "n": 7})))
    ['0', '1.a']
    """
    if isinstance(output, Tensor):
        return {"": output}
    found: dict[str, Tensor] = {}
    for key, item in _items(output):
        for below, tensor in tensors_in(item).items():
            found[f"{key}.{below}" if below else key] = tensor
    return found


def the_element(names: Mapping[str, Any] | list[str], asked: str | None, layer: str) -> str:
    """Return which tensor of an output is meant: the one asked for, or the only one.

    Args:
        names: of the output's tensors, as `tensors_in` gives them.
        asked: what stands behind `#` in a site; None when nothing does.
        layer: for the message.

    Raises:
        SiteError: when there is no such tensor, none at all, or several to choose from.
    """
    known = list(names)
    listed = ", ".join(f"{layer}#{name}" for name in known if name)
    if asked is None:
        if len(known) == 1:
            return known[0]
        if known:
            raise SiteError(f"layer '{layer}' outputs {len(known)} tensors", hint=f"choose one of: {listed}")
        raise SiteError(f"layer '{layer}' outputs no tensor", hint="take a layer inside, around or after it")
    if asked not in known:
        what = f"it has: {listed}" if listed else f"its output is one tensor: write '{layer}'"
        raise SiteError(f"layer '{layer}' has no element '#{asked}' in its output", hint=what)
    return asked


def with_tensor(output: Any, name: str, value: Tensor) -> Any:
    """Return a copy of the container with one tensor replaced; containers are rebuilt, never changed in place."""
    if not name:
        return value
    for key, item in _items(output):
        if name == key or name.startswith(f"{key}."):
            return _rebuilt(output, key, with_tensor(item, name[len(key) + 1 :], value))
    raise SiteError(f"the output has no element '#{name}'")


def _items(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(key), item) for key, item in output.items())
    elif hasattr(output, "_fields"):  # a named tuple
        yield from zip(output._fields, output, strict=True)
    elif isinstance(output, (tuple, list)):
        yield from ((str(place), item) for place, item in enumerate(output))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))


def _rebuilt(output: Any, key: str, value: Any) -> Any:
    if hasattr(output, "_fields"):
        return output._replace(**{key: value})
    if isinstance(output, (tuple, list)):
        return type(output)([value if str(place) == key else item for place, item in enumerate(output)])
    if isinstance(output, Mapping) and not isinstance(output, MutableMapping):
        return type(output)({own: value if str(own) == key else item for own, item in output.items()})  # type: ignore[call-arg]
    changed = copy.copy(output)  # a new one would not have what was put there since: fields that `__init__` makes, say
    if isinstance(output, MutableMapping):
        changed[next(own for own in output if str(own) == key)] = value
    else:
        object.__setattr__(changed, key, value)  # a frozen dataclass too
    return changed
