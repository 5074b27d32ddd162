"""Mixing through a pool of shards: every row as often as it should, evenly over its ticks, however it is read."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from usae_probe.buffer import ActivationBuffer
from usae_probe.buffer.batches import batch_rows, epoch_pass
from usae_probe.buffer.shuffle import Pass
from usae_probe.errors import BufferIntegrityError, UsageError

SHARDS = st.lists(st.integers(0, 12), max_size=9)
WINDOWS, REUSES, SEEDS = st.integers(1, 10), st.integers(1, 5), st.integers(0, 2**40)


def pass_over(rows: list[int], window: int, seed: int = 0, reuse: int = 1, order: list[int] | None = None) -> Pass:
    """A pass over shards of so many rows, the last shard first if no order is given."""
    begins = np.cumsum([0, *rows])
    return Pass(
        list(range(len(rows)))[::-1] if order is None else order,
        rows_of=lambda shard: rows[shard],
        begin_of=lambda shard: int(begins[shard]),
        window=window,
        seed=(seed, 0),
        reuse=reuse,
    )


def ticks_of(one: Pass) -> list[np.ndarray]:
    return [one.rows(tick) for tick in range(one.n_ticks)]


def shard_of(rows: list[int], row: int) -> int:
    return int(np.searchsorted(np.cumsum(rows), row, side="right"))


# --- a pass ---


def test_three_shards_in_a_pool_of_two() -> None:
    """Shards 2, 0, 1 come in this order, of 4, 5 and 0 rows: rows 5 to 8, 0 to 4 and none; 3 − 2 + 1 = 2 ticks.

    Tick 0 mixes shards 2 and 0, tick 1 shards 0 and 1. Only tick 0 holds shard 2: it takes all its 4 rows. Both hold
    shard 0: 5 · 1 // 2 = 2 of its rows come in tick 0 and the other 3 in tick 1. Shard 1 has nothing to give.
    """
    one = pass_over([5, 0, 4], window=2, order=[2, 0, 1])
    assert (one.n_ticks, one.size(0), one.size(1)) == (2, 6, 3)
    assert [one.start(tick) for tick in range(3)] == [0, 6, 9]
    assert [one.tick_at(row) for row in (0, 5, 6, 8, 9, 100)] == [0, 0, 1, 1, 2, 2]
    first, second = (one.rows(tick).tolist() for tick in range(2))
    assert {5, 6, 7, 8} < set(first)
    assert sorted(first + second) == list(range(9))
    assert set(second) < {0, 1, 2, 3, 4}
    # 9 rows are two batches of 4: the first of tick 0's six, then its last two and two of tick 1
    assert [rows.tolist() for rows in one.batches(4)] == [sorted(first[:4]), sorted(first[4:] + second[:2])]
    assert [rows.tolist() for rows in one.batches(4, 1)] == [sorted(first[4:] + second[:2])]
    assert list(one.batches(4, 2)) == []


def test_four_rows_twice_in_two_ticks() -> None:
    """Reuse 2, window 2: shards of 4 rows at places 0, 1, 2; each row of the middle one once in either tick.

    The shards at the ends are in one tick each, so that their rows come twice in it, once in each half of 4 + 2 rows.
    """
    one = pass_over([4, 4, 4], window=2, reuse=2, order=[0, 1, 2])
    assert [one.size(tick) for tick in range(2)] == [12, 12]
    for tick, end, middle in ((0, range(4), range(4, 8)), (1, range(8, 12), range(4, 8))):
        rows = one.rows(tick).tolist()
        assert Counter(rows) == Counter(dict.fromkeys(end, 2)) + Counter(middle)
        for half in (rows[:6], rows[6:]):
            assert set(end) < set(half)
            assert len(set(half)) == 6


def oracle(rows: list[int], window: int, seed: int, order: list[int]) -> list[list[int]]:
    """The ticks of a pass, from its description: row by row, for `reuse` 1.

    Of a shard that n ticks hold, the k-th takes rows k · rows // n up to (k + 1) · rows // n of a drawn order.
    """
    ticks: list[list[int]] = []
    for tick in range(max(1, len(order) - window + 1)):
        together: list[int] = []
        for place, shard in enumerate(order):
            holding = [t for t in range(max(1, len(order) - window + 1)) if t <= place <= t + window - 1]
            drawn = np.random.default_rng((seed, 0, 1, shard)).permutation(rows[shard])
            for number, row in enumerate(drawn):
                before = [t for k, t in enumerate(holding) if k * rows[shard] // len(holding) <= number]
                if before[-1] == tick:
                    together.append(sum(rows[:shard]) + int(row))
        ticks.append(np.random.default_rng((seed, 0, 2, tick)).permutation(together).astype(int).tolist())
    return ticks


@settings(deadline=None, max_examples=100)
@given(SHARDS, WINDOWS, SEEDS, st.randoms(use_true_random=False))
def test_ticks_are_those_of_a_slow_oracle(rows: list[int], window: int, seed: int, random: Any) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    one = pass_over(rows, window, seed, order=order)
    assert [tick.tolist() for tick in ticks_of(one)] == oracle(rows, window, seed, order)


@settings(deadline=None, max_examples=150)
@given(SHARDS, WINDOWS, REUSES, SEEDS)
def test_every_row_is_drawn_as_often_as_it_should(rows: list[int], window: int, reuse: int, seed: int) -> None:
    ticks = ticks_of(pass_over(rows, window, seed, reuse))
    assert len(ticks) == max(1, len(rows) - window + 1)
    assert Counter(np.concatenate(ticks).tolist()) == dict.fromkeys(range(sum(rows)), reuse)
    assert all(tick.dtype == np.int64 for tick in ticks)


@settings(deadline=None, max_examples=150)
@given(SHARDS, WINDOWS, REUSES, SEEDS, st.booleans())
def test_sizes_agree_with_the_rows(rows: list[int], window: int, reuse: int, seed: int, backwards: bool) -> None:
    sizes = [len(tick) for tick in ticks_of(pass_over(rows, window, seed, reuse))]
    one = pass_over(rows, window, seed, reuse)
    begins = np.cumsum([0, *sizes]).tolist()
    draws = list(range(begins[-1]))
    for draw in draws[::-1] if backwards else draws:
        assert begins[one.tick_at(draw)] <= draw < begins[one.tick_at(draw) + 1]
    assert one.tick_at(begins[-1]) == one.tick_at(begins[-1] + 7) == one.n_ticks
    assert [one.start(tick) for tick in range(one.n_ticks + 1)] == begins
    assert [one.size(tick) for tick in range(one.n_ticks)] == sizes


@settings(deadline=None, max_examples=150)
@given(SHARDS, WINDOWS, REUSES, SEEDS)
def test_a_shard_is_drawn_evenly_while_it_is_in_the_pool(rows: list[int], window: int, reuse: int, seed: int) -> None:
    one = pass_over(rows, window, seed, reuse)
    counts = [Counter(shard_of(rows, row) for row in tick) for tick in ticks_of(one)]
    for place, shard in enumerate(one.shards):
        first, last = max(0, place - window + 1), min(place, one.n_ticks - 1)
        span = last - first + 1
        for tick, count in enumerate(counts):
            if first <= tick <= last:
                assert reuse * (rows[shard] // span) <= count[shard] <= reuse * -(-rows[shard] // span)
            else:
                assert count[shard] == 0


@settings(deadline=None, max_examples=300)
@given(SHARDS, WINDOWS, REUSES, SEEDS)
def test_draws_of_a_row_lie_apart(rows: list[int], window: int, reuse: int, seed: int) -> None:
    """Once in a draw of a tick; and in a tick no oftener than `reuse` draws over that many ticks have to."""
    one = pass_over(rows, window, seed, reuse)
    span = {
        shard: min(place, one.n_ticks - 1) - max(0, place - window + 1) + 1 for place, shard in enumerate(one.shards)
    }
    for tick in range(one.n_ticks):
        drawn = one.rows(tick).tolist()
        for row, count in Counter(drawn).items():
            assert count <= -(-reuse // span[shard_of(rows, row)])
        begin = 0
        for number in range(reuse):
            parts = [part for place in one._places(tick) for part in one._parts(place, tick, number)]
            end = begin + sum(last - first for first, last in parts)
            assert len(set(drawn[begin:end])) == end - begin
            begin = end
        assert begin == len(drawn)


@settings(deadline=None, max_examples=100)
@given(SHARDS, WINDOWS, REUSES, SEEDS, st.integers(1, 30), st.integers(0, 40))
def test_batches_can_be_gone_on_with_from_any_step(
    rows: list[int], window: int, reuse: int, seed: int, size: int, step: int
) -> None:
    whole = np.concatenate(ticks_of(pass_over(rows, window, seed, reuse)))
    batches = [batch.tolist() for batch in pass_over(rows, window, seed, reuse).batches(size)]
    assert batches == [sorted(whole[size * t : size * t + size].tolist()) for t in range(len(whole) // size)]
    assert [batch.tolist() for batch in pass_over(rows, window, seed, reuse).batches(size, step)] == batches[step:]


def test_seeds_and_ticks_draw_differently() -> None:
    one, two = (np.concatenate(ticks_of(pass_over([50] * 4, window=2, seed=seed))) for seed in (0, 1))
    assert not np.array_equal(one, two)
    first, second, third = ticks_of(pass_over([60] * 4, window=2))
    assert len({tuple(tick % 60) for tick in (first[:60], second[:60], third[:60])}) == 3


def test_shards_and_the_rows_of_shard_0_are_drawn_independently() -> None:
    """As many shards as rows in one: drawn by one stream of random numbers, both orders would be the same."""
    for seed in range(5):
        one = epoch_pass(np.arange(0, 65, 8), window=2, seed=seed, epoch=1)
        assert one._order(list(one.shards).index(0)).tolist() != list(one.shards)


# --- a buffer larger than the memory it may take ---

SITE = "m/layer"
N_SHARDS, PER_SHARD, WINDOW = 20, 12, 4
ROW_BYTES = 2 + 8 + 4  # one float16, image_index, token_index
BUDGET = WINDOW * PER_SHARD * ROW_BYTES


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 training rows in 20 shards; the value in the only dimension is the image's number."""
    path = tmp_path_factory.mktemp("made") / "acts"
    rows = np.arange(300, dtype=np.float32)[:, None]
    buffer = ActivationBuffer.from_arrays({SITE: rows}, path, holdout=0.1, validation=30 / 270, shard_images=PER_SHARD)
    assert buffer.n_rows("train") == N_SHARDS * PER_SHARD
    return path


def pooled(path: Path) -> ActivationBuffer:
    buffer = ActivationBuffer(path, memory_budget=BUDGET)
    assert buffer.pool() == WINDOW
    return buffer


def demand_same(left: Any, right: Any) -> None:
    pairs = list(zip(left, right, strict=True))
    assert pairs
    for one, other in pairs:
        np.testing.assert_array_equal(np.asarray(one.values[SITE]), np.asarray(other.values[SITE]))
        np.testing.assert_array_equal(np.asarray(one.image_index), np.asarray(other.image_index))
        np.testing.assert_array_equal(np.asarray(one.token_index), np.asarray(other.token_index))


def test_what_the_pool_is(made: Path) -> None:
    assert ActivationBuffer(made).pool() is None
    assert ActivationBuffer(made, memory_budget=0).pool() == 2  # fewer would not mix
    assert pooled(made).pool("validation") is None  # its three shards fit
    assert ActivationBuffer(made, memory_budget=BUDGET - 1).pool() == WINDOW - 1
    rows = N_SHARDS * PER_SHARD + 60
    assert ActivationBuffer(made, memory_budget=rows * (ROW_BYTES + 8) - 1).pool() is None  # 20 shards fit
    with pytest.raises(UsageError, match="is no split"):
        ActivationBuffer(made).pool("test")


def test_every_epoch_covers_the_rows_once(made: Path) -> None:
    buffer = pooled(made)
    images = buffer.read("train").image_index
    batches = buffer.batches("train", 16, seed=0)
    epochs = [np.concatenate([batch.image_index for batch in islice(batches, 15)]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(images)
    assert not np.array_equal(epochs[0], epochs[1])
    some = np.concatenate([batch.image_index for batch in islice(buffer.batches("train", 17, seed=0), 14)])
    assert len(set(some.tolist())) == len(some) == 14 * 17  # 2 rows wait for the next epoch
    for batch in islice(batches, 15):
        np.testing.assert_array_equal(batch.values[SITE][:, 0], batch.image_index)


def test_batches_are_the_documented_ones(made: Path) -> None:
    """Epoch e is a pass of seed (seed, e) over shards in an order of its own."""
    buffer = pooled(made)
    images = buffer.read("train").image_index
    orders = []
    for epoch in range(2):
        batches = islice(buffer.batches("train", 24, seed=7, start_step=10 * epoch), 10)
        rows = np.concatenate([np.flatnonzero(np.isin(images, batch.image_index)) for batch in batches])
        first_seen = list(dict.fromkeys((rows // PER_SHARD).tolist()))
        orders.append(first_seen)
        assert sorted(first_seen) == list(range(N_SHARDS))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_read_the_same_batches(made: Path, workers: int) -> None:
    for buffer in (pooled(made), ActivationBuffer(made)):
        alone = islice(buffer.batches("train", 17, seed=2), 40)
        demand_same(alone, islice(buffer.batches("train", 17, seed=2, workers=workers), 40))


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_workers_end_with_their_reader(made: Path) -> None:
    batches = pooled(made).batches("train", 16, seed=0, workers=2)
    next(batches)
    assert len(readers()) > 0
    batches.close()  # type: ignore[attr-defined]
    assert readers() == []
    with pytest.raises(UsageError, match="workers=-1"):
        pooled(made).batches("train", 16, seed=0, workers=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_an_error_when_its_rows_come(made: Path, tmp_path: Path, workers: int) -> None:
    path = Path(shutil.copytree(made, tmp_path / "acts"))
    *_, last = next(pooled(path).numbers("train", 240, 6, 0))  # of the epoch
    shards = [entry for entry in ActivationBuffer(path).shards if entry.split == "train"]
    (path / shards[last // PER_SHARD].file).unlink()
    batches, read = pooled(path).batches("train", 16, seed=6, workers=workers), []
    with pytest.raises(BufferIntegrityError, match="is damaged"):
        read.extend(batch.n for batch in batches)
    assert 0 < len(read) < 15
    assert readers() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_can_be_resumed_at_any_step(made: Path, workers: int) -> None:
    buffer = pooled(made)
    walked = list(islice(buffer.batches("train", 17, seed=3), 33))  # two epochs of 14 steps, and some of a third
    for step in (*range(16), 27, 28, 29):
        resumed = islice(pooled(made).batches("train", 17, seed=3, start_step=step, workers=workers), 3)
        demand_same(walked[step : step + 3], resumed)


def test_shares_of_every_batch_make_it_up(made: Path) -> None:
    buffer = pooled(made)
    whole = list(islice(buffer.batches("train", 17, seed=3), 20))
    shares = [islice(buffer.batches("train", 17, seed=3, share=slice(rank, None, 3)), 20) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, part in enumerate(parts):
            np.testing.assert_array_equal(part.image_index, batch.image_index[rank::3])


# --- as a data set ---


def test_a_data_set_gives_the_same_batches_in_any_order(made: Path) -> None:
    batches = list(islice(pooled(made).batches("train", 17, seed=4), 20))
    dataset = pooled(made).dataset("train", 17, seed=4, steps=20)
    assert len(dataset) == 20
    demand_same(batches, [dataset[step] for step in range(20)])
    jumps = [13, 13, 2, 19, 0, 1, 5, 4]
    demand_same([batches[step] for step in jumps], [dataset[step] for step in jumps])
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000
    demand_same([batches[6], batches[3]], [pickle.loads(pickled)[step] for step in (6, 3)])
    for step in (-1, 20):
        with pytest.raises(IndexError, match=f"batch {step} of 20"):
            dataset[step]
    demand_same(batches, dataset)  # the end is an IndexError: it can be iterated over


def test_a_data_set_knows_what_it_cannot_give(made: Path) -> None:
    buffer = pooled(made)
    assert list(buffer.dataset("train", 5, seed=0, steps=1, sites=[])[0].values) == []
    with pytest.raises(UsageError, match="is no split"):
        buffer.dataset("test", 17, seed=0, steps=3)
    with pytest.raises(UsageError, match="batches of 0 rows"):
        buffer.dataset("train", 0, seed=0, steps=3)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("workers", "how"), [(0, None), (2, "fork"), (2, "spawn")])
def test_a_data_loader_gives_the_same_batches(made: Path, workers: int, how: str | None) -> None:
    buffer = pooled(made)
    batches = list(islice(buffer.batches("train", 17, seed=5), 16))  # over the end of an epoch
    dataset = buffer.dataset("train", 17, seed=5, steps=16)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=how)  # type: ignore[arg-type]
    demand_same(batches, loader)


# --- how well it mixes ---


def same_shard(batches: Iterator[np.ndarray], per_shard: int) -> np.ndarray:
    """The share of pairs of rows that lie in one shard, of each of 200 batches."""
    shares = []
    for rows in islice(batches, 200):
        counts = np.bincount(rows // per_shard)
        shares.append((counts * (counts - 1)).sum() / (len(rows) * (len(rows) - 1)))
    return np.array(shares)


def test_rows_of_a_batch_are_mixed_as_a_pool_can(tmp_path: Path) -> None:
    """40 shards of 320 rows in a pool of 8, 200 batches of 64.

    In a tick amid the pass, 8 shards give 320 / 8 = 40 rows each: (40 − 1) / (320 − 1) = 0.122 of its pairs lie in one
    shard. A perfect shuffle has (320 − 1) / (12,800 − 1) = 0.0249, and shards one by one 1. At both ends of the pass
    fewer ticks hold a shard: the first has 320 rows of one, 160 of the next, then 107, …, which makes 0.21.
    """
    n, per_shard = 12_800, 320
    arrays, path = {SITE: np.arange(n, dtype=np.float32)[:, None]}, tmp_path / "acts"
    ActivationBuffer.from_arrays(arrays, path, holdout=0.0, validation=0.0, shard_images=per_shard, dtype="float32")
    mixed = ActivationBuffer(path, memory_budget=8 * per_shard * 16)
    whole = ActivationBuffer(path)
    assert (mixed.pool(), whole.pool()) == (8, None)
    shares = same_shard(mixed.numbers("train", 64, 0, 0), per_shard)
    assert shares[50:150].mean() == pytest.approx(0.122, abs=0.005)
    assert shares[:13].mean() == pytest.approx(0.21, abs=0.02)
    assert shares.mean() < 0.15
    assert same_shard(whole.numbers("train", 64, 0, 0), per_shard).mean() == pytest.approx(0.0249, abs=0.002)
    # planted: a pass over one shard at a time is what the measure has to find
    assert same_shard(batch_rows(np.arange(0, n + 1, per_shard), 64, seed=0, window=1), per_shard).min() == 1.0


def test_rows_that_lie_together_are_parted() -> None:
    """Each of 4 ticks has 3 of the 12 rows of a shard: (3 − 1) / (12 − 1) = 0.182 of neighbours on disk share one."""
    shared = []
    for seed in range(30):
        ticks = ticks_of(pass_over([PER_SHARD] * N_SHARDS, WINDOW, seed))
        tick_of = {row: number for number, tick in enumerate(ticks) for row in tick.tolist()}
        inner = range(4 * PER_SHARD, 16 * PER_SHARD)  # shards that four ticks hold
        shared += [tick_of[row] == tick_of[row + 1] for row in inner if row % PER_SHARD < PER_SHARD - 1]
    assert np.mean(shared) == pytest.approx(2 / 11, abs=0.02)
