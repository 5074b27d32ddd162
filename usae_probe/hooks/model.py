"""`HookedModel`: a live model with nnsight around it. This module is the only importer of nnsight."""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor, nn

from ..errors import NotBuiltError, UnknownLayerError, UsaeProbeError, nearest
from ..shapes import Images, Pixels, RowMatrix
from ..sites import Site, check_model_name
from .inspect import LayerInfo, dry_run, evaluating, the_tensor
from .layout import LayoutRule, d_in, require_policy
from .tokens import to_rows
from .wrapping import Wrapping


class _Target(NamedTuple):
    """What one trace reads: under which key, where, and how the output is reduced inside the trace."""

    key: str
    layer: LayerInfo
    reduce: Callable[[Tensor], Tensor]


class HookedModel:
    """A live model whose layers can be listed and captured, with gradients to its input.

    The model's weights, flags and hooks are never changed; `close()` (or leaving the `with` block, also by an
    exception) takes nnsight's wrapping off again. One lock per hooked model: captures of one model never overlap.

    Args:
        module: the live model, on its device, in its dtype.
        name: the model's name in sites.
        layers: layer names or globs with site suffixes (`blocks.11`, `blocks.*@mean`); `*` does not cross a dot, `**`
            does. They become `sites`.
        preprocess: pictures (uint8 [3,h,w], any sizes) to model input; see `usae_probe.images.Preprocessing`.
        example: one model input [1,3,h,w] for the dry run; default: a grey picture through `preprocess`.
        layout_rule: what the adapter knows of the layouts.

    Raises:
        UsageError: when the model cannot take the example, a layer is unknown or cannot serve its site.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        layers: Sequence[str] = (),
        preprocess: Callable[[Sequence[Pixels]], Images],
        example: Images | None = None,
        layout_rule: LayoutRule | None = None,
    ) -> None:
        check_model_name(name)
        self.name = name
        self.module = module
        self.preprocess = preprocess
        self._lock = threading.Lock()
        self._root: Any = None
        self._closed = False
        self._wrapping: Wrapping | None = None
        grey = torch.full((3, 224, 224), 128, dtype=torch.uint8)
        self._layers = dry_run(module, self._place(preprocess([grey]) if example is None else example), layout_rule)
        self._by_name = {name: info for info in self._layers for name in (info.name, *info.aliases)}
        self.sites: tuple[Site, ...] = self.expand(layers)

    def layers(self) -> list[LayerInfo]:
        """List the model's layers in execution order; those that never run come last."""
        return list(self._layers)

    def expand(self, layers: Iterable[str]) -> tuple[Site, ...]:
        """Resolve layer names and globs with site suffixes to sites of this model, each once, in the given order.

        Raises:
            UnknownLayerError: naming the nearest layers.
            SiteError: when a layer cannot serve its token policy.
        """
        sites: dict[Site, None] = {}
        for text in layers:
            asked = Site.of(self.name, text)
            for info in self._matching(asked.layer):
                site = Site(self.name, info, asked.call, asked.element, asked.head, asked.policy)
                self._info(site)
                sites[site] = None
        return tuple(sites)

    def d_in(self, site: Site) -> int:
        """Return the number of dimensions of a site's rows."""
        info = self._info(site)
        return d_in(info.layout, info.output_shape)  # type: ignore[arg-type]

    def grid(self, site: Site) -> tuple[int, int] | None:
        """Return the (rows, columns) of places in the layer's output, where known."""
        layout = self._info(site).layout
        return layout.grid if layout else None

    def capture(self, batch: Images, layers: Sequence[str], grad: bool = False) -> dict[str, Tensor]:
        """Run the model on `batch` and return each layer's output as it was when the layer made it.

        Args:
            batch: model input, [b, 3, h, w].
            layers: layer names, in any order.
            grad: keep the graph, so that gradients flow from the captured tensors to `batch`.

        Returns:
            {layer: clone of its output}. The forward pass ends after the last layer wanted.

        Raises:
            UnknownLayerError: for a name the model does not have or never runs.
        """
        targets = [_Target(name, self._runnable(name), torch.clone) for name in dict.fromkeys(layers)]
        return self._trace(batch, targets, grad)

    def rows(self, batch: Images, sites: Sequence[Site] | None = None, grad: bool = False) -> dict[str, RowMatrix]:
        """Run the model on `batch` and return each site's rows, reduced inside the trace by its token policy.

        Args:
            batch: model input, [b, 3, h, w].
            sites: sites of this model; default: `self.sites`.
            grad: keep the graph.

        Returns:
            {site: rows [b, d_in]}.
        """
        targets = []
        for site in self.sites if sites is None else sites:
            info = self._info(site)
            layout, policy = info.layout, site.policy
            targets.append(_Target(str(site), info, lambda out, lay=layout, pol=policy: to_rows(out, lay, pol)))  # type: ignore[misc]
        return self._trace(batch, targets, grad)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if not isinstance(tensor, Tensor):
                continue
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{data.dtype}:{tuple(data.shape)}:".encode())
            digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Take the wrapping off: every module's `__dict__` is as it was before. Safe to call twice."""
        with self._lock:
            if self._wrapping is not None:
                self._wrapping.remove()
            self._wrapping, self._root, self._closed = None, None, True

    def __enter__(self) -> HookedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        sites = ", ".join(str(site) for site in self.sites) or "none"
        return f"HookedModel({self.name}: {type(self.module).__name__}, {len(self._layers)} layers, sites: {sites})"

    def _trace(self, batch: Tensor, targets: Sequence[_Target], grad: bool) -> dict[str, Tensor]:
        if not targets:
            return {}
        ordered = sorted(targets, key=lambda target: target.layer.order or 0)
        parts = dict(self.module.named_modules())
        saved: dict[str, Tensor] = {}
        with self._lock, torch.set_grad_enabled(grad), evaluating(self.module):
            envoys = self._wrapped().interleaver.envoys
            # By identity: a child named `output` or `root` collides with an Envoy attribute of that name.
            wanted = [(t.key, t.layer.name, envoys[id(parts[t.layer.name])], t.reduce) for t in ordered]
            with self._root.trace(self._place(batch)) as tracer:
                for key, layer, envoy, reduce in wanted:
                    # Reduced (so copied) at once: in-place operations further on overwrite the output.
                    saved[key] = nnsight.save(reduce(the_tensor(envoy.output, layer)))
                tracer.stop()
        return {target.key: saved[target.key] for target in targets}

    def _wrapped(self) -> Any:
        if self._closed:
            raise UsaeProbeError(f"hooked model '{self.name}' is closed", hint="attach the model again")
        if self._root is None:
            self._wrapping = Wrapping(self.module)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about child names that collide; we never go by name
                self._root = nnsight.NNsight(self.module)
        return self._root

    def _place(self, batch: Tensor) -> Tensor:
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        return batch if weight is None else batch.to(device=weight.device, dtype=weight.dtype)

    def _matching(self, pattern: str) -> list[str]:
        if not any(sign in pattern for sign in "*?"):
            return [self._runnable(pattern).name]
        regex = _glob(pattern)
        usable = [info for info in self._layers if info.output_shape and info.calls == 1]
        names = [info.name for info in usable if regex.fullmatch(info.name)]
        if not names:
            raise UnknownLayerError(
                f"no layer of model '{self.name}' matches '{pattern}'", hint=self._list_hint(pattern.replace("*", "0"))
            )
        return names

    def _runnable(self, name: str) -> LayerInfo:
        info = self._by_name.get(name)
        if info is None:
            raise UnknownLayerError(f"model '{self.name}' has no layer '{name}'", hint=self._list_hint(name))
        if info.order is None:
            raise UnknownLayerError(f"layer '{name}' of model '{self.name}' never runs in a forward pass")
        if info.calls > 1:
            raise NotBuiltError(
                f"layer '{name}' of model '{self.name}' runs {info.calls} times in a forward pass; choosing one by "
                f"'{name}~0' is not built yet",
                hint="take a layer around it that runs once",
            )
        return info

    def _info(self, site: Site) -> LayerInfo:
        info = self._runnable(site.layer)
        if info.output_shape is None:
            raise NotBuiltError(
                f"layer '{site.layer}' of model '{self.name}' outputs no single tensor that begins with the batch; "
                "choosing an element is not built yet",
                hint="take a layer inside, around or after it that outputs one tensor with a row of axes per image",
            )
        if info.layout is None:
            raise NotBuiltError(
                f"layer '{site.layer}' of model '{self.name}' outputs {['b', *info.output_shape]}: no known layout",
                hint="known are [b, d], [b, tokens, d] and maps; take a layer around or after it",
            )
        require_policy(site, info.layout, info.output_shape)
        return info

    def _list_hint(self, name: str) -> str:
        close = nearest(name, self._by_name)
        return f"{close} `usae-probe layers` lists them".strip()


def _glob(pattern: str) -> re.Pattern[str]:
    pieces: Mapping[str, str] = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", pattern)))
