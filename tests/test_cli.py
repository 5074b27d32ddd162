"""The command line: exit statuses, what is printed where, and going on after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file

import usae_probe
import usae_probe.demo
from usae_probe import ActivationBuffer, Run, RunConfig
from usae_probe.cli.common import guard
from usae_probe.pipeline import Stage
from usae_probe.report.r2_table import short
from usae_probe.usae.interrupts import held_interrupts

from .command import Command, command

FACTORY = """
import os, time, torch
from torch import nn

class Slow(nn.Identity):
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return x

def build(width=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), Slow(), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten())
"""
CONFIG = """
[models.a]
adapter = "module"
name = "nets.py:build"
layers = ["3"]
image_size = 16
mean = [0, 0, 0]
std = [1, 1, 1]
[models.b]
adapter = "module"
name = "nets.py:build"
layers = ["0"]
options = { seed = 1 }
image_size = 16
mean = [0, 0, 0]
std = [1, 1, 1]
[images]
source = "images.npy"
holdout = 0.3
batch_size = 4
[buffer]
shard_images = 8
[usae]
n_latents = 16
k = 2
[train]
steps = 4
batch_size = 16
[probes]
min_fires = 2
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Call `main()` in a folder with a config that works."""
    (tmp_path / "nets.py").write_text(FACTORY)
    (tmp_path / "c.toml").write_text(CONFIG)
    np.save(tmp_path / "images.npy", usae_probe.demo.draw_images(60, size=32).images)
    monkeypatch.chdir(tmp_path)

    return command(monkeypatch, capsys)


def changed(old: str, new: str) -> None:
    text = Path("c.toml").read_text()
    assert old in text
    Path("c.toml").write_text(text.replace(old, new))


# --- what works ---


def test_a_run_on_the_terminal_then_kept(cli: Command, tmp_path: Path) -> None:
    first = cli("run", "c.toml")
    assert first.status == 0
    folder = tmp_path / "runs/c"
    assert (folder / "metrics.json").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    spelled = short(metrics["r2"]["a/3"]["b/0"])
    assert spelled in first.out
    (said,) = [line for line in first.err.splitlines() if line.startswith("train: done in")]
    assert "; kernel " in said
    assert "auto: float32 on" in said
    assert "runs/c/report.html" in first.out
    assert "also in runs/c: metrics.json, latents.csv," in first.out
    for line in ("harvest …", "train …", "evaluate …", "train: done in"):
        assert line in first.err
        assert line not in first.out
    again = cli("run", "c.toml", "--out", str(folder))
    assert again.status == 0
    assert again.err.count("kept, already done") == 4
    assert spelled in again.out
    changed("steps = 4", "steps = 5")
    assert "train: redone, train.steps changed" in cli("run", "c.toml").err


def test_stages_one_by_one_with_json(cli: Command) -> None:
    early = cli("evaluate", "c.toml", "--json")
    assert (early.status, json.loads(early.out)["error"]["type"]) == (1, "StageError")
    for stage in ("harvest", "train", "evaluate"):
        result = cli(stage, "c.toml", "--out", "r", "--json")
        document = json.loads(result.out, parse_constant=pytest.fail)
        assert result.status == 0
        assert document["run_dir"] == "r"
        assert document["stages"][stage]["kept"] is False
        assert (document["metrics"] is None) == (stage != "evaluate")
    assert document["metrics"]["schema"] == 1
    assert document["files"]["measures"] == "r/metrics.json"
    assert "R²" in result.err  # the table is not lost
    again = json.loads(cli("train", "c.toml", "--out", "r", "--json").out)
    assert set(again["files"]) == {"USAE", "activations", "record"}  # the measures may be of another config


def test_a_warning_is_one_line_once(cli: Command) -> None:
    changed("k = 2", "k = 6")
    result = cli("harvest", "c.toml")
    assert result.status == 0
    assert result.err.count("warning: k = 6 active latents for rows of d_in = 6 ('a/3') is no bottleneck") == 1


def test_adapters(cli: Command) -> None:
    listed = json.loads(cli("adapters", "--json").out)["adapters"]
    assert {row["name"]: row["state"] for row in listed}.items() >= {"timm": "ok", "module": "ok"}.items()
    assert set(listed[0]) == {"name", "target", "distribution", "version", "origin", "state"}
    table = cli("adapters")
    assert table.status == 0
    assert "usae-probe" in table.out


def test_the_demo_in_small(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real = usae_probe.demo.demo_config

    def small(folder: Path) -> RunConfig:
        data = json.loads(real(folder).model_dump_json(exclude_defaults=True, exclude_unset=True))
        data["train"]["steps"] = 4
        data["cam"] = {"latents": "0,1", "steps": 2}
        return RunConfig.from_dict(data, base=folder.resolve())

    monkeypatch.setattr(usae_probe.demo, "N_IMAGES", 64)
    monkeypatch.setattr(usae_probe.demo, "demo_config", small)
    result = cli("demo", "--out", "d", "--json")
    document = json.loads(result.out)
    assert result.status == 0, result.out
    assert document["metrics"]["sites"] == ["resnet/layer3", "resnet/layer4", "vit/blocks.3", "vit/blocks.5"]
    assert document["metrics"]["factors"]["names"] == list(usae_probe.demo.FACTOR_NAMES)
    counted = {mode: found["pictures"] for mode, found in document["cam"]["modes_counted"].items()}
    assert (document["cam"]["latents"], counted) == ([0, 1], {"independent": 4, "joint": 2})
    assert document["files"]["pictures"] == "d/cam/sheet.png"
    assert all(Path(path).exists() for path in document["files"].values())
    assert ActivationBuffer("d/buffer").source["n_images"] == 64
    for part in ("resnet10t", "64 images", "d/report.html", "cam/sheet.png", "d/demo.toml"):
        assert part in result.err
    assert cli("demo", "--out", "d").err.count("kept, already done") == 5
    Path("d").rename("moved")  # all that a run needs is in its folder
    assert cli("demo", "--out", "moved").err.count("kept, already done") == 5
    assert json.loads(cli("cam", "moved", "--latents", "1", "--steps", "2", "--json").out)["cam"]["latents"] == [1]


def test_cam_of_a_run_folder(cli: Command) -> None:
    assert cli("run", "c.toml", "--out", "r").status == 0
    result = cli("cam", "r", "--latents", "3, 0", "--steps", "2", "--mode", "contrast, independent", "--max-batch", "1")
    assert result.status == 0, result.err
    assert "cam: done in" in result.err
    assert "r/cam/sheet.png" in result.out
    assert {file.name for file in Path("r/cam").iterdir()} == {
        "cam.json", "sheet.png", *(f"latent-0000{n}.{kind}" for n in (0, 3) for kind in ("json", "npz", "png"))
    }  # fmt: skip
    again = json.loads(cli("cam", "r", "--json").out)  # the latents asked for last
    assert again["stages"]["cam"]["kept"] is True
    assert again["cam"]["latents"] == [3, 0]
    pictures = [picture for card in again["cam"]["cards"] for picture in card["pictures"]]
    expected = [(n, mode, [site]) for n in (3, 0) for mode in ("contrast", "independent") for site in ("a/3", "b/0")]
    assert [(picture["latent"], picture["mode"], picture["sites"]) for picture in pictures] == expected
    assert all("curves" not in picture for picture in pictures)  # those are in the files
    assert cli("run", "c.toml", "--out", "r").err.count("kept") == 4


# --- what fails ---


@pytest.mark.parametrize("words", ["run c.toml --out --json", "sweep c.toml --out --holdout", "export r --to --force"])
def test_an_option_is_no_folder(cli: Command, words: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = cli(*words.split())
    said = result.out + result.err
    assert result.status == 2
    assert "is an option, a path was expected" in said
    assert sorted(tmp_path.iterdir()) == before


def misfit() -> None:
    save_file({"0.weight": torch.zeros(2, 2)}, "w.safetensors")
    changed('layers = ["3"]', 'layers = ["3"]\ncheckpoint = "w.safetensors"')


def evaluated(stages: tuple[Stage, ...] = ("harvest", "train", "evaluate")) -> None:
    Run(RunConfig.load("c.toml"), "r").run(stages)


FAILURES: dict[str, tuple[list[str], Callable[[], Any], int, str, str]] = {
    "unknown command": (["runn", "c.toml"], lambda: None, 2, "UsageError", "runn"),
    "no argument": (["run"], lambda: None, 2, "UsageError", "CONFIG.toml"),
    "unknown option": (["run", "c.toml", "--fast"], lambda: None, 2, "UsageError", "--fast"),
    "missing config": (["run", "none.toml"], lambda: None, 2, "ConfigError", "cannot read config 'none.toml'"),
    "no TOML": (["run", "nets.py"], lambda: None, 2, "ConfigError", "not valid TOML"),
    "unknown key": (
        ["run", "c.toml"], lambda: changed("[usae]", "[usaee]"), 2, "ConfigError", "unknown config key 'usaee'",
    ),
    "unknown adapter": (
        ["run", "c.toml"], lambda: changed('"module"', '"modul"'), 2, "UnknownAdapterError", "no adapter 'modul'",
    ),
    "unknown layer": (
        ["run", "c.toml"], lambda: changed('["3"]', '["33"]'), 2, "UnknownLayerError", "model 'a' has no layer '33'",
    ),
    "bad site": (["run", "c.toml"], lambda: changed('["3"]', '["3@x"]'), 2, "SiteError", "token policy '@x'"),
    "rows that do not pair up": (
        ["run", "c.toml"], lambda: changed('["3"]', '["3@patch"]'), 2, "SiteError", "rows per image, not a/3@patch: 25",
    ),
    "k over n_latents": (["run", "c.toml"], lambda: changed("k = 2", "k = 17"), 2, "ConfigError", "k = 17 is more"),
    "no such device": (
        ["train", "c.toml"], lambda: changed("[train]", '[train]\ndevice = "gpu"'), 2, "ConfigError", "'train.device'",
    ),
    "option of layers": (["layers", "timm:test_resnet", "--option", "x"], lambda: None, 2, "UsageError", "'x' is not"),
    "unknown model": (["layers", "timm:resnet81"], lambda: None, 2, "UsageError", "timm has no model 'resnet81'"),
    "no images": (["run", "c.toml"], lambda: Path("images.npy").unlink(), 1, "ImageError", "does not exist"),
    "misfit": (["run", "c.toml"], misfit, 1, "CheckpointError", "0.weight is [2, 2] in the checkpoint"),
    "stage": (["train", "c.toml"], lambda: None, 1, "StageError", "has no finished harvest"),
    "no run folder": (["cam", "c.toml"], lambda: None, 2, "UsageError", "'c.toml' is no run folder"),
    "mistyped latents": (["cam", "r", "--latents", "best"], evaluated, 2, "ConfigError", "latents"),
    "no such latent": (["cam", "r", "--latents", "3,99"], evaluated, 2, "UsageError", "there is no latent 99"),
    "mistyped mode": (["cam", "r", "--latents", "3", "--mode", "jiont"], evaluated, 2, "ConfigError", "'joint'"),
    "too many restarts": (
        ["cam", "r", "--latents", "3", "--restarts", "9", "--max-batch", "4"],
        evaluated, 2, "ConfigError", "restarts = 9 do not fit in max_batch = 4",
    ),
    "cam before its time": (
        ["cam", "r", "--latents", "3"], lambda: evaluated(("harvest",)), 1, "StageError", "has no finished train",
    ),
    "file in the demo's way": (["demo", "--out", "c.toml"], lambda: None, 2, "UsageError", "a file is in the way"),
    "file in the way": (["run", "c.toml", "--out", "nets.py"], lambda: None, 2, "UsageError", "a file is in the way"),
}  # fmt: skip


@pytest.mark.parametrize("which", FAILURES)
def test_failures_have_their_exit_status_and_one_clear_message(cli: Command, which: str) -> None:
    arguments, spoil, status, kind, part = FAILURES[which]
    spoil()
    plain = cli(*arguments)
    assert (plain.status, plain.out) == (status, "")
    assert part in plain.err
    assert "Traceback" not in plain.err
    as_json = cli(*arguments, "--json")
    assert as_json.status == status
    error = json.loads(as_json.out)["error"]
    assert set(error) == {"type", "message", "hint"}
    assert error["type"] == kind
    assert part in error["message"]
    if kind != "UsageError":  # those of the parser are click's own
        assert error["hint"] != "see --help"


def test_a_bug_is_called_one(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("of zero")

    monkeypatch.setattr(RunConfig, "load", broken)
    result = cli("run", "c.toml", "--json")
    assert result.status == 1
    assert json.loads(result.out)["error"]["type"] == "ZeroDivisionError"
    assert "--debug" in result.out
    monkeypatch.setenv("USAE_PROBE_DEBUG", "")  # put back behind the test
    with pytest.raises(ZeroDivisionError):
        cli("run", "c.toml", "--debug")
    with pytest.raises(ZeroDivisionError):
        cli("--debug", "run", "c.toml")


def test_the_version(cli: Command) -> None:
    assert cli("--version") == (0, f"usae-probe {usae_probe.__version__}\n", "")


def test_device_and_dtype_come_before_the_configs(cli: Command) -> None:
    for option, value, said in (
        ("--device", "gpu", "'device'"),
        ("--dtype", "fp16", "'float32', 'float16' or 'bfloat16'"),
    ):
        result = cli("harvest", "c.toml", option, value)
        assert (result.status, said in result.err) == (2, True), result.err
    config = RunConfig.load("c.toml").on("cpu", "bfloat16")
    assert {(model.device, model.dtype) for model in config.models.values()} == {("cpu", "bfloat16")}
    assert (config.train.device, config.base) == ("cpu", RunConfig.load("c.toml").base)
    assert cli("harvest", "c.toml", "--device", "cpu", "--dtype", "bfloat16", "--out", "half").status == 0
    record = json.loads(Path("half/run.json").read_text())
    assert {model["dtype"] for model in record["config"]["models"].values()} == {"bfloat16"}
    # What is only about where it runs does not make a finished stage another one; the dtype does.
    assert "kept" in cli("harvest", "c.toml", "--device", "auto", "--dtype", "bfloat16", "--out", "half").err
    assert "models.a.dtype" in cli("harvest", "c.toml", "--out", "half").err


def test_no_argument_shows_the_help(cli: Command) -> None:
    result = cli()
    assert "Commands" in result.out + result.err
    assert result.status == 2
    assert cli("--help").status == 0


def end_of_a_step() -> None:
    with held_interrupts() as interrupted:
        signal.raise_signal(signal.SIGTERM)
        assert interrupted()  # and nothing is raised before the block is left


@pytest.mark.parametrize("torchrun", [False, True])
def test_sigterm_is_heard_as_ctrl_c(torchrun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a training it ends a step with; not in one of several processes, which torchrun ends at once."""
    before = signal.getsignal(signal.SIGTERM)
    if torchrun:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        with guard(as_json=True, joins=True):
            assert signal.getsignal(signal.SIGTERM) is before
        return
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(typer.Exit) as left, guard(as_json=True, folder="r"):
            end_of_a_step()
        assert left.value.exit_code == 143
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert signal.getsignal(signal.SIGTERM) is before


# --- in a process of its own ---


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | more


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "usae_probe", "--help"], env=environment(), capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 10  # well under a second when nothing else runs
    for name in ("run", "harvest", "train", "evaluate", "layers", "adapters", "demo", "cam", "buffer"):
        assert name in result.stdout
    code = (
        "import sys, usae_probe, usae_probe.cli\n"
        "sys.argv = ['usae-probe', 'run', '--help']\n"
        "try: usae_probe.cli.main()\n"
        "except SystemExit as left: assert left.code == 0\n"
        "heavy = {'torch', 'nnsight', 'timm', 'matplotlib', 'h5py', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    checked = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(cli: Command, tmp_path: Path, end: signal.Signals) -> None:
    whole = cli("harvest", "c.toml", "--out", "whole")
    assert whole.status == 0
    command = [sys.executable, "-m", "usae_probe", "run", "c.toml", "--out", "r", "--json"]
    process = subprocess.Popen(
        command,
        env=environment(SLOW="0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell that started the tests in the background has them, and all their children, ignore SIGINT: as it would
        # a batch job, which hears SIGTERM all the same.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL if end == signal.SIGINT else signal.SIG_IGN),
    )
    deadline = time.monotonic() + 120
    while not Path("r/buffer/shard-00002.h5").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(end)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + end, err
    error = json.loads(out)["error"]
    assert error["type"] == {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}[end]
    assert error["hint"].startswith("kept in r: finished stages")
    assert "give the same command again" in error["hint"]
    assert "Traceback" not in err
    assert len(list(Path("r/buffer").glob("shard-*.h5"))) < 8
    sealed = {f"shard-0000{i}.h5": Path(f"r/buffer/shard-0000{i}.h5").stat().st_mtime_ns for i in (0, 1)}
    again = cli("run", "c.toml", "--out", "r")
    assert again.status == 0
    for name, written in sealed.items():
        assert Path("r/buffer", name).stat().st_mtime_ns == written
    for file in Path("whole/buffer").iterdir():
        assert Path("r/buffer", file.name).read_bytes() == file.read_bytes()
