"""Matching latents: against all permutations, a loop over pairs, dense codes and numpy, and planted dictionaries."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from usae_probe.buffer import ActivationBuffer
from usae_probe.errors import BufferIntegrityError, SiteError, UsageError
from usae_probe.probes import matching
from usae_probe.probes.matching import (
    Counterparts,
    FoundAgain,
    code_correlation,
    code_matrix,
    counterparts,
    decoder_cosines,
    found_again,
    match,
)
from usae_probe.usae import USAE

DIMS = {"m/a": 24, "n/b": 32}


def largest_sum(score: np.ndarray) -> float:
    """Try every one-to-one matching."""
    score = score if len(score) <= score.shape[1] else score.T
    rows = range(len(score))
    return max(
        sum(score[i, j] for i, j in zip(rows, p, strict=True)) for p in permutations(range(score.shape[1]), len(score))
    )


def greedily(score: np.ndarray) -> list[tuple[int, int]]:
    """Take the largest score of what is left, the first row and then the first column among equal ones."""
    left = {(i, j): score[i, j] for i in range(score.shape[0]) for j in range(score.shape[1])}
    pairs = []
    while left:
        best = min(left, key=lambda pair: (-left[pair], pair))
        pairs.append(best)
        left = {(i, j): s for (i, j), s in left.items() if i != best[0] and j != best[1]}
    return sorted(pairs)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson, latent by latent, float64; 0 where one does not vary."""
    found = np.zeros((a.shape[1], b.shape[1]))
    for k in range(a.shape[1]):
        for m in range(b.shape[1]):
            x, y = a[:, k].astype(np.float64), b[:, m].astype(np.float64)
            if x.min() < x.max() and y.min() < y.max():
                found[k, m] = np.corrcoef(x, y)[0, 1]
    return found


def set_decoder(usae: USAE, site: str, rows: np.ndarray) -> None:
    with torch.no_grad():
        usae.decoder(site).copy_(torch.from_numpy(np.asarray(rows, dtype=np.float32)))


def permuted(usae: USAE, order: np.ndarray) -> USAE:
    """The same latents, under other numbers."""
    copy = USAE(usae.d_in, usae.n_latents, usae.k, seed=99)
    for site in usae.sites:
        set_decoder(copy, site, usae.decoder(site).detach().numpy()[order])
    return copy


# --- match


def test_by_hand() -> None:
    # .9 alone is the largest score, but leaves .1 for the other row: .9 + .1 = 1.0 < .8 + .7 = 1.5
    score = np.array([[0.9, 0.8], [0.7, 0.1]])
    assert [part.tolist() for part in match(score)] == [[0, 1], [1, 0]]


def test_greedy_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "GREEDY_ABOVE", 1)
    assert [part.tolist() for part in match(np.array([[0.9, 0.8], [0.7, 0.1]]))] == [[0, 1], [0, 1]]


@settings(deadline=None, max_examples=60)
@given(n_a=st.integers(1, 6), n_b=st.integers(1, 6), levels=st.sampled_from([2, 1000]), seed=st.integers(0, 2**20))
def test_no_matching_has_a_larger_sum(n_a: int, n_b: int, levels: int, seed: int) -> None:
    score = np.random.default_rng(seed).integers(-levels, levels + 1, (n_a, n_b)) / levels
    rows, columns = match(score)
    assert len(rows) == len(columns) == min(n_a, n_b)
    assert (np.diff(rows) > 0).all()
    assert len(set(columns.tolist())) == len(columns)
    assert score[rows, columns].sum() == pytest.approx(largest_sum(score), abs=1e-12)


@settings(deadline=None, max_examples=80)
@given(
    n_a=st.integers(1, 14),
    n_b=st.integers(1, 14),
    ranked=st.sampled_from([1, 2, 5, 64]),
    levels=st.sampled_from([0, 1, 3, 1000]),
    seed=st.integers(0, 2**20),
)
def test_greedy_takes_the_largest_of_what_is_left(n_a: int, n_b: int, ranked: int, levels: int, seed: int) -> None:
    score = (np.random.default_rng(seed).integers(-levels, levels + 1, (n_a, n_b)) / 7).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "GREEDY_ABOVE", 0)
        patch.setattr(matching, "_RANKED", ranked)
        rows, columns = match(score)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == greedily(score)


def test_either_side_alone_makes_it_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    score = np.array([[0.9, 0.8], [0.7, 0.1], [0.0, 0.0]])
    for limit, sum_of_scores in ((3, 1.5), (2, 1.0)):
        monkeypatch.setattr(matching, "GREEDY_ABOVE", limit)
        assert score[match(score)].sum() == pytest.approx(sum_of_scores)
        assert score.T[match(score.T)].sum() == pytest.approx(sum_of_scores)


def test_nan_counts_as_minus_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # −1 + .9 = −.1 > −.5 − .5 = −1; then −1 + .1 = −.9 < −.5 + .4 = −.1, where 0 for NaN would give 0 + .1 > −.1
    score = np.array([[np.nan, -0.5], [-0.5, 0.9]])
    assert match(score)[1].tolist() == [0, 1]
    score = np.array([[np.nan, -0.5], [0.4, 0.1]])
    assert match(score)[1].tolist() == [1, 0]
    assert np.isnan(score[0, 0])  # what was given is as it was
    monkeypatch.setattr(matching, "GREEDY_ABOVE", 0)
    assert match(np.array([[np.nan, -0.9], [np.nan, -0.8]]))[1].tolist() == [0, 1]


@pytest.mark.parametrize("limit", [0, 8192])
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_match(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], limit: int) -> None:
    monkeypatch.setattr(matching, "GREEDY_ABOVE", limit)
    rows, columns = match(np.empty(shape, dtype=np.float32))
    assert len(rows) == len(columns) == 0


# --- codes


def made(path: Path, n: int = 400) -> ActivationBuffer:
    rng = np.random.default_rng(n)
    rows = {site: rng.normal(size=(n, d)).astype(np.float32) for site, d in DIMS.items()}
    return ActivationBuffer.from_arrays(rows, path, dtype="float32", shard_images=64, holdout=0.4, validation=0.2)


@pytest.mark.parametrize("sparsity", ["topk", "batchtopk"])
@pytest.mark.parametrize("chunk", [1024, 37])
def test_codes_are_those_of_the_usae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, sparsity: str
) -> None:
    monkeypatch.setattr("usae_probe.probes.rows.CHUNK_ROWS", chunk)
    buffer = made(tmp_path)
    usae = USAE(DIMS, 40, 4, sparsity=sparsity, seed=1)
    with torch.no_grad():
        usae.b_enc[0].fill_(-1.5)  # fewer than k latents of a row are above 0: codes with zeros
    for site in DIMS:
        found = code_matrix(usae, site, buffer, "holdout")
        rows = torch.from_numpy(buffer.read("holdout", [site]).values[site])
        wanted = usae.to_dense(usae.encode(rows, site)).detach().numpy()
        assert found.dtype == np.float32
        assert found.shape == wanted.shape == (160, 40)
        np.testing.assert_allclose(found.toarray(), wanted, atol=1e-5)
        assert (found.data > 0).all()
        assert found.has_canonical_format
        assert found.nnz == (wanted > 0).sum() > 0
    assert code_matrix(usae, "m/a", buffer, "holdout").nnz < 0.9 * 4 * 160


def test_fewer_rows_are_spread_over_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usae_probe.probes.rows.CHUNK_ROWS", 3)
    buffer, usae = made(tmp_path), USAE(DIMS, 40, 4)
    every = code_matrix(usae, "m/a", buffer, "holdout").toarray()
    # of 160 rows, 8: 0, 20, 40, …
    some = code_matrix(usae, "m/a", buffer, "holdout", max_rows=8).toarray()
    np.testing.assert_allclose(some, every[::20], atol=1e-5)
    for max_rows in (159, 160, 1000):
        assert code_matrix(usae, "m/a", buffer, "holdout", max_rows).shape == (min(max_rows, 160), 40)
    almost = code_matrix(usae, "m/a", buffer, "holdout", 159).toarray()
    np.testing.assert_allclose(almost[:159], every[:159], atol=1e-5)  # ⌊i · 160 / 159⌋ = i for i < 159


def test_codes_of_what_is_not_there(tmp_path: Path) -> None:
    buffer = made(tmp_path)
    with pytest.raises(SiteError, match="has no site 'o/c'"):
        code_matrix(USAE(DIMS, 40, 4), "o/c", buffer, "holdout")
    with pytest.raises(BufferIntegrityError, match="'o/c' with d_in 9, the buffer has no such site"):
        code_matrix(USAE({"o/c": 9}, 40, 4), "o/c", buffer, "holdout")
    with pytest.raises(UsageError, match="0 rows were asked for; max_rows must be at least 1"):
        code_matrix(USAE(DIMS, 40, 4), "m/a", buffer, "holdout", max_rows=0)


# --- correlation


def sparse(z: list[list[float]] | np.ndarray) -> csr_array:
    return csr_array(np.asarray(z, dtype=np.float32))


def test_correlation_by_hand() -> None:
    # x = 2 0 0 2, mean 1, deviations 1 −1 −1 1, Σ² = 4;  y = 1 0 0 0, mean ¼, deviations ¾ −¼ −¼ −¼, Σ² = ¾
    # Σ xy = ¾ + ¼ + ¼ − ¼ = 1;  r = 1 / √(4 · ¾) = .57735;  and −x of 0 2 2 0
    a = sparse([[2, 0], [0, 2], [0, 2], [2, 0]])
    b = sparse([[1], [0], [0], [0]])
    np.testing.assert_allclose(code_correlation(a, b), [[1 / math.sqrt(3)], [-1 / math.sqrt(3)]], atol=1e-7)


@pytest.mark.parametrize(("rows", "block"), [(300, 512), (300, 4), (2, 512)])
def test_correlation_against_numpy(monkeypatch: pytest.MonkeyPatch, rows: int, block: int) -> None:
    monkeypatch.setattr(matching, "_BLOCK", block)
    rng = np.random.default_rng(rows)
    a = np.maximum(rng.normal(size=(rows, 11)) - 0.8, 0).astype(np.float32)
    b = np.maximum(rng.normal(size=(rows, 7)) - 0.8, 0).astype(np.float32)
    b[:, 0] = 3 * a[:, 0]
    b[:, 1] += a[:, 2]
    a[:, 3] = 0  # dead
    b[:, 4] = 0.3  # active everywhere and always the same
    found = code_correlation(sparse(a), sparse(b))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, correlation(a, b), atol=1e-6)
    assert not found[3].any()
    assert not found[:, 4].any()
    assert abs(found).max() <= 1


def test_little_variation_about_a_large_mean() -> None:
    rng = np.random.default_rng(0)
    a = (4000 + rng.integers(0, 5, (500, 3)) / 1024).astype(np.float32)
    a[:, 2] = a[:, 0]
    assert len(np.unique(a)) > 3
    found = code_correlation(sparse(a), sparse(a))
    np.testing.assert_allclose(found, correlation(a, a), atol=1e-6)
    assert found[0, 2] == pytest.approx(1, abs=1e-6)


def test_stored_zeros_are_zeros() -> None:
    dense = np.array([[1, 0], [0, 2], [3, 1]], dtype=np.float32)
    stored = csr_array((dense.ravel(), np.array([0, 1] * 3), np.array([0, 2, 4, 6])), shape=(3, 2))
    np.testing.assert_allclose(code_correlation(stored, stored), np.corrcoef(dense.T), atol=1e-6)
    assert stored.nnz == 6  # what was given is as it was


def test_codes_of_other_rows() -> None:
    with pytest.raises(UsageError, match=r"codes of 3 and of 2 rows cannot be correlated \(encode the same rows"):
        code_correlation(sparse(np.ones((3, 1))), sparse(np.ones((2, 1))))
    assert code_correlation(csr_array((0, 2)), csr_array((0, 3))).tolist() == [[0] * 3] * 2


def test_a_code_matches_itself_under_other_numbers(tmp_path: Path) -> None:
    z = code_matrix(USAE(DIMS, 40, 4), "n/b", made(tmp_path), "train")
    order = np.random.default_rng(0).permutation(40)
    rows, columns = match(code_correlation(z, z[:, order].tocsr()))
    fires = np.asarray((z > 0).sum(0)) > 0
    assert fires.sum() > 30
    assert (order[columns] == rows)[fires].all()


# --- decoders


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def test_the_decoder_with_the_smallest_cosine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_BLOCK", 2)
    a, b = USAE(DIMS, 12, 3, seed=1), USAE(dict(reversed(DIMS.items())), 9, 3, seed=2)
    with torch.no_grad():
        a.W_dec.mul_(torch.rand(12, 1) + 0.1)
    mine = a.decoder("m/a").detach().numpy().copy()
    mine[4] = 0
    set_decoder(a, "m/a", mine)
    latents_a, latents_b = [4, 0, 11, 7, 2], [8, 1, 3]
    found = decoder_cosines(a, b, latents_a, latents_b)
    assert found.shape == (5, 3)
    for row, k in enumerate(latents_a):
        for column, m in enumerate(latents_b):
            of = [
                cosine(a.decoder(s)[k].detach().double().numpy(), b.decoder(s)[m].detach().double().numpy())
                for s in DIMS
            ]
            assert found[row, column] == pytest.approx(min(of), abs=1e-6)
    assert (found[0] <= 0).all()


def test_cosines_by_hand() -> None:
    # at m: (1, 0) and (3, 4) / 5: cosine .6; at n: (1, 1) / √2 and (1, 0): .7071; the smallest is .6
    a, b = USAE({"m/a": 2, "n/b": 2}, 1, 1), USAE({"m/a": 2, "n/b": 2}, 1, 1)
    for usae, rows in ((a, ([[2, 0]], [[1, 1]])), (b, ([[3, 4]], [[7, 0]]))):
        for site, row in zip(usae.sites, rows, strict=True):
            set_decoder(usae, site, np.array(row))
    assert decoder_cosines(a, b, [0], [0]).tolist() == [[pytest.approx(0.6, abs=1e-7)]]
    assert found_again(a, b, [0], [0], cosine=0.59) == FoundAgain(1.0, 1, 0.59, pytest.approx(0.6))
    assert found_again(a, b, [0], [0]) == FoundAgain(0.0, 1, 0.7, pytest.approx(0.6))


def test_found_again_under_other_numbers_and_not_among_strangers() -> None:
    usae = USAE(DIMS, 100, 4, seed=1)
    every = list(range(100))
    same = permuted(usae, np.random.default_rng(0).permutation(100))
    assert found_again(usae, same, every, every) == FoundAgain(1.0, 100, 0.7, pytest.approx(1.0))
    # by chance a cosine is ≥ .7 about once in 10⁴ pairs of 24 dimensions, in 10⁵ of 32: in both, never in 10⁴ pairs
    assert found_again(usae, USAE(DIMS, 100, 4, seed=2), every, every).share == 0


def test_in_all_decoders_and_only_once() -> None:
    usae = USAE(DIMS, 40, 4, seed=1)
    every = list(range(40))
    order = np.random.default_rng(0).permutation(40)
    other = permuted(usae, order)
    rows = other.decoder("n/b").detach().numpy().copy()
    strangers = np.random.default_rng(1).normal(size=(10, 32))
    rows[:10] = strangers  # ten latents have the same row in one decoder alone
    set_decoder(other, "n/b", rows)
    assert found_again(usae, other, every, every).share == pytest.approx(30 / 40)
    # among the candidates are the partners of 12 latents; the other 28 have none
    same = permuted(usae, order)
    assert found_again(usae, same, every, every[:12]) == FoundAgain(12 / 40, 40, 0.7, pytest.approx(1.0))
    assert found_again(usae, same, order[:12].tolist(), every) == FoundAgain(1.0, 12, 0.7, pytest.approx(1.0))
    # two latents with one row, and one partner: it is the partner of one of them
    twins = usae.W_dec.detach().clone()
    twins[1] = twins[0]
    with torch.no_grad():
        usae.W_dec.copy_(twins)
    assert found_again(usae, same, [0, 1], [int(np.flatnonzero(order == 0)[0])]).share == 0.5


def test_found_again_of_none() -> None:
    usae = USAE(DIMS, 8, 2)
    for latents, others, share in ([], [0, 1], math.nan), ([0, 1], [], 0.0):
        found = found_again(usae, usae, latents, others)
        assert found[:3] == (pytest.approx(share, nan_ok=True), len(latents), 0.7)
        assert math.isnan(found.median)


def test_other_sites_and_other_latents() -> None:
    usae = USAE(DIMS, 8, 2)
    with pytest.raises(
        UsageError, match=r"different sites cannot be compared: m/a \[24\], n/b \[32\], and m/a \[24\] "
    ):
        found_again(usae, USAE({"m/a": 24}, 8, 2), [0], [0])
    with pytest.raises(UsageError, match="different sites"):
        found_again(usae, USAE(DIMS | {"n/b": 31}, 8, 2), [0], [0])
    with pytest.raises(UsageError, match="latent 8 is out of range"):
        found_again(usae, usae, [0], [8])


# --- counterparts


def test_counterparts_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_BLOCK", 7)
    rng = np.random.default_rng(3)
    usae, alone = USAE(DIMS, 60, 4, seed=1), USAE({"n/b": 32}, 50, 4, seed=2)
    shared = usae.decoder("n/b").detach().numpy()
    rows = alone.decoder("n/b").detach().numpy().copy()
    rows[:12] = 3 * shared[:12] + 0.01 * rng.normal(size=(12, 32))  # universal ones, of another length
    rows[12:18] = shared[5]  # six times the same one
    rows[18:25] = shared[40:47]  # latents that are not universal
    rows[25] = -shared[0]
    rows[26] = 0
    set_decoder(alone, "n/b", rows)
    universal = list(range(20))
    assert counterparts(alone, usae, universal) == Counterparts(18 / 50, 0.0, 50)
    assert counterparts(alone, usae, universal, live=list(range(10, 30))) == Counterparts(8 / 20, 0.0, 20)
    assert counterparts(alone, usae, list(range(60))).share == 25 / 50
    assert counterparts(alone, usae, []) == Counterparts(0.0, 0.0, 50)


def test_random_directions_in_few_dimensions_have_counterparts() -> None:
    # in 2 dimensions a row covers the directions within arccos(.7) = 45.57° on both sides: 91.1 of 360 = .253.
    # (1, 0) and (−1, 0) cover twice as much, .506; standard error √(.506 · .494 / 4000) = .008
    usae, alone = USAE({"m/a": 2}, 3, 1), USAE({"m/a": 2}, 4000, 1)
    set_decoder(usae, "m/a", np.array([[1, 0], [-1, 0], [0, 1]]))
    expected = 4 * math.degrees(math.acos(0.7)) / 360
    found = counterparts(alone, usae, [0, 1])
    assert found.random == pytest.approx(expected, abs=0.025)
    assert found.share == pytest.approx(expected, abs=0.025)  # the initial rows are random as well
    assert counterparts(alone, usae, [0, 1]) == found
    assert counterparts(alone, usae, [0, 1], seed=1).random != found.random
    # a higher bar: 2 · 2 · arccos(.9) = 103.4 of 360 = .287
    assert counterparts(alone, usae, [0, 1], cosine=0.9).random == pytest.approx(0.287, abs=0.025)


def test_counterparts_of_none_and_of_others() -> None:
    usae, alone = USAE(DIMS, 8, 2), USAE({"n/b": 32}, 8, 2)
    share, random, n = counterparts(alone, usae, [0], live=[])
    assert math.isnan(share)
    assert math.isnan(random)
    assert n == 0
    with pytest.raises(UsageError, match="an independent SAE has one site, this one has 2: m/a, n/b"):
        counterparts(usae, usae, [0])
    with pytest.raises(SiteError, match="the USAE has no site 'o/c'"):
        counterparts(USAE({"o/c": 32}, 8, 2), usae, [0])
    with pytest.raises(UsageError, match="'n/b' has d_in = 31 in the independent SAE, 32 in the USAE"):
        counterparts(USAE({"n/b": 31}, 8, 2), usae, [0])
    with pytest.raises(UsageError, match="latent 8 is out of range"):
        counterparts(alone, usae, [8])
    with pytest.raises(UsageError, match="latent 9 is out of range"):
        counterparts(alone, usae, [0], live=[9])
