"""Sweeps: which combinations there are, what is computed once, kept, redone or gone on with, and what is shown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import usae_probe.pipeline.sweep as sweep_module
import usae_probe.pipeline.training as training_module
import usae_probe.usae.state as state_module
from usae_probe import USAE, ActivationBuffer, Run, RunConfig, Sweep, evaluate, train
from usae_probe.errors import BufferIntegrityError, ConfigError, SiteError, StageError, UsageError
from usae_probe.pipeline import CellResult, SweepProgress, SweepResult, parsed_settings
from usae_probe.pipeline.grid import combinations
from usae_probe.report import sweep_figure as figure_module
from usae_probe.report.sweep import sweep_summary

from .command import Command, command
from .tiny_run import CONFIG, changed, put_tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = changed(images={"validation": 0.3})
"""With 13 validation rows."""
TWO = {"usae.n_latents": [16, 24], "usae.k": [2, 3]}
Sweeper = Callable[..., SweepResult]


@pytest.fixture(scope="module")
def lender(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, networks, and a run whose buffer the sweeps use."""
    base = put_tiny_run(tmp_path_factory.mktemp("lender"))
    Run(RunConfig.from_dict(BASE, base=base), base / "run").run(("harvest",))
    return base


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "figure" not in request.node.name:
        monkeypatch.setattr(sweep_module, "sweep_figure", lambda _, path: path.touch())


@pytest.fixture
def sweep(lender: Path, tmp_path: Path) -> Sweeper:
    def do(
        settings: dict[str, list[Any]] = TWO, config: dict[str, Any] = BASE, folder: str = "sweep", **more: Any
    ) -> SweepResult:
        made = RunConfig.from_dict(config, base=lender)
        return Sweep(made, tmp_path / folder, settings, **{"buffer": lender / "run", **more}).run()

    return do


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A list that fills with (n_latents, k, seed) of every training."""
    done: list[tuple[int, int, int]] = []

    def spy(*args: Any, **more: Any) -> Any:
        done.append((more["usae_config"].n_latents, more["usae_config"].k, more["train_config"].seed))
        return train(*args, **more)

    monkeypatch.setattr(training_module, "train", spy)
    return done


def config(**tables: dict[str, Any]) -> RunConfig:
    return RunConfig.from_dict(BASE | {table: BASE[table] | keys for table, keys in tables.items()}, base=Path.cwd())


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def fates(result: SweepResult) -> list[str]:
    return ["kept" if cell.kept else cell.why or "done" for cell in result.cells]


# --- what is swept ---


def test_values_are_read_as_toml() -> None:
    texts = [
        "usae.k=32, 64",
        "train.lr=1e-3,.5",
        "train.source=random,{'a/2'=1,'b/2'=0.5}",
        'probes.sites=["a/2", "b/2"],["a/0","b/2"]',
        'x.y="a,b",true,false,-1,bare word',
        "usae.k=128",
    ]
    assert parsed_settings(texts) == {
        "usae.k": [32, 64, 128],
        "train.lr": [0.001, ".5"],
        "train.source": ["random", {"a/2": 1, "b/2": 0.5}],
        "probes.sites": [["a/2", "b/2"], ["a/0", "b/2"]],
        "x.y": ["a,b", True, False, -1, "bare word"],
    }
    for wrong, match in (
        ("usae.k", "is not key=value"),
        ("usae.k=", "is not key=value"),
        ("=3", "is not key=value"),
        ("usae.k=1,,2", "has an empty value"),
        ("usae.k=[1,2", "not valid TOML"),
        ("usae.k='a", "not valid TOML"),
    ):
        with pytest.raises(ConfigError, match=match):
            parsed_settings([wrong])


def test_all_combinations_once_each_as_the_config_understands_them() -> None:
    found = combinations(config(), {"usae.k": [2, 3, 2], "train.lr": [0.001, ".001", 1]}, 2)
    assert [(c.settings["usae.k"], c.settings["train.lr"], c.seed) for c in found] == [
        (2, 0.001, 0), (2, 0.001, 1), (2, 1.0, 0), (2, 1.0, 1), (3, 0.001, 0), (3, 0.001, 1), (3, 1.0, 0), (3, 1.0, 1)
    ]  # fmt: skip
    last = found[-1]
    assert (last.config.usae.k, last.config.train.lr, last.config.train.seed) == (3, 1.0, 1)
    assert last.config.usae.n_latents == 16
    assert (last.label, last.folder) == ("k=3 lr=1.0 seed 1", "usae.k=3__train.lr=1.0__seed=1")
    seeds = combinations(config(train={"seed": 5}), {}, 3)
    assert [(c.seed, c.folder) for c in seeds] == [(5, "seed=5"), (6, "seed=6"), (7, "seed=7")]


def test_folders_of_odd_values_are_names_of_their_own() -> None:
    values = [{"a/2": 1.0, "b/2": w} for w in (0.1, 0.2)] + [{f"{'a' * 90}/{i}": 1.0} for i in range(2)]
    folders = [c.folder for c in combinations(config(), {"train.source": values}, 1)]
    assert len(set(folders)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-=") and len(name) < 110 for name in folders)


def test_epochs_stand_for_steps_and_a_recipe_for_its_keys() -> None:
    one, _ = combinations(config(), {"train.epochs": [2, 3]}, 1)
    assert (one.config.train.epochs, one.config.train.steps) == (2.0, None)  # the config says steps = 8
    with pytest.raises(ConfigError, match=r"combination epochs=2 steps=3: .*keep one"):
        combinations(config(), {"train.epochs": [2], "train.steps": [3]}, 1)
    plain, published = combinations(config(), {"train.recipe": ["default", "published"]}, 1)
    assert plain.config.train.align_warmup > published.config.train.align_warmup == 0
    assert plain.config.train.lr > published.config.train.lr


REFUSED: dict[str, tuple[dict[str, list[Any]], int, type[Exception], str, str]] = {
    "unknown": ({"usae.n_latent": [4]}, 1, ConfigError, "unknown config key 'usae.n_latent'", "'usae.n_latents'"),
    "no table": ({"k": [4]}, 1, ConfigError, "unknown config key 'k'", "did you mean 'usae.k'"),
    "cam": ({"cam.steps": [4]}, 1, ConfigError, "unknown config key 'cam.steps'", "train.steps"),
    "images": ({"images.seed": [1]}, 1, UsageError, "share one buffer", "make a config of it"),
    "models": ({"models.a.layers": [["0"]]}, 1, UsageError, "share one buffer", "make a config of it"),
    "buffer": ({"buffer.dtype": ["float32"]}, 1, UsageError, "share one buffer", "make a config of it"),
    "seed": ({"train.seed": [1]}, 1, UsageError, "'train.seed' cannot be set", "--seeds 3"),
    "value": ({"usae.k": [2, "x"]}, 1, ConfigError, "combination k=x: config key 'usae.k': .*integer.* 'x'", "active"),
    "k": (
        {"usae.n_latents": [16, 4], "usae.k": [2, 8]}, 1, ConfigError,
        "combination n_latents=4 k=8: .*k = 8 is more than n_latents = 4", ""
    ),
    "empty": ({"usae.k": []}, 1, UsageError, "no value is given for 'usae.k'", "--set"),
    "no seed": (TWO, 0, UsageError, "0 seeds", ""),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(which: str, tmp_path: Path) -> None:
    settings, seeds, kind, message, hint = REFUSED[which]
    with pytest.raises(kind, match=message) as caught:
        Sweep(config(), tmp_path / "sweep", settings, seeds=seeds)
    assert hint in caught.value.hint  # type: ignore[attr-defined]
    assert not (tmp_path / "sweep").exists()


# --- what is computed ---


def test_a_sweep_measures_every_cell_on_validation_rows(sweep: Sweeper, lender: Path, tmp_path: Path) -> None:
    progress: list[SweepProgress] = []
    news: list[Any] = []
    result = sweep(seeds=2, progress=progress.append, announce=news.append)
    folder, buffer = tmp_path / "sweep", ActivationBuffer(lender / "run/buffer")
    assert {file.name for file in folder.glob("[!.]*")} == {"cells", "sweep.json", "sweep.csv", "sweep.png"}
    assert fates(result) == ["done"] * 8
    assert all(isinstance(item, CellResult) for item in news)
    data = json.loads((folder / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert data == result.to_dict()
    assert (data["split"], data["n_rows"], data["seeds"], data["n_failed"]) == ("validation", 13, [0, 1], 0)
    assert [row["settings"] for row in data["combinations"]] == [
        {"usae.n_latents": n, "usae.k": k} for n in (16, 24) for k in (2, 3)
    ]
    cell = data["cells"][5]  # n_latents 24, k 2, seed 1
    assert (cell["settings"], cell["seed"]) == ({"usae.n_latents": 24, "usae.k": 2}, 1)
    usae = USAE.load(folder / cell["folder"] / "usae.safetensors")
    assert (usae.n_latents, usae.k) == (24, 2)
    report = evaluate(usae, buffer, split="validation", config=RunConfig.from_dict(BASE, base=lender).probes)
    assert cell["r2"] == report.r2
    sites = list(buffer.sites)
    assert cell["self_r2"] == pytest.approx(np.mean([report.r2[site][site] for site in sites]))
    assert cell["cross_r2"] == pytest.approx(np.mean([report.r2[s][t] for s, t in permutations(sites, 2)]))
    assert cell["universal"] == report.counts["universal"]
    assert cell["dead_share"] == report.counts["dead"] / 24
    assert (report.measured_on, report.n_rows_eval) == ("validation", 13)
    assert "13 validation rows" in repr(report)
    fourth = data["combinations"][2]
    both = [data["cells"][4]["self_r2"], data["cells"][5]["self_r2"]]
    assert fourth["self_r2"] == {"mean": pytest.approx(sum(both) / 2), "min": min(both), "max": max(both)}
    assert both[0] != both[1]
    assert {(p.cell, p.at) for p in progress} == {(c["name"], i) for i, c in enumerate(data["cells"], start=1)}
    assert {p.now.stage for p in progress} == {"train", "evaluate"}
    rows = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text())))
    assert [(r["usae.n_latents"], r["usae.k"], r["seed"]) for r in rows[4:6]] == [("24", "2", "0"), ("24", "2", "1")]
    assert float(rows[5]["r2[a/2->b/2]"]) == report.r2["a/2"]["b/2"]
    assert sum(int(rows[5][name]) for name in report.counts) == 24


def test_a_cell_is_the_training_of_its_config(sweep: Sweeper, lender: Path, tmp_path: Path) -> None:
    sweep({"usae.k": [3]})
    made = RunConfig.from_dict(BASE | {"usae": {"n_latents": 16, "k": 3}}, base=lender)
    run = Run(made, tmp_path / "run")
    run.run(("harvest", "train"))
    cell = tmp_path / "sweep/cells/usae.k=3__seed=0"
    assert (cell / "usae.safetensors").read_bytes() == (tmp_path / "run/usae.safetensors").read_bytes()
    assert (cell / "history.jsonl").read_text() == (tmp_path / "run/history.jsonl").read_text()


def test_the_validation_rows_are_not_the_holdout(sweep: Sweeper, trainings: list[Any]) -> None:
    chosen = sweep({"usae.k": [2]})
    held_out = sweep({"usae.k": [2]}, split="holdout")
    assert trainings == [(16, 2, 0)]  # measured again, not trained again
    assert (chosen.to_dict()["n_rows"], held_out.to_dict()["n_rows"]) == (13, 18)
    assert chosen.cells[0].metrics != held_out.cells[0].metrics
    assert fates(sweep({"usae.k": [2]})) == fates(sweep({"usae.k": [2]}, split="holdout")) == ["kept"]


# --- kept, redone, gone on with ---


def test_finished_cells_are_kept_and_only_what_is_new_is_computed(
    sweep: Sweeper, trainings: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    first = sweep({"usae.k": [2, 3]})
    before = content(tmp_path / "sweep/cells")
    again = sweep({"usae.k": [2, 3]})
    assert fates(again) == ["kept"] * 2
    assert content(tmp_path / "sweep/cells") == before
    assert [c.metrics for c in again.cells] == [c.metrics for c in first.cells]
    assert [c.seconds for c in again.cells] == [c.seconds for c in first.cells]
    trainings.clear()
    assert fates(sweep({"usae.k": [2, 3, 4]}, seeds=2)) == ["kept", "done", "kept", "done", "done", "done"]
    assert trainings == [(16, 2, 1), (16, 3, 1), (16, 4, 0), (16, 4, 1)]
    assert len(sweep({"usae.k": [4]}).cells) == 1  # fewer are shown, none is lost
    assert fates(sweep({"usae.k": [2, 3, 4]}, seeds=2)) == ["kept"] * 6


def test_a_changed_base_redoes_what_depends_on_it_and_says_so(
    sweep: Sweeper, trainings: list[tuple[int, int, int]]
) -> None:
    settings = {"usae.k": [2, 3]}
    sweep(settings)
    other = BASE | {"train": BASE["train"] | {"lr": 0.001}}
    assert fates(sweep(settings, other)) == ["train.lr changed"] * 2
    trainings.clear()
    probed = other | {"probes": {"min_fires": 3}}
    assert fates(sweep(settings, probed)) == ["done"] * 2  # measured again
    assert not trainings
    assert fates(sweep(settings, probed)) == ["kept"] * 2


def test_cells_that_differ_in_probes_alone_are_trained_once(
    sweep: Sweeper, trainings: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    result = sweep({"probes.min_fires": [1, 2, 50], "usae.k": [2, 3]})
    assert sorted(trainings) == [(16, 2, 0), (16, 3, 0)]
    rare = [cell["counts"]["rare"] for cell in result.to_dict()["cells"]]
    assert rare[0] <= rare[2] < rare[4]
    assert fates(sweep({"probes.min_fires": [1, 2, 50], "usae.k": [2, 3]})) == ["kept"] * 6
    trainings.clear()
    assert fates(sweep({"usae.k": [2, 4]})) == ["done"] * 2  # a folder of another name, the same training
    assert trainings == [(16, 4, 0)]
    kernels = [json.loads((cell.folder / "run.json").read_text())["stages"]["train"]["kernel"] for cell in result.cells]
    assert len(kernels) == 6  # taken over, too
    assert kernels[0] == kernels[2] == kernels[4]
    assert {cell.note for cell in result.cells} == {""}  # a sweep does not say the same of each cell


def test_an_interrupted_cell_goes_on_to_the_same_weights(
    sweep: Sweeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "SECONDS", 0.0)
    whole = sweep({"usae.k": [2, 3]}, folder="whole")

    def stop(now: SweepProgress) -> None:
        if now.at == 2 and now.now.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep({"usae.k": [2, 3]}, progress=stop)
    assert len(json.loads((tmp_path / "sweep/sweep.json").read_text())["cells"]) == 1
    steps: list[tuple[int, int]] = []
    resumed = sweep(
        {"usae.k": [2, 3]},
        progress=lambda p: steps.append((p.at, p.now.done)) if p.now.stage == "train" else None,
    )
    assert fates(resumed) == ["kept", "done"]
    assert steps == [(2, step) for step in range(6, 9)]
    for one, other in zip(resumed.cells, whole.cells, strict=True):
        assert one.metrics == other.metrics
        assert (one.folder / "usae.safetensors").read_bytes() == (other.folder / "usae.safetensors").read_bytes()
    assert not list((tmp_path / "sweep").rglob("training-state*"))


def test_lost_and_damaged_results_are_made_again(sweep: Sweeper, tmp_path: Path) -> None:
    first = sweep({"usae.k": [2]})
    cell = tmp_path / "sweep/cells/usae.k=2__seed=0"
    (cell / "metrics.validation.json").write_text("{")
    assert fates(sweep({"usae.k": [2]})) == ["done"]
    (cell / "usae.safetensors").unlink()
    again = sweep({"usae.k": [2]})
    assert fates(again) == ["usae.safetensors not there"]
    assert again.cells[0].metrics == first.cells[0].metrics


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(sweep: Sweeper, tmp_path: Path) -> None:
    settings: dict[str, list[Any]] = {"train.lr": [1e30, 0.003]}
    result = sweep(settings)
    data = json.loads((tmp_path / "sweep/sweep.json").read_text(), parse_constant=pytest.fail)
    bad, good = data["cells"]
    assert (bad["error"]["type"], bad["self_r2"], data["n_failed"]) == ("NonFiniteError", None, 1)
    assert "not finite at step" in bad["error"]["message"]
    assert good["error"] is None
    assert good["self_r2"] is not None
    assert [row["n_failed"] for row in data["combinations"]] == [1, 0]
    assert data["combinations"][0]["self_r2"] is None
    assert [cell.error is None for cell in sweep(settings).cells] == [False, True]  # tried again
    assert len(result.failed) == 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "sweep/sweep.csv").read_text())))
    assert "not finite" in rows[0]["error"]
    assert (rows[0]["self_r2"], rows[1]["error"]) == ("", "")


# --- the buffer ---


def test_one_harvest_in_the_sweep_folder(lender: Path, tmp_path: Path) -> None:
    made = RunConfig.from_dict(BASE, base=lender)
    settings = {"usae.k": [2, 3]}
    news: list[Any] = []
    first = Sweep(made, tmp_path / "sweep", settings, announce=news.append).run()
    assert first.buffer == tmp_path / "sweep/buffer"
    assert [n if isinstance(n, tuple) else getattr(n, "stage", "cell") for n in news] == [
        ("harvest", ""), "harvest", "cell", "cell"
    ]  # fmt: skip
    assert fates(Sweep(made, tmp_path / "sweep", settings).run()) == ["kept"] * 2
    lent = Sweep(made, tmp_path / "sweep", settings, buffer=lender / "run").run()
    assert fates(lent) == ["kept"] * 2  # the same rows, wherever they lie
    other = RunConfig.from_dict(BASE | {"images": BASE["images"] | {"seed": 1}}, base=lender)
    redone = Sweep(other, tmp_path / "sweep", settings).run()
    assert all("images.seed" in why for why in fates(redone))


def test_a_buffer_that_cannot_serve(sweep: Sweeper, lender: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has no finished harvest") as caught:
        sweep(buffer=tmp_path / "nowhere")
    assert "--buffer" in caught.value.hint
    before = content(lender / "run")
    with pytest.raises(StageError, match=r"done with another config: images\.seed changed"):
        sweep(config=BASE | {"images": BASE["images"] | {"seed": 1}})
    with pytest.raises(SiteError, match="'a/1', which is not trained on"):
        sweep({"probes.sites": [["a/2", "b/2"], ["a/1", "b/2"]]})
    with pytest.raises(ConfigError, match="c/1"):
        sweep({"train.source": [{"c/1": 1.0}]})
    assert content(lender / "run") == before
    assert not (tmp_path / "sweep").exists()
    none = RunConfig.from_dict(changed(images={"validation": 0.0}), base=lender)
    with pytest.raises(BufferIntegrityError, match="has 0 validation rows") as missing:
        Sweep(none, tmp_path / "none", {"usae.k": [2]}).run()
    assert "--holdout" in missing.value.hint
    run = Run(RunConfig.from_dict(changed(images={"validation": 0.0}), base=lender), tmp_path / "none")
    usae = train(run.buffer(), n_latents=16, k=2, steps=1).usae
    with pytest.raises(BufferIntegrityError, match="has 0 validation rows") as asked:
        evaluate(usae, run.buffer(), split="validation")
    assert "images.validation" in asked.value.hint


# --- what is shown ---


def spread(mean: float, by: float = 0.0) -> dict[str, float]:
    return {"mean": float(mean), "min": float(mean - by), "max": float(mean + by)}


def shown(sites: tuple[str, ...] = ("vit/blocks.10", "eff/bn2"), **more: Any) -> dict[str, Any]:
    """A sweep of n_latents × k as `sweep.json` has it, with numbers made up."""
    combos = [(n, k) for n in (512, 2042) for k in (32, 64)]
    rows = [
        {
            "settings": {"usae.n_latents": n, "usae.k": k},
            "self_r2": spread(0.6 + 0.01 * i, 0.02),
            "cross_r2": spread(0.31 - 0.02 * i, 0.01) if len(sites) > 1 else None,
            "universal": spread(100 * i, 10 * i),
            "dead_share": spread(0.01 * i),
            "split_latents": spread(3.0),
            "seconds": spread(90.0 + i, 2),
            "r2": {s: {t: spread(0.1 * (a + 1) + 0.01 * i) for t in sites} for a, s in enumerate(sites)},
            "n_failed": 0,
        }
        for i, (n, k) in enumerate(combos)
    ]
    cells = [{"name": f"n_latents={n} k={k} seed {s}", "error": None} for n, k in combos for s in (0, 1)]
    return {
        "keys": ["usae.n_latents", "usae.k"],
        "seeds": [0, 1],
        "split": "validation",
        "n_rows": 900,
        "sites": list(sites),
        "combinations": rows,
        "cells": cells,
    } | more


def screen(data: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=80, highlight=False).print(sweep_summary(data, {"figure": Path("s/sweep.png")}), crop=False)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_table_of_two_sites_fits_eighty_columns() -> None:
    lines = screen(shown())
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Sweep  4 combinations × 2 seeds, measured on 900 validation rows"
    head = next(i for i, line in enumerate(lines) if line.startswith("n_latents"))
    assert lines[head].split() == [
        "n_latents", "k", "R²", "R²", "→eff", "→vit", "versal", "dead", "split", "seconds"
    ]  # fmt: skip
    assert lines[head + 3].split() == ["512", "64", ".61", ".29", ".11", ".21", "100", "1.0%", "3", "91"]
    assert lines[head + 4].split() == [".59–.63", ".28–.30", "90–110", "89–93"]
    # .61–.65 over the seeds; the others end at .62, .63 and .64
    assert "most self-R²: n_latents = 2042, k = 64 (.63); 3 others within the seeds' range" in lines
    assert "most cross-R²: n_latents = 512, k = 32 (.31)" in lines
    assert "most universal latents: n_latents = 2042, k = 64 (300)" in lines


def test_the_table_with_long_names_has_the_pairs_below() -> None:
    lines = screen(shown(("efficientnet/blocks.10", "dinov2-small/bn2")))
    heads = [line.split() for line in lines if line.startswith("n_latents")]
    assert heads == [
        ["n_latents", "k", "R²", "R²", "versal", "dead", "split", "seconds"],
        ["n_latents", "k", "→dinov2-small", "→efficientnet"],
    ]
    assert max(map(len, lines)) <= 80


def test_the_table_of_one_site_and_of_the_holdout_and_of_failures() -> None:
    data = shown(("vit/blocks.10",), split="holdout", n_rows=1000)
    data["cells"][1]["error"] = {"message": "the loss is not finite at step 3", "type": "NonFiniteError", "hint": ""}
    data["combinations"][0] |= dict.fromkeys(("self_r2", "universal", "dead_share", "seconds"))
    lines = screen(data)
    assert lines[0].endswith("measured on 1,000 held-out rows")
    head = next(line for line in lines if line.startswith("n_latents"))
    assert head.split() == ["n_latents", "k", "R²", "versal", "dead", "seconds"]  # nothing across, nothing split
    assert "1 of 8 cells failed" in lines
    assert "  n_latents=512 k=32 seed 1: the loss is not finite at step 3" in lines
    assert any(line.split() == ["512", "32", "–", "–", "–", "–"] for line in lines)


def drawn(data: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the figure that is saved."""
    kept: list[Any] = []
    monkeypatch.setattr(figure_module, "save", lambda figure, path: kept.append(figure))
    figure_module.sweep_figure(data, path)
    return kept[0]


def test_the_figure_has_a_line_per_second_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(shown(), tmp_path / "s.png", monkeypatch)
    assert [axis.get_title() for axis in figure.axes] == ["Self-R²", "Cross-R²", "Latents that never fire"]
    first = figure.axes[0]
    assert [list(box[0].get_xdata()) for box in first.containers] == [[512, 2042], [512, 2042]]
    means = np.array([box[0].get_ydata() for box in first.containers], dtype=float)
    np.testing.assert_allclose(means, [[0.60, 0.62], [0.61, 0.63]])
    bars = first.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(np.array([bar[:, 1] for bar in bars], dtype=float), [[0.58, 0.62], [0.60, 0.64]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["k = 32", "k = 64"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["512", "2042"]
    assert first.get_xscale() == "linear"  # not a factor of 4


def test_the_figure_is_against_the_first_key_that_varies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shown()
    data["combinations"] = data["combinations"][:2]  # 512 latents, k = 32 and 64
    figure = drawn(data, tmp_path / "s.png", monkeypatch)
    assert [list(box[0].get_xdata()) for box in figure.axes[0].containers] == [[32, 64]]
    assert figure.axes[0].get_xlabel() == "k"


def test_the_figure_of_one_key_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shown(keys=["train.source"])
    data["combinations"] = data["combinations"][:2]
    for row, value in zip(data["combinations"], ("random", "all"), strict=True):
        row["settings"] = {"train.source": value}
    figure = drawn(data, tmp_path / "s.png", monkeypatch)
    axis = figure.axes[1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["random", "all"]
    assert [box[0].get_linestyle() for box in axis.containers] == ["None"]
    assert not figure.legends
    assert axis.get_xlabel() == "source"


def test_a_figure_opens(sweep: Sweeper, tmp_path: Path) -> None:
    sweep({"usae.n_latents": [4, 16]}, seeds=2)
    with Image.open(tmp_path / "sweep/sweep.png") as image:
        assert (image.format, image.size) == ("PNG", (1530, 587))
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


# --- the command ---


@pytest.fixture
def cli(lender: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    lines = [f"[{table}]\n{keys}" for table, keys in _tables(lender)]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    return command(monkeypatch, capsys)


def _tables(lender: Path) -> list[tuple[str, str]]:
    """Return BASE as TOML, its models by an absolute path."""

    def spell(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {spell(item)}" for key, item in value.items()) + "}"
        return json.dumps(value)

    tables: dict[str, dict[str, Any]] = {f"models.{name}": entry for name, entry in BASE["models"].items()}
    tables = {name: entry | {"name": f"{lender}/nets.py:build"} for name, entry in tables.items()}
    tables |= {name: table for name, table in BASE.items() if name != "models"}
    tables["images"] = tables["images"] | {"source": f"{lender}/images.npz"}
    return [(name, "\n".join(f"{key} = {spell(value)}" for key, value in t.items())) for name, t in tables.items()]


def test_the_command(cli: Command, tmp_path: Path) -> None:
    done = cli("sweep", "c.toml", "--set", "usae.n_latents=16,24", "--set", "usae.k=2,3", "--seeds", "2")
    assert done.status == 0, done.err
    assert "harvest: done" in done.err
    assert "n_latents=24 k=3 seed 1: done, training" in done.err
    assert "measured on 13 validation rows" in done.out
    assert (tmp_path / "runs/c-sweep/sweep.json").is_file()
    again = cli("sweep", "c.toml", "--set", "usae.n_latents=16,24", "--set", "usae.k=2,3", "--holdout", "--json")
    assert again.status == 0
    assert (again.document["split"], len(again.document["cells"])) == ("holdout", 4)
    assert again.document["files"]["figure"] == "runs/c-sweep/sweep.png"
    assert "error" not in again.document
    assert "18 held-out rows" in again.err  # the table


def test_the_commands_failures(cli: Command, lender: Path, tmp_path: Path) -> None:
    refused = cli("sweep", "c.toml", "--set", "usae.k=2,32", "--json")
    assert refused.status == 2
    assert "combination k=32" in refused.document["error"]["message"]
    assert not (tmp_path / "runs").exists()
    foreign = cli("sweep", "c.toml", "--set", "usae.k=2", "--buffer", str(lender / "run"))
    assert foreign.status == 1  # models named by another path
    assert "models.a.name" in foreign.err
    failed = cli("sweep", "c.toml", "--set", "train.lr=0.003,1e30", "--out", "s", "--json")
    assert failed.status == 1
    assert failed.document["error"]["type"] == "NonFiniteError"
    assert failed.document["error"]["message"].startswith("1 of 2 cells failed")
    assert failed.document["cells"][0]["self_r2"] is not None
    assert CONFIG["usae"] == {"n_latents": 16, "k": 2}


def test_an_interrupt_says_how_to_go_on(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training_module, "train", stop)
    stopped = cli("sweep", "c.toml", "--set", "usae.k=2", "--out", "s")
    assert stopped.status == 130
    assert "kept in s" in stopped.err
