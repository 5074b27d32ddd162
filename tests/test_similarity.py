"""Debiased CKA and mutual nearest neighbours against explicit n×n matrices and loops, float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from usae_probe.buffer import ActivationBuffer
from usae_probe.errors import SiteError, UsageError
from usae_probe.probes.similarity import Similarity, debiased_cka, mutual_knn, similarity

SITES = ["m/a", "n/b", "o/c"]


def hsic(kernel: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, equation 5."""
    n, k, l = len(kernel), kernel.copy(), other.copy()  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3)))


def cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


def biased_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.square(x.T @ y).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))


def cosines(x: np.ndarray) -> list[dict[int, float]]:
    """Of each row with every other, one at a time, of clamped values."""
    x = x.astype(np.float64)
    limit = sum(float(np.quantile(np.abs(row), 0.95)) for row in x) / len(x)
    x = np.minimum(np.maximum(x, -limit), limit)
    rows = range(len(x))
    return [
        {j: float(x[i] @ x[j]) / math.sqrt(float(x[i] @ x[i]) * float(x[j] @ x[j])) for j in rows if j != i}
        for i in rows
    ]


def neighbours(x: np.ndarray, k: int) -> list[set[int]]:
    """k nearest rows of each."""
    return [set(sorted(near, key=lambda j: -near[j])[:k]) for near in cosines(x)]


def tied(x: np.ndarray, k: int) -> bool:
    """Whether the k-th and the next row are equally near to some row, clamped to the same corner, say."""
    ranked = [sorted(near.values(), reverse=True) for near in cosines(x)]
    return any(k < len(near) and near[k - 1] - near[k] < 1e-9 for near in ranked)


def knn(x: np.ndarray, y: np.ndarray, k: int) -> float:
    pairs = zip(neighbours(x, k), neighbours(y, k), strict=True)
    return sum(len(of_x & of_y) for of_x, of_y in pairs) / (k * len(x))


def alike(n: int, shared: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """m/a and n/b share causes; o/c has its own."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, 4)) * shared
    rows = {site: causes @ rng.normal(size=(4, d)) + rng.normal(size=(n, d)) for site, d in (("m/a", 9), ("n/b", 6))}
    return rows | {"o/c": rng.normal(size=(n, 12)) + 2}


def made(path: Path, rows: dict[str, np.ndarray], **more: Any) -> ActivationBuffer:
    more = {"dtype": "float32", "holdout": 0.5, "validation": 0.0, "shard_images": 32} | more
    return ActivationBuffer.from_arrays(rows, path / "acts", **more)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(4, 40), d=st.integers(1, 50), seed=st.integers(0, 2**20), offset=st.sampled_from([0.0, 3.0, 100.0])
)
def test_cka_equals_the_formula(n: int, d: int, seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = x[:, :1] + rng.normal(size=(n, 7))
    assert debiased_cka(x + offset, y) == pytest.approx(cka(x, y), abs=1e-6)
    assert debiased_cka(y, x + offset) == pytest.approx(debiased_cka(x + offset, y), abs=1e-12)


def test_cka_of_float32_rows_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 8)) + 1000).astype(np.float32)
    y = (x[:, :3] - 1000 + rng.normal(size=(50, 3))).astype(np.float32)
    exact = x.astype(np.float64) - 1000
    assert debiased_cka(x, y) == pytest.approx(cka(exact, y), abs=1e-6)
    assert debiased_cka(x, y) > 0.2


@settings(deadline=None, max_examples=30)
@given(n=st.integers(3, 30), d=st.integers(3, 20), k=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_mutual_knn_equals_the_loops(n: int, d: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) ** 3 + 0.5  # outliers, so that clamping matters
    y = x @ rng.normal(size=(d, 5)) + rng.normal(size=(n, 5))
    assume(not tied(x, k) and not tied(y, k))  # of rows that are equally near some are drawn
    assert mutual_knn(x, y, k) == pytest.approx(knn(x, y, min(k, n - 1)), abs=1e-12)


def test_mutual_knn_of_more_rows_than_a_chunk() -> None:
    rows = alike(1100)
    x, y = (rows[site] for site in SITES[:2])
    near = []
    for values in (x, y):
        limit = np.quantile(np.abs(values), 0.95, axis=1).mean()
        unit = np.clip(values, -limit, limit)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        near.append(np.argsort(-(unit @ unit.T - 9 * np.eye(1100)), axis=1)[:, :10])
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)])
    assert mutual_knn(x, y) == pytest.approx(expected, abs=1e-12)


def test_cka_by_hand() -> None:
    # n = 4, x = (1, 1, −1, −1), y = (1, −1, 1, −1): k_ij = x_i x_j, its diagonal zeroed:
    #   K: rows (0, 1, −1, −1), (1, 0, −1, −1), (−1, −1, 0, 1), (−1, −1, 1, 0): every row sums to −1, all of it to −4
    #   L likewise with +1 at (1,3), (2,4): every row sums to −1, all of it to −4
    # tr KL = Σ k_ij l_ij over 12 places: +1 · −1 at the 4 places of x's pairs, −1 · +1 at the 4 of y's pairs,
    #   −1 · −1 at the other 4: −4 − 4 + 4 = −4;  1ᵀKL1 = 4 · (−1)(−1) = 4
    # HSIC(K, L) · 4 · 1 = −4 + (−4)(−4) / (3 · 2) − 2 · 4 / 2 = −4 + 8/3 − 4 = −16/3
    # HSIC(K, K) · 4 · 1 = 12 + 16/6 − 4 = 32/3, and so for L: CKA = −(16/3) / (32/3) = −1/2
    x, y = np.array([[1.0], [1], [-1], [-1]]), np.array([[1.0], [-1], [1], [-1]])
    assert debiased_cka(x, y) == pytest.approx(-0.5)
    assert debiased_cka(x, -3 * x + 7) == pytest.approx(1.0)
    assert cka(x, y) == pytest.approx(-0.5)


def circle(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_mutual_knn_by_hand() -> None:
    # rows on the unit circle: cosines follow the angles between them. Values are clamped to ±.90 or ±.88 (of a row of
    # two the .95-quantile is .95 · larger + .05 · smaller), which turns no row by more than 2 degrees.
    # x: 0, 10, 31, 60, 100 degrees: the nearest of each: 1, 0, 1 (21 away), 2 (29), 3 (40); of two: with 2, 2, 3, 4, 2
    # y: 0, 10, 49, 65, 25 degrees: the nearest of each: 1, 0, 3 (16 away), 2 (16), 1 (15); of two: with 4, 4, 4, 4, 2
    # k = 1: rows 0, 1 and 3 agree: 3 of 5
    # k = 2: {1,2} {0,2} {1,3} {2,4} {3,2} and {1,4} {0,4} {3,4} {2,4} {1,2} have 1 + 1 + 1 + 2 + 1 = 6 of 10 in common
    x, y = circle(0, 10, 31, 60, 100), circle(0, 10, 49, 65, 25)
    assert mutual_knn(x, y, k=1) == pytest.approx(3 / 5)
    assert mutual_knn(x, y, k=2) == pytest.approx(6 / 10)
    assert mutual_knn(x, y, k=4) == mutual_knn(x, y, k=10) == 1.0  # everyone is a neighbour


def test_outliers_are_clamped() -> None:
    # 40 dimensions with one huge value per row, at the same place for all: unclamped, all rows point there
    x = np.random.default_rng(0).normal(size=(60, 40))
    huge = x.copy()
    huge[:, 0] = 1e6 * np.random.default_rng(1).uniform(1, 2, size=60)
    assert mutual_knn(x, huge, 5) > 0.7
    assert mutual_knn(x, huge, 5) == pytest.approx(knn(x, huge, 5))


def test_cka_does_not_see_rotation_scale_or_shift() -> None:
    rows = alike(60)
    x, y = rows["m/a"], rows["n/b"]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0]
    for other in (x @ turn, 1e-4 * x, -1e4 * x, x + 50):
        assert debiased_cka(other, y) == pytest.approx(debiased_cka(x, y), abs=1e-9)
    wide = np.concatenate([x, np.zeros((60, 100))], axis=1)  # d > n
    assert debiased_cka(wide, y) == pytest.approx(debiased_cka(x, y), abs=1e-9)
    assert debiased_cka(x @ np.diag([9.0, *[1.0] * 8]), y) != pytest.approx(debiased_cka(x, y), abs=1e-3)


def test_independent_wide_rows_are_unlike_once_debiased() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        x, y = rng.normal(size=(40, 300)), rng.normal(size=(40, 200))
        assert biased_cka(x, y) > 0.7
        found.append(debiased_cka(x, y))
    assert abs(np.mean(found)) < 0.03
    assert max(np.abs(found)) < 0.15


def test_identical_rows() -> None:
    x = alike(50)["m/a"]
    assert debiased_cka(x, x) == pytest.approx(1.0)
    assert mutual_knn(x, x) == mutual_knn(x, 4.0 * x) == 1.0
    equally_near = np.eye(10)
    assert mutual_knn(equally_near, equally_near, 5) == 1.0


def test_rows_that_are_equally_near_do_not_agree_by_their_numbers() -> None:
    """Rows of zeros are as near to one row as to the next: two sites with many of them have nothing in common so."""
    rng = np.random.default_rng(0)
    x, y = (rng.exponential(size=(400, 12)) * (rng.random((400, 1)) < 0.3) for _ in range(2))
    assert mutual_knn(x, y) == pytest.approx(10 / 399, abs=0.01)  # chance


def test_what_does_not_vary_is_nan() -> None:
    x, same = alike(20)["m/a"], np.full((20, 3), 0.1)
    assert math.isnan(debiased_cka(x, same))
    assert math.isnan(debiased_cka(same, same))
    assert math.isnan(mutual_knn(x, same))
    only_one = np.zeros((20, 3))
    only_one[7] = 1.0
    assert math.isnan(debiased_cka(x, only_one))  # HSIC leaves out the diagonal: one row alone is 0/0
    one_value = np.zeros((20, 50))
    one_value[np.arange(20), np.arange(20)] = 1.0  # fewer than 5 % of each row: clamped to ±0
    assert math.isnan(mutual_knn(x, one_value))


def test_shapes_are_demanded() -> None:
    x = np.ones((3, 2))
    with pytest.raises(UsageError, match=r"debiased CKA was given arrays of shape \[3, 2\] and \[3, 2\] .*n ≥ 4"):
        debiased_cka(x, x)
    with pytest.raises(UsageError, match=r"\[5, 2\] and \[4, 2\]"):
        debiased_cka(np.ones((5, 2)), np.ones((4, 2)))
    with pytest.raises(UsageError, match=r"nearest neighbours was given arrays of shape \[4\] and \[4, 2\]"):
        mutual_knn(np.ones(4), np.ones((4, 2)))
    with pytest.raises(UsageError, match=r"k=0 .*k above 0"):
        mutual_knn(x, x, 0)


def test_sites_of_a_buffer(tmp_path: Path) -> None:
    buffer = made(tmp_path, alike(300))
    found = similarity(buffer, SITES)
    assert (found.n_images, found.k, found.nulls) == (150, 10, 20)
    rows = buffer.read("holdout").values
    for a in SITES:
        for b in SITES:
            assert found.cka[a][b] == pytest.approx(cka(rows[a], rows[b]), abs=1e-6)
            assert found.mutual_knn[a][b] == pytest.approx(knn(rows[a], rows[b], 10), abs=1e-12)
            for matrix in found[3:]:
                assert matrix[a][b] == pytest.approx(matrix[b][a], nan_ok=True)
        assert math.isnan(found.cka_null[a][a])
        assert math.isnan(found.mutual_knn_null[a][a])
    assert found.cka["m/a"]["n/b"] > 0.2 > 4 * found.cka_null["m/a"]["n/b"]
    assert found.mutual_knn["m/a"]["n/b"] > 2 * found.mutual_knn_null["m/a"]["n/b"]
    assert abs(found.cka["m/a"]["o/c"]) < 0.05
    chance = 10 / 149
    for a, b in (("m/a", "n/b"), ("m/a", "o/c"), ("n/b", "o/c")):
        assert chance < found.mutual_knn_null[a][b] < 1.3 * chance  # the largest of 20
    assert found.mutual_knn["m/a"]["o/c"] < 1.3 * chance


def test_nulls_are_those_of_rows_that_were_shuffled(tmp_path: Path) -> None:
    """Without the short cuts: the rows of the second site in another order, everything anew."""
    buffer = made(tmp_path, alike(80))
    rows = buffer.read("holdout").values
    rng = np.random.default_rng(3)
    rng.random(40)  # one row of each image
    rng.choice(40, 40, replace=False)  # which images
    orders = [rng.permutation(40) for _ in range(4)]
    found = similarity(buffer, SITES, k=5, nulls=4, seed=3)
    for a, b in (("m/a", "n/b"), ("m/a", "o/c")):
        expected = [cka(rows[a], rows[b][order]) for order in orders]
        assert found.cka_null[a][b] == pytest.approx(max(expected), abs=1e-6)
        expected = [knn(rows[a], rows[b][order], 5) for order in orders]
        assert found.mutual_knn_null[a][b] == pytest.approx(max(expected), abs=1e-12)


def test_one_row_of_each_image(tmp_path: Path) -> None:
    """Each row names its image and its place, so that the rows drawn can be told from what was gathered."""
    image, place = np.repeat(np.arange(60), 3), np.tile(np.arange(3), 60)
    keep = np.random.default_rng(0).random(180) < 0.8  # images have 1 to 3 rows
    keep[place == 0] = True
    values = np.stack([image, place], 1)[keep].astype(float)
    buffer = made(tmp_path, {"m/a": values, "n/b": values[:, ::-1]}, image_index=image[keep])
    asked: list[np.ndarray] = []
    gather = buffer.gather

    def watched(split: str, rows: np.ndarray, sites: list[str]) -> Any:
        found = gather(split, rows, sites)
        asked.append(found.values[sites[0]][:, :: 1 if sites[0] == "m/a" else -1])
        return found

    buffer.gather = watched  # type: ignore[method-assign]
    found = similarity(buffer, ["m/a", "n/b"])
    assert found.n_images == buffer.n_images("holdout") == 30
    np.testing.assert_array_equal(*asked)  # the same rows of both sites
    assert len(set(asked[0][:, 0])) == 30
    assert set(asked[0][:, 1]) == {0.0, 1.0, 2.0}  # not always the first
    similarity(buffer, ["m/a", "n/b"], seed=1)
    assert (asked[2] != asked[0]).any()
    assert similarity(buffer, ["m/a", "n/b"], n_images=12).n_images == len(set(asked[-1][:, 0])) == 12


def test_rows_of_an_image_are_not_counted_as_evidence(tmp_path: Path) -> None:
    """Unrelated sites whose rows repeat within an image: taken as independent, their neighbours would agree."""
    rng = np.random.default_rng(0)
    rows = {site: np.repeat(rng.normal(size=(100, 8)), 5, axis=0) for site in ("m/a", "n/b")}
    rows = {site: values + 0.01 * rng.normal(size=values.shape) for site, values in rows.items()}
    buffer = made(tmp_path, rows, image_index=np.repeat(np.arange(100), 5))
    every_row = buffer.read("holdout").values
    assert mutual_knn(every_row["m/a"], every_row["n/b"], 4) > 0.9
    found = similarity(buffer, ["m/a", "n/b"], k=4)
    assert found.mutual_knn["m/a"]["n/b"] < 0.2


def text(found: Similarity) -> str:
    return str(found)  # NaN is not equal to itself


def test_the_seed_repeats(tmp_path: Path) -> None:
    buffer = made(tmp_path, alike(200))
    first = similarity(buffer, SITES, n_images=50, seed=5)
    assert first.n_images == 50
    assert text(first) == text(similarity(buffer, SITES, n_images=50, seed=5))
    other = similarity(buffer, SITES, n_images=50, seed=6)
    assert first.cka["m/a"]["n/b"] != other.cka["m/a"]["n/b"]
    assert first.mutual_knn_null != other.mutual_knn_null


@pytest.mark.parametrize("images", [0, 1, 3])
def test_too_few_images_are_nan(tmp_path: Path, images: int) -> None:
    buffer = made(tmp_path, alike(300))
    found = similarity(buffer, SITES, n_images=images)
    assert found.n_images == images
    assert all(math.isnan(value) for matrix in found[3:] for row in matrix.values() for value in row.values())
    none = made(tmp_path / "none", alike(10), holdout=0.0)
    assert similarity(none, SITES).n_images == 0


def test_few_images_have_few_neighbours(tmp_path: Path) -> None:
    found = similarity(made(tmp_path, alike(300)), SITES, n_images=4)
    assert (found.n_images, found.k) == (4, 3)
    assert found.mutual_knn["m/a"]["n/b"] == found.mutual_knn_null["m/a"]["n/b"] == 1.0
    assert -1 <= found.cka["m/a"]["n/b"] <= 1


def test_a_site_that_does_not_vary(tmp_path: Path) -> None:
    rows = alike(60) | {"n/b": np.full((60, 5), 0.3)}
    found = similarity(made(tmp_path, rows), SITES)
    for matrix in found[3:]:
        assert all(math.isnan(matrix["n/b"][site]) and math.isnan(matrix[site]["n/b"]) for site in SITES)
        assert math.isfinite(matrix["m/a"]["o/c"])
    assert found.cka["m/a"]["m/a"] == found.mutual_knn["m/a"]["m/a"] == 1.0


def test_no_nulls_progress_and_errors(tmp_path: Path) -> None:
    buffer = made(tmp_path, alike(60))
    told: list[tuple[int, int]] = []
    found = similarity(buffer, SITES, nulls=0, progress=lambda done, total: told.append((done, total)))
    assert math.isnan(found.cka_null["m/a"]["n/b"])
    assert math.isfinite(found.cka["m/a"]["n/b"])
    assert told == [(step, 6) for step in range(1, 7)]  # 3 sites and 3 pairs
    with pytest.raises(SiteError, match="no site 'm/b'"):
        similarity(buffer, ["m/a", "m/b"])
    with pytest.raises(UsageError, match="k=0 and nulls=20"):
        similarity(buffer, SITES, k=0)
    with pytest.raises(UsageError, match="k=10 and nulls=-1"):
        similarity(buffer, SITES, nulls=-1)
