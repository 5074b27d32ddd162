"""`HookedModel`: a live model whose layers can be listed, captured, spliced and differentiated to the pixels."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SiteError, UsaeProbeError
from ..notebook import html_facts, html_table
from ..shapes import Images, Pixels
from ..sites import Policy, Site, check_model_name
from .blocks import find_blocks
from .catalogue import Catalogue, LayerName, Resolved
from .containers import tensors_in, the_element
from .inspect import DRY_BATCH, LayerInfo, dry_run, points_of
from .layout import Grid, Layout, LayoutRule, d_in
from .modes import observing
from .points import Point
from .timing import time_shares
from .tokens import from_rows, laid_out_like, rows_per_image, to_rows
from .tracing import Read, Tracer, require_graph

Splice = Callable[[Tensor], Tensor]
"""From rows to as many rows of the same length."""


class HookedModel:
    """A live model whose layers can be listed, captured and spliced, with gradients to its input.

    The model's weights, flags and hooks are never changed; `close()` (or leaving the `with` block, also by an
    exception) takes nnsight's wrapping off again. One lock per hooked model: passes of one model never overlap.

    Args:
        module: the live model, on its device, in its dtype.
        name: the model's name in sites.
        layers: layer names or globs with site suffixes (`blocks.11`, `blocks.*@mean`, `act~1`), submodules, or sites;
            `*` does not cross a dot, `**` does. They become `sites`.
        preprocess: pictures (uint8 [3,h,w], any sizes) to model input; see `usae_probe.images.Preprocessing`.
        example: one model input [1,3,h,w] for the dry run; default: a grey picture through `preprocess`.
        layout_rule: what the adapter knows of the layouts; what it says comes before what tracing finds.
        layout: what the user says of the layouts, by layer name or glob: a `Layout` or its spelling; comes first.
        points: layers under names of the adapter's own; default: all submodules by their paths.
        forward_args: from a batch of model input to the model's arguments, for models that want more than one image
            tensor: a dict of keyword arguments, a tuple of positional ones, or one argument.
        where: what lists the layers, for error messages.

    Raises:
        UsageError: when the model cannot take the example, a layer is unknown or cannot serve its site.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        layers: Iterable[LayerName] = (),
        preprocess: Callable[[Sequence[Pixels]], Images],
        example: Images | None = None,
        layout_rule: LayoutRule | None = None,
        layout: Mapping[str, Layout | str] | None = None,
        points: Mapping[str, Point] | None = None,
        forward_args: Callable[[Images], Any] | None = None,
        where: str = "`.layers()` lists them",
    ) -> None:
        check_model_name(name)
        self.name = name
        self.module = module
        self.preprocess = preprocess
        self._forward_args = forward_args
        self._lock = threading.RLock()
        self._tracer: Tracer | None = None
        self._closed = False
        grey = torch.full((3, 224, 224), 128, dtype=torch.uint8)
        example = preprocess([grey]) if example is None else example
        self._example = self._place(example[:1].expand(DRY_BATCH, *example.shape[1:]).contiguous())
        points = dict(points_of(module) if points is None else points)
        found = dry_run(module, self._call(self._example), self._example, points, layout_rule)
        self._catalogue = Catalogue(name, found, points, layout or {}, where)
        self.sites: tuple[Site, ...] = self.expand(layers)

    @property
    def weight(self) -> Tensor | None:
        """The first floating-point weight: the model's input goes to its device, in its dtype."""
        return next((p for p in self.module.parameters() if p.is_floating_point()), None)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the model input that one picture becomes."""
        return tuple(self._example.shape[1:])

    def layers(self) -> list[LayerInfo]:
        """List the model's layers in execution order; those that never run come last."""
        return list(self._catalogue.layers)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The model's blocks in execution order (see `find_blocks`); empty for a model that is not built of blocks."""
        return tuple(find_blocks(self.module, self.layers()))

    def relative_depth(self, site: Site) -> float:
        """Return how deep a site's layer is: the share of the model's blocks that are complete when its output is.

        In a model without blocks the share of its layers.
        """
        ends = {info.name: info.order for info in self.layers() if info.order is not None}
        counted = [ends[name] for name in self.blocks] or list(ends.values())
        here = self._catalogue.resolve(site).order
        return sum(end <= here for end in counted) / len(counted)

    def expand(self, layers: Iterable[LayerName]) -> tuple[Site, ...]:
        """Resolve layer names, globs and modules to sites of this model, each once, in the given order.

        Raises:
            UnknownLayerError: naming the nearest layers.
            SiteError: when a layer cannot serve its site.
        """
        return self._catalogue.expand(layers)

    def d_in(self, site: Site) -> int:
        """Return the number of dimensions of a site's rows."""
        output = self._catalogue.resolve(site).output
        return d_in(output.layout, output.shape, site.head)  # type: ignore[arg-type]

    def d_in_by_policy(self, site: Site) -> dict[Policy, int]:
        """Return the row length under each token policy that means something on what a site reads."""
        return self._catalogue.d_in_by_policy(site)

    def grid(self, site: Site) -> Grid | None:
        """Return the (rows, columns) of places in the layer's output, where known."""
        layout = self._catalogue.resolve(site).output.layout
        return layout.grid if layout else None

    def layout(self, site: Site) -> Layout:
        """Return what the axes of the site's layer mean."""
        return self._catalogue.resolve(site).output.layout  # type: ignore[return-value]

    def stated_layout(self, site: Site) -> str:
        """Return the layout that the user stated for the site's layer; empty when it was found."""
        return self._catalogue.stated_layout(site)

    def rows_per_image(self, site: Site, grid: Grid | None = None) -> int:
        """Return how many rows one image gives; `grid` as in `rows`."""
        output = self._catalogue.resolve(site).output
        return rows_per_image(output.layout, output.shape, site.policy, grid)  # type: ignore[arg-type]

    def capture(self, batch: Images, layers: Iterable[LayerName], grad: bool = False) -> dict[str, Tensor]:
        """Run the model on `batch` and return each layer's output as it was when the layer made it.

        A user's own forward hooks on a layer have had the output before: it is what the rest of the model sees.

        Args:
            batch: model input, [b, 3, h, w].
            layers: layer names, with `~call`, `#element` and `:head` where needed, or submodules; in any order.
            grad: keep the graph, so that gradients flow from the captured tensors to `batch`.

        Returns:
            {layer as given (a submodule by its name): clone of its output}. The pass ends after the last layer wanted.

        Raises:
            UnknownLayerError: for a name the model does not have or never runs.
            SiteError: for a call, element or head that the layer does not have.
        """
        reads = []
        for key, site in self._named(layers).items():
            if site.policy != "pool":
                raise SiteError(
                    f"'{key}': a capture is the layer's whole output and takes no @{site.policy}",
                    hint="rows() reduces outputs by their token policies",
                )
            found = self._catalogue.find(site)
            reads.append(self._read(key, found, take=partial(_whole, found)))
        return self._reads(batch, reads, grad)

    def rows(
        self, batch: Images, sites: Sequence[Site] | None = None, grad: bool = False, grid: Grid | None = None
    ) -> dict[str, Tensor]:
        """Run the model on `batch` and return each site's rows, reduced inside the pass by its token policy.

        Args:
            batch: model input, [b, 3, h, w].
            sites: sites of this model; default: `self.sites`.
            grad: keep the graph.
            grid: places that `@patch` sites are resampled to; default: the layer's own.

        Returns:
            {site: rows [b * rows per image, d_in], image by image}.
        """
        reads = []
        for site in self.sites if sites is None else sites:
            found = self._catalogue.resolve(site)
            take = partial(
                to_rows,
                layout=found.output.layout,  # type: ignore[arg-type]
                policy=site.policy,
                head=site.head,
                grid=grid if site.policy == "patch" else None,
            )
            reads.append(self._read(str(site), found, take=take))
        return self._reads(batch, reads, grad)

    def splice(
        self, batch: Images, layer: LayerName, fn: Splice, *, grad: bool = False, output: str | None = None
    ) -> Tensor:
        """Run the model with a layer's activation replaced by `fn(activation)` and return the model's output.

        `fn` is given the layer's rows [b * rows per image, d_in] under the token policy of `layer` (`pool` unless a
        suffix says otherwise) and returns as many. They are put back into the layer's own layout: a class token is
        replaced, a mean shifts every place by the difference, tokens, places and vectors are replaced; the rest of the
        output stays as it is.

        Args:
            batch: model input, [b, 3, h, w].
            layer: one layer, with site suffixes where needed.
            fn: from rows to rows.
            grad: keep the graph: gradients flow through `fn` and the model to `batch`.
            output: which tensor of a model output that has several, such as `logits`.

        Raises:
            UnknownLayerError, SiteError: as for `rows`; also when an adapter's layer cannot be written to, and with
                `grad` where the model keeps no graph or makes it anew in the backward pass (checkpointing).
            UsageError: when `fn` returns rows of another shape.
        """
        (site,) = self._named([layer]).values()
        found = self._catalogue.resolve(site)
        point = self._catalogue.points[site.layer]
        if point.convert is not None and point.revert is None:
            raise SiteError(f"layer '{site.layer}' cannot be spliced: the adapter converts it and names no way back")

        def replaced(value: Tensor) -> Tensor:
            if grad:
                require_graph(site)
            shown = point.convert(value) if point.convert else value
            how: Any = {"layout": found.output.layout, "policy": site.policy, "head": site.head}
            changed = from_rows(fn(to_rows(shown, **how)), shown, **how)
            return laid_out_like(point.revert(changed) if point.revert else changed, value)

        read = Read(str(site), point.module, found.call, found.order, found.output.element, replace=replaced)
        _, result = self._pass(batch, [read], grad, whole=True)
        tensors = tensors_in(result)
        return tensors[the_element(tensors, output, "(output)")]

    def time_shares(self, repeats: int = 3) -> dict[str, float]:
        """Measure the share of a forward pass's time that has gone by when each layer's (first) output is complete.

        Returns:
            {layer: share}, the median over the passes; two pictures each, after one pass that is not counted.
        """
        with self._lock, observing(self.module):
            modules = {info.name: self._catalogue.points[info.name].module for info in self.layers()}
            return time_shares(modules, self._call(self._example), self._example.device, repeats)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
        digest = hashlib.sha256()
        # Not of `state_dict()`: a model may leave out there what its adapter thinks belongs to somebody else.
        tensors: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        tensors |= dict(self.module.named_buffers(remove_duplicate=False))
        for name, tensor in sorted(tensors.items()):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{data.dtype}:{tuple(data.shape)}:".encode())
            digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Take the wrapping off: every module's `__dict__` is as it was before. Safe to call twice."""
        with self._lock:
            if self._tracer is not None:
                self._tracer.remove()
            self._tracer, self._closed = None, True

    def __enter__(self) -> HookedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        sites = ", ".join(str(site) for site in self.sites) or "none"
        return f"HookedModel({self.name}: {type(self.module).__name__}, {len(self.layers())} layers, sites: {sites})"

    def _repr_html_(self) -> str:
        weight = self.weight
        facts = {"network": type(self.module).__name__, "layers": f"{len(self.layers()):,}"}
        facts["parameters"] = f"{sum(p.numel() for p in self.module.parameters()):,}"
        if weight is not None:
            facts["weights"] = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
        rows = [(str(site), self.d_in(site), self.rows_per_image(site)) for site in self.sites]
        return html_facts(f"HookedModel {self.name}", facts, html_table(["site", "d_in", "rows per image"], rows))

    def _named(self, layers: Iterable[LayerName]) -> dict[str, Site]:
        """Return the layers' sites by the keys that results go by."""
        named: dict[str, Site] = {}
        for layer in layers:
            site = self._catalogue.site_of(layer)
            named[layer if isinstance(layer, str) else str(site).partition("/")[2]] = site
        return named

    def _read(self, key: str, found: Resolved, take: Callable[[Tensor], Tensor]) -> Read:
        point = self._catalogue.points[found.layer.name]
        convert = point.convert
        taken = take if convert is None else lambda value: take(convert(value))
        return Read(key, point.module, found.call, found.order, found.output.element, take=taken)

    def _reads(self, batch: Tensor, reads: Sequence[Read], grad: bool) -> dict[str, Tensor]:
        taken = self._pass(batch, reads, grad, whole=False)[0] if reads else {}
        return {read.key: taken[read.key] for read in reads}

    def _pass(self, batch: Tensor, reads: Sequence[Read], grad: bool, *, whole: bool) -> Any:
        with self._lock, observing(self.module, grad):
            if self._closed:
                raise UsaeProbeError(f"hooked model '{self.name}' is closed", hint="attach the model again")
            if self._tracer is None:
                self._tracer = Tracer(self.module)
            args, kwargs = self._arguments(self._place(batch))
            return self._tracer.run(reads, args, kwargs, whole=whole)

    def _call(self, batch: Tensor) -> Callable[[], Any]:
        def call() -> Any:
            args, kwargs = self._arguments(batch)  # in here: what it makes of the batch is traced too
            return self.module(*args, **kwargs)

        return call

    def _arguments(self, batch: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = batch if self._forward_args is None else self._forward_args(batch)
        if isinstance(given, Mapping):
            return (), dict(given)
        return (given if isinstance(given, tuple) else (given,)), {}

    def _place(self, batch: Tensor) -> Tensor:
        weight = self.weight
        return batch if weight is None else batch.to(device=weight.device, dtype=weight.dtype)


def _whole(found: Resolved, value: Tensor) -> Tensor:
    """Copy a layer's output, or one head of it."""
    head, layout = found.site.head, found.output.layout
    if head is None or layout is None:
        return value.clone()
    return value.movedim(layout.batch_axis, 0).select(1 if layout.heads == "first" else -2, head).clone()
