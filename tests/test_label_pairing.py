"""Rows paired at random among those of images with the same label: the control for what labels explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import usae_probe.usae.state as state_module
from usae_probe.buffer import ActivationBuffer, Rows
from usae_probe.config import TrainConfig
from usae_probe.errors import ConfigError
from usae_probe.usae import StepRecord, exchanged, train
from usae_probe.usae.draws import Mispairing

from .trainings import Stopped, batches_seen, related_rows, same

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"n_latents": 32, "k": 4, "steps": 12, "batch_size": 64}
LABELS = np.random.default_rng(7).integers(0, 5, size=400)


class TestExchanged:
    @settings(deadline=None, max_examples=80)
    @given(st.lists(st.integers(-1, 6), max_size=60), st.integers(0, 2**20))
    def test_an_order_that_keeps_every_label(self, given_labels: list[int], seed: int) -> None:
        label = np.array(given_labels, dtype=np.int64)
        order = exchanged(np.random.default_rng(seed), label)
        assert sorted(order.tolist()) == list(range(len(label)))
        np.testing.assert_array_equal(label[order], label)

    def test_things_move_and_all_orders_are_equally_likely(self) -> None:
        # three of label 0, two of label 5, one of label 2: 3! · 2! = 12 orders
        label, draw = np.array([0, 5, 0, 2, 5, 0]), np.random.default_rng(0)
        orders = [tuple(exchanged(draw, label).tolist()) for _ in range(6000)]
        assert len(set(orders)) == 12
        assert all(390 < orders.count(order) < 610 for order in set(orders))  # 500 each, σ = 21.4
        assert {order[3] for order in orders} == {3}

    def test_one_label_is_any_order(self) -> None:
        order = exchanged(np.random.default_rng(0), np.zeros(1000, dtype=np.int64))
        assert (order == np.arange(1000)).sum() < 8  # 1 expected
        assert len(exchanged(np.random.default_rng(0), np.array([], dtype=np.int64))) == 0


class TestMispairing:
    def rows(self, images: np.ndarray) -> Rows:
        """Rows whose values are their image's number."""
        values = {site: images[:, None].astype(np.float32).repeat(d, axis=1) for site, d in (("a/x", 3), ("b/y", 2))}
        return Rows(values, images, np.zeros(len(images), dtype=np.int64))

    @pytest.mark.parametrize("pairing", ["label", "shuffled"])
    def test_the_same_rows_in_another_order_of_every_site(self, pairing: str) -> None:
        images = np.random.default_rng(0).permutation(400)[:100]
        pairs = Mispairing(TrainConfig(pairing=pairing), LABELS)
        found = pairs.of(self.rows(images), 3, slice(None))
        columns = {site: values[:, 0].astype(int) for site, values in found.items()}
        for site, values in found.items():
            assert (values == values[:, :1]).all()  # rows stay whole
            assert sorted(columns[site].tolist()) == sorted(images.tolist())
        assert (columns["a/x"] != columns["b/y"]).mean() > 0.8
        alike = LABELS[columns["a/x"]] == LABELS[columns["b/y"]]
        assert alike.all() if pairing == "label" else alike.mean() < 0.4

    def test_step_and_seed_draw_it_and_processes_share_it(self) -> None:
        rows, how = self.rows(np.arange(100)), TrainConfig(pairing="label", seed=4)
        whole = Mispairing(how, LABELS).of(rows, 9, slice(None))
        halves = [Mispairing(how, LABELS).of(rows, 9, part) for part in (slice(50), slice(50, 100))]
        for site, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([half[site] for half in halves]), values)
        for other in (Mispairing(how, LABELS).of(rows, 10, slice(None)), Mispairing(
            TrainConfig(pairing="label", seed=5), LABELS
        ).of(rows, 9, slice(None))):  # fmt: skip
            assert any((other[site] != values).any() for site, values in whole.items())

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match=r"pairing = 'label' needs a label for every image \(use images with lab"):
            Mispairing(TrainConfig(pairing="label"), None)
        with pytest.raises(ConfigError, match=r"300 labels were given, none for image 399 \(give one for every image"):
            Mispairing(TrainConfig(pairing="label"), LABELS[:300]).of(self.rows(np.arange(400)), 1, slice(None))


class TestTraining:
    def test_rows_of_one_label_are_paired(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        # an image's number and its label are in both sites' rows
        numbers = np.arange(400.0)[:, None]
        arrays = {
            "m/a": np.hstack([numbers, LABELS[:, None], numbers, numbers]),
            "n/b": -np.hstack([numbers, LABELS[:, None], numbers]),
        }
        buffer = ActivationBuffer.from_arrays(arrays, tmp_path / "acts", dtype="float32")
        how = SETTINGS | {"steps": 5, "k": 2}
        paired = batches_seen(monkeypatch, buffer, pairing="image", **how)
        found = batches_seen(monkeypatch, buffer, pairing="label", labels=LABELS, **how)
        assert len(paired) == len(found) == 4
        for good, bad in zip(paired, found, strict=True):
            for columns in (slice(0, 4), slice(4, 7)):  # every site sees the rows that it would have seen
                torch.testing.assert_close(good[:, columns].sort(dim=0).values, bad[:, columns].sort(dim=0).values)
            torch.testing.assert_close(bad[:, 0], bad[:, 3])  # rows stay whole
            # labels of both sites, each in its own scale: equal labels are equal ranks
            ranks = [np.unique(bad[:, column].numpy().round(4), return_inverse=True)[1] for column in (1, 5)]
            assert ranks[0].max() == ranks[1].max() == 4
            np.testing.assert_array_equal(ranks[0], 4 - ranks[1])  # the second site's are negative
            image = [np.argsort(np.argsort(sign * bad[:, column].numpy())) for sign, column in ((1, 0), (-1, 4))]
            assert (image[0] != image[1]).mean() > 0.8  # and yet of other images
        orders = [bad[:, 0].argsort().tolist() for bad in found]
        assert orders[0] != orders[1]  # a new pairing each step

    def test_it_starts_from_nothing_that_is_paired(self, tmp_path: Path) -> None:
        buffer = related_rows(tmp_path / "acts")
        starts = {}
        for pairing in ("image", "shuffled", "label"):
            labels = LABELS if pairing == "label" else None
            starts[pairing] = train(
                buffer, n_latents=32, k=4, steps=1, lr=1e-12, init="data", pairing=pairing, labels=labels
            ).usae.W_dec
        torch.testing.assert_close(starts["label"], starts["shuffled"])
        assert not starts["label"].allclose(starts["image"], atol=1e-3)

    def test_refused_without_labels_or_with_too_few(self, tmp_path: Path) -> None:
        buffer = related_rows(tmp_path / "acts")
        with pytest.raises(ConfigError, match=r"needs a label for every image .*give labels="):
            train(buffer, **SETTINGS, pairing="label")
        with pytest.raises(ConfigError, match=r"100 labels were given, none for image \d+ \("):
            train(buffer, **SETTINGS, pairing="label", labels=LABELS[:100])

    def test_labels_change_nothing_of_another_pairing(self, tmp_path: Path) -> None:
        buffer = related_rows(tmp_path / "acts")
        assert same(train(buffer, **SETTINGS).usae, train(buffer, **SETTINGS, labels=LABELS).usae)
        assert not same(train(buffer, **SETTINGS).usae, train(buffer, **SETTINGS, pairing="label", labels=LABELS).usae)


class TestResumed:
    """A state is of the labels, too."""

    @pytest.fixture(autouse=True)
    def _state_after_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(state_module, "SECONDS", 0.0)

    def stopped(self, buffer: ActivationBuffer, state: Path) -> None:
        def follow(record: StepRecord) -> None:
            if record.step > 7:
                raise Stopped

        with pytest.raises(Stopped):
            train(buffer, progress=follow, resume=state, **SETTINGS, pairing="label", labels=LABELS)

    def test_the_same_bits(self, tmp_path: Path) -> None:
        buffer = related_rows(tmp_path / "acts")
        whole = train(buffer, **SETTINGS, pairing="label", labels=LABELS)
        self.stopped(buffer, tmp_path / "state")
        resumed = train(buffer, **SETTINGS, pairing="label", labels=LABELS.copy(), resume=tmp_path / "state")
        assert resumed.resumed == 7
        assert same(resumed.usae, whole.usae)

    def test_other_labels_start_anew(self, tmp_path: Path) -> None:
        buffer = related_rows(tmp_path / "acts")
        other = np.where(np.arange(400) == 17, LABELS + 1, LABELS)
        self.stopped(buffer, tmp_path / "state")
        fresh = train(buffer, **SETTINGS, pairing="label", labels=other, resume=tmp_path / "state")
        assert fresh.resumed == 0
        assert same(fresh.usae, train(buffer, **SETTINGS, pairing="label", labels=other).usae)

    def test_another_pairing_starts_anew(self, tmp_path: Path) -> None:
        buffer = related_rows(tmp_path / "acts")
        self.stopped(buffer, tmp_path / "state")
        assert train(buffer, **SETTINGS, resume=tmp_path / "state").resumed == 0
