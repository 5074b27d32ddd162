"""Harvest: rows are those made by hand, stay paired, and survive a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from usae_probe import ActivationBuffer, HookedModel, attach, harvest
from usae_probe.errors import (
    BufferMismatchError,
    ConfigError,
    FolderLockedError,
    ImageError,
    NonFiniteError,
    PrecisionError,
    SiteError,
)
from usae_probe.harvesting import HarvestProgress
from usae_probe.images import open_source
from usae_probe.split import draw_split

N_IMAGES = 40


pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(n: int = N_IMAGES, size: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


class Net(nn.Module):
    """Two convolutions and a vector."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.deep = nn.Conv2d(width, width, 3, stride=2)
        self.flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.deep(self.conv(x).relu()))


def model(name: str, width: int, seed: int, layers: list[str], size: int = 16, **more: Any) -> HookedModel:
    module = Net(width, seed).eval()
    if "transform" not in more:
        more = {"image_size": size, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)} | more
    return attach(module, name=name, layers=layers, **more)


def models() -> list[HookedModel]:
    return [model("a", 4, 0, ["deep", "conv@mean"]), model("b", 6, 1, ["flat"], size=24)]


def folder_of(path: Path, n: int = 12, broken: tuple[int, ...] = ()) -> Path:
    path.mkdir()
    for i, pixels in enumerate(pictures(n, 18)):
        Image.fromarray(pixels).save(path / f"{i:02}.png")
        if i in broken:
            (path / f"{i:02}.png").write_bytes(b"no picture")
    return path


def by_hand(hooked: HookedModel, site: str, images: list[np.ndarray]) -> np.ndarray:
    """Preprocess and run picture by picture, with a plain hook, and average over places."""
    rows = []
    layer = dict(hooked.module.named_modules())[site.partition("/")[2].partition("@")[0]]
    handle = layer.register_forward_hook(lambda _m, _i, output: rows.append(output.detach()))
    for image in images:
        hooked.module(hooked.preprocess([torch.from_numpy(image).permute(2, 0, 1)]))
    handle.remove()
    stacked = torch.cat(rows)
    return (stacked.mean(dim=(2, 3)) if stacked.dim() == 4 else stacked).numpy()


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# --- rows ---


def test_rows_are_those_made_by_hand(tmp_path: Path) -> None:
    hooked, images = models(), pictures()
    buffer = harvest(hooked, images, tmp_path / "acts", dtype="float32", batch_size=7, holdout=0.2, seed=3)
    assert buffer.sites == ["a/deep", "a/conv@mean", "b/flat"]
    assert buffer.d_in == {"a/deep": 4, "a/conv@mean": 4, "b/flat": 5}
    assert buffer.complete
    expected_split = draw_split(N_IMAGES, holdout=0.2, validation=0.1, seed=3)
    for split, indices in expected_split:
        rows = buffer.read(split)
        np.testing.assert_array_equal(rows.image_index, indices)
        for site in buffer.sites:
            of = next(m for m in hooked if m.name == site.partition("/")[0])
            expected = by_hand(of, site, [images[i] for i in indices])
            np.testing.assert_allclose(rows.values[site], expected, rtol=1e-4, atol=1e-5)
    moments, rows = buffer.moments("a/deep"), buffer.read("train").values["a/deep"]
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    assert buffer.specs["b/flat"].preprocessing["image_size"] == [24, 24]
    assert buffer.specs["a/deep"].weights_hash == hooked[0].weights_hash
    assert buffer.specs["a/deep"].grid == (3, 3)


def test_an_undecodable_picture_is_skipped_listed_and_rows_stay_paired(tmp_path: Path) -> None:
    folder, hooked = folder_of(tmp_path / "photos", broken=(3, 7)), models()
    seen: list[HarvestProgress] = []
    buffer = harvest(hooked, folder, tmp_path / "acts", holdout=0.25, batch_size=4, progress=seen.append)
    assert sorted((image.index, image.name) for image in buffer.skipped) == [(3, "03.png"), (7, "07.png")]
    assert all(image.reason for image in buffer.skipped)
    source = open_source(folder)
    for split in ("train", "validation", "holdout"):
        rows = buffer.read(split)
        assert not {3, 7} & set(rows.image_index.tolist())
        for hook, site in ((hooked[0], "a/deep"), (hooked[1], "b/flat")):
            expected = by_hand(hook, site, [source.load(int(i)) for i in rows.image_index])
            np.testing.assert_allclose(rows.values[site], expected, rtol=2e-3, atol=2e-3)
    assert sum(buffer.n_rows(split) for split in ("train", "validation", "holdout")) == 10
    assert (seen[-1].done, seen[-1].total, seen[-1].skipped) == (12, 12, 2)
    assert [p.done for p in seen] == sorted(p.done for p in seen)


def test_no_picture_decodable(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 5, broken=(0, 1, 2, 3, 4))
    for _ in range(2):  # also when it is tried again
        with pytest.raises(ImageError, match=r"none of the 3 training images of .*photos could be decoded") as caught:
            harvest(models(), folder, tmp_path / "acts")
        assert "first failure:" in caught.value.hint


def test_threads_decode_the_same_rows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", broken=(2,))
    one = harvest(models(), folder, tmp_path / "one", batch_size=3)
    two = harvest(models(), folder, tmp_path / "two", batch_size=3, workers=3)
    assert content(one.path) == content(two.path)


class Labelled(Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        return Image.fromarray(pictures(11)[index]), index % 3


def test_an_array_a_file_and_a_data_set_give_the_same_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", pictures(11))
    rows = [
        harvest(models(), images, tmp_path / f"acts-{i}").read("train").values
        for i, images in enumerate([pictures(11), str(tmp_path / "p.npy"), Labelled(), open_source(pictures(11))])
    ]
    for other in rows[1:]:
        for site in rows[0]:
            np.testing.assert_array_equal(other[site], rows[0][site])


def make_transform() -> Any:
    return lambda picture: torch.from_numpy(np.array(picture.resize((16, 16)))).permute(2, 0, 1) / 255


def test_an_opaque_transform_harvests_and_goes_on_in_another_process(tmp_path: Path) -> None:
    """A function's repr holds its address, which is another one in every process."""
    hooked = model("a", 4, 0, ["deep"], transform=make_transform())
    images = pictures(9)
    buffer = harvest([hooked], images, tmp_path / "acts", dtype="float32")
    rows = buffer.read("train")
    expected = by_hand(hooked, "a/deep", [images[i] for i in rows.image_index])
    np.testing.assert_allclose(rows.values["a/deep"], expected, rtol=1e-4, atol=1e-5)
    described = buffer.specs["a/deep"].preprocessing["opaque"]
    assert "<lambda>" in described
    assert "0x" not in described
    keep = make_transform()  # elsewhere in memory, as in another process
    again = model("a", 4, 0, ["deep"], transform=keep)
    assert harvest([again], images, tmp_path / "acts", dtype="float32").complete


# --- refusals ---


class Spoiled(Net):
    """Gives `value` for pictures whose first pixel is 255."""

    def __init__(self, value: float) -> None:
        super().__init__(4, 0)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        marked = (x[:, 0, 0, 0] == 1).float()
        x = self.deep(self.conv(x).relu())
        return self.flat(self.spoil(x * 0 + torch.where(marked > 0, self.value, 0.0)[:, None, None, None]))

    spoil: nn.Module


def spoiled(value: float) -> HookedModel:
    module = Spoiled(value)
    module.spoil = nn.Identity()
    unit: dict[str, Any] = {"image_size": 20, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return attach(module.eval(), name="bad", layers=["conv", "spoil"], **unit)


def marked(index: int) -> np.ndarray:
    images = np.minimum(pictures(10), 254)
    images[index, 0, 0] = 255
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named_by_site_layer_and_image(tmp_path: Path, value: float) -> None:
    with pytest.raises(NonFiniteError) as caught:
        harvest([spoiled(value)], marked(4), tmp_path / "acts", batch_size=3)
    for part in ("bad/spoil", "layer 'spoil' of model 'bad'", "image 4 (array[4])", f"gave {value}"):
        assert part in caught.value.message
    buffer = ActivationBuffer(tmp_path / "acts")
    assert not buffer.complete
    assert buffer.verify() == []


def test_values_beyond_float16_are_refused_and_float32_takes_them(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match=r"bad/spoil: 70000 in dimension 0 for image 4 .*does not fit float16"):
        harvest([spoiled(70000.0)], marked(4), tmp_path / "acts")
    buffer = harvest([spoiled(70000.0)], marked(4), tmp_path / "wide", dtype="float32")
    top = max(buffer.read(split).values["bad/spoil"].max() for split in ("train", "validation", "holdout"))
    assert top == 70000.0


def test_a_buffer_of_something_else_is_refused(tmp_path: Path) -> None:
    harvest(models(), pictures(9), tmp_path / "acts")
    before = content(tmp_path / "acts")
    others: list[tuple[list[HookedModel], np.ndarray, dict[str, Any]]] = [
        (models(), pictures(9)[::-1].copy(), {}),
        (models(), pictures(9), {"seed": 1}),
        (models(), pictures(9), {"dtype": "float32"}),
        (models()[:1], pictures(9), {}),
        ([model("a", 4, 9, ["deep", "conv@mean"]), models()[1]], pictures(9), {}),
    ]
    for hooked, images, settings in others:
        with pytest.raises(BufferMismatchError):
            harvest(hooked, images, tmp_path / "acts", **settings)
    assert content(tmp_path / "acts") == before
    assert harvest(models(), pictures(9), tmp_path / "acts").complete  # the same again is opened
    assert content(tmp_path / "acts") == before


def test_a_stated_layout_is_part_of_what_a_buffer_is_made_from(tmp_path: Path) -> None:
    stated = model("a", 4, 0, ["deep"], layout={"deep": "nhwc"})
    images = pictures(12)
    found = harvest([model("a", 4, 0, ["deep"])], images, tmp_path / "found")
    assert "layout" not in found.identity["sites"]["a/deep"]
    with pytest.raises(BufferMismatchError, match=r"sites.a/deep.layout: absent on disk, .*kind='nhwc'"):
        harvest([stated], images, tmp_path / "found")
    told = harvest([stated], images, tmp_path / "told")
    assert told.d_in == {"a/deep": 3}  # the side of the map, as the user has it
    assert ActivationBuffer(tmp_path / "told").specs["a/deep"].layout == told.specs["a/deep"].layout != ""


def test_models_without_sites_or_with_one_name(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="model 'a' has no sites"):
        harvest([model("a", 4, 0, [])], pictures(9), tmp_path / "acts")
    with pytest.raises(SiteError, match="two models are called 'a'"):
        harvest([model("a", 4, 0, ["conv"]), model("a", 6, 1, ["conv"])], pictures(9), tmp_path / "acts")
    with pytest.raises(ConfigError, match="unknown setting 'hold_out'") as caught:
        harvest(models(), pictures(9), tmp_path / "acts", hold_out=0.5)
    assert "did you mean 'holdout'" in caught.value.hint
    with pytest.raises(ConfigError, match="'holdout'"):
        harvest(models(), pictures(9), tmp_path / "acts", holdout=2.0)
    with pytest.raises(ImageError, match="does not exist"):
        harvest(models(), tmp_path / "none", tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


# --- interruption ---


def whole_harvest(path: Path, progress: Any = None) -> ActivationBuffer:
    return harvest(models(), pictures(), path, batch_size=2, shard_images=4, progress=progress)


def test_an_interrupted_harvest_goes_on(tmp_path: Path) -> None:
    whole = whole_harvest(tmp_path / "whole").path
    calls = []

    def interrupt(progress: HarvestProgress) -> None:
        calls.append(progress.done)
        if len(calls) in (1, 9, 10):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            whole_harvest(tmp_path / "acts", interrupt)
    assert not ActivationBuffer(tmp_path / "acts").complete
    buffer = whole_harvest(tmp_path / "acts", interrupt)
    assert buffer.complete
    assert content(tmp_path / "acts") == content(whole)
    assert calls[-1] == N_IMAGES
    assert len(calls) < 2 * N_IMAGES / 2  # what was sealed was not harvested again


def test_two_harvests_do_not_write_to_one_folder(tmp_path: Path) -> None:
    refused = []

    def again(progress: HarvestProgress) -> None:
        with pytest.raises(FolderLockedError, match=rf"acts is being written by process {os.getpid()} on"):
            whole_harvest(tmp_path / "acts")
        refused.append(progress.done)

    assert whole_harvest(tmp_path / "acts", again).complete
    assert refused[-1] == N_IMAGES
    assert whole_harvest(tmp_path / "acts").complete


def test_a_killed_harvest_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """One subprocess per kill: before the first shard is sealed, and twice in the middle of a later one."""
    whole = whole_harvest(tmp_path / "whole").path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    sealed = []
    for batches in (1, 6, 3):
        command = [sys.executable, __file__, str(tmp_path / "acts")]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(batches):
                assert process.stdout.readline().startswith("batch")
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
        buffer = ActivationBuffer(tmp_path / "acts")
        assert buffer.verify() == []
        assert not buffer.complete
        sealed.append(sum(buffer.n_rows(split) for split in ("train", "validation", "holdout")))
    assert 0 == sealed[0] < sealed[1] <= sealed[2] < N_IMAGES
    assert whole_harvest(tmp_path / "acts").complete
    assert content(tmp_path / "acts") == content(whole)


if __name__ == "__main__":
    torch.set_num_threads(1)

    def slowly(progress: HarvestProgress) -> None:
        print("batch", progress.done, flush=True)
        time.sleep(0.05)  # so that the kill falls between the batches it was meant for

    whole_harvest(Path(sys.argv[1]), slowly)
