"""`recipe = "published"`: one step against its description in float64, folding into a plain USAE, training by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import usae_probe.usae.state as state_module
from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig, checked, settled
from usae_probe.errors import ConfigError
from usae_probe.probes import evaluate
from usae_probe.usae import USAE, StepRecord, train
from usae_probe.usae.published import PublishedAdamW, PublishedObjective, published_rate
from usae_probe.world import World

from . import oracles

pytestmark = pytest.mark.usefixtures("one_thread")

DIMS = {"m/a": 6, "n/b": 4, "o/c": 5}
N, K, B = 15, 3, 24
PUBLISHED = TrainConfig(recipe="published")
SMALL: dict[str, Any] = {"recipe": "published", "n_latents": 32, "k": 3, "steps": 20, "batch_size": 50}


def raw_rows(seed: int = 0) -> dict[str, Tensor]:
    """Rows whose dimensions differ in mean and spread."""
    g = torch.Generator().manual_seed(seed)
    rows = {}
    for site, d in DIMS.items():
        spread, mean = 0.5 + torch.rand(d, generator=g), 3 * torch.randn(d, generator=g)
        rows[site] = (mean + spread * torch.randn(B, d, generator=g)).double()
    return rows


def case(how: TrainConfig = PUBLISHED) -> tuple[PublishedObjective, Tensor, dict[str, Tensor]]:
    """An objective with nothing at its first value, normalised rows side by side, and the same rows as they were."""
    rows = raw_rows()
    normalisation = {site: (x.mean(0), float(x.var(0, unbiased=False).mean().sqrt())) for site, x in rows.items()}
    usae = USAE(DIMS, N, K).double()
    for site, (mean, scale) in normalisation.items():
        usae.mean[usae.columns[site]], usae.scale[usae.site_index(site)] = mean, scale
    objective = PublishedObjective(usae, how)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g).double())
    for site in DIMS:
        objective.part(site).normalise_dictionary()
    return objective, torch.cat([usae.normalise(rows[site], site) for site in usae.sites], dim=1), rows


def step_of(objective: PublishedObjective, x: Tensor, source: str) -> Any:
    return objective(x, "main", source, torch.zeros(N, dtype=torch.bool))


class TestOracle:
    @pytest.mark.parametrize("source", DIMS)
    def test_loss_and_gradients(self, source: str) -> None:
        objective, x, rows = case()
        loss = step_of(objective, x, source)
        loss.total.backward()

        def leaf(value: Tensor) -> Tensor:
            return value.detach().clone().requires_grad_()

        part = objective.part(source)
        w, b, gamma, beta = (leaf(p) for p in (part.weight, part.bias, part.norm.weight, part.norm.bias))
        # ONE mean and ONE standard deviation per site, over all entries
        y = {site: (r - r.mean()) / r.std(unbiased=False) for site, r in rows.items()}
        h = y[source] @ w.T + b
        normed = (h - h.mean(0)) / torch.sqrt(((h - h.mean(0)) ** 2).mean(0) + 1e-5) * gamma + beta
        relu = torch.clamp(normed, min=0.0)
        z = relu * oracles.largest(relu.detach(), K)
        unit = {s: objective.part(s).dictionary.detach() for s in DIMS}
        unit = {s: d / d.norm(dim=1, keepdim=True) for s, d in unit.items()}
        own = leaf(unit[source])
        errors = [(y[s] - z @ (own if s == source else unit[s])).abs().sum() / y[s].numel() for s in DIMS]
        total = torch.stack(errors).sum()
        total.backward()

        close = {"rtol": 1e-6, "atol": 1e-8}  # 1e-8 in the dictionary's norm
        torch.testing.assert_close(loss.total, total, **close)
        torch.testing.assert_close(loss.per_site, torch.stack(errors).detach(), **close)
        assert loss.fired.equal((z > 0).any(0))
        for found, expected in zip(
            (part.weight, part.bias, part.norm.weight, part.norm.bias, part.dictionary),
            (w, b, gamma, beta, own),
            strict=True,
        ):
            assert found.grad is not None
            assert expected.grad is not None
            torch.testing.assert_close(found.grad, expected.grad, **close)
        for other in DIMS:
            if other != source:  # absent, not zero
                assert all(parameter.grad is None for parameter in objective.part(other).parameters())

    def test_one_latent_by_hand(self) -> None:
        # rows (1, 0) and (−1, 0); W = (1, 0), b = 0: h = (1, −1), mean 0, variance 1; BatchNorm gives ±1/√(1 + 1e-5);
        # relu and TopK: z = (.999995, 0); D = (0, 7)/7: |errors| (1, .999995) and (1, 0), mean (3 − 5e-6) / 4
        objective = PublishedObjective(USAE({"m/a": 2}, 1, 1).double(), PUBLISHED)
        part = objective.part("m/a")
        with torch.no_grad():
            part.weight.copy_(torch.tensor([[1.0, 0.0]]))
            part.bias.zero_()
            part.dictionary.copy_(torch.tensor([[0.0, 7.0]]))
        part.normalise_dictionary()
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        loss = objective(x, "main", "m/a", torch.tensor([False]))
        assert loss.total.item() == pytest.approx((3 - 5e-6) / 4, abs=1e-7)
        assert loss.l0.item() == 0.5

    def test_first_weights(self) -> None:
        before = torch.get_rng_state()
        objective = PublishedObjective(USAE({"m/a": 16, "n/b": 9}, 400, 3), PUBLISHED)
        assert torch.get_rng_state().equal(before)  # nothing comes from the global generator
        for site, d in (("m/a", 16), ("n/b", 9)):
            part = objective.part(site)
            for weights in (part.weight, part.bias):  # as torch's Linear: U(−1/√d, 1/√d)
                assert weights.abs().max() <= 1 / math.sqrt(d)
                assert weights.std().item() == pytest.approx(1 / math.sqrt(3 * d), rel=0.1)
            torch.testing.assert_close(part.dictionary.norm(dim=1), torch.ones(400))
        other = PublishedObjective(USAE({"m/a": 16, "n/b": 9}, 400, 3), TrainConfig(recipe="published", seed=1))
        assert not other.part("m/a").weight.equal(objective.part("m/a").weight)


class TestOptimiser:
    def test_a_first_step_by_hand(self) -> None:
        # AdamW's first step, bias-corrected: p ← p (1 − lr · decay) − lr · g / (|g| + ε), g clipped to norm 1
        how = TrainConfig(recipe="published", weight_decay=0.1, grad_clip=1e-3)
        objective, x, _ = case(how)
        optimiser = PublishedAdamW(objective, how)
        part = objective.part("n/b")
        step_of(objective, x, "n/b").total.backward()
        before = [p.detach().clone() for p in part.parameters()]
        grads = [p.grad.clone() for p in part.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        assert norm > 1e-3
        assert float(optimiser.step(0.01, ("n/b",))) == pytest.approx(norm)
        for parameter, p, g in zip(part.parameters(), before, grads, strict=True):
            clipped = g * (1e-3 / (norm + 1e-6))
            expected = p * (1 - 0.01 * 0.1) - 0.01 * clipped / (clipped.abs() + 1e-8)
            if parameter is part.dictionary:
                expected = expected / expected.norm(dim=1, keepdim=True)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)

    def test_nothing_of_other_sites_changes(self) -> None:
        objective, x, _ = case()
        optimiser = PublishedAdamW(objective, PUBLISHED)
        for source in DIMS:  # so that every optimiser has moments
            optimiser.zero_grad()
            step_of(objective, x, source).total.backward()
            optimiser.step(1e-3, objective.updated("main", source))
        before = {name: value.clone() for name, value in objective.state_dict().items()}
        moments = {
            (site, i, key): value.clone()
            for site, adam in optimiser.adams.items()
            for i, entries in adam.state_dict()["state"].items()
            for key, value in entries.items()
        }
        optimiser.zero_grad()
        step_of(objective, x, "o/c").total.backward()
        optimiser.step(1e-3, objective.updated("main", "o/c"))
        for site in DIMS:
            torch.testing.assert_close(objective.part(site).dictionary.norm(dim=1), torch.ones(N).double())
        changed = {name for name, value in objective.state_dict().items() if not value.equal(before[name])}
        assert changed == {name for name in before if name.startswith("parts.2.")}
        for (site, i, key), value in moments.items():
            now = optimiser.adams[site].state_dict()["state"][i][key]
            assert now.equal(value) is (site != "o/c"), (site, i, key)

    def test_rate_by_hand(self) -> None:
        # 10 steps, 4 an epoch, lr 1, floor .1: up .1, .4, .7, 1; then .1 + .45 (1 + cos(π t/6)): t = 3: .55; t = 6: .1
        how = TrainConfig(recipe="published", lr=1.0, lr_final=0.1)
        rates = [published_rate(step, 10, 4, how) for step in range(1, 11)]
        assert rates[:4] == pytest.approx([0.1, 0.4, 0.7, 1.0])
        assert rates[6] == pytest.approx(0.55)
        assert rates[9] == pytest.approx(0.1)
        published = [published_rate(step, 100, 10, PUBLISHED) for step in range(1, 101)]
        assert published[0] == pytest.approx(1e-6)
        assert max(published) == published[9] == pytest.approx(3e-4)
        assert published[-1] == pytest.approx(1e-6)
        assert published_rate(1, 1, 10, PUBLISHED) == pytest.approx(1e-6)


class TestFolding:
    @pytest.mark.parametrize("kernel", ["reference", "csr"])
    def test_codes_and_reconstructions_stay_what_they_were(self, kernel: str) -> None:
        objective, x, rows = case()
        usae = objective.usae
        usae.kernel_name = kernel
        optimiser = PublishedAdamW(objective, PUBLISHED)
        for step in range(12):  # so that the running statistics are those of no batch
            optimiser.zero_grad()
            source = usae.sites[step % 3]
            step_of(objective, x[step : step + 12], source).total.backward()
            optimiser.step(0.01, (source,))
        objective.settle()
        objective.eval()
        close = {"rtol": 1e-9, "atol": 1e-9}
        usae.eval()
        with torch.no_grad():
            for source in DIMS:
                part = objective.part(source)
                y = (rows[source] - rows[source].mean()) / rows[source].std(unbiased=False)
                torch.testing.assert_close(objective.rows(x, source), y, **close)
                z_pre = part.z_pre(y)
                torch.testing.assert_close(usae.pre_activation(rows[source], source, range(N)), z_pre, **close)
                z = torch.clamp(z_pre, min=0.0) * oracles.largest(z_pre, K)
                codes = usae.encode(rows[source], source)
                torch.testing.assert_close(usae.to_dense(codes), z, **close)
                for target, r in rows.items():
                    x_hat = r.mean() + r.std(unbiased=False) * (z @ objective.part(target).dictionary)
                    torch.testing.assert_close(usae.decode(codes, target), x_hat, **close)

    def test_statistics_of_several_processes_are_those_of_the_whole_batch(self) -> None:
        class Two(World):
            """Both processes have the same rows: means over the processes are the means of one."""

            size = 2

        objective, x, _ = case()
        other, _, _ = case()
        one = step_of(objective, torch.cat([x, x]), "m/a")
        with Two().at_work():
            two = step_of(other, x, "m/a")
        one.total.backward()
        two.total.backward()
        torch.testing.assert_close(one.total, two.total)
        for (name, value), after in zip(objective.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(value, after, msg=name)
        for p, q in zip(objective.part("m/a").parameters(), other.part("m/a").parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


class TestConfig:
    def test_what_it_sets(self) -> None:
        how = TrainConfig(recipe="published")
        assert (how.loss, how.source, how.update, how.align_warmup, how.aux_k) == ("l1", "random", "source", 0.0, 0)
        assert (how.lr, how.grad_clip, how.weight_decay) == (3e-4, 1.0, 1e-5)
        assert how.lr * how.lr_final == pytest.approx(1e-6)

    def test_keys_beside_it_win(self) -> None:
        how = checked(TrainConfig, {"recipe": "published", "lr": 1e-3, "steps": 7, "batch_size": 64, "seed": 3})
        assert (how.lr, how.steps, how.batch_size, how.seed) == (1e-3, 7, 64, 3)
        assert checked(TrainConfig, how.model_dump()) == how  # what run.json holds can be read again

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("loss", "mse"),
            ("source", "all"),
            ("source", {"m/a": 1.0}),
            ("update", "all"),
            ("align_warmup", 0.25),
            ("aux_k", 32),
            ("contrastive_coef", 0.1),
            ("input_noise", 0.1),
            ("latent_dropout", 0.1),
            ("init", "data"),
            ("ema", 0.99),
            ("site_weights", {"m/a": 1.0}),
        ],
    )
    def test_keys_that_contradict_it_are_refused(self, key: str, value: object) -> None:
        with pytest.raises(ConfigError, match=rf"{key} = .* contradicts recipe = 'published', .*leave {key} out"):
            checked(TrainConfig, {"recipe": "published", key: value})

    def test_a_config_can_be_changed_to_it_and_back(self) -> None:
        (how,) = settled((TrainConfig(steps=9),), {"recipe": "published"})
        assert (how.steps, how.lr, how.loss) == (9, 3e-4, "l1")
        (back,) = settled((how,), {"recipe": "default"})
        assert back == TrainConfig(steps=9)

    def test_it_needs_topk_and_batches(self) -> None:
        with pytest.raises(ConfigError, match=r"sparsity = 'batchtopk': it is defined with topk .*leave usae.sparsity"):
            PublishedObjective(USAE(DIMS, N, K, sparsity="batchtopk"), PUBLISHED)
        with pytest.raises(ConfigError, match=r"matryoshka = \[5, 15\]: .*leave usae.matryoshka"):
            PublishedObjective(USAE(DIMS, N, K, matryoshka=(5, 15)), PUBLISHED)
        with pytest.raises(ConfigError, match="batch_size = 1: BatchNorm needs two rows"):
            PublishedObjective(USAE(DIMS, N, K), TrainConfig(recipe="published", batch_size=1))


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    rng = np.random.default_rng(0)
    causes = rng.exponential(size=(400, 16)) * (rng.random((400, 16)) < 0.2)
    rows = {"m/a": causes @ rng.normal(size=(16, 10)) + 3, "n/b": causes @ rng.normal(size=(16, 8)) - 1}
    return ActivationBuffer.from_arrays(rows, tmp_path_factory.mktemp("published") / "acts", dtype="float32")


class TestTraining:
    def test_it_learns(self, buffer: ActivationBuffer) -> None:
        kept: list[StepRecord] = []
        result = train(buffer, **(SMALL | {"steps": 300, "lr": 5e-3}), progress=kept.append)
        first, last = (np.mean([record.loss for record in part]) for part in (kept[:10], kept[-10:]))
        assert last < 0.75 * first
        r2 = result.history[-1].r2
        assert r2 is not None
        assert min(r2[site][site] for site in r2) > 0.3
        assert {record.source for record in kept} == {"m/a", "n/b"}
        assert {record.phase for record in kept} == {"main"}

    def test_the_schedule_ends_at_its_floor(self, buffer: ActivationBuffer) -> None:
        kept: list[StepRecord] = []
        train(buffer, **SMALL, progress=kept.append)
        epoch = buffer.steps_per_epoch("train", 50)
        assert [r.lr for r in kept] == [published_rate(step, 20, epoch, PUBLISHED) for step in range(1, 21)]
        assert kept[-1].lr == pytest.approx(1e-6)
        assert kept[epoch - 1].lr == pytest.approx(3e-4)

    def test_the_result_is_a_plain_usae(self, buffer: ActivationBuffer, tmp_path: Path) -> None:
        result = train(buffer, **SMALL)
        usae = result.usae
        assert usae.decoder_norms().mul(usae.scale[:, None]).std(dim=1).max() < 1e-5  # 1 per site in raw units × σ
        found = result.history[-1].r2
        expected = oracles.r2(usae, buffer.read("validation").values)
        assert found is not None
        for source in usae.sites:
            assert found[source] == pytest.approx(expected[source], abs=1e-4)
        usae.save(tmp_path / "usae.safetensors")
        loaded = USAE.load(tmp_path / "usae.safetensors")
        assert all(a.equal(b) for a, b in zip(usae.state_dict().values(), loaded.state_dict().values(), strict=True))
        report = evaluate(loaded, buffer)
        assert sum(report.counts.values()) == 32
        x = torch.from_numpy(buffer.read("holdout").values["m/a"])
        assert usae.pre_activation(x, "m/a", [0, 5]).shape == (len(x), 2)

    @pytest.mark.parametrize("step", [1, 7, 19])
    def test_stopped_and_resumed_equals_uninterrupted(
        self, buffer: ActivationBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        monkeypatch.setattr(state_module, "SECONDS", 0.0)
        whole = train(buffer, **SMALL, log_every=1)

        def follow(record: StepRecord) -> None:
            if record.step > step:
                raise KeyError("stopped")

        with pytest.raises(KeyError, match="stopped"):
            train(buffer, **SMALL, progress=follow, resume=tmp_path / "state")
        resumed = train(buffer, **SMALL, log_every=1, resume=tmp_path / "state")
        assert resumed.history == [record for record in whole.history if record.step > step]
        one, two = whole.usae.state_dict(), resumed.usae.state_dict()
        assert all(one[name].equal(two[name]) for name in one)

    def test_same_seed_same_bits(self, buffer: ActivationBuffer) -> None:
        one = train(buffer, **SMALL, seed=3).usae.state_dict()
        torch.manual_seed(99)
        two = train(buffer, **SMALL, seed=3).usae.state_dict()
        other = train(buffer, **SMALL, seed=4).usae.state_dict()
        assert all(one[name].equal(two[name]) for name in one)
        assert not one["W_dec"].equal(other["W_dec"])
