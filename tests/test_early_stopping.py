"""Early stopping, best weights and averaged weights: exact under resume, and by validation rows alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import usae_probe.usae.state as state_module
import usae_probe.usae.training as training_module
from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig, UsaeConfig
from usae_probe.errors import ConfigError, UsaeProbeWarning
from usae_probe.usae import USAE, StepRecord, train, train_steps, usae_for
from usae_probe.usae.average import Average
from usae_probe.usae.reconstruction import Matrix
from usae_probe.usae.validation import Watch, cross_r2, validation_r2

from . import oracles
from .trainings import Stopped, same

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = ["m/a", "n/b"]
SETTINGS: dict[str, Any] = {
    "n_latents": 32,
    "k": 4,
    "steps": 60,
    "batch_size": 40,
    "lr": 0.02,
    "align_warmup": 0.1,
    "validate_every": 4,
    "log_every": 4,
}


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(120, 6))
    arrays = {"m/a": shared @ rng.normal(size=(6, 10)), "n/b": shared @ rng.normal(size=(6, 8))}
    noisy = {site: values + rng.normal(size=values.shape) for site, values in arrays.items()}
    return ActivationBuffer.from_arrays(noisy, tmp_path_factory.mktemp("stop") / "acts", dtype="float32")


def planned(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Let validations find given values of the cross-R², one after the other."""
    left = iter(scores)

    def found(*_: object) -> Matrix:
        score = next(left)
        return {"m/a": {"m/a": 0.9, "n/b": score}, "n/b": {"m/a": score, "n/b": 0.9}}

    monkeypatch.setattr(training_module, "validation_r2", found)


class TestCrossR2:
    def test_by_hand(self) -> None:
        # (.2 + .4) / 2 off the diagonal of two sites; (.1 + .2 + .3 + .4 + .5 + .9) / 6 = .4 of three
        assert cross_r2({"a": {"a": 0.9, "b": 0.2}, "b": {"a": 0.4, "b": 0.8}}) == pytest.approx(0.3)
        cells = {
            "a": {"a": 1, "b": 0.1, "c": 0.2},
            "b": {"a": 0.3, "b": 1, "c": 0.4},
            "c": {"a": 0.5, "b": 0.9, "c": 1},
        }
        three = {source: {target: float(value) for target, value in row.items()} for source, row in cells.items()}
        assert cross_r2(three) == pytest.approx(0.4)

    def test_of_one_site_is_its_own(self) -> None:
        assert cross_r2({"a": {"a": 0.7}}) == 0.7

    def test_leaves_out_what_does_not_vary(self) -> None:
        assert cross_r2({"a": {"a": 0.9, "b": math.nan}, "b": {"a": 0.4, "b": math.nan}}) == pytest.approx(0.4)
        assert math.isnan(cross_r2({"a": {"a": math.nan}}))


class TestStopping:
    def test_after_so_many_validations_without_a_better_one(
        self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # steps 4, 8, …; the warm-up's (step 4, .9) does not count; .3 at step 12 is the best; equal is not better:
        # 16, 20 and 24 are three in a row
        planned(monkeypatch, [0.9, 0.1, 0.3, 0.3, 0.2, math.nan, 0.5, 0.6])
        records: list[StepRecord] = []
        result = train(buffer, **SETTINGS, early_stop=3, progress=records.append)
        assert [record.step for record in records if record.stopped] == [24] == [records[-1].step]
        assert (result.taken, result.planned, result.best) == (24, 60, (12, 0.3))
        assert result.history[-1] == records[-1]
        assert result.note == "stopped early at step 24 of 60, best step 12 (cross-R² 0.300 on validation rows)"
        assert result.last is None
        assert not result.usae.training

    def test_waits_anew_after_each_better_one(self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        planned(monkeypatch, [0.0, 0.1, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, *[0.0] * 7])
        result = train(buffer, **SETTINGS, early_stop=3)
        assert (result.taken, result.best) == (44, (32, 0.4))

    def test_the_learning_rate_is_that_of_the_whole_training(
        self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = train(buffer, **SETTINGS).history
        planned(monkeypatch, [0.9 - step / 10 for step in range(15)])
        stopped = train(buffer, **SETTINGS, early_stop=2)
        assert stopped.taken == 16
        assert [r.lr for r in stopped.history] == [r.lr for r in whole if r.step <= 16]
        assert [r.loss for r in stopped.history] == [r.loss for r in whole if r.step <= 16]

    def test_not_asked_for(self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        planned(monkeypatch, [0.9 - step / 100 for step in range(15)])
        result = train(buffer, **SETTINGS)
        assert (result.taken, result.note, result.last) == (60, "", None)
        assert not any(record.stopped for record in result.history)

    def test_at_the_last_step_is_no_stopping(self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        planned(monkeypatch, [0.0, 0.9, *[0.0] * 13])
        with pytest.warns(UsaeProbeWarning, match="early_stop = 13 cannot stop"):
            result = train(buffer, **SETTINGS, early_stop=13)
        assert (result.taken, result.history[-1].stopped, result.note) == (60, False, "")


class TestBest:
    def test_weights_of_the_best_step(self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[int, Tensor] = {}
        how = TrainConfig(**{key: value for key, value in SETTINGS.items() if key not in ("n_latents", "k")})
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=4), how)
        for record in train_steps(usae, buffer, how):
            seen[record.step] = usae.W_dec.detach().clone()
        planned(monkeypatch, [0.9, 0.1, 0.5, 0.2, *[0.0] * 11])
        result = train(buffer, **SETTINGS, keep="best")
        assert result.best == (12, 0.5)
        assert result.usae.W_dec.equal(seen[12])
        assert result.last is not None
        assert result.last.W_dec.equal(seen[60])
        assert result.taken == 60
        assert result.note == "kept step 12 (cross-R² 0.500 on validation rows)"

    def test_is_the_best_of_the_history(self, buffer: ActivationBuffer) -> None:
        result = train(buffer, **SETTINGS | {"steps": 120, "lr": 0.1}, keep="best")
        scores = {r.step: cross_r2(r.r2) for r in result.history if r.r2 and r.phase == "main"}
        best = max(scores, key=lambda step: scores[step])
        assert result.best == (best, scores[best])
        assert best < 120  # noise is learnt by heart
        found = oracles.r2(result.usae, buffer.read("validation").values)
        assert cross_r2(found) == pytest.approx(scores[best], abs=1e-5)

    def test_one_site_goes_by_its_own(self, buffer: ActivationBuffer) -> None:
        result = train(buffer, **SETTINGS, keep="best", early_stop=2, sites=["n/b"])
        assert result.best is not None
        r2 = validation_r2(result.usae, buffer)
        assert r2 is not None
        assert result.best.cross_r2 == pytest.approx(r2["n/b"]["n/b"], abs=1e-6)

    def test_never_reads_holdout_rows(self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        gathered: list[str] = []
        gather = ActivationBuffer.gather

        def spying(self: ActivationBuffer, split: str, *rest: Any) -> Any:
            gathered.append(split)
            return gather(self, split, *rest)

        monkeypatch.setattr(ActivationBuffer, "gather", spying)
        train(buffer, **SETTINGS, keep="best", early_stop=2)
        assert set(gathered) == {"train", "validation"}


class TestAverage:
    def test_against_the_formula(self) -> None:
        usae = USAE({"m/a": 3, "n/b": 2}, n_latents=4, k=1)
        average = Average(usae, 0.6, usae)
        expected = {name: value.detach().double() for name, value in usae.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for step in range(1, 9):
            decay = min(0.6, (1 + step) / (10 + step))
            for name, parameter in usae.named_parameters():
                parameter.data += torch.randn(parameter.shape, generator=generator)
                expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
            average.follow(step)
        raw = {name: value.detach().clone() for name, value in usae.named_parameters()}
        with average.applied():
            for name, parameter in usae.named_parameters():
                if name == "W_dec":
                    norms = expected[name].norm(dim=1, keepdim=True)
                    expected[name] = math.sqrt(2) * expected[name] / norms
                torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
        assert all(value.equal(raw[name]) for name, value in usae.named_parameters())

    def test_by_hand(self) -> None:
        # b_dec = 0, then 11 at step 1: decay min(.9, 2/11), so that a = 0 + (1 − 2/11) · 11 = 9
        usae = USAE({"m/a": 2}, n_latents=2, k=1)
        average = Average(usae, 0.9, usae)
        usae.b_dec.data.fill_(11.0)
        average.follow(1)
        torch.testing.assert_close(average.values["b_dec"], torch.full((2,), 9.0))

    def test_is_what_is_validated_and_returned(self, buffer: ActivationBuffer) -> None:
        plain, averaged = train(buffer, **SETTINGS), train(buffer, **SETTINGS, ema=0.9)
        assert [r.loss for r in averaged.history] == [r.loss for r in plain.history]  # training itself is the same
        assert not averaged.usae.W_dec.equal(plain.usae.W_dec)
        torch.testing.assert_close(averaged.usae.W_dec.norm(dim=1), torch.full((32,), math.sqrt(2)))
        found, expected = averaged.history[-1].r2, oracles.r2(averaged.usae, buffer.read("validation").values)
        assert found is not None
        for source in SITES:
            assert found[source] == pytest.approx(expected[source], abs=1e-5)


@pytest.mark.parametrize("step", [3, 17])
@pytest.mark.parametrize(
    "more", [{"early_stop": 3}, {"early_stop": 3, "keep": "best"}, {"keep": "best", "ema": 0.8}], ids=str
)
def test_exact_under_resume(
    buffer: ActivationBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(state_module, "SECONDS", 0.0)
    settings = SETTINGS | {"lr": 0.05} | more
    whole = train(buffer, **settings)

    def follow(record: StepRecord) -> None:
        if record.step > step:
            raise Stopped

    with pytest.raises(Stopped):
        train(buffer, **settings, progress=follow, resume=tmp_path / "state")
    resumed = train(buffer, **settings, resume=tmp_path / "state")
    assert same(whole.usae, resumed.usae)
    assert (whole.taken, whole.best, whole.resumed) == (resumed.taken, resumed.best, 0)
    assert (resumed.resumed, resumed.note) == (step, f"went on from step {step}, {whole.note}")
    assert resumed.history == [record for record in whole.history if record.step > step]
    if "early_stop" in more:
        assert whole.taken < 60
    again = train(buffer, **settings, resume=tmp_path / "state")  # nothing was left to do
    assert same(whole.usae, again.usae)
    assert (again.history, again.note) == ([], f"went on from step {whole.taken}, {whole.note}")


class TestRefusals:
    def test_without_validations(self) -> None:
        for key, value in (("early_stop", 3), ("keep", "best")):
            with pytest.raises(ValueError, match=f"{key} = .* goes by validations, which validate_every = 0"):
                TrainConfig(validate_every=0, **{key: value})

    def test_without_validation_rows(self, tmp_path: Path) -> None:
        rows = {"m/a": np.random.default_rng(0).normal(size=(60, 8))}
        buffer = ActivationBuffer.from_arrays(rows, tmp_path / "acts", validation=0.0)
        for key, value in (("early_stop", 3), ("keep", "best")):
            with pytest.raises(ConfigError, match=f"{key} = .* goes by R² on validation rows, .* has 0"):
                train(buffer, n_latents=8, k=2, steps=2, **{key: value})
        assert Watch(TrainConfig(), buffer).best is None


def test_one_that_can_never_stop_is_told(buffer: ActivationBuffer) -> None:
    # 40 steps, 10 of them aligned: validations at 20 and 30 come between the warm-up and the end
    settings = SETTINGS | {"steps": 40, "align_warmup": 0.25, "validate_every": 10}
    with pytest.warns(UsaeProbeWarning, match="early_stop = 2 cannot stop this training: 2 validations come after"):
        train(buffer, **settings, early_stop=2)
    train(buffer, **settings, early_stop=1)  # the first may be the best, the second worse: nothing to tell
