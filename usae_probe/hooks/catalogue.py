"""The catalogue: a model's layers found by name, glob or module, and what a site means in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from ..errors import ConfigError, SiteError, UnknownLayerError, nearest
from ..sites import POLICIES, Policy, Site
from .containers import the_element
from .inspect import DRY_BATCH, Call, LayerInfo, Output, without_axis
from .layout import Layout, d_in, n_tokens, require_head, require_policy
from .points import Point

LayerName = str | nn.Module | Site
"""How a user may name a layer: name or glob with site suffixes, the module itself, or a site."""


class Resolved(NamedTuple):
    """A site in its model: the layer, which of its runs, and which tensor of that run's output."""

    site: Site
    layer: LayerInfo
    call: int
    order: int
    output: Output


class Catalogue:
    """A model's layers.

    Args:
        model: the model's name.
        layers: in execution order, as the dry run found them.
        points: the layers' points, by all their names.
        layouts: what the user says of layouts: by layer name or glob, with `~call` and `#element` where needed.
        where: what lists the layers, for error messages.

    Raises:
        ConfigError: for a stated layout that does not fit its layer.
        UnknownLayerError: for one of a layer that the model does not have.
    """

    def __init__(
        self,
        model: str,
        layers: Sequence[LayerInfo],
        points: Mapping[str, Point],
        layouts: Mapping[str, Layout | str],
        where: str,
    ) -> None:
        self.model, self.points, self._where = model, points, where
        self._stated: set[str] = set()
        self._set(layers)
        for pattern, layout in layouts.items():
            self._state(pattern, Layout.parse(layout) if isinstance(layout, str) else layout)

    def _set(self, layers: Sequence[LayerInfo]) -> None:
        self.layers = list(layers)
        self._by_name = {name: info for info in layers for name in (info.name, *info.aliases)}

    def expand(self, layers: Iterable[LayerName]) -> tuple[Site, ...]:
        """Resolve layer names, globs and modules to sites of this model, each once, in the given order.

        Raises:
            UnknownLayerError: naming the nearest layers.
            SiteError: when a layer cannot serve its site.
        """
        # By the layer's first name: two of its names are one site, spelled as it was asked for first.
        sites: dict[Site, Site] = {}
        for layer in layers:
            asked = self.site_of(layer)
            for name in self._matching(asked):
                found = self.resolve(replace(asked, layer=name))
                site = self._spelled(found)
                sites.setdefault(replace(site, layer=found.layer.name), site)
        return tuple(sites.values())

    def resolve(self, site: Site) -> Resolved:
        """Find what a site reads, and check that its layer can serve it.

        Raises:
            UnknownLayerError: for a layer that the model does not have or never runs.
            SiteError: for a call, element, head or policy that the layer does not have.
        """
        found = self.find(site)
        output = found.output
        if output.shape is None:
            raise SiteError(
                f"site '{site}': the layer's output has no batch axis (it holds windows, or is one for all)",
                hint="take a layer inside, around or after it that gives something per image, or state layout=",
            )
        if output.layout is None:
            raise SiteError(
                f"site '{site}': the layer outputs [{', '.join(map(str, ('b', *output.shape)))}], "
                "neither a vector nor tokens nor a map as far as is known",
                hint="take a layer inside, around or after it, or state layout= (see Layout.parse)",
            )
        require_policy(site, output.layout, output.shape)
        return found

    def find(self, site: Site) -> Resolved:
        """Find the tensor that a site names, whatever its axes mean; raises as `resolve` does."""
        info = self._runnable(site.layer)
        if site.call is None and info.calls > 1:
            named = ", ".join(f"{site.layer}~{call}" for call in range(min(info.calls, 4)))
            raise SiteError(
                f"layer '{site.layer}' of model '{self.model}' runs {info.calls} times in a forward pass",
                hint=f"choose one: {named}{', …' if info.calls > 4 else ''}",
            )
        call = site.call or 0
        if call >= info.calls:
            raise SiteError(
                f"site '{site}': call {call} of a layer that runs {info.calls} times in a forward pass",
                hint=f"calls are numbered 0 to {info.calls - 1}",
            )
        run = info.runs[call]
        named_outputs = {output.element: output for output in run.outputs}
        element = the_element(named_outputs, site.element, site.layer)
        require_head(site, named_outputs[element].layout, named_outputs[element].shape)
        return Resolved(site, info, call, run.order, named_outputs[element])

    def site_of(self, layer: LayerName) -> Site:
        """Parse how a user names a layer; globs stay.

        Raises:
            SiteError: when it does not follow the grammar.
            UnknownLayerError: for a module that is no part of this model.
        """
        if isinstance(layer, Site):
            return layer
        if isinstance(layer, str):
            return Site.of(self.model, layer)
        for name, point in self.points.items():
            if point.module is layer:
                return Site(self.model, name)
        raise UnknownLayerError(
            f"the {type(layer).__name__} given as a layer is no part of model '{self.model}'",
            hint="give a submodule of the model that is attached to, or its name",
        )

    def stated_layout(self, site: Site) -> str:
        """Return the layout that the user stated for a site's layer, with its grid; empty when it was found."""
        found = self.find(site)
        return repr(found.output.layout) if found.layer.name in self._stated else ""

    def d_in_by_policy(self, site: Site) -> dict[Policy, int]:
        """Return the row length under each token policy that means something on what a site reads."""
        found: dict[Policy, int] = {}
        for policy in POLICIES:
            with suppress(SiteError, UnknownLayerError):
                output = self.resolve(replace(site, policy=policy)).output
                found[policy] = d_in(output.layout, output.shape, site.head)  # type: ignore[arg-type]
        return found

    def _matching(self, asked: Site) -> list[str]:
        if not any(sign in asked.layer for sign in "*?"):
            self._runnable(asked.layer)
            return [asked.layer]
        matched = [info.name for info in self._globbed(asked.layer)]
        names = [name for name in matched if self._serves(replace(asked, layer=name))]
        if not names:
            what = f"'{asked.layer}'" if not matched else f"'{asked.layer}' and can serve '{asked}'"
            raise UnknownLayerError(
                f"no layer of model '{self.model}' matches {what}",
                hint=self._list_hint(asked.layer.replace("*", "0")),
            )
        return names

    def _spelled(self, found: Resolved) -> Site:
        """Leave out what says nothing, the only call and the only tensor: one site has one spelling."""
        call = None if found.layer.calls == 1 else found.site.call
        element = None if len(found.layer.runs[found.call].outputs) == 1 else found.site.element
        return replace(found.site, call=call, element=element)

    def _globbed(self, pattern: str) -> list[LayerInfo]:
        regex = _glob(pattern)
        return [info for info in self.layers if any(map(regex.fullmatch, (info.name, *info.aliases)))]

    def _serves(self, site: Site) -> bool:
        try:
            self.resolve(site)
        except (SiteError, UnknownLayerError):
            return False
        return True

    def _runnable(self, name: str) -> LayerInfo:
        info = self._by_name.get(name)
        if info is None:
            raise UnknownLayerError(f"model '{self.model}' has no layer '{name}'", hint=self._list_hint(name))
        if info.order is None:
            raise UnknownLayerError(f"layer '{name}' of model '{self.model}' never runs in a forward pass")
        return info

    def _list_hint(self, name: str) -> str:
        return f"{nearest(name, self._by_name)} {self._where}".strip()

    def _state(self, pattern: str, layout: Layout) -> None:
        asked = Site.of(self.model, pattern)
        names = [info.name for info in self._globbed(asked.layer)] or [self._runnable(asked.layer).name]
        stated = {name: _stated(self._by_name[name], asked, layout) for name in names}
        self._stated.update(stated)
        self._set([stated.get(info.name, info) for info in self.layers])


def _stated(info: LayerInfo, asked: Site, layout: Layout) -> LayerInfo:
    """Return the layer with a layout that the user states, in the runs and the element that are meant."""
    runs: list[Call] = list(info.runs)
    for number in range(len(runs)) if asked.call is None else [asked.call]:
        if number >= len(runs):
            raise ConfigError(f"a layout is stated for '{asked}', but that layer runs {len(runs)} times")
        outputs = {output.element: output for output in runs[number].outputs}
        element = the_element(outputs, asked.element, info.name)
        outputs[element] = _fitting(info, outputs[element], layout)
        runs[number] = runs[number]._replace(outputs=tuple(outputs.values()))
    only = runs[0].outputs[0] if runs and len(runs[0].outputs) == 1 else None
    if only is None:
        return replace(info, runs=tuple(runs))
    return replace(info, runs=tuple(runs), layout=only.layout, output_shape=only.shape)


def _fitting(info: LayerInfo, output: Output, layout: Layout) -> Output:
    """Check a stated layout against the output's shape, and fill in the grid of a map."""
    shape = without_axis(output.full_shape, layout.batch_axis)
    rank = {"vector": 1, "tokens": 2, "nchw": 3, "nhwc": 3}[layout.kind] + (layout.heads is not None)
    given = f"layout '{layout}' is stated for layer '{info.name}', which for {DRY_BATCH} pictures outputs"
    if len(shape) != rank or output.full_shape[layout.batch_axis] != DRY_BATCH:
        raise ConfigError(f"{given} {list(output.full_shape)}")
    if layout.kind in ("nchw", "nhwc"):
        rows, columns = shape[1:] if layout.kind == "nchw" else shape[:2]
        layout = replace(layout, prefix=0, grid=(rows, columns))
    elif layout.kind == "tokens" and layout.prefix is not None:
        places = n_tokens(layout, shape) - layout.prefix
        if places < 0 or (layout.grid is not None and places != math.prod(layout.grid)):
            grid = f" on a grid of {layout.grid[0]}x{layout.grid[1]}" if layout.grid else ""
            raise ConfigError(f"{given} {n_tokens(layout, shape)} tokens, not {layout.prefix} and places{grid}")
    return output._replace(shape=shape, layout=layout)


def _glob(pattern: str) -> re.Pattern[str]:
    pieces: Mapping[str, str] = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", pattern)))
