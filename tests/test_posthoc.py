"""Independent SAEs matched afterwards: what is the same is found, and what matching on the tested rows makes up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import ProbesConfig
from usae_probe.probes import CATEGORIES
from usae_probe.probes.matching import code_matrix
from usae_probe.probes.posthoc import PostHoc, matched_afterwards, partners
from usae_probe.split import SplitName
from usae_probe.usae import USAE

A, B, C = "m/a", "n/b", "o/c"
CONFIG = ProbesConfig(nulls=3, bootstrap=0)


def reader(site: str, order: np.ndarray, d: int) -> USAE:
    """An SAE by hand: latent k reads and writes direction order[k] of d; all may fire at once.

    The rows have one dimension more, which is always 0: k ≥ d_in is warned of.
    """
    sae = USAE({site: d + 1}, len(order), len(order))
    with torch.no_grad():
        sae.W_enc[0].copy_(torch.eye(d + 1)[torch.from_numpy(order)])
        sae.b_enc[0].fill_(-0.5)
        sae.W_dec.copy_(torch.eye(d + 1)[torch.from_numpy(order)])
    return sae.eval()


def made(path: Path, on: dict[str, np.ndarray], *, per_image: int = 1) -> ActivationBuffer:
    """Rows that have 1 to 2 in the directions that are on, [rows, d] by site, and 0 in all others."""
    rng = np.random.default_rng(9)
    values = {site: np.pad(of * rng.uniform(1, 2, of.shape), ((0, 0), (0, 1))) for site, of in on.items()}
    image = np.arange(len(next(iter(on.values())))) // per_image
    return ActivationBuffer.from_arrays(values, path, image_index=image, holdout=0.5, validation=0.1, dtype="float32")


def matched(saes: dict[str, USAE], buffer: ActivationBuffer, split: SplitName) -> dict[str, torch.Tensor]:
    return partners({site: code_matrix(sae, site, buffer, split) for site, sae in saes.items()})


def shuffled(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    """Three sites whose 30 directions are on in the same rows, each with a strength of its own."""
    on = np.random.default_rng(0).random((1600, 30)) < 0.1
    return made(tmp_path_factory.mktemp("same") / "acts", {A: on, B: on, C: on})


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    """Two sites with nothing in common: 400 directions, on in 12 % to 25 % of 240 rows."""
    rng = np.random.default_rng(1)
    rate = rng.uniform(0.12, 0.25, 400)
    on = {site: rng.random((240, 400)) < rate for site in (A, B)}
    return made(tmp_path_factory.mktemp("unrelated") / "acts", on)


class TestPartners:
    @pytest.mark.parametrize("split", ["train", "holdout"])
    def test_a_permuted_copy_is_put_in_order(self, same: ActivationBuffer, split: SplitName) -> None:
        orders = {A: shuffled(30, 1), B: shuffled(30, 2), C: shuffled(30, 3)}
        saes = {site: reader(site, order, 30) for site, order in orders.items()}
        place = matched(saes, same, split)
        assert place[A].tolist() == list(range(30))
        for site in (B, C):  # latent l of b reads the direction that its partner reads
            np.testing.assert_array_equal(orders[A][place[site].numpy()], orders[site])

    def test_of_more_latents_some_have_no_partner(self, same: ActivationBuffer) -> None:
        saes = {A: reader(A, np.arange(12), 30), B: reader(B, np.arange(30)[::-1].copy(), 30)}
        place = matched(saes, same, "train")
        assert sorted(place[B][place[B] >= 0].tolist()) == list(range(12))
        assert (place[B] == -1).sum() == 18
        assert place[B][:18].tolist() == [-1] * 18  # directions 29 … 12
        assert place[B][18:].tolist() == list(range(11, -1, -1))


class TestMatchedAfterwards:
    @pytest.mark.parametrize("matched_on", ["train", "holdout"])
    def test_copies_are_universal(self, same: ActivationBuffer, matched_on: SplitName) -> None:
        saes = {A: reader(A, shuffled(30, 1), 30), B: reader(B, shuffled(30, 2), 30)}
        found = matched_afterwards(saes, same, config=CONFIG, matched_on=matched_on)
        assert found == PostHoc(matched_on, 30, dict.fromkeys(CATEGORIES, 0) | {"universal": 30}, 0.0)

    def test_of_three_sites(self, same: ActivationBuffer) -> None:
        saes = {site: reader(site, shuffled(30, i), 30) for i, site in enumerate((A, B, C))}
        found = matched_afterwards(saes, same, config=CONFIG, matched_on="train")
        assert found.counts["universal"] == found.n_pairs == 30

    def test_latents_without_a_partner_are_left_out(self, same: ActivationBuffer) -> None:
        few, all_of_them = reader(A, shuffled(12, 1), 30), reader(B, shuffled(30, 2), 30)
        found = matched_afterwards({A: few, B: all_of_them}, same, config=CONFIG, matched_on="train")
        assert (found.n_pairs, found.counts["universal"]) == (12, 12)
        turned = matched_afterwards({B: all_of_them, A: few}, same, config=CONFIG, matched_on="train")
        assert turned.n_pairs == turned.counts["universal"] == 12
        assert turned.counts["specific"] == 18  # 30 latents of the first site, 12 with a partner

    def test_unrelated_ones_are_not(self, unrelated: ActivationBuffer) -> None:
        saes = {A: reader(A, shuffled(400, 1), 400), B: reader(B, shuffled(400, 2), 400)}
        train, holdout = (
            matched_afterwards(saes, unrelated, config=CONFIG, matched_on=split) for split in ("train", "holdout")
        )
        assert train.n_pairs == holdout.n_pairs == 400
        assert train.counts["universal"] + train.counts["partial"] <= 1
        assert train.null is not None
        assert train.null <= 1
        # partners that were chosen for co-firing on the very rows of the test do co-fire there: that is the point
        shared = [found.counts["universal"] + found.counts["partial"] for found in (train, holdout)]
        assert shared[1] >= shared[0] + 5
        assert holdout.null is not None  # and matching them on rows that are paired at random makes up as many
        assert abs(holdout.null - holdout.counts["universal"]) <= 5

    def test_no_pairings_no_null(self, same: ActivationBuffer) -> None:
        saes = {A: reader(A, np.arange(30), 30), B: reader(B, np.arange(30), 30)}
        assert matched_afterwards(saes, same, config=ProbesConfig(nulls=0)).null is None
        assert matched_afterwards(saes, same, config=CONFIG).matched_on == "holdout"

    def test_tested_on_validation_rows(self, same: ActivationBuffer) -> None:
        # 80 validation images, min_fires 10 of them: few pairs have them, and none without is universal
        saes = {A: reader(A, np.arange(30), 30), B: reader(B, shuffled(30, 2), 30)}
        on = same.read("validation").values[A][:, :30] > 0
        found = matched_afterwards(saes, same, config=CONFIG, matched_on="train", split="validation")
        assert found.counts["universal"] == (on.sum(0) >= 10).sum() < 30
        assert found.counts["rare"] == (on.sum(0) < 10).sum()

    def test_thresholds_are_those_of_the_config(self, same: ActivationBuffer) -> None:
        saes = {A: reader(A, np.arange(30), 30), B: reader(B, np.arange(30), 30)}
        strict = matched_afterwards(saes, same, config=ProbesConfig(nulls=0, min_fires=10_000), matched_on="train")
        assert strict.counts["rare"] == 30
        loud = matched_afterwards(saes, same, config=ProbesConfig(nulls=0, tau=5.0), matched_on="train")
        assert loud.counts["dead"] == 30  # strengths are 1 to 2

    def test_of_training_rows_no_more_than_asked_for_are_matched_on(self, same: ActivationBuffer) -> None:
        # nothing correlates over one row; the number is that of training rows alone
        saes = {A: reader(A, shuffled(30, 1), 30), B: reader(B, shuffled(30, 2), 30)}
        one_row = ProbesConfig(nulls=0, bootstrap=0, train_rows=1)
        assert matched_afterwards(saes, same, config=one_row, matched_on="train").counts["universal"] < 10
        assert matched_afterwards(saes, same, config=one_row, matched_on="holdout").counts["universal"] == 30

    @pytest.mark.parametrize("kind", ["content", "place"])
    def test_several_rows_per_image(self, tmp_path: Path, kind: str) -> None:
        """By content copies are universal; by place alone they are not, however well their codes correlate."""
        rng = np.random.default_rng(0)
        shape = (400, 9, 20)
        at = np.broadcast_to(np.arange(9)[:, None] == np.arange(20) % 9, shape)
        on = {}
        content = rng.random(shape) < 0.1
        for site in (A, B):
            on[site] = (content if kind == "content" else at | (rng.random(shape) < 0.02)).reshape(-1, 20)
        buffer = made(tmp_path / "acts", on, per_image=9)
        order = shuffled(20, 2)
        saes = {A: reader(A, np.arange(20), 20), B: reader(B, order, 20)}
        found = matched_afterwards(saes, buffer, config=CONFIG, matched_on="train")
        expected = "universal" if kind == "content" else "chance"
        assert found.n_pairs == 20
        assert found.counts[expected] >= 19
        assert found.null is not None
        assert found.null <= 1
        if kind == "place":  # the place alone matches them: latents of one place with each other
            place = matched(saes, buffer, "train")[B].numpy()
            np.testing.assert_array_equal(place % 9, order % 9)
