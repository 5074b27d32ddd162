"""Residual and error of a reconstruction, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from usae_probe.usae.kernels.workspace import Workspace
from usae_probe.usae.residual import residual

D_IN = {"m/a": 3, "n/b": 5, "o/c": 2}
LOSSES = pytest.mark.parametrize("loss", ["mse", "l1"])


def drawn(g: int, b: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(b, 10), normal(g, b, 10).requires_grad_(), normal(10).requires_grad_(), normal(3)


def plain(x: Tensor, product: Tensor, b_dec: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    rows = x - (product + b_dec)
    sizes = (rows.square() if loss == "mse" else rows.abs()).split(list(D_IN.values()), dim=-1)
    return rows.detach(), torch.stack([part.mean() for part in sizes])


@LOSSES
@pytest.mark.parametrize(("g", "b"), [(1, 4), (3, 2), (1, 1)])
def test_values_and_gradients(loss: Any, g: int, b: int) -> None:
    x, product, b_dec, weights = drawn(g, b)
    rows, per_site = plain(x, product, b_dec, loss)
    expected = torch.autograd.grad((per_site * weights).sum(), (product, b_dec))
    found = residual(x, product, b_dec, D_IN, loss=loss, workspace=Workspace())
    torch.testing.assert_close(found.rows, rows)
    torch.testing.assert_close(found.per_site, per_site)
    assert not found.rows.requires_grad
    given = torch.autograd.grad((found.per_site * weights).sum(), (product, b_dec), retain_graph=True)
    again = torch.autograd.grad((found.per_site * weights).sum(), (product, b_dec))
    for one, two, wanted in zip(given, again, expected, strict=True):
        torch.testing.assert_close(one, wanted)
        assert one.equal(two)  # nothing was worked on in place


@LOSSES
def test_gradcheck_with_non_contiguous_products(loss: Any) -> None:
    x, product, b_dec, _ = drawn(2, 3, seed=1)
    turned = product.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not turned.is_contiguous()
    assert torch.autograd.gradcheck(lambda p, b: residual(x, p, b, D_IN, loss=loss).per_site, (turned, b_dec))


def test_large_rows_come_from_the_workspace_and_stay_while_they_are_held() -> None:
    workspace, d_in = Workspace(), {"m/a": 1024}
    x, product, b_dec = torch.zeros(2048, 1024), torch.ones(1, 2048, 1024), torch.zeros(1024)
    first = residual(x, product, b_dec, d_in, workspace=workspace)
    second = residual(x, 2 * product, b_dec, d_in, workspace=workspace)
    assert float(first.rows.max()) == -1.0
    assert float(second.rows.max()) == -2.0
    address = first.rows.data_ptr()
    del first
    assert residual(x, product, b_dec, d_in, workspace=workspace).rows.data_ptr() == address
