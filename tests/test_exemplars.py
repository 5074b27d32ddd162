"""Images of a latent: which are chosen, against a slow choice; overlaps by hand; nothing stands twice."""

from __future__ import annotations

import math

import numpy as np
import pytest

from usae_probe.images import open_source
from usae_probe.probes import Exemplar, NaturalActivations, Overlap, find_exemplars
from usae_probe.probes.exemplars import overlap, ranked
from usae_probe.probes.natural import SiteNatural


def natural(
    z: dict[str, np.ndarray], z_pre: dict[str, np.ndarray] | None = None, per_image: int = 1
) -> NaturalActivations:
    """Activations of latent 4 by site; images are numbered backwards from 99, the last third is held out."""
    n = len(next(iter(z.values())))
    ones = np.ones(9)
    sites = {
        site: SiteNatural(
            {4: 0}, values[:, None], (values if z_pre is None else z_pre[site])[:, None], 0 * ones, ones, ones
        )
        for site, values in z.items()
    }
    split = np.where(np.arange(n) < 2 * n // 3, 0, 2).astype(np.int8)
    return NaturalActivations(sites, (99 - np.arange(n) // per_image).astype(np.int64), split, None)


def test_by_hand() -> None:
    # nine images, 99 … 91: A fires on 99, 97, 96, 91 and B on 97, 95
    a = np.array([1.0, 0, 3, 2, 0, 0, 0, 0, 5])
    b = np.array([0.0, 0, 2, 0, 4, 0, 0, 0, 0])
    found = find_exemplars(natural({"a/x": a, "b/x": b}), 4, n=2)
    # of nine activations 8/9 are below the largest of A, 7/9 below the second
    assert found.top["a/x"] == [
        Exemplar(91, 5.0, pytest.approx(800 / 9), "holdout"),
        Exemplar(97, 3.0, pytest.approx(700 / 9), "train"),
    ]
    assert [e.image for e in found.top["b/x"]] == [95, 97]
    # only in A: 91 is shown already, then come 96 and 99
    assert [e.image for e in found.only["a/x"]] == [96, 99]
    assert found.only["b/x"] == []  # 95 is shown already
    assert found.overlap == {("a/x", "b/x"): Overlap(1, 2, pytest.approx(4 / 9))}
    # held out: images 93, 92, 91; B does not vary there
    assert math.isnan(found.correlation["a/x", "b/x"])


def test_correlation_is_that_of_the_held_out_codes() -> None:
    rng = np.random.default_rng(0)
    a = np.maximum(rng.normal(size=300), 0)
    b = np.maximum(a + 0.3 * rng.normal(size=300), 0)
    b[:200] = rng.permutation(b[:200])  # what is not held out does not count
    found = find_exemplars(natural({"a/x": a, "b/x": b}), 4)
    assert found.correlation["a/x", "b/x"] == pytest.approx(np.corrcoef(a[200:], b[200:])[0, 1])


def test_rows_of_an_image_count_by_the_largest() -> None:
    z = np.array([0.0, 5, 4, 4, 0, 1])
    found = find_exemplars(natural({"a/x": z}, per_image=2), 4, n=9)
    assert [(e.image, e.value) for e in found.top["a/x"]] == [(99, 5.0), (98, 4.0), (97, 1.0)]
    assert found.overlap == {}
    assert found.only["a/x"] == []


def test_images_across_the_activation_come_one_from_each_band() -> None:
    rng = np.random.default_rng(1)
    z_pre = rng.permutation(100).astype(float)
    z = np.where(z_pre > 95, z_pre, 0.0)
    site = natural({"a/x": z}, {"a/x": z_pre})
    found = find_exemplars(site, 4, n=5)
    percentiles = [e.percentile for e in found.across["a/x"]]
    assert [int(p // 20) for p in percentiles] == [0, 1, 2, 3, 4]
    assert found.across["a/x"][0].value == 0  # it does not fire there
    assert find_exemplars(site, 4, n=5) == found
    assert find_exemplars(site, 4, n=5, seed=1).across != found.across
    shown = [e.image for kind in (found.top, found.across) for e in kind["a/x"]]
    assert len(shown) == len(set(shown))


def test_images_that_look_the_same_stand_once() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    pictures[98] = np.clip(pictures[99].astype(int) + rng.integers(-2, 3, (8, 8, 3)), 0, 255)  # another compression
    z = np.array([9.0, 8, 7, 0, 0, 0])
    site = natural({"a/x": z})
    assert [e.image for e in find_exemplars(site, 4, source=open_source(pictures)).top["a/x"]] == [99, 97]
    assert [e.image for e in find_exemplars(site, 4).top["a/x"]] == [99, 98, 97]


def test_ranks_and_overlaps_by_hand() -> None:
    assert ranked(np.array([0.0, 2, 3, 2, 0])) == [2, 1, 3]
    assert ranked(np.tile([1.0, 2.0], 50)) == [*range(1, 100, 2), *range(0, 100, 2)]  # of equal ones the first
    assert overlap(np.array([3.0, 2, 1, 0]), np.array([1.0, 0, 2, 3]), n=2) == Overlap(0, 2, 1.0)
    assert overlap(np.array([3.0, 2, 1, 0]), np.array([3.0, 2, 0, 0]), n=20) == Overlap(2, 2, 1.0)
    assert math.isnan(overlap(np.array([0.0, 0]), np.array([1.0, 0])).share)
    assert Overlap(5, 20, 0.1).share == 0.25


def test_random_rankings_overlap_as_expected() -> None:
    rng = np.random.default_rng(0)
    found = [overlap(rng.random(200) + 1, rng.random(200) + 1) for _ in range(500)]
    assert found[0].expected == 2.0
    assert np.mean([each.shared for each in found]) == pytest.approx(2.0, abs=0.2)
