"""The guides in examples/ run as they are (on small settings), and show what they say they show."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from usae_probe import ActivationBuffer, RunConfig
from usae_probe.demo import draw_images, save_drawings
from usae_probe.images import open_source
from usae_probe.pipeline.grid import combinations
from usae_probe.pipeline.models import attach_all
from usae_probe.report.r2_table import short
from usae_probe.world import one_thread

from .command import command

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ELSEWHERE = {
    "quickstart": "test_notebook",
    "train_demo_models": "test_demo",
    "plugin_adapter": "test_plugin_adapter",
    "cifar10_real": "test_examples",
    "cifar10_live_module": "test_examples",
    "cifar10_ring": "test_examples",
}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with one_thread():
        yield


def guide(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = guide("own_two_models").main(tmp_path, limit=600, steps=80)
    assert (tmp_path / "run/report.html").is_file()
    metrics = run.run().metrics  # kept
    assert metrics is not None
    said = capsys.readouterr().out
    assert f"universal latents: {metrics['counts']['universal']} of 64" in said
    assert f"R² {metrics['r2']['resnet/layer4']['vit/blocks.5']:.2f}" in said


def test_live_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = guide("live_module").main(tmp_path, limit=400, steps=30)
    assert report.sites == ("mine/edges", "mine/colours", "resnet/layer3", "resnet/layer4")
    assert "('edges.0', (24, 32, 32))" in capsys.readouterr().out


def test_transformer_lens_hooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = guide("transformer_lens_hooks").main(tmp_path, limit=300, steps=30)
    assert report.sites[2] == "tl/blocks.1.attn.hook_z:0"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tl/")]
    assert [line.split()[2] for line in lines] == ["48", "48", "12", "48"]


def test_own_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = guide("own_activations").main(tmp_path, n_images=1200)
    # 16 concepts are shared, each model has 8 more: most of what they share is found, none of it by chance.
    assert report.counts["universal"] >= 12
    assert report.r2["clip/visual.11"]["dino/blocks.11"] > 0.4
    assert report.nulls[0].universal < 1
    assert (tmp_path / "export/clip__visual.11/cfg.json").is_file()
    assert "decoded (10, 56)" in capsys.readouterr().out


def test_online_ring(tmp_path: Path) -> None:
    report, most = guide("online_ring").main(tmp_path, limit=1200, capacity="4MB")
    buffer = ActivationBuffer(tmp_path / "ring")
    whole = sum(shard.size for shard in buffer.shards)
    assert most <= 4_000_000 < whole
    assert any(shard.dropped for shard in buffer.shards)
    assert report.n_rows_eval == 60 * 16


def test_several_processes(tmp_path: Path) -> None:
    """As torchrun starts it, and alone: the same measures."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    script = [str(EXAMPLES / "several_gpus.py")]
    said = []
    for number, start in enumerate(([], ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        command = [sys.executable, *start, *script, str(tmp_path / str(number))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0].startswith("1 process(es)")
    assert said[1].splitlines()[-1].startswith("2 process(es)")  # torch 2.8 tells of its peers before
    r2 = [float(text.split("R² ")[1].split(",")[0]) for text in said]
    assert r2[0] == pytest.approx(r2[1], abs=0.02)
    assert r2[0] > 0.3


# --- reading the statistics: in each planted case the naive number is wrong, and the one beside it is not ---


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    return guide("reading_the_statistics")


def test_entropy_does_not_notice_exchanged_images(planted: ModuleType, tmp_path: Path) -> None:
    found = planted.on_other_images(tmp_path)
    assert found["entropy alone, images exchanged"] >= 32
    assert found["universal (rates and co-firing), images exchanged"] == 0
    assert found["universal, images as they are"] == pytest.approx(32, abs=5)


def test_r2_does_not_notice_split_latents(planted: ModuleType, tmp_path: Path) -> None:
    found = planted.split_latents(tmp_path)
    assert found["R² resnet → vit, one latent for both"] == pytest.approx(found["R² resnet → vit, two latents"])
    assert (found["universal, one latent for both"], found["universal, two latents"]) == (32, 0)
    assert (found["marked as split, one latent for both"], found["marked as split, two latents"]) == (0, 64)


def test_one_nuisance_makes_a_high_r2(planted: ModuleType, tmp_path: Path) -> None:
    found = planted.one_loud_direction(tmp_path)
    assert found["R² resnet → vit"] > 0.7
    assert found["R² resnet → vit, with brightness taken out"] < 0.05
    assert found["universal latents, with brightness taken out"] == 0


def test_r2_about_a_scalar_mean_is_won_by_the_means(planted: ModuleType, tmp_path: Path) -> None:
    found = planted.a_common_mean(tmp_path)
    assert found["R² about one scalar mean, resnet → vit"] > 0.8
    assert found["R² about the mean of each dimension"] < 0.05
    assert found["universal latents"] == 0


def test_only_the_class_is_shared(planted: ModuleType, tmp_path: Path) -> None:
    found = planted.only_the_class(tmp_path)
    assert found["universal, images exchanged"] < 1
    assert found["universal latents"] >= 6
    within = found["universal, images exchanged within their class"]
    assert within == pytest.approx(found["universal latents"], abs=2)  # so images of a class share no more than that


def test_patch_pairing(tmp_path: Path) -> None:
    guide("patch_pairing").main(tmp_path / "pairing.png")
    with Image.open(tmp_path / "pairing.png") as image:
        assert image.size[0] > 800


# --- configs ---


@pytest.mark.shared
@pytest.mark.parametrize("name", ["cifar10_real", "cifar10_live_module", "cifar10_ring"])
def test_configs_of_real_runs_name_what_is_there(name: str, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USAE_PROBE_SHARED", str(shared))
    config = RunConfig.load(EXAMPLES / f"{name}.toml")
    assert len(open_source(config.image_path)) == 10_000
    with ExitStack() as closing:
        assert all(model.sites for model in attach_all(config, closing))


def test_the_published_experiment_runs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file as it is, with both networks (random weights, from files) and drawings; two of its sixteen trainings."""
    cli, config = command(monkeypatch, capsys), str(EXAMPLES / "resnet18_vitb16_cifar10.toml")
    for variable, name in (("RESNET18", "resnet18"), ("VIT_B16", "vit_base_patch16_224")):
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.half() for k, v in timm.create_model(name, pretrained=False).state_dict().items()}, path)
        monkeypatch.setenv(variable, str(path))
    save_drawings(tmp_path / "images.npz", draw_images(40, size=32))
    monkeypatch.setenv("CIFAR10", str(tmp_path / "images.npz"))
    assert len(combinations(RunConfig.load(config), RunConfig.load(config).sweep.settings, 1)) == 16
    assert cli("harvest", config, "--out", str(tmp_path / "run")).status == 0
    one = ["--set", "usae.n_latents=2042", "--set", "usae.k=64", "--set", "train.epochs=100"]
    both = ["--set", "train.recipe=published,default", "--holdout", "--buffer", str(tmp_path / "run")]
    result = cli("sweep", config, *one, *both, "--out", str(tmp_path / "sweep"), "--json")
    assert not [cell["error"] for cell in result.document["cells"] if cell["error"]]
    assert result.status == 0
    cells = result.document["cells"]
    assert [cell["settings"]["train.recipe"] for cell in cells] == ["published", "default"]
    for cell in cells:
        (published,) = cell["published"]
        assert published["r2"]["resnet/layer4"]["vit/blocks.11"] == 0.36
        assert f"recipe = {cell['settings']['train.recipe']}: Published: 2,042 latents, k = 64" in result.err
        ours = cell["r2_global_mean"]["vit/blocks.11"]["resnet/layer4"]
        assert re.search(rf"vit/blocks.11 → resnet/layer4 +\.417 +{re.escape(short(ours))} ", result.err)


def test_the_published_experiment_without_network_says_what_to_download_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli, config = command(monkeypatch, capsys), str(EXAMPLES / "resnet18_vitb16_cifar10.toml")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nobody's CIFAR-10 in its cache
    result = cli("run", config, "--out", str(tmp_path / "run"))  # images are opened before networks are built
    assert (result.status, "cifar-10-python.tar.gz" in result.err) == (1, True)
    save_drawings(tmp_path / "images.npz", draw_images(40, size=32))
    monkeypatch.setenv("CIFAR10", str(tmp_path / "images.npz"))
    result = cli("run", config, "--out", str(tmp_path / "run"))
    assert (result.status, "hf download timm/resnet18.a1_in1k" in result.err) == (1, True)


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    names = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".toml", ".ipynb") or path.is_dir()}
    for name in names - {"__pycache__"}:
        where = Path(__file__).with_name(f"{ELSEWHERE[name]}.py").read_text("utf-8") if name in ELSEWHERE else text
        assert name in where, name
