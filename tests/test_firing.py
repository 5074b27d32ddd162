"""Streaming counts of firing against dense boolean loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import usae_probe.probes.firing as firing_module
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


class Fixed(np.random.Generator):
    """Draws given numbers."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.numbers = list(numbers)

    def random(self, size: int) -> np.ndarray:  # type: ignore[override]
        taken, self.numbers = self.numbers[:size], self.numbers[size:]
        return np.array(taken)


# two images of two places; by row, what fires in a and in b:
#   image 7: place 0   a: latents 0, 1   b: latent 0
#            place 1   a: latent 0       b: latent 1
#   image 3: place 0   a: none           b: latent 0
#            place 1   a: latent 0       b: latent 0
TWO_BY_TWO = {
    "m/a": Codes(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0], [0.5, 0.0]]), torch.tensor([[0, 1]] * 4)),
    "n/b": Codes(torch.tensor([[1.0, 0.0], [0.0, 4.0], [2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0, 1]] * 4)),
}
IMAGES = np.array([7, 7, 3, 3])


@pytest.mark.parametrize(
    ("numbers", "a", "b", "both"),
    [
        ((0.0, 0.9), [2, 1, 0], [2, 0, 0], [2, 0, 0]),  # rows 0 and 3
        ((0.5, 0.49), [1, 0, 0], [1, 1, 0], [0, 0, 0]),  # rows 1 and 2
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_two_images_of_two_places_by_hand(
    numbers: tuple[float, float], a: list[int], b: list[int], both: list[int], at_once: bool
) -> None:
    counts = FiringCounts(("m/a", "n/b"), 3, draw=Fixed(*numbers))
    for part in [slice(4)] if at_once else [slice(2), slice(2, 4)]:
        counts.add({site: Codes(z[part], at[part]) for site, (z, at) in TWO_BY_TWO.items()}, IMAGES[part])
    assert counts.n_rows == 4
    assert counts.fires["m/a"].tolist() == [3, 1, 0]
    assert counts.fires["n/b"].tolist() == [3, 1, 0]
    assert counts.cofires["m/a", "n/b"].tolist() == [2, 0, 0]  # latent 1: in one image, at two places
    assert counts.images["m/a"].tolist() == [2, 1, 0]
    assert counts.images["n/b"].tolist() == [2, 1, 0]
    assert counts.mean("m/a").tolist() == [4.5 / 4, 0.5, 0.0]
    assert counts.drawn.n_rows == 2
    assert counts.drawn.fires["m/a"].tolist() == a
    assert counts.drawn.fires["n/b"].tolist() == b
    assert counts.drawn.cofires["m/a", "n/b"].tolist() == both


def test_one_row_per_image_is_its_own_draw() -> None:
    counts = FiringCounts(("m/a", "n/b"), 3)
    counts.add(TWO_BY_TWO, np.arange(4))
    assert counts.drawn is counts
    assert counts.images["m/a"].tolist() == [3, 1, 0]


def test_every_place_is_drawn_as_often() -> None:
    # latent t fires at place t of every image: as many drawn rows fire it as drew the place
    counts = FiringCounts(("m/a",), 4, draw=np.random.default_rng(0))
    at = torch.arange(4).repeat(2000)[:, None]
    counts.add({"m/a": Codes(torch.ones(8000, 1), at)}, np.arange(2000).repeat(4))
    assert counts.fires["m/a"].tolist() == counts.images["m/a"].tolist() == [2000] * 4
    assert counts.drawn.fires["m/a"].sum() == counts.drawn.n_rows == 2000
    assert abs(counts.drawn.fires["m/a"] - 500).max() < 4 * 20  # √(2000 · ¼ · ¾) = 19


def test_images_and_draws_need_no_memory_either() -> None:
    counts = FiringCounts(("m/a", "n/b"), 3, draw=np.random.default_rng(0))
    for _ in range(3):
        counts.add(TWO_BY_TWO, IMAGES)
    arrays = [*counts.images.values(), *counts.drawn.fires.values(), *counts.drawn.cofires.values()]
    assert [array.shape for array in arrays] == [(3,)] * 5
    assert counts.drawn.n_rows == 6


PLACES = 3


def of_images(seed: int, images: int, n: int, k: int) -> tuple[dict[str, Codes], np.ndarray, np.ndarray, np.ndarray]:
    """Codes of three rows per image, the images and places of the rows, and a group of four for every image."""
    group = np.random.default_rng(seed).integers(4, size=images)
    image = np.arange(images).repeat(PLACES) + 50
    return drawn(images * PLACES, n, k, seed), image, np.tile(np.arange(PLACES), images), group.repeat(PLACES)


def labelled(codes: dict[str, Codes], label: np.ndarray, labels: int, n: int, tau: float) -> tuple[dict, dict]:
    """Fires by site and co-fires by pair, [labels, n], row by row and latent by latent."""
    z = {site: oracles.spread(code, n) for site, code in codes.items()}
    fires = {site: np.zeros((labels, n), int) for site in SITES}
    cofires = {pair: np.zeros((labels, n), int) for pair in combinations(SITES, 2)}
    for row, at in enumerate(label.tolist()):
        for latent in range(n):
            for site in SITES:
                fires[site][at, latent] += z[site][row, latent] > tau
            for a, b in cofires:
                cofires[a, b][at, latent] += z[a][row, latent] > tau and z[b][row, latent] > tau
    return fires, cofires


def part_of(codes: dict[str, Codes], part: slice | np.ndarray) -> dict[str, Codes]:
    return {site: Codes(*(values[part] for values in code)) for site, code in codes.items()}


class TestByLabel:
    """Counts by place and by group of images, Σ z², Σ z_a z_b, and the correlation of the codes."""

    @settings(deadline=None, max_examples=30)
    @given(
        images=st.integers(1, 12),
        n=st.integers(1, 7),
        data=st.data(),
        tau=st.sampled_from([0.0, 0.3, 1.0]),
        seed=st.integers(0, 2**20),
    )
    def test_any_chunks_give_what_loops_give(
        self, images: int, n: int, data: st.DataObject, tau: float, seed: int
    ) -> None:
        k, chunk = data.draw(st.integers(1, n)), data.draw(st.integers(1, images)) * PLACES
        codes, image, place, group = of_images(seed, images, n, k)
        counts = FiringCounts(SITES, n, tau, np.random.default_rng(seed), places=PLACES, groups=4)
        for start in range(0, len(image), chunk):
            part = slice(start, start + chunk)
            counts.add(part_of(codes, part), image[part], place[part], group[part])
        assert counts.by_place is not None
        assert counts.by_group is not None
        for by, label, labels in ((counts.by_place, place, PLACES), (counts.by_group, group, 4)):
            fires, cofires = labelled(codes, label, labels, n, tau)
            np.testing.assert_array_equal(by.n, np.bincount(label, minlength=labels))
            for site in SITES:
                np.testing.assert_array_equal(by.fires[site], fires[site])
                np.testing.assert_array_equal(by.fires[site].sum(0), counts.fires[site])
            for pair, expected in cofires.items():
                np.testing.assert_array_equal(by.cofires[pair], expected)
                np.testing.assert_array_equal(by.cofires[pair].sum(0), counts.cofires[pair])
        z = {site: np.where((dense := oracles.spread(codes[site], n)) > tau, dense, 0.0) for site in SITES}
        for site in SITES:
            np.testing.assert_allclose(counts.squares[site], (z[site] ** 2).sum(0), atol=1e-9)
        for (a, b), products in counts.products.items():
            np.testing.assert_allclose(products, (z[a] * z[b]).sum(0), atol=1e-6)

    def test_the_drawn_rows_by_place(self) -> None:
        codes, image, place, group = of_images(3, 200, 6, 3)
        counts = FiringCounts(SITES, 6, draw=np.random.default_rng(7), places=PLACES, groups=4)
        for start in range(0, 600, 60):
            part = slice(start, start + 60)
            counts.add(part_of(codes, part), image[part], place[part], group[part])
        rows = np.arange(200) * PLACES + (np.random.default_rng(7).random(200) * PLACES).astype(int)
        found = counts.drawn.by_place
        assert found is not None
        assert counts.drawn.by_group is None
        np.testing.assert_array_equal(found.n, np.bincount(place[rows], minlength=PLACES))
        assert (found.n > 40).all()
        fires, cofires = labelled(part_of(codes, rows), place[rows], PLACES, 6, 0.0)
        for site in SITES:
            np.testing.assert_array_equal(found.fires[site], fires[site])
        for pair, expected in cofires.items():
            np.testing.assert_array_equal(found.cofires[pair], expected)

    def test_by_hand(self) -> None:
        # TWO_BY_TWO with places 0 1 0 1 and both images in group 1; a fires latent 0 in rows 0, 1, 3, b in 0, 2, 3
        counts = FiringCounts(("m/a", "n/b"), 3, draw=Fixed(0.0, 0.9), places=2, groups=3)
        counts.add(TWO_BY_TWO, IMAGES, np.array([0, 1, 0, 1]), np.array([1, 1, 1, 1]))
        assert counts.by_place is not None
        assert counts.by_group is not None
        assert counts.drawn.by_place is not None
        pair = ("m/a", "n/b")
        assert counts.by_place.n.tolist() == [2, 2]
        assert counts.by_place.fires["m/a"].tolist() == [[1, 1, 0], [2, 0, 0]]
        assert counts.by_place.fires["n/b"].tolist() == [[2, 0, 0], [1, 1, 0]]
        assert counts.by_place.cofires[pair].tolist() == [[1, 0, 0], [1, 0, 0]]
        assert counts.by_group.n.tolist() == [0, 4, 0]
        assert counts.by_group.fires["m/a"].tolist() == [[0, 0, 0], [3, 1, 0], [0, 0, 0]]
        assert counts.by_group.cofires[pair].tolist() == [[0, 0, 0], [2, 0, 0], [0, 0, 0]]
        assert counts.drawn.by_place.n.tolist() == [1, 1]  # rows 0 and 3
        assert counts.drawn.by_place.cofires[pair].tolist() == [[1, 0, 0], [1, 0, 0]]
        # z of latent 0: a 1, 3, 0, .5; b 1, 0, 2, 1: Σ z_a² = 1 + 9 + .25, Σ z_a z_b = 1 + .5
        assert counts.squares["m/a"][0] == 10.25
        assert counts.products[pair].tolist() == [1.5, 0.0, 0.0]
        # r = (4 · 1.5 − 4.5 · 4) / √((4 · 10.25 − 4.5²)(4 · 6 − 4²)) = −12 / √(20.75 · 8) = −.9314
        assert counts.correlation(pair)[0] == pytest.approx(-12 / np.sqrt(20.75 * 8), rel=1e-12)
        # latent 1: a 2 in row 0, b 4 in row 1: r = (0 − 2 · 4) / √((16 − 4)(64 − 16)) = −1/3
        assert counts.correlation(pair)[1] == pytest.approx(-1 / 3, rel=1e-12)
        assert np.isnan(counts.correlation(pair)[2])

    def test_without_labels_none_are_kept(self) -> None:
        counts = FiringCounts(("m/a", "n/b"), 3)
        counts.add(TWO_BY_TWO)
        assert (counts.by_place, counts.by_group) == (None, None)
        one_place = FiringCounts(("m/a", "n/b"), 3, places=1)
        assert one_place.by_place is None  # every row is an image


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(2, 60),
    n=st.integers(1, 6),
    data=st.data(),
    tau=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**20),
)
def test_correlation_is_pearsons(rows: int, n: int, data: st.DataObject, tau: float, seed: int) -> None:
    codes, chunk = drawn(rows, n, data.draw(st.integers(1, n)), seed), data.draw(st.integers(1, rows))
    counts = FiringCounts(SITES, n, tau)
    for start in range(0, rows, chunk):
        counts.add(part_of(codes, slice(start, start + chunk)))
    z = {site: np.where((dense := oracles.spread(codes[site], n)) > tau, dense, 0.0) for site in SITES}
    for pair in counts.pairs:
        found = counts.correlation(pair)
        for k in range(n):
            a, b = (z[site][:, k] for site in pair)
            if a.std() > 0 and b.std() > 0:
                assert found[k] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
            else:
                assert np.isnan(found[k])


def test_only_the_pairs_that_are_asked_for() -> None:
    codes, image, place, group = of_images(0, 30, 5, 3)
    some: list[tuple[str, str]] = [("m/a", "o/c")]
    counts = FiringCounts(SITES, 5, draw=np.random.default_rng(0), pairs=some, places=PLACES, groups=4)
    whole = FiringCounts(SITES, 5, draw=np.random.default_rng(0), places=PLACES, groups=4)
    for one in (counts, whole):
        one.add(codes, image, place, group)
    assert list(counts.cofires) == list(counts.products) == list(counts.drawn.cofires) == some
    np.testing.assert_array_equal(counts.cofires[some[0]], whole.cofires[some[0]])
    assert counts.by_group is not None
    assert whole.by_group is not None
    assert set(counts.by_group.fires) == {"m/a", "o/c"}  # a site that is in no pair needs no table
    np.testing.assert_array_equal(counts.by_group.cofires[some[0]], whole.by_group.cofires[some[0]])
    for site in SITES:  # but it is counted
        np.testing.assert_array_equal(counts.fires[site], whole.fires[site])
        np.testing.assert_array_equal(counts.images[site], whole.images[site])
    alone = FiringCounts(SITES, 5, pairs=[], groups=4)
    alone.add(codes, group=group)
    assert alone.cofires == {}
    assert alone.fires["n/b"].tolist() == whole.fires["n/b"].tolist()


@pytest.mark.parametrize("scratch", [1, 7, 10, 64])
def test_blocks_of_rows_give_the_same(monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    codes, image, place, group = of_images(1, 40, 7, 4)

    def counted() -> FiringCounts:
        counts = FiringCounts(SITES, 7, 0.2, np.random.default_rng(0), places=PLACES, groups=4)
        for start in (0, 60):
            part = slice(start, start + 60)
            counts.add(part_of(codes, part), image[part], place[part], group[part])
        return counts

    whole = counted()
    monkeypatch.setattr(firing_module, "_SCRATCH", scratch)
    blocks = counted()
    assert len(whole._scratch) == 60 * 7
    assert len(blocks._scratch) == max(1, scratch // 7) * 7
    for pair in whole.pairs:
        np.testing.assert_array_equal(blocks.cofires[pair], whole.cofires[pair])
        np.testing.assert_allclose(blocks.products[pair], whole.products[pair], rtol=1e-12)
        np.testing.assert_array_equal(blocks.drawn.cofires[pair], whole.drawn.cofires[pair])
        for one, same in ((blocks.by_place, whole.by_place), (blocks.by_group, whole.by_group)):
            assert one is not None
            assert same is not None
            np.testing.assert_array_equal(one.cofires[pair], same.cofires[pair])
