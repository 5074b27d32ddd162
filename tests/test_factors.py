"""AUROC of codes for known values of the images, from fires alone, against pairs of rows, scipy and planted latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from usae_probe.errors import UsageError
from usae_probe.images import Annotation
from usae_probe.probes import FactorScores, Follows, factors
from usae_probe.usae import Codes

from . import oracles

SITES = ("m/a", "n/b")


def sparse(z: np.ndarray) -> Codes:
    """Every entry of a dense matrix, zeros too, in an order that differs from row to row."""
    dense = torch.from_numpy(np.ascontiguousarray(z))
    order = torch.stack([torch.randperm(dense.shape[1]) for _ in range(len(dense))])
    return Codes(dense.gather(1, order), order)


def scores_of(
    z: dict[str, np.ndarray], known: list[Annotation], images: np.ndarray | None = None, chunk: int = 1000
) -> FactorScores:
    n_rows, n_latents = next(iter(z.values())).shape
    images = np.arange(n_rows) if images is None else images
    scores = FactorScores(list(z), n_latents, known)
    for start in range(0, n_rows, chunk):
        part = slice(start, start + chunk)
        scores.add({site: sparse(values[part]) for site, values in z.items()}, images[part])
    return scores


def annotation(name: str, values: np.ndarray, n: int | None = None) -> Annotation:
    n = int(values.max()) + 1 if n is None else n
    return Annotation(name, values.astype(np.int64), [f"{name}{v}" for v in range(n)])


def names_and_scores(follows: list[Follows | None]) -> list[tuple | None]:
    return [found and tuple(found[:3]) for found in follows]


@pytest.fixture
def rate_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate values that a single image has: small cases are easier to follow."""
    monkeypatch.setattr(factors, "MIN_IMAGES", 1)


def test_by_hand(rate_all: None) -> None:
    # z of six images      0    0    2    2    0    5
    # value                a    b    a    b    b    a
    # ranks: three zeros share (1 + 2 + 3) / 3 = 2, two twos share (4 + 5) / 2 = 4.5, 5 has 6
    # R⁺(a) = 2 + 4.5 + 6 = 12.5;  U = 12.5 − 3 · 4 / 2 = 6.5;  AUROC = 6.5 / (3 · 3) = .7222
    # pairs (a, b): 0 against 0 2 0: ½ 0 ½;  2 against 0 2 0: 1 ½ 1;  5: 1 1 1;  1 + 2.5 + 3 = 6.5 of 9
    z = np.array([0, 0, 2, 2, 0, 5], dtype=np.float32)[:, None]
    scores = scores_of({"m/a": z}, [annotation("x", np.array([0, 1, 0, 1, 1, 0]))])
    assert scores.auroc("m/a").tolist() == [pytest.approx([6.5 / 9, 2.5 / 9])]
    assert names_and_scores(scores.follows()) == [("x", "x0", {"m/a": pytest.approx(6.5 / 9)})]
    # it fires in images 2, 3 and 5, of which 2 and 5 are a
    assert scores.follows()[0].purity == {"m/a": pytest.approx(2 / 3)}
    assert scores.follows()[0].best == {"m/a": "x=x0"}


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 25),
    n=st.integers(1, 5),
    n_values=st.integers(1, 4),
    chunk=st.integers(1, 25),
    levels=st.sampled_from([2, 4, 1000]),
    seed=st.integers(0, 2**20),
)
def test_every_latent_and_value_against_pairs(
    rows: int, n: int, n_values: int, chunk: int, levels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    z = {s: np.maximum(rng.integers(-levels, levels, (rows, n)), 0).astype(np.float32) / 7 for s in SITES}
    images = rng.permutation(40)[:rows]
    known = [annotation("x", rng.integers(-1, n_values, 40), n_values), annotation("y", rng.integers(0, 2, 40), 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "MIN_IMAGES", 2)
        scores = scores_of(z, known, images, chunk)
        found = {site: scores.auroc(site) for site in SITES}
        n_rated = scores.n_values
    columns = [(one.values[images], v) for one in known for v in range(len(one.names))]
    rated = []
    for column, (labels, value) in enumerate(columns):
        kept, has = labels >= 0, labels == value
        rated.append(has[kept].sum() >= 2 and (~has[kept]).sum() >= 2)
        for site in SITES:
            for latent in range(n):
                expected = oracles.auroc(z[site][kept, latent].astype(float), has[kept]) if rated[-1] else np.nan
                assert found[site][latent, column] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert n_rated == sum(rated)


def test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    z = np.maximum(rng.normal(size=(400, 6)), 0).round(2)
    labels = rng.integers(0, 3, 400)
    z[labels == 1, 2] += 0.5
    found = scores_of({"m/a": z}, [annotation("x", labels)]).auroc("m/a")
    for latent in range(6):
        for value in range(3):
            a, b = z[labels == value, latent], z[labels != value, latent]
            u = stats.mannwhitneyu(a, b, method="asymptotic").statistic
            assert found[latent, value] == pytest.approx(u / (len(a) * len(b)), abs=1e-12)
    assert found[2].argmax() == 1


def test_latents_that_fire_on_a_value_and_nowhere_else() -> None:
    rng = np.random.default_rng(2)
    shape, hue = rng.integers(0, 6, 500), rng.integers(0, 8, 500)
    z = {site: np.zeros((500, 5), dtype=np.float32) for site in SITES}
    for site in SITES:
        z[site][:, 0] = (shape == 4) * rng.uniform(0.5, 1, 500)
        z[site][:, 1] = (hue == 7) * rng.uniform(0.5, 1, 500) + (hue != 7) * rng.uniform(0, 0.4, 500)
    z["m/a"][:, 2] = hue == 3  # in one model only
    z["m/a"][:, 3], z["n/b"][:, 3] = hue == 1, hue == 2  # another value in each
    follows = scores_of(z, [annotation("shape", shape), annotation("hue", hue)]).follows()
    assert names_and_scores(follows)[0] == ("shape", "shape4", {"m/a": 1.0, "n/b": 1.0})
    assert names_and_scores(follows)[1] == ("hue", "hue7", {"m/a": 1.0, "n/b": 1.0})
    assert names_and_scores(follows)[2] == ("hue", "hue3", {"m/a": 1.0, "n/b": 0.5})
    assert follows[3] is not None
    assert min(follows[3].auroc.values()) < 0.7
    assert follows[4] is None  # never fires
    assert [found.best for found in follows[:4] if found] == [
        {"m/a": "shape=shape4", "n/b": "shape=shape4"},
        {"m/a": "hue=hue7", "n/b": "hue=hue7"},
        {"m/a": "hue=hue3"},
        {"m/a": "hue=hue1", "n/b": "hue=hue2"},
    ]
    assert [found.purity["m/a"] for found in follows if found][:3:2] == [1.0, 1.0]
    assert follows[2].purity == {"m/a": 1.0, "n/b": None}
    assert follows[1].purity["n/b"] == pytest.approx((hue == 7).mean(), abs=0.01)  # it fires nearly always


def test_the_smaller_of_two_models_decides(rate_all: None) -> None:
    # one model follows value 0 to perfection and the other hardly, both follow value 1 well: value 1 it is
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 100)
    sharp = np.select([labels == 0, labels == 1], [2.0, 1.0], 0.0) + rng.uniform(0, 0.1, 300)
    other = np.select([labels == 0, labels == 1], [0.0, 1.0], 0.0) + rng.uniform(0, 0.1, 300)
    (found,) = scores_of({"m/a": sharp[:, None], "n/b": other[:, None]}, [annotation("x", labels)]).follows()
    assert found is not None
    # m/a: value 0 above all others: 1; value 1 above half of the others: ½.  n/b: value 1: 1; value 0 about ¼.
    assert (found.value, found.auroc) == ("x1", {"m/a": 0.5, "n/b": 1.0})


def test_labels_of_chance_are_not_followed() -> None:
    rng = np.random.default_rng(5)
    z = {site: np.maximum(rng.normal(size=(500, 64)) - 1, 0).astype(np.float32) for site in SITES}
    scores = scores_of(z, [annotation(name, rng.integers(0, 6, 500)) for name in "abcde"])
    table = np.stack([scores.auroc(site) for site in SITES])
    assert table.shape == (2, 64, 30)
    assert abs(table.mean() - 0.5) < 0.005
    # the standard error of an AUROC of 83 images against 417 is about √(501 / (12 · 83 · 417)) = .035, less with ties
    assert abs(table.std() - 0.03) < 0.01
    follows = [found for found in scores.follows() if found]
    assert len(follows) == 64
    assert max(min(found.auroc.values()) for found in follows) < 0.65  # best of 30: optimistic, and yet far from .9
    assert np.mean([min(found.auroc.values()) for found in follows]) > 0.52


def test_values_of_too_few_images_are_not_rated() -> None:
    # value 0 has 9 images, value 1 has 10, value 2 the rest: 0 is left out; of `flag`, 9 images lack value 1
    labels = np.repeat([0, 1, 2], [9, 10, 81])
    flag = np.repeat([0, 1], [9, 91])
    z = {"m/a": (labels == 0)[:, None].astype(np.float32)}
    scores = scores_of(z, [annotation("x", labels), annotation("flag", flag)])
    assert np.isnan(scores.auroc("m/a")).tolist() == [[True, False, False, True, True]]
    assert scores.n_values == 2
    (found,) = scores.follows()
    assert found is not None
    assert found.factor == "x"
    assert found.value != "x0"
    alone = scores_of(z, [annotation("flag", flag)])
    assert (alone.n_values, alone.follows()) == (0, [None])


def test_unknown_images_do_not_count() -> None:
    # the latent fires on ten images with value 1 and on all that nothing is known about
    labels = np.repeat([0, 1, -1], [20, 10, 30])
    z = {"m/a": (labels != 0)[:, None].astype(np.float32)}
    assert names_and_scores(scores_of(z, [annotation("x", labels)]).follows()) == [("x", "x1", {"m/a": 1.0})]
    nothing = [Annotation("x", np.full(60, -1), []), annotation("y", labels)]
    assert names_and_scores(scores_of(z, nothing).follows()) == [("y", "y1", {"m/a": 1.0})]
    assert scores_of(z, nothing[:1]).follows() == [None]


def test_rows_find_their_image() -> None:
    # rows come in another order than images, and not all images come
    images = np.random.default_rng(0).permutation(500)[:200]
    labels = np.arange(500) % 2
    z = {"m/a": (labels[images] == 1)[:, None].astype(np.float32)}
    assert names_and_scores(scores_of(z, [annotation("x", labels)], images, chunk=33).follows()) == [
        ("x", "x1", {"m/a": 1.0})
    ]


def test_nothing_added_and_nothing_known() -> None:
    assert FactorScores(SITES, 3, []).follows() == [None] * 3
    assert FactorScores(SITES, 3, [annotation("x", np.arange(4))]).follows() == [None] * 3
    z = {"m/a": np.ones((30, 2), dtype=np.float32)}
    assert scores_of(z, []).follows() == [None] * 2
    silent = {"m/a": np.zeros((30, 2), dtype=np.float32)}
    scores = scores_of(silent, [annotation("x", np.arange(30) % 2)])
    assert scores.auroc("m/a").tolist() == [[0.5, 0.5]] * 2
    assert scores.follows() == [None] * 2


def test_only_fires_are_kept() -> None:
    scores = FactorScores(("m/a",), 8168, [annotation("x", np.arange(1000) % 3)])
    values = torch.tensor([[1.0, 0.0, 0.5]]).expand(1000, 3).contiguous()
    scores.add({"m/a": Codes(values, torch.arange(3).expand(1000, 3).contiguous())}, np.arange(1000))
    (fires,) = scores._fires["m/a"]
    assert sum(part.nbytes for part in fires) == 2000 * (4 + 4 + 4)


def test_annotations_of_fewer_images() -> None:
    z = {"m/a": np.ones((30, 2), dtype=np.float32)}
    with pytest.raises(UsageError, match=r"annotation 'x' has 20 values, none for image 29 \(give the annotations of"):
        scores_of(z, [annotation("x", np.arange(20))])


def test_an_image_of_several_rows_has_the_largest_z_by_hand(rate_all: None) -> None:
    # rows of images 4, 4 | 1, 1, 1 | 0: largest z are 2, 5 and 1; value b is that of image 1 alone
    z = np.array([2, 0, 5, 1, 5, 1], dtype=np.float32)[:, None]
    known = [annotation("x", np.array([0, 1, 0, 0, 0]))]
    scores = scores_of({"m/a": z}, known, np.array([4, 4, 1, 1, 1, 0]))
    assert scores.n_images == 3
    assert scores.auroc("m/a").tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("places", [2, 5])
def test_several_rows_of_an_image_are_as_one_with_their_largest_z(places: int) -> None:
    rng = np.random.default_rng(places)
    z = {site: np.maximum(rng.integers(-9, 6, (80, places, 5)), 0).astype(np.float32) for site in SITES}
    images = rng.permutation(100)[:80]
    known = [annotation("x", rng.integers(0, 3, 100))]
    by_row = {site: values.reshape(-1, 5) for site, values in z.items()}
    several = scores_of(by_row, known, images.repeat(places), chunk=10 * places)
    one = scores_of({site: values.max(1) for site, values in z.items()}, known, images)
    for site in SITES:
        np.testing.assert_array_equal(several.auroc(site), one.auroc(site))
    assert several.follows() == one.follows()
    assert several.n_images == one.n_images == 80


class TestAgreement:
    def test_by_hand(self, rate_all: None) -> None:
        # four latents, each fires on one value in each model:
        #   m/a:  x0 x1 x1 x2      n/b:  x0 x1 x2 x2      the same value in three of four
        # by chance: p_a = (¼, ½, ¼), p_b = (¼, ¼, ½): ¼·¼ + ½·¼ + ¼·½ = 5/16
        labels = np.repeat([0, 1, 2], 20)
        z = {
            "m/a": np.stack([labels == v for v in (0, 1, 1, 2)], 1),
            "n/b": np.stack([labels == v for v in (0, 1, 2, 2)], 1),
        }
        scores = scores_of({site: values.astype(np.float32) for site, values in z.items()}, [annotation("x", labels)])
        assert scores.agreement([0, 1, 2, 3]) == (0.75, pytest.approx(5 / 16), 4)
        assert scores.agreement([0, 1]) == (1.0, pytest.approx(0.5), 2)

    def test_latents_that_are_silent_in_a_model_are_left_out(self, rate_all: None) -> None:
        labels = np.repeat([0, 1], 20)
        z = {"m/a": np.stack([labels == 0, labels == 1], 1).astype(np.float32), "n/b": np.zeros((40, 2), np.float32)}
        z["n/b"][labels == 0, 0] = 1
        assert scores_of(z, [annotation("x", labels)]).agreement([0, 1]) == (1.0, 1.0, 1)

    def test_latents_of_unknown_images_follow_nothing(self, rate_all: None) -> None:
        labels = np.repeat([0, 1, -1], 20)
        z = {site: (labels == -1)[:, None].astype(np.float32) for site in SITES}
        scores = scores_of(z, [annotation("x", labels)])
        assert scores.agreement([0]).n == 0
        (found,) = scores.follows()
        assert found is not None
        assert (found.best, found.purity) == ({}, {"m/a": None, "n/b": None})

    def test_numbers_of_latents_are_checked(self) -> None:
        with pytest.raises(UsageError, match=r"latents -1 to 0 were given: they are 0 to 2"):
            FactorScores(SITES, 3, []).agreement([0, -1])

    def test_nothing_to_compare(self) -> None:
        labels = np.arange(60) % 2
        one = scores_of({"m/a": np.ones((60, 2), dtype=np.float32)}, [annotation("x", labels)])
        two = scores_of({site: np.ones((60, 2), dtype=np.float32) for site in SITES}, [annotation("x", labels)])
        for found in (one.agreement([0, 1]), two.agreement([]), FactorScores(SITES, 3, []).agreement([0])):
            assert np.isnan(found.share)
            assert found.n == 0


class TestBound:
    def z(self, labels: np.ndarray, follows: bool, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        z = {site: np.maximum(rng.normal(size=(400, 16)) - 0.5, 0).astype(np.float32) for site in SITES}
        for values in z.values():
            values[:, 3] += 2 * (follows & (labels == 1))
        return z

    def test_planted_and_null(self) -> None:
        beyond = 0
        for seed in range(12):
            labels = np.random.default_rng(seed).integers(0, 4, 400)
            for follows in (True, False):
                scores = scores_of(self.z(labels, follows, seed), [annotation("x", labels)])
                bound, best = scores.bound(20, seed), [found for found in scores.follows() if found]
                above = [k for k, found in enumerate(best) if min(found.auroc.values()) > bound]
                if follows:
                    assert 3 in above
                else:
                    beyond += bool(above)
        assert beyond <= 3  # about one in 21

    def test_is_the_largest_of_what_permuted_labels_give(self) -> None:
        labels, other = np.random.default_rng(0).integers(0, 3, 400), np.random.default_rng(1).integers(0, 2, 400)
        z, draw, largest = self.z(labels, True, 0), np.random.default_rng((7, 4)), 0.0
        for _ in range(3):
            order = draw.permutation(400)
            permuted = scores_of(z, [annotation("x", labels[order]), annotation("y", other[order])])
            largest = max(largest, np.min([permuted.auroc(site) for site in SITES], axis=0).max())
        found = scores_of(z, [annotation("x", labels), annotation("y", other)]).bound(3, 7)
        assert found == pytest.approx(largest, abs=1e-12)

    def test_nothing_rated(self) -> None:
        assert np.isnan(FactorScores(SITES, 3, []).bound())
