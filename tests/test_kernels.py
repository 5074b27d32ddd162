"""Kernels against float64 autograd written entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from usae_probe.errors import ConfigError
from usae_probe.usae import Codes, Support, choose_kernel, select_topk
from usae_probe.usae.kernels import CsrKernel, Kernel, ReferenceKernel, SiteEncoder, to_dense
from usae_probe.usae.kernels.csr import matrix, matrix_t

from . import oracles

KERNELS = [ReferenceKernel(), CsrKernel()]
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


class Case(NamedTuple):
    x: Tensor
    w_enc: Tensor
    bias: Tensor
    b_dec: Tensor
    w_dec: Tensor
    indices: Tensor
    grad_values: Tensor
    grad_x_hat: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.w_enc, self.bias, self.b_dec, self.w_dec]


def drawn(b: int, d: int, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(b)]) if b else torch.zeros(0, k).long()
    return Case(normal(b, d), normal(n, d), normal(n), normal(d), normal(n, d), indices, normal(b * k), normal(b, d))


def gradients(outputs: list[Tensor], weights: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(total, leaves))


def through(kernel: Kernel, indices: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """relu(z_pre) at the support, and what it decodes to."""
    *encoder, w_dec = parameters
    site, support = SiteEncoder(*encoder), Support.of(indices, len(w_dec))
    values = torch.relu(kernel.at(kernel.pre(x, site), support, x, site))
    return values, kernel.decode(values, support, w_dec)


def by_kernel(kernel: Kernel, case: Case) -> list[Tensor]:
    """Values, x_hat and the gradients of x, w_enc, b_enc, b_dec and w_dec."""
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
    values, x_hat = through(kernel, case.indices, *leaves)
    return [values, x_hat, *gradients([values, x_hat], [case.grad_values, case.grad_x_hat], leaves)]


def by_oracle(case: Case) -> list[Tensor]:
    leaves = [leaf.detach().double().clone().requires_grad_() for leaf in case.leaves]
    x, w_enc, bias, b_dec, w_dec = leaves
    values = oracles.at(x - b_dec, w_enc, bias, case.indices).flatten()
    x_hat = oracles.decode(values.view_as(case.indices), case.indices, w_dec)
    weights = [case.grad_values.double(), case.grad_x_hat.double()]
    # with no row nothing reaches the weights; the products' gradient is zero there
    reached = torch.autograd.grad(
        sum((a * w).sum() for a, w in zip([values, x_hat], weights, strict=True)), leaves, allow_unused=True
    )
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    return [values, x_hat, *(zero if g is None else g for g, zero in zip(reached, zeros, strict=True))]


def assert_equals_oracle(kernel: Kernel, case: Case) -> None:
    for found, expected in zip(by_kernel(kernel, case), by_oracle(case), strict=True):
        assert found.dtype == case.x.dtype
        torch.testing.assert_close(found.double(), expected, **TOLERANCE[case.x.dtype])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(deadline=None, max_examples=40)
@given(b=st.integers(0, 7), d=st.integers(1, 6), n=st.integers(1, 12), data=st.data(), seed=st.integers(0, 2**20))
@example(b=1, d=3, n=9, data=None, seed=0)
@example(b=4, d=3, n=9, data=9, seed=0)
@example(b=0, d=3, n=9, data=2, seed=0)
@example(b=1, d=1, n=1, data=1, seed=0)
def test_values_and_gradients(kernel: Kernel, dtype: torch.dtype, b: int, d: int, n: int, data: Any, seed: int) -> None:
    k = data.draw(st.integers(1, n)) if isinstance(data, st.DataObject) else data or 1
    assert_equals_oracle(kernel, drawn(b, d, n, k, seed, dtype))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
class TestSpecialInputs:
    def test_all_z_pre_negative(self, kernel: Kernel) -> None:
        case = drawn(5, 4, 8, 3)
        case = case._replace(bias=torch.full_like(case.bias, -100.0))
        values, x_hat, *grads = by_kernel(kernel, case)
        assert not values.any()
        assert not x_hat.any()
        assert not any(grad.any() for grad in grads)  # relu lets nothing back, and W_dec sees z = 0
        assert_equals_oracle(kernel, case)

    def test_non_contiguous_inputs(self, kernel: Kernel) -> None:
        case = drawn(6, 5, 8, 3)
        strided = case._replace(
            x=torch.stack([case.x, case.x], dim=2)[:, :, 1],
            w_enc=case.w_enc.T.contiguous().T,
            w_dec=torch.cat([case.w_dec, case.w_dec], dim=1)[:, 5:],
            bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
            indices=case.indices.T.contiguous().T,
            b_dec=torch.stack([case.b_dec, case.b_dec], dim=1)[:, 0],
            grad_values=torch.stack([case.grad_values, case.grad_values], dim=1)[:, 0],
            grad_x_hat=case.grad_x_hat[:, :1].expand(-1, 5),  # stride 0, as sum() gives
        )
        assert not any(part.is_contiguous() for part in strided)
        assert_equals_oracle(kernel, strided)
        assert_equals_oracle(kernel, Case(*(p.float() if p.is_floating_point() else p for p in strided)))

    def test_decode_alone_with_zero_and_negative_values(self, kernel: Kernel) -> None:
        case = drawn(5, 4, 8, 3)
        values = case.grad_values * torch.tensor([0.0, 1.0, -1.0]).repeat(5)
        mine, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
        found = kernel.decode(mine, Support.of(case.indices, 8), case.w_dec)
        expected = oracles.decode(theirs.view(5, 3), case.indices, case.w_dec)
        torch.testing.assert_close(found, expected)
        grads = [
            torch.autograd.grad((out * case.grad_x_hat).sum(), leaf)
            for out, leaf in ((found, mine), (expected, theirs))
        ]
        torch.testing.assert_close(*grads)
        assert grads[0][0].view(5, 3)[:, 0].any()  # a stored zero still has a gradient

    def test_only_what_asks_for_gradients_gets_them(self, kernel: Kernel) -> None:
        case = drawn(5, 4, 8, 3)
        for wants in range(5):
            leaves = [leaf.clone().requires_grad_(i == wants) for i, leaf in enumerate(case.leaves)]
            _, x_hat = through(kernel, case.indices, *leaves)
            (x_hat * case.grad_x_hat).sum().backward()
            expected = by_oracle(case._replace(grad_values=torch.zeros_like(case.grad_values)))[2 + wants]
            torch.testing.assert_close(leaves[wants].grad, expected)

    def test_gradcheck(self, kernel: Kernel) -> None:
        case = drawn(4, 3, 7, 2, seed=1)

        def function(*leaves: Tensor) -> Tensor:
            return through(kernel, case.indices, *leaves)[1]

        assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in case.leaves])


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
    site, support = SiteEncoder(*encoder), Support.of(case.indices, len(w_dec))
    z_pre = kernel.pre(x, site)
    with _Sizes() as made, largest_saved() as saved:
        x_hat = kernel.decode(torch.relu(kernel.at(z_pre, support, x, site)), support, w_dec)
        (x_hat * case.grad_x_hat).sum().backward()
    return made.largest, max(saved)


def test_csr_makes_and_keeps_no_dense_code() -> None:
    b, d, n, k = 128, 6, 512, 4
    case = drawn(b, d, n, k, dtype=torch.float32)
    made, saved = sizes(CsrKernel(), case)
    assert saved <= n * d
    assert made <= n * d < b * n
    made, saved = sizes(ReferenceKernel(), case)  # the measuring stick itself works
    assert made == saved == b * n


def test_csr_z_pre_has_no_graph() -> None:
    case = drawn(3, 2, 5, 1)
    z_pre = CsrKernel().pre(case.x, SiteEncoder(case.w_enc.requires_grad_(), case.bias, case.b_dec))
    assert not z_pre.requires_grad
    torch.testing.assert_close(z_pre, (case.x - case.b_dec) @ case.w_enc.T + case.bias)


def test_the_support_is_shared_and_transposed_once() -> None:
    # rows {2, 0} and {1, 2}: zᵀ has latent 0: row 0, latent 1: row 1, latent 2: rows 0 and 1
    support = Support.of(torch.tensor([[2, 0], [1, 2]]), 4)
    values = torch.tensor([5.0, 6.0, 7.0, 8.0])
    z = torch.tensor([[6.0, 0.0, 5.0, 0.0], [0.0, 7.0, 8.0, 0.0]])
    assert matrix(support, values).to_dense().equal(z)
    assert matrix_t(support, values).to_dense().equal(z.T)
    assert support.transposed[0].tolist() == [0, 1, 2, 4, 4]
    assert support.transposed is support.transposed


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_select_topk(b: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    z_pre = torch.randn(b, n, generator=torch.Generator().manual_seed(n * b)).requires_grad_()
    indices = select_topk(z_pre, k)
    assert indices.shape == (b, k)
    assert torch.zeros(b, n).scatter(1, indices, 1.0).bool().equal(oracles.largest(z_pre, k))


def test_to_dense() -> None:
    codes = Codes(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[2, 0], [0, 1]]))
    assert to_dense(codes, 3).tolist() == [[0.0, 0.0, 1.0], [2.0, 3.0, 0.0]]
    assert (to_dense(codes, 3).double().numpy() == oracles.spread(codes, 3)).all()


def test_choose_kernel() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_kernel("auto", cpu).name == "csr"
    assert choose_kernel("auto", cpu, torch.float64).name == "reference"
    assert choose_kernel("auto", cpu, torch.bfloat16).name == "reference"
    assert choose_kernel("auto", cuda).name == "reference"
    assert choose_kernel("csr", cpu, torch.float64).name == "csr"
    assert choose_kernel("reference", cpu).name == "reference"
    with pytest.raises(ConfigError, match="unknown kernel 'triton', expected auto, reference or csr"):
        choose_kernel("triton", cuda)
