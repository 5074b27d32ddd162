"""The plug-in contract: the example distribution, installed and used as a third party's; a broken one beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from usae_probe import ActivationBuffer, attach
from usae_probe.adapter import Adapter, LoadedModel, ModelSpec, Preprocessing, load_adapter
from usae_probe.demo import draw_images
from usae_probe.errors import AdapterError, CheckpointError, ConfigError, UsageError

from .tiny_run import put_tiny_run

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "plugin_adapter"
CONFIG = """
[models.resnet]
adapter = "torchvision"
name = "resnet18"
pretrained = false
options = { num_classes = 7 }
layers = ["layer4"]
image_size = 32
[models.net]
adapter = "module"
name = "nets.py:build"
layers = ["2"]
image_size = 16
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[images]
source = "images.npz"
holdout = 0.3
limit = 24
batch_size = 12
[usae]
n_latents = 16
k = 2
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the example is installed in."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*command, "--target", str(folder), str(EXAMPLE)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distribution whose adapter cannot be imported."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken_hub.py").write_text('raise ImportError("libhub.so is missing")\n')
    info = folder / "broken_hub-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-hub\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[usae_probe.adapters]\nbroken = broken_hub:Adapter\n")
    return folder


@pytest.fixture
def adapter(site: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """The installed example, in this process."""
    monkeypatch.syspath_prepend(str(site))
    return load_adapter("torchvision")


def cli(*words: str, sites: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    path = [*map(str, sites), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "usae_probe", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def untrained(name: str, **options: Any) -> LoadedModel:
    return load_adapter("torchvision").load(ModelSpec(name, pretrained=False, options=options))


# --- from the command line, in a process of its own ---


def test_plug_ins_are_listed_with_where_they_are_and_a_broken_one_by_name(
    site: Path, broken: Path, tmp_path: Path
) -> None:
    done = cli("adapters", "--json", sites=[broken, site], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["adapters"]}
    assert rows["torchvision"] == {
        "name": "torchvision",
        "target": "usae_probe_torchvision:TorchvisionAdapter",
        "distribution": "usae-probe-torchvision",
        "version": "0.1.0",
        "origin": str(site),
        "state": "ok",
    }
    state = rows["broken"].pop("state")
    assert rows["broken"] == {
        "name": "broken",
        "target": "broken_hub:Adapter",
        "distribution": "broken-hub",
        "version": "1.2",
        "origin": str(broken),
    }
    assert "adapter 'broken'" in state
    assert state.endswith("cannot be imported: libhub.so is missing")
    for name in ("timm", "module"):
        assert (rows[name]["distribution"], rows[name]["state"]) == ("usae-probe", "ok")
        assert Path(rows[name]["origin"]).is_dir()


def test_its_layers_are_listed(site: Path, tmp_path: Path) -> None:
    done = cli("layers", "torchvision:resnet18", "--image-size", "32", "--json", sites=[site], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    layers = {layer["name"]: layer for layer in json.loads(done.stdout)["models"]["torchvision:resnet18"]}
    # 32 pixels through five strides of 2
    assert (layers["layer4"]["output_shape"], layers["layer4"]["layout"]) == ([512, 1, 1], "nchw")
    assert layers["layer1"]["output_shape"] == [64, 8, 8]
    assert layers["fc"]["parameters"] == 513 * 1000


def test_a_mistyped_model_gives_the_nearest_name_and_exit_status_2(site: Path, tmp_path: Path) -> None:
    done = cli("layers", "torchvision:resnet81", "--json", sites=[site], cwd=tmp_path)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "UsageError"
    assert error["message"] == "torchvision has no classification model 'resnet81'"
    assert error["hint"].startswith("did you mean 'resnet18'")


def test_a_config_harvests_from_it_with_a_broken_plug_in_beside_it(site: Path, broken: Path, tmp_path: Path) -> None:
    (put_tiny_run(tmp_path) / "c.toml").write_text(CONFIG)
    done = cli("harvest", "c.toml", "--out", "out", "--json", sites=[broken, site], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken" not in done.stderr
    buffer = ActivationBuffer(tmp_path / "out" / "buffer")
    assert buffer.d_in == {"resnet/layer4": 512, "net/2": 8}
    # of 24 images .3 are held out, and .1 of the other 17 are for validation
    assert [buffer.n_rows(split) for split in ("holdout", "validation", "train")] == [7, 2, 15]
    assert buffer.read("train").values["resnet/layer4"].std() > 0


# --- live models ---


def test_live_models_attach_with_a_broken_plug_in_installed(
    site: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(broken))
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(AdapterError, match=r"adapter 'broken' \(broken_hub:Adapter, broken-hub 1\.2\).*libhub.so"):
        load_adapter("broken")
    with attach(models.squeezenet1_1(), image_size=32, layers=["features.12"]) as hooked:
        assert hooked.d_in(hooked.sites[0]) == 512
        assert hooked.preprocess.mean == (0.485, 0.456, 0.406)  # adopted by the example
    live = timm.create_model("test_resnet")
    with attach(live, image_size=32) as hooked:
        assert hooked.preprocess.mean == tuple(live.pretrained_cfg["mean"])  # and by timm's adapter
    unknown = nn.Sequential(nn.Conv2d(3, 4, 1))
    with attach(unknown, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3, layers=["0"]) as hooked:
        assert hooked.d_in(hooked.sites[0]) == 4


def test_a_live_model_is_adopted_only_where_its_preprocessing_is_beyond_doubt(adapter: Adapter) -> None:
    live = models.squeezenet1_1()
    adopted = adapter.adopt(live)
    assert adopted is not None
    assert adopted.module is live
    # weights of squeezenet are all for 224 pixels of a picture of 256
    assert adopted.preprocessing == Preprocessing(
        (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875
    )
    assert adapter.adopt(models.squeezenet1_1(num_classes=3)) is None  # trained on other pictures than ImageNet's
    assert adapter.adopt(models.resnet18()) is None  # the two sets of weights of its family want 256 and 232
    assert adapter.adopt(timm.create_model("test_resnet")) is None
    assert adapter.adopt(nn.ReLU()) is None
    with pytest.raises(ConfigError, match="preprocessing of model 'resnet' is not known"):
        attach(models.resnet18())


# --- what load does ---


def test_models_are_built_with_the_preprocessing_of_their_weights(adapter: Adapter) -> None:
    loaded = untrained("resnet50", num_classes=3)
    assert loaded.module.fc.weight.shape == (3, 2048)
    assert not any(part.training for part in loaded.module.modules())
    assert loaded.preprocessing is not None
    assert loaded.preprocessing.canvas_size == (232, 232)  # the second weights' are the default of resnet50
    grey = loaded.preprocessing(torch.full((1, 3, 300, 260), 128, dtype=torch.uint8))
    assert grey.shape == (1, 3, 224, 224)
    assert float(grey[0, 0, 5, 5]) == pytest.approx((128 / 255 - 0.485) / 0.229, abs=1e-6)


def test_the_preprocessing_is_torchvisions_own_within_one_level(adapter: Adapter) -> None:
    (picture,) = draw_images(1, size=97).images
    cut = Image.fromarray(picture[:90])  # 90 x 97: neither square nor the size of the model
    expected = models.MobileNet_V3_Small_Weights.DEFAULT.transforms()(cut)
    known = untrained("mobilenet_v3_small").preprocessing
    assert known is not None
    pixels = torch.from_numpy(picture[:90]).permute(2, 0, 1)
    assert (known([pixels])[0] - expected).abs().max() <= 1.01 / 255 / 0.224


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
def test_local_weights_load_or_do_not_fit(adapter: Adapter, tmp_path: Path, file: str) -> None:
    state = {
        key: torch.full_like(value, 0.5) for key, value in models.squeezenet1_1(num_classes=3).state_dict().items()
    }
    if file.endswith(".pth"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    given: dict[str, Any] = {"checkpoint": file, "base": tmp_path, "image_size": 64}
    with attach("torchvision:squeezenet1_1", options={"num_classes": 3}, **given) as hooked:
        loaded = hooked.module.state_dict()
        assert list(loaded) == list(state)
        assert all((value == 0.5).all() for value in loaded.values())
    with pytest.raises(CheckpointError, match=r"w\.\w+' cannot be loaded into 'squeezenet1_1'.*classifier\.1\.weight"):
        attach("torchvision:squeezenet1_1", **given)
    (tmp_path / file).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        attach("torchvision:squeezenet1_1", **given)


def test_what_cannot_be_built_says_whose_fault_it_is(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", refuse)
    with pytest.raises(UsageError, match=r"'squeezenet1_1' does not take options \{'widht': 3\}.*'widht'"):
        untrained("squeezenet1_1", widht=3)
    with pytest.raises(UsageError, match="expected value 1000 but got 3"):
        adapter.load(ModelSpec("squeezenet1_1", options={"num_classes": 3}))
    with pytest.raises(UsageError, match="no classification model 'fcn_resnet50'"):
        untrained("fcn_resnet50")
    with pytest.raises(AdapterError, match=r"could not build 'squeezenet1_1'.*no route to host") as caught:
        attach("torchvision:squeezenet1_1")
    assert "pretrained = false" in caught.value.hint
