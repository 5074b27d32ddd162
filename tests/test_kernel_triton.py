"""The triton kernel: in Triton's interpreter on CPU, and compiled on a machine with CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from usae_probe.usae import Support, choose_kernel
from usae_probe.usae.kernels import SiteEncoder

from .kernel_cases import by_oracle, drawn

triton = pytest.importorskip("triton", reason="Triton is not installed")


def test_in_the_interpreter() -> None:
    """In a process of its own: the interpreter must be on before Triton is imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("triton_interpreted.py")),
        ],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "20 passed" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the programs are only interpreted here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_on_cuda(dtype: torch.dtype) -> None:
    kernel = choose_kernel("triton", torch.device("cuda"), dtype)
    assert kernel.name == "triton"
    case = drawn([3, 0, 60, 9] * 20, 300, 64, dtype=dtype, repeats=True)
    x, *encoder, w_dec = (leaf.cuda().requires_grad_() for leaf in case.leaves)
    support = Support(case.support.columns.cuda(), case.support.pointers.cuda(), 64)
    site = SiteEncoder(*encoder)
    values = torch.relu(kernel.at(kernel.pre(x, site), support, x, site))
    x_hat = kernel.decode(values, support, w_dec)
    total = (values * case.grad_values.cuda()).sum() + (x_hat * case.grad_x_hat.cuda()).sum()
    found = [values, x_hat, *torch.autograd.grad(total, [x, *encoder, w_dec])]
    for ours, expected in zip(found, by_oracle(case), strict=True):
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=1e-3, atol=1e-3)
