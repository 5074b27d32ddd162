"""Layouts: what the axes of a layer's output mean: a fact of the layer, taken from the model, not from sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..errors import SiteError
from ..sites import Site

Kind = Literal["vector", "tokens", "nchw", "nhwc"]
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True)
class Layout:
    """What the axes of one layer's output mean.

    Attributes:
        kind: `vector` [B,D], `tokens` [B,T,D], `nchw` [B,C,H,W] or `nhwc` [B,H,W,C].
        prefix: tokens before the spatial ones (cls, registers, distillation); None when the model does not say.
        has_cls: whether the first prefix token is a class token.
        grid: (rows, columns) of the spatial places, where known.
    """

    kind: Kind
    prefix: int | None = None
    has_cls: bool = False
    grid: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.kind != "tokens":
            return self.kind
        return "tokens" if self.prefix is None else f"{self.prefix}+tokens"


LayoutRule = Callable[[nn.Module, Mapping[str, tuple[int, ...]]], Mapping[str, Layout | None]]
"""(model, output shape of each layer with the batch axis left out) -> layouts the adapter is sure of; None for a layer
whose output is none of them."""


def default_layout(
    module: nn.Module, shape: tuple[int, ...], *, maps_are: Literal["nchw", "nhwc"] = "nchw"
) -> Layout | None:
    """Return the layout that follows from a module's type and the rank of its output; None when there is none.

    Args:
        module: the layer.
        shape: its output's shape without the batch axis.
        maps_are: what a four-dimensional output is where the module's type does not settle it.
    """
    if len(shape) == 1:
        return Layout("vector")
    if len(shape) == 2:
        return Layout("tokens")
    if len(shape) != 3:
        return None
    first = isinstance(module, _CHANNELS_FIRST)
    last = isinstance(module, _CHANNELS_LAST)
    kind: Kind = "nchw" if first else "nhwc" if last else maps_are
    rows, columns = shape[1:] if kind == "nchw" else shape[:2]
    return Layout(kind, prefix=0, grid=(rows, columns))


def d_in(layout: Layout, shape: tuple[int, ...]) -> int:
    """Return the size of the channel axis; `shape` is without the batch axis."""
    return shape[0] if layout.kind == "nchw" else shape[-1]


def require_policy(site: Site, layout: Layout, shape: tuple[int, ...]) -> None:
    """Check that the site's token policy means something on its layer.

    Raises:
        SiteError: `cls` without a class token, `mean` of a vector or of prefix tokens only.
    """
    site.require_built()
    if site.policy == "cls" and not (layout.kind == "tokens" and layout.has_cls):
        known = "does not say which tokens are prefix tokens" if _unknown(layout) else f"gives {layout} {list(shape)}"
        raise SiteError(f"site '{site}': @cls needs a class token, but the layer {known}", hint="use @mean or @pool")
    if site.policy == "mean" and layout.kind == "vector":
        raise SiteError(
            f"site '{site}': @mean needs places, but the layer gives a vector of {shape[0]}", hint="use @pool"
        )
    if site.policy == "mean" and layout.kind == "tokens" and layout.prefix == shape[0]:
        raise SiteError(
            f"site '{site}': @mean needs spatial tokens, but all {shape[0]} are prefix tokens", hint="use @cls"
        )


def _unknown(layout: Layout) -> bool:
    return layout.kind == "tokens" and layout.prefix is None
