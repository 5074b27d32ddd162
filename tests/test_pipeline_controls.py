"""The controls of a run: what is trained beside it, what is kept of it, and what happens when one of them fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import RunConfig
from usae_probe.errors import ConfigError, StageError, UsaeProbeWarning
from usae_probe.pipeline import Run, controls
from usae_probe.usae import USAE

from .tiny_run import changed, put_tiny_run

PROBES = {"controls": True, "seeds": 2, "fidelity_images": 12}
NAMES = ["mispaired", "within shape", "untrained", "pixels and a", "pixels and b", "a twice", "b twice"]


def config(folder: Path, **probes: Any) -> RunConfig:
    return RunConfig.from_dict(changed(probes=PROBES | probes), base=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all its controls."""
    folder = put_tiny_run(tmp_path_factory.mktemp("controls"))
    Run(config(folder), folder / "run").run()
    return folder


@pytest.fixture
def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "metrics.json").read_text())
    return found


def weights(folder: Path) -> dict[str, int]:
    """When each file of weights below `controls/` was written."""
    found = sorted((folder / "run" / "controls").rglob("usae.safetensors"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_every_control_is_trained_and_measured(metrics: dict[str, Any]) -> None:
    assert list(metrics["controls"]) == NAMES
    for name, control in metrics["controls"].items():
        assert sum(control["counts"].values()) == 16
        assert control["n_live"] == 16 - control["counts"]["rare"] - control["counts"]["dead"]
        assert control["what"]
        assert set(control["r2"]) == set(control["sites"]), name
    sites = {name: control["sites"] for name, control in metrics["controls"].items()}
    assert sites["mispaired"] == sites["untrained"] == metrics["class_sites"] == ["a/2", "b/2"]
    assert sites["pixels and b"] == ["pixels/statistics", "b/2"]
    assert sites["a twice"] == ["a/2", "a-again/2"]


def self_r2_of_other_seed(folder: Path, site: str) -> float:
    metrics = json.loads((folder / "run" / "controls" / "seed-1" / "metrics.json").read_text())
    found: float = metrics["r2"][site][site]
    return found


def test_tax_is_the_difference_of_what_is_shown(folder: Path, metrics: dict[str, Any]) -> None:
    for kind in ("steps", "encoder", "parts"):
        for site in metrics["sites"]:
            found, tax = metrics["independent_r2"][kind][site], metrics["alignment_tax"][kind][site]
            assert found["n"] == tax["n"] == 2
            assert found["low"] <= found["mean"] <= found["high"]
            # the mean over the seeds of a difference: mean SAE less mean USAE, whose own R² for seed 0 is r2's
            own = 2 * (found["mean"] - tax["mean"])
            assert own - metrics["r2"][site][site] == pytest.approx(self_r2_of_other_seed(folder, site), abs=1e-6)


def test_seeds(metrics: dict[str, Any]) -> None:
    stable = metrics["stability"]
    assert stable["seeds"] == [0, 1]
    assert stable["universal"][0] == metrics["counts"]["universal"]
    assert stable["live"][0] == metrics["n_live"]
    assert len(stable["found_again"]) == 1
    assert [found["matched_on"] for found in metrics["posthoc"]] == ["holdout", "train"]
    assert set(metrics["counterparts"]) == {"a/2", "b/2"}


def test_untrained_networks_have_other_weights_and_the_same_images(folder: Path) -> None:
    trained = ActivationBuffer(folder / "run" / "buffer")
    fresh = ActivationBuffer(folder / "run" / "controls" / "untrained" / "buffer")
    assert fresh.sites == trained.sites
    hashes = [{spec.weights_hash for spec in buffer.specs.values()} for buffer in (trained, fresh)]
    assert not hashes[0] & hashes[1]
    for split in ("train", "validation", "holdout"):
        pair = [buffer.read(split).image_index.tolist() for buffer in (trained, fresh)]
        assert pair[0] == pair[1]


def test_the_same_model_twice_has_two_encoders_of_one_activation(folder: Path) -> None:
    usae = USAE.load(folder / "run" / "controls" / "a-twice" / "usae.safetensors")
    assert usae.sites == ("a/2", "a-again/2")
    assert usae.d_in["a/2"] == usae.d_in["a-again/2"]


def test_what_is_done_is_kept(folder: Path, metrics: dict[str, Any]) -> None:
    before = weights(folder)
    assert len(before) == 7 + 1 + 2 * 3 * 3  # controls, another seed, SAEs: seeds, kinds, sites
    (folder / "run" / "metrics.json").unlink()
    Run(config(folder), folder / "run").run(("evaluate",))
    assert weights(folder) == before
    assert json.loads((folder / "run" / "metrics.json").read_text()) == metrics


def test_what_was_interrupted_goes_on(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_tiny_run(tmp_path)
    run = Run(config(tmp_path, seeds=1), tmp_path / "run")
    twice = controls.ControlStage._twice

    def interrupted(self: controls.ControlStage, site: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(controls.ControlStage, "_twice", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    before = weights(tmp_path)
    assert len(before) == 5
    monkeypatch.setattr(controls.ControlStage, "_twice", twice)
    result = Run(config(tmp_path, seeds=1), tmp_path / "run").run()
    assert {name: weights(tmp_path)[name] for name in before} == before
    assert result.metrics is not None
    assert list(result.metrics["controls"]) == NAMES
    assert result.metrics["stability"]["found_again"] == []  # one seed alone


def test_a_control_that_fails_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: controls.ControlStage) -> Any:
        raise StageError("no weights can be drawn")

    monkeypatch.setattr(controls.ControlStage, "_untrained", failing)
    (folder / "run" / "metrics.json").unlink()
    with pytest.warns(UsaeProbeWarning, match=r"the control 'untrained' is left out: no weights can be drawn"):
        result = Run(config(folder), folder / "run").run(("evaluate",))
    assert result.metrics is not None
    assert list(result.metrics["controls"]) == [name for name in NAMES if name != "untrained"]


def test_rows_are_exchanged_within_another_label(folder: Path) -> None:
    result = Run(config(folder, within="colour"), folder / "run").run(("evaluate",))
    assert result.metrics is not None
    assert list(result.metrics["controls"])[1] == "within colour"
    assert [null["within"] for null in result.metrics["nulls"]] == ["", "colour"]


def test_a_ring_keeps_no_rows_to_train_again(tmp_path: Path) -> None:
    tables = changed(probes={"controls": True}, buffer={"mode": "ring", "capacity": "1GB"})
    with pytest.raises(ConfigError, match=r"probes.controls trains again from rows that buffer.mode = 'ring' drops"):
        RunConfig.from_dict(tables, base=tmp_path)


def test_without_its_models_fidelity_is_left_out(tmp_path: Path) -> None:
    put_tiny_run(tmp_path)
    tables = changed(probes={"fidelity_images": 12})
    plain = RunConfig.from_dict(tables, base=tmp_path)
    first = Run(plain, tmp_path / "run").run()
    assert first.metrics is not None
    assert first.metrics["fidelity"]["n_images"] == 12
    moved = RunConfig.from_dict(changed(probes={"fidelity_images": 12, "phi": 0.3}), base=tmp_path)
    (tmp_path / "nets.py").rename(tmp_path / "gone.py")
    with pytest.warns(UsaeProbeWarning, match=r"fidelity is left out: .*nets.py' does not exist"):
        again = Run(moved, tmp_path / "run").run(("evaluate",))
    assert again.metrics is not None
    assert again.metrics["fidelity"] is None
    assert again.metrics["r2"] == first.metrics["r2"]
