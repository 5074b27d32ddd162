"""The triton kernel: in Triton's interpreter on CPU (a process of its own: it must be on before Triton is imported).

On a machine with CUDA the same tests also run compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.usae import Support, choose_kernel
from usae_probe.usae.kernels import SiteEncoder, TritonKernel
from usae_probe.usae.kernels.triton_kernel import TritonProducts, is_interpreted, triton_problem

from .kernel_cases import Case, assert_equals_oracle, cases, drawn, strided, to_float32

triton = pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
here = pytest.mark.skipif(not is_interpreted(), reason="in the process that interprets Triton (the last test)")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@here
@DTYPES
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_values_and_gradients(dtype: torch.dtype, data: st.DataObject) -> None:
    assert_equals_oracle(TritonKernel(), data.draw(cases(dtype, most_rows=3)))


@here
@DTYPES
@pytest.mark.parametrize(
    ("counts", "d", "n"),
    [([], 3, 5), ([1], 1, 1), ([1, 1, 1], 3, 9), ([4, 4], 3, 4), ([0, 0], 3, 4), ([3, 0, 5], 17, 5), ([19], 300, 24)],
    ids=["no row", "one place", "k=1", "k=n", "no entry", "empty row, d not a block", "several blocks"],
)
def test_corner_shapes(counts: list[int], d: int, n: int, dtype: torch.dtype) -> None:
    assert_equals_oracle(TritonKernel(), drawn(counts, d, n, dtype=dtype, repeats=len(counts) == 3))


@here
@pytest.mark.parametrize("counts", [[3] * 3, [3, 0, 6]], ids=["even", "ragged"])
def test_non_contiguous_inputs(counts: list[int]) -> None:
    case = strided(drawn(counts, 5, 8))
    assert_equals_oracle(TritonKernel(), case)
    assert_equals_oracle(TritonKernel(), to_float32(case))


@here
def test_chosen_where_it_runs() -> None:
    assert triton_problem(torch.device("cpu"), torch.float32) is None
    assert choose_kernel("triton", torch.device("cpu")).name == "triton"
    assert "not in bfloat16" in str(triton_problem(torch.device("cpu"), torch.bfloat16))


@here
def test_decode_by_hand() -> None:
    # row 0 holds latent 1 twice (2 and 3) and latent 0 once (1): x̂ = 1 · (1, 2) + (2 + 3) · (3, 4) = (16, 22)
    support, w = Support.of(torch.tensor([[1, 0, 1]]), 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    products = TritonProducts()
    assert products.rows_product(torch.tensor([2.0, 1.0, 3.0]), support, w).tolist() == [[16.0, 22.0]]
    assert products.latent_sums(torch.tensor([2.0, 1.0, 3.0]), support).tolist() == [1.0, 5.0]
    # ⟨(1, 1), w_c⟩: 7 for latent 1, 3 for latent 0
    assert products.entry_products(support, torch.ones(1, 2), w).tolist() == [7.0, 3.0, 7.0]


@pytest.mark.skipif(is_interpreted(), reason="this is the process that it starts")
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "20 passed" in done.stdout


def on_cuda(case: Case) -> Case:
    return Case(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in case))


@pytest.mark.skipif(not CUDA, reason="no CUDA device: the programs are only interpreted here")
@DTYPES
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
    from .kernel_cases import by_oracle

    for ours, expected in zip(found, by_oracle(case), strict=True):
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=1e-3, atol=1e-3)
