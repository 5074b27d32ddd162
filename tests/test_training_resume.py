"""A training that was stopped goes on as if it had not been: same weights bit for bit, same history."""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import usae_probe.usae.state as state_module
from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig, UsaeConfig
from usae_probe.errors import NonFiniteError
from usae_probe.usae import HistoryFile, StepRecord, TrainResult, read_history, train, train_steps, usae_for
from usae_probe.usae.interrupts import held_interrupts
from usae_probe.usae.state import TrainingState
from usae_probe.usae.training import Training

from .trainings import Stopped, related_rows, same

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"n_latents": 32, "k": 4, "steps": 20, "batch_size": 64, "dead_after": 5, "aux_k": 8, "log_every": 3}


@pytest.fixture
def buffer(tmp_path: Path) -> ActivationBuffer:
    return related_rows(tmp_path / "acts")


@pytest.fixture(autouse=True)
def _state_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "SECONDS", 0.0)


def stopped_at(step: int, buffer: ActivationBuffer, state: Path, history: Path | None = None) -> None:
    def follow(record: StepRecord) -> None:
        if record.step > step:
            raise Stopped
        if file:
            file.add(record, keep=record.step % 3 == 0)

    with ExitStack() as closing:
        file = closing.enter_context(HistoryFile(history)) if history else None
        with pytest.raises(Stopped):
            train(buffer, progress=follow, resume=state, **SETTINGS)


@pytest.mark.parametrize("step", [1, 5, 13, 19])  # the alignment warm-up ends after step 5
def test_stopped_and_resumed_equals_uninterrupted(buffer: ActivationBuffer, tmp_path: Path, step: int) -> None:
    whole = train(buffer, **SETTINGS)
    stopped_at(step, buffer, tmp_path / "state")
    resumed = train(buffer, resume=tmp_path / "state", **SETTINGS)
    assert same(whole.usae, resumed.usae)
    assert resumed.history == [record for record in whole.history if record.step > step]


def test_rows_read_ahead_are_the_same(buffer: ActivationBuffer, tmp_path: Path) -> None:
    whole = train(buffer, **SETTINGS)
    stopped_at(13, buffer, tmp_path / "state")
    resumed = train(buffer, resume=tmp_path / "state", workers=2, **SETTINGS)
    assert resumed.resumed == 13
    assert same(whole.usae, resumed.usae)


def test_a_buffer_above_its_memory_is_gone_on_with_in_its_pool(buffer: ActivationBuffer, tmp_path: Path) -> None:
    """Five shards of 70 images, two of them in the pool."""
    rows = buffer.read("train").values
    arrays = {site: np.concatenate([x, x])[:350] for site, x in rows.items()}
    made = ActivationBuffer.from_arrays(
        arrays, tmp_path / "larger", holdout=0.0, validation=0.0, shard_images=70, dtype="float32"
    )
    pooled = ActivationBuffer(made.path, memory_budget=1)
    assert (made.pool(), pooled.pool()) == (None, 2)
    whole = train(pooled, **SETTINGS)
    stopped_at(13, pooled, tmp_path / "state")
    assert same(train(pooled, resume=tmp_path / "state", **SETTINGS).usae, whole.usae)
    stopped_at(13, pooled, tmp_path / "other")
    fresh = train(made, resume=tmp_path / "other", **SETTINGS)
    assert fresh.resumed == 0  # mixed in another way, it is another training
    assert not same(fresh.usae, whole.usae)


def test_seconds_are_those_of_all_parts(buffer: ActivationBuffer, tmp_path: Path) -> None:
    state = tmp_path / "state"
    stopped_at(13, buffer, state)
    with safe_open(state, framework="pt") as file:
        about = file.metadata()
    numbers = json.loads(about["numbers"])
    assert 0.0 < numbers["seconds"] < 60.0
    about["numbers"] = json.dumps(numbers | {"seconds": 1000.0})
    save_file(load_file(state), state, metadata=about)
    assert 1000.0 < train(buffer, resume=state, **SETTINGS).seconds < 1060.0
    assert train(buffer, **SETTINGS).seconds < 60.0


def test_a_state_of_another_training_is_not_used(buffer: ActivationBuffer, tmp_path: Path) -> None:
    stopped_at(13, buffer, tmp_path / "state")

    def steps(result: TrainResult) -> int:
        return result.history[0].step

    assert steps(train(buffer, resume=tmp_path / "state", **SETTINGS | {"lr": 1e-4})) == 3
    stopped_at(13, buffer, tmp_path / "other")
    assert steps(train(buffer, resume=tmp_path / "other", **SETTINGS)) == 15
    (tmp_path / "damaged").write_bytes(b"no safetensors")
    assert steps(train(buffer, resume=tmp_path / "damaged", **SETTINGS)) == 3


def test_states_are_not_written_more_often_than_asked(
    buffer: ActivationBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "SECONDS", 3600.0)
    train(buffer, resume=tmp_path / "state", **SETTINGS)
    assert not (tmp_path / "state").exists()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 4000.0)
    train(buffer, resume=tmp_path / "state", **SETTINGS)
    assert not (tmp_path / "state").exists()  # the clock stands still: an hour since the start never passes


def test_the_history_of_a_resumed_training_has_every_record_once(buffer: ActivationBuffer, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    stopped_at(13, buffer, tmp_path / "state", path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 14}) + "\n")  # written after the state, before the kill
        file.write('{"step": 2')
    with HistoryFile(path) as history:
        train(buffer, progress=lambda r: history.add(r, keep=r.step % 3 == 0), resume=tmp_path / "state", **SETTINGS)
    records = list(read_history(path))
    assert [record["step"] for record in records] == list(range(3, 20, 3))
    assert all("losses" in record for record in records)


class TestNotFinite:
    def test_the_last_good_state_is_named(self, buffer: ActivationBuffer, tmp_path: Path) -> None:
        with pytest.raises(NonFiniteError) as caught:
            train(buffer, resume=tmp_path / "state", **SETTINGS | {"lr": 1e30})
        step = int(caught.value.message.split("not finite at step ")[1].split()[0])
        assert (
            caught.value.hint
            == f"lower train.lr; the last good state, of step {step - 1}, is in '{tmp_path / 'state'}'"
        )
        with safe_open(tmp_path / "state", framework="pt") as file:
            assert file.metadata()["step"] == str(step - 1)
            for name in file.keys():  # noqa: SIM118  # no mapping
                assert torch.isfinite(file.get_tensor(name)).all()

    def test_or_that_there_is_none(
        self, buffer: ActivationBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(NonFiniteError, match="no state was kept: give resume"):
            train(buffer, **SETTINGS | {"lr": 1e30})
        monkeypatch.setattr(state_module, "SECONDS", 3600.0)
        with pytest.raises(NonFiniteError, match=r"no state had been kept in '.*state' yet"):
            train(buffer, resume=tmp_path / "state", **SETTINGS | {"lr": 1e30})

    def test_weights_are_looked_at_before_they_are_kept(self, buffer: ActivationBuffer, tmp_path: Path) -> None:
        how = TrainConfig(steps=9, batch_size=64)
        training = Training(usae_for(buffer, UsaeConfig(n_latents=32, k=4), how), buffer, how)
        state = TrainingState(tmp_path / "state", {})
        records = training.records(state.last_good)
        next(records)
        state.keep(training)
        before = (tmp_path / "state").read_bytes()
        next(records)
        training.optimiser.tensors()["v.b_dec"][3] = torch.inf  # the weights are still numbers
        with pytest.raises(NonFiniteError, match=r"'optimiser.v.b_dec' is not finite after step 2 \(.*of step 1"):
            state.keep(training)
        assert (tmp_path / "state").read_bytes() == before

    def test_a_gradient_alone(self, buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        how = TrainConfig(steps=9, batch_size=64)
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=4), how)
        usae.b_dec.register_hook(lambda grad: grad * torch.nan)
        before = [value.detach().clone() for value in usae.parameters()]
        with pytest.raises(NonFiniteError, match=r"the gradient is not finite at step 1 \(source all\)"):
            next(train_steps(usae, buffer, how))
        assert all(a.equal(b) for a, b in zip(before, usae.parameters(), strict=True))

    def test_the_last_weights_are_looked_at_too(self, buffer: ActivationBuffer) -> None:
        how = TrainConfig(steps=1, batch_size=64)
        usae = usae_for(buffer, UsaeConfig(n_latents=32, k=4), how)
        records = train_steps(usae, buffer, how)
        next(records)
        usae.b_dec.data[0] = torch.nan
        with pytest.raises(NonFiniteError, match="'b_dec' is not finite after step 1"):
            next(records)


class TestWhatAStateIsOf:
    """Settings that change no number of a training do not cost its state."""

    @pytest.mark.parametrize(
        ("changed", "used"),
        [
            ({"log_every": 1}, True),
            ({"validate_every": 5}, True),
            ({"lr": 1e-4}, False),
            ({"ema": 0.9}, False),
            ({"keep": "best"}, False),
        ],
        ids=str,
    )
    def test_settings(self, buffer: ActivationBuffer, tmp_path: Path, changed: dict[str, Any], used: bool) -> None:
        stopped_at(13, buffer, tmp_path / "state")
        first: list[int] = []
        train(buffer, resume=tmp_path / "state", progress=lambda r: first.append(r.step), **SETTINGS | changed)
        assert first[0] == (14 if used else 1)

    def test_validations_matter_where_something_goes_by_them(self, buffer: ActivationBuffer, tmp_path: Path) -> None:
        first: list[int] = []
        for every in (4, 5):
            settings = SETTINGS | {"keep": "best", "validate_every": every}
            train(buffer, resume=tmp_path / "state", progress=lambda r: first.append(r.step), **settings)
        assert first == [*range(1, 21), *range(1, 21)]


def test_a_second_interrupt_is_heard_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    second = False
    with pytest.raises(KeyboardInterrupt), held_interrupts() as interrupted:  # noqa: PT012  # all of it is meant
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        second = True
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it was not heard")
    assert second
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupts_that_somebody_handles_already_are_left_to_them() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with held_interrupts() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_an_interrupt_that_nobody_asked_for_is_raised_at_the_end() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), held_interrupts():  # noqa: PT012  # all of it is meant
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done
