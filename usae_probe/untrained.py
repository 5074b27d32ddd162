"""Untrained networks: a trained module's weights drawn anew, as a floor for what two models have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError


@torch.no_grad()
def reinitialise(module: nn.Module, seed: int) -> nn.Module:
    """Draw all weights of a module anew, in place, for networks whose factory gives none that are untrained.

    Submodules that have a `reset_parameters` use it: that gives PyTorch's own initialisation, which may not be the
    factory's. The entries of parameters that no such reset changes (class tokens, position embeddings, layer scales,
    bare `nn.Parameter`) are permuted at random: they keep their distribution, and nothing of what was learnt where.
    Means and variances that normalisations keep while running start again from 0 and 1; other buffers stay. Parameters
    keep their dtype, device and `requires_grad`, and no random generator outside moves.

    Do this before `attach`: a hooked model remembers the hash of its weights.

    Args:
        module: the module, which may be trained.
        seed: the same seed on the same weights, on the same kind of device, gives the same bits.

    Returns:
        the module.

    Raises:
        UsageError: for a negative seed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> before = net[0].weight.clone()
        >>> bool((reinitialise(net, seed=1)[0].weight != before).all())
        True
    """
    if seed < 0:
        raise UsageError(f"seed={seed} must not be negative")
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    with _seeded(module, seed):
        for reset in _resets(module):
            reset()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name in before and torch.equal(parameter, before[name]):
            _permute(parameter, generator)
    return module


def _resets(module: nn.Module) -> Iterator[Callable[[], Any]]:
    """Yield what draws parameters anew or forgets running statistics, a module before those in it."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset) and _takes_nothing(reset):
            yield reset
        for name, start in (("running_mean", 0.0), ("running_var", 1.0), ("num_batches_tracked", 0)):
            statistic = getattr(part, name, None)  # also of frozen normalisations, which have nothing else to reset
            if isinstance(statistic, Tensor):
                yield partial(statistic.fill_, start)


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _permute(parameter: Tensor, generator: torch.Generator) -> None:
    """Put the entries into another order, one that shows; with fewer than two different values there is none."""
    entries = parameter.flatten()
    if not len(entries) or bool((entries == entries[0]).all()):
        return
    drawn = entries
    while torch.equal(drawn, entries):
        drawn = entries[torch.randperm(len(entries), generator=generator).to(entries.device)]
    parameter.copy_(drawn.view_as(parameter))


@contextmanager
def _seeded(module: nn.Module, seed: int) -> Iterator[None]:
    """Seed the generators that the module's devices draw from, and put them back; no others are touched."""
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
