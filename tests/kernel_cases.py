"""Cases for kernels: supports of any shape, with float64 autograd written entry by entry as the oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from usae_probe.usae import Support
from usae_probe.usae.kernels import Kernel, SiteEncoder

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


class Case(NamedTuple):
    """Parameters, a support given by the entries of each row, and weights that make numbers of the outputs."""

    x: Tensor
    w_enc: Tensor
    bias: Tensor
    b_dec: Tensor
    w_dec: Tensor
    columns: Tensor
    counts: list[int]
    grad_values: Tensor
    grad_x_hat: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.w_enc, self.bias, self.b_dec, self.w_dec]

    @property
    def support(self) -> Support:
        n = len(self.w_dec)
        if self.counts and len(set(self.counts)) == 1:
            return Support.of(self.columns.view(len(self.counts), -1), n)
        return Support(self.columns, torch.tensor([0, *self.counts]).cumsum(0), n)

    @property
    def rows(self) -> list[int]:
        return [row for row, count in enumerate(self.counts) for _ in range(count)]


def drawn(
    counts: list[int], d: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64, *, repeats: bool = False
) -> Case:
    """Row r has `counts[r]` entries; with `repeats` a latent may come several times in a row."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    draws = [torch.randint(n, (c,), generator=g) if repeats else torch.randperm(n, generator=g)[:c] for c in counts]
    columns = torch.cat([torch.zeros(0, dtype=torch.long), *draws])
    b = len(counts)
    return Case(
        normal(b, d), normal(n, d), normal(n), normal(d), normal(n, d), columns, counts,
        normal(len(columns)), normal(b, d),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, most_rows: int = 7) -> Case:
    """Any shape: no row, empty rows, k = 1, k = n, rows of different lengths, latents that come twice."""
    b, d, n = draw(st.integers(0, most_rows)), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    k = st.integers(1, n)
    counts = draw(st.one_of(k.map(lambda c: [c] * b), st.lists(st.integers(0, n), min_size=b, max_size=b)))
    return drawn(counts, d, n, draw(st.integers(0, 2**20)), dtype, repeats=draw(st.booleans()))


def through(kernel: Kernel, case: Case, leaves: list[Tensor], *, anew: bool = False) -> tuple[Tensor, Tensor]:
    """relu(z_pre) at the support, gathered or computed anew, and what it decodes to."""
    x, *encoder, w_dec = leaves
    site, support = SiteEncoder(*encoder), case.support
    values = torch.relu(kernel.at(None if anew else kernel.pre(x, site), support, x, site))
    return values, kernel.decode(values, support, w_dec)


def by_kernel(kernel: Kernel, case: Case, *, anew: bool = False) -> list[Tensor]:
    """Values, x_hat and the gradients of x, w_enc, b_enc, b_dec and w_dec."""
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
    values, x_hat = through(kernel, case, leaves, anew=anew)
    total = (values * case.grad_values).sum() + (x_hat * case.grad_x_hat).sum()
    return [values, x_hat, *torch.autograd.grad(total, leaves)]


def by_oracle(case: Case) -> list[Tensor]:
    leaves = [leaf.detach().double().clone().requires_grad_() for leaf in case.leaves]
    x, w_enc, bias, b_dec, w_dec = leaves
    values, x_hat = [x.new_zeros(0)], [x.new_zeros(x.shape[1]) for _ in case.counts]
    for row, latent in zip(case.rows, case.columns.tolist(), strict=True):
        value = torch.clamp((x[row] - b_dec) @ w_enc[latent] + bias[latent], min=0.0)
        values.append(value[None])
        x_hat[row] = x_hat[row] + value * w_dec[latent]
    found = [torch.cat(values), torch.stack(x_hat) if x_hat else x.new_zeros(x.shape)]
    weights = [case.grad_values.double(), case.grad_x_hat.double()]
    total = sum(((part * weight).sum() for part, weight in zip(found, weights, strict=True)), 0.0 * x.sum())
    # with no entry nothing reaches the weights; the products' gradient is zero there
    reached = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*found, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, reached, strict=True))]


def assert_equals_oracle(kernel: Kernel, case: Case) -> None:
    oracle = by_oracle(case)
    for anew in (False, True):
        for found, expected in zip(by_kernel(kernel, case, anew=anew), oracle, strict=True):
            assert found.dtype == case.x.dtype
            torch.testing.assert_close(found.double(), expected, **TOLERANCE[case.x.dtype])


def strided(case: Case) -> Case:
    """The same numbers in tensors of which none is contiguous."""
    d = case.x.shape[1]
    made = case._replace(
        x=torch.stack([case.x, case.x], dim=2)[:, :, 1],
        w_enc=case.w_enc.T.contiguous().T,
        w_dec=torch.cat([case.w_dec, case.w_dec], dim=1)[:, d:],
        bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
        columns=torch.stack([case.columns, case.columns], dim=1)[:, 0],
        b_dec=torch.stack([case.b_dec, case.b_dec], dim=1)[:, 0],
        grad_values=torch.stack([case.grad_values, case.grad_values], dim=1)[:, 0],
        grad_x_hat=case.grad_x_hat[:, :1].expand(-1, d),  # stride 0, as sum() gives
    )
    assert not any(part.is_contiguous() for part in made if isinstance(part, Tensor))
    return made


def to_float32(case: Case) -> Case:
    """The same in float32, with the strides kept."""
    return Case(*(p.float() if isinstance(p, Tensor) and p.is_floating_point() else p for p in case))
