"""Selection of latents against sorting everything, with ties and −inf."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from usae_probe.usae.kernels import Support, select_batch_topk, select_topk, selection

from . import oracles


def drawn(b: int, n: int, seed: int, levels: int) -> Tensor:
    """Rows of normal numbers; with few levels most are tied, and some are −inf."""
    z_pre = torch.randn(b, n, generator=torch.Generator().manual_seed(seed))
    if not levels:
        return z_pre
    z_pre = (z_pre * levels).round() / levels
    return z_pre.masked_fill(z_pre < -1.2, -torch.inf)


def assert_selects_the_largest(z_pre: Tensor, k: int) -> None:
    indices = select_topk(z_pre, k)
    assert indices.shape == (len(z_pre), k)
    for row, chosen in zip(z_pre.tolist(), indices.tolist(), strict=True):
        assert len(set(chosen)) == k
        assert sorted(row[latent] for latent in chosen) == sorted(row)[len(row) - k :]


def assert_selects_the_largest_of_the_batch(z_pre: Tensor, k: int) -> None:
    support = select_batch_topk(z_pre, k)
    places = list(zip(support.rows.tolist(), support.columns.tolist(), strict=True))
    assert len(set(places)) == len(places)
    assert (support.n_rows, support.n_latents, support.per_row) == (*z_pre.shape, None)
    positive = sorted(value for value in z_pre.flatten().tolist() if value > 0)
    assert sorted(float(z_pre[place]) for place in places) == positive[max(0, len(positive) - k * len(z_pre)) :]


shapes = {
    "b": st.integers(0, 5),
    "n": st.one_of(st.integers(1, 40), st.integers(100, 700)),
    "seed": st.integers(0, 2**20),
    "levels": st.sampled_from([0, 1, 3]),
    "share": st.floats(0, 1),
}


@settings(deadline=None, max_examples=80)
@given(**shapes)
@example(b=3, n=700, seed=0, levels=1, share=0.0)  # k = 1
@example(b=3, n=129, seed=0, levels=0, share=1.0)  # k = n
@example(b=0, n=300, seed=0, levels=0, share=0.01)
def test_select_topk(b: int, n: int, seed: int, levels: int, share: float) -> None:
    k = min(n, 1 + int(share**3 * n))  # mostly small, where the groups are
    assert_selects_the_largest(drawn(b, n, seed, levels), k)


@settings(deadline=None, max_examples=80)
@given(**shapes)
@example(b=3, n=700, seed=0, levels=1, share=0.0)
@example(b=3, n=129, seed=0, levels=0, share=1.0)
@example(b=0, n=300, seed=0, levels=0, share=0.01)
def test_select_batch_topk(b: int, n: int, seed: int, levels: int, share: float) -> None:
    assert_selects_the_largest_of_the_batch(drawn(b, n, seed, levels), min(n, 1 + int(share**3 * n)))


def test_topk_equals_the_oracle_without_ties() -> None:
    z_pre = drawn(4, 1000, 0, 0).requires_grad_()
    indices = select_topk(z_pre, 7)
    assert torch.zeros(4, 1000).scatter(1, indices, 1.0).bool().equal(oracles.largest(z_pre, 7))


@pytest.mark.parametrize("n", [256, 259, 2042])
def test_topk_in_chunks_of_rows_and_of_strided_input(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 3 * n)
    z_pre = drawn(8, n, 1, 3)
    assert_selects_the_largest(z_pre, 5)
    assert_selects_the_largest(z_pre.T.contiguous().T, 5)
    assert_selects_the_largest(torch.cat([z_pre, z_pre], 1)[:, 1 : n + 1], 5)


def test_topk_of_rows_that_are_minus_infinity_but_for_a_few() -> None:
    z_pre = torch.full((3, 500), -torch.inf)
    z_pre[0, 499], z_pre[1, 0], z_pre[1, 250] = 1.0, -2.0, 3.0
    assert_selects_the_largest(z_pre, 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_batch_bound_holds_where_a_sample_is_small(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    above = selection._above
    monkeypatch.setattr(selection, "_SAMPLE", 500)
    monkeypatch.setattr(selection, "_above", lambda flat, bound: (looked_at.append(bound), above(flat, bound))[1])
    z_pre = drawn(32, 1000, seed, 0)
    assert_selects_the_largest_of_the_batch(z_pre, 16)
    assert looked_at[0] > 0.5  # 512 of 32,000 are above 2.1: the sample spared a look at the 16,000 positive ones


def test_a_bound_that_is_too_high_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_bound", lambda flat, wanted: 1e9)
    assert_selects_the_largest_of_the_batch(drawn(6, 50, 0, 3), 4)


def test_batch_topk_by_hand() -> None:
    # k · b = 4 of the 5 positive numbers; row 1 has none of them
    support = select_batch_topk(
        torch.tensor([[9.0, 0.0, 2.0], [-1.0, -2.0, 1.0], [8.0, 3.0, -5.0], [-1.0, 0.0, -9.0]]), 1
    )
    assert support.columns.tolist() == [0, 2, 0, 1]
    assert support.pointers.tolist() == [0, 2, 2, 4, 4]
    assert isinstance(support, Support)
