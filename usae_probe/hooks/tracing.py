"""One forward pass through nnsight: activations read and replaced as the layers make them. The importer of nnsight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..errors import SiteError, UsaeProbeError
from .containers import tensors_in, with_tensor
from .modes import hooked
from .wrapping import Wrapping


class Read(NamedTuple):
    """What one pass does at one layer.

    Attributes:
        key: name of the result; each its own.
        module: whose output it is.
        call: which run of the module.
        order: when that run is complete; reads are done in this order.
        element: which tensor of the output.
        take: from that tensor to the result; must copy, because in-place operations further on overwrite it.
        replace: from that tensor to the one put in its place; None to leave it.
    """

    key: str
    module: nn.Module
    call: int
    order: int
    element: str
    take: Callable[[Tensor], Any] | None = None
    replace: Callable[[Tensor], Tensor] | None = None


class _Tap(nn.Module):
    """Gives back what it is given; nnsight reads and replaces its output."""

    def forward(self, value: Any) -> Any:
        return value


class _Rig(nn.Module):
    """The model beside a tap; nothing of the model knows of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module
        self.tap = _Tap()
        self.waiting: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)  # global hooks are for the model's modules, not for this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if self.waiting:
            raise UsaeProbeError(
                f"'{self.waiting[0]}' was not reached: the batch takes another way through the model than the example",
                hint="its calls or their order depend on the batch: ask for one layer at a time, or for one around it",
            )
        return output


class Tracer:
    """nnsight around a model, from the first pass to `remove`. Not for several threads at a time.

    nnsight takes a module's output where its `forward` ends, before the forward hooks that a user has put on it. What
    such hooks make of the output is what the rest of the model sees, so layers that have hooks are read behind them:
    one more hook hands the output through a tap, a module that nnsight knows.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._rig = _Rig(module)
        self._wrapping = Wrapping(self._rig)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about child names that collide; we never go by name
            self._root = nnsight.NNsight(self._rig)

    def remove(self) -> None:
        """Take the wrapping off the model."""
        self._wrapping.remove()

    def run(self, reads: Sequence[Read], args: tuple[Any, ...], kwargs: dict[str, Any], *, whole: bool) -> Any:
        """Do one forward pass.

        Args:
            reads: what to do; not empty unless `whole`.
            args, kwargs: of the model.
            whole: go on to the model's output; else the pass ends after the last read.

        Returns:
            ({key: taken}, the model's output or None).
        """
        ordered = sorted(reads, key=lambda read: read.order)
        taken: dict[str, Any] = {}
        output = None
        waiting = self._rig.waiting = [read.key for read in ordered]
        with self._tapped(ordered) as places:  # noqa: SIM117  nnsight takes the source of the inner block
            with self._root.trace(*args, **kwargs) as tracer:
                for read, (envoy, visit) in zip(ordered, places, strict=True):
                    for _ in tracer.iter[visit]:
                        value = envoy.output
                        tensor = tensors_in(value)[read.element]
                        if read.take is not None:
                            taken[read.key] = nnsight.save(read.take(tensor))
                        if read.replace is not None:
                            envoy.output = with_tensor(value, read.element, read.replace(tensor))
                        waiting.remove(read.key)
                if whole:
                    output = nnsight.save(self._root.output)
                elif not _in_checkpoint():  # torch 2.12 leaves its hooks on where an exception ends one
                    tracer.stop()
        return taken, output

    @contextmanager
    def _tapped(self, reads: Sequence[Read]) -> Iterator[list[tuple[Any, int]]]:
        """Yield where nnsight finds each read: an envoy and which of its visits.

        By identity: a child named `output` or `root` collides with an attribute of envoys of that name.
        """
        envoys = self._root.interleaver.envoys
        tap = envoys[id(self._rig.tap)]
        visits = sorted({(read.order, id(read.module), read.call) for read in reads if _has_hooks(read.module)})
        number = {(module, call): place for place, (_, module, call) in enumerate(visits)}
        modules = {id(read.module): read.module for read in reads if _has_hooks(read.module)}
        wanted = {key: {call for owner, call in number if owner == key} for key in modules}
        with hooked((module, _through(self._rig.tap, wanted[key])) for key, module in modules.items()):
            yield [
                (tap, number[id(read.module), read.call])
                if id(read.module) in modules
                else (envoys[id(read.module)], read.call)
                for read in reads
            ]


def require_graph(key: object) -> None:
    """Check, inside a pass, that what is put into the model here will be in the backward pass too.

    Raises:
        SiteError: inside activation checkpointing, which runs its part of the model again in the backward pass, without
            what was put in here, and where the model computes without a graph.
    """
    if _in_checkpoint() or not torch.is_grad_enabled():
        raise SiteError(
            f"'{key}' runs inside activation checkpointing or without a graph: gradients would be wrong",
            hint="switch checkpointing off in the model, or splice without grad=True",
        )


def _in_checkpoint() -> bool:
    # torch has no public name for this; without it, checkpointing goes unnoticed
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    packing = top(True)
    return bool(packing is not None and packing[0].__module__ == "torch.utils.checkpoint")


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or torch_modules._global_forward_hooks)


def _through(tap: nn.Module, wanted: set[int]) -> Callable[[nn.Module, Any, Any], Any]:
    runs = iter(range(1 << 62))

    def hand(_module: nn.Module, _args: Any, output: Any) -> Any:
        # `forward`, not a call: global hooks have had this output already
        return tap.forward(output) if next(runs) in wanted else None

    return hand
