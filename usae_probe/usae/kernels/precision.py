"""The encoder product, in float32 or with bfloat16 factors where the hardware multiplies those faster."""

from __future__ import annotations

import torch
from torch import Tensor

from ...shapes import RowMatrix
from .base import PreActivations, Precision, SiteEncoder
from .workspace import Workspace

_LATENTS = 1024  # multiplied together: the cast weights and their product stay in the cache


def bf16_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why bfloat16 factors are not to be had for such parameters, or None.

    Of processors those with AMX have them. AVX-512 BF16 alone multiplies no faster than float32 units do, and casting
    the weights comes on top: steps took 1.2 to 1.4 times as long.
    """
    if dtype != torch.float32:
        return f"parameters are {str(dtype).removeprefix('torch.')}, bf16 is for float32 ones"
    if device.type == "cuda":
        built_in = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return None if built_in else "this CUDA device has no bfloat16 units"
    if device.type != "cpu":
        return f"it is for cpu and cuda, not {device.type}"
    amx: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return None if amx else "this processor has no matrix units for bfloat16 (AMX), and fp32 is faster without"


def encoder_product(x: RowMatrix, encoder: SiteEncoder, precision: Precision, workspace: Workspace) -> PreActivations:
    """Return z_pre = (x − b_dec) W_encᵀ + b_enc, without a graph, in the parameters' dtype."""
    w_enc, b_enc, b_dec = (part.detach() for part in encoder)
    centred = x.detach() - b_dec
    z_pre = workspace.empty((len(x), len(w_enc)), torch.promote_types(x.dtype, w_enc.dtype), w_enc.device)
    if precision == "fp32":
        return torch.addmm(b_enc, centred, w_enc.T, out=z_pre)
    return _bf16_product(centred, w_enc, b_enc, z_pre)


def _bf16_product(centred: Tensor, w_enc: Tensor, b_enc: Tensor, z_pre: Tensor) -> Tensor:
    factor = centred.bfloat16()
    for start in range(0, len(w_enc), _LATENTS):
        latents = slice(start, start + _LATENTS)
        product = torch.mm(factor, w_enc[latents].bfloat16().T)
        torch.add(product, b_enc[latents], out=z_pre[:, latents])
    return z_pre
