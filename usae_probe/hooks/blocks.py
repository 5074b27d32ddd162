"""A model's blocks: the like-named parts that follow one another through its depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from .inspect import LayerInfo

T = TypeVar("T")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MANY = 6
_SHARE = 0.5


def find_blocks(module: nn.Module, layers: Sequence[LayerInfo]) -> list[str]:
    """Return the names of a model's blocks in execution order; none where nothing in it is built of blocks.

    A family is all modules whose paths differ in numbers only (`blocks.0`, `blocks.1`, …; `layer1.0`, `layer2.0`, …),
    that have submodules, are more than a container of them (`nn.Sequential`), and each run once. Of the families that
    hold at least half of the parameters that the largest one holds, the outermost with six members or more are the
    blocks; where none has so many, the one with most members, and of equals the outermost. So Swin's blocks are
    `layers.0.blocks.0`, …, not its four stages.

    Args:
        module: the model.
        layers: its layers, as the dry run found them.
    """
    modules = dict(module.named_modules())
    families: dict[str, list[LayerInfo]] = {}
    for info in layers:
        part, family = modules.get(info.name), re.sub(r"\d+", "#", info.name)
        if part is None or info.order is None or info.calls != 1 or "#" not in family:
            continue
        if type(part) not in _CONTAINERS and any(True for _ in part.children()):
            families.setdefault(family, []).append(info)
    weight = {family: sum(info.parameters for info in members) for family, members in families.items()}
    least = _SHARE * max(weight.values(), default=0)
    large = [family for family in families if weight[family] >= least and len(families[family]) > 1]
    outermost = sorted(large, key=lambda family: family.count("."))
    chosen = next((family for family in outermost if len(families[family]) >= _MANY), None)
    chosen = chosen or max(outermost, key=lambda family: len(families[family]), default=None)
    return [info.name for info in families[chosen]] if chosen else []


def evenly(things: Sequence[T], n: int) -> list[T]:
    """Return n of a sequence, evenly spaced, the last always among them; all where there are no more.

    >>> evenly(range(12), 4), evenly(range(3), 8), evenly(range(12), 1)
    ([2, 5, 8, 11], [0, 1, 2], [11])
    """
    total = len(things)
    return [things[(i + 1) * total // n - 1] for i in range(n)] if total > n else list(things)
