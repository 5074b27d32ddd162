"""Small modules that tests of hooks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Does(nn.Module):
    """A layer that does what it is told."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def flat_net(side: int, outputs: int, *middle: nn.Module) -> nn.Sequential:
    """Flatten pictures of `side` pixels, linear [b,6], what is given, linear [b,outputs]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 6), *middle, nn.Linear(6, outputs)).eval()
