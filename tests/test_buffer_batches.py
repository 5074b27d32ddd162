"""Batches: a new permutation of all rows each epoch, and step t a function of seed and t alone."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.buffer import ActivationBuffer
from usae_probe.buffer.batches import batch_rows, steps_per_epoch
from usae_probe.errors import UsageError

SITE = "m/layer"


def whole(n: int) -> np.ndarray:
    """Begins of one shard of n rows."""
    return np.array([0, n])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training rows in shards of 10; the value in the only dimension is the image's number."""
    rows = np.arange(80, dtype=np.float32)[:, None]
    path = tmp_path_factory.mktemp("made") / "acts"
    assert ActivationBuffer.from_arrays({SITE: rows}, path, holdout=0.1, shard_images=10).n_rows("train") == 65
    return path


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 100))
def test_every_epoch_is_a_permutation_and_any_step_can_be_gone_on_from(n: int, size: int, seed: int, t: int) -> None:
    steps = steps_per_epoch(n, size)
    taken = list(islice(batch_rows(whole(n), size, seed=seed), t + 2 * steps))
    for epoch in range(len(taken) // steps):
        rows = np.concatenate(taken[epoch * steps : (epoch + 1) * steps])
        assert len(set(rows.tolist())) == len(rows) == steps * min(size, n) > n - min(size, n)
        assert set(rows.tolist()) <= set(range(n))
    for left, right in zip(
        islice(batch_rows(whole(n), size, seed=seed, start_step=t), 2 * steps), taken[t:], strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_the_order_is_the_documented_one() -> None:
    first = list(islice(batch_rows(whole(10), 4, seed=7), 5))
    for epoch, step in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        expected = np.random.default_rng((7, epoch)).permutation(10)[step * 4 : step * 4 + 4]
        np.testing.assert_array_equal(first[2 * epoch + step], expected)


def test_batches_hold_paired_rows_of_all_shards(made: Path) -> None:
    buffer = ActivationBuffer(made)
    epoch = list(islice(buffer.batches("train", 13, seed=0), buffer.steps_per_epoch("train", 13)))
    assert len(epoch) == 5
    images = np.concatenate([batch.image_index for batch in epoch])
    assert sorted(images) == sorted(buffer.read("train").image_index)
    for batch in epoch:
        np.testing.assert_array_equal(batch.values[SITE][:, 0], batch.image_index)
    assert len(set(epoch[0].image_index // 10)) > 3  # not shard by shard


def test_epochs_and_seeds_differ(made: Path) -> None:
    buffer = ActivationBuffer(made)
    runs = [islice(buffer.batches("train", 13, seed=seed), 10) for seed in (0, 1)]
    one, two = (np.concatenate([batch.image_index for batch in run]) for run in runs)
    assert not np.array_equal(one, two)
    assert not np.array_equal(one[:65], one[65:])
    assert sorted(one[:65]) == sorted(one[65:])


@pytest.mark.parametrize("start_step", [0, 1, 3, 7, 1000])
def test_from_files_or_memory_and_resumed_all_equal(made: Path, start_step: int) -> None:
    small, large = ActivationBuffer(made, verify="always"), ActivationBuffer(made)
    walked = islice(large.batches("train", 20, seed=5), start_step, start_step + 4)
    resumed = islice(large.batches("train", 20, seed=5, start_step=start_step), 4)
    from_files = islice(small.batches("train", 20, seed=5, start_step=start_step, sites=[SITE]), 4)
    for batches in zip(walked, resumed, from_files, strict=True):
        for batch in batches:
            np.testing.assert_array_equal(batch.values[SITE], batches[0].values[SITE])
            np.testing.assert_array_equal(batch.image_index, batches[0].image_index)


def test_a_batch_above_the_number_of_rows_is_all_rows(made: Path) -> None:
    buffer = ActivationBuffer(made)
    assert buffer.steps_per_epoch("validation", 1024) == 1
    batch = next(buffer.batches("validation", 1024, seed=0))
    assert sorted(batch.image_index) == sorted(buffer.read("validation").image_index)


def test_impossible_batches_are_refused_at_the_call(tmp_path: Path, made: Path) -> None:
    buffer = ActivationBuffer(made)
    with pytest.raises(UsageError, match="seed=-1"):
        buffer.batches("train", 5, seed=-1)
    with pytest.raises(UsageError, match="start_step=-2"):
        buffer.batches("train", 5, seed=0, start_step=-2)
    with pytest.raises(UsageError, match="batches of 0 rows"):
        buffer.batches("train", 0, seed=0)
    without = ActivationBuffer.from_arrays({SITE: np.ones((4, 1))}, tmp_path / "a", holdout=0.0, validation=0.0)
    with pytest.raises(UsageError, match="from 0 rows"):
        without.batches("holdout", 5, seed=0)
