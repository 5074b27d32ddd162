"""Kernels: how sparse codes are read off the encoder product and decoded.

One interface, several implementations. For a support S (which latents are active in which row) they compute

    z_pre = (x − b_dec) W_encᵀ + b_enc,   at = z_pre[S],   x_hat = z W_dec,

where z is zero outside S. `reference` is dense and plain autograd, the oracle; the others never let anything dense of
size `[rows, n_latents]` outlive the encoder product.
"""

from .base import Codes, Kernel, PreActivations, SiteEncoder, Support, to_dense
from .choose import choose_kernel
from .csr import CsrKernel
from .reference import ReferenceKernel
from .selection import select_topk

__all__ = [
    "Codes",
    "CsrKernel",
    "Kernel",
    "PreActivations",
    "ReferenceKernel",
    "SiteEncoder",
    "Support",
    "choose_kernel",
    "select_topk",
    "to_dense",
]
