"""The split: disjoint, by image, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.errors import ConfigError
from usae_probe.split import SPLITS, draw_split


def test_counts_worked_out_by_hand():
    # 1000 images, 200 drawn; holdout round(200 * .1) = 20; validation round(180 * .1) = 18; 162 stay for training.
    split = draw_split(1000, limit=200, holdout=0.1, validation=0.1, seed=3)
    assert {name: len(indices) for name, indices in split} == {"train": 162, "validation": 18, "holdout": 20}
    assert split.n_images == 200


def test_limit_draws_over_the_whole_source():
    split = draw_split(1000, limit=100, seed=0)
    drawn = np.concatenate([split[name] for name in SPLITS])
    # The first hundred would have mean 49.5; a draw over all has 499.5 ± 27.
    assert 400 < drawn.mean() < 600
    assert drawn.max() > 900


def test_limit_above_the_source_takes_everything_once():
    split = draw_split(17, limit=1000)
    assert sorted(np.concatenate([indices for _, indices in split]).tolist()) == list(range(17))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 300),
    holdout=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    validation=st.sampled_from([0.0, 0.01, 0.1, 0.4]),
    seed=st.integers(0, 5),
)
def test_parts_are_disjoint_and_complete(n: int, holdout: float, validation: float, seed: int):
    split = draw_split(n, holdout=holdout, validation=validation, seed=seed)
    drawn = np.concatenate([indices for _, indices in split])
    assert drawn.dtype == np.int64
    assert sorted(drawn.tolist()) == list(range(n))
    # A share above zero is never empty, zero always is.
    assert (len(split.holdout) > 0) == (holdout > 0)
    assert (len(split.validation) > 0) == (validation > 0)


def test_same_seed_same_split_and_digest():
    first, again, other = draw_split(50, seed=1), draw_split(50, seed=1), draw_split(50, seed=2)
    assert first.digest() == again.digest()
    assert first.train.tolist() == again.train.tolist()
    assert first.digest() != other.digest()
    assert first.train.tolist() != other.train.tolist()


def test_digest_tells_parts_apart():
    # The same order of images, cut elsewhere.
    assert draw_split(50, holdout=0.1).digest() != draw_split(50, holdout=0.2).digest()


def test_nothing_left_for_training():
    # round(2 * .5) = 1 for holdout, max(1, round(1 * .1)) = 1 for validation.
    with pytest.raises(ConfigError, match=r"2 images leave none for training after holdout=0.5 and validation=0.1"):
        draw_split(2, holdout=0.5, validation=0.1)


def test_empty_source():
    with pytest.raises(ConfigError, match="0 images leave none"):
        draw_split(0)
