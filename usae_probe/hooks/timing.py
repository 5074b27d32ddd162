"""How far into a forward pass, in time, each layer's output is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from .modes import hooked


def time_shares(
    modules: Mapping[str, nn.Module], call: Callable[[], Any], device: torch.device, repeats: int
) -> dict[str, float]:
    """Time forward passes with a plain hook on every module.

    Args:
        modules: by layer name; names of one module share its time.
        call: one forward pass.
        device: of the model: CUDA is waited for at every hook, which the share is the fairer for.
        repeats: passes that count.

    Returns:
        {layer: median share of the pass's time up to the end of its first run}; layers that never run are left out.
    """
    shares: dict[int, list[float]] = {}
    for number in range(repeats + 1):
        ends: dict[int, float] = {}
        parts = {id(module): module for module in modules.values()}
        with hooked((module, _clock(ends, device)) for module in parts.values()):
            begin = _now(device)
            call()
            total = _now(device) - begin
        for key, end in ends.items() if number else ():
            shares.setdefault(key, []).append((end - begin) / total)
    return {name: median(shares[id(module)]) for name, module in modules.items() if id(module) in shares}


def _clock(ends: dict[int, float], device: torch.device) -> Callable[[nn.Module, Any, Any], None]:
    def end(module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) not in ends:
            ends[id(module)] = _now(device)

    return end


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
