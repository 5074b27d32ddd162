"""Token policies: how a layer's output becomes rows."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..shapes import RowMatrix
from ..sites import Policy
from .layout import Layout


def to_rows(output: Float[Tensor, "b ..."], layout: Layout, policy: Policy) -> RowMatrix:
    """Reduce a layer's output to one row per image.

    `cls` is the first prefix token; `mean` the mean over places without prefix tokens; `pool` is `cls` where there is
    a class token, the spatial mean for maps and other tokens, and the identity for vectors. Where a model does not
    say which tokens are prefix tokens, the mean runs over all of them.

    Args:
        output: [b, d], [b, t, d], [b, d, h, w] or [b, h, w, d], as `layout` says.
        layout: what its axes mean.
        policy: `pool`, `cls` or `mean` (checked by `require_policy` before any pass).

    Returns:
        [b, d] in the output's dtype; never a view of the output.
    """
    if layout.kind == "vector":
        return output.clone()
    if layout.kind == "nchw":
        return output.mean(dim=(2, 3))
    if layout.kind == "nhwc":
        return output.mean(dim=(1, 2))
    if policy == "cls" or (policy == "pool" and layout.has_cls):
        return output[:, 0].clone()
    prefix = layout.prefix or 0
    spatial = output[:, prefix:] if prefix < output.shape[1] else output
    return spatial.mean(dim=1)
