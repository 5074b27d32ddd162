"""Classes with images paired at random: what is exchanged, what stays, and what is left of planted co-firing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import usae_probe.probes.nulls as nulls_module
from usae_probe.config import ProbesConfig
from usae_probe.images import Annotation
from usae_probe.probes import CATEGORIES, FiringCounts
from usae_probe.probes.firing import Fires
from usae_probe.probes.nulls import KeptFires, NullCounts
from usae_probe.probes.universality import classify

A, B, C = "m/a", "n/b", "o/c"


def fires_of(fired: np.ndarray) -> Fires:
    """Dense booleans [rows, n] as fires of strength .5."""
    row, latent = (torch.from_numpy(part) for part in np.nonzero(fired))
    return Fires(row, latent, torch.full((len(row),), 0.5))


def kept(
    fired: Mapping[str, np.ndarray], image: np.ndarray, token: np.ndarray | None = None, chunk: int | None = None
) -> KeptFires:
    """What an evaluation keeps of dense firing, {site: [rows, n] bool}; chunks of whole images."""
    n_rows, n = next(iter(fired.values())).shape
    token = np.zeros(n_rows, dtype=np.int64) if token is None else token
    found = KeptFires(tuple(fired), n)
    for start in range(0, n_rows, chunk or n_rows):
        part = slice(start, start + (chunk or n_rows))
        found.add({site: fires_of(z[part]) for site, z in fired.items()}, len(image[part]), image[part], token[part])
    return found


def dense(fires: Fires, rows: int, n: int) -> np.ndarray:
    z = np.zeros((rows, n), dtype=bool)
    z[fires.row.numpy(), fires.latent.numpy()] = True
    return z


class Seen(FiringCounts):
    """Counts that keep what was added to them; `made` lists them."""

    made: list[Seen]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fired: dict[str, list[np.ndarray]] = {site: [] for site in self.sites}
        self.image: list[np.ndarray] = []
        self.token: list[np.ndarray] = []
        Seen.made.append(self)

    def add_fires(
        self,
        fires: Mapping[str, Fires],
        n: int,
        image_index: np.ndarray | None = None,
        token_index: np.ndarray | None = None,
        group: np.ndarray | None = None,
    ) -> None:
        if image_index is not None and token_index is not None:
            for site in self.sites:
                self.fired[site].append(dense(fires[site], n, self.n_latents))
            self.image.append(image_index)
            self.token.append(token_index)
        super().add_fires(fires, n, image_index, token_index, group)

    def rows(self, site: str) -> np.ndarray:
        return np.concatenate(self.fired[site])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    Seen.made = []
    monkeypatch.setattr(nulls_module, "FiringCounts", Seen)
    return Seen.made


def numbered(rows: int) -> np.ndarray:
    """[rows, 16] firing that spells the row's number: every row can be told from all others."""
    return (np.arange(1, rows + 1)[:, None] >> np.arange(16) & 1).astype(bool)


def number_of(fired: np.ndarray) -> np.ndarray:
    return np.asarray((fired * (1 << np.arange(16))).sum(1) - 1)


ROWS_OF_IMAGE = np.random.default_rng(0).integers(1, 5, size=60)
VARYING = np.arange(60).repeat(ROWS_OF_IMAGE)
WITHIN_VARYING = np.concatenate([np.arange(n) for n in ROWS_OF_IMAGE])


class TestWhatIsExchanged:
    def test_single_rows(self, seen: list[Seen]) -> None:
        fired = {site: numbered(300) for site in (A, B, C)}
        kept(fired, np.arange(300) + 9, chunk=100).nulls(ProbesConfig(nulls=4), 1)
        assert len(seen) == 4
        orders = []
        for counts in seen:
            assert counts.drawn is counts  # every row is an image
            assert number_of(counts.rows(A)).tolist() == list(range(300))  # the first site stays where it is
            for site in (B, C):
                order = number_of(counts.rows(site))
                assert sorted(order.tolist()) == list(range(300))  # every row once
                assert (order == np.arange(300)).sum() < 10  # 1 expected
                orders.append(order.tolist())
            np.testing.assert_array_equal(np.concatenate(counts.image), np.arange(300) + 9)
        assert len({tuple(order) for order in orders}) == 8  # another one for every site and pairing

    def test_images_of_as_many_rows_keep_them_together(self, seen: list[Seen]) -> None:
        rows = len(VARYING)
        fired = {site: numbered(rows) for site in (A, B)}
        kept(fired, VARYING, WITHIN_VARYING).nulls(ProbesConfig(nulls=3), 0)
        for counts in seen:
            assert counts.by_place is None
            assert counts.drawn is not counts
            np.testing.assert_array_equal(np.concatenate(counts.token), WITHIN_VARYING)
            assert number_of(counts.rows(A)).tolist() == list(range(rows))
            order = number_of(counts.rows(B))
            assert sorted(order.tolist()) == list(range(rows))
            np.testing.assert_array_equal(WITHIN_VARYING[order], WITHIN_VARYING)  # places stay
            for image in range(60):
                (partner,) = set(VARYING[order[image == VARYING]].tolist())  # the rows of one image, and all of them
                assert ROWS_OF_IMAGE[partner] == ROWS_OF_IMAGE[image]
            assert (VARYING[order] != VARYING).mean() > 0.7

    def test_only_images_with_the_same_label(self, seen: list[Seen]) -> None:
        # labels by image number of the source; −1: unknown, a kind of its own
        image = np.random.default_rng(1).permutation(400)[:200]
        labels = Annotation("class", np.random.default_rng(2).integers(-1, 3, size=400), ["x", "y", "z"])
        found = kept({site: numbered(200) for site in (A, B)}, image).nulls(ProbesConfig(nulls=3), 1, labels=labels)
        assert found is not None
        assert found.within == "class"
        for counts in seen:
            order = number_of(counts.rows(B))
            assert sorted(order.tolist()) == list(range(200))
            np.testing.assert_array_equal(labels.values[image[order]], labels.values[image])
            assert (order != np.arange(200)).mean() > 0.9

    def test_same_label_and_as_many_rows(self, seen: list[Seen]) -> None:
        labels = Annotation("class", np.arange(60) % 3, ["x", "y", "z"])
        rows = len(VARYING)
        kept({site: numbered(rows) for site in (A, B)}, VARYING).nulls(ProbesConfig(nulls=2), 0, labels=labels)
        for counts in seen:
            partner = VARYING[number_of(counts.rows(B))]
            assert sorted(number_of(counts.rows(B)).tolist()) == list(range(rows))
            np.testing.assert_array_equal(partner % 3, VARYING % 3)
            np.testing.assert_array_equal(ROWS_OF_IMAGE[partner], ROWS_OF_IMAGE[VARYING])

    @pytest.mark.parametrize("chunk", [100, 4096])
    def test_marginals_are_kept(self, seen: list[Seen], monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
        monkeypatch.setattr(nulls_module, "_CHUNK", chunk)
        rng = np.random.default_rng(0)
        image, token = np.arange(150).repeat(8), np.tile(np.arange(8), 150)
        fired = {site: rng.random((1200, 12)) < rng.random(12) for site in (A, B, C)}
        true = FiringCounts((A, B, C), 12, draw=np.random.default_rng(0), places=8)
        true.add_fires({site: fires_of(z) for site, z in fired.items()}, 1200, image, token)
        kept(fired, image, token, chunk=240).nulls(ProbesConfig(nulls=2), 8)
        firsts = [counts for counts in seen if counts.image]
        assert len(firsts) == 2
        for counts in firsts:
            assert counts.n_rows == 1200
            assert counts.by_place is not None
            assert true.by_place is not None
            assert counts.drawn.by_place is not None
            np.testing.assert_array_equal(counts.by_place.n, true.by_place.n)
            assert counts.drawn.n_rows == counts.drawn.by_place.n.sum() == 150
            for site in (A, B, C):
                np.testing.assert_array_equal(counts.fires[site], true.fires[site])
                np.testing.assert_array_equal(counts.images[site], true.images[site])
                np.testing.assert_array_equal(counts.by_place.fires[site], true.by_place.fires[site])

    def test_pairings_depend_on_the_seed_alone(self) -> None:
        rng = np.random.default_rng(0)
        common = rng.random((300, 100)) < 0.3
        fired = {site: common & (rng.random(common.shape) < 0.7) for site in (A, B)}

        def found(seed: int, chunk: int) -> NullCounts | None:
            config = ProbesConfig(nulls=5, phi=0.0, q=0.5, seed=seed)
            return kept(fired, np.arange(300), chunk=chunk).nulls(config, 1)

        assert found(0, 300) == found(0, 50)
        assert found(0, 300) != found(1, 300)


class TestWhatIsLeft:
    def test_perfect_co_firing_vanishes(self) -> None:
        rng = np.random.default_rng(0)
        common = rng.random((300, 100)) < rng.uniform(0.05, 0.4, 100)
        fired = {A: common, B: common}
        counts = FiringCounts((A, B), 100)
        counts.add_fires({site: fires_of(z) for site, z in fired.items()}, 300)
        config = ProbesConfig()
        assert (classify(counts, (A, B), config).category == "universal").all()
        found = kept(fired, np.arange(300)).nulls(config, 1)
        assert found is not None
        assert (found.within, found.n_rows, found.n_images) == ("", 300, 300)
        assert len(found.counts["universal"]) == 20
        assert list(found.counts) == list(CATEGORIES)
        assert all(sum(of) == 100 for of in zip(*found.counts.values(), strict=True))
        assert sum(number > 0 for number in found.counts["universal"]) <= 1
        assert max(found.counts["universal"]) <= 1
        assert found.universal == np.mean(found.counts["universal"])
        assert np.mean(found.counts["chance"]) > 98

    @pytest.mark.parametrize("places", [9, 0])
    def test_with_several_rows_per_image_too(self, places: int) -> None:
        # what fires depends on image and place; places = 0: images are taken as if they differed in their rows
        rng = np.random.default_rng(0)
        image, token = np.arange(200).repeat(9), np.tile(np.arange(9), 200)
        common = (rng.random((200, 1, 60)) < 0.3) & (rng.random((200, 9, 60)) < 0.6)
        fired = {site: common.reshape(1800, 60) for site in (A, B)}
        counts = FiringCounts((A, B), 60, draw=np.random.default_rng(0), places=places)
        counts.add_fires({site: fires_of(z) for site, z in fired.items()}, 1800, image, token)
        assert (classify(counts, (A, B), ProbesConfig()).category == "universal").mean() > 0.95
        found = kept(fired, image, token).nulls(ProbesConfig(nulls=8), places)
        assert found is not None
        assert (found.n_rows, found.n_images) == (1800, 200)
        assert sum(number > 0 for number in found.counts["universal"]) <= 1

    def test_what_a_class_explains_is_left_within_classes_alone(self) -> None:
        # latents 0 … 9: each fires for one class of ten in both models; the others follow the image itself
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 10, size=600)
        by_class = labels[:, None] == np.arange(10)
        by_image = rng.random((600, 30)) < 0.2
        both = np.hstack([by_class, by_image])
        store, config = kept({A: both, B: both}, np.arange(600)), ProbesConfig()
        anywhere = store.nulls(config, 1)
        within = store.nulls(config, 1, labels=Annotation("class", labels, [str(i) for i in range(10)]))
        assert anywhere is not None
        assert within is not None
        assert within.within == "class"
        assert set(within.counts["universal"]) == {10}
        assert sum(number > 0 for number in anywhere.counts["universal"]) <= 1


class TestHowMany:
    def made(self, rows: int = 200) -> KeptFires:
        fired = np.random.default_rng(0).random((rows, 5)) < 0.4
        return kept({A: fired, B: fired}, np.arange(rows), chunk=50)

    def test_none(self) -> None:
        assert self.made().nulls(ProbesConfig(nulls=0), 1) is None
        assert KeptFires((A, B), 5).nulls(ProbesConfig(), 1) is None
        assert kept({A: np.ones((50, 3), bool)}, np.arange(50)).nulls(ProbesConfig(), 1) is None

    def test_as_many_as_asked_for(self) -> None:
        found = self.made().nulls(ProbesConfig(nulls=7), 1)
        assert found is not None
        assert {len(numbers) for numbers in found.counts.values()} == {7}

    def test_only_so_many_rows_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nulls_module, "KEPT_ROWS", 120)
        found = self.made().nulls(ProbesConfig(nulls=2), 1)
        assert found is not None
        assert (found.n_rows, found.n_images) == (150, 150)  # parts of whole images until there are enough

    @pytest.mark.parametrize(("most", "expected"), [(2000, 10), (1000, 5), (399, 1), (10, 1)])
    def test_many_rows_are_paired_fewer_times(self, monkeypatch: pytest.MonkeyPatch, most: int, expected: int) -> None:
        monkeypatch.setattr(nulls_module, "_ALL_ROWS", most)
        found = self.made().nulls(ProbesConfig(nulls=12), 1)
        assert found is not None
        assert len(found.counts["dead"]) == expected

    def test_parts_end_where_an_image_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nulls_module, "_CHUNK", 3)
        found = list(nulls_module._parts(np.array([0, 2, 4]), 6))  # images of two rows
        assert found == [slice(0, 4), slice(4, 6)]
        assert list(nulls_module._parts(np.arange(7), 7)) == [slice(0, 3), slice(3, 6), slice(6, 7)]

    def test_to_dict(self) -> None:
        counts = {name: [0, 0, 0] for name in CATEGORIES} | {"universal": [0, 2, 1], "partial": [4, 0, 0]}
        nulls = NullCounts("class", 900, 300, counts)
        assert nulls.universal == 1.0
        found = nulls.to_dict()
        assert (found["within"], found["n_rows"], found["n_images"], found["n"]) == ("class", 900, 300, 3)
        assert (found["universal"], found["partial"]) == ([0, 2, 1], [4, 0, 0])
