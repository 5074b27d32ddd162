"""The linear reference against ridge regression on all rows at once, with explicit folds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from usae_probe.buffer import ActivationBuffer, Rows
from usae_probe.errors import BufferIntegrityError, SiteError, UsageError
from usae_probe.probes.linear import PENALTIES, LinearReference, linear_reference
from usae_probe.split import draw_split

SITES = ["m/a", "n/b", "o/c"]


def direct(train: Rows, held: Rows, source: str, target: str, *, folds: int = 5, seed: int = 0) -> tuple[float, float]:
    """R² and relative λ, one equation system per fold and λ, float64."""
    x, y = (train.values[site].astype(np.float64) for site in (source, target))
    images = sorted(set(train.image_index.tolist()))
    folds = min(folds, len(images))
    drawn = np.random.default_rng(seed).permutation(len(images)) % folds
    fold = np.array([drawn[images.index(image)] for image in train.image_index.tolist()])
    unit = len(x) * np.mean([np.var(column) for column in x.T])
    errors = []
    for relative in PENALTIES:
        error = 0.0
        for left_out in range(folds):
            inside = fold != left_out
            guess = predicted(x[inside], y[inside], x[~inside], relative * unit)
            error += float(((y[~inside] - guess) ** 2).sum())
        errors.append(error)
    best = float(PENALTIES[int(np.argmin(errors))])
    new, truth = (held.values[site].astype(np.float64) for site in (source, target))
    sse = ((truth - predicted(x, y, new, best * unit)) ** 2).sum()
    return float(1 - sse / ((truth - truth.mean(0)) ** 2).sum()), best


def predicted(x: np.ndarray, y: np.ndarray, new: np.ndarray, penalty: float) -> np.ndarray:
    centred = x - x.mean(0)
    weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - y.mean(0)))
    return y.mean(0) + (new - x.mean(0)) @ weights


def made(path: Path, rows: dict[str, np.ndarray], image_index: np.ndarray | None = None, **more: Any) -> Any:
    more = {"dtype": "float32", "holdout": 0.3, "shard_images": 64} | more
    return ActivationBuffer.from_arrays(rows, path / "acts", image_index=image_index, **more)


def related(n: int, per_image: int, *, offset: float = 0.0, noise: float = 1.0) -> dict[str, np.ndarray]:
    """Rows that share causes; those of an image resemble each other."""
    rng = np.random.default_rng(0)
    causes = np.repeat(rng.normal(size=(n, 5)), per_image, axis=0) + 0.5 * rng.normal(size=(n * per_image, 5))
    return {
        site: causes @ rng.normal(size=(5, d)) + noise * rng.normal(size=(len(causes), d)) + offset * (1 + i)
        for i, (site, d) in enumerate(zip(SITES, (12, 7, 9), strict=True))
    }


def assert_as_direct(found: LinearReference, train: Rows, held: Rows, **how: Any) -> None:
    assert list(found.r2) == list(found.penalty) == SITES
    for source in SITES:
        assert list(found.r2[source]) == list(found.penalty[source]) == SITES
        assert math.isnan(found.r2[source][source])
        assert math.isnan(found.penalty[source][source])
        for target in (site for site in SITES if site != source):
            r2, penalty = direct(train, held, source, target, **how)
            assert found.penalty[source][target] == pytest.approx(penalty, rel=1e-12), (source, target)
            assert found.r2[source][target] == pytest.approx(r2, abs=1e-6), (source, target)


@pytest.mark.parametrize(("offset", "noise"), [(0.0, 1.0), (1e6, 1.0), (0.0, 4.0)])
def test_equals_regression_on_all_rows(tmp_path: Path, offset: float, noise: float) -> None:
    rows = related(120, 4, offset=offset, noise=noise)
    buffer = made(tmp_path, rows, np.repeat(np.arange(120), 4))
    found = linear_reference(buffer, SITES)
    assert (found.n_rows_train, found.n_rows_eval) == (buffer.n_rows("train"), buffer.n_rows("holdout")) == (304, 144)
    assert_as_direct(found, buffer.read("train"), buffer.read("holdout"))
    assert len({found.penalty[s][t] for s in SITES for t in SITES if s != t}) > 1  # there was something to choose
    assert found.r2["m/a"]["n/b"] > (0.05 if noise > 1 else 0.3)


def test_more_rows_than_a_chunk_and_another_seed(tmp_path: Path) -> None:
    buffer = made(tmp_path, related(500, 4), np.repeat(np.arange(500), 4))
    assert buffer.n_rows("train") > 1024
    found = linear_reference(buffer, SITES, split="validation", folds=3, seed=4)
    assert_as_direct(found, buffer.read("train"), buffer.read("validation"), folds=3, seed=4)


def test_images_with_different_numbers_of_rows(tmp_path: Path) -> None:
    rows = related(80, 3)
    image_index = np.sort(np.random.default_rng(1).integers(80, size=240))
    buffer = made(tmp_path, rows, image_index)
    assert_as_direct(linear_reference(buffer, SITES), buffer.read("train"), buffer.read("holdout"))


def test_fewer_rows_than_there_are_lie_evenly_over_the_split(tmp_path: Path) -> None:
    buffer = made(tmp_path, related(120, 4), np.repeat(np.arange(120), 4))
    found = linear_reference(buffer, SITES, train_rows=90, eval_rows=50)
    assert (found.n_rows_train, found.n_rows_eval) == (90, 50)
    train = buffer.gather("train", np.arange(90) * 304 // 90)
    held = buffer.gather("holdout", np.arange(50) * 144 // 50)
    assert_as_direct(found, train, held)


def test_fewer_rows_than_dimensions_and_fewer_images_than_folds(tmp_path: Path) -> None:
    buffer = made(tmp_path, related(7, 2), np.repeat(np.arange(7), 2), holdout=0.4, validation=0.0)
    assert buffer.n_images("train") == 4
    assert_as_direct(linear_reference(buffer, SITES, folds=9), buffer.read("train"), buffer.read("holdout"), folds=9)


def by_hand(path: Path, train: list[tuple[float, float]], held: list[tuple[float, float]]) -> LinearReference:
    split = draw_split(len(train) + len(held), holdout=len(held) / (len(train) + len(held)), validation=0.0)
    x, y = np.zeros((len(train) + len(held), 1)), np.zeros((len(train) + len(held), 1))
    for images, values in ((split.train, train), (split.holdout, held)):
        x[images, 0], y[images, 0] = np.array(values).T
    buffer = made(path, {"m/a": x, "n/b": y}, holdout=len(held) / len(x), validation=0.0)
    return linear_reference(buffer, ["m/a", "n/b"])


def test_by_hand_with_the_least_penalty(tmp_path: Path) -> None:
    # training rows are y = 2x + 1 exactly, so that every fold is best with the least λ, 1e-5 · n · var = 4e-5
    # mean x = 0, mean y = 1, Σx² = 4, Σxy = 8: B = 8 / (4 + 4e-5) = 2 / 1.00001
    # held out: x = 0, 2: ŷ = 1, 1 + 2B ≈ 5; y = 2, 6: SSE = 1 + 1 = 2 (and 8e-5 more: (1 + 4e-5)²), SST = 4 + 4 = 8
    found = by_hand(tmp_path, [(-1, -1), (1, 3), (-1, -1), (1, 3)], [(0, 2), (2, 6)])
    assert found.penalty["m/a"]["n/b"] == pytest.approx(1e-5)
    assert found.r2["m/a"]["n/b"] == pytest.approx(1 - (1 + (5 - 4 / 1.00001) ** 2) / 8, abs=1e-12)
    assert found.r2["m/a"]["n/b"] == pytest.approx(0.75, abs=2e-5)


def test_by_hand_with_the_greatest_penalty(tmp_path: Path) -> None:
    # x = ±1 says nothing of y: Σxy = 0, so B = 0 and ŷ = 0 for every λ. Left out one by one (4 images, 4 folds), the
    # other three have a slope that points away from it (without (−1, 1): Σxy = 4/3 > 0), so the greatest λ is best.
    # held out: y = 1, 3: SSE = 1 + 9 = 10, SST = 1 + 1 = 2, R² = 1 − 5 = −4
    found = by_hand(tmp_path, [(-1, 1), (1, 1), (-1, -1), (1, -1)], [(0, 1), (5, 3)])
    assert found.penalty["m/a"]["n/b"] == pytest.approx(10.0)
    assert found.r2["m/a"]["n/b"] == pytest.approx(-4.0)


def test_planted_relation_reaches_what_its_noise_allows_and_no_relation_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, mixing = rng.normal(size=(3000, 20)), rng.normal(size=(20, 8)) / 20**0.5
    rows = {"m/a": x, "n/b": x @ mixing + 0.5 * rng.normal(size=(3000, 8)) + 3, "o/c": rng.normal(size=(3000, 6))}
    found = linear_reference(made(tmp_path, rows), SITES)
    power = np.square(mixing).sum()
    assert found.r2["m/a"]["n/b"] == pytest.approx(power / (power + 8 * 0.25), abs=0.02)
    for source, target in (("m/a", "o/c"), ("n/b", "o/c"), ("o/c", "m/a"), ("o/c", "n/b")):
        assert -0.02 < found.r2[source][target] < 0.003
        assert found.penalty[source][target] > 1  # what is learned of nothing is held back
    assert found.penalty["m/a"]["n/b"] < 0.01


def test_all_rows_of_an_image_are_in_one_fold(tmp_path: Path) -> None:
    """Rows that repeat within an image can be learned by heart; the penalty must not be chosen as if that helped."""
    rng = np.random.default_rng(0)
    rows = {site: np.repeat(rng.normal(size=(60, 70)), 5, axis=0) for site in ("m/a", "n/b")}
    found = linear_reference(made(tmp_path, rows, np.repeat(np.arange(60), 5)), ["m/a", "n/b"])
    assert found.penalty["m/a"]["n/b"] == pytest.approx(10.0)
    assert found.r2["m/a"]["n/b"] > -0.2


def test_the_seed_draws_the_folds(tmp_path: Path) -> None:
    buffer = made(tmp_path, related(30, 1, noise=3.0))
    same, again, others = (linear_reference(buffer, SITES, seed=seed) for seed in (0, 0, 1))
    assert str(same) == str(again)  # NaN is not equal to itself
    assert str(same.penalty) != str(others.penalty)


def test_dimensions_that_do_not_vary(tmp_path: Path) -> None:
    rows = related(60, 1)
    rows["m/a"] = np.concatenate([rows["m/a"], np.full((60, 3), 7.7), np.zeros((60, 1))], axis=1)
    rows["n/b"][:] = 3.3
    buffer = made(tmp_path, rows)
    found = linear_reference(buffer, SITES)
    r2, penalty = direct(buffer.read("train"), buffer.read("holdout"), "m/a", "o/c")
    assert found.r2["m/a"]["o/c"] == pytest.approx(r2, abs=1e-6)
    assert found.penalty["m/a"]["o/c"] == pytest.approx(penalty)
    assert math.isnan(found.r2["m/a"]["n/b"])
    train, held = (buffer.read(split).values["o/c"].astype(np.float64) for split in ("train", "holdout"))
    mean_alone = 1 - np.square(held - train.mean(0)).sum() / np.square(held - held.mean(0)).sum()
    assert found.r2["n/b"]["o/c"] == pytest.approx(mean_alone, abs=1e-9)


def test_one_site_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    found = linear_reference(made(tmp_path, related(30, 1)), ["m/a"])
    assert list(found.r2) == list(found.penalty) == ["m/a"]
    assert math.isnan(found.r2["m/a"]["m/a"])
    assert math.isnan(found.penalty["m/a"]["m/a"])


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    buffer = made(tmp_path, related(100, 1))
    linear_reference(buffer, SITES, progress=lambda done, total: told.append((done, total)))
    total = 3 * (buffer.n_rows("train") + buffer.n_rows("holdout"))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {all_rows for _, all_rows in told} == {total}
    assert told[-1] == (total, total)


def test_errors(tmp_path: Path) -> None:
    rows = {site: values[:12] for site, values in related(12, 1).items()}
    one = made(tmp_path, rows, np.repeat([0, 1], 6), holdout=0.5, validation=0.0)
    with pytest.raises(BufferIntegrityError, match="training rows of 1 images; it needs at least 2") as error:
        linear_reference(one, SITES)
    assert "harvest more images" in error.value.hint
    none = made(tmp_path / "none", rows, holdout=0.0, validation=0.0)
    with pytest.raises(BufferIntegrityError, match=r"0 held-out rows, .* at least 2"):
        linear_reference(none, SITES)
    with pytest.raises(UsageError, match="folds=1; it needs at least 2"):
        linear_reference(none, SITES, folds=1)
    with pytest.raises(SiteError, match="no site 'm/b'"):
        linear_reference(none, ["m/a", "m/b"])
