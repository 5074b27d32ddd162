"""The dry run: one forward pass with plain hooks that finds what each module outputs, when, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotBuiltError, UsageError
from .layout import Layout, LayoutRule, default_layout


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a hooked model.

    Attributes:
        name: dotted module path as `named_modules()` spells it.
        kind: class of the module.
        output_shape: shape of its output without the batch axis; None when it outputs no single tensor, one that does
            not begin with the batch (windows of all pictures, say), or never runs.
        order: position at which its (first) output is complete in a forward pass; None when it never runs.
        calls: how often it runs in one forward pass.
        parameters: number of parameters in it and below.
        layout: what the output's axes mean; None when unknown.
        aliases: further names of the same module.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...] | None
    order: int | None
    calls: int
    parameters: int
    layout: Layout | None
    aliases: tuple[str, ...] = ()


@dataclass
class _Seen:
    order: int
    calls: int
    shape: tuple[int, ...] | None


def the_tensor(output: Any, layer: str) -> Tensor:
    """Take the tensor of a layer's output: the output itself, or the only tensor in a tuple, list or dict.

    Raises:
        NotBuiltError: when there are several tensors, or none, to choose from.
    """
    if isinstance(output, Tensor):
        return output
    items: list[Any] = []
    if isinstance(output, (tuple, list)):
        items = [(str(i), item) for i, item in enumerate(output)]
    elif isinstance(output, dict):
        items = [(str(key), item) for key, item in output.items()]
    tensors = [(key, item) for key, item in items if isinstance(item, Tensor)]
    if len(tensors) == 1:
        return tensors[0][1]
    found = ", ".join(f"#{key} {list(item.shape)}" for key, item in tensors) or "no tensor in it"
    raise NotBuiltError(
        f"layer '{layer}' outputs {type(output).__name__} with {found}; choosing an element is not built yet",
        hint="take a layer inside or after it that outputs one tensor",
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode and give each its own flag back, also after an exception."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def dry_run(module: nn.Module, example: Tensor, rule: LayoutRule | None) -> list[LayerInfo]:
    """Run `module` once on `example` and describe every layer, in execution order; layers that never run come last.

    Args:
        module: the model; left as it was.
        example: one model input, [1, 3, h, w].
        rule: the adapter's own knowledge of layouts.

    Raises:
        UsageError: when the model cannot take such an input.
    """
    seen: dict[int, _Seen] = {}

    def record(part: nn.Module, _args: Any, output: Any) -> None:
        before = seen.get(id(part))
        if before is None:
            seen[id(part)] = _Seen(len(seen), 1, _shape(output, len(example)))
        else:
            before.calls += 1

    parts = dict(module.named_modules())
    handles = [part.register_forward_hook(record) for part in parts.values()]
    try:
        with torch.no_grad(), evaluating(module):
            module(example)
    except Exception as error:
        raise UsageError(
            f"{type(module).__name__} cannot take an input of shape {list(example.shape)}: {error}",
            hint="set image_size to what the model takes, or pass it options (timm: img_size, dynamic_img_size)",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _describe(module, parts, seen, rule)


def _describe(
    module: nn.Module, parts: dict[str, nn.Module], seen: dict[int, _Seen], rule: LayoutRule | None
) -> list[LayerInfo]:
    names: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        names.setdefault(id(part), []).append(name)
    found = {name: seen[id(part)] for name, part in parts.items() if name and id(part) in seen}
    shapes = {name: entry.shape for name, entry in found.items() if entry.shape is not None}
    layouts: dict[str, Layout | None] = {name: default_layout(parts[name], shape) for name, shape in shapes.items()}
    layouts.update(rule(module, shapes) if rule else {})
    infos = [
        LayerInfo(
            name=name,
            kind=type(part).__name__,
            output_shape=shapes.get(name),
            order=found[name].order if name in found else None,
            calls=found[name].calls if name in found else 0,
            parameters=sum(p.numel() for p in part.parameters()),
            layout=layouts.get(name),
            aliases=tuple(alias for alias in names[id(part)] if alias != name),
        )
        for name, part in parts.items()
        if name
    ]
    return sorted(infos, key=lambda info: (info.order is None, info.order or 0))


def _shape(output: Any, batch: int) -> tuple[int, ...] | None:
    try:
        tensor = the_tensor(output, "")
    except NotBuiltError:
        return None
    return tuple(tensor.shape[1:]) if tensor.dim() > 1 and len(tensor) == batch else None
