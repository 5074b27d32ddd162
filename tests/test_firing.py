"""Streaming counts of firing against dense boolean loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.probes import FiringCounts
from usae_probe.usae import Codes

from . import oracles

SITES = ("m/a", "n/b", "o/c")


def drawn(rows: int, n: int, k: int, seed: int) -> dict[str, Codes]:
    """Random codes; a third of the stored values is zero."""
    g = torch.Generator().manual_seed(seed)
    codes = {}
    for site in SITES:
        indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)])
        values = torch.relu(torch.rand(rows, k, generator=g) * 3 - 1)
        codes[site] = Codes(values, indices)
    return codes


def dense_counts(codes: dict[str, Codes], n: int, tau: float) -> tuple[dict, ...]:
    """Fires, Σ z, max z by site and co-fires by pair, latent by latent and row by row."""
    z = {site: oracles.spread(code, n) for site, code in codes.items()}
    fires = {site: np.zeros(n, int) for site in SITES}
    total, maximum = ({site: np.zeros(n) for site in SITES} for _ in range(2))
    cofires = {pair: np.zeros(n, int) for pair in combinations(SITES, 2)}
    for latent in range(n):
        for row in range(len(z["m/a"])):
            for site in SITES:
                value = z[site][row, latent]
                if value > tau:
                    fires[site][latent] += 1
                    total[site][latent] += value
                    maximum[site][latent] = max(maximum[site][latent], value)
            for a, b in cofires:
                cofires[a, b][latent] += z[a][row, latent] > tau and z[b][row, latent] > tau
    return fires, total, maximum, cofires


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 30),
    n=st.integers(1, 9),
    data=st.data(),
    tau=st.sampled_from([0.0, 0.3, 1.5]),
    seed=st.integers(0, 2**20),
)
def test_any_chunks_give_what_loops_give(rows: int, n: int, data: st.DataObject, tau: float, seed: int) -> None:
    k, chunk = data.draw(st.integers(1, n)), data.draw(st.integers(1, rows))
    codes = drawn(rows, n, k, seed)
    counts = FiringCounts(SITES, n, tau)
    for start in range(0, rows, chunk):
        counts.add({site: Codes(*(part[start : start + chunk] for part in code)) for site, code in codes.items()})
    fires, total, maximum, cofires = dense_counts(codes, n, tau)
    assert counts.n_rows == rows
    assert list(counts.cofires) == list(cofires)
    for site in SITES:
        np.testing.assert_array_equal(counts.fires[site], fires[site])
        np.testing.assert_allclose(counts.total[site], total[site], atol=1e-12)
        np.testing.assert_allclose(counts.maximum[site], maximum[site], atol=1e-12)
        np.testing.assert_allclose(counts.mean(site), total[site] / rows, atol=1e-12)
    for pair, expected in cofires.items():
        np.testing.assert_array_equal(counts.cofires[pair], expected)


def test_by_hand() -> None:
    # latent 2 fires in rows 0 and 1 of a, and in row 1 of b; selected with value 0 it does not fire (row 0 of b)
    counts = FiringCounts(("m/a", "n/b"), 3)
    counts.add(
        {
            "m/a": Codes(torch.tensor([[1.0, 0.5], [3.0, 0.0]]), torch.tensor([[2, 0], [2, 1]])),
            "n/b": Codes(torch.tensor([[0.0, 2.0], [4.0, 1.0]]), torch.tensor([[2, 1], [2, 0]])),
        }
    )
    assert counts.n_rows == 2
    assert counts.fires["m/a"].tolist() == [1, 0, 2]
    assert counts.fires["n/b"].tolist() == [1, 1, 1]
    assert counts.cofires["m/a", "n/b"].tolist() == [0, 0, 1]  # latent 0 fires in both, in different rows
    assert counts.mean("m/a").tolist() == [0.25, 0.0, 2.0]
    assert counts.maximum["n/b"].tolist() == [1.0, 2.0, 4.0]


def test_a_value_of_tau_does_not_fire() -> None:
    counts = FiringCounts(("m/a",), 3, tau=0.5)
    counts.add({"m/a": Codes(torch.tensor([[0.5, 0.75, 0.25]]), torch.tensor([[0, 1, 2]]))})
    assert counts.fires["m/a"].tolist() == [0, 1, 0]
    assert counts.mean("m/a").tolist() == [0.0, 0.75, 0.0]


def test_nothing_added_and_no_rows() -> None:
    counts = FiringCounts(("m/a", "n/b"), 4)
    assert counts.mean("m/a").tolist() == [0.0] * 4
    empty = Codes(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.long))
    counts.add({"m/a": empty, "n/b": empty})
    assert counts.n_rows == 0
    assert counts.fires["m/a"].sum() == 0


def test_memory_does_not_grow_with_the_rows() -> None:
    counts = FiringCounts(SITES, 50)
    sizes = []
    for seed in range(3):
        counts.add(drawn(200, 50, 5, seed))
        arrays = [*counts.fires.values(), *counts.total.values(), *counts.maximum.values(), *counts.cofires.values()]
        sizes.append(sum(array.nbytes for array in arrays))
    assert sizes == [sizes[0]] * 3
    assert sizes[0] == 8 * 50 * (3 * 3 + 3)


def test_many_latents_and_rows_do_not_collide() -> None:
    # row · n_latents + latent is the key of a fire: two fires must never share one
    n = 8168
    counts = FiringCounts(("m/a", "n/b"), n)
    rows = torch.arange(600)
    indices = torch.stack([rows * 13 % n, (rows * 13 + 1) % n], dim=1)
    shifted = torch.stack([(rows * 13 + 1) % n, (rows * 13 + 2) % n], dim=1)
    ones = torch.ones(600, 2)
    counts.add({"m/a": Codes(ones, indices), "n/b": Codes(ones, shifted)})
    assert counts.cofires["m/a", "n/b"].sum() == 600
    np.testing.assert_array_equal(counts.cofires["m/a", "n/b"], np.bincount((rows * 13 + 1).numpy() % n, minlength=n))


@pytest.mark.parametrize("order", [("m/a", "n/b"), ("n/b", "m/a")])
def test_pairs_are_in_the_order_of_the_sites(order: tuple[str, str]) -> None:
    assert list(FiringCounts(order, 3).cofires) == [order]
