"""Objectives beside the default one: L1, weights, sources, source-only updates, noise, contrast and data starts."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig, UsaeConfig, checked
from usae_probe.errors import ConfigError
from usae_probe.usae import USAE, train, train_steps, usae_for
from usae_probe.usae.contrastive import MOST_ROWS, contrastive_loss, info_nce
from usae_probe.usae.draws import Perturbation, draw_partner, draw_source
from usae_probe.usae.initialisation import initialise_from_data, put_rows
from usae_probe.usae.losses import Objective, StepLoss, Terms, alignment_loss, self_share, source_loss
from usae_probe.usae.regularisation import regularisation
from usae_probe.usae.residual import residual
from usae_probe.world import World

from . import oracles

pytestmark = pytest.mark.usefixtures("one_thread")

DIMS = {"m/a": 6, "n/b": 4, "o/c": 5}
SITES = list(DIMS)
N, K, B = 15, 3, 8
NO_DEAD = torch.zeros(N, dtype=torch.bool)
SOME_DEAD = torch.arange(N) % 3 == 0
KERNELS = pytest.mark.parametrize("kernel", ["reference", "csr"])
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def case(kernel: str = "reference", seed: int = 3, rows: int = B) -> tuple[USAE, Tensor]:
    g = torch.Generator().manual_seed(seed)
    usae = USAE(DIMS, N, K, kernel=kernel, seed=seed)
    with torch.no_grad():
        for parameter in usae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return usae.double(), torch.randn(rows, sum(DIMS.values()), generator=g).double()


def by_site(usae: USAE, x: Tensor) -> dict[str, Tensor]:
    return {site: x[:, columns] for site, columns in usae.columns.items()}


def grads(usae: USAE, loss: Tensor) -> dict[str, Tensor]:
    usae.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in usae.named_parameters()}


def oracle_grads(usae: USAE, p: oracles.Parameters, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()  # type: ignore[no-untyped-call]

    def grad(leaf: Tensor) -> Tensor:
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    found = {f"W_enc.{i}": grad(p.w_enc[site]) for i, site in enumerate(usae.sites)}
    found |= {f"b_enc.{i}": grad(p.b_enc[site]) for i, site in enumerate(usae.sites)}
    found["W_dec"] = torch.cat([grad(p.w_dec[site]) for site in usae.sites], dim=1)
    found["b_dec"] = torch.cat([grad(p.b_dec[site]) for site in usae.sites])
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def step_of(
    usae: USAE, x: Tensor, source: str = "m/a", phase: Any = "main", step: int = 1, **settings: Any
) -> StepLoss:
    how = checked(TrainConfig, {"aux_k": 0, "self_share": "equal"} | settings)
    objective = Objective(usae, how, dropout=regularisation(how, usae.d_in, n_rows=10**12).dropout)
    loss: StepLoss = objective.train()(x, phase, source, NO_DEAD, step)
    return loss


class TestL1:
    def test_by_hand(self) -> None:
        # errors of site a (1, −2), (0, 3): 6/4 = 1.5; of site b (.5, 0), (−1.5, 2): 4/4 = 1
        error = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 3.0, -1.5, 2.0]])
        b_dec = torch.tensor([0.5, 0.5, -0.5, -0.5])
        found = residual(error + b_dec, torch.zeros(1, 2, 4), b_dec, {"m/a": 2, "n/b": 2}, loss="l1")
        assert found.per_site.tolist() == [1.5, 1.0]
        assert found.rows.equal(error[None])

    @KERNELS
    def test_oracle(self, kernel: str) -> None:
        usae, x = case(kernel)
        loss = source_loss(usae, x, "n/b", dead=NO_DEAD, aux_k=0, aux_coef=0.0, terms=Terms("l1"))
        p, rows = oracles.Parameters.of(usae), by_site(usae, x)
        z_pre = p.z_pre(rows["n/b"], "n/b")
        z = torch.relu(z_pre) * oracles.largest(z_pre, K)
        errors = [(rows[s] - p.decode(z, s)).abs().sum() / rows[s].numel() for s in SITES]
        torch.testing.assert_close(loss.per_site, torch.stack(errors).detach(), **CLOSE)
        assert_same(grads(usae, loss.total), oracle_grads(usae, p, torch.stack(errors).sum()))

    def test_alignment_has_it_too(self) -> None:
        usae, x = case()
        loss = alignment_loss(usae, x, terms=Terms("l1"))
        p, rows = oracles.Parameters.of(usae), by_site(usae, x)
        z_pre = {s: p.z_pre(rows[s], s) for s in SITES}
        mask = oracles.largest(sum(z_pre.values()), K)  # type: ignore[arg-type]
        total = sum(
            (rows[t] - p.decode(torch.relu(z_pre[s]) * mask, t)).abs().sum() / rows[t].numel() / 3
            for s in SITES
            for t in SITES
        )
        assert isinstance(total, Tensor)
        torch.testing.assert_close(loss.total.detach(), total.detach(), **CLOSE)

    def test_in_training_it_is_what_is_recorded(self, buffer: ActivationBuffer) -> None:
        l1, mse = (
            train(
                buffer, n_latents=32, k=3, steps=1, batch_size=50, loss=loss, log_every=1, self_share="equal"
            ).history[0]
            for loss in ("l1", "mse")
        )
        assert l1.loss == pytest.approx(sum(l1.losses.values()), rel=1e-5)
        for site, error in l1.losses.items():  # mean |e| < √(mean e²), of the same first step
            assert 0.5 * math.sqrt(mse.losses[site]) < error < math.sqrt(mse.losses[site])


class TestSiteWeights:
    @pytest.mark.parametrize("phase", ["main", "align"])
    def test_they_weigh_targets(self, phase: str) -> None:
        usae, x = case()
        plain = step_of(usae, x, phase=phase)
        weighted = step_of(usae, x, phase=phase, site_weights={"n/b": 3.0, "o/c": 0.0})
        assert weighted.per_site.equal(plain.per_site)
        a, b, _ = plain.per_site
        torch.testing.assert_close(weighted.total.detach(), a + 3 * b)  # 1 where none is given

    def test_refusals(self) -> None:
        usae, _ = case()
        with pytest.raises(ConfigError, match=r"site_weights has a weight for 'x/y', .*sites: m/a, n/b, o/c"):
            Objective(usae, TrainConfig(site_weights={"x/y": 1.0}))
        with pytest.raises(ConfigError, match="'site_weights': the weight of 'm/a' is -1"):
            checked(TrainConfig, {"site_weights": {"m/a": -1}})
        with pytest.raises(ConfigError, match="'site_weights': no weight is above 0"):
            checked(TrainConfig, {"site_weights": {"m/a": 0}})

    def test_with_one_site_they_mean_nothing(self) -> None:
        usae = USAE({"m/a": 6}, N, K)
        how = TrainConfig(site_weights={"n/b": 3.0}, source={"n/b": 1.0}, aux_k=0, contrastive_coef=1.0)
        x = torch.randn(B, 6)
        loss = Objective(usae, how)(x, "main", "m/a", NO_DEAD)
        torch.testing.assert_close(loss.total.detach(), loss.per_site.sum())
        assert draw_source(["m/a"], how, 4) == "m/a"


class TestSelfShare:
    @KERNELS
    def test_oracle(self, kernel: str) -> None:
        usae, x = case(kernel)
        loss = step_of(usae, x, "n/b", self_share=0.7, site_weights={"n/b": 0.5, "o/c": 3.0})
        p, rows = oracles.Parameters.of(usae), by_site(usae, x)
        z_pre = p.z_pre(rows["n/b"], "n/b")
        z = torch.relu(z_pre) * oracles.largest(z_pre, K)
        a, b, c = (((rows[s] - p.decode(z, s)) ** 2).sum() / rows[s].numel() for s in SITES)
        # three targets: .7 · 3 = 2.1 times the source's own error, (3 − 2.1) / 2 = .45 times each other one
        total = 0.45 * a + 2.1 * 0.5 * b + 0.45 * 3 * c
        torch.testing.assert_close(loss.total.detach(), total.detach(), **CLOSE)
        torch.testing.assert_close(loss.per_site, torch.stack([a, b, c]).detach(), **CLOSE)  # unweighted
        assert_same(grads(usae, loss.total), oracle_grads(usae, p, total))

    @KERNELS
    def test_in_the_alignment_warmup_every_site_is_a_source(self, kernel: str) -> None:
        usae, x = case(kernel)
        loss = step_of(usae, x, "all", phase="align", self_share=0.7)
        p, rows = oracles.Parameters.of(usae), by_site(usae, x)
        z_pre = {s: p.z_pre(rows[s], s) for s in SITES}
        mask = oracles.largest(sum(z_pre.values()), K)  # type: ignore[arg-type]
        total = torch.zeros((), dtype=torch.float64)
        for s in SITES:
            for t in SITES:
                error = rows[t] - p.decode(torch.relu(z_pre[s]) * mask, t)
                total = total + (2.1 if s == t else 0.45) * (error**2).sum() / error.numel() / 3
        torch.testing.assert_close(loss.total.detach(), total.detach(), **CLOSE)
        assert_same(grads(usae, loss.total), oracle_grads(usae, p, total))

    def test_equal_shares_are_the_plain_sum(self) -> None:
        usae, x = case()
        plain, third = step_of(usae, x), step_of(usae, x, self_share=1 / 3)
        torch.testing.assert_close(third.total, plain.total, **CLOSE)
        torch.testing.assert_close(plain.total.detach(), plain.per_site.sum(), **CLOSE)

    def test_auto_counts_it_as_often_as_there_are_sites(self) -> None:
        # three of 3 + 1 + 1 parts: .6; its error counts 3 · .6 = 1.8 times, each other one 3 · .4 / 2 = .6 times
        usae, x = case()
        a, b, c = step_of(usae, x).per_site
        auto = step_of(usae, x, "m/a", self_share="auto")
        torch.testing.assert_close(auto.total.detach(), 1.8 * a + 0.6 * b + 0.6 * c, **CLOSE)
        assert [self_share(TrainConfig(), m) for m in (1, 2, 3)] == [None, 2 / 3, 0.6]
        assert self_share(TrainConfig(self_share=0.3), 3) == 0.3

    def test_with_one_site_it_means_nothing(self) -> None:
        usae = USAE({"m/a": 6}, N, K)
        x = torch.randn(B, 6)
        losses = [Objective(usae, TrainConfig(self_share=s, aux_k=0))(x, "main", "m/a", NO_DEAD) for s in (0.1, 0.9)]
        assert losses[0].total.equal(losses[1].total)

    @pytest.mark.parametrize("value", [1.0, -0.1, "own"])
    def test_refusals(self, value: object) -> None:
        with pytest.raises(ConfigError, match=f"config key 'self_share'.*given {value!r}"):
            checked(TrainConfig, {"self_share": value})


class TestSources:
    def test_weights_are_probabilities(self) -> None:
        how = TrainConfig(source={"m/a": 3.0, "o/c": 1.0})
        drawn = [draw_source(SITES, how, step) for step in range(2000)]
        assert set(drawn) == {"m/a", "o/c"}
        assert abs(drawn.count("m/a") / 2000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 2000)
        assert drawn == [draw_source(SITES, TrainConfig(source={"m/a": 0.3, "o/c": 0.1}), step) for step in range(2000)]
        assert drawn[100:200] == [draw_source(SITES, how, step) for step in range(100, 200)]  # of the step alone
        assert drawn != [draw_source(SITES, TrainConfig(source=how.source, seed=1), step) for step in range(2000)]

    def test_refusals(self) -> None:
        usae, _ = case()
        with pytest.raises(ConfigError, match=r"source has a weight for 'm/b', .*sites: m/a, n/b, o/c"):
            Objective(usae, TrainConfig(source={"m/a": 1.0, "m/b": 1.0}))
        for given, said in (
            ({"m/a": -0.5, "n/b": 1}, r"the weight of 'm/a' is -0.5, expected a finite number of at least 0"),
            ({"m/a": 0, "n/b": 0.0}, r"no weight is above 0 \('m/a', 'n/b'\): give one to a site at least"),
            ({}, "no weight is above 0"),
            ({"m/a": "much"}, "the weight of 'm/a' is 'much', expected a number"),
            ({"m/a": math.inf}, "the weight of 'm/a' is inf"),
            ("first", r"'random' or 'all', or a table \{site = weight\}, given 'first'"),
            (3, "'random' or 'all'"),
        ):
            with pytest.raises(ConfigError, match=f"config key 'source': .*{said}"):
                checked(TrainConfig, {"source": given})

    def test_training_draws_by_them(self, buffer: ActivationBuffer) -> None:
        kept: list[str] = []
        settings: dict[str, Any] = {"n_latents": 32, "k": 3, "steps": 12, "batch_size": 50, "align_warmup": 0.0}
        train(buffer, **settings, source={"n/b": 2}, progress=lambda record: kept.append(record.source))
        assert kept == ["n/b"] * 12
        with pytest.raises(ConfigError, match="source has a weight for 'm/b'"):
            train(buffer, **settings, source={"m/b": 2})


class TestSourceOnlyUpdate:
    @KERNELS
    @pytest.mark.parametrize("source", SITES)
    def test_gradients_are_those_of_the_source_alone(self, kernel: str, source: str) -> None:
        usae, x = case(kernel)
        settings: dict[str, Any] = {"dead": SOME_DEAD, "aux_k": 2, "aux_coef": 0.5}
        whole, own = (source_loss(usae, x, source, **settings, terms=Terms(own_only=only)) for only in (False, True))
        assert float(own.aux) > 0
        torch.testing.assert_close(own.total, whole.total, **CLOSE)
        everything, alone = grads(usae, whole.total), grads(usae, own.total)
        columns = usae.columns[source]
        for name in ("W_dec", "b_dec"):
            torch.testing.assert_close(alone[name][..., columns], everything[name][..., columns], **CLOSE)
            alone[name][..., columns] = 0.0
            assert not alone[name].any()
        for name, grad in everything.items():
            if "enc" in name:
                torch.testing.assert_close(alone[name], grad, **CLOSE)

    def test_which_sites_a_step_changes(self) -> None:
        usae, _ = case()
        own = Objective(usae, TrainConfig(update="source"))
        assert own.updated("main", "n/b") == ("n/b",)
        assert own.updated("main", "all") is None
        assert own.updated("align", "all") is None
        assert Objective(usae, TrainConfig()).updated("main", "n/b") is None

    def test_in_training_nothing_else_moves(self, buffer: ActivationBuffer) -> None:
        settings: dict[str, Any] = {"batch_size": 50, "align_warmup": 0.5, "update": "source"}
        settings |= {"steps": 12, "source": {"n/b": 1.0}, "weight_decay": 0.1, "lr": 1e-2}
        seen: list[dict[str, Tensor]] = []

        how = checked(TrainConfig, settings)
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=3), how)
        for _ in train_steps(usae, buffer, how):
            seen.append({name: value.detach().clone() for name, value in usae.state_dict().items()})
        first, last = seen[5], seen[-1]  # after the alignment warm-up, in which every site learns
        a, b = usae.columns["m/a"], usae.columns["n/b"]
        for name in ("W_enc.0", "b_enc.0"):
            assert first[name].equal(last[name])
            assert not seen[0][name].equal(first[name])
        for name in ("W_dec", "b_dec"):
            assert first[name][..., a].equal(last[name][..., a])
            assert not first[name][..., b].equal(last[name][..., b])
        assert not first["W_enc.1"].equal(last["W_enc.1"])
        torch.testing.assert_close(last["W_dec"].norm(dim=1), torch.full((32,), math.sqrt(2)))

    def test_learnt_thresholds_are_of_their_site_too(self, buffer: ActivationBuffer) -> None:
        settings: dict[str, Any] = {"batch_size": 50, "align_warmup": 0.0, "update": "source", "bandwidth": 2.0}
        how = checked(TrainConfig, settings | {"steps": 24, "lr": 1e-2})
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=3, sparsity="jumprelu"), how)
        sources: list[str] = []
        seen: list[list[Tensor]] = []
        for record in train_steps(usae, buffer, how):
            sources.append(record.source)
            seen.append([theta.detach().clone() for theta in usae.sparsity.log_theta])
        assert set(pairwise(sources)) >= {("m/a", "n/b"), ("n/b", "m/a")}
        for source, before, after in zip(sources[1:], seen, seen[1:], strict=False):
            for site, one, other in zip(usae.sites, before, after, strict=True):
                assert one.equal(other) == (site != source)  # moments of earlier steps would move them


class TestPerturbation:
    def test_noise_is_drawn_by_seed_and_step_in_units_of_the_rows(self) -> None:
        how = TrainConfig(input_noise=0.3)
        x = torch.zeros(500, 40)
        noise = Perturbation(how, 7).rows(x)
        assert noise.std().item() == pytest.approx(0.3, rel=0.03)
        assert abs(noise.mean().item()) < 0.01
        torch.manual_seed(5)
        assert Perturbation(how, 7).rows(x).equal(noise)  # and of nothing else
        assert not Perturbation(how, 8).rows(x).equal(noise)
        assert not Perturbation(TrainConfig(input_noise=0.3, seed=1), 7).rows(x).equal(noise)
        one = Perturbation(how, 7)
        assert not one.rows(x).equal(one.rows(x))  # every site has noise of its own

    def test_processes_draw_what_one_would(self) -> None:
        how = TrainConfig(input_noise=0.3)
        x, z = torch.zeros(12, 5), torch.ones(36)
        rows, values = Perturbation(how, 2).rows(x), Perturbation(how, 2).values(z, 0.4)
        for rank in range(3):
            world = World()
            world.rank, world.size = rank, 3
            with world.at_work():
                assert Perturbation(how, 2).rows(x[:4]).equal(rows[4 * rank : 4 * rank + 4])
                assert Perturbation(how, 2).values(z[:12], 0.4).equal(values[12 * rank : 12 * rank + 12])

    @pytest.mark.parametrize("phase", ["main", "align"])
    def test_the_encoder_sees_noise_and_the_target_is_clean(self, phase: str) -> None:
        usae, x = case()
        how: dict[str, Any] = {"input_noise": 0.5, "seed": 4}
        loss = step_of(usae, x, "all" if phase == "align" else "n/b", phase=phase, step=9, **how)
        perturb = Perturbation(checked(TrainConfig, how), 9)
        p, rows = oracles.Parameters.of(usae), by_site(usae, x)
        sources = SITES if phase == "align" else ["n/b"]
        noisy = {s: perturb.rows(rows[s]) for s in sources}
        z_pre = {s: p.z_pre(noisy[s], s) for s in sources}
        mask = oracles.largest(torch.stack(list(z_pre.values())).sum(0), K)
        mse = [
            sum(((rows[t] - p.decode(torch.relu(z_pre[s]) * mask, t)) ** 2).sum() for s in sources)
            / (len(sources) * rows[t].numel())
            for t in SITES
        ]
        total = torch.stack([torch.as_tensor(value) for value in mse]).sum()
        torch.testing.assert_close(loss.total, total, **CLOSE)
        assert_same(grads(usae, loss.total), oracle_grads(usae, p, total))

    def test_dropout_by_hand(self) -> None:
        z = torch.full((40_000,), 0.5, requires_grad=True)
        kept = Perturbation(TrainConfig(), 3).values(z, 0.2)
        assert set(kept.unique().tolist()) == {0.0, 0.625}  # .5 / (1 − .2)
        assert (kept == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
        assert kept.mean().item() == pytest.approx(0.5, abs=0.01)  # the same in the mean
        kept.sum().backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        assert z.grad.equal(torch.where(kept > 0, 1.25, 0.0))

    def test_dropout_changes_what_is_decoded_and_not_what_fires(self) -> None:
        usae, x = case()
        plain, dropped = step_of(usae, x), step_of(usae, x, latent_dropout=0.5)
        assert dropped.fired.equal(plain.fired)
        assert not torch.isclose(dropped.total, plain.total)
        assert step_of(usae, x, latent_dropout=0.5).total.equal(dropped.total)
        assert not step_of(usae, x, latent_dropout=0.5, step=2).total.equal(dropped.total)

    def test_only_in_training(self) -> None:
        usae, x = case()
        how = TrainConfig(input_noise=0.5, aux_k=0, self_share="equal")
        evaluated = Objective(usae, how, dropout=0.5).eval()(x, "main", "m/a", NO_DEAD, 1)
        torch.testing.assert_close(evaluated.total, step_of(usae, x).total, **CLOSE)


class TestContrast:
    def test_by_hand(self) -> None:
        # cosines of (1, 0) and (3, 4)/5 with (2, 0) and (0, 1): [[1, 0], [.6, .8]]; τ = .5: logits [[2, 0], [1.2, 1.6]]
        # rows: log(1 + e^−2) = .126928, log(1 + e^−.4) = .513015; columns: log(1 + e^−.8) = .371101,
        # log(1 + e^−1.6) = .183905; ½ (mean of the rows + mean of the columns) = .298737
        a, b = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        assert info_nce(a, b, 0.5).item() == pytest.approx(0.298737, abs=1e-6)
        same = torch.ones(8, 3)
        assert info_nce(same, same, 0.1).item() == pytest.approx(math.log(8))  # nothing tells the pairs apart

    @KERNELS
    @pytest.mark.parametrize("sites", [("m/a", "o/c"), tuple(SITES)])
    def test_oracle(self, kernel: str, sites: tuple[str, ...]) -> None:
        usae, x = case(kernel)
        loss = contrastive_loss(usae, x, sites, 0.3)
        p, rows = oracles.Parameters.of(usae), by_site(usae, x)
        codes = []
        for site in sites:
            z_pre = p.z_pre(rows[site], site)
            codes.append(torch.relu(z_pre) * oracles.largest(z_pre, K))
        terms = []
        for a, b in combinations(codes, 2):
            cos = [[(a[r] @ b[t]) / (a[r].norm() * b[t].norm()) / 0.3 for t in range(B)] for r in range(B)]
            s = torch.stack([torch.stack(row) for row in cos])
            forth = [-(s[r, r] - torch.log(torch.exp(s[r]).sum())) for r in range(B)]
            back = [-(s[r, r] - torch.log(torch.exp(s[:, r]).sum())) for r in range(B)]
            terms.append((torch.stack(forth).mean() + torch.stack(back).mean()) / 2)
        total = torch.stack(terms).mean()
        torch.testing.assert_close(loss, total, **CLOSE)
        assert_same(grads(usae, loss), oracle_grads(usae, p, total))

    def test_rows_without_an_active_latent_are_no_nan(self) -> None:
        usae, x = case()
        with torch.no_grad():
            usae.b_enc[0].fill_(-100.0)
        found = grads(usae, contrastive_loss(usae, x, ("m/a", "n/b"), 0.1))
        assert all(torch.isfinite(grad).all() for grad in found.values())

    def test_a_large_batch_is_thinned(self) -> None:
        usae, x = case(rows=2 * MOST_ROWS + 6)
        sites = ("m/a", "n/b")
        assert contrastive_loss(usae, x, sites, 0.1).equal(contrastive_loss(usae, x[::3], sites, 0.1))

    def test_in_a_step(self) -> None:
        usae, x = case()
        plain = step_of(usae, x, "n/b")
        assert plain.contrastive is None
        for source, phase in (("n/b", "main"), ("all", "main"), ("all", "align")):
            loss = step_of(usae, x, source, phase=phase, step=5, contrastive_coef=0.25, contrastive_temperature=0.2)
            how = TrainConfig()
            pair = ("n/b", draw_partner(SITES, "n/b", how, 5)) if source == "n/b" else tuple(SITES)
            term = contrastive_loss(usae, x, pair, 0.2)
            assert loss.contrastive is not None
            torch.testing.assert_close(loss.contrastive, term.detach(), **CLOSE)
            torch.testing.assert_close(loss.total, step_of(usae, x, source, phase=phase).total + 0.25 * term, **CLOSE)

    def test_the_second_site_is_drawn(self) -> None:
        how = TrainConfig()
        drawn = [draw_partner(SITES, "n/b", how, step) for step in range(200)]
        assert set(drawn) == {"m/a", "o/c"}
        assert 70 <= drawn.count("m/a") <= 130
        assert drawn == [draw_partner(SITES, "n/b", how, step) for step in range(200)]

    def test_source_only_updates_leave_the_second_site_alone(self) -> None:
        usae, x = case()
        loss = step_of(usae, x, "n/b", contrastive_coef=1.0, update="source")
        both = step_of(usae, x, "n/b", contrastive_coef=1.0)
        torch.testing.assert_close(loss.total, both.total, **CLOSE)
        alone, other = grads(usae, loss.total), grads(usae, both.total)
        torch.testing.assert_close(alone["W_enc.1"], other["W_enc.1"], **CLOSE)
        assert not alone["W_enc.0"].any()
        assert not alone["W_enc.2"].any()
        assert other["W_enc.0"].any() or other["W_enc.2"].any()

    def test_it_tells_pairs_apart_on_rows_it_has_not_seen(self, buffer: ActivationBuffer) -> None:
        settings: dict[str, Any] = {"n_latents": 32, "k": 3, "steps": 60, "batch_size": 64, "lr": 1e-2}
        settings |= {"align_warmup": 0.0}
        rows = buffer.read("validation").values

        def held_out(**more: Any) -> float:
            usae = train(buffer, **settings, **more).usae
            x = torch.cat([usae.normalise(torch.from_numpy(rows[site]), site) for site in usae.sites], dim=1)
            return float(contrastive_loss(usae, x, usae.sites, 0.1).detach())

        assert held_out(contrastive_coef=0.1) < held_out() - 0.5  # of at most log 36 = 3.6 by chance


class TestDataInitialisation:
    @pytest.mark.parametrize("n_rows", [N, N + 7])
    def test_by_hand(self, n_rows: int) -> None:
        usae, _ = case()
        usae = usae.float()
        usae.mean.copy_(torch.arange(15.0))
        usae.scale.copy_(torch.tensor([1.0, 2.0, 4.0]))
        x = {site: np.random.default_rng(i).normal(size=(n_rows, d)) for i, (site, d) in enumerate(DIMS.items())}
        put_rows(usae, x, seed=0)
        for k in (0, 4, N - 1):
            row = np.concatenate(
                [(x[s][k] - usae.mean[usae.columns[s]].numpy()) / usae.scale[i].item() for i, s in enumerate(SITES)]
            )
            expected = math.sqrt(3) * row / np.linalg.norm(row)
            np.testing.assert_allclose(usae.W_dec[k].detach().numpy(), expected, rtol=1e-4, atol=1e-6)
        for i, site in enumerate(SITES):
            assert usae.W_enc[i].equal(usae.decoder(site))  # tied

    def test_latents_left_over_are_mixtures_of_two_rows(self) -> None:
        usae = USAE({"m/a": 40, "n/b": 30}, 60, K)
        x = {"m/a": np.random.default_rng(0).normal(size=(5, 40)), "n/b": np.random.default_rng(1).normal(size=(5, 30))}
        put_rows(usae, x, seed=0)
        rows = np.concatenate([x["m/a"], x["n/b"]], axis=1)
        shares = np.linalg.lstsq(rows.T, usae.W_dec.detach().numpy().T, rcond=None)[0].T
        np.testing.assert_allclose(shares @ rows, usae.W_dec.detach().numpy(), atol=1e-5)
        assert ((np.abs(shares[:5]) > 1e-5).sum(1) == 1).all()  # the rows themselves first
        used = np.abs(shares[5:]) > 1e-5
        assert (used.sum(1) == 2).all()
        share = shares[5:] / shares[5:].sum(1, keepdims=True)
        assert ((share > 0.24) | (share < 1e-4)).all()
        assert len(np.unique(usae.W_dec.detach().numpy().round(4), axis=0)) == 60

    def test_a_row_that_is_the_mean_gives_a_direction_all_the_same(self) -> None:
        usae = USAE({"m/a": 6, "n/b": 4}, 3, 1)
        put_rows(usae, {"m/a": np.zeros((3, 6)), "n/b": np.zeros((3, 4))}, seed=0)
        torch.testing.assert_close(usae.W_dec.norm(dim=1), torch.full((3,), math.sqrt(2)))

    def test_from_a_buffer(self, buffer: ActivationBuffer) -> None:
        rows = buffer.read("train").values
        x = {site: (v - v.mean(0)) / v.std(0).mean() for site, v in rows.items()}  # directions per site suffice here

        def start(**settings: Any) -> USAE:
            usae = USAE(buffer.d_in, 32, 3)
            for site in usae.sites:
                usae.mean[usae.columns[site]] = torch.from_numpy(rows[site].mean(0))
            initialise_from_data(usae, buffer, TrainConfig(**settings))
            return usae

        def sources(usae: USAE) -> dict[str, np.ndarray]:
            """By site, the training row with the direction of each latent's decoder row there."""
            found = {}
            for site in usae.sites:
                w = usae.decoder(site).detach().numpy()
                unit = x[site] / np.linalg.norm(x[site], axis=1, keepdims=True)
                cosines = (w / np.linalg.norm(w, axis=1, keepdims=True)) @ unit.T
                assert cosines.max(1).min() > 0.9999
                found[site] = cosines.argmax(1)
            return found

        one = start()
        assert one.W_dec.equal(start().W_dec)
        assert not one.W_dec.equal(start(seed=1).W_dec)
        paired = sources(one)
        assert len(set(paired["m/a"])) == 32  # without repetition
        assert (paired["m/a"] == paired["n/b"]).all()
        apart = sources(start(pairing="shuffled"))  # the control starts from nothing that is paired
        assert (apart["m/a"] == apart["n/b"]).mean() < 0.2

    def test_training_starts_from_it(self, buffer: ActivationBuffer) -> None:
        settings: dict[str, Any] = {"n_latents": 32, "k": 3, "steps": 1, "batch_size": 50, "lr": 1e-9}
        trained = train(buffer, **settings, init="data").usae
        start = USAE(buffer.d_in, 32, 3)
        start.mean.copy_(trained.mean)
        start.scale.copy_(trained.scale)
        initialise_from_data(start, buffer, TrainConfig())
        torch.testing.assert_close(trained.W_dec, start.W_dec)


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    rng = np.random.default_rng(0)
    causes = rng.exponential(size=(400, 16)) * (rng.random((400, 16)) < 0.2)
    rows = {"m/a": causes @ rng.normal(size=(16, 10)) + 3, "n/b": causes @ rng.normal(size=(16, 8)) - 1}
    return ActivationBuffer.from_arrays(rows, tmp_path_factory.mktemp("objectives") / "acts", dtype="float32")
