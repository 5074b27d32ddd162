"""What `usae-probe layers` says of a model: its layers with what sites can read there, searched, and as a tree."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import SiteError, UnknownLayerError, nearest
from ..hooks import HookedModel, LayerInfo, Layout, Output
from ..sites import Policy, Site

SCREEN = 40
"""Rows that a tree may have before it is cut at a depth."""
LEAST_DEPTH = 2


class Readable(NamedTuple):
    """One tensor that a site can name.

    Attributes:
        suffix: what stands behind the layer in a site that means it: `~1`, `#0`, `~1#0`; empty where nothing has to.
        output: the tensor.
        d_in: row length by each token policy that means something on it.
    """

    suffix: str
    output: Output
    d_in: dict[Policy, int]


@dataclass(frozen=True)
class ModelLayers:
    """A model and everything that is listed of its layers.

    Attributes:
        title: the model as the user named it.
        name: its name in sites.
        layers: in execution order.
        runs: by layer, for every run the tensors in its output.
        time_shares: by layer, share of a forward pass's time gone by when its output is complete.
        seconds: of a forward pass of two pictures.
        parameters: of the whole model.
        input_shape: of one picture as the model takes it.
        sites: those that a config reads.
        problems: what is wrong with a config's layers, one line each.
    """

    title: str
    name: str
    layers: list[LayerInfo]
    runs: dict[str, list[tuple[Readable, ...]]]
    time_shares: dict[str, float]
    seconds: float
    parameters: int
    input_shape: tuple[int, ...]
    sites: tuple[Site, ...] = ()
    problems: tuple[str, ...] = ()

    def sites_of(self, layer: str) -> list[Site]:
        """Return the config's sites on a layer, under whichever of its names."""
        return self._used.get(layer, [])

    @property
    def used(self) -> frozenset[str]:
        """The layers that the config reads, by their first names."""
        return frozenset(self._used)

    @cached_property
    def _used(self) -> dict[str, list[Site]]:
        first = {name: info.name for info in self.layers for name in (info.name, *info.aliases)}
        used: dict[str, list[Site]] = {}
        for site in self.sites:
            used.setdefault(first[site.layer], []).append(site)
        return used


def survey(hooked: HookedModel, title: str, wanted: Iterable[str] = ()) -> ModelLayers:
    """Find out all that is listed of a model.

    Args:
        hooked: the model; it runs three times.
        title: the model as the user named it.
        wanted: the layers that a config reads; one that the model lacks becomes a problem, not an error: the list is
            what the user needs to mend it.
    """
    layers = hooked.layers()
    begin = time.perf_counter()
    # One pass: shares of one pass never fall from a layer to the next, and nobody waits for the others.
    shares = hooked.time_shares(repeats=1)
    seconds = (time.perf_counter() - begin) / 2  # a pass that does not count runs before it
    sites: list[Site] = []
    problems = []
    for layer in wanted:
        try:
            sites += hooked.expand([layer])
        except (SiteError, UnknownLayerError) as error:
            meant = re.match(r"did you mean .*?\?", error.hint)  # what follows would send the user to this very list
            problems.append(f"{error.message}; {meant[0]}" if meant else error.message)
    return ModelLayers(
        title=title,
        name=hooked.name,
        layers=layers,
        runs={info.name: [tuple(_readable(hooked, info, call)) for call in range(info.calls)] for info in layers},
        time_shares=shares,
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in hooked.module.parameters()),
        input_shape=hooked.input_shape,
        sites=tuple(sites),
        problems=tuple(problems),
    )


def _readable(hooked: HookedModel, info: LayerInfo, call: int) -> Iterator[Readable]:
    outputs = info.runs[call].outputs
    for output in outputs:
        site = Site(
            hooked.name,
            info.name,
            call=call if info.calls > 1 else None,
            element=output.element if len(outputs) > 1 else None,
        )
        yield Readable(str(site).removeprefix(f"{hooked.name}/{info.name}"), output, hooked.d_in_by_policy(site))


def matching(found: Sequence[ModelLayers], text: str) -> list[set[str]]:
    """Return the layers of each model whose name, alias or kind holds `text`, a regular expression or part of it.

    Raises:
        UnknownLayerError: when no layer of any model does; names the nearest.
    """
    try:
        pattern = re.compile(text, re.IGNORECASE)
    except re.error:
        pattern = re.compile(re.escape(text), re.IGNORECASE)
    matches = [
        {info.name for info in model.layers if any(map(pattern.search, (info.name, *info.aliases, info.kind)))}
        for model in found
    ]
    if any(matches):
        return matches
    words: dict[str, None] = {}
    for info in (info for model in found for info in model.layers):
        words |= dict.fromkeys((info.name, *info.name.split("."), info.kind, *info.aliases))
    named = " or ".join(f"'{model.title}'" for model in found)
    raise UnknownLayerError(f"no layer of {named} matches '{text}'", hint=nearest(text, words) or "without --grep: all")


def described(model: ModelLayers, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Return a model's layers for JSON; those in `only`, or all."""
    return [_described(model, info) for info in model.layers if only is None or info.name in only]


def _described(model: ModelLayers, info: LayerInfo) -> dict[str, Any]:
    runs = model.runs[info.name]
    bare = runs[0][0] if runs and len(runs[0]) == 1 and not runs[0][0].suffix else None
    share = model.time_shares.get(info.name)
    return {
        "name": info.name,
        "kind": info.kind,
        "output_shape": info.output_shape,
        **_axes(info.layout),
        "d_in": bare.d_in if bare else {},
        "order": info.order,
        "time_share": None if share is None else round(share, 4),
        "calls": info.calls,
        "runs": [
            {
                "order": call.order,
                "outputs": [
                    {
                        "suffix": suffix,
                        "element": output.element,
                        "shape": output.shape,
                        **_axes(output.layout),
                        "d_in": d_in,
                    }
                    for suffix, output, d_in in readable
                ],
            }
            for call, readable in zip(info.runs, runs, strict=True)
        ],
        "parameters": info.parameters,
        "aliases": info.aliases,
        "sites": [str(site) for site in model.sites_of(info.name)],
    }


def _axes(layout: Layout | None) -> dict[str, Any]:
    return {
        "layout": None if layout is None else str(layout),
        "grid": None if layout is None else layout.grid,
        "prefix_tokens": None if layout is None or layout.kind == "vector" else layout.prefix,
    }


@dataclass
class Branch:
    """A name of the tree: a layer, or only a part of layers' names; and what is below it, in execution order."""

    name: str
    info: LayerInfo | None = None
    below: list[Branch] = field(default_factory=list)
    first: float = float("inf")
    runs: bool = False

    @property
    def size(self) -> int:
        """Layers in it and below."""
        return (self.info is not None) + sum(branch.size for branch in self.below)


class Row(NamedTuple):
    """A row of the tree as it is shown: lines to its parents, the branch, and how many layers below it are not."""

    guide: str
    branch: Branch
    hidden: int = 0


def tree(layers: Sequence[LayerInfo]) -> list[Branch]:
    """Arrange layers by the dots in their names: parents above their children, siblings as they run."""
    root = Branch("")
    known = {"": root}
    for info in layers:
        _branch(known, info.name).info = info
    _settle(root)
    return root.below


def _branch(known: dict[str, Branch], name: str) -> Branch:
    if name not in known:
        known[name] = Branch(name)
        _branch(known, name.rpartition(".")[0]).below.append(known[name])
    return known[name]


def _settle(branch: Branch) -> None:
    """Sort what is below by when it first runs; what never runs stays last, as it came."""
    for child in branch.below:
        _settle(child)
    orders = [child.first for child in branch.below]
    if branch.info is not None and branch.info.order is not None:
        orders.append(branch.info.order)
    branch.first = min(orders, default=float("inf"))
    branch.runs = branch.first < float("inf")
    branch.below.sort(key=lambda child: child.first)


def rows_to(roots: Sequence[Branch], depth: int, always: Collection[str] = ()) -> list[Row]:
    """Return the rows down to a depth (0: all), and the layers in `always` with the way to them wherever they are."""
    return list(_rows(roots, lambda branch, level: not depth or level <= depth or _holds(branch, always)))


def rows_with(roots: Sequence[Branch], names: Collection[str]) -> list[Row]:
    """Return the rows of some layers and the way to them."""
    return [row._replace(hidden=0) for row in _rows(roots, lambda branch, level: _holds(branch, names))]


def fitting_depth(roots: Sequence[Branch], always: Collection[str] = ()) -> int:
    """Return the greatest depth at which the tree has no more rows than fit a screen; 0 when all of it fits."""
    depth, deepest = LEAST_DEPTH, _depth(roots)
    while depth < deepest and len(rows_to(roots, depth + 1, always)) <= SCREEN:
        depth += 1
    return depth if depth < deepest else 0


def _depth(branches: Sequence[Branch]) -> int:
    return 1 + max(_depth(branch.below) for branch in branches) if branches else 0


def _holds(branch: Branch, names: Collection[str]) -> bool:
    return branch.name in names or any(_holds(child, names) for child in branch.below)


def _rows(
    branches: Sequence[Branch], shown: Callable[[Branch, int], bool], level: int = 1, lines: str = ""
) -> Iterator[Row]:
    kept = [branch for branch in branches if shown(branch, level)]
    for branch in kept:
        last = branch is kept[-1]
        guide = lines + ("└─" if last else "├─") if level > 1 else ""
        hidden = sum(child.size for child in branch.below if not shown(child, level + 1))
        yield Row(guide, branch, hidden)
        below = lines + ("  " if last else "│ ") if level > 1 else ""
        yield from _rows(branch.below, shown, level + 1, below)
