"""Kernels: how sparse codes are read off the encoder product and decoded.

One interface, several implementations. For a support S (which latents are active in which row) they compute

    z_pre = (x − b_dec) W_encᵀ + b_enc,   at = z_pre[S],   x_hat = z W_dec,

where z is zero outside S. `reference` is dense and plain autograd, the oracle; `csr` (CPU) and `triton` (CUDA) are
sparse: three products with z, under the same autograd functions. They never let anything dense of size
`[rows, n_latents]` outlive the encoder product (`csr` makes z dense for the moment where it is not sparse at all).
"""

from .base import Codes, Kernel, PreActivations, Precision, SiteEncoder, Support, to_dense
from .choose import KERNELS, choose_kernel
from .csr import CsrKernel
from .reference import ReferenceKernel
from .selection import select_batch_topk, select_topk
from .selfcheck import KernelCheck, check_kernel
from .triton_kernel import TritonKernel

__all__ = [
    "KERNELS",
    "Codes",
    "CsrKernel",
    "Kernel",
    "KernelCheck",
    "PreActivations",
    "Precision",
    "ReferenceKernel",
    "SiteEncoder",
    "Support",
    "TritonKernel",
    "check_kernel",
    "choose_kernel",
    "select_batch_topk",
    "select_topk",
    "to_dense",
]
