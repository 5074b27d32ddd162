"""Running moments against numpy in float64, far from zero too."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.buffer import Moments
from usae_probe.errors import UsageError


def taken_in(rows: np.ndarray, cuts: list[int]) -> Moments:
    moments = Moments(rows.shape[1])
    for piece in np.split(rows, sorted(cuts)):
        moments.update(piece)
    return moments


def test_by_hand() -> None:
    # rows (1, 10), (3, 10), (5, 40): means 3 and 20; M2 = 4+0+4 = 8 and 100+100+400 = 600
    moments = Moments(2)
    moments.update(np.array([[1.0, 10.0], [3.0, 10.0]]))
    moments.update(np.array([[5.0, 40.0]]))
    assert moments.n == 3
    assert moments.mean.tolist() == [3.0, 20.0]
    assert moments.m2.tolist() == [8.0, 600.0]
    np.testing.assert_allclose(moments.variance, [8 / 3, 200.0])
    # one scalar mean 11.5: 10.5² + 8.5² + 6.5² + 1.5² + 1.5² + 28.5² about it
    assert moments.pooled_m2() == pytest.approx(10.5**2 + 8.5**2 + 6.5**2 + 1.5**2 + 1.5**2 + 28.5**2)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 5), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 2**16))
def test_any_cut_gives_what_numpy_gives(n: int, d: int, cuts: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, d)) * 3 - 1
    moments = taken_in(rows, [min(cut, n) for cut in cuts])
    assert moments.n == n
    np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.m2, np.square(rows - rows.mean(0)).sum(0), atol=1e-10)
    np.testing.assert_allclose(moments.variance, rows.var(0), atol=1e-12)
    np.testing.assert_allclose(moments.pooled_m2(), np.square(rows - rows.mean()).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_large_offsets_do_not_cancel(offset: float) -> None:
    rows = np.random.default_rng(0).normal(size=(10_000, 3)) + offset
    moments = taken_in(rows, [17, 5000, 9001])
    np.testing.assert_allclose(moments.variance, (rows - offset).var(0), rtol=1e-9)  # the difference is exact


def test_small_dtypes_are_summed_in_float64() -> None:
    rows = (np.random.default_rng(0).normal(size=(9000, 4)) + 300).astype(np.float16)
    moments = taken_in(rows, [])
    np.testing.assert_allclose(moments.mean, rows.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.variance, rows.astype(np.float64).var(0), rtol=1e-10)


def test_merge_equals_update_and_leaves_the_other_alone() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 3)) + 7
    left, right = taken_in(rows[:50], []), taken_in(rows[50:], [])
    before = right.to_dict()
    left.merge(right)
    left.merge(Moments(3))
    np.testing.assert_allclose(left.m2, taken_in(rows, []).m2, rtol=1e-12)
    assert left.n == 200
    assert right.to_dict() == before


def test_moments_that_were_found_before_are_taken_as_they_are() -> None:
    """What a shard holds of its own: a count, and mean and M2 as float64."""
    rows = np.random.default_rng(0).normal(size=(300, 3)) * 5 + 2
    parts = [taken_in(piece, []) for piece in np.split(rows, [100, 100, 250])]
    stored = [(part.n, np.stack([part.mean, part.m2])) for part in parts]
    merged, found = Moments(3), Moments(3)
    for part, (n, values) in zip(parts, stored, strict=True):
        merged.merge(part)
        found.merge(Moments.of(n, *values))
    assert found.to_dict() == merged.to_dict()
    mean, m2 = np.ones(2), np.full(2, 3.0)
    kept = Moments.of(4, mean, m2)
    mean[:], m2[:] = 0, 0
    assert kept.to_dict() == {"n": 4, "mean": [1.0, 1.0], "m2": [3.0, 3.0]}


def test_json_round_trip_is_exact() -> None:
    moments = taken_in(np.random.default_rng(0).normal(size=(100, 3)) / 3, [])
    back = Moments.from_dict(json.loads(json.dumps(moments.to_dict())))
    assert back.to_dict() == moments.to_dict()
    copy = moments.copy()
    copy.update(np.ones((1, 3)))
    assert moments.n == 100
    assert repr(copy) == "Moments(n=101, d=3)"


def test_nothing_seen_and_wrong_widths() -> None:
    empty = Moments(2)
    empty.update(np.empty((0, 2)))
    assert (empty.n, empty.variance.tolist(), empty.pooled_m2()) == (0, [0.0, 0.0], 0.0)
    with pytest.raises(UsageError, match=r"2 dimensions were given rows of shape \[4, 3\]"):
        empty.update(np.ones((4, 3)))
    with pytest.raises(UsageError, match="cannot take in those of 3"):
        empty.merge(Moments(3))
