"""Exact tests of co-firing against chance: counted ways for small numbers, float64 convolutions for large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from usae_probe.probes.chance import chance, chance_by_place

Stratum = tuple[int, int, int, int]
"""Images with the place; those in which a fires, in which b does, in which both do."""


def ways(n: int, a: int, b: int) -> dict[int, int]:
    """Of the C(n, b) equally likely pairings, how many have h co-fires, by h."""
    return {h: math.comb(a, h) * math.comb(n - a, b - h) for h in range(max(0, a + b - n), min(a, b) + 1)}


def counted(strata: Sequence[Stratum]) -> Fraction:
    """P[Σ H ≥ Σ c]: every way of every stratum, in whole numbers."""
    found = {0: Fraction(1)}
    for n, a, b, _ in strata:
        of, total = ways(n, a, b), math.comb(n, b)
        summed: dict[int, Fraction] = {}
        for so_far, p in found.items():
            for h, count in of.items():
                summed[so_far + h] = summed.get(so_far + h, Fraction(0)) + p * Fraction(count, total)
        found = summed
    observed = sum(c for *_, c in strata)
    return sum((p for h, p in found.items() if h >= observed), Fraction(0))


def convolved(n: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[int, np.ndarray]:
    """The smallest sum of co-fires, and P[Σ H ≥ it + i], i = 0, 1, …, of one latent."""
    p, least = np.ones(1), 0
    for m, x, y in zip(n.tolist(), a.tolist(), b.tolist(), strict=True):
        lowest, most = max(0, x + y - m), min(x, y)
        p = np.convolve(p, stats.hypergeom.pmf(np.arange(lowest, most + 1), m, x, y))
        least += lowest
    return least, np.cumsum(p[::-1])[::-1]


def by_place(*latents: Sequence[Stratum]) -> np.ndarray:
    """`chance_by_place` of latents given stratum by stratum; all have the same images by place."""
    table = np.array(latents).transpose(2, 1, 0)  # [4, places, latents]
    return chance_by_place(table[1], table[2], table[3], table[0, :, 0])


def by_sum(n: np.ndarray, a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """`chance_by_place` of one latent for several sums of co-fires (where they are does not matter)."""
    cofires = np.zeros((len(n), len(sums)), dtype=int)
    cofires[0] = sums
    each = np.ones(len(sums), dtype=int)
    return chance_by_place(np.outer(a, each), np.outer(b, each), cofires, n)


@st.composite
def strata(draw: st.DrawFn, most: int = 12, places: int = 5) -> list[Stratum]:
    found = []
    for _ in range(draw(st.integers(1, places))):
        n = draw(st.integers(0, most))
        a, b = draw(st.integers(0, n)), draw(st.integers(0, n))
        found.append((n, a, b, draw(st.integers(max(0, a + b - n), min(a, b)))))
    return found


def test_two_places_by_hand() -> None:
    # place 0: 4 images, a fires in 2, b in 2, both in 2: P[H = 0, 1, 2] = 1/6, 4/6, 1/6
    # place 1: 3 images, a in 1, b in 1, both in 1:       P[H = 0, 1]    = 2/3, 1/3
    # Σ c = 3, which only 2 + 1 gives: p = 1/6 · 1/3 = 1/18
    # with c = 1 + 1 = 2: 2 + 0, 2 + 1 and 1 + 1: p = 1/6 · 2/3 + 1/18 + 4/6 · 1/3 = 2/18 + 1/18 + 4/18 = 7/18
    # without places: 7 images, 3 and 3, 3 in common: 1/C(7, 3) = 1/35
    found = by_place([(4, 2, 2, 2), (3, 1, 1, 1)], [(4, 2, 2, 1), (3, 1, 1, 1)])
    np.testing.assert_allclose(found, [1 / 18, 7 / 18], rtol=1e-12)
    assert chance(np.array([3]), np.array([3]), np.array([3]), 7)[0] == pytest.approx(1 / 35, rel=1e-9)


@settings(deadline=None, max_examples=150)
@given(strata())
def test_small_places_against_counted_ways(latent: list[Stratum]) -> None:
    assert by_place(latent)[0] == pytest.approx(float(counted(latent)), rel=1e-9, abs=1e-13)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**20), st.integers(2, 30), st.integers(1, 6))
def test_many_latents_at_once(seed: int, latents: int, places: int) -> None:
    rng = np.random.default_rng(seed)
    n = rng.integers(0, 15, places)
    a, b = (rng.integers(0, n[:, None] + 1, (places, latents)) for _ in range(2))
    low, high = np.maximum(a + b - n[:, None], 0), np.minimum(a, b)
    c = rng.integers(low, high + 1)
    found = chance_by_place(a, b, c, n)
    for k in range(latents):
        latent = list(zip(n.tolist(), a[:, k].tolist(), b[:, k].tolist(), c[:, k].tolist(), strict=True))
        assert found[k] == pytest.approx(float(counted(latent)), rel=1e-9, abs=1e-13)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 200), st.data())
def test_one_place_is_the_plain_test(n: int, data: st.DataObject) -> None:
    # of 200 images the variance of the co-fires is at most 200/16 = 12.5: the sum is exact
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    c = data.draw(st.integers(max(0, a + b - n), min(a, b)))
    plain = chance(np.array([a]), np.array([b]), np.array([c]), n)[0]
    assert by_place([(n, a, b, c)])[0] == pytest.approx(plain, rel=1e-9, abs=1e-13)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.data())
def test_the_plain_test_against_counted_ways(n: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    c = data.draw(st.integers(max(0, a + b - n), min(a, b)))
    found = chance(np.array([a]), np.array([b]), np.array([c]), n)[0]
    assert found == pytest.approx(float(counted([(n, a, b, c)])), rel=1e-9, abs=1e-300)


def test_the_plain_test_in_the_middle_and_at_the_ends_of_many_images() -> None:
    # 100,000 images, 3,000 and 5,000: mean 150, σ = √(150 · .97 · .95) = 11.8
    n, a, b = 100_000, 3000, 5000
    c = np.array([0, 1, 100, 149, 150, 151, 200, 300, 1000, 3000])
    found = chance(np.full(len(c), a), np.full(len(c), b), c, n)
    expected = stats.hypergeom.sf(c - 1, n, a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-300)
    assert found[0] == 1.0
    assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize("n", [2, 20, 300, 500, 5000])
def test_one_cofire_of_one_fire_each_has_the_chance_of_one_in_n(n: int) -> None:
    # far from the mean in standard deviations ((1 − 1/n) / √(1/n) ≈ √n) and yet no rarity
    assert by_place([(n, 1, 1, 1)])[0] == pytest.approx(1 / n, rel=1e-9)
    # and so among 49 places: ten fires each, at one place in common
    latent = [(n, int(i < 10), int(9 <= i < 19), int(i == 9)) for i in range(49)]
    assert by_place(latent)[0] == pytest.approx(1 / n, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(100, 3000), st.integers(1, 12), st.data())
def test_few_fires_of_many_images_against_counted_ways(n: int, places: int, data: st.DataObject) -> None:
    # means far below 1: the sum lies many standard deviations above them, and p is what counting says
    latent = []
    for _ in range(places):
        a, b = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
        latent.append((n, a, b, data.draw(st.integers(0, min(a, b)))))
    expected = float(counted(latent))
    assert by_place(latent)[0] == pytest.approx(expected, rel=1e-6, abs=1e-13)


def large(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images by place and fires of one latent, at rates that differ between places."""
    rng = np.random.default_rng(seed)
    n = rng.integers(20, 400, rng.integers(4, 50))
    a, b = (rng.binomial(n, np.clip(rng.uniform(0.05, 0.8) * rng.uniform(0.3, 1.7, len(n)), 0, 1)) for _ in range(2))
    return n, a, b


def variance(n: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Σ_s a b (n − a) (n − b) / (n² (n − 1))."""
    return float((a * b * (n - a) * (n - b) / (n**2 * (n - 1.0))).sum())


LARGE = [large(seed) for seed in range(60)]
LEFT = [(np.full(places, 60), np.full(places, 10), np.full(places, 50)) for places in (26, 40, 60)]
"""a fires in few images, b in most: the sum is skewed to the left."""


def test_large_places_against_convolutions() -> None:
    seen = 0
    for n, a, b in LARGE + LEFT:
        if variance(n, a, b) < 30:
            continue
        seen += 1
        least, tail = convolved(n, a, b)
        at = np.flatnonzero((tail < 0.5) & (tail > 1e-8))
        found = by_sum(n, a, b, at + least)
        error = np.abs(found / tail[at] - 1)
        assert error[tail[at] > 1e-3].max() <= 0.05
        assert error[tail[at] > 1e-5].max() <= 0.20
        ratio = np.maximum(found, 1e-300) / tail[at]
        assert 1 / 3 < ratio.min() <= ratio.max() < 3  # of the right size, down to where it never matters
    assert seen > 40


def test_the_two_ways_of_summing_meet() -> None:
    # variances just below and above the one from which on a normal distribution stands for the sum
    n = np.full(20, 60)
    below, above = ((n, np.full(20, fires), np.full(20, fires)) for fires in (11, 12))
    assert variance(*below) < 30 < variance(*above)
    for case in (below, above):
        least, tail = convolved(*case)
        at = np.flatnonzero((tail < 0.9) & (tail > 1e-4))
        np.testing.assert_allclose(by_sum(*case, at + least), tail[at], rtol=0.15)


@pytest.mark.parametrize("case", range(15))
def test_more_cofires_are_never_likelier(case: int) -> None:
    n, a, b = [*LEFT, *LARGE][case]
    sums = np.arange(np.maximum(a + b - n, 0).sum(), np.minimum(a, b).sum() + 1)
    found = by_sum(n, a, b, sums)
    assert found[0] == 1.0
    assert (np.diff(found) <= 1e-13).all()
    assert (np.diff(found) < 0).any()
    assert found[-1] < 1e-15
    # nothing that can happen has no chance at all, as long as it can be told from 0 in a sum
    _, tail = convolved(n, a, b)
    assert (found[tail > 1e-12] > 0).all()


def test_what_fires_by_place_alone_is_chance() -> None:
    # both fire at place 0 of all 40 images there and nowhere else; the plain test would say 1/C(120, 40)
    latent = [(40, 40, 40, 40), (40, 0, 0, 0), (40, 0, 0, 0)]
    assert by_place(latent)[0] == 1.0
    assert chance(np.array([40]), np.array([40]), np.array([40]), 120)[0] < 1e-30
    # with one more fire each, elsewhere and in common: 1 in 40
    assert by_place([(40, 40, 40, 40), (40, 1, 1, 1), (40, 0, 0, 0)])[0] == pytest.approx(1 / 40)


def test_what_cannot_be_otherwise_has_p_1() -> None:
    never = [(10, 0, 5, 0), (10, 0, 3, 0)]
    always = [(10, 10, 5, 5), (10, 10, 3, 3)]
    apart = [(10, 3, 4, 0), (10, 2, 2, 0)]
    forced = [(10, 8, 7, 5), (10, 9, 9, 8)]  # 8 + 7 − 10 = 5 and 9 + 9 − 10 = 8 at least
    assert by_place(never, always, apart, forced).tolist() == [1.0] * 4
    assert chance_by_place(*(np.zeros((3, 0), dtype=int) for _ in range(3)), np.full(3, 9)).shape == (0,)


def test_places_without_images_do_not_count() -> None:
    latent = [(8, 4, 4, 3), (0, 0, 0, 0), (5, 2, 3, 2)]
    assert by_place(latent)[0] == pytest.approx(float(counted([latent[0], latent[2]])), rel=1e-12)


@pytest.mark.parametrize("per_place", [6, 120])
def test_few_are_significant_under_the_null(per_place: int) -> None:
    """Two sites that both prefer certain places, else unrelated: the plain test is fooled, the one by place is not."""
    rng = np.random.default_rng(0)
    places, latents = 16, 400
    n = np.full(places, per_place)
    rate = rng.choice([0.02, 0.1, 0.7], size=(places, 1, latents), p=[0.5, 0.3, 0.2])
    fired = [rng.random((places, per_place, latents)) < rate for _ in range(2)]
    a, b, c = (table.sum(1) for table in (*fired, fired[0] & fired[1]))
    p = chance_by_place(a, b, c, n)
    for level in (0.01, 0.05, 0.2):
        assert (p < level).mean() < level + 3 * np.sqrt(level / latents)
    assert (p < 0.2).mean() > 0.08  # and has not gone blind: exact p of counts lie somewhat high
    assert (chance(a.sum(0), b.sum(0), c.sum(0), places * per_place) < 0.05).mean() > 0.5
