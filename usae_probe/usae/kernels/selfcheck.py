"""Do the kernels compute here what they should? Each against the dense one in float64, values and gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import first_line
from .base import Kernel, SiteEncoder, Support
from .choose import KERNELS, csr_problem
from .reference import ReferenceKernel
from .triton_kernel import triton_problem

TOLERANCE = 1e-4
"""Largest difference that rounding in float32 explains, as a share of the largest value."""
_ROWS, _WIDTH, _LATENTS = 48, 40, 96


class KernelCheck(NamedTuple):
    """What became of one kernel on one device.

    Attributes:
        kernel: its name.
        device: where it was tried.
        problem: why it cannot run there, or how it failed; empty where it ran.
        error: largest |difference| of values and gradients from float64, as a share of the largest value; None where it
            did not run.
        wrong: it ran, or should have run, and its numbers are not those of the oracle.
    """

    kernel: str
    device: str
    problem: str
    error: float | None
    wrong: bool


def check_kernel(name: str, device: torch.device) -> KernelCheck:
    """Compare one kernel's z_pre, x̂ and gradients with the dense kernel's in float64, on rows of equal and unequal k.

        error = max |found − expected| / max |expected|, the largest over all tensors.

    Args:
        name: `reference`, `csr` or `triton`.
        device: where to run it.
    """
    problems = {"csr": csr_problem, "triton": triton_problem}
    problem = problems[name](device, torch.float32) if name in problems else None
    if problem is not None:
        return KernelCheck(name, device.type, problem, None, wrong=False)
    try:
        of_cases = [_errors(KERNELS[name](), device, counts) for counts in ([8] * _ROWS, [3, 0, 11, 1] * (_ROWS // 4))]
        error = float(torch.cat(of_cases).max())  # NaN stays NaN
    except Exception as failure:
        reason = f"{type(failure).__name__}: {first_line(failure)}"
        return KernelCheck(name, device.type, reason, None, wrong=True)
    if not math.isfinite(error):
        return KernelCheck(name, device.type, "values or gradients that are not finite", None, wrong=True)
    return KernelCheck(name, device.type, "", error, wrong=error > TOLERANCE)


def _errors(kernel: Kernel, device: torch.device, counts: list[int]) -> Tensor:
    draw = torch.Generator().manual_seed(len(set(counts)))
    shapes = [(_ROWS, _WIDTH), (_LATENTS, _WIDTH), (_LATENTS,), (_WIDTH,), (_LATENTS, _WIDTH)]
    leaves = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    columns = torch.cat([torch.randperm(_LATENTS, generator=draw)[:count] for count in counts])
    weights = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((len(columns),), shapes[0])]
    if len(set(counts)) == 1:
        support = Support.of(columns.view(_ROWS, -1), _LATENTS)
    else:
        support = Support(columns, torch.tensor([0, *counts]).cumsum(0), _LATENTS)
    expected = _through(ReferenceKernel(), leaves, support, weights)
    there = Support(support.columns.to(device), support.pointers.to(device), _LATENTS, support.per_row)
    placed = [[part.to(device, torch.float32) for part in parts] for parts in (leaves, weights)]
    found = _through(kernel, placed[0], there, placed[1])
    pairs = zip(found, expected, strict=True)
    return torch.stack([(mine.cpu().double() - right).abs().max() / right.abs().max() for mine, right in pairs])


def _through(kernel: Kernel, leaves: list[Tensor], support: Support, weights: list[Tensor]) -> list[Tensor]:
    """Return z_pre at the support, what it decodes to, and the gradients of all five leaves."""
    x, w_enc, b_enc, b_dec, w_dec = leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    encoder = SiteEncoder(w_enc, b_enc, b_dec)
    values = kernel.at(kernel.pre(x, encoder), support, x, encoder)
    x_hat = kernel.decode(values, support, w_dec)
    total = (values * weights[0]).sum() + (x_hat * weights[1]).sum()
    return [values.detach(), x_hat.detach(), *torch.autograd.grad(total, leaves)]
