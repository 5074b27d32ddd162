"""The dry run: one forward pass with plain hooks that finds what each layer outputs, what it means, when, how often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import UsageError
from .axes import AxisTracer
from .containers import tensors_in
from .layout import Layout, LayoutRule, default_layout
from .modes import hooked, observing
from .points import Point

DRY_BATCH = 2
"""Pictures in a dry run: with one, an axis of length 1 could be the batch."""


class Output(NamedTuple):
    """One tensor that a layer outputs.

    Attributes:
        element: its name in the layer's output; empty when it is the output itself.
        full_shape: as it was in the dry run, of `DRY_BATCH` pictures.
        shape: without the batch axis; None when no axis is the batch (windows of all pictures, say).
        layout: what the axes mean; None when unknown.
    """

    element: str
    full_shape: tuple[int, ...]
    shape: tuple[int, ...] | None
    layout: Layout | None


class Call(NamedTuple):
    """One run of a layer in a forward pass: when its output is complete, and the tensors in it."""

    order: int
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a hooked model.

    Attributes:
        name: dotted module path as `named_modules()` spells it, or the adapter's own name for it.
        kind: class of the module.
        output_shape: shape of its (first) output without the batch axis; None when that is no single tensor with a
            batch axis, or the layer never runs.
        order: position at which its (first) output is complete in a forward pass; None when it never runs.
        calls: how often it runs in one forward pass.
        parameters: number of parameters in it and below.
        layout: what the output's axes mean; None when unknown.
        aliases: further names of the same layer.
        runs: every run with all tensors that it outputs.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...] | None
    order: int | None
    calls: int
    parameters: int
    layout: Layout | None
    aliases: tuple[str, ...] = ()
    runs: tuple[Call, ...] = field(default=(), repr=False, compare=False)


def without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return the shape without one of its axes."""
    return shape[:axis] + shape[axis + 1 :]


def points_of(module: nn.Module) -> dict[str, Point]:
    """Return every submodule as a point, by its path; further paths of the same module are aliases."""
    return {name: Point(part) for name, part in module.named_modules(remove_duplicate=False) if name}


def dry_run(
    module: nn.Module,
    call: Callable[[], Any],
    pictures: Tensor,
    points: Mapping[str, Point],
    rule: LayoutRule | None,
) -> list[LayerInfo]:
    """Run `module` once and describe every point, in execution order; those that never run come last.

    Args:
        module: the model; left as it was.
        call: runs it on `pictures`.
        pictures: model input, [DRY_BATCH, 3, h, w].
        points: by name; names with an equal point are aliases of the first.
        rule: the adapter's own knowledge of layouts.

    Raises:
        UsageError: when the model cannot take such an input.
    """
    try:
        with observing(module):
            watch = _watched(module, call, pictures, points)
    except Exception as error:
        raise UsageError(
            f"{type(module).__name__} cannot take an input of shape {[1, *pictures.shape[1:]]}: {error}",
            hint=_what_it_takes(module, error),
        ) from error
    return _describe(module, points, watch, rule)


def _what_it_takes(module: nn.Module, error: Exception) -> str:
    """Say what to do about a model that does not take pictures of a size, or no pictures at all."""
    tables = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    if tables and "indices" in str(error):
        return (
            f"its '{tables[0]}' looks whole numbers up, as models of text do: images and pictures need a model of "
            "images; for one that takes both, give forward_args="
        )
    return "set image_size to what the model takes, or pass it options (timm: img_size, dynamic_img_size)"


class _Watch:
    """What plain hooks saw: the runs of every point, by its first name.

    Attributes:
        names: all names of each point, by its first name.
        runs: by first name.
    """

    def __init__(self, points: Mapping[str, Point], pictures: Tensor, axes: AxisTracer) -> None:
        first: dict[tuple[int, Any], str] = {}
        self.names: dict[str, list[str]] = {}
        self.runs: dict[str, list[Call]] = {}
        self._of_module: dict[int, list[str]] = {}
        self._points, self._pictures, self._axes, self._order = points, pictures, axes, 0
        for name, point in points.items():
            own = first.setdefault((id(point.module), point.convert), name)
            self.names.setdefault(own, []).append(name)
            if own == name:
                self.runs[own] = []
                self._of_module.setdefault(id(point.module), []).append(own)

    def follow(self, call: Callable[[], Any]) -> None:
        """Do a pass and see what every point outputs."""
        modules = {id(point.module): point.module for point in self._points.values()}
        with hooked((module, self._record) for module in modules.values()):
            call()

    def _record(self, module: nn.Module, _args: Any, output: Any) -> None:
        for name in self._of_module[id(module)]:
            outputs = [self._described(element, value, name) for element, value in tensors_in(output).items()]
            self.runs[name].append(Call(self._order, tuple(outputs)))
        self._order += 1

    def _described(self, element: str, value: Tensor, name: str) -> Output:
        point = self._points[name]
        value = point.convert(value) if point.convert is not None and not element else value
        full = tuple(value.shape)
        traced, layout = self._axes.axes(value) is not None, self._axes.layout(value)
        if layout is None and (len(full) < 2 or full[0] != len(self._pictures)):
            return Output(element, full, None, None)
        shape = without_axis(full, layout.batch_axis if layout else 0)
        return Output(element, full, shape, layout if traced else default_layout(point.module, shape))


def _watched(module: nn.Module, call: Callable[[], Any], pictures: Tensor, points: Mapping[str, Point]) -> _Watch:
    try:
        with AxisTracer(module) as axes:
            axes.picture(pictures)
            watch = _Watch(points, pictures, axes)
            watch.follow(call)
    except Exception:  # whatever it was: a model that runs by itself is still described, by a tracer that is not on
        watch = _Watch(points, pictures, AxisTracer(module))
        watch.follow(call)
    return watch


def _describe(
    module: nn.Module, points: Mapping[str, Point], watch: _Watch, rule: LayoutRule | None
) -> list[LayerInfo]:
    single = {name: runs[0].outputs[0] for name, runs in watch.runs.items() if runs and len(runs[0].outputs) == 1}
    shapes = {name: output.shape for name, output in single.items() if output.shape is not None}
    ruled = rule(module, shapes) if rule else {}
    infos = []
    for name, (_, *aliases) in watch.names.items():
        runs = tuple(_ruled(run, ruled, name) for run in watch.runs[name])
        known = runs[0].outputs[0] if name in single else None
        infos.append(
            LayerInfo(
                name=name,
                kind=type(points[name].module).__name__,
                output_shape=known.shape if known else None,
                order=runs[0].order if runs else None,
                calls=len(runs),
                parameters=sum(p.numel() for p in points[name].module.parameters()),
                layout=known.layout if known else None,
                aliases=tuple(aliases),
                runs=runs,
            )
        )
    return sorted(infos, key=lambda info: (info.order is None, info.order or 0))


def _ruled(run: Call, ruled: Mapping[str, Layout | None], name: str) -> Call:
    """Let an adapter's knowledge of a layer come before what was found."""
    if name not in ruled or len(run.outputs) != 1:
        return run
    return run._replace(outputs=(run.outputs[0]._replace(layout=ruled[name]),))
