"""Kernels against float64 autograd written entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from usae_probe.usae import Codes, Support
from usae_probe.usae.kernels import CsrKernel, Kernel, ReferenceKernel, SiteEncoder, to_dense
from usae_probe.usae.kernels.csr import CsrProducts

from . import oracles
from .kernel_cases import Case, assert_equals_oracle, by_kernel, by_oracle, cases, drawn, strided, through, to_float32

NEVER, ALWAYS = 1.0, -1.0  # share of entries from which products are dense
KERNELS = {
    "reference": ReferenceKernel(),
    "csr": CsrKernel(),
    "csr-sparse": CsrKernel(dense_share=NEVER),
    "csr-dense": CsrKernel(dense_share=ALWAYS),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_values_and_gradients(kernel: Kernel, dtype: torch.dtype, data: st.DataObject) -> None:
    assert_equals_oracle(kernel, data.draw(cases(dtype)))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("counts", "n"),
    [([], 5), ([1], 1), ([1, 1, 1], 9), ([6, 6], 6), ([0, 0, 0], 4), ([3, 0, 5, 0], 5), ([0, 1], 3)],
    ids=["no row", "one place", "k=1", "k=n", "no entry", "empty rows", "first row empty"],
)
@pytest.mark.parametrize("repeats", [False, True], ids=["distinct", "repeats"])
def test_corner_shapes(kernel: Kernel, dtype: torch.dtype, counts: list[int], n: int, repeats: bool) -> None:
    assert_equals_oracle(kernel, drawn(counts, 3, n, dtype=dtype, repeats=repeats))


@every_kernel
class TestSpecialInputs:
    def test_all_z_pre_negative(self, kernel: Kernel) -> None:
        case = drawn([3] * 5, 4, 8)
        case = case._replace(bias=torch.full_like(case.bias, -100.0))
        values, x_hat, *grads = by_kernel(kernel, case)
        assert not values.any()
        assert not x_hat.any()
        assert not any(grad.any() for grad in grads)  # relu lets nothing back, and W_dec sees z = 0
        assert_equals_oracle(kernel, case)

    @pytest.mark.parametrize("counts", [[3] * 6, [3, 0, 8, 1, 2, 3]], ids=["even", "ragged"])
    def test_non_contiguous_inputs(self, kernel: Kernel, counts: list[int]) -> None:
        case = strided(drawn(counts, 5, 8))
        assert_equals_oracle(kernel, case)
        assert_equals_oracle(kernel, to_float32(case))

    def test_decode_alone_with_zero_and_negative_values(self, kernel: Kernel) -> None:
        case = drawn([3] * 5, 4, 8)
        values = case.grad_values * torch.tensor([0.0, 1.0, -1.0]).repeat(5)
        mine, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
        found = kernel.decode(mine, case.support, case.w_dec)
        expected = oracles.decode(theirs.view(5, 3), case.columns.view(5, 3), case.w_dec)
        torch.testing.assert_close(found, expected)
        grads = [
            torch.autograd.grad((out * case.grad_x_hat).sum(), leaf)
            for out, leaf in ((found, mine), (expected, theirs))
        ]
        torch.testing.assert_close(*grads)
        assert grads[0][0].view(5, 3)[:, 0].any()  # a stored zero still has a gradient

    def test_entries_of_one_latent_in_one_row_add_up(self, kernel: Kernel) -> None:
        # row 0 holds latent 1 twice (2 and 3) and latent 0 once (1): x̂ = 1 · (1, 2) + (2 + 3) · (3, 4) = (16, 22)
        support = Support.of(torch.tensor([[1, 0, 1]]), 2)
        values = torch.tensor([2.0, 1.0, 3.0], requires_grad=True)
        w_dec = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        x_hat = kernel.decode(values, support, w_dec)
        assert x_hat.tolist() == [[16.0, 22.0]]
        x_hat.sum().backward()
        assert values.grad is not None
        assert values.grad.tolist() == [7.0, 3.0, 7.0]  # the sum of the latent's decoder row, for each of its entries
        assert w_dec.grad is not None
        assert w_dec.grad.tolist() == [[1.0, 1.0], [5.0, 5.0]]  # z summed over a latent's entries: 1 and 2 + 3

    def test_padded_codes_decode_as_the_ragged_ones(self, kernel: Kernel) -> None:
        case = drawn([3, 0, 5, 1], 4, 8)
        codes = case.support.codes(case.grad_values)
        assert codes.indices.shape == (4, 5)
        padded = kernel.decode(codes.values.reshape(-1), Support.of(codes.indices, 8), case.w_dec)
        torch.testing.assert_close(padded, kernel.decode(case.grad_values, case.support, case.w_dec))

    def test_only_what_asks_for_gradients_gets_them(self, kernel: Kernel) -> None:
        case = drawn([3] * 5, 4, 8)
        for wants in range(5):
            leaves = [leaf.clone().requires_grad_(i == wants) for i, leaf in enumerate(case.leaves)]
            _, x_hat = through(kernel, case, leaves)
            (x_hat * case.grad_x_hat).sum().backward()
            expected = by_oracle(case._replace(grad_values=torch.zeros_like(case.grad_values)))[2 + wants]
            torch.testing.assert_close(leaves[wants].grad, expected)

    def test_gradcheck(self, kernel: Kernel) -> None:
        case = drawn([2, 0, 5, 1], 3, 7, seed=1, repeats=True)
        leaves = [leaf.requires_grad_() for leaf in case.leaves]
        assert torch.autograd.gradcheck(lambda *leaves: through(kernel, case, list(leaves))[1], leaves)


@pytest.mark.parametrize(
    ("b", "d", "n", "k"),
    [(64, 300, 40, 8), (48, 260, 9000, 4), (512, 33, 64, 3), (3, 1, 3000, 900)],
    ids=["strips of W", "many latents", "strips of x", "one column"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_csr_products_at_sizes_that_are_cut_up(b: int, d: int, n: int, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(b, d, generator=g, dtype=dtype), torch.randn(n, d, generator=g, dtype=dtype)
    support = Support.of(torch.rand(b, n, generator=g).topk(k).indices, n)
    values = torch.randn(b * k, generator=g, dtype=dtype)
    z = to_dense(support.codes(values), n).double()
    products = CsrProducts(dense_share=NEVER)
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-10}[dtype]
    for found, expected in (
        (products.rows_product(values, support, w), z @ w.double()),
        (products.columns_product(values, support, x), z.T @ x.double()),
        (
            products.entry_products(support, x, w),
            (x.double() @ w.double().T).gather(1, support.columns.view(b, k)).flatten(),
        ),
        (products.latent_sums(values, support), z.sum(0)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


class _Sizes(TorchDispatchMode):
    """Remembers the largest dense tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.numel())
        return out


@contextmanager
def largest_saved() -> Iterator[list[int]]:
    saved = [0]

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def sizes(kernel: Kernel, case: Case) -> tuple[int, int]:
    """Numbers of elements: the largest dense tensor made besides z_pre, and the largest saved for backward."""
    x, *encoder, w_dec = (leaf.detach().requires_grad_() for leaf in case.leaves)
    site, support = SiteEncoder(*encoder), case.support
    z_pre = kernel.pre(x, site)
    with _Sizes() as made, largest_saved() as saved:
        x_hat = kernel.decode(torch.relu(kernel.at(z_pre, support, x, site)), support, w_dec)
        (x_hat * case.grad_x_hat).sum().backward()
    return made.largest, max(saved)


@pytest.mark.parametrize("counts", [[4] * 128, [0, 8, 3, 5] * 32], ids=["even", "ragged"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_csr_makes_and_keeps_no_dense_code(counts: list[int], precision: Any) -> None:
    b, d, n = 128, 6, 512
    case = drawn(counts, d, n, dtype=torch.float32)
    made, saved = sizes(CsrKernel(precision), case)
    assert saved <= n * d
    assert made <= n * d < b * n
    made, saved = sizes(ReferenceKernel(), case)  # the measuring stick itself works
    assert made == saved == b * n
    made, saved = sizes(CsrKernel(dense_share=ALWAYS), case)  # for the moment only: nothing dense is kept
    assert made == b * n > saved


def test_csr_z_pre_has_no_graph() -> None:
    case = drawn([1] * 3, 2, 5)
    z_pre = CsrKernel().pre(case.x, SiteEncoder(case.w_enc.requires_grad_(), case.bias, case.b_dec))
    assert not z_pre.requires_grad
    torch.testing.assert_close(z_pre, (case.x - case.b_dec) @ case.w_enc.T + case.bias)


def test_the_support_is_shared_and_transposed_once() -> None:
    # rows {2, 0} and {1, 2}: latent 0 has row 0, latent 1 row 1, latent 2 rows 0 and 1, latent 3 none
    support = Support.of(torch.tensor([[2, 0], [1, 2]]), 4)
    pointers, rows, order = support.transposed
    assert pointers.tolist() == [0, 1, 2, 4, 4]
    assert rows.tolist() == [0, 1, 0, 1]
    assert order.tolist() == [1, 2, 0, 3]
    assert support.transposed is support.transposed


def test_to_dense() -> None:
    codes = Codes(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[2, 0], [0, 1]]))
    assert to_dense(codes, 3).tolist() == [[0.0, 0.0, 1.0], [2.0, 3.0, 0.0]]
    assert (to_dense(codes, 3).double().numpy() == oracles.spread(codes, 3)).all()
