"""Training: schedule, determinism, normalisation, sources, pairing, records and refusals."""

from __future__ import annotations

import math
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig, UsaeConfig
from usae_probe.errors import BufferIntegrityError, ConfigError, NonFiniteError, UsageError
from usae_probe.split import draw_split
from usae_probe.usae import StepRecord, TrainResult, losses, train, train_steps, usae_for
from usae_probe.usae.schedule import learning_rate, phase_and_source

from . import oracles
from .trainings import PLAIN, batches_seen

MODULE = sys.modules[train.__module__]  # the package's attribute of that name is the function
SITES = ["m/a", "n/b"]
SMALL: dict[str, Any] = {"n_latents": 32, "k": 3, "steps": 20, "batch_size": 50}


def correlated(n: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    """Two views of the same sparse causes."""
    rng = np.random.default_rng(seed)
    causes = rng.exponential(size=(n, 16)) * (rng.random((n, 16)) < 0.2)
    return {"m/a": causes @ rng.normal(size=(16, 10)) + 3, "n/b": causes @ rng.normal(size=(16, 8)) - 1}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    return ActivationBuffer.from_arrays(correlated(), tmp_path_factory.mktemp("train") / "acts", dtype="float32")


def records(buffer: ActivationBuffer, **settings: Any) -> list[StepRecord]:
    kept: list[StepRecord] = []
    train(buffer, progress=kept.append, **(SMALL | settings))
    return kept


def weights(result: TrainResult) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in result.usae.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


class TestLearningRate:
    def test_by_hand(self) -> None:
        # 100 steps, 10 of warm-up: step 1 is lr/10, step 10 lr; half of the cosine at step 55: (lr + floor)/2
        how = TrainConfig(lr=1.0, lr_warmup=0.1, lr_final=0.02)
        assert learning_rate(1, 100, how) == pytest.approx(0.1)
        assert learning_rate(5, 100, how) == pytest.approx(0.5)
        assert learning_rate(10, 100, how) == pytest.approx(1.0)
        assert learning_rate(55, 100, how) == pytest.approx((1.0 + 0.02) / 2)
        assert learning_rate(100, 100, how) == pytest.approx(0.02)

    @settings(deadline=None, max_examples=60)
    @given(st.integers(2, 300), st.floats(0, 0.9), st.floats(0, 1))
    def test_rises_to_lr_then_falls_to_its_share(self, steps: int, warmup: float, final: float) -> None:
        how = TrainConfig(lr=2e-3, lr_warmup=warmup, lr_final=final)
        rates = [learning_rate(step, steps, how) for step in range(1, steps + 1)]
        rising = round(warmup * steps)
        assert max(rates) <= 2e-3 * (1 + 1e-12)
        if rising:
            assert rates[rising - 1] == pytest.approx(2e-3)
        if rising < steps:
            assert rates[-1] == pytest.approx(2e-3 * final)
        assert all(a < b for a, b in pairwise(rates[:rising]))
        assert all(a >= b for a, b in pairwise(rates[max(rising - 1, 0) :]))

    def test_one_step_count_whichever_site_was_the_source(self, buffer: ActivationBuffer) -> None:
        how = TrainConfig(lr=2e-3)
        expected = [learning_rate(step, 40, how) for step in range(1, 41)]
        for source in ("random", "all"):
            kept = records(buffer, steps=40, lr=2e-3, source=source)
            assert [record.lr for record in kept] == expected
        assert expected[-1] == pytest.approx(2e-5)

    def test_the_optimiser_uses_it(self, buffer: ActivationBuffer) -> None:
        # Adam's first step moves every entry with a gradient by lr (bias-corrected, ε aside)
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=3), TrainConfig())
        before = usae.b_dec.detach().clone()
        next(train_steps(usae, buffer, TrainConfig(steps=10, lr=0.01, lr_warmup=0.5)))
        torch.testing.assert_close((usae.b_dec - before).abs(), torch.full((18,), 0.002), rtol=1e-2, atol=0.0)


class TestDeterminism:
    @pytest.mark.parametrize("kernel", ["csr", "reference"])
    def test_same_seed_same_bits(self, buffer: ActivationBuffer, kernel: str) -> None:
        torch.set_num_threads(2)
        one = train(buffer, **SMALL, seed=3, kernel=kernel)
        torch.manual_seed(99)  # nothing depends on the global seed
        two = train(buffer, **SMALL, seed=3, kernel=kernel)
        assert same(weights(one), weights(two))
        assert one.history == two.history

    def test_other_seeds_differ(self, buffer: ActivationBuffer) -> None:
        one, two = (train(buffer, **SMALL, seed=seed) for seed in (3, 4))
        assert not one.usae.W_dec.equal(two.usae.W_dec)
        assert [r.loss for r in one.history] != [r.loss for r in two.history]

    def test_kernels_agree(self, buffer: ActivationBuffer) -> None:
        csr, reference = (records(buffer, kernel=kernel) for kernel in ("csr", "reference"))
        np.testing.assert_allclose([r.loss for r in csr], [r.loss for r in reference], rtol=1e-3)

    def test_the_sources_depend_on_seed_and_step_alone(self, buffer: ActivationBuffer) -> None:
        plain = [record.source for record in records(buffer, steps=40, align_warmup=0.0)]
        assert set(plain) == set(SITES)
        assert 8 <= plain.count("m/a") <= 32
        changed = {
            "lr": 1e-4,
            "batch_size": 7,
            "n_latents": 16,
            "aux_k": 0,
            "pairing": "shuffled",
            "kernel": "reference",
        }
        assert [r.source for r in records(buffer, steps=40, align_warmup=0.0, **changed)] == plain
        assert [r.source for r in records(buffer, steps=60, align_warmup=0.0)][:40] == plain
        warmed = records(buffer, steps=40, align_warmup=0.25)
        assert [r.source for r in warmed] == ["all"] * 10 + plain[10:]
        assert [r.phase for r in warmed] == ["align"] * 10 + ["main"] * 30
        assert [r.source for r in records(buffer, steps=40, align_warmup=0.0, seed=1)] != plain


def test_sites_to_be_aligned_are_drawn_anew_in_every_step() -> None:
    sites, how = list("abcde"), TrainConfig(align_warmup=0.5, align_sites=3)
    drawn = [phase_and_source(sites, how, step, 8000) for step in range(1, 4001)]
    assert {phase for phase, _ in drawn} == {"align"}
    times = Counter(source for _, source in drawn)
    assert set(times) == {" + ".join(three) for three in combinations(sites, 3)}
    assert all(320 < n < 480 for n in times.values())  # 400 each, ten of them, binomial: σ = 19
    assert drawn[:50] == [phase_and_source(sites, how, step, 8000) for step in range(1, 51)]
    other = how.model_copy(update={"seed": 1})
    assert drawn[:50] != [phase_and_source(sites, other, step, 8000) for step in range(1, 51)]
    assert phase_and_source(sites[:3], how, 1, 8000) == ("align", "all")
    assert phase_and_source(sites, how, 1, 8000, joint=True) == ("align", "all")  # global-topk: always all
    assert phase_and_source(sites[:1], how, 1, 8000, joint=True) == ("main", "a")


class TestNormalisation:
    def test_of_training_rows_alone(self, tmp_path: Path) -> None:
        rows = correlated()
        split = draw_split(400)
        absurd = {site: values.copy() for site, values in rows.items()}
        for values in absurd.values():
            values[split.holdout] = 1e6
            values[split.validation] = -1e6
        results = []
        for name, arrays in (("plain", rows), ("absurd", absurd)):
            buffer = ActivationBuffer.from_arrays(arrays, tmp_path / name, dtype="float32")
            results.append(weights(train(buffer, **SMALL)))
        assert same(*results)

    def test_mean_and_scale(self, buffer: ActivationBuffer) -> None:
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=3), TrainConfig())
        for site, x in buffer.read("train").values.items():
            x_tilde = usae.normalise(torch.from_numpy(x), site).double()
            torch.testing.assert_close(x_tilde.mean(0), torch.zeros(usae.d_in[site]).double(), atol=1e-6, rtol=0)
            # E‖x̃‖² = d_in, by one scalar: directions keep their relative spread
            assert x_tilde.square().sum(1).mean().item() == pytest.approx(usae.d_in[site], rel=1e-5)
            np.testing.assert_allclose(x_tilde.std(0) / x_tilde.std(), x.std(0) / (x - x.mean(0)).std(), rtol=1e-2)

    def test_is_stored_with_the_model(self, buffer: ActivationBuffer) -> None:
        usae = train(buffer, **SMALL).usae
        start = usae_for(buffer, UsaeConfig(n_latents=32, k=3), TrainConfig())
        assert usae.mean.equal(start.mean)  # training leaves it alone
        assert usae.scale.equal(start.scale)


class TestLoss:
    @pytest.mark.parametrize("source", ["random", "all"])
    def test_decreases(self, buffer: ActivationBuffer, source: str) -> None:
        kept = records(buffer, steps=150, source=source, lr=1e-2)
        first, last = (np.mean([record.loss for record in part]) for part in (kept[:10], kept[-10:]))
        assert last < 0.6 * first
        r2 = kept[-1].r2
        assert r2 is not None
        assert min(value for row in r2.values() for value in row.values()) > 0.4

    def test_one_site_is_an_independent_sae(self, buffer: ActivationBuffer) -> None:
        kept = records(buffer, sites=["n/b"])
        assert {record.source for record in kept} == {"n/b"}
        assert {record.phase for record in kept} == {"main"}  # nothing to align
        assert train(buffer, **SMALL, sites=["n/b"]).usae.sites == ("n/b",)

    def test_the_decoder_norm_holds_throughout(self, buffer: ActivationBuffer) -> None:
        how = TrainConfig(steps=12, lr=0.1)
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=3), how)
        for _ in train_steps(usae, buffer, how):
            torch.testing.assert_close(usae.W_dec.norm(dim=1), torch.full((32,), math.sqrt(2)))

    def test_all_sources_average(self, buffer: ActivationBuffer) -> None:
        # the same model and batch: the loss with source "all" is the mean of those of the two sources
        given = PLAIN | {"steps": 1, "align_warmup": 0.0, "source": "all"}
        how = TrainConfig(**given)
        by_all = records(buffer, **given)[0]
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=3), how)
        rows = next(buffer.batches("train", 50, seed=0)).values
        x = torch.cat([usae.normalise(torch.from_numpy(rows[site]), site) for site in SITES], dim=1)
        none_dead = torch.zeros(32, dtype=torch.bool)
        single = [losses.source_loss(usae, x, site, dead=none_dead, aux_k=0, aux_coef=0.0) for site in SITES]
        assert by_all.loss == pytest.approx(np.mean([loss.total.item() for loss in single]), rel=1e-5)
        assert list(by_all.losses.values()) == pytest.approx(np.mean([s.per_site.numpy() for s in single], axis=0))

    def test_not_finite_names_the_step(self, buffer: ActivationBuffer) -> None:
        with pytest.raises(
            NonFiniteError, match=r"not finite at step [2-9] \(source (all|m/a|n/b), targets .*train.lr"
        ):
            train(buffer, **SMALL, lr=1e30)


class TestPairing:
    def test_shuffled_changes_pairs_and_nothing_else(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        numbers = np.random.default_rng(0).normal(size=(400, 1))
        rows = {"m/a": numbers @ np.ones((1, 9)), "n/b": numbers @ -np.ones((1, 8))}  # one tells the other
        buffer = ActivationBuffer.from_arrays(rows, tmp_path / "acts", dtype="float32")
        how = SMALL | {"steps": 4}
        paired, mispaired = (
            batches_seen(monkeypatch, buffer, pairing=pairing, **how) for pairing in ("image", "shuffled")
        )
        assert len(paired) == len(mispaired) == 4
        for good, bad in zip(paired, mispaired, strict=True):
            torch.testing.assert_close(good[:, 0], -good[:, 9], rtol=1e-4, atol=1e-5)
            assert (bad[:, 0] + bad[:, 9]).abs().gt(1e-3).float().mean() > 0.9
            for columns in (slice(0, 9), slice(9, 17)):  # every site sees the rows that it would have seen
                torch.testing.assert_close(good[:, columns].sort(dim=0).values, bad[:, columns].sort(dim=0).values)
            torch.testing.assert_close(bad[:, 0], bad[:, 8])  # rows stay whole
        orders = [bad[:, 0].argsort() for bad in mispaired]
        assert not orders[0].equal(orders[1])  # a new pairing each step


class TestLength:
    def test_steps_and_epochs(self, buffer: ActivationBuffer) -> None:
        assert buffer.n_rows("train") == 324
        by_epochs = {key: value for key, value in SMALL.items() if key != "steps"}
        assert train(buffer, **by_epochs, epochs=2.0).history[-1].steps == 12  # 324 // 50 = 6 a pass
        assert train(buffer, **by_epochs, epochs=0.5).history[-1].steps == 3
        assert train(buffer, **by_epochs, epochs=0.01).history[-1].steps == 1
        assert train(buffer, **SMALL).history[-1].steps == 20
        assert TrainConfig().n_steps(6) == 600  # 100 passes
        with pytest.raises(ConfigError, match=r"both epochs = 2.0 and steps = 20 are given: keep one"):
            train(buffer, **SMALL, epochs=2.0)

    def test_a_batch_may_be_all_rows(self, buffer: ActivationBuffer) -> None:
        assert train(buffer, **(SMALL | {"steps": 2, "batch_size": 4096})).history[-1].step == 2


class TestRecords:
    def test_history_keeps_every_tenth_and_the_last(self, buffer: ActivationBuffer) -> None:
        result = train(buffer, **(SMALL | {"steps": 25}))
        assert [record.step for record in result.history] == [10, 20, 25]
        assert [record.r2 is not None for record in result.history] == [False, False, True]
        assert result.seconds > 0
        assert [r.step for r in train(buffer, **SMALL, log_every=7).history] == [7, 14, 20]
        validated = train(buffer, **SMALL, log_every=100, validate_every=8).history
        assert [record.step for record in validated] == [8, 16, 20]
        assert all(record.r2 is not None for record in validated)

    def test_without_validation_rows_the_last_step_is_kept_too(self, tmp_path: Path) -> None:
        buffer = ActivationBuffer.from_arrays(correlated(60), tmp_path / "acts", validation=0.0)
        history = train(buffer, **(SMALL | {"steps": 5})).history
        assert [(record.step, record.r2) for record in history] == [(5, None)]

    def test_progress_sees_every_step(self, buffer: ActivationBuffer) -> None:
        kept = records(buffer, **PLAIN)
        assert [record.step for record in kept] == list(range(1, 21))
        for record in kept:
            assert record.steps == 20
            assert set(record.losses) == set(SITES)
            assert record.loss == pytest.approx(sum(record.losses.values()) + record.aux / 32, rel=1e-5)
            assert record.grad_norm > 0

    def test_validation_r2_is_of_validation_rows(self, buffer: ActivationBuffer) -> None:
        result = train(buffer, **SMALL)
        expected = oracles.r2(result.usae, buffer.read("validation").values)
        found = result.history[-1].r2
        assert found is not None
        for source in SITES:
            assert found[source] == pytest.approx(expected[source], abs=1e-5)

    @pytest.mark.parametrize("dead_after", [1, 3])
    def test_dead_share(self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch, dead_after: int) -> None:
        fired: list[Tensor] = []
        given_dead: list[Tensor | None] = []
        source_loss, alignment_loss = losses.source_loss, losses.alignment_loss

        def spy_source(*args: Any, dead: Tensor, **options: Any) -> Any:
            loss = source_loss(*args, dead=dead, **options)
            fired.append(loss.fired)
            given_dead.append(dead.clone())
            return loss

        def spy_align(*args: Any) -> Any:
            loss = alignment_loss(*args)
            fired.append(loss.fired)
            given_dead.append(None)
            return loss

        monkeypatch.setattr(losses, "source_loss", spy_source)
        monkeypatch.setattr(losses, "alignment_loss", spy_align)
        kept = records(buffer, dead_after=dead_after, batch_size=4)
        silent = [0] * 32
        for record, now, dead in zip(kept, fired, given_dead, strict=True):
            if dead is not None:  # the state before the step decides which latents model the residual
                assert dead.tolist() == [count >= dead_after for count in silent]
            silent = [0 if on else count + 1 for count, on in zip(silent, now.tolist(), strict=True)]
            assert record.dead_share == pytest.approx(sum(count >= dead_after for count in silent) / 32)
        shares = [record.dead_share for record in kept]
        assert shares[: dead_after - 1] == [0.0] * (dead_after - 1)
        assert max(shares) > 0


class TestSettings:
    def test_by_keyword_over_configs(self, buffer: ActivationBuffer) -> None:
        result = train(
            buffer, usae_config=UsaeConfig(n_latents=20, k=2), train_config=TrainConfig(steps=3), k=4, lr=0.5
        )
        assert (result.usae.n_latents, result.usae.k) == (20, 4)
        assert result.history[-1].steps == 3

    def test_unknown_and_impossible(self, buffer: ActivationBuffer) -> None:
        with pytest.raises(ConfigError, match=r"unknown setting 'batchsize' \(did you mean 'batch_size'"):
            train(buffer, **SMALL, batchsize=3)
        with pytest.raises(ConfigError, match="k = 33 is more than n_latents = 32"):
            train(buffer, **(SMALL | {"k": 33}))
        with pytest.raises(ConfigError, match=r"'lr': .*greater than 0, given -1"):
            train(buffer, **SMALL, lr=-1.0)
        with pytest.raises(ConfigError, match=r"'source'.*'random' or 'all', or a table.*, given 'first'"):
            train(buffer, **SMALL, source="first")
        with pytest.raises(UsageError, match="seed=-1"):
            train(buffer, **SMALL, seed=-1)

    def test_sites(self, buffer: ActivationBuffer) -> None:
        assert train(buffer, **SMALL, sites=["n/b", "m/a"]).usae.sites == ("n/b", "m/a")
        with pytest.raises(BufferIntegrityError, match=r"no site 'm/c' \(sites: m/a, n/b\)"):
            train(buffer, **SMALL, sites=["m/c"])
        with pytest.raises(ConfigError, match="at least one site"):
            train(buffer, **SMALL, sites=[])

    def test_a_constant_site_is_refused(self, tmp_path: Path) -> None:
        rows = correlated(60) | {"o/c": np.full((60, 4), 7.0)}
        buffer = ActivationBuffer.from_arrays(rows, tmp_path / "acts")
        with pytest.raises(BufferIntegrityError, match="site 'o/c' is constant over the 49 training rows"):
            train(buffer, **SMALL)
