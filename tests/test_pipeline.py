"""The stages of a run: what is kept, what is redone and why, and what a failure leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from usae_probe import ActivationBuffer, Run, RunConfig
from usae_probe.demo import drawings
from usae_probe.errors import (
    BufferMismatchError,
    CheckpointError,
    ConfigError,
    ImageError,
    StageError,
    UnknownLayerError,
    UsaeProbeWarning,
    UsageError,
)
from usae_probe.images import open_source
from usae_probe.machine import peak_memory
from usae_probe.pipeline import MEASURING, Progress, RunResult, StageResult, measuring
from usae_probe.pipeline.training import kernel_note
from usae_probe.report import figures
from usae_probe.usae.kernels import choose

from .tiny_run import CONFIG, MODEL, changed, put_tiny_run

Runner = Callable[..., RunResult]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return put_tiny_run(tmp_path)


@pytest.fixture
def run(base: Path) -> Runner:
    def do(config: dict[str, Any] = CONFIG, stages: Any = MEASURING, **callbacks: Any) -> RunResult:
        return Run(RunConfig.from_dict(config, base=base), base / "run", **callbacks).run(stages)

    return do


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes longer than all else here, and what is drawn is tested elsewhere."""
    if "figures" not in request.node.name:
        monkeypatch.setattr(figures, "training_curves", lambda _, path: path.touch())
        monkeypatch.setattr(measuring, "universality_figures", lambda *_: [])


def fates(result: RunResult) -> list[str]:
    return ["kept" if stage.kept else stage.why or "done" for stage in result.stages]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- a whole run ---


def test_a_run_leaves_what_the_design_says_and_figures(run: Runner, base: Path) -> None:
    news: list[Any] = []
    progress: list[Progress] = []
    result = run(announce=news.append, progress=progress.append)
    assert fates(result) == ["done"] * 3
    files = {file.name for file in (base / "run").iterdir()}
    assert files >= {
        "run.json", "buffer", "usae.safetensors", "usae.json", "history.jsonl", "metrics.json", "latents.csv", "figures"
    }  # fmt: skip
    drawn = ("r2", "training", "entropy", "phi_energy", "controls", "similarity")
    expected = {f"{name}{suffix}" for name in drawn for suffix in (".png", ".svg")}
    assert {file.name for file in (base / "run/figures").iterdir()} == expected
    record = json.loads((base / "run/run.json").read_text())
    assert record["schema"] == 1
    assert record["config"]["train"]["steps"] == 8
    assert record["versions"]["torch"]
    assert {stage["peak_memory_bytes"] > 1e7 for stage in record["stages"].values()} == {True}
    history = [json.loads(line) for line in (base / "run/history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [2, 4, 6, 8]
    assert [entry["r2"] is not None for entry in history] == [False, True, False, True]
    assert [n if isinstance(n, tuple) else n.stage for n in news] == [
        ("harvest", ""), "harvest", ("train", ""), "train", ("evaluate", ""), "evaluate"
    ]  # fmt: skip
    assert {p.stage: (p.done, p.total) for p in progress} == {
        "harvest": (60, 60), "train": (8, 8), "evaluate": (progress[-1].total, progress[-1].total)
    }  # fmt: skip


def test_metrics_of_schema_1(run: Runner, base: Path) -> None:
    result = run()
    metrics = json.loads((base / "run/metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics == result.metrics
    sites = ["a/0", "a/2", "b/2"]
    assert (metrics["schema"], metrics["sites"], metrics["class_sites"]) == (1, sites, ["a/2", "b/2"])
    for name in ("r2", "r2_train", "r2_global_mean"):
        assert list(metrics[name]) == sites
        for row in metrics[name].values():
            assert list(row) == sites
            assert all(isinstance(value, float) and value <= 1 for value in row.values())
    assert list(metrics["counts"]) == ["universal", "partial", "chance", "specific", "rare", "dead"]
    assert sum(metrics["counts"].values()) == metrics["n_latents"] == 16
    buffer = ActivationBuffer(base / "run/buffer")
    assert (metrics["n_rows_train"], metrics["n_rows_eval"]) == (buffer.n_rows("train"), 18)
    assert len((base / "run/latents.csv").read_text().splitlines()) == 17
    assert result.report is not None
    assert result.report.r2["a/2"]["b/2"] == metrics["r2"]["a/2"]["b/2"]


def test_a_training_says_once_which_kernel_it_had_and_why(run: Runner, base: Path) -> None:
    def trained(stages: Any = MEASURING, k: int = 2, **train: Any) -> tuple[list[str], Any]:
        done = run(changed(train={"device": "cpu", **train}, usae={"k": k}), stages)
        return [s.note for s in done.stages], json.loads((base / "run/run.json").read_text())["stages"]["train"]

    notes, record = trained()  # k = 2 of 16 latents are under 15 %: no product is dense
    assert notes == ["", "kernel csr (auto: float32 on cpu)", ""]
    assert record["kernel"] == {"name": "csr", "reason": "auto: float32 on cpu", "precision": "fp32", "dense": 0.0}
    assert trained()[0] == [""] * 3  # kept
    notes, record = trained(("train",), kernel="reference", keep="best")
    best, kernel = notes[0].split("; ")
    assert best.startswith("kept step ")
    assert kernel == "kernel reference (asked for)"
    assert record["kernel"]["dense"] == 1.0
    choose._warn.cache_clear()
    with pytest.warns(UsaeProbeWarning, match="the triton kernel cannot run"):  # 4 of 16 are over 15 %
        notes, record = trained(("train",), k=4, kernel="triton")
    assert notes == ["kernel csr (triton cannot run: it runs on CUDA, not on cpu; 100% of its products dense)"]
    assert record["kernel"]["reason"] == "triton cannot run: it runs on CUDA, not on cpu"
    notes, record = trained(("train",), recipe="published")  # whose products are its own
    assert notes == [""]
    assert "kernel" not in record
    choose._warn.cache_clear()


def test_a_record_without_a_kernel_is_no_other_training(run: Runner, base: Path) -> None:
    run()
    record = json.loads((base / "run/run.json").read_text())
    del record["stages"]["train"]["kernel"]
    (base / "run/run.json").write_text(json.dumps(record))
    assert fates(run()) == ["kept"] * 3


def test_the_kernel_in_words() -> None:
    kernel = {"name": "csr", "reason": "auto: float32 on cpu", "precision": "bf16", "dense": 0.256}
    assert kernel_note(kernel) == "kernel csr, bf16 (auto: float32 on cpu; 26% of its products dense)"
    assert kernel_note(kernel | {"name": "triton", "dense": 0.0}) == "kernel triton, bf16 (auto: float32 on cpu)"


# --- kept or redone ---


def test_a_second_run_keeps_everything(run: Runner, base: Path) -> None:
    first = run()
    before = content(base / "run")
    news: list[Any] = []
    again = run(announce=news.append)
    assert fates(again) == ["kept"] * 3
    assert again.metrics == first.metrics
    assert again.report is None
    assert content(base / "run") == before
    assert all(isinstance(item, StageResult) and item.kept for item in news)


def test_a_run_can_be_repeated_bit_for_bit(run: Runner, base: Path) -> None:
    run()
    one = content(base / "run")
    (base / "run").rename(base / "other")
    run()
    two = content(base / "run")
    for name in ("usae.safetensors", "metrics.json", "latents.csv", "buffer/manifest.json", "buffer/shard-00000.h5"):
        assert one[name] == two[name]


def test_keys_that_change_no_result_redo_nothing(run: Runner) -> None:
    run()
    other = changed(images={"workers": 2}, train={"log_every": 1, "kernel": "reference", "device": "cpu"})
    assert fates(run(other)) == ["kept"] * 3


def test_a_changed_train_key_redoes_train_and_evaluate_and_says_which(run: Runner, base: Path) -> None:
    run()
    before = content(base / "run/buffer")
    news: list[Any] = []
    result = run(changed(train={"lr": 0.001}), announce=news.append)
    assert fates(result)[:2] == ["kept", "train.lr changed"]
    assert "train.lr" in fates(result)[2]
    assert ("train", "train.lr changed") in news
    assert content(base / "run/buffer") == before
    assert fates(run(changed(train={"lr": 0.001}))) == ["kept"] * 3


def test_a_run_from_before_a_key_was_there_was_done_with_its_default(run: Runner, base: Path) -> None:
    run()
    record = json.loads((base / "run/run.json").read_text())
    for stage in record["stages"].values():
        for key in [key for key in stage["depends_on"] if key.endswith((".layout", "probes.seed"))]:
            del stage["depends_on"][key]
    (base / "run/run.json").write_text(json.dumps(record))
    assert fates(run()) == ["kept"] * 3
    assert fates(run(changed(probes={"seed": 1}))) == ["kept", "kept", "probes.seed changed"]


def test_changed_probes_redo_evaluate_only(run: Runner) -> None:
    run()
    assert fates(run(changed(probes={"min_fires": 3}))) == ["kept", "kept", "probes.min_fires changed"]


def test_a_changed_seed_of_the_images_redoes_everything(run: Runner, base: Path) -> None:
    run()
    before = ActivationBuffer(base / "run/buffer").read("holdout").image_index
    result = run(changed(images={"seed": 1}))
    assert not any(stage.kept for stage in result.stages)
    assert all("images.seed" in stage.why for stage in result.stages)
    after = ActivationBuffer(base / "run/buffer").read("holdout").image_index
    assert not np.array_equal(before, after)
    assert run().stages[0].why == "images.seed changed"  # and back


def test_other_pictures_under_the_same_name_are_trained_on_once_they_are_harvested(run: Runner, base: Path) -> None:
    run()
    before, then = content(base / "run"), ActivationBuffer(base / "run/buffer").source["fingerprint"]
    kept = (base / "images.npz").read_bytes()
    drawings.save_drawings(base / "images.npz", drawings.draw_images(60, size=32, seed=9))
    with pytest.raises(BufferMismatchError, match=r"made of other images than .*images\.npz: source\.f") as caught:
        run()  # the config is the same, and what was harvested is not what is there now
    now = open_source(base / "images.npz").fingerprint()
    assert f"{then[:16]}… on disk, {now[:16]}… now" in caught.value.message
    assert "put the images back" in caught.value.hint
    assert content(base / "run") == before
    (base / "images.npz").rename(base / "others.npz")
    assert fates(run()) == ["kept"] * 3  # they need not be there
    (base / "images.npz").write_bytes(kept)
    assert fates(run()) == ["kept"] * 3
    (base / "others.npz").replace(base / "images.npz")
    (base / "run/buffer/shard-00000.h5").unlink()
    result = run()
    assert "shard-00000.h5" in result.stages[0].why
    assert "missing" in result.stages[0].why
    assert fates(result)[1] == "the harvest's result changed"
    assert not result.stages[2].kept


@pytest.mark.parametrize("damage", ["shard", "manifest", "cut"])
def test_a_damaged_buffer_is_harvested_again(run: Runner, base: Path, damage: str) -> None:
    run()
    before = content(base / "run/buffer")
    file = base / "run/buffer" / ("manifest.json" if damage == "manifest" else "shard-00001.h5")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    result = run()
    assert file.name in result.stages[0].why
    assert fates(result)[1:] == ["kept", "kept"]  # it became the same again
    assert content(base / "run/buffer") == before


def test_lost_results_are_made_again(run: Runner, base: Path) -> None:
    run()
    before = content(base / "run")
    (base / "run/usae.safetensors").unlink()
    (base / "run/latents.csv").unlink()
    assert fates(run()) == ["kept", "usae.safetensors not there", "latents.csv not there"]
    after = content(base / "run")
    assert all(after[name] == before[name] for name in ("usae.safetensors", "latents.csv", "metrics.json"))


# --- single stages ---


def test_single_stages(run: Runner, base: Path) -> None:
    with pytest.raises(StageError, match="has no finished harvest: stage harvest has not been done") as caught:
        run(stages=("train",))
    assert "`usae-probe harvest`" in caught.value.hint
    assert not (base / "run").exists()
    assert run(stages=("harvest",)).metrics is None
    with pytest.raises(StageError, match="has no finished train"):
        run(stages=("evaluate",))
    assert fates(run(stages=("train",))) == ["done"]
    with pytest.raises(StageError, match=r"the train in '.*' was done with another config: usae\.k: 2 then, 3 now"):
        run(changed(usae={"k": 3}), ("evaluate",))
    assert run(stages=("evaluate",)).metrics is not None
    assert fates(run()) == ["kept"] * 3


# --- failures ---


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (CONFIG | {"models": {"a": {**MODEL, "layers": ["9"]}}}, UnknownLayerError),
        (CONFIG | {"models": {"a": {**MODEL, "name": "nets.py:biuld"}}}, UsageError),
        (CONFIG | {"models": {"a": {**MODEL, "checkpoint": "none.safetensors"}}}, CheckpointError),
        (changed(images={"source": "none.npy"}), ImageError),
        (changed(images={"source": "nets.py"}), ImageError),
        (changed(images={"limit": 1}), ConfigError),
        (changed(probes={"sites": ["a/9"]}, images={"seed": 4}), UsageError),
        (changed(train={"device": "cuda:77"}, images={"seed": 4}), UsageError),
        (changed(probes={"within": "hue"}, images={"seed": 4}), UsageError),
    ],
)
def test_a_config_that_cannot_work_leaves_the_results_of_another_alone(
    run: Runner, base: Path, config: dict[str, Any], kind: type[Exception]
) -> None:
    run()
    before = content(base / "run")
    with pytest.raises(kind):
        run(config)
    assert content(base / "run") == before


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"probes": {"within": "class"}}, r"within names 'class', but nothing is known about the images of .*bare.npz"),
        ({"train": {"pairing": "label"}}, r"pairing = 'label' needs a label for every image"),
    ],
)
def test_labels_that_are_not_there_are_missed_before_the_first_image_is_harvested(
    run: Runner, base: Path, tables: dict[str, Any], message: str, online: bool
) -> None:
    np.savez(base / "bare.npz", images=np.load(base / "images.npz")["images"])
    with pytest.raises(ConfigError, match=message):
        run(changed(images={"source": "bare.npz"}, buffer={"online": online}, **tables))
    assert not (base / "run" / "buffer").exists()


def test_an_interruption_keeps_what_is_finished(run: Runner, base: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert not (base / "run/usae.safetensors").exists()
    result = run()
    assert fates(result) == ["kept", "done", "done"]


def test_an_interrupted_harvest_of_another_config_is_not_taken_for_the_old_one(run: Runner, base: Path) -> None:
    run()
    before = content(base / "run")

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(changed(images={"seed": 1}), progress=interrupt)
    result = run()  # the old config again
    assert not result.stages[0].kept
    after = content(base / "run")
    assert all(after[name] == before[name] for name in before if name.startswith(("buffer/", "usae", "metrics")))


def test_no_bottleneck_is_said(run: Runner) -> None:
    with pytest.warns(UsaeProbeWarning, match=r"k = 6 active latents for rows of d_in = 6 \('b/2'\) is no bottleneck"):
        run(changed(usae={"k": 6}), ("harvest",))


def test_a_damaged_record_is_refused_with_a_way_out(run: Runner, base: Path) -> None:
    run(stages=("harvest",))
    record = json.loads((base / "run/run.json").read_text())
    for text in ("{", "[]", '{"schema": 1}', '{"schema": 1, "stages": 3}'):
        (base / "run/run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run.json' is damaged") as caught:
            run()
        assert "remove it" in caught.value.hint
    (base / "run/run.json").write_text(json.dumps(record | {"schema": 99}))
    with pytest.raises(StageError, match="has schema 99, this version reads 1"):
        run()


def test_latents_that_will_be_too_rare_are_told_before_any_work(run: Runner, base: Path) -> None:
    """18 held-out images x k 2 / 16 latents: each fires in 2.2 of them in the mean."""
    few = changed(probes={"min_fires": 3})
    with pytest.warns(UsaeProbeWarning, match=r"fire in 2\.2 held-out images in the mean \(18 × k = 2 / 16 latents\)"):
        run(few, ("harvest",))
    with pytest.warns(UsaeProbeWarning, match=r"fewer than probes.min_fires = 3 nothing can be told") as said:
        run(few, ("harvest", "train"))  # the harvest is kept: before the training then
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(CONFIG, ("harvest", "train"))
        run(changed(probes={"min_fires": 3}, usae={"sparsity": "l1"}), ("harvest", "train"))
    online = changed(probes={"min_fires": 3}, buffer={"online": True, "shard_images": 10})
    with pytest.warns(UsaeProbeWarning, match=r"fire in 2\.2 held-out images"):
        Run(RunConfig.from_dict(online, base=base), base / "online").run(("harvest", "train"))


def test_images_with_several_rows_let_latents_fire_more_often(run: Runner) -> None:
    """49 places x k 2 / 16 latents: in every image; with 1,600 latents in 18 x 49 x 2 / 1,600 = 1.1 of them."""
    models = {name: {**CONFIG["models"][name], "layers": ["0@patch"]} for name in ("a", "b")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(changed(models=models, probes={"min_fires": 18}), ("harvest",))
    with pytest.warns(UsaeProbeWarning, match=r"1\.1 held-out images in the mean \(18 × 49 rows × k = 2 / 1,600"):
        run(changed(models=models, usae={"n_latents": 1600}), ("train",))


def test_an_unfinished_harvest_of_something_else_is_not_discarded_in_silence(run: Runner, base: Path) -> None:
    def interrupt(now: Progress) -> None:
        if now.done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    kept = ActivationBuffer(base / "run/buffer")
    sealed = sum(kept.n_images(split) for split in ("train", "validation", "holdout"))
    assert 0 < sealed < 60
    with pytest.warns(UsaeProbeWarning, match=rf"run/buffer': its {sealed} images are discarded, and harvested anew"):
        run(changed(images={"limit": 50}), ("harvest",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(
            changed(images={"limit": 40}, probes={"min_fires": 1}), ("harvest",)
        )  # of a finished one the run says why it is redone


def test_missing_weights_are_told_before_networks_are_built(run: Runner, base: Path) -> None:
    (base / "nets.py").write_text("def build(**_): raise AssertionError('built')")
    missing = {**CONFIG["models"]["b"], "checkpoint": "none.safetensors"}
    with pytest.raises(CheckpointError, match=r"none\.safetensors' of model 'b' does not exist \(give the path of"):
        run(changed(models={"b": missing}), ("harvest",))


def test_numbers_that_are_not_finite_are_null_in_the_history(run: Runner, base: Path) -> None:
    """One validation image has no variance: its R² is no number, and JSON has no NaN."""
    run(changed(images={"limit": 12, "validation": 0.01}), ("harvest", "train"))
    for line in (base / "run/history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_config_file_elsewhere_finds_its_neighbours(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'models.a = {adapter = "module", name = "nets.py:build", layers = ["2"], image_size = 16, '
    text += 'mean = [0, 0, 0], std = [1, 1, 1]}\nimages = {source = "images.npz"}\nusae = {k = 2}\n'
    assert tomllib.loads(text)
    (base / "c.toml").write_text(text)
    (base / "elsewhere").mkdir()
    monkeypatch.chdir(base / "elsewhere")
    assert Run(RunConfig.load("../c.toml"), "out").run(("harvest",)).folder == Path("out")
    assert ActivationBuffer("out/buffer").complete


def test_peak_memory_is_of_this_process_alone() -> None:
    """A process that a large one started is not as large: Linux hands ru_maxrss down."""
    ballast = np.ones(60_000_000)  # 480 MB, touched
    code = "from usae_probe.machine import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1e7 < int(done.stdout) < peak_memory() - ballast.nbytes / 2
