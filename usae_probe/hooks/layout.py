"""Layouts: what the axes of a layer's output mean: a fact of the layer, found by tracing the model's axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..errors import ConfigError, SiteError
from ..sites import Site

Kind = Literal["vector", "tokens", "nchw", "nhwc"]
Grid = tuple[int, int]
"""(rows, columns) of places."""
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
_SPELLED = re.compile(
    r"(?P<first>heads\.)?"
    r"(?P<body>vector|nchw|nhwc|(?P<cls>cls\+)?(?:(?P<more>\d+)\+)?(?:(?P<tokens>tokens)|(?P<rows>\d+)x(?P<columns>\d+)))"
    r"(?P<last>\.heads)?(?:, batch axis (?P<batch>[12]))?"
)


@dataclass(frozen=True)
class Layout:
    """What the axes of one layer's output mean.

    Attributes:
        kind: `vector` [B,D], `tokens` [B,T,D], `nchw` [B,C,H,W] or `nhwc` [B,H,W,C].
        prefix: tokens before the spatial ones (cls, registers, distillation); None when the model does not say.
        has_cls: whether the first prefix token is a class token.
        grid: (rows, columns) of the spatial places, where known.
        heads: where an axis of attention heads stands: `first` [B,heads,T,D], `last` [B,T,heads,D]; None without one.
        order: for spatial tokens that are not in raster order: the token of each place, row by row; else None.
        batch_axis: where the batch stands; the axes above are those of the output with the batch moved to the front.
    """

    kind: Kind
    prefix: int | None = None
    has_cls: bool = False
    grid: Grid | None = None
    heads: Literal["first", "last"] | None = None
    order: tuple[int, ...] | None = None
    batch_axis: int = 0

    def __str__(self) -> str:
        spelled: str = self.kind
        if self.kind == "tokens" and self.prefix is not None:
            more = self.prefix - self.has_cls
            spelled = f"{'cls+' if self.has_cls else ''}{f'{more}+' if more or not self.has_cls else ''}tokens"
        spelled = f"heads.{spelled}" if self.heads == "first" else spelled
        spelled = f"{spelled}.heads" if self.heads == "last" else spelled
        return f"{spelled}, batch axis {self.batch_axis}" if self.batch_axis else spelled

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read a layout as `str` spells it, or with the grid in the place of `tokens`: `cls+4+16x16`.

        Raises:
            ConfigError: when `text` is none.

        >>> Layout.parse("cls+4+tokens") == Layout("tokens", prefix=5, has_cls=True)
        True
        >>> Layout.parse("14x14.heads").grid
        (14, 14)
        """
        match = _SPELLED.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                f"'{text}' is no layout",
                hint="vector, nchw, nhwc, tokens (prefix tokens unknown), 0+tokens, 2+tokens, cls+tokens, "
                "cls+4+tokens, cls+14x14 (with its grid); heads.… or ….heads where heads of attention have an axis",
            )
        body = match["body"]
        kind: Kind = body if body in ("vector", "nchw", "nhwc") else "tokens"  # type: ignore[assignment]
        grid = (int(match["rows"]), int(match["columns"])) if match["rows"] else None
        stated = bool(match["cls"] or match["more"] or grid)
        prefix = int(match["more"] or 0) + bool(match["cls"]) if kind == "tokens" and stated else None
        return cls(
            kind,
            prefix=0 if kind in ("nchw", "nhwc") else prefix,
            has_cls=bool(match["cls"]),
            grid=grid,
            heads="first" if match["first"] else "last" if match["last"] else None,
            batch_axis=int(match["batch"] or 0),
        )


LayoutRule = Callable[[nn.Module, Mapping[str, tuple[int, ...]]], Mapping[str, Layout | None]]
"""(model, output shape of each layer with the batch axis left out) -> layouts the adapter is sure of; None for a layer
whose output is none of them."""


def default_layout(module: nn.Module, shape: tuple[int, ...]) -> Layout | None:
    """Return the layout that follows from a module's type and the rank of its output; None when there is none.

    This is for outputs that axis tracing lost, see `usae_probe.hooks.axes`: which tokens are prefix tokens is then
    unknown, and a map's layout is only known of layers whose type settles it.

    Args:
        module: the layer.
        shape: its output's shape without the batch axis.
    """
    if len(shape) == 1:
        return Layout("vector")
    if len(shape) == 2:
        return Layout("tokens")
    if len(shape) == 3 and isinstance(module, _CHANNELS_FIRST):
        return Layout("nchw", prefix=0, grid=(shape[1], shape[2]))
    if len(shape) == 3 and isinstance(module, _CHANNELS_LAST):
        return Layout("nhwc", prefix=0, grid=(shape[0], shape[1]))
    return None


def token_axis(layout: Layout) -> int:
    """Return the axis of a tokens layout's tokens, with the batch in front."""
    return 2 if layout.heads == "first" else 1


def d_in(layout: Layout, shape: tuple[int, ...], head: int | None = None) -> int:
    """Return the length of a row: the channel axis, times the heads unless one is chosen; `shape` without the batch."""
    width = shape[0] if layout.kind == "nchw" else shape[-1]
    return width if layout.heads is None or head is not None else width * n_heads(layout, shape)


def n_heads(layout: Layout, shape: tuple[int, ...]) -> int:
    """Return the length of the axis of heads; 0 without one. `shape` is without the batch."""
    return {None: 0, "first": shape[0], "last": shape[-2] if len(shape) > 1 else 0}[layout.heads]


def n_tokens(layout: Layout, shape: tuple[int, ...]) -> int:
    """Return how many tokens or places an output has: 1 for vectors. `shape` is without the batch."""
    if layout.kind == "vector":
        return 1
    if layout.kind == "tokens":
        return shape[token_axis(layout) - 1]
    return shape[1] * shape[2] if layout.kind == "nchw" else shape[0] * shape[1]


def require_head(site: Site, layout: Layout | None, shape: tuple[int, ...] | None) -> None:
    """Check that the layer has the head of attention that a site names.

    Raises:
        SiteError: when it has no heads, or fewer.
    """
    heads = n_heads(layout, shape) if layout is not None and shape is not None else 0
    if site.head is not None and site.head >= heads:
        has = f"has {heads} heads, numbered 0 to {heads - 1}" if heads else "has no axis of attention heads"
        raise SiteError(f"site '{site}': head {site.head} of a layer that {has}")


def require_policy(site: Site, layout: Layout, shape: tuple[int, ...]) -> None:
    """Check that the site's token policy means something on its layer.

    Raises:
        SiteError: `cls` without a class token, `mean` of a vector or of prefix tokens only, `patch` without places.
    """
    unknown = layout.kind == "tokens" and layout.prefix is None
    gives = "does not say which tokens are prefix tokens" if unknown else f"gives {layout} {list(shape)}"
    if site.policy == "cls" and not (layout.kind == "tokens" and layout.has_cls):
        raise SiteError(f"site '{site}': @cls needs a class token, but the layer {gives}", hint="use @mean or @pool")
    if site.policy == "mean" and layout.kind == "vector":
        raise SiteError(
            f"site '{site}': @mean needs places, but the layer gives a vector of {shape[-1]}", hint="use @pool"
        )
    only_prefix = layout.kind == "tokens" and layout.prefix == n_tokens(layout, shape)
    if site.policy in ("mean", "patch") and only_prefix:
        raise SiteError(
            f"site '{site}': @{site.policy} needs spatial tokens, but all {layout.prefix} are prefix tokens",
            hint="use @cls" if layout.has_cls else "use @pool",
        )
    if site.policy == "patch" and (unknown or layout.grid is None):
        raise SiteError(
            f"site '{site}': @patch needs a grid of places, but the layer {gives}",
            hint="use @pool" if layout.kind == "vector" else "use @mean, or state it: layout={'…': 'cls+14x14'}",
        )
