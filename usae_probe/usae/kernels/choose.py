"""Which kernel runs: the one asked for, or the best for the device; one warning where it cannot run."""

from __future__ import annotations

import functools
import warnings

import torch

from ...errors import ConfigError, UsaeProbeWarning
from .base import Kernel, Precision
from .csr import CsrKernel
from .precision import bf16_problem
from .reference import ReferenceKernel
from .triton_kernel import TritonKernel, triton_problem

KERNELS: dict[str, type[ReferenceKernel] | type[CsrKernel] | type[TritonKernel]] = {
    "reference": ReferenceKernel,
    "csr": CsrKernel,
    "triton": TritonKernel,
}


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, precision: str = "fp32"
) -> Kernel:
    """Return a new kernel, by name or the best for device and dtype; its `name` and `reason` say which and why.

    `auto` takes `triton` on CUDA, `csr` on CPU in float32, and `reference` elsewhere; `csr` looks at the density of
    each support by itself and multiplies densely where over 15 % of z are entries. A kernel that cannot run is replaced
    by the next one (triton → csr on CPU, else reference), and bf16 that cannot be had by fp32, with one warning each.

    Args:
        name: `auto`, `reference`, `csr` or `triton`.
        device: where the parameters are.
        dtype: of the parameters.
        precision: of the factors of the encoder product, `fp32` or `bf16`.

    Raises:
        ConfigError: for an unknown name or precision.
    """
    if name != "auto" and name not in KERNELS:
        raise ConfigError(f"unknown kernel '{name}', expected auto, {', '.join(KERNELS)}")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"unknown precision '{precision}', expected fp32 or bf16")
    found, reason = _named(name, device, dtype)
    if found == "reference":
        _settle_precision(precision, "the reference kernel has none")
        return ReferenceKernel(reason)
    settled = _settle_precision(precision, bf16_problem(device, dtype))
    return CsrKernel(settled, reason) if found == "csr" else TritonKernel(settled, reason)


def _named(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the name of the kernel that runs, and why."""
    here = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    if name in ("reference", "csr"):
        problem = csr_problem(device, dtype) if name == "csr" else None
        if problem is None:
            return name, "asked for"
        return _next(name, "reference", problem)
    if name == "auto" and device.type != "cuda":
        return ("reference" if csr_problem(device, dtype) or dtype != torch.float32 else "csr"), f"auto: {here}"
    problem = triton_problem(device, dtype)
    if problem is None:
        return "triton", "asked for" if name == "triton" else f"auto: {here}"
    return _next("triton", "reference" if csr_problem(device, dtype) else "csr", problem)


def csr_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the `csr` kernel cannot run there, or None."""
    if device.type != "cpu":
        return f"it runs on CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 or float64, not in {str(dtype).removeprefix('torch.')}"
    return None


def _next(name: str, other: str, problem: str) -> tuple[str, str]:
    _warn(f"the {name} kernel cannot run: {problem}; {other} takes its place")
    return other, f"{name} cannot run: {problem}"


def _settle_precision(precision: str, problem: str | None) -> Precision:
    if precision == "fp32":
        return "fp32"
    if problem is None:
        return "bf16"
    _warn(f"precision = 'bf16' is not to be had: {problem}; the encoder product is made in fp32")
    return "fp32"


@functools.cache
def _warn(message: str) -> None:  # cached: one warning however many kernels are made
    warnings.warn(message, UsaeProbeWarning, stacklevel=4)
