"""Adapters: models by name, from a file, or live; weights that fit or do not; plug-ins that are broken."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import usae_probe.adapter as adapter_module
from usae_probe import HookedModel, Preprocessing, attach
from usae_probe.adapter import LoadedModel, ModelSpec, installed_adapters, load_adapter
from usae_probe.config import RunConfig
from usae_probe.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    UnknownAdapterError,
    UsaeProbeWarning,
    UsageError,
)
from usae_probe.pipeline.models import attach_all

UNIT: dict[str, Any] = {"image_size": 8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
FACTORY = """
import torch
from torch import nn
from beside import CHANNELS

def build(channels=CHANNELS, fail=False):
    if fail:
        raise RuntimeError("no such weights")
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def number():
    return 7

constant = 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A factory in a file that imports its neighbour."""
    name = f"beside_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("CHANNELS = 4\n")
    path = tmp_path / "my_models.py"
    path.write_text(FACTORY.replace("beside", name))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return path


def weights(model: HookedModel) -> dict[str, Tensor]:
    return model.module.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# --- entry points ---


def test_the_adapters_of_this_distribution_are_found_as_a_third_partys_would_be() -> None:
    found = installed_adapters()
    assert {"timm", "module"} <= set(found)
    assert found["timm"].target == "usae_adapters.timm_models:TimmAdapter"
    assert (found["timm"].distribution, found["timm"].version) == ("usae-probe", "0.1.0")
    for name in found:
        assert callable(load_adapter(name).load)


def test_unknown_adapters_name_the_nearest() -> None:
    with pytest.raises(UnknownAdapterError, match="no adapter 'tim' is installed") as caught:
        attach("tim:resnet18")
    assert caught.value.hint.startswith("did you mean 'timm'?")
    assert "installed: module, timm" in caught.value.hint
    with pytest.raises(UsageError, match="'resnet18' names no model"):
        attach("resnet18")
    with pytest.raises(UsageError, match="'timm:' names no model"):
        attach("timm:")


class Raises:
    """An adapter that fails on every live model."""

    def load(self, spec: ModelSpec) -> LoadedModel:
        raise NotImplementedError

    def adopt(self, module: nn.Module) -> LoadedModel | None:
        raise ZeroDivisionError("adopt")


def test_broken_plug_ins_are_named_and_break_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter_module.entry_points

    def with_broken(group: str) -> list[EntryPoint]:
        missing = EntryPoint("broken", "no_such_package_of_mine:Adapter", group)
        no_attribute = EntryPoint("half", "usae_probe.errors:Adapter", group)
        return [missing, no_attribute, *real(group=group)]

    monkeypatch.setattr(adapter_module, "entry_points", with_broken)
    assert {"broken", "half", "timm", "module"} <= set(installed_adapters())
    with pytest.raises(AdapterError, match=r"adapter 'broken' \(no_such_package_of_mine:Adapter, .*cannot be imported"):
        attach("broken:x")
    with pytest.raises(AdapterError, match=r"adapter 'half' .* cannot be imported.*Adapter"):
        load_adapter("half")
    assert attach("timm:test_resnet", pretrained=False, image_size=32).name == "test_resnet"
    assert attach(timm.create_model("test_resnet"), image_size=32).name == "resnet"


def test_an_adapter_that_fails_on_a_live_model_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter_module.entry_points
    monkeypatch.setitem(sys.modules, "a_plug_in_of_a_test", SimpleNamespace(Raises=Raises))
    plug_in = EntryPoint("a-raiser", "a_plug_in_of_a_test:Raises", adapter_module.GROUP)
    monkeypatch.setattr(adapter_module, "entry_points", lambda group: [plug_in, *real(group=group)])
    with pytest.warns(UsaeProbeWarning, match=r"adapter 'a-raiser' failed on ResNet.*ZeroDivisionError"):
        hooked = attach(timm.create_model("test_resnet"), image_size=32)
    assert hooked.preprocess.mean == tuple(hooked.module.pretrained_cfg["mean"])  # timm's adapter was asked after it


def test_two_adapters_of_one_name_are_refused_by_that_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter_module.entry_points
    monkeypatch.setitem(sys.modules, "a_plug_in_of_a_test", SimpleNamespace(Raises=Raises, NoAdapter=dict))
    rival = EntryPoint("timm", "a_plug_in_of_a_test:NoAdapter", adapter_module.GROUP)
    monkeypatch.setattr(adapter_module, "entry_points", lambda group: [*real(group=group), rival])
    assert [entry.target for entry in installed_adapters()["timm"].rivals] == [rival.value]
    with pytest.raises(UnknownAdapterError, match=r"adapter 'timm' is offered by usae-probe .* and \? \?") as caught:
        attach("timm:test_resnet", pretrained=False)
    assert caught.value.hint == "uninstall all but one of them"
    with pytest.raises(AdapterError, match=r"NoAdapter, .*has no methods load\(spec\) and adopt\(module\)"):
        installed_adapters()["timm"].rivals[0].load()
    hooked = attach(timm.create_model("test_resnet"), image_size=32)  # live models still find their adapter
    assert hooked.preprocess.mean == tuple(hooked.module.pretrained_cfg["mean"])


def test_no_package_called_adapters_is_in_the_way_of_adapterhubs() -> None:
    root = Path(adapter_module.__file__).parents[1]
    assert not (root / "adapters" / "__init__.py").exists()
    found = importlib.util.find_spec("usae_adapters")
    assert found is not None
    assert Path(str(found.origin)).parent == root / "adapters" / "usae_adapters"


# --- timm ---


def test_the_picture_size_is_that_which_a_model_was_built_for() -> None:
    """timm's own config stays that of the weights: 518 for a DINOv2 that was built for 28 pixels."""
    small = {"img_size": 28, "depth": 1, "embed_dim": 32, "num_heads": 2}
    hooked = attach("timm:vit_small_patch14_reg4_dinov2", pretrained=False, options=small)
    assert hooked.preprocess.image_size == (28, 28)
    live = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1))
    assert attach(live).preprocess.image_size == (64, 64)


def test_untrained_timm_models_are_reproducible_and_leave_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = attach("timm:test_resnet", pretrained=False, image_size=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = attach("test_resnet", adapter="timm", name="other", pretrained=False, image_size=32)
    assert same(weights(first), weights(second))
    assert first.weights_hash == second.weights_hash
    assert (first.name, second.name) == ("test_resnet", "other")
    assert not any(part.training for part in first.module.modules())


def test_untrained_models_of_another_seed_are_others(factory: Path) -> None:
    def loaded(model: str, **settings: Any) -> dict[str, Tensor]:
        return weights(attach(model, pretrained=False, base=factory.parent, **(UNIT | settings)))

    for model, size in (("timm:test_resnet", 32), ("module:my_models.py:build", 8)):
        first, again, other = (loaded(model, seed=seed, image_size=size) for seed in (1, 1, 2))
        assert same(first, again)
        drawn = [name for name, value in first.items() if value.unique().numel() > 1]
        assert drawn
        assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert same(loaded("timm:test_resnet", image_size=32), loaded("timm:test_resnet", seed=0, image_size=32))


def test_the_seed_of_a_config_reaches_the_weights() -> None:
    model = {"name": "test_resnet", "pretrained": False, "layers": ["layer4"], "image_size": 32}
    tables = {"models": {"a": model, "b": model | {"seed": 1}}, "images": {"source": "photos"}}
    config = RunConfig.from_dict(tables, base=Path())
    with ExitStack() as closing:
        a, b = attach_all(config, closing)
        assert same(weights(a), weights(attach("timm:test_resnet", pretrained=False, image_size=32)))
        assert same(weights(b), weights(attach("timm:test_resnet", pretrained=False, image_size=32, seed=1)))
        assert a.weights_hash != b.weights_hash
    with pytest.raises(ConfigError, match="seed"):
        RunConfig.from_dict(tables | {"models": {"a": model | {"seed": -1}}}, base=Path())


def test_drawing_weights_leaves_other_devices_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"every GPU was seeded with {seed}"))
    before = torch.get_rng_state()
    attach("timm:test_resnet", pretrained=False, image_size=32, seed=1).close()
    assert torch.get_rng_state().equal(before)


def test_a_live_module_has_its_weights() -> None:
    with pytest.raises(UsageError, match="options and seed are for models given by name") as caught:
        attach(nn.Linear(2, 2), seed=1)
    assert "draw them, before attaching" in caught.value.hint


def test_timm_preprocessing_is_the_models_own_where_nothing_is_given() -> None:
    own = attach("timm:test_resnet", pretrained=False).preprocess
    config = timm.create_model("test_resnet").pretrained_cfg
    assert own.image_size == tuple(config["input_size"][1:])
    assert own.mean == tuple(config["mean"])
    assert (own.interpolation, own.crop_pct) == (config["interpolation"], config["crop_pct"])
    given = attach("timm:test_resnet", pretrained=False, image_size=(48, 32), crop_pct=1.0).preprocess
    assert given == Preprocessing((48, 32), own.mean, own.std, own.interpolation, 1.0)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped"])
def test_a_checkpoint_round_trip(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    state = timm.create_model("test_resnet").state_dict()
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if kind == "safetensors":
        save_file(half, tmp_path / "w.safetensors")
    elif kind == "pth":
        torch.save(half, tmp_path / "w.pth")
    else:  # as a training script with nn.DataParallel leaves it
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in half.items()}}, tmp_path / "w.pth")
    file = "w.safetensors" if kind == "safetensors" else "w.pth"
    loaded = attach("timm:test_resnet", checkpoint=file, base=tmp_path, image_size=32)
    expected = {key: value.to(state[key].dtype) for key, value in half.items()}
    assert same(weights(loaded), expected)
    assert weights(loaded)["fc.weight"].dtype == torch.float32


def test_a_checkpoint_that_does_not_fit_shows_both_sides(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    del state["conv1.0.weight"]
    state["extra"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        attach("timm:test_resnet", checkpoint=tmp_path / "w.safetensors")
    message = caught.value.message
    assert "does not fit model 'test_resnet'" in message
    assert "fc.weight is [7, 96] in the checkpoint, [1000, 96] in the model" in message
    assert "1 missing in the checkpoint: conv1.0.weight" in message
    assert "1 not in the model: extra" in message
    assert "num_classes" in caught.value.hint


def test_files_that_hold_no_weights_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            attach("timm:test_resnet", checkpoint=tmp_path / name)
        assert "\n" not in caught.value.message
        return caught.value.message

    torch.save(Bomb(tmp_path / "ran"), tmp_path / "code.pth")
    assert "it holds more than weights (Unsupported" in refusal("code.pth")
    assert not (tmp_path / "ran").exists()
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    assert "holds a Tensor, expected tensors by name" in refusal("tensor.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "empty.pth")
    assert "holds no tensors" in refusal("empty.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    assert "cannot be read" in refusal("cut.safetensors")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    assert "cannot be read" in refusal("cut.pth")
    assert "does not exist" in refusal("none.pth")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_unknown_timm_models_and_options() -> None:
    with pytest.raises(UsageError, match="timm has no model 'resnet81'") as caught:
        attach("timm:resnet81.a1_in1k", pretrained=False)
    assert "did you mean 'resnet18'" in caught.value.hint
    with pytest.raises(UsageError, match=r"timm model 'test_resnet' does not take options .*img_sise"):
        attach("timm:test_resnet", pretrained=False, options={"img_sise": 32})
    for pretrained in (False, True):
        with pytest.raises(UsageError, match=r"timm cannot build 'resnet18.none' .*Invalid pretrained tag"):
            attach("timm:resnet18.none", pretrained=pretrained)
    with pytest.raises(UsageError, match=r"cannot take an input of shape \[1, 3, 48, 48\].*") as caught:
        attach("timm:vit_tiny_patch16_224", pretrained=False, options={"depth": 1}, image_size=48)
    assert "img_size" in caught.value.hint


def test_pretrained_weights_without_network_fail_fast_with_a_way_out() -> None:
    start = time.monotonic()
    with pytest.raises(AdapterError, match=r"could not load the pretrained weights of 'resnet18\.a1_in1k'") as caught:
        attach("timm:resnet18.a1_in1k")
    assert time.monotonic() - start < 10
    for way in ("hf download timm/resnet18.a1_in1k", "HF_HOME", "checkpoint", "pretrained = false"):
        assert way in caught.value.hint


def test_weights_that_were_downloaded_are_found_in_hf_home(tmp_path: Path) -> None:
    """The layout that `hf download` leaves in HF_HOME, in a process of its own: the library reads it when imported."""
    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    weights["fc.bias"] += 3
    repository = tmp_path / "hub/models--timm--test_resnet.r160_in1k"
    (repository / "snapshots/0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    save_file(weights, repository / "snapshots/0123/model.safetensors")
    script = (
        "import usae_probe as up\n"
        "with up.attach('timm:test_resnet', layers=['fc']) as hooked:\n"
        "    print(hooked.module.fc.bias.mean().item())\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(float(weights["fc.bias"].mean()))


def test_devices_and_dtypes() -> None:
    with pytest.raises(UsageError, match="device 'gpu' cannot be used"):
        attach("timm:test_resnet", pretrained=False, device="gpu")
    hooked = attach("timm:test_resnet", pretrained=False, image_size=32, dtype="bfloat16", layers=["layer4"])
    assert hooked.rows(torch.zeros(1, 3, 32, 32))["test_resnet/layer4"].dtype == torch.bfloat16


# --- module ---


def test_a_factory_in_a_file(factory: Path, tmp_path: Path) -> None:
    hooked = attach(f"module:{factory}:build", layers=["0"], **UNIT)
    assert (hooked.name, hooked.d_in(hooked.sites[0])) == ("build", 4)
    again = attach("module:my_models.py:build", base=tmp_path, options={"channels": 4}, name="b", **UNIT)
    assert same(weights(hooked), weights(again))  # seeded
    wide = attach("module:my_models.py:build", base=tmp_path, options={"channels": 6}, **UNIT)
    assert weights(wide)["0.weight"].shape[0] == 6
    assert str(tmp_path) not in sys.path


def test_a_factory_with_a_checkpoint(factory: Path, tmp_path: Path) -> None:
    state = {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.zeros(4)}
    save_file(state, tmp_path / "w.safetensors")
    hooked = attach("module:my_models.py:build", base=tmp_path, checkpoint="w.safetensors", **UNIT)
    assert same(weights(hooked), state)
    with pytest.raises(CheckpointError, match=r"0.weight is \[4, 3, 3, 3\] in the checkpoint, \[5, 3, 3, 3\] in"):
        attach("module:my_models.py:build", base=tmp_path, checkpoint="w.safetensors", options={"channels": 5}, **UNIT)


def test_a_factory_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = attach("module:torch.nn:Conv2d", options={"in_channels": 3, "out_channels": 2, "kernel_size": 1}, **UNIT)
    assert hooked.name == "Conv2d"
    package = f"pack_{tmp_path.name.replace('-', '_')}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "nets.py").write_text("from torch import nn\nbuild = lambda: nn.Conv2d(3, 2, 1)\n")
    monkeypatch.chdir(tmp_path)  # a package beside the user's work needs no installation
    assert attach(f"module:{package}.nets:build", **UNIT).name == "build"


@pytest.mark.parametrize(
    ("name", "options", "kind", "parts"),
    [
        ("none.py:build", {}, UsageError, ["none.py' does not exist", "relative to the config file"]),
        ("my_models.py:biuld", {}, UsageError, ["has no factory 'biuld'", "did you mean 'build'"]),
        ("my_models.py:constant", {}, UsageError, ["has no factory 'constant'"]),
        ("my_models.py", {}, UsageError, ["'my_models.py' names no factory", "file.py:factory"]),
        ("my_models.py:number", {}, UsageError, ["returned int, expected a torch.nn.Module"]),
        ("my_models.py:build", {"fail": True}, AdapterError, ["raised RuntimeError: no such weights", "'fail': True"]),
        ("my_models.py:build", {"depth": 3}, AdapterError, ["raised TypeError", "depth"]),
        ("syntax.py:build", {}, AdapterError, ["syntax.py' cannot be imported: SyntaxError"]),
        ("no_such_package.mod:build", {}, UsageError, ["no module 'no_such_package.mod'", "my_file.py:factory"]),
        ("torch.nn:Conv3", {}, UsageError, ["'torch.nn' has no factory 'Conv3'", "Conv3d"]),
    ],
)
def test_factories_that_cannot_be_used(
    factory: Path, tmp_path: Path, name: str, options: dict[str, Any], kind: type[Exception], parts: list[str]
) -> None:
    (tmp_path / "syntax.py").write_text("def build(:\n")
    with pytest.raises(kind) as caught:
        load_adapter("module").load(ModelSpec(name, options=options, base=tmp_path))
    for part in parts:
        assert part in str(caught.value)


# --- live modules ---


def test_a_live_timm_module_is_adopted() -> None:
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    hooked = attach(module, layers=["blocks.0@cls", "blocks.0@mean"], image_size=32)
    assert hooked.module is module
    assert module.training
    assert hooked.name == "visiontransformer"
    layout = next(info.layout for info in hooked.layers() if info.name == "blocks.0")
    assert (layout.prefix, layout.has_cls) == (1, True)
    assert hooked.preprocess.mean == (0.5, 0.5, 0.5)
    assert same(module.state_dict(), before)


def test_a_plain_live_module_needs_its_preprocessing() -> None:
    module = nn.Conv2d(3, 2, 1)
    with pytest.raises(ConfigError, match="model 'conv2d' is not known: image_size, mean, std missing") as caught:
        attach(module)
    assert "transform=" in caught.value.hint
    with pytest.raises(ConfigError, match="not known: std missing"):
        attach(module, image_size=8, mean=(0.0, 0.0, 0.0))
    assert attach(module, **UNIT).preprocess.image_size == (8, 8)


def test_a_transform_of_ones_own() -> None:
    def transform(picture: Any) -> Tensor:
        assert picture.mode == "RGB"
        return torch.full((3, 5, 7), float(picture.size[0]))

    hooked = attach(nn.Conv2d(3, 2, 1), transform=transform)
    batch = hooked.preprocess([torch.zeros(3, 4, 9, dtype=torch.uint8), torch.zeros(3, 6, 2, dtype=torch.uint8)])
    assert batch.shape == (2, 3, 5, 7)
    assert batch[:, 0, 0, 0].tolist() == [9.0, 2.0]
    with pytest.raises(ConfigError, match="the transform returned ndarray, expected a tensor"):
        attach(nn.Conv2d(3, 2, 1), transform=lambda picture: torch.zeros(1).numpy())


def test_what_is_for_named_models_only_is_refused_for_live_ones(tmp_path: Path) -> None:
    for given in ({"checkpoint": tmp_path / "w.pth"}, {"options": {"depth": 3}}, {"adapter": "timm"}):
        with pytest.raises(UsageError, match="a live module was given"):
            attach(nn.Conv2d(3, 2, 1), **UNIT, **given)
