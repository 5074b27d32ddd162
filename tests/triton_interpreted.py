"""The triton kernel in Triton's interpreter; `test_kernel_triton.py` runs these in a process of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.usae import Support, choose_kernel
from usae_probe.usae.kernels import TritonKernel
from usae_probe.usae.kernels.triton_kernel import TritonProducts, triton_problem

from .kernel_cases import assert_equals_oracle, cases, drawn, strided, to_float32

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_values_and_gradients(dtype: torch.dtype, data: st.DataObject) -> None:
    assert_equals_oracle(TritonKernel(), data.draw(cases(dtype, most_rows=3)))


@DTYPES
@pytest.mark.parametrize(
    ("counts", "d", "n"),
    [([], 3, 5), ([1], 1, 1), ([1, 1, 1], 3, 9), ([4, 4], 3, 4), ([0, 0], 3, 4), ([3, 0, 5], 17, 5), ([19], 300, 24)],
    ids=["no row", "one place", "k=1", "k=n", "no entry", "empty row, d not a block", "several blocks"],
)
def test_corner_shapes(counts: list[int], d: int, n: int, dtype: torch.dtype) -> None:
    assert_equals_oracle(TritonKernel(), drawn(counts, d, n, dtype=dtype, repeats=len(counts) == 3))


@pytest.mark.parametrize("counts", [[3] * 3, [3, 0, 6]], ids=["even", "ragged"])
def test_non_contiguous_inputs(counts: list[int]) -> None:
    case = strided(drawn(counts, 5, 8))
    assert_equals_oracle(TritonKernel(), case)
    assert_equals_oracle(TritonKernel(), to_float32(case))


def test_chosen_where_it_runs() -> None:
    assert triton_problem(torch.device("cpu"), torch.float32) is None
    assert choose_kernel("triton", torch.device("cpu")).name == "triton"
    assert "not in bfloat16" in str(triton_problem(torch.device("cpu"), torch.bfloat16))


def test_decode_by_hand() -> None:
    # row 0 holds latent 1 twice (2 and 3) and latent 0 once (1): x̂ = 1 · (1, 2) + (2 + 3) · (3, 4) = (16, 22)
    support, w = Support.of(torch.tensor([[1, 0, 1]]), 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    products = TritonProducts()
    assert products.rows_product(torch.tensor([2.0, 1.0, 3.0]), support, w).tolist() == [[16.0, 22.0]]
    assert products.latent_sums(torch.tensor([2.0, 1.0, 3.0]), support).tolist() == [1.0, 5.0]
    # ⟨(1, 1), w_c⟩: 7 for latent 1, 3 for latent 0
    assert products.entry_products(support, torch.ones(1, 2), w).tolist() == [7.0, 3.0, 7.0]
