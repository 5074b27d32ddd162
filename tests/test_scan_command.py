"""`usae-probe scan` and `up.scan`: what is chosen, kept, gone on with and shown."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import usae_probe.pipeline.budget as budget_module
import usae_probe.pipeline.scan as scan_module
import usae_probe.pipeline.training as training_module
import usae_probe.probes.scan.live as live_module
import usae_probe.probes.scan.measure as measure_module
from usae_probe import HookedModel, RunConfig, ScanReport, attach, scan, train
from usae_probe.config import ScanConfig
from usae_probe.config.scan import budget_seconds
from usae_probe.errors import ConfigError, NotBuiltError, UsaeProbeWarning, UsageError
from usae_probe.images import open_source
from usae_probe.pipeline import Run, Scan, ScanResult
from usae_probe.pipeline.models import attach_all
from usae_probe.probes.scan import choose_sites
from usae_probe.report.scan import scan_summary
from usae_probe.report.scan_figures import scan_figures

from .command import Command, command
from .tiny_run import CONFIG, MODEL, changed, put_tiny_run, toml

pytestmark = pytest.mark.usefixtures("one_thread")

TABLES = changed(
    images={"validation": 0.4},
    train={"validate_every": 0},
    probes={"nulls": 2, "bootstrap": 20, "min_fires": 1, "phi": 0.0, "q": 0.9},
) | {
    "models": {
        "a": {**MODEL, "layers": ["0", "2"]},
        "b": {**MODEL, "layers": ["0", "2"], "options": {"width": 6, "seed": 1}},
    },
    "scan": {"depth": 0},
}
"""Of 42 training images 17 are measured. The thresholds let latents pass that such a scan is far too small to find."""


def tables(**more: dict[str, Any]) -> dict[str, Any]:
    return TABLES | {table: {**TABLES[table], **keys} for table, keys in more.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_tiny_run(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "figure" not in request.node.name:
        monkeypatch.setattr(scan_module, "scan_figures", lambda _, folder: [folder / "none.png"])


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command(monkeypatch, capsys)


@pytest.fixture
def do(base: Path, tmp_path: Path) -> Callable[..., ScanResult]:
    def run(config: dict[str, Any] = TABLES, **told: Any) -> ScanResult:
        return Scan(RunConfig.from_dict(config, base=base), tmp_path / "scan", **told).run()

    return run


@pytest.fixture
def config_file(base: Path) -> Callable[..., str]:
    def write(config: dict[str, Any] = TABLES) -> str:
        (base / "tiny.toml").write_text(toml(config))
        return str(base / "tiny.toml")

    return write


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A list that fills with the sites of every training: none given are all."""
    done: list[tuple[str, ...]] = []

    def spy(*args: Any, **more: Any) -> Any:
        done.append(tuple(more.get("sites") or ()))
        return train(*args, **more)

    for module in (training_module, measure_module, live_module):
        monkeypatch.setattr(module, "train", spy)
    return done


def cells(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "scan.csv").read_text().splitlines()))


# --- the folder ---


def test_files_and_what_is_in_them(do: Callable[..., ScanResult]) -> None:
    done = do()
    folder, report = done.folder, done.report
    assert report.sites == ("a/0", "a/2", "b/0", "b/2")
    assert report.measured_on == "validation"
    assert report.n_rows == 17
    assert report.trained["steps"] == {"joint": 16}  # 8 as for two sites
    data = json.loads((folder / "scan.json").read_text())
    assert data == json.loads(report.to_json())
    assert len(cells(folder)) == 8
    assert (folder / "usae.safetensors").exists()
    assert data["depths"]["a/0"] < data["depths"]["a/2"]


def test_a_finished_scan_is_kept(do: Callable[..., ScanResult], trainings: list[tuple[str, ...]]) -> None:
    first, told = do(), []
    assert len(trainings) == 1
    again = do(announce=told.append)
    assert len(trainings) == 1
    assert [stage.kept for stage in told if not isinstance(stage, tuple)] == [True, True]
    drop = {"seconds"}
    one, other = (json.loads(scan.report.to_json()) for scan in (first, again))
    assert {k: v for k, v in one.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}


def test_an_interrupted_scan_goes_on(
    do: Callable[..., ScanResult], trainings: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tables(scan={"strategies": ["joint", "pairs"]})
    spy = measure_module.train

    def stops(*args: Any, **more: Any) -> Any:
        if len(trainings) == 3:
            raise KeyboardInterrupt
        return spy(*args, **more)

    monkeypatch.setattr(measure_module, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        do(both)
    assert trainings == [(), ("a/0", "b/0"), ("a/0", "b/2")]
    monkeypatch.setattr(measure_module, "train", spy)
    report = do(both).report
    assert trainings[3:] == [("a/2", "b/0"), ("a/2", "b/2")]
    assert report.pairs is not None
    assert "r2: joint and pairs" in report.agreement


def test_other_layers_are_harvested_anew(do: Callable[..., ScanResult]) -> None:
    told: list[Any] = []
    do()
    done = do(tables(scan={"layers": ["a/2", "b/0", "b/2"]}), announce=told.append)
    assert done.report.sites == ("a/2", "b/0", "b/2")
    assert ("harvest", "models.a.layers changed") in told


def test_pairs_alone_need_no_joint_training(do: Callable[..., ScanResult], trainings: list[tuple[str, ...]]) -> None:
    report = do(tables(scan={"strategies": ["pairs"]})).report
    assert len(trainings) == 4
    assert report.joint is None
    assert report.followed == ()
    assert report.codes is report.pairs


def test_a_floor_of_untrained_networks(do: Callable[..., ScanResult]) -> None:
    done = do(tables(scan={"floor": True}))
    floor = done.report.floor
    assert floor is not None
    assert floor.sites == done.report.sites
    row = cells(done.folder)[0]
    assert float(row["floor_r2"]) == pytest.approx(floor.joint.r2[row["source"]][row["target"]], rel=1e-5)  # type: ignore[union-attr]
    weights = [
        json.loads((folder / "buffer/manifest.json").read_text()) for folder in (done.folder, done.folder / "untrained")
    ]
    hashes = [{s: spec["weights_hash"] for s, spec in m["identity"]["sites"].items()} for m in weights]
    assert all(hashes[0][site] != hashes[1][site] for site in hashes[0])


def test_a_ring_is_scanned(do: Callable[..., ScanResult]) -> None:
    ring = {"shard_images": 2, "mode": "ring", "capacity": "120kB", "memory": "1kB", "warmup_rows": 9, "reuse": 2}
    config = tables(images={"holdout": 0.02, "validation": 0.1}, buffer=ring, train={"steps": None, "batch_size": 6})
    with pytest.warns(UsaeProbeWarning, match="the linear reference is left out: a ring has dropped"):
        done = do(config)
    assert done.report.linear is None
    assert done.report.joint is not None
    assert np.isfinite(done.report.joint.r2["a/0"]["b/0"])


def test_a_run_is_not_replaced(base: Path, tmp_path: Path) -> None:
    config = RunConfig.from_dict(TABLES, base=base)
    Run(config, tmp_path).run(("harvest",))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="is the folder of a run, whose results a scan would replace"):
        Scan(config, tmp_path).run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_pairs_of_a_ring_are_refused(base: Path, tmp_path: Path) -> None:
    config = tables(buffer={"mode": "ring", "capacity": "1MB"}, scan={"strategies": ["joint", "pairs"]})
    with pytest.raises(ConfigError, match=r"buffer\.mode = 'ring' drops"):
        Scan(RunConfig.from_dict(config, base=base), tmp_path)


# --- the budget ---


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5 h", 5400)])
def test_times(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "", "10 minutes", "-5m", "0m"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="a time is spelled"):
        budget_seconds(text)


def test_a_budget_says_what_it_chose_and_keeps_to_it(do: Callable[..., ScanResult]) -> None:
    told: list[Any] = []
    rich = tables(scan={"budget": "5m"})
    done = do(rich, announce=told.append)
    said = next(line for line in told if isinstance(line, str))
    assert said.startswith(
        "budget 5m: 2 of 2 layers of a, 2 of 2 layers of b, 60 images, 8 steps as for two layers; about"
    )
    assert (done.plan.limit, done.plan.steps) == (60, 8)
    told.clear()
    do(rich, announce=told.append)
    assert said in told
    assert all(stage.kept for stage in told if not isinstance(stage, str | tuple))


def test_a_short_budget_chooses_less(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "_image_seconds", lambda *_: 0.1)
    monkeypatch.setattr(budget_module, "_multiplications_per_second", lambda: 1e12)
    monkeypatch.setattr(budget_module, "step_seconds", lambda _, __, widths, steps: 0.01 * len(widths))
    monkeypatch.setattr(budget_module, "_LEAST_IMAGES", 20)

    def chosen(budget: str, **more: Any) -> budget_module.Chosen:
        config = RunConfig.from_dict(tables(scan={"budget": budget, **more}, train={"steps": 5000}), base=base)
        with ExitStack() as closing:
            models = attach_all(config, closing)
            sites = choose_sites(models, ScanConfig(layers=["a/*", "b/*"]))
            return budget_module.fit_budget(config, models, open_source(config.image_path), sites)

    much, some, little = chosen("2h"), chosen("60s"), chosen("12s")
    assert (much.images, much.steps) == (60, 5000)
    assert some.images == 60
    assert 50 <= some.steps < 5000
    assert 20 <= little.images < 60
    for given, budget in ((some, 60), (little, 12)):
        assert given.harvest + given.training + given.measures <= 0.8 * budget
    floor, both = chosen("60s", floor=True), chosen("10m", strategies=["joint", "pairs"])
    assert floor.harvest + floor.training + floor.measures <= 0.4 * 60
    assert 50 <= both.steps < chosen("10m").steps  # 36 trainings of two layers besides
    assert 4 <= sum(map(len, little.sites.values())) < sum(map(len, some.sites.values())) == 12


def test_a_budget_without_room(config_file: Callable[..., str], call: Command, tmp_path: Path) -> None:
    outcome = call("scan", config_file(), "--budget", "0.01s", "--out", str(tmp_path / "x"))
    assert outcome.status == 2
    assert "a budget of 0.01s is too short: two layers of each model" in outcome.err
    assert not (tmp_path / "x" / "buffer").exists()


# --- the command ---


def test_the_command_prints_one_document(config_file: Callable[..., str], call: Command, tmp_path: Path) -> None:
    outcome = call("scan", config_file(), "--out", str(tmp_path / "x"), "--json")
    assert outcome.status == 0
    data = outcome.document
    assert {"joint", "similarity", "linear", "best_matches", "profile", "plan", "files", "scan_dir"} <= set(data)
    assert data["plan"]["layers"] == {"a": ["0", "2"], "b": ["0", "2"]}
    assert "Universality over depth" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "4"], "no blocks are found in model 'a'"),
        (["--layers", "c/*"], "there is no model 'c'"),
        (["--layers", "a/*"], "names no layer of model 'b'"),
        (["--layers", "a/zz", "--layers", "b/0"], "has no layer 'zz'"),
        (["--strategy", "single"], "config key 'strategies.0'"),
        (["--policy", "max"], "config key 'policy'"),
        (["--budget", "10"], "a time is spelled 90s, 10m or 1h30m"),
        (["--depth", "-1"], "greater than or equal to 0"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    config_file: Callable[..., str], call: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = call("scan", config_file(), *arguments, "--out", str(tmp_path / "x"))
    assert outcome.status == 2
    assert message in outcome.err.replace("\n", " ")
    assert not (tmp_path / "x" / "buffer").exists()


def test_what_is_asked_for_comes_before_the_file(
    config_file: Callable[..., str], call: Command, tmp_path: Path
) -> None:
    config = config_file(tables(scan={"layers": ["a/0", "b/0"], "depth": 3}))
    outcome = call("scan", config, "--depth", "0", "--strategy", "both", "--out", str(tmp_path / "x"), "--json")
    assert outcome.status == 0
    assert outcome.document["sites"] == ["a/0", "a/2", "b/0", "b/2"]
    assert outcome.document["pairs"] is not None


# --- what is shown ---


def shown(data: dict[str, Any], width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(scan_summary(data, {"measures": Path("runs/x/scan.json")}, {"a": 9, "b": 2}), crop=False)
    return console.export_text().splitlines()


def test_the_screen_is_80_columns_wide_and_says_what_was_found(do: Callable[..., ScanResult]) -> None:
    both = tables(scan={"strategies": ["joint", "pairs"], "floor": True})
    lines = shown(json.loads(do(both).report.to_json()))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("Scan  a (2 of 9 layers) × b (2 layers)")
    for part in ("R², a → b", "debiased CKA", "universal latents", "closest, to b", "a ← b", "b ← a", "ridge"):
        assert part in text
    assert "One USAE over all layers and one for each pair" in text
    assert "Floor" in text


def test_many_layers_stand_one_map_below_the_other() -> None:
    sites = {"left": [f"left/blocks.{i}" for i in range(16)], "right": [f"right/blocks.{i}" for i in range(16)]}
    everything = [site for of_model in sites.values() for site in of_model]
    matrix = {a: dict.fromkeys(everything, 0.5) for a in everything}
    alike = {"k": 10, "nulls": 20, **dict.fromkeys(("cka", "cka_null", "mutual_knn", "mutual_knn_null"), matrix)}
    data: dict[str, Any] = {
        "models": sites, "sites": everything, "similarity": alike, "joint": None, "pairs": None, "linear": None,
        "best_matches": [], "profile": [], "order": {}, "agreement": {}, "followed": [], "floor": None,
        "depths": dict.fromkeys(everything, 1.0), "measured_on": "holdout", "n_rows": 10, "n_rows_train": 90,
        "trained": {"steps": {}, "n_latents": 1, "k": 1},
    }  # fmt: skip
    lines = shown(data)
    assert max(map(len, lines)) <= 80
    assert sum(line.strip() == "debiased CKA" for line in lines) == 1


def test_figures_are_drawn_and_old_ones_go(do: Callable[..., ScanResult], tmp_path: Path) -> None:
    report = do(tables(scan={"strategies": ["joint", "pairs"]})).report
    folder = tmp_path / "figures"
    folder.mkdir()
    for suffix in (".png", ".svg"):
        (folder / f"scan-old-old{suffix}").touch()
    (folder / "r2.png").touch()
    paths = scan_figures(report, folder)
    assert [path.name for path in paths][:2] == ["scan-a-b.png", "scan-profile.png"]
    assert {path.name for path in folder.iterdir()} == {
        path.with_suffix(suffix).name for path in paths for suffix in (".png", ".svg")
    } | {"r2.png"}
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


# --- live models ---


@pytest.fixture
def models(base: Path) -> Any:
    spec = importlib.util.spec_from_file_location("tiny_nets", base / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    sys.modules["tiny_nets"] = nets
    spec.loader.exec_module(nets)
    plain: dict[str, Any] = {"image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "layers": ["4"]}
    with ExitStack() as closing:
        yield [
            closing.enter_context(attach(nets.build(width, seed), name=name, **plain))
            for name, width, seed in (("a", 8, 0), ("b", 6, 1))
        ]


def live(models: list[HookedModel], base: Path, **more: Any) -> ScanReport:
    settings: dict[str, Any] = {"layers": ["a/0", "a/2", "b/0", "b/2"], **CONFIG["usae"]}
    return scan(models, base / "images.npz", steps=4, nulls=1, validation=0.4, **(settings | more))


def test_live_models_keep_their_sites_and_nothing_is_left(models: list[HookedModel], base: Path) -> None:
    before = set(base.iterdir())
    report = live(models, base)
    assert report.sites == ("a/0", "a/2", "b/0", "b/2")
    assert [str(site) for model in models for site in model.sites] == ["a/4", "b/4"]
    assert set(base.iterdir()) == before
    assert "a (2 layers) × b (2 layers)" in repr(report)


def test_live_models_go_on_in_a_folder(
    models: list[HookedModel], base: Path, tmp_path: Path, trainings: list[tuple[str, ...]]
) -> None:
    told: list[str] = []
    first = live(models, base, out=tmp_path, progress=lambda now: told.append(now.part))
    assert {"harvest", "train", "similarity", "linear", "codes"} == set(told)
    again = live(models, base, out=tmp_path)
    assert len(trainings) == 1
    assert again.joint == first.joint
    live(models, base, out=tmp_path, k=3)
    assert len(trainings) == 2


def test_live_models_their_own_layers(models: list[HookedModel], base: Path) -> None:
    assert live(models, base, layers=None, depth=0, strategies=["pairs"]).sites == ("a/4", "b/4")


def test_what_live_models_cannot_have(models: list[HookedModel], base: Path) -> None:
    with pytest.raises(NotBuiltError, match="has no floor"):
        live(models, base, floor=True)
    with pytest.raises(NotBuiltError, match="has no budget"):
        live(models, base, budget="1m")
    with pytest.raises(ConfigError, match="'seed' is a setting of several tables"):
        live(models, base, seed=1)
    with pytest.raises(ConfigError, match=r"unknown setting 'dept'.*did you mean 'depth'"):
        live(models, base, dept=3)
