"""Intervals over images: groups, resamples, and how often the interval has the truth in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from usae_probe.config import ProbesConfig
from usae_probe.probes import FiringCounts
from usae_probe.probes.firing import CountsBy
from usae_probe.probes.intervals import N_GROUPS, ImageGroups, Resamples
from usae_probe.probes.universality import classify
from usae_probe.usae import Codes

from . import oracles

A, B = "m/a", "n/b"


def grouped(fired: dict[str, np.ndarray], group: np.ndarray, groups: int) -> FiringCounts:
    """Firing counts of dense booleans {site: [rows, n]}, one row per image."""
    n_rows, n = fired[A].shape
    every = torch.arange(n).expand(n_rows, n)
    counts = FiringCounts((A, B), n, groups=groups)
    counts.add({s: Codes(torch.from_numpy(z.astype(np.float32)), every) for s, z in fired.items()}, group=group)
    return counts


def table(counts: FiringCounts) -> CountsBy:
    assert counts.by_group is not None
    return counts.by_group


class TestImageGroups:
    @pytest.mark.parametrize("n", [1, 2, 100, N_GROUPS])
    def test_few_images_are_a_group_each(self, n: int) -> None:
        groups = ImageGroups(n, seed=0)
        assert groups.n == n
        assert groups.of(np.arange(n)[::-1].repeat(3)).tolist() == np.arange(n).repeat(3).tolist()

    def test_many_images_share_groups(self) -> None:
        groups = ImageGroups(10_000, seed=0)
        found = groups.of(np.arange(10_000))
        assert groups.n == N_GROUPS == 256
        sizes = np.bincount(found, minlength=N_GROUPS)
        assert len(sizes) == N_GROUPS
        assert 39 - 6 * 6.3 < sizes.min() <= sizes.max() < 39 + 6 * 6.3  # 10,000 / 256 = 39, σ = 6.2
        # at random, not every 256th or the first 39: neighbours are together as often as others
        assert 5 < (found[1:] == found[:-1]).sum() < 90  # 39 expected

    @pytest.mark.parametrize("n", [100, 300])
    def test_the_rows_of_an_image_are_together_in_any_chunks(self, n: int) -> None:
        counts = np.random.default_rng(0).integers(1, 6, n)
        image = np.arange(n).repeat(counts)[::-1] + 7  # as they are stored, in no order
        whole = ImageGroups(n, seed=3).of(image)
        begins = np.flatnonzero(np.append(True, image[1:] != image[:-1]))
        assert all(len(set(part.tolist())) == 1 for part in np.split(whole, begins[1:]))
        groups, parts = ImageGroups(n, seed=3), []
        for part in np.split(image, begins[10::10]):
            parts.append(groups.of(part))
        np.testing.assert_array_equal(np.concatenate(parts), whole)

    def test_the_seed_draws_them(self) -> None:
        one, same, other = (ImageGroups(1000, seed).of(np.arange(1000)).tolist() for seed in (1, 1, 2))
        assert one == same
        assert one != other

    def test_nothing_to_come(self) -> None:
        assert ImageGroups(0, seed=0).n == 1
        assert len(ImageGroups(0, seed=0).of(np.array([], dtype=np.int64))) == 0


class TestResamples:
    def test_every_resample_draws_as_many_groups_as_there_are(self) -> None:
        weights = Resamples(40, 2000, seed=0).weights
        assert weights.shape == (2000, 40)
        assert (weights.sum(1) == 40).all()
        assert (weights >= 0).all()
        # how often one group is drawn: binomial(40, 1/40), mean 1 and variance 39/40
        assert weights.mean(0) == pytest.approx(np.ones(40), abs=0.12)
        assert weights.var() == pytest.approx(39 / 40, abs=0.05)

    def test_the_seed_draws_them(self) -> None:
        one, same, other = (Resamples(9, 50, seed).weights.tolist() for seed in (1, 1, 2))
        assert one == same
        assert one != other

    def test_the_ends_are_the_quantiles_of_95_percent(self) -> None:
        # 0, 1, …, 40: 2.5 % of 40 is 1, 97.5 % is 39
        low, high = Resamples(3, 10, seed=0).interval(np.arange(41.0)[:, None] * [1, 2])
        assert low == pytest.approx([1.0, 2.0])
        assert high == pytest.approx([39.0, 78.0])


class TestPhi:
    @pytest.mark.parametrize("block", [4, 512])
    def test_equals_a_loop_over_resampled_rows(self, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        """φ by hand of the very rows of each resample, latent by latent."""
        monkeypatch.setattr("usae_probe.probes.intervals._BLOCK", block)
        rng = np.random.default_rng(0)
        n_rows, n, groups = 90, 10, 12
        rates = np.array([0.0, 0.05, 0.3, 0.5, 1.0] * 2)
        common = rng.random((n_rows, n)) < rates
        fired = {
            site: np.where(rng.random((n_rows, n)) < 0.4, rng.random((n_rows, n)) < rates, common) for site in (A, B)
        }
        group = rng.integers(groups, size=n_rows)
        resamples = Resamples(groups, 60, seed=4)
        low, high = resamples.phi(table(grouped(fired, group, groups)), (A, B))
        found = np.zeros((60, n))
        for i, weights in enumerate(resamples.weights):
            rows = np.concatenate([np.flatnonzero(group == g) for g in range(groups) for _ in range(int(weights[g]))])
            for k in range(n):
                found[i, k] = oracles.phi(fired[A][rows, k], fired[B][rows, k])
        np.testing.assert_allclose(low, np.quantile(found, 0.025, axis=0), atol=1e-9)
        np.testing.assert_allclose(high, np.quantile(found, 0.975, axis=0), atol=1e-9)
        assert (low[[2, 3, 7, 8]] < high[[2, 3, 7, 8]]).all()
        assert low[[0, 4]].tolist() == high[[0, 4]].tolist() == [0.0, 0.0]  # a constant vector correlates with nothing

    def test_by_hand(self) -> None:
        # two groups of two images; group 0: a fires in both, b in the first; group 1: neither fires
        # weights (w, 2 − w): n = 4, a = 2w, b = w, c = w: w = 0 → φ = 0;
        # w = 1: (4 · 1 − 2 · 1)/√(2 · 2 · 1 · 3) = .5774; w = 2: a = 4 is constant → φ = 0
        fired = {A: np.array([[1], [1], [0], [0]], dtype=bool), B: np.array([[1], [0], [0], [0]], dtype=bool)}
        resamples = Resamples(2, 3, seed=0)
        resamples.weights = np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])
        low, high = resamples.phi(table(grouped(fired, np.array([0, 0, 1, 1]), 2)), (A, B))
        assert low[0] == 0.0
        # quantile .975 of 0, 0, .5774 lies .95 of the way from the second to the third
        assert high[0] == pytest.approx(0.95 / np.sqrt(3), rel=1e-9)

    def test_one_group_has_no_interval(self) -> None:
        counts = grouped({A: np.ones((1, 3), bool), B: np.ones((1, 3), bool)}, np.zeros(1, dtype=np.int64), 1)
        low, high = Resamples(1, 20, seed=0).phi(table(counts), (A, B))
        assert np.isnan(low).all()
        assert np.isnan(high).all()

    @pytest.mark.parametrize(("images", "places"), [(150, 1), (1200, 1), (300, 9)])
    def test_the_truth_is_inside_as_often_as_said(self, images: int, places: int) -> None:
        """400 latents with φ = .5; those of several places have all their rows alike, which rows alone would not show.

        Both fire with rate r; b copies a with chance .5 and else fires by itself: φ = .5 whatever r.
        """
        rng = np.random.default_rng(images)
        n = 400
        rate = rng.choice([0.2, 0.4], size=n)
        a, own = (rng.random((images, n)) < rate for _ in range(2))
        copies = rng.random((images, n)) < 0.5
        fired = {A: np.repeat(a, places, axis=0), B: np.repeat(np.where(copies, a, own), places, axis=0)}
        index = np.arange(images).repeat(places)
        groups = ImageGroups(images, seed=0)
        counts = table(grouped(fired, groups.of(index), groups.n))
        low, high = Resamples(groups.n, 400, seed=0).phi(counts, (A, B))
        inside = ((low <= 0.5) & (high >= 0.5)).mean()
        assert 0.88 <= inside <= 0.99
        assert 0.02 < np.mean(high - low) < 0.5
        if places > 1:  # rows that are resampled one by one are too sure of themselves
            naive = table(grouped(fired, np.random.default_rng(1).integers(256, size=len(index)), 256))
            low, high = Resamples(256, 400, seed=0).phi(naive, (A, B))
            assert ((low <= 0.5) & (high >= 0.5)).mean() < 0.7

    def test_they_are_in_the_classes_evidence(self) -> None:
        rng = np.random.default_rng(0)
        fired = {site: rng.random((200, 5)) < 0.3 for site in (A, B)}
        counts = grouped(fired, np.arange(200), 200)
        resamples = Resamples(200, 100, seed=0)
        low, high = resamples.phi(table(counts), (A, B))
        pair = classify(counts, [A, B], ProbesConfig(), resamples).pairs[A, B]
        np.testing.assert_array_equal(pair.phi_low, low)
        np.testing.assert_array_equal(pair.phi_high, high)
        assert ((pair.phi_low <= pair.phi) & (pair.phi <= pair.phi_high)).all()
        turned = classify(counts, [B, A], ProbesConfig(), resamples).pairs[B, A]
        np.testing.assert_allclose(turned.phi_low, low, atol=1e-12)
        without = classify(counts, [A, B], ProbesConfig()).pairs[A, B]
        assert np.isnan(without.phi_low).all()
        assert np.isnan(without.phi_high).all()


class TestR2:
    def made(self, groups: int, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        return rng.random((groups, 2, 3)), 1 + rng.random((groups, 3))

    def test_equals_a_loop(self) -> None:
        sse, sst = self.made(7)
        resamples = Resamples(7, 40, seed=2)
        low, high = resamples.r2(sse, sst)
        for source in range(2):
            for target in range(3):
                found = [
                    1
                    - sum(w * sse[g, source, target] for g, w in enumerate(weights))
                    / sum(w * sst[g, target] for g, w in enumerate(weights))
                    for weights in resamples.weights
                ]
                assert low[source, target] == pytest.approx(np.quantile(found, 0.025), abs=1e-12)
                assert high[source, target] == pytest.approx(np.quantile(found, 0.975), abs=1e-12)

    def test_by_hand(self) -> None:
        # two groups: SSE 1 and 3, SST 4 and 4; both drawn once: 1 − 4/8 = .5; the first twice: .75; the other: .25
        resamples = Resamples(2, 3, seed=0)
        resamples.weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
        low, high = resamples.r2(np.array([[[1.0]], [[3.0]]]), np.array([[4.0], [4.0]]))
        assert low[0, 0] == pytest.approx(0.25 + 0.05 * 0.25)  # quantile .025 of .25, .5, .75
        assert high[0, 0] == pytest.approx(0.75 - 0.05 * 0.25)

    def test_one_group_and_targets_that_do_not_vary(self) -> None:
        low, high = Resamples(1, 9, seed=0).r2(*self.made(1))
        assert low.shape == high.shape == (2, 3)
        assert np.isnan(low).all()
        assert np.isnan(high).all()
        sse, sst = self.made(5)
        sst[:, 1] = 0.0
        low, high = Resamples(5, 9, seed=0).r2(sse, sst)
        assert np.isnan(low[:, 1]).all()
        assert np.isnan(high[:, 1]).all()
        assert np.isfinite(low[:, [0, 2]]).all()
