"""A training that is killed at any moment goes on to the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import usae_probe.usae.state as state_module
from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig
from usae_probe.usae import HistoryFile, StepRecord, read_history, train

from .test_buffer_kill import kill_at

STEPS = 40
HOW = TrainConfig(
    steps=STEPS,
    batch_size=32,
    dead_after=4,
    aux_k=4,
    input_noise=0.1,
    ema=0.9,
    keep="best",
    early_stop=50,
    validate_every=4,
    log_every=3,
    device="cpu",
)
SHAPE: dict[str, Any] = {"n_latents": 24, "k": 3, "sparsity": "batchtopk"}


def make_buffer(folder: Path) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(200, 6))
    arrays = {"a/x": shared @ rng.normal(size=(6, 9)), "b/y": shared @ rng.normal(size=(6, 7))}
    ActivationBuffer.from_arrays(arrays, folder / "acts", dtype="float32")


def work(folder: Path, call: int = 0, seconds: float = 0.0, pause: float = 0.0) -> None:
    """Train, with the state written every so many seconds, and save what a run saves.

    `call`: end just before that fsync or replacement of a file; 0 for none.
    """
    torch.set_num_threads(1)
    state_module.SECONDS = seconds
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if call:
        kill_at(call)
    with HistoryFile(folder / "history.jsonl") as history, (folder / "steps").open("a") as steps:

        def follow(record: StepRecord) -> None:
            history.add(record, keep=record.is_kept(HOW))
            steps.write(f"{record.step}\n")
            steps.flush()
            time.sleep(pause)

        result = train(
            ActivationBuffer(folder / "acts"), train_config=HOW, progress=follow, resume=folder / "state", **SHAPE
        )
    assert result.last is not None
    result.last.save(folder / "usae-last.safetensors")
    result.usae.save(folder / "usae.safetensors")


def start(folder: Path, **options: float) -> BaseProcess:
    """Train in a process of its own, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["usae_probe.usae", "usae_probe.buffer"])
    process = context.Process(target=work, args=(folder,), kwargs=options)
    process.start()
    return process


def steps_of(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "steps").read_text().split()] if (folder / "steps").exists() else []


def wait_for(folder: Path, step: int) -> None:
    until = time.monotonic() + 60
    while not any(done >= step for done in steps_of(folder)):
        assert time.monotonic() < until
        time.sleep(0.002)


def content(folder: Path) -> dict[str, str]:
    names = ("usae.safetensors", "usae-last.safetensors", "history.jsonl")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def finished(folder: Path) -> dict[str, str]:
    process = start(folder)
    process.join(60)
    assert process.exitcode == 0
    return content(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    make_buffer(folder)
    return finished(folder)


def test_sigkill_in_the_middle_of_steps(tmp_path: Path, whole: dict[str, str]) -> None:
    make_buffer(tmp_path)
    rng, reached = np.random.default_rng(1), []
    for step in (2, 9, 13, 24, 30):
        process = start(tmp_path, pause=0.01)
        wait_for(tmp_path, step)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        reached.append(steps_of(tmp_path)[-1])
    assert reached == sorted(set(reached))  # each went on where the one before had been
    assert reached[-1] < STEPS
    assert finished(tmp_path) == whole
    assert [record["step"] for record in read_history(tmp_path / "history.jsonl")][-1] == STEPS


@pytest.mark.parametrize("call", [1, 3, 4, 5, 6, 7, 40, 41, 42])
def test_sigkill_while_files_are_written(tmp_path: Path, whole: dict[str, str], call: int) -> None:
    """Calls 1–3 publish the history (fsync, replace, fsync of the folder), 3 t + 1 to 3 t + 3 the state of step t."""
    make_buffer(tmp_path)
    process = start(tmp_path, call=call)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "state").exists() == (call > 5)
    assert finished(tmp_path) == whole


def test_ctrl_c_loses_no_step(tmp_path: Path, whole: dict[str, str]) -> None:
    make_buffer(tmp_path)
    process = start(tmp_path, seconds=3600.0, pause=0.02)
    wait_for(tmp_path, 5)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1  # KeyboardInterrupt
    done = steps_of(tmp_path)
    assert done == list(range(1, done[-1] + 1))
    assert done[-1] < STEPS
    assert finished(tmp_path) == whole
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))
