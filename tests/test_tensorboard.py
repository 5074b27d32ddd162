"""TensorBoard: what is written, that a resumed training replaces it, and that nothing else ever imports it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import usae_probe.usae.tensorboard as module
from usae_probe.buffer import ActivationBuffer
from usae_probe.config import RunConfig
from usae_probe.errors import ConfigError
from usae_probe.pipeline import Run
from usae_probe.usae import StepRecord, TensorBoardCallback, read_history, train
from usae_probe.usae.tensorboard import scalars

from .tiny_run import changed, put_tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

R2 = {"m/a": {"m/a": 0.8, "n/b": math.nan}, "n/b": {"m/a": 0.25, "n/b": 0.75}}


def record(step: int, loss: float = 1.5, **more: Any) -> StepRecord:
    return StepRecord(
        step=step,
        steps=9,
        phase="main",
        source="m/a",
        lr=0.003,
        loss=loss,
        losses={"m/a": 0.5, "n/b": 1.0},
        aux=0.25,
        penalty=0.0,
        grad_norm=2.0,
        dead_share=0.125,
        l0=32.0,
        **more,
    )


def written(folder: Path) -> dict[str, dict[int, float]]:
    """Read the event files as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_scalars() -> None:
    assert dict(scalars(record(3, r2=R2, contrastive=0.5))) == {
        "loss/total": 1.5,
        "loss/m/a": 0.5,
        "loss/n/b": 1.0,
        "loss/aux": 0.25,
        "loss/penalty": 0.0,
        "loss/contrastive": 0.5,
        "training/lr": 0.003,
        "training/gradient norm": 2.0,
        "training/dead share": 0.125,
        "training/active latents per row": 32.0,
        "validation/m/a to m/a": 0.8,
        "validation/n/b to m/a": 0.25,  # m/a to n/b is no number
        "validation/n/b to n/b": 0.75,
        "validation/mean cross-R²": 0.25,
    }
    assert not any(tag.startswith("validation") or "contrastive" in tag for tag, _ in scalars(record(3)))


def test_a_resumed_training_replaces_what_it_does_again(tmp_path: Path) -> None:
    with TensorBoardCallback(tmp_path / "tb") as board:
        for step in (1, 2, 3, 4):
            board(record(step, loss=float(step)))
    with TensorBoardCallback(tmp_path / "tb") as board:
        for step in (3, 4, 5):
            board(record(step, loss=10.0 * step))
    found = written(tmp_path / "tb")["loss/total"]
    assert found == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}


def test_nothing_is_written_before_the_first_record(tmp_path: Path) -> None:
    TensorBoardCallback(tmp_path / "tb").close()
    assert not (tmp_path / "tb").exists()


def test_from_python(tmp_path: Path) -> None:
    rows = {"m/a": np.random.default_rng(0).normal(size=(60, 8))}
    buffer = ActivationBuffer.from_arrays(rows, tmp_path / "acts")
    with TensorBoardCallback(tmp_path / "tb") as board:
        result = train(buffer, progress=board, n_latents=8, k=2, steps=4, log_every=1)
    found = written(tmp_path / "tb")["loss/total"]
    assert found == pytest.approx({r.step: r.loss for r in result.history}, rel=1e-6)
    with pytest.raises(ConfigError, match=r"no run folder for TensorBoard's files \(give progress=TensorBoardCallback"):
        train(buffer, n_latents=8, k=2, steps=4, tensorboard=True)


def test_in_a_run(tmp_path: Path) -> None:
    config = RunConfig.from_dict(changed(train={"tensorboard": True}), base=put_tiny_run(tmp_path))
    Run(config, tmp_path / "run").run(("harvest", "train"))
    found = written(tmp_path / "run" / "tensorboard")
    assert set(found["loss/total"]) == set(range(1, 9))  # every step, where the history keeps each second
    assert set(found["validation/mean cross-R²"]) == {4, 8}
    kept = {line["step"]: line["loss"] for line in read_history(tmp_path / "run" / "history.jsonl")}
    assert {step: found["loss/total"][step] for step in kept} == pytest.approx(kept, rel=1e-6)
    without = RunConfig.from_dict(changed(train={"tensorboard": False}), base=tmp_path)
    (done,) = Run(without, tmp_path / "run").run(("train",)).stages
    assert done.kept  # the weights do not depend on it


def test_a_missing_package_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package tensorboard is not installed.*\(pip install tensorboard"):
        TensorBoardCallback(tmp_path / "tb")
    config = RunConfig.from_dict(changed(train={"tensorboard": True}), base=put_tiny_run(tmp_path))
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Run(config, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_it_is_never_imported_otherwise(tmp_path: Path) -> None:
    rows = {"m/a": np.random.default_rng(0).normal(size=(60, 8))}
    ActivationBuffer.from_arrays(rows, tmp_path / "acts")
    program = f"""
import sys
from usae_probe.buffer import ActivationBuffer
from usae_probe.usae import TensorBoardCallback, train
train(ActivationBuffer({str(tmp_path / "acts")!r}), n_latents=8, k=2, steps=2)
board = TensorBoardCallback({str(tmp_path / "tb")!r})
print([name for name in sys.modules if "tensorboard" in name and not name.startswith("usae_probe")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
