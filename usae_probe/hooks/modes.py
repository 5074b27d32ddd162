"""How a model is run while it is looked at: in eval mode and eagerly, whatever it was in before, and with hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def observing(module: nn.Module, grad: bool = False) -> Iterator[None]:
    """Run passes in eval mode, eagerly, and with a graph only if asked for; the model is as it was afterwards."""
    with torch.set_grad_enabled(grad), _evaluating(module), _eagerly(module):
        yield


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Have forward hooks on modules, and take them off again, also after an exception."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode and give each its own flag back, also after an exception."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _eagerly(module: nn.Module) -> Iterator[None]:
    """Run parts that `torch.compile` compiled as they were written: compiled code calls no hooks."""
    compiled = any(
        part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule"  # its import takes seconds
        for part in module.modules()
    )
    with _EAGER if compiled else ExitStack():
        yield


class _Eager:
    """Compilation put aside for as long as any pass needs that: the stance is the whole process's, not a thread's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passes = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._passes:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._passes += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._passes -= 1
            if not self._passes:
                self._stance.__exit__(None, None, None)


_EAGER = _Eager()
