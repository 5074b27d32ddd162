"""The config: what is refused, with which words, and what a file means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from usae_probe import RunConfig
from usae_probe.config import ProbesConfig, TrainConfig, UsaeConfig, checked, documented_keys
from usae_probe.demo import demo_config
from usae_probe.errors import ConfigError, SiteError

SAMPLE = """
[models.vit]                       # the name of the model in sites
adapter = "timm"
name = "vit_base_patch16_224.augreg_in21k_ft_in1k"
layers = ["blocks.11", "blocks.8@mean"]
pretrained = true
options = { dynamic_img_size = true }
image_size = 224
device = "auto"

[images]
source = "photos/"
limit = 10000
holdout = 0.1
seed = 0
batch_size = 64

[buffer]
dtype = "float16"

[usae]
n_latents = 2042
k = 64

[train]
epochs = 100
batch_size = 1024

[probes]
"""


def minimal(**tables: Any) -> dict[str, Any]:
    """The least that a config needs, with some tables replaced."""
    least: dict[str, Any] = {"models": {"vit": {"name": "test_vit", "layers": ["blocks.1"]}}, "images": {"source": "p"}}
    return least | tables


def refused(data: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(data, base=Path("/base"))
    return caught.value


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_sample_of_the_design(tmp_path: Path) -> None:
    config = RunConfig.load(write(tmp_path / "run.toml", SAMPLE))
    vit = config.models["vit"]
    assert (vit.adapter, vit.pretrained, vit.image_size, vit.options) == ("timm", True, 224, {"dynamic_img_size": True})
    assert [str(site) for site in config.sites_of("vit")] == ["vit/blocks.11", "vit/blocks.8@mean"]
    assert (config.images.limit, config.images.validation, config.buffer.mode) == (10000, 0.1, "store")
    assert (config.usae.n_latents, config.usae.k, config.usae.sparsity) == (2042, 64, "topk")
    assert config.train.n_steps(10) == 1000
    assert config.probes == ProbesConfig()
    assert config.base == tmp_path


def test_defaults_are_those_of_the_measures() -> None:
    probes = RunConfig.from_dict(minimal(), base=Path.cwd()).probes
    assert (probes.tau, probes.min_fires, probes.min_rate_ratio) == (0.0, 10, 0.1)
    assert (probes.entropy, probes.phi, probes.q, probes.split_cosine) == (0.9, 0.2, 0.01, 0.9)


# --- unknown keys ---


@pytest.mark.parametrize(
    ("data", "key", "meant"),
    [
        (minimal(trian={}), "trian", "train"),
        (minimal(images={"source": "p", "hold_out": 0.2}), "images.hold_out", "holdout"),
        (minimal(buffer={"dtyp": "float32"}), "buffer.dtyp", "dtype"),
        (minimal(usae={"n_latent": 8}), "usae.n_latent", "n_latents"),
        (minimal(train={"epoch": 3}), "train.epoch", "epochs"),
        (minimal(probes={"min_fire": 3}), "probes.min_fire", "min_fires"),
        (
            minimal(models={"vit": {"name": "a", "layers": ["b"], "pretrain": False}}),
            "models.vit.pretrain",
            "pretrained",
        ),
    ],
)
def test_an_unknown_key_at_any_level_names_the_nearest(data: dict[str, Any], key: str, meant: str) -> None:
    error = refused(data)
    assert error.message == f"unknown config key '{key}'"
    assert error.hint.startswith("did you mean '")
    assert f"'{meant}'" in error.hint
    assert "known keys: " in error.hint


def test_options_are_the_adapters_business() -> None:
    data = minimal(models={"vit": {"name": "a", "layers": ["b"], "options": {"anything": [1, {"deep": True}]}}})
    config = RunConfig.from_dict(data, base=Path.cwd())
    assert config.models["vit"].options == {"anything": [1, {"deep": True}]}


# --- values ---


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (minimal(train={"epochs": 3, "steps": 9}), ["'train'", "both epochs = 3", "steps = 9", "keep one"]),
        (minimal(usae={"n_latents": 32, "k": 33}), ["'usae'", "k = 33 is more than n_latents = 32"]),
        (minimal(images={"source": "p", "holdout": 1.0}), ["'images.holdout'", "less than 1", "given 1.0"]),
        (minimal(images={"source": "p", "validation": -0.1}), ["'images.validation'", "given -0.1"]),
        (minimal(images={"source": "p", "limit": 0}), ["'images.limit'", "given 0"]),
        (minimal(images={}), ["'images.source' is missing"]),
        ({"images": {"source": "p"}}, ["'models' is missing"]),
        ({"models": {}, "images": {"source": "p"}}, ["'models'", "at least 1"]),
        (minimal(models={"vit": {"name": "a", "layers": []}}), ["'models.vit.layers'", "at least 1"]),
        (minimal(models={"vit": {"layers": ["b"]}}), ["'models.vit.name' is missing"]),
        (minimal(buffer={"mode": "rings"}), ["'buffer.mode'", "'store' or 'ring'", "given 'rings'"]),
        (minimal(buffer={"dtype": "float64"}), ["'buffer.dtype'", "'float16' or 'float32'", "given 'float64'"]),
        (minimal(usae={"sparsity": "relu"}), ["'usae.sparsity'", "'topk'", "given 'relu'"]),
        (minimal(usae={"k": 0}), ["'usae.k'", "given 0"]),
        (minimal(train={"lr": 0}), ["'train.lr'", "greater than 0", "given 0"]),
        (minimal(train={"lr": float("nan")}), ["'train.lr'", "given nan"]),
        (minimal(train={"source": "first"}), ["'train.source'", "'random' or 'all'", "given 'first'"]),
        (minimal(train={"steps": "many"}), ["'train.steps'", "given 'many'"]),
        (minimal(train={"device": "gpu"}), ["'train.device'", "given 'gpu'"]),
        (minimal(probes={"q": 1.5}), ["'probes.q'", "given 1.5"]),
        (minimal(images="photos"), ["'images'", "given 'photos'"]),
    ],
)
def test_values_out_of_range_name_key_value_and_expectation(data: dict[str, Any], parts: list[str]) -> None:
    message = refused(data).message
    assert message.startswith("config key '")
    for part in parts:
        assert part in message


def test_the_hint_describes_the_key() -> None:
    assert refused(minimal(train={"lr": 0})).hint == "peak learning rate of Adam"
    assert "share of images kept for evaluation" in refused(minimal(images={"source": "p", "holdout": 2})).hint
    assert "shared dictionary" not in refused(minimal(usae={"k": 0})).hint


def test_model_names_and_sites_are_checked_at_the_door() -> None:
    with pytest.raises(SiteError, match="model name 'my vit'"):
        RunConfig.from_dict(minimal(models={"my vit": {"name": "a", "layers": ["b"]}}), base=Path.cwd())
    with pytest.raises(SiteError, match="unknown token policy '@cl'"):
        RunConfig.from_dict(minimal(models={"vit": {"name": "a", "layers": ["b@cl"]}}), base=Path.cwd())
    config = RunConfig.from_dict(
        minimal(models={"vit": {"name": "a", "layers": ["b@patch", "c@all"]}}), base=Path.cwd()
    )
    assert [site.policy for site in config.sites_of("vit")] == ["patch", "all"]


def test_steps_and_epochs() -> None:
    assert TrainConfig(steps=7).n_steps(1000) == 7
    assert TrainConfig(epochs=0.5).n_steps(9) == 4
    assert TrainConfig(epochs=0.001).n_steps(9) == 1
    assert TrainConfig().n_steps(2) == 200  # 100 epochs
    assert checked(UsaeConfig, {"n_latents": 64, "k": 64}).k == 64  # allowed: at most all of them


# --- files ---


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config '.*none.toml'") as caught:
        RunConfig.load(tmp_path / "none.toml")
    assert caught.value.hint == "give the path of a TOML file"
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read config"):
        RunConfig.load(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 2"):
        RunConfig.load(write(tmp_path / "broken.toml", "[images]\nsource = \n"))


def test_paths_are_relative_to_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep/run.toml", '[models.m]\nname = "a"\nlayers = ["b"]\n[images]\nsource = "../photos"\n')
    monkeypatch.chdir(tmp_path)
    config = RunConfig.load("deep/run.toml")
    assert config.base == tmp_path / "deep"
    assert config.image_path == str(tmp_path / "photos")
    monkeypatch.setenv("HOME", "/home/somebody")

    def path_of(source: str) -> str:
        return RunConfig.from_dict(minimal(images={"source": source}), base=tmp_path).image_path

    assert path_of("/data/x.npz") == "/data/x.npz"
    assert path_of("~/x") == "/home/somebody/x"
    assert path_of("torchvision:CIFAR10") == "torchvision:CIFAR10"


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS", "/data/photos")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)

    def source(text: str) -> str:
        return RunConfig.from_dict(minimal(images={"source": text}), base=Path.cwd()).images.source

    assert source("${PHOTOS}") == "/data/photos"
    assert source("${PHOTOS}/${NOWHERE:-cats}") == "/data/photos/cats"
    assert source("${EMPTY:-dogs}") == "dogs"
    assert source("${NOWHERE:-}x") == "x"
    assert source("$PHOTOS") == "$PHOTOS"
    with pytest.raises(ConfigError, match=r"\$\{NOWHERE\}, which is not set") as caught:
        source("${NOWHERE}")
    assert caught.value.hint == "export NOWHERE=…, or write ${NOWHERE:-default}"
    data = minimal(models={"m": {"name": "a", "layers": ["${NOWHERE:-b}"], "options": {"x": ["${PHOTOS}"]}}})
    model = RunConfig.from_dict(data, base=Path.cwd()).models["m"]
    assert (model.layers, model.options) == (["b"], {"x": ["/data/photos"]})


def test_configs_are_frozen() -> None:
    config = RunConfig.from_dict(minimal(), base=Path.cwd())
    with pytest.raises(ValueError, match="frozen"):
        config.usae.k = 3  # type: ignore[misc]


def test_every_key_is_documented() -> None:
    keys = list(documented_keys())
    tables = {"models.NAME", "images", "buffer", "usae", "train", "probes", "cam", "scan", "report", "sweep"}
    tables.add("published")
    assert {table for table, *_ in keys} == tables
    assert all(description for *_, description in keys)
    assert ("usae", "k", "64") in {key[:3] for key in keys}
    assert ("images", "source", "required") in {key[:3] for key in keys}


def test_the_demos_config_is_valid(tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    assert list(config.models) == ["resnet", "vit"]
    assert [model.checkpoint for model in config.models.values()] == ["resnet.safetensors", "vit.safetensors"]
    assert config.image_path == str(tmp_path / "images.npz")


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder, a config was expected .*the path of a TOML file"):
        RunConfig.load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="report, cam and export take the run folder"):
        RunConfig.load(tmp_path)
