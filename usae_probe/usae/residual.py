"""What is left of the rows when their reconstruction is taken away, and its size at each site, in few passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.workspace import Workspace

Loss = Literal["mse", "l1"]


class Residual(NamedTuple):
    """Residual and error of a reconstruction.

    Attributes:
        rows: x̃ − x̂, [g, b, Σ d], without a graph.
        per_site: Σ residual² / (g b d) or Σ |residual| / (g b d) of each site, [m], with its graph.
    """

    rows: Float[Tensor, "g b D"]
    per_site: Float[Tensor, " m"]


def residual(
    x: Float[Tensor, "b D"],
    product: Float[Tensor, "g b D"],
    b_dec: Float[Tensor, " D"],
    d_in: Mapping[str, int],
    *,
    loss: Loss = "mse",
    workspace: Workspace | None = None,
) -> Residual:
    """Compare rows with their reconstructions x̂ = product + b_dec.

    As a chain of plain operations this makes about ten temporaries of the size of x, each with its page faults: at 12
    sites a tenth of a training step.

    Args:
        x: normalised rows of all sites side by side; they get no gradient.
        product: z W_dec by each of g dictionaries.
        b_dec: of all sites.
        d_in: {site: dimensions} in the order of the columns.
        loss: mean squared or mean absolute error.
        workspace: where large tensors come from.
    """
    rows, per_site = _Residual.apply(x, product, b_dec, list(d_in.values()), loss, workspace or Workspace())
    return Residual(rows, per_site)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Tensor, b_dec: Tensor, widths: list[int], loss: Loss, workspace: Workspace
    ) -> tuple[Tensor, Tensor]:
        rows = workspace.empty(product.shape, product.dtype, product.device)
        torch.sub(x, product, out=rows).sub_(b_dec)
        order = 2 if loss == "mse" else 1
        # row by row first: the norm of a matrix with gaps between its rows takes ten times as long
        parts = [torch.linalg.vector_norm(part, ord=order, dim=-1) for part in torch.split(rows, widths, dim=-1)]
        ctx.sizes = torch.tensor(widths, device=x.device) * max(1, rows[..., 0].numel())
        ctx.loss, ctx.workspace, ctx.widths = loss, workspace, ctx.sizes.new_tensor(widths)
        ctx.save_for_backward(rows)
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)  # none for rows, which would be filled with zeros
        return rows, torch.stack([part.pow(order).sum() for part in parts]) / ctx.sizes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        (rows,) = ctx.saved_tensors
        share = (grad / ctx.sizes).to(rows.dtype).repeat_interleave(ctx.widths, output_size=rows.shape[-1])
        found = ctx.workspace.empty(rows.shape, rows.dtype, rows.device)
        if ctx.loss == "mse":
            torch.mul(rows, share * -2.0, out=found)
        else:
            torch.sign(rows, out=found).mul_(-share)
        wants_product, wants_b = ctx.needs_input_grad[1:3]
        return None, found if wants_product else None, found.flatten(0, 1).sum(0) if wants_b else None, None, None, None
