"""Data sets by name: torchvision's, and Hugging Face's from Python, a saved folder, or files on disk; and offline."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import datasets
import numpy as np
import pytest
import torchvision
from PIL import Image

from usae_probe import Run, RunConfig
from usae_probe.errors import ImageError, UsageError
from usae_probe.images import annotations_of, load_images, open_source
from usae_probe.images.hugging_face import HuggingFaceSource

from .tiny_run import CONFIG, put_tiny_run

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
LABELS = [i % 10 for i in range(20)]
NAMES = [f"kind {i}" for i in range(10)]


def write_cifar10(root: Path) -> None:
    """The files that torchvision's CIFAR10 reads, as it finds them after a download."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for part, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = slice(4 * (part % 5), 4 * (part % 5) + 4)
        data = PIXELS[rows].transpose(0, 3, 1, 2).reshape(4, -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": LABELS[rows]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))


@pytest.fixture
def any_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any files of the right names for CIFAR-10: theirs are not ours to ship."""
    kind = torchvision.datasets.CIFAR10
    there = lambda self: (Path(self.root) / self.base_folder / "batches.meta").is_file()
    monkeypatch.setattr(kind, "_check_integrity", there)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())


# --- torchvision ---


def test_torchvision_by_name_has_pictures_labels_and_class_names(tmp_path: Path, any_cifar10: None) -> None:
    write_cifar10(tmp_path / "data")
    source = open_source("torchvision:CIFAR10", options={"root": str(tmp_path / "data")})
    assert (len(source), source.location, source.class_names) == (20, "torchvision:CIFAR10", NAMES)
    assert np.array_equal(source.load(7), PIXELS[7])
    (classes,) = annotations_of(source)
    assert (classes.name, classes.names, classes.values.tolist()) == ("class", NAMES, LABELS)
    assert len(open_source("torchvision:CIFAR10", options={"root": str(tmp_path / "data"), "train": False})) == 4


def test_torchvision_data_may_move(tmp_path: Path, any_cifar10: None) -> None:
    prints = []
    for folder in ("here", "there"):
        write_cifar10(tmp_path / folder)
        prints.append(open_source("torchvision:CIFAR10", options={"root": str(tmp_path / folder)}).fingerprint())
    assert prints[0] == prints[1]
    other = open_source("torchvision:CIFAR10", options={"root": str(tmp_path / "here"), "train": False})
    assert other.fingerprint() != prints[0]


def test_torchvision_is_downloaded_once_and_says_nothing_on_stdout(
    tmp_path: Path, any_cifar10: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def network(url: str, root: str, **_: Any) -> None:
        calls.append(url)
        print("Downloading", url)
        write_cifar10(Path(root))

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", network)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "cache" / "hub"))  # $TORCH_HOME/hub
    for _ in range(2):
        assert len(open_source("torchvision:CIFAR10")) == 20
    assert calls == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
    assert (tmp_path / "cache/datasets/cifar-10-batches-py/test_batch").is_file()
    assert capsys.readouterr().out == ""


def test_torchvision_offline_says_what_to_download_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    options = {"root": str(tmp_path / "data"), "train": False}
    with pytest.raises(ImageError, match=r"CIFAR10 is not in .*data, and cannot be downloaded: .*not known") as caught:
        open_source("torchvision:CIFAR10", options=options)
    assert "torchvision.datasets.CIFAR10('data', train=False, download=True)" in caught.value.hint
    assert "cifar-10-python.tar.gz" in caught.value.hint
    with pytest.raises(ImageError, match=r"CIFAR10 is not in .*not found or corrupted"):
        open_source("torchvision:CIFAR10", options={**options, "download": False})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("CIFAR1", {}, "no data set 'CIFAR1'.*CIFAR10"),
        ("cifar10", {}, "did you mean 'CIFAR10'"),
        ("CIFAR10", {"trian": False}, "no option 'trian'.*did you mean 'train'"),
        ("CIFAR10", {"transform": "x"}, "no option 'transform'"),
        ("STL10", {"split": "tset"}, "does not take options.*tset"),
    ],
)
def test_torchvision_names_and_options_that_there_are_not(
    tmp_path: Path, name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        open_source(f"torchvision:{name}", options={"root": str(tmp_path), **options})


def test_torchvision_without_files_of_its_own() -> None:
    source = open_source("torchvision:FakeData", options={"size": 5, "image_size": [3, 16, 16]})
    loaded = load_images(source, range(5))
    assert [tuple(picture.shape) for picture in loaded.pictures] == [(3, 16, 16)] * 5


# --- Hugging Face datasets ---


def hf_dataset(**columns: Any) -> datasets.Dataset:
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    data = {"img": [Image.fromarray(pixels) for pixels in PIXELS], "label": LABELS}
    for name, (feature, values) in columns.items():
        features[name], data[name] = feature, values
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def test_a_hugging_face_data_set_from_python() -> None:
    source = open_source(hf_dataset())
    assert isinstance(source, HuggingFaceSource)
    assert (len(source), source.class_names, source.describe(3)) == (20, NAMES, "dataset[3]")
    for index in (0, 19):
        assert np.array_equal(source.load(index), PIXELS[index])
    (classes,) = annotations_of(source)
    assert (classes.names, classes.values.tolist()) == (NAMES, LABELS)


def test_a_saved_folder_is_recognised_and_its_fingerprint_is_its_content(tmp_path: Path) -> None:
    hf_dataset().save_to_disk(tmp_path / "a")
    hf_dataset().save_to_disk(tmp_path / "b")
    changed = [15 - label if label == 9 else label for label in LABELS]
    hf_dataset().remove_columns("label").add_column("label", changed).save_to_disk(tmp_path / "c")
    sources = {name: open_source(tmp_path / name) for name in "abc"}
    assert np.array_equal(sources["b"].load(4), PIXELS[4])
    assert sources["a"].fingerprint() == sources["b"].fingerprint() != sources["c"].fingerprint()
    assert open_source(f"datasets:{tmp_path / 'a'}").fingerprint() == sources["a"].fingerprint()


def test_splits_must_be_named(tmp_path: Path) -> None:
    parts = {"train": hf_dataset(), "test": hf_dataset().select(range(5))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    with pytest.raises(UsageError, match=r"has 2 splits .*split = 'train'.* train, test"):
        open_source(tmp_path / "both")
    with pytest.raises(UsageError, match="no split 'val'"):
        open_source(tmp_path / "both", options={"split": "val"})
    assert len(open_source(tmp_path / "both", options={"split": "test"})) == 5
    hf_dataset().save_to_disk(tmp_path / "one")
    with pytest.raises(UsageError, match="saved without splits"):
        open_source(tmp_path / "one", options={"split": "train"})


def test_columns_are_found_or_named() -> None:
    two = hf_dataset(mask=(datasets.Image(), [Image.fromarray(pixels[:, ::-1]) for pixels in PIXELS]))
    with pytest.raises(UsageError, match=r"2 columns of pictures .*image = 'img'"):
        open_source(two)
    assert np.array_equal(open_source(two, options={"image": "mask"}).load(1), PIXELS[1][:, ::-1])
    with pytest.raises(UsageError, match=r"no column of pictures 'imgg' .*did you mean 'img'"):
        open_source(two, options={"image": "imgg"})
    with pytest.raises(UsageError, match=r"no column of pictures \(datasets.Image\): label: int64"):
        open_source(hf_dataset().remove_columns("img"))
    told = hf_dataset(animal=(datasets.Value("string"), ["dog", "cat", None, "cat", "dog"] * 4))
    source = open_source(told, options={"label": "animal"})
    assert source.class_names == ["cat", "dog"]
    assert [source.label(i) for i in range(5)] == [1, 0, -1, 0, 1]
    with pytest.raises(UsageError, match="no column 'breed'"):
        open_source(told, options={"label": "breed"})
    weights = hf_dataset(weight=(datasets.Value("float32"), [0.5] * 20))
    with pytest.raises(UsageError, match="column 'weight' holds float32"):
        open_source(weights, options={"label": "weight"})


def test_pictures_of_a_data_set_that_cannot_be_decoded_are_skipped_by_name() -> None:
    images = [{"bytes": b"no picture", "path": None}, None, {"bytes": b"", "path": None}]
    data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    source = open_source(data)
    assert source.label(0) is None
    loaded = load_images(source, range(3))
    assert [skipped.name for skipped in loaded.skipped] == ["dataset[0]", "dataset[1]", "dataset[2]"]
    assert "UnidentifiedImageError" in loaded.skipped[0].reason
    assert "holds no picture" in loaded.skipped[1].reason
    assert len(source.fingerprint()) == 64
    with pytest.raises(ImageError, match="is empty"):
        open_source(data.select([]))


def test_files_on_disk_by_load_dataset(tmp_path: Path) -> None:
    for index in range(6):
        path = tmp_path / "photos" / NAMES[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[index]).save(path)
    options = {"data_dir": str(tmp_path / "photos"), "split": "train", "cache_dir": str(tmp_path / "cache")}
    source = open_source("datasets:imagefolder", options=options)
    assert (len(source), source.class_names) == (6, NAMES[:2])
    stored = {source.load(index).tobytes() for index in range(6)}
    assert stored == {pixels.tobytes() for pixels in PIXELS[:6]}
    with pytest.raises(UsageError, match="streaming"):
        open_source("datasets:imagefolder", options={**options, "streaming": True})


def test_hugging_face_offline_says_what_to_download_where() -> None:
    with pytest.raises(ImageError, match="'someone/pictures' cannot be loaded") as caught:
        open_source("datasets:someone/pictures")
    assert "hf download someone/pictures --repo-type dataset" in caught.value.hint


def test_options_are_for_data_sets_by_name(tmp_path: Path) -> None:
    for source in (tmp_path, PIXELS, [Image.fromarray(PIXELS[0])]):
        with pytest.raises(UsageError, match=r"options {'split': 'train'} are given, but .* takes none"):
            open_source(source, options={"split": "train"})


# --- in a config ---


def test_a_run_on_a_data_set_by_name(tmp_path: Path) -> None:
    put_tiny_run(tmp_path)
    drawn = np.load(tmp_path / "images.npz")["images"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["low", "high"])})
    data = {"image": [Image.fromarray(pixels) for pixels in drawn], "label": [i // 30 for i in range(60)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(data, features=features)}).save_to_disk(
        tmp_path / "saved"
    )
    images = {**CONFIG["images"], "source": "datasets:saved", "options": {"split": "train"}}
    config = RunConfig.from_dict({**CONFIG, "images": images}, base=tmp_path)
    assert config.image_path == f"datasets:{tmp_path / 'saved'}"
    result = Run(config, tmp_path / "run").run()
    assert result.metrics is not None
    assert result.metrics["factors"]["names"] == ["class"]
    again = Run(config, tmp_path / "run").run()
    assert all(stage.kept for stage in again.stages)


def test_names_and_folders_of_data_sets_in_a_config(tmp_path: Path) -> None:
    def config(**images: Any) -> RunConfig:
        return RunConfig.from_dict({**CONFIG, "images": images}, base=tmp_path)

    assert config(source="torchvision:CIFAR10").image_path == "torchvision:CIFAR10"
    assert config(source="datasets:uoft-cs/cifar10").image_path == "datasets:uoft-cs/cifar10"
    options = config(source="torchvision:CIFAR10", options={"root": "data", "train": False}).image_options
    assert options == {"root": str(tmp_path / "data"), "train": False}
