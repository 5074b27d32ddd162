"""Which kernel runs."""

from __future__ import annotations

import torch

from ...errors import ConfigError
from .base import Kernel
from .csr import CsrKernel
from .reference import ReferenceKernel


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Kernel:
    """Return a kernel by name; `auto` takes `csr` on CPU in float32 and `reference` elsewhere.

    Raises:
        ConfigError: for an unknown name.
    """
    if name == "auto":
        name = "csr" if device.type == "cpu" and dtype == torch.float32 else "reference"
    kernels: dict[str, type[ReferenceKernel] | type[CsrKernel]] = {"reference": ReferenceKernel, "csr": CsrKernel}
    if name not in kernels:
        raise ConfigError(f"unknown kernel '{name}', expected auto, {' or '.join(kernels)}")
    return kernels[name]()
