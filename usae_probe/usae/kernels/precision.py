"""The encoder product, in float32 or with bfloat16 factors where the hardware multiplies those."""

from __future__ import annotations

import torch
from torch import Tensor

from ...shapes import RowMatrix
from .base import PreActivations, Precision, SiteEncoder
from .workspace import Workspace

_LATENTS = 1024  # multiplied together: the cast weights and their product stay in the cache


def bf16_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why bfloat16 factors are not to be had for such parameters, or None."""
    if dtype != torch.float32:
        return f"parameters are {str(dtype).removeprefix('torch.')}, bf16 is for float32 ones"
    if device.type == "cuda":
        built_in = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return None if built_in else "this CUDA device has no bfloat16 units"
    if device.type != "cpu":
        return f"it is for cpu and cuda, not {device.type}"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))
    return None if found else "this processor has no bfloat16 instructions (AVX-512 BF16 or AMX)"


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
