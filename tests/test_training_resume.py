"""A training that was stopped goes on as if it had not been: same weights bit for bit, same history."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

import usae_probe.usae.state as state_module
from usae_probe.buffer import ActivationBuffer
from usae_probe.usae import USAE, HistoryFile, StepRecord, TrainResult, read_history, train

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"n_latents": 32, "k": 4, "steps": 20, "batch_size": 64, "dead_after": 5, "aux_k": 8, "log_every": 3}


class Stopped(Exception):
    pass


@pytest.fixture
def buffer(tmp_path: Path) -> ActivationBuffer:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 10))
    arrays = {"a/x": shared @ rng.normal(size=(10, 12)), "b/y": shared @ rng.normal(size=(10, 9))}
    return ActivationBuffer.from_arrays(arrays, tmp_path / "acts", dtype="float32")


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


def same(a: USAE, b: USAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("step", [1, 5, 13, 19])  # the alignment warm-up ends after step 5
def test_stopped_and_resumed_equals_uninterrupted(buffer: ActivationBuffer, tmp_path: Path, step: int) -> None:
    whole = train(buffer, **SETTINGS)
    stopped_at(step, buffer, tmp_path / "state")
    resumed = train(buffer, resume=tmp_path / "state", **SETTINGS)
    assert same(whole.usae, resumed.usae)
    assert resumed.history == [record for record in whole.history if record.step > step]


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
