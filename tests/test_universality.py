"""The measures against oracles and by hand, the six classes, and what happens under the null."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.config import ProbesConfig
from usae_probe.probes import CATEGORIES, FiringCounts, co_firing, firing_entropy
from usae_probe.probes.chance import chance_by_place
from usae_probe.probes.universality import Classes, benjamini_hochberg, classify, phi_by_place, split_latents
from usae_probe.usae import Codes

from . import oracles

A, B, C = "m/a", "n/b", "o/c"


def counted(fired: Mapping[str, np.ndarray]) -> FiringCounts:
    """Firing counts of dense booleans {site: [rows, n]}."""
    n = next(iter(fired.values())).shape[1]
    every = torch.arange(n).expand(len(next(iter(fired.values()))), n)
    counts = FiringCounts(tuple(fired), n)
    counts.add({site: Codes(torch.from_numpy(z.astype(np.float32)), every) for site, z in fired.items()})
    return counts


def rows(n: int, *spans: tuple[int, int]) -> np.ndarray:
    """One latent's firing: true from start to stop (exclusive) of every span."""
    fired = np.zeros(n, dtype=bool)
    for start, stop in spans:
        fired[start:stop] = True
    return fired


def classes_of(latents: list[dict[str, np.ndarray]], **thresholds: float) -> Classes:
    """Classify latents given as {site: [rows] bool}."""
    sites = list(latents[0])
    fired = {site: np.stack([latent[site] for latent in latents], axis=1) for site in sites}
    return classify(counted(fired), sites, ProbesConfig(**thresholds))


@st.composite
def firing(draw: st.DrawFn, sites: tuple[str, ...] = (A, B)) -> dict[str, np.ndarray]:
    """Booleans [rows, n] of partly shared causes, at rates from 0 to 1."""
    n_rows, n, seed = draw(st.integers(2, 120)), draw(st.integers(1, 12)), draw(st.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    cause = rng.random((n_rows, n))
    rate, own = rng.choice([0.0, 0.05, 0.2, 0.5, 1.0], size=(len(sites), n)), rng.choice([0.0, 0.2, 1.0], size=n)
    return {
        site: np.where(rng.random((n_rows, n)) < own, rng.random((n_rows, n)), cause) < rate[i]
        for i, site in enumerate(sites)
    }


class TestFiringEntropy:
    def test_by_hand(self) -> None:
        # fires 30 and 10: p = 3/4, 1/4: −(3/4 ln 3/4 + 1/4 ln 1/4)/ln 2 = (.215762 + .346574)/.693147 = .811278
        # fires 5, 5, 0 in three sites: ln 2 / ln 3 = .630930
        assert firing_entropy(np.array([[30], [10]]))[0] == pytest.approx(0.8112781244591328, abs=1e-12)
        assert firing_entropy(np.array([[5], [5], [0]]))[0] == pytest.approx(math.log(2) / math.log(3), abs=1e-12)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.lists(st.integers(0, 500), min_size=4, max_size=4), min_size=1, max_size=4))
    def test_oracle(self, fires: list[list[int]]) -> None:
        found = firing_entropy(np.array(fires))
        for latent in range(4):
            expected = oracles.firing_entropy([of_site[latent] for of_site in fires])
            assert found[latent] == pytest.approx(expected, abs=1e-9, nan_ok=True)

    def test_ends(self) -> None:
        found = firing_entropy(np.array([[7, 7, 0, 0], [7, 0, 7, 0]]))
        assert found[:3].tolist() == [1.0, 0.0, 0.0]
        assert math.copysign(1, found[1]) == 1  # no −0 in a table
        assert math.isnan(found[3])
        assert math.isnan(firing_entropy(np.array([[7]]))[0])  # one site has nothing to compare


class TestCoFiring:
    def test_by_hand(self) -> None:
        # n = 10 images; a fires in 4, b in 5, both in 3
        # Jaccard = 3/(4 + 5 − 3) = 1/2; lift = 3 · 10/(4 · 5) = 1.5
        # φ = (10 · 3 − 4 · 5)/√(4 · 6 · 5 · 5) = 10/√600 = .408248
        # p = P[H ≥ 3] = (C(4,3) C(6,2) + C(4,4) C(6,1))/C(10,5) = (60 + 6)/252 = .261905
        found = co_firing(np.array([4]), np.array([5]), np.array([3]), 10)
        assert found.cofires.tolist() == [3]
        assert found.jaccard[0] == pytest.approx(0.5, abs=1e-12)
        assert found.lift[0] == pytest.approx(1.5, abs=1e-12)
        assert found.phi[0] == pytest.approx(10 / math.sqrt(600), abs=1e-12)
        assert found.p[0] == pytest.approx(66 / 252, abs=1e-12)

    @settings(deadline=None, max_examples=60)
    @given(firing())
    def test_oracle(self, fired: dict[str, np.ndarray]) -> None:
        counts = counted(fired)
        found = co_firing(counts.fires[A], counts.fires[B], counts.cofires[A, B], counts.n_rows)
        for k in range(counts.n_latents):
            a, b = fired[A][:, k], fired[B][:, k]
            p = oracles.chance_p(int(a.sum()), int(b.sum()), int((a & b).sum()), len(a))
            assert found.jaccard[k] == pytest.approx(oracles.jaccard(a, b), abs=1e-9, nan_ok=True)
            assert found.lift[k] == pytest.approx(oracles.lift(a, b), abs=1e-9, nan_ok=True)
            assert found.phi[k] == pytest.approx(oracles.phi(a, b), abs=1e-9)
            assert found.p[k] == pytest.approx(p, abs=1e-9, rel=1e-9)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(50, 1500), st.data())
    def test_exact_tail(self, n: int, data: st.DataObject) -> None:
        a, b = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
        c = data.draw(st.integers(max(0, a + b - n), min(a, b)))
        found = co_firing(np.array([a]), np.array([b]), np.array([c]), n).p[0]
        assert found == pytest.approx(oracles.chance_p(a, b, c, n), rel=1e-7, abs=1e-12)

    def test_ends(self) -> None:
        # never in both; equal; one always; one never; both never; all images in both
        a, b = np.array([5, 5, 10, 5, 0, 10]), np.array([5, 5, 4, 0, 0, 10])
        found = co_firing(a, b, np.array([0, 5, 4, 0, 0, 10]), 10)
        assert found.jaccard[:4].tolist() == [0.0, 1.0, 0.4, 0.0]
        assert math.isnan(found.jaccard[4])
        assert found.lift[:3].tolist() == [0.0, 2.0, 1.0]
        assert np.isnan(found.lift[3:5]).all()
        assert found.phi.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # a constant vector correlates with nothing
        np.testing.assert_allclose(found.p, [1, 1 / 252, 1, 1, 1, 1], atol=1e-12)
        # of two images one, the same or the other one
        assert co_firing(np.array([1, 1]), np.array([1, 1]), np.array([1, 0]), 2).phi.tolist() == [1.0, -1.0]

    def test_perfect_agreement_of_many_has_a_p_within_range(self) -> None:
        found = co_firing(np.array([4000]), np.array([4000]), np.array([4000]), 10_000)
        assert 0.0 <= found.p[0] < 1e-300
        assert found.phi[0] == pytest.approx(1.0)


class TestPhiByPlace:
    def table(self, a: np.ndarray, b: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, ...]:
        """Fires of a and of b, co-fires and rows by place, of [rows, latents] booleans."""
        of = [place == p for p in range(place.max() + 1)]
        return (*(np.stack([x[rows].sum(0) for rows in of]) for x in (a, b, a & b)), np.array([r.sum() for r in of]))

    def test_by_hand(self) -> None:
        # place 0: 4 rows, a fires in 2, b in 2, both in 2; place 1: 4 rows, a in 1, b in 3, both in 0
        # Σ (c − a b / n) = (2 − 1) + (0 − 3/4) = .25
        # Σ a (n − a) / n = 2 · 2/4 + 1 · 3/4 = 1.75, and the same of b: φ = .25 / 1.75 = 1/7
        found = phi_by_place(*(np.array(x)[:, None] for x in ([2, 1], [2, 3], [2, 0])), np.array([4, 4]))
        assert found[0] == pytest.approx(1 / 7, rel=1e-12)

    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 80), st.integers(1, 6), st.integers(0, 2**20))
    def test_oracle(self, n_rows: int, places: int, seed: int) -> None:
        """Pearson's correlation of the two vectors once each has its mean at every place taken away."""
        rng = np.random.default_rng(seed)
        place = rng.integers(places, size=n_rows)
        rates = rng.choice([0.0, 0.2, 0.7, 1.0], size=(places, 8))
        common = rng.random((n_rows, 8))
        a, b = (
            np.where(rng.random((n_rows, 8)) < 0.5, rng.random((n_rows, 8)), common) < rates[place] for _ in range(2)
        )
        found = phi_by_place(*self.table(a, b, place))
        for k in range(8):
            x, y = (z[:, k].astype(float) for z in (a, b))
            for at in set(place.tolist()):
                x[place == at] -= x[place == at].mean()
                y[place == at] -= y[place == at].mean()
            spread = (x @ x) * (y @ y)
            assert found[k] == pytest.approx(x @ y / math.sqrt(spread) if spread > 1e-9 else 0.0, abs=1e-9)

    def test_one_place_is_the_plain_phi(self) -> None:
        rng = np.random.default_rng(0)
        a, b = (rng.random((50, 9)) < 0.4 for _ in range(2))
        found = phi_by_place(*self.table(a, b, np.zeros(50, dtype=int)))
        assert found == pytest.approx([oracles.phi(a[:, k], b[:, k]) for k in range(9)], abs=1e-12)

    def test_what_fires_by_place_alone_does_not_correlate(self) -> None:
        place = np.arange(120) % 3
        at_0, at_0_or_1 = (place == 0)[:, None], (place <= 1)[:, None]
        assert oracles.phi(at_0[:, 0], at_0[:, 0]) == 1.0
        assert oracles.phi(at_0[:, 0], at_0_or_1[:, 0]) == pytest.approx(0.5)
        assert phi_by_place(*self.table(at_0, at_0, place)).tolist() == [0.0]
        assert phi_by_place(*self.table(at_0, at_0_or_1, place)).tolist() == [0.0]
        assert phi_by_place(*(np.zeros((3, 2), dtype=int),) * 3, np.array([0, 5, 5])).tolist() == [0.0, 0.0]


class TestBenjaminiHochberg:
    def test_by_hand(self) -> None:
        # p = .01, .04, .03, .5 (4 tested): sorted .01, .03, .04, .5 times 4/rank: .04, .06, .0533, .5
        # made monotone from the right: .04, .0533, .0533, .5
        q = benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5]), np.ones(4, dtype=bool))
        np.testing.assert_allclose(q, [0.04, 0.16 / 3, 0.16 / 3, 0.5], atol=1e-12)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.booleans()), min_size=1, max_size=30))
    def test_oracle_over_the_tested(self, given_p: list[tuple[float, bool]]) -> None:
        p, tested = np.array([value for value, _ in given_p]), np.array([on for _, on in given_p])
        q = benjamini_hochberg(p, tested)
        np.testing.assert_allclose(q[tested], oracles.benjamini_hochberg(p[tested].tolist()), atol=1e-9)
        assert (q[~tested] == 1).all()


class TestClasses:
    """1,000 images; by hand, per latent, which rows fire."""

    def one(self, a: np.ndarray, b: np.ndarray, **thresholds: float) -> str:
        return str(classes_of([{A: a, B: b}], **thresholds).category[0])

    def test_the_same_images_are_universal(self) -> None:
        assert self.one(rows(1000, (0, 100)), rows(1000, (0, 100))) == "universal"
        assert self.one(rows(1000, (0, 100)), rows(1000, (30, 130))) == "universal"  # φ = .667

    def test_equal_rates_on_other_images_are_chance(self) -> None:
        # FE = 1 and not one image in common
        found = classes_of([{A: rows(1000, (0, 100)), B: rows(1000, (100, 200))}])
        assert found.entropy[0] == pytest.approx(1.0)
        assert found.category[0] == "chance"

    def test_co_firing_as_chance_has_it_is_chance(self) -> None:
        # 100 and 100 of 1,000, in common 10 = 100 · 100/1,000: lift 1, φ 0
        assert self.one(rows(1000, (0, 100)), rows(1000, (90, 190))) == "chance"

    def test_significance_without_effect_is_chance(self) -> None:
        # 300 and 300, in common 130 (90 by chance): φ = (130,000 − 90,000)/(300 · 700) = .19; p ≈ 1e-9
        a, b = rows(1000, (0, 300)), rows(1000, (170, 470))
        found = classes_of([{A: a, B: b}])
        assert found.q_all[0] < 1e-6
        assert found.pairs[A, B].phi[0] == pytest.approx(4 / 21)
        assert found.category[0] == "chance"
        assert self.one(a, b, phi=0.19) == "universal"

    def test_effect_without_significance_is_chance(self) -> None:
        # 60 images, 10 and 10 fires, 4 in common: φ = (240 − 100)/(10 · 50) = .28, p = P[H ≥ 4] ≈ .05
        a, b = rows(60, (0, 10)), rows(60, (6, 16))
        found = classes_of([{A: a, B: b}])
        assert found.pairs[A, B].phi[0] == pytest.approx(0.28)
        assert found.q_all[0] > 0.01
        assert found.category[0] == "chance"

    def test_nested_at_a_tenth_of_the_rate_is_partial(self) -> None:
        # 300 and 30, nested: exactly .1 of the rate counts; φ = (30,000 − 9,000)/√(300 · 700 · 30 · 970) = .2686
        # FE: p = 10/11, 1/11: .4395 < .9
        found = classes_of([{A: rows(1000, (0, 300)), B: rows(1000, (0, 30))}])
        assert found.fires_in[:, 0].tolist() == [True, True]
        assert found.pairs[A, B].phi[0] == pytest.approx(0.26863, abs=1e-5)
        assert found.entropy[0] == pytest.approx(0.43950, abs=1e-5)
        assert found.category[0] == "partial"

    def test_under_a_tenth_of_the_rate_it_fires_in_one(self) -> None:
        found = classes_of([{A: rows(1000, (0, 300)), B: rows(1000, (0, 29))}])
        assert found.fires_in[:, 0].tolist() == [True, False]
        assert found.category[0] == "specific"

    @pytest.mark.parametrize(("fires", "category"), [(10, "specific"), (9, "rare"), (1, "rare"), (0, "dead")])
    def test_min_fires(self, fires: int, category: str) -> None:
        assert self.one(rows(1000, (0, fires)), rows(1000)) == category
        assert self.one(rows(1000), rows(1000, (0, fires))) == category
        assert self.one(rows(1000, (0, fires)), rows(1000), min_fires=fires + 1) in ("rare", "dead")

    def test_rare_in_both_is_rare_however_well_it_agrees(self) -> None:
        assert self.one(rows(1000, (0, 9)), rows(1000, (0, 9))) == "rare"
        assert self.one(rows(1000, (0, 10)), rows(1000, (0, 10))) == "universal"

    @pytest.mark.parametrize(("other", "category"), [(9, "rare"), (2, "rare"), (1, "specific"), (0, "specific")])
    def test_seen_too_rarely_in_the_other_model_to_tell(self, other: int, category: str) -> None:
        # 15 images in one; under 10 in the other, but above a tenth of 15: it may well fire there
        assert self.one(rows(1000, (0, 15)), rows(1000, (9, 9 + other))) == category
        assert self.one(rows(1000, (0, 15)), rows(1000, (9, 9 + other)), min_rate_ratio=0.01) == (
            "specific" if other == 0 else "rare"
        )

    def test_a_third_model_that_cannot_be_told_leaves_what_two_share(self) -> None:
        span, few = rows(1000, (0, 50)), rows(1000, (0, 9))
        found = classes_of([{A: span, B: rows(1000), C: few}, {A: span, B: span, C: few}])
        assert found.category.tolist() == ["rare", "partial"]

    def test_one_site_has_specific_rare_and_dead_only(self) -> None:
        found = classes_of([{A: rows(100, (0, fires))} for fires in (50, 9, 0)])
        assert found.category.tolist() == ["specific", "rare", "dead"]
        assert np.isnan(found.entropy).all()

    def test_two_of_three_models_are_partial(self) -> None:
        span, apart = rows(1000, (0, 100)), rows(1000, (500, 600))
        found = classes_of(
            [
                {A: span, B: span, C: span},
                {A: span, B: span, C: rows(1000)},
                {A: span, B: span, C: apart},  # fires in all three, FE = 1, but on other images in one
                {A: apart, B: span, C: span},
                {A: span, B: apart, C: rows(1000, (700, 800))},
                {A: span, B: apart, C: rows(1000)},
            ]
        )
        assert found.category.tolist() == ["universal", "partial", "partial", "partial", "chance", "chance"]
        assert found.entropy[2] == pytest.approx(1.0)
        assert found.q[B, C][3] < 0.01 < found.q[A, B][3]
        assert found.q[A, C][1] == 1.0  # not tested: it does not fire there

    def test_the_weakest_pair_decides(self) -> None:
        # every pair must have φ ≥ .2: a–b .44, b–c .44, a–c −.11
        span = classes_of([{A: rows(1000, (0, 100)), B: rows(1000, (50, 150)), C: rows(1000, (100, 200))}])
        assert span.category[0] == "partial"
        assert span.q_all[0] == pytest.approx(1.0)  # the largest p over pairs

    def test_only_latents_that_fire_everywhere_are_tested(self) -> None:
        # 100, 100 and 20 in common; alone in the test q = p, however many others never fire or fire in one site
        one = {A: rows(1000, (0, 100)), B: rows(1000, (80, 180))}
        others = [{A: rows(1000), B: rows(1000)}] * 30 + [{A: rows(1000, (0, 50)), B: rows(1000, (0, 3))}] * 30
        found = classes_of([one, *others])
        p = oracles.chance_p(100, 100, 20, 1000)
        assert found.q_all[0] == pytest.approx(p, rel=1e-7)
        assert found.q[A, B][0] == pytest.approx(p, rel=1e-7)
        assert (found.q_all[1:] == 1).all()
        assert (found.q[A, B][1:] == 1).all()

    def test_sites_may_be_some_and_in_any_order(self) -> None:
        span = rows(1000, (0, 100))
        counts = counted({A: span[:, None], B: rows(1000)[:, None], C: span[:, None]})
        found = classify(counts, [C, A], ProbesConfig())
        assert found.category.tolist() == ["universal"]
        assert list(found.pairs) == [(C, A)]

    @settings(deadline=None, max_examples=60)
    @given(st.one_of(firing(), firing((A, B, C)), firing((A,))), st.integers(1, 10))
    def test_a_partition_equal_to_the_oracle(self, fired: dict[str, np.ndarray], min_fires: int) -> None:
        found = classify(counted(fired), list(fired), ProbesConfig(min_fires=min_fires))
        assert set(found.category) <= set(CATEGORIES)
        assert sum(int((found.category == name).sum()) for name in CATEGORIES) == len(found.category)
        assert found.category.tolist() == oracles.categories(fired, min_fires=min_fires)

    def test_at_rates_of_ten_to_one_nothing_is_universal(self) -> None:
        # 500 and 50 … 60 of 1,000, nested, is the largest entropy at that ratio: FE = .4395 < .9 whatever φ is
        for fires in (50, 51):
            found = classes_of([{A: rows(1000, (0, 10 * fires)), B: rows(1000, (0, fires))}])
            assert found.entropy[0] == pytest.approx(0.43950, abs=1e-5)
            assert found.pairs[A, B].phi[0] > 0.2
            assert found.category[0] == "partial"

    def test_nothing_is_positional_where_rows_are_images(self) -> None:
        found = classes_of([{A: rows(1000, (0, 100)), B: rows(1000, (0, 100))}] * 3)
        assert not found.positional.any()
        assert np.isnan(found.pairs[A, B].phi_place).all()
        assert np.isnan(found.pairs[A, B].p_place).all()


class TestSplit:
    def made(self, categories: list[str], fires_in: list[list[bool]]) -> Classes:
        none = np.ones(len(categories))
        positional = np.zeros(len(categories), dtype=bool)
        return Classes(np.array(categories), positional, np.array(fires_in).T, none, {}, {}, none)

    def test_equal_rows_in_all_sites_are_marked(self) -> None:
        # 0 and 1: one in a, one in b, the same rows; 2 differs in b; 3 is universal; 4 fires in a as 0 does
        a = np.array([[1.0, 0.0], [2.0, 0.1], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        b = np.array([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        classes = self.made(
            ["specific", "specific", "specific", "universal", "specific"],
            [[True, False], [False, True], [False, True], [True, True], [True, False]],
        )
        found = split_latents({A: a, B: b}, classes, [A, B], 0.9)
        assert found.tolist() == [True, True, False, False, True]

    def test_one_partner_of_several_candidates_is_enough(self) -> None:
        # 0 and 3 of a, 1 and 2 of b: 0 and 1 are equal, 2 and 3 are like nothing
        rows_of = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        classes = self.made(["specific"] * 4, [[True, False], [False, True], [False, True], [True, False]])
        found = split_latents({A: rows_of, B: rows_of}, classes, [A, B], 0.9)
        assert found.tolist() == [True, True, False, False]

    def test_another_row_in_one_site_or_the_opposite_sign_is_not(self) -> None:
        classes = self.made(["specific", "specific"], [[True, False], [False, True]])
        same, turned = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.8, 0.6]])  # cosine .8
        assert split_latents({A: same, B: same}, classes, [A, B], 0.9).all()
        assert not split_latents({A: same, B: turned}, classes, [A, B], 0.9).any()
        assert not split_latents({A: turned, B: same}, classes, [A, B], 0.9).any()
        assert split_latents({A: turned, B: same}, classes, [A, B], 0.75).all()
        opposite = np.array([[1.0, 0.0], [-1.0, 0.0]])
        assert not split_latents({A: same, B: opposite}, classes, [A, B], 0.9).any()

    def test_two_latents_of_one_site_and_zero_rows_are_not(self) -> None:
        same = np.array([[1.0, 0.0], [1.0, 0.0]])
        one_site = self.made(["specific", "specific"], [[True, False], [True, False]])
        assert not split_latents({A: same, B: same}, one_site, [A, B], 0.9).any()
        two_sites = self.made(["specific", "specific"], [[True, False], [False, True]])
        assert not split_latents({A: same, B: 0 * same}, two_sites, [A, B], 0.9).any()

    def test_three_sites(self) -> None:
        same = np.array([[1.0, 0.0]] * 3)
        classes = self.made(["specific"] * 3, [[True, False, False], [False, False, True], [False, False, True]])
        differs = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        assert split_latents({A: same, B: same, C: differs}, classes, [A, B, C], 0.9).tolist() == [True, True, False]


def test_under_the_null_entropy_alone_calls_many_and_the_classes_none() -> None:
    rng = torch.Generator().manual_seed(0)
    n_rows, n, k = 1000, 2000, 300  # each latent fires in about 150 images of each model
    counts = FiringCounts((A, B), n)
    counts.add(
        {
            site: Codes(
                torch.rand(n_rows, k, generator=rng) + 0.1,
                torch.rand(n_rows, n, generator=rng).topk(k, dim=1, sorted=False).indices,
            )
            for site in (A, B)
        }
    )
    found = classify(counts, [A, B], ProbesConfig())
    assert (found.entropy >= 0.9).sum() > 100
    assert (found.category == "universal").sum() <= 1
    assert (found.category == "partial").sum() <= 1
    # and without the demand for an effect size, the false-discovery rate still holds
    assert (classify(counts, [A, B], ProbesConfig(phi=0.0)).category == "universal").sum() <= 20


class TestSeveralRowsPerImage:
    N_IMAGES, N_PLACES, N = 300, 16, 400

    def counted(self, places: str) -> tuple[FiringCounts, FiringCounts]:
        """Firing of two models that know nothing of each other; counted by images and as if rows were images."""
        rng = np.random.default_rng(0)
        shape = (self.N_IMAGES, self.N_PLACES, self.N)
        fired = {}
        for site in (A, B):
            image = rng.random((self.N_IMAGES, 1, self.N)) < 0.15
            own = rng.random(shape) < 0.15
            kept = rng.random(shape) < {"copies": 1.0, "half": 0.5, "independent": 0.0}[places]
            fired[site] = np.where(kept, np.broadcast_to(image, shape), own).reshape(-1, self.N)
        every = torch.arange(self.N).expand(len(fired[A]), self.N)
        codes = {site: Codes(torch.from_numpy(z.astype(np.float32)), every) for site, z in fired.items()}
        by_image, naive = FiringCounts((A, B), self.N, draw=np.random.default_rng(1)), FiringCounts((A, B), self.N)
        by_image.add(codes, np.arange(self.N_IMAGES).repeat(self.N_PLACES))
        naive.add(codes)
        return by_image, naive

    @pytest.mark.parametrize("places", ["copies", "half", "independent"])
    def test_the_test_is_calibrated_whatever_the_places_share(self, places: str) -> None:
        by_image, naive = self.counted(places)
        found, wrong = (classify(counts, [A, B], ProbesConfig(phi=0.0)) for counts in (by_image, naive))
        p = found.pairs[A, B].p
        for level in (0.01, 0.05, 0.2):
            assert (p < level).mean() < level + 3 * np.sqrt(level / self.N)
        assert (p < 0.2).mean() > 0.08  # and has not gone blind: exact p of counts lie somewhat high
        assert (found.category == "universal").sum() + (found.category == "partial").sum() <= 1
        significant = (wrong.category == "universal").sum()
        assert significant > 50 if places == "copies" else significant >= 0
        np.testing.assert_array_equal(found.pairs[A, B].phi, wrong.pairs[A, B].phi)  # φ is over all rows in both

    def test_what_is_shared_is_found(self) -> None:
        rng = np.random.default_rng(2)
        fired = np.repeat(rng.random((300, 40)) < 0.2, 4, axis=0)
        every = torch.arange(40).expand(1200, 40)
        codes = {
            site: Codes(torch.from_numpy((fired & (rng.random(fired.shape) < 0.9)).astype(np.float32)), every)
            for site in (A, B)
        }
        counts = FiringCounts((A, B), 40, draw=np.random.default_rng(0))
        counts.add(codes, np.arange(300).repeat(4))
        assert (classify(counts, [A, B], ProbesConfig()).category == "universal").all()

    def test_min_fires_counts_images(self) -> None:
        # latent 0 fires in 40 rows of 10 images, latent 1 in 36 rows of 9
        fired = np.zeros((400, 2), dtype=np.float32)
        fired[:40, 0], fired[:36, 1] = 1, 1
        every = torch.arange(2).expand(400, 2)
        counts = FiringCounts((A, B), 2, draw=np.random.default_rng(0))
        counts.add({site: Codes(torch.from_numpy(fired), every) for site in (A, B)}, np.arange(100).repeat(4))
        assert classify(counts, [A, B], ProbesConfig()).category.tolist() == ["universal", "rare"]
        # the ten drawn rows of latent 0 fire in both: p = 1 / C(100, 10)
        assert classify(counts, [A, B], ProbesConfig()).pairs[A, B].p[0] == pytest.approx(5.78e-14, rel=1e-3)


class TestPlaces:
    """400 images of 9 places: what co-fires by its place alone is not shared."""

    N_IMAGES, N_PLACES = 400, 9
    BY_PLACE, BY_CONTENT, BOTH, UNRELATED, EDGE = range(5)

    def fired(self, seed: int = 0) -> dict[str, np.ndarray]:
        """[rows, 5] by site.

        0: at place 0 of every image, and at 2 % of the other rows at random; 1: at the same random tenth of the rows;
        2: at place 0 of the same half of the images; 3: at random; 4: nine tenths of the rows at places 0, 1, 2.
        """
        rng = np.random.default_rng(seed)
        shape = (self.N_IMAGES, self.N_PLACES)
        at_0 = np.broadcast_to(np.arange(self.N_PLACES) == 0, shape)
        edge = np.broadcast_to(np.arange(self.N_PLACES) <= 2, shape)
        content, half = rng.random(shape) < 0.1, rng.random((self.N_IMAGES, 1)) < 0.5
        found = {}
        for site in (A, B):
            own = rng.random(shape)
            kinds = [at_0 | (own < 0.02), content, at_0 & half, own < 0.1, edge & (own < 0.9)]
            found[site] = np.stack([kind.reshape(-1) for kind in kinds], axis=1)
        return found

    def counted(self, fired: dict[str, np.ndarray], *, places: int | None = None) -> FiringCounts:
        n_rows, n = fired[A].shape
        every = torch.arange(n).expand(n_rows, n)
        codes = {site: Codes(torch.from_numpy(z.astype(np.float32)), every) for site, z in fired.items()}
        places = self.N_PLACES if places is None else places
        counts = FiringCounts(tuple(fired), n, draw=np.random.default_rng(1), places=places)
        image, place = np.arange(self.N_IMAGES).repeat(self.N_PLACES), np.tile(np.arange(self.N_PLACES), self.N_IMAGES)
        counts.add(codes, image, place)
        return counts

    def test_place_alone_is_positional_and_content_is_universal(self) -> None:
        found = classify(self.counted(self.fired()), [A, B], ProbesConfig())
        pair = found.pairs[A, B]
        assert found.category.tolist() == ["chance", "universal", "universal", "chance", "chance"]
        assert found.positional.tolist() == [True, False, False, False, True]
        # without regard to places both would be: φ and p say so
        assert pair.phi[self.BY_PLACE] > 0.7
        assert pair.phi[self.EDGE] > 0.7
        assert (pair.p[[self.BY_PLACE, self.EDGE]] < 1e-20).all()
        assert (pair.p_place[[self.BY_PLACE, self.EDGE]] > 0.01).all()
        assert (np.abs(pair.phi_place[[self.BY_PLACE, self.UNRELATED, self.EDGE]]) < 0.1).all()
        assert (pair.phi_place[[self.BY_CONTENT, self.BOTH]] > 0.99).all()
        assert (pair.p_place[[self.BY_CONTENT, self.BOTH]] < 1e-6).all()
        assert classify(self.counted(self.fired(), places=0), [A, B], ProbesConfig()).category.tolist() == [
            "universal", "universal", "universal", "chance", "universal",
        ]  # fmt: skip

    def test_the_evidence_is_that_of_the_counts(self) -> None:
        fired = self.fired(3)
        counts = self.counted(fired)
        pair = classify(counts, [A, B], ProbesConfig()).pairs[A, B]
        a, b = (fired[site].reshape(self.N_IMAGES, self.N_PLACES, 5) for site in (A, B))
        n = np.full(self.N_PLACES, self.N_IMAGES)
        np.testing.assert_allclose(pair.phi_place, phi_by_place(a.sum(0), b.sum(0), (a & b).sum(0), n))
        drawn = (np.random.default_rng(1).random(self.N_IMAGES) * self.N_PLACES).astype(int)
        x, y = (z[np.arange(self.N_IMAGES), drawn] for z in (a, b))
        at = [drawn == place for place in range(self.N_PLACES)]
        tables = [np.stack([z[rows].sum(0) for rows in at]) for z in (x, y, x & y)]
        np.testing.assert_allclose(pair.p_place, chance_by_place(*tables, np.array([rows.sum() for rows in at])))
        for k in range(5):
            assert pair.p[k] == pytest.approx(
                oracles.chance_p(x[:, k].sum(), y[:, k].sum(), (x & y)[:, k].sum(), self.N_IMAGES), rel=1e-7
            )
        turned = classify(counts, [B, A], ProbesConfig()).pairs[B, A]
        np.testing.assert_allclose(turned.p_place, pair.p_place)
        np.testing.assert_allclose(turned.phi_place, pair.phi_place)

    def test_in_one_pair_of_three_is_enough_to_be_marked(self) -> None:
        # by place in a and b, by content in a and c: positional, and partial for what it shares with c
        rng = np.random.default_rng(0)
        shape = (self.N_IMAGES, self.N_PLACES, 1)
        at_0 = np.broadcast_to((np.arange(self.N_PLACES) == 0)[:, None], shape)
        content = rng.random(shape) < 0.06
        a, b, c = at_0 | content, at_0 | (rng.random(shape) < 0.01), content
        fired = {site: z.reshape(-1, 1) for site, z in ((A, a), (B, b), (C, c))}
        found = classify(self.counted(fired), [A, B, C], ProbesConfig())
        assert found.category.tolist() == ["partial"]
        assert found.positional.tolist() == [True]

    def test_unrelated_sites_with_the_same_places_share_nothing(self) -> None:
        """Every latent prefers some places, the same in both models; nothing else is common."""
        rng = np.random.default_rng(5)
        rate = rng.choice([0.0, 0.05, 0.9], size=(1, self.N_PLACES, 300), p=[0.5, 0.3, 0.2])
        shape = (self.N_IMAGES, self.N_PLACES, 300)
        fired = {site: (rng.random(shape) < rate).reshape(-1, 300) for site in (A, B)}
        found = classify(self.counted(fired), [A, B], ProbesConfig())
        naive = classify(self.counted(fired, places=0), [A, B], ProbesConfig())
        assert (naive.category == "universal").sum() > 150
        assert np.isin(found.category, ["universal", "partial"]).sum() <= 1
        assert found.positional.sum() > 150

    @pytest.mark.parametrize("images", [60, 100])
    def test_fewer_images_than_places_are_no_way_around_it(self, images: int) -> None:
        """With few images, some place is drawn of none: the test within places stands all the same."""
        rng = np.random.default_rng(2)
        places, n = 36, 40
        edge = np.broadcast_to((np.arange(places) < 18)[:, None], (images, places, n))
        fired = {s: (edge & (rng.random(edge.shape) < 0.7)).reshape(-1, n) for s in (A, B)}
        every = torch.arange(n).expand(images * places, n)
        counts = FiringCounts((A, B), n, draw=np.random.default_rng(1), places=places)
        counts.add(
            {site: Codes(torch.from_numpy(z.astype(np.float32)), every) for site, z in fired.items()},
            np.arange(images).repeat(places),
            np.tile(np.arange(places), images),
        )
        assert counts.drawn.by_place is not None
        assert (counts.drawn.by_place.n == 0).any()
        pair = classify(counts, [A, B], ProbesConfig()).pairs[A, B]
        assert not np.isnan(pair.p_place).any()
        assert (pair.p_place < 0.01).mean() <= 0.1
        assert (pair.p < 0.01).mean() > 0.5
