"""Shuffling through a pool of shards: every row is drawn, at a step that depends on seed and shards alone.

A pass goes through the shards in some order, `window` of them at a time. Tick j mixes the shards at places j to
j + window − 1: of each it takes an equal part of the rows, drawn by seed, and shuffles them together. So a row waits up
to `window` ticks, any of them as likely, and nothing of a shard is wanted after the last tick that it is in. The shards
at both ends, which fewer ticks hold, give each of these a larger part. With at least as many places as shards there is
one tick: a perfect shuffle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_ROWS, _TICK = 1, 2  # of draws
_POOL = 64  # shards: more mix no better, and every one is a piece of every batch


class Pass:
    """One pass over shards.

    Args:
        shards: numbers of the shards, in the order in which the pass comes to them.
        rows_of: how many rows a shard has; may wait until that is known.
        begin_of: number of a shard's first row; asked for once `rows_of` is known.
        window: shards in the pool.
        seed: of the pass.
        reuse: times that every row is drawn; in different ticks, where it is in so many.

    >>> one = Pass([0, 1, 2], rows_of=lambda _: 4, begin_of=lambda shard: 4 * shard, window=2, seed=(0, 0))
    >>> one.n_ticks, one.size(0), one.size(1)
    (2, 6, 6)
    """

    def __init__(
        self,
        shards: Sequence[int],
        *,
        rows_of: Callable[[int], int],
        begin_of: Callable[[int], int],
        window: int,
        seed: tuple[int, ...],
        reuse: int = 1,
    ) -> None:
        self.shards, self.window, self.reuse = shards, window, reuse
        self._rows_of, self._begin_of, self._seed = rows_of, begin_of, seed
        self.n_ticks = max(1, len(shards) - window + 1)
        self._starts = [0]  # rows before tick 0, 1, … as far as it is known
        self._orders: dict[int, np.ndarray] = {}  # of the rows of the shards in the pool, by place

    def size(self, tick: int) -> int:
        """Rows that a tick draws."""
        counts = [[last - first for first, last in self._parts(place, tick)] for place in self._places(tick)]
        return sum(map(sum, counts))

    def start(self, tick: int) -> int:
        """Rows that were drawn before a tick."""
        while len(self._starts) <= tick:
            self._starts.append(self._starts[-1] + self.size(len(self._starts) - 1))
        return self._starts[tick]

    def tick_at(self, row: int) -> int:
        """The tick that draws the row-th row, `n_ticks` when the pass is over by then."""
        while self._starts[-1] <= row and len(self._starts) <= self.n_ticks:
            self.start(len(self._starts))
        return self.known_tick_at(row)

    def known_tick_at(self, row: int) -> int:
        """The same, without looking at ticks that nobody has come to yet: the first of those at most."""
        return bisect_right(self._starts, row) - 1

    def rows(self, tick: int) -> np.ndarray:
        """Numbers of the rows that a tick draws, in its order.

        Rows that come several times in one tick come once in each of its parts.
        """
        places = self._places(tick)
        self._orders = {place: order for place, order in self._orders.items() if place in places}
        draws = []
        for number in range(self.reuse):
            parts = ((place, part) for place in places for part in self._parts(place, tick, number))
            drawn = [self._order(place)[first:last] for place, (first, last) in parts]
            together = np.concatenate(drawn) if drawn else np.empty(0, np.int64)
            draws.append(self._random(_TICK, tick * self.reuse + number).permutation(together))
        return np.concatenate(draws)

    def batches(self, size: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """Yield the rows of batch `start_step` and those after it; rows that fill no last batch are left out.

        Within a batch, where order means nothing, they are in the order in which they lie on disk.
        """
        skipped = start_step * size
        first = self.tick_at(skipped)
        left = np.empty(0, np.int64)
        for tick in range(first, self.n_ticks):
            drawn = self.rows(tick)
            self.start(tick + 1)
            left = np.concatenate([left, drawn[skipped - self.start(first) :] if tick == first else drawn])
            whole = len(left) // size * size
            for begin in range(0, whole, size):
                yield np.sort(left[begin : begin + size])
            left = left[whole:]

    def _places(self, tick: int) -> range:
        return range(tick, min(tick + self.window, len(self.shards)))

    def _parts(self, place: int, tick: int, number: int | None = None) -> list[tuple[int, int]]:
        """Return which of a shard's rows, in its order, a tick takes, in its draw `number` or in all of them.

        Every tick that a shard is in takes another part of its rows. Draw q begins q/reuse of the parts further on than
        draw 0: no row comes twice in a tick unless it is drawn more often than there are ticks.
        """
        rows = self._rows_of(self.shards[place])
        first_tick, last_tick = max(0, place - self.window + 1), min(place, self.n_ticks - 1)
        span = last_tick - first_tick + 1
        draws = range(self.reuse) if number is None else (number,)
        pieces = [(tick - first_tick + draw * span // self.reuse) % span for draw in draws]
        return [(piece * rows // span, (piece + 1) * rows // span) for piece in pieces]

    def _order(self, place: int) -> np.ndarray:
        if place not in self._orders:
            shard = self.shards[place]
            order = self._random(_ROWS, shard).permutation(self._rows_of(shard))
            self._orders[place] = order + self._begin_of(shard)
        return self._orders[place]

    def _random(self, kind: int, number: int) -> np.random.Generator:
        return np.random.default_rng((*self._seed, kind, number))


def pool_of(memory: int, shard_bytes: int) -> int:
    """Return how many shards a pool of so much memory has."""
    return min(max(2, memory // max(1, shard_bytes)), _POOL)
