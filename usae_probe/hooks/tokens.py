"""Token policies: how a layer's output becomes rows, and how rows become an output again."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..errors import SiteError, UsageError
from ..shapes import RowMatrix
from ..sites import Policy
from .layout import Grid, Layout, n_tokens


def to_rows(
    output: Float[Tensor, "..."],
    layout: Layout,
    policy: Policy,
    *,
    head: int | None = None,
    grid: Grid | None = None,
) -> RowMatrix:
    """Reduce a layer's output to rows, image by image.

    `cls` is the first prefix token; `mean` the mean over places without prefix tokens; `pool` is `cls` where there is
    a class token, the spatial mean for maps and other tokens, and the identity for vectors; `patch` has a row per
    place in raster order, without prefix tokens; `all` a row per token as the layer has them. Where a model does not
    say which tokens are prefix tokens, the mean runs over all of them. Heads of attention are concatenated unless one
    is chosen.

    Args:
        output: [b, d], [b, t, d], [b, d, h, w], …, as `layout` says.
        layout: what its axes mean.
        policy: checked by `require_policy` before any pass.
        head: which head of attention.
        grid: for `patch`: places that the layer's own are resampled to (antialiased bilinear); default: its own.

    Returns:
        [b * rows per image, d] in the output's dtype; never a view of the output.
    """
    values = _channels_last(output, layout, head)
    if layout.kind == "vector":
        return values.clone()
    if policy == "all":
        return values.flatten(0, -2).clone()
    if policy == "patch":
        return _places(values, layout, grid).flatten(0, 1)
    if layout.kind != "tokens":
        return values.mean(dim=(1, 2))
    if _takes_cls(layout, policy):
        return values[:, 0].clone()
    return values[:, _spatial_from(layout, values.shape[1]) :].mean(dim=1)


def from_rows(
    rows: object,
    output: Float[Tensor, "..."],
    layout: Layout,
    policy: Policy,
    *,
    head: int | None = None,
) -> Float[Tensor, "..."]:
    """Put rows back into an output, the inverse of `to_rows`; what the rows do not hold stays as it is.

    A class token is replaced, a mean shifts every place by the difference of the means, rows per token or place
    replace them. Differentiable in both.

    Args:
        rows: tensor [b * rows per image, d], as `to_rows` gives them without resampling.
        output: the layer's output; not changed.
        layout, policy, head: as given to `to_rows`.

    Raises:
        UsageError: when the rows have another shape, or are no tensor.
    """
    values = _channels_last(output, layout, head)
    expected = (len(values) * _per_image(layout, values.shape[1:-1].numel(), policy), values.shape[-1])
    if not isinstance(rows, Tensor) or tuple(rows.shape) != expected:
        given = f"rows of shape {list(rows.shape)} were" if isinstance(rows, Tensor) else f"{type(rows).__name__} was"
        raise UsageError(
            f"{given} given back where {list(expected)} are expected",
            hint="the function of a splice returns as many rows as it was given",
        )
    rows = rows.to(device=values.device, dtype=values.dtype)
    return _back(_written(rows, values, layout, policy), output, layout, head)


def laid_out_like(values: Float[Tensor, "..."], output: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Copy values into the memory layout of an output of the same shape.

    The bits of what a model makes of an output can depend on its strides, and whether `view` works on it too; the copy
    is the model's own to overwrite.
    """
    reach = 0
    for stride, length in sorted(zip(output.stride(), output.shape, strict=True)):
        if length > 1 and stride <= reach:
            return values.clone()  # expanded: several places of the output are one in memory
        reach += stride * (length - 1)
    copied = torch.empty_strided(output.shape, output.stride(), dtype=values.dtype, device=values.device)
    return copied.copy_(values)


def _written(rows: Tensor, values: Tensor, layout: Layout, policy: Policy) -> Tensor:
    """Return `values` (channels last, heads merged or chosen) with the rows in their place."""
    if layout.kind == "vector" or policy == "all":
        return rows.reshape(values.shape)
    images = len(values)
    if policy == "patch":
        places = rows.reshape(images, -1, values.shape[-1])
        if layout.kind != "tokens":
            return places.reshape(values.shape)
        if layout.order is not None:
            places = places[:, torch.argsort(torch.tensor(layout.order, device=places.device))]
        return torch.cat([values[:, : layout.prefix], places], dim=1)
    if layout.kind != "tokens":
        return values + (rows - values.mean(dim=(1, 2)))[:, None, None]
    if _takes_cls(layout, policy):
        return torch.cat([rows[:, None], values[:, 1:]], dim=1)
    first = _spatial_from(layout, values.shape[1])
    shift = rows - values[:, first:].mean(dim=1)
    return torch.cat([values[:, :first], values[:, first:] + shift[:, None]], dim=1)


def rows_per_image(layout: Layout, shape: tuple[int, ...], policy: Policy, grid: Grid | None = None) -> int:
    """Return how many rows one image gives; `shape` is the output's without the batch, `grid` as in `to_rows`."""
    return _per_image(layout, n_tokens(layout, shape), policy) if grid is None or policy != "patch" else math.prod(grid)


def _per_image(layout: Layout, vectors: int, policy: Policy) -> int:
    if policy == "all":
        return vectors
    return vectors - (layout.prefix or 0) if policy == "patch" else 1


def resample(places: Float[Tensor, "b h w d"], grid: Grid) -> Float[Tensor, "b r c d"]:
    """Resample a grid of activations by an antialiased bilinear filter; the grid's edges are the picture's edges."""
    if tuple(places.shape[1:3]) == grid:
        return places
    maps = places.permute(0, 3, 1, 2).float()
    maps = functional.interpolate(maps, size=grid, mode="bilinear", antialias=True, align_corners=False)
    return maps.permute(0, 2, 3, 1).to(places.dtype)


def coarsest(grids: list[Grid]) -> Grid:
    """Return the grid with the fewest rows and the fewest columns of those given."""
    return min(rows for rows, _ in grids), min(columns for _, columns in grids)


def _channels_last(output: Tensor, layout: Layout, head: int | None) -> Tensor:
    """View the output with the batch first and one axis of channels last: [b, d], [b, t, d] or [b, h, w, d]."""
    values = output.movedim(layout.batch_axis, 0)
    if layout.kind == "nchw":
        return values.permute(0, 2, 3, 1)
    if layout.heads is None:
        return values
    if layout.heads == "first":
        values = values.movedim(1, -2)
    return values.flatten(-2) if head is None else values.select(-2, head)


def _back(values: Tensor, output: Tensor, layout: Layout, head: int | None) -> Tensor:
    """Undo `_channels_last`."""
    if layout.kind == "nchw":
        values = values.permute(0, 3, 1, 2)
    elif layout.heads is not None:
        axis = -2 if layout.heads == "last" else 1
        whole = output.movedim(layout.batch_axis, 0).movedim(axis, -2)
        if head is None:
            values = values.reshape(whole.shape)
        else:
            values = torch.cat([whole[..., :head, :], values.unsqueeze(-2), whole[..., head + 1 :, :]], dim=-2)
        values = values.movedim(-2, axis)
    return values.movedim(0, layout.batch_axis)


def _places(values: Tensor, layout: Layout, grid: Grid | None) -> Tensor:
    """Return [b, places, d] in raster order, resampled to `grid`."""
    if layout.grid is None:
        raise SiteError(f"the places of a layer with layout {layout} are not known", hint="give layout=, with its grid")
    if layout.kind == "tokens":
        values = values[:, layout.prefix :]
        if layout.order is not None:
            values = values[:, torch.tensor(layout.order, device=values.device)]
        values = values.reshape(len(values), *layout.grid, values.shape[-1])
    return resample(values, grid or layout.grid).flatten(1, 2).clone()


def _takes_cls(layout: Layout, policy: Policy) -> bool:
    return policy == "cls" or (policy == "pool" and layout.has_cls)


def _spatial_from(layout: Layout, n_tokens: int) -> int:
    prefix = layout.prefix or 0
    return prefix if prefix < n_tokens else 0
