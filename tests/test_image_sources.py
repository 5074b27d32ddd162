"""Image sources and loading: what is found, in which order, how it is decoded, and what cannot be."""

import hashlib
import io
import os
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from usae_probe.errors import ConfigError, ImageError
from usae_probe.images import (
    ArraySource,
    DatasetSource,
    FolderSource,
    ImageSource,
    iter_batches,
    load_images,
    open_source,
)


def picture(seed: int = 0, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture() if pixels is None else pixels).save(path, quality=95)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures in two classes, the third undecodable."""
    root = tmp_path / "photos"
    for seed, name in enumerate(["cat/a.png", "cat/b.PNG", "cat/deep/c.jpg", "dog/d.bmp", "dog/e.png"]):
        write(root / name, picture(seed))
    (root / "cat/deep/c.jpg").write_bytes(b"")
    (root / "dog/notes.txt").write_text("no picture")
    return root


# --- folders ---


def test_folder_order_names_and_labels(folder: Path):
    source = open_source(folder)
    assert isinstance(source, FolderSource)
    assert isinstance(source, ImageSource)
    assert (source.kind, source.location, len(source)) == ("folder", str(folder), 5)
    names = [source.describe(i) for i in range(5)]
    assert names == ["cat/a.png", "cat/b.PNG", "cat/deep/c.jpg", "dog/d.bmp", "dog/e.png"]
    assert source.class_names == ["cat", "dog"]
    assert [source.label(i) for i in range(5)] == [0, 0, 0, 1, 1]
    for i in (0, 1, 3, 4):
        assert np.array_equal(source.load(i), picture(i))


def test_no_labels_where_a_picture_lies_at_the_top(folder: Path):
    write(folder / "top.png")
    source = open_source(str(folder))
    assert source.class_names is None
    assert source.label(0) is None


def test_folder_fingerprint_is_over_names_and_sizes(folder: Path):
    before = open_source(folder).fingerprint()
    expected = hashlib.sha256(b"folder")
    for name in ["cat/a.png", "cat/b.PNG", "cat/deep/c.jpg", "dog/d.bmp", "dog/e.png"]:
        expected.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
    assert before == expected.hexdigest()
    (folder / "dog/notes.txt").write_text("still no picture")
    assert open_source(folder).fingerprint() == before
    (folder / "cat/a.png").rename(folder / "dog/a.png")
    assert open_source(folder).fingerprint() != before


def test_links_are_followed_once(folder: Path):
    (folder / "cat/loop").symlink_to(folder, target_is_directory=True)
    (folder / "a_link").symlink_to(folder / "dog", target_is_directory=True)
    outside = folder.parent / "outside"
    write(outside / "f.png")
    (folder / "far").symlink_to(outside, target_is_directory=True)
    (folder / "cat/gone.png").symlink_to(folder / "nowhere.png")
    source = FolderSource(folder)
    # What a_link repeats keeps its real name; the dangling link is listed, so that loading it can say so.
    assert source.paths == [
        "cat/a.png",
        "cat/b.PNG",
        "cat/deep/c.jpg",
        "cat/gone.png",
        "dog/d.bmp",
        "dog/e.png",
        "far/f.png",
    ]
    with pytest.raises(ImageError, match=r"cat/gone.png cannot be decoded: FileNotFoundError"):
        source.load(3)
    assert len(source.fingerprint()) == 64


def test_hidden_files_and_pipes_are_left_out(folder: Path):
    write(folder / ".cache/x.png")
    (folder / "cat/._a.png").write_bytes(b"resource fork")
    os.mkfifo(folder / "cat/pipe.png")
    assert len(open_source(folder)) == 5


# --- decoding ---


def decoded(tmp_path: Path, image: Image.Image, suffix: str = ".png", **options: object) -> np.ndarray:
    tmp_path.mkdir(exist_ok=True)
    image.save(tmp_path / f"x{suffix}", **options)
    pixels = FolderSource(tmp_path).load(0)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels


def test_exif_orientation(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: show the picture rotated by 90° clockwise.
    pixels = decoded(tmp_path, Image.fromarray(picture()), exif=exif)
    assert np.array_equal(pixels, np.rot90(picture(), -1))


def test_transparency_over_white(tmp_path: Path):
    # Alpha 0, 51/255 = .2 and 1 over white: 255, .2·100 + .8·255 = 224 and 100.
    rgba = np.array([[[100, 100, 100, a] for a in (0, 51, 255)]], dtype=np.uint8)
    assert decoded(tmp_path, Image.fromarray(rgba))[0, :, 0].tolist() == [255, 224, 100]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    pixels = decoded(tmp_path, palette, transparency=bytes([255, 0]))
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_palette_and_gray_and_cmyk(tmp_path: Path):
    assert decoded(tmp_path / "p", Image.new("P", (1, 1), 0).convert("P")).shape == (1, 1, 3)
    gray = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    assert decoded(tmp_path / "l", gray).tolist() == [[[v] * 3 for v in (0, 128, 255)]]
    black = Image.new("CMYK", (8, 8), (0, 0, 0, 255))
    assert decoded(tmp_path / "c", black, ".jpg").max() <= 2
    assert decoded(tmp_path / "1", Image.new("1", (2, 1), 1)).tolist() == [[[255] * 3] * 2]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_gray_of_16_bit_is_scaled(tmp_path: Path, suffix: str):
    # v / 257: 0, 257 → 1, 32768 → 127.5 (to even: 128), 65535 → 255. Clipping would give 255 for all but 0.
    gray = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    assert decoded(tmp_path, gray, suffix)[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_of_an_animation_the_first_picture_counts(tmp_path: Path, suffix: str):
    red, blue = (Image.new("RGB", (8, 6), colour) for colour in ("#ff0000", "#0000ff"))
    pixels = decoded(tmp_path, red, suffix, save_all=True, append_images=[blue], duration=100, loop=0)
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 2


def test_webp_with_transparency(tmp_path: Path):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert decoded(tmp_path, clear, ".webp", lossless=True).min() == 255


def test_modes_without_a_white(tmp_path: Path):
    for folder, array, message in [
        ("f", np.zeros((2, 2), dtype=np.float32), "x.tif: floating grayscale does not say which value is white"),
        ("i", np.full((2, 2), 70000, dtype=np.int32), "x.tif: 32-bit grayscale with values from 70000 to 70000"),
    ]:
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "x.tif")
        with pytest.raises(ImageError, match=message):
            FolderSource(tmp_path / folder).load(0)


def test_damaged_files_name_themselves(tmp_path: Path):
    whole = write(tmp_path / "whole.png", picture(0, 64, 64)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.gif").write_text("not a picture")
    for i, name in enumerate(["empty.jpg", "half.png", "text.gif"]):
        with pytest.raises(ImageError, match=f"^{name} cannot be decoded"):
            FolderSource(tmp_path).load(i)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tif", ".ppm"])
def test_flipped_bytes_decode_or_give_an_image_error(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"x{suffix}")
    whole, source, rng = path.read_bytes(), FolderSource(tmp_path), np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 200), 4):
            data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            pixels = source.load(0)
        except ImageError as error:
            assert f"x{suffix}" in str(error)  # noqa: PT017
        else:
            assert pixels.shape[2] == 3


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("limit", [53, 20])
def test_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, limit: int):
    # 54 pixels: over the limit (Pillow only warns), and over twice the limit (Pillow refuses).
    write(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=r"^x.png.*(exceed|bomb)"):
            FolderSource(tmp_path).load(0)


# --- arrays ---


def test_array_file_is_mapped_and_copied(tmp_path: Path):
    images = np.stack([picture(i) for i in range(3)])
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy")
    assert isinstance(source, ArraySource)
    assert isinstance(source.images, np.memmap)
    assert (source.kind, len(source), source.describe(2), source.label(2)) == ("array", 3, "array[2]", None)
    pixels = source.load(2)
    pixels[:] = 0  # Writable, and no view of the file.
    assert np.array_equal(source.load(2), picture(2))


def test_npz_with_labels_and_factors(tmp_path: Path):
    images = np.stack([picture(i) for i in range(3)])
    np.savez(
        tmp_path / "x.npz",
        pictures=images,
        labels=np.array([2, 0, 1]),
        hue=np.array([5, 6, 7], dtype=np.uint8),
        weights=np.array([0.1, 0.2, 0.3]),
        other=np.arange(4),
    )
    source = open_source(tmp_path / "x.npz")
    assert [source.label(i) for i in range(3)] == [2, 0, 1]
    assert {name: values.tolist() for name, values in source.factors.items()} == {"hue": [5, 6, 7]}
    # The name `images` decides where there are several.
    np.savez(tmp_path / "y.npz", masks=images[:1], images=images)
    assert len(open_source(tmp_path / "y.npz")) == 3


def test_array_fingerprint(tmp_path: Path):
    images = np.stack([picture(i) for i in range(3)])
    np.save(tmp_path / "x.npy", images)
    plain = open_source(images).fingerprint()
    # By hand: a prefix, then name, dtype and shape, then the bytes.
    assert plain == hashlib.sha256(b"array\0images:|u1:(3, 6, 9, 3)\0" + images.tobytes()).hexdigest()
    assert open_source(tmp_path / "x.npy").fingerprint() == plain
    labelled = {ArraySource(images, labels=np.array(labels)).fingerprint() for labels in ([0, 1, 2], [0, 1, 1])}
    assert len(labelled | {plain}) == 3
    assert open_source(images[::-1]).fingerprint() != plain
    factors = ArraySource(images, factors={"hue": np.array([1, 2, 3])})
    assert factors.fingerprint() not in labelled | {plain}


def test_fingerprint_of_a_long_array_equals_that_of_its_bytes(monkeypatch: pytest.MonkeyPatch):
    images = np.stack([picture(i) for i in range(7)])
    whole = open_source(images).fingerprint()
    monkeypatch.setattr("usae_probe.images.arrays.CHUNK_BYTES", 2 * images[0].nbytes)
    assert open_source(images).fingerprint() == whole


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 8, 8, 3)), r"holds float64 \[4, 8, 8, 3\], expected uint8 \[N, H, W, 3\].*dtype uint8"),
        (np.zeros((4, 3, 8, 8), dtype=np.uint8), r"uint8 \[4, 3, 8, 8\].*transpose\(0, 2, 3, 1\)"),
        (np.zeros((4, 8, 8), dtype=np.uint8), r"uint8 \[4, 8, 8\].*repeat gray"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "no pictures"),
        (np.zeros((2, 0, 8, 3), dtype=np.uint8), r"uint8 \[2, 0, 8, 3\], expected"),
    ],
)
def test_wrong_arrays(tmp_path: Path, array: np.ndarray, message: str):
    with pytest.raises(ImageError, match=message):
        open_source(array)
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ImageError, match=message):
        open_source(tmp_path / "x.npy")


def test_wrong_array_files(tmp_path: Path):
    images = np.stack([picture(i) for i in range(3)])
    for arrays, message in [
        (
            {"a": images, "b": images},
            r"2 uint8 arrays with four axes \(a: uint8 \[3, 6, 9, 3\], b: .*`images`",
        ),
        ({"a": np.arange(3)}, r"no uint8 array with four axes \(a: int64 \[3\]\)"),
        ({"images": images, "labels": np.arange(2)}, r"labels of .*x.npz is int64 \[2\], expected integers \[3\]"),
        ({"images": images, "labels": np.ones(3)}, r"labels of .*x.npz is float64 \[3\], expected integers \[3\]"),
    ]:
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ImageError, match=message):
            open_source(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_damaged_array_files(tmp_path: Path, name: str):
    images = np.stack([picture(i) for i in range(3)])
    path = tmp_path / name
    (np.save if name == "x.npy" else np.savez)(path, images)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2], whole[:40]):
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"{name} cannot be read as an array file"):
            open_source(path)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match=r"objects.npy cannot be read"):
        open_source(tmp_path / "objects.npy")


# --- data sets ---


class Items(Dataset):
    """A data set of given items."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


PIXELS = picture(5)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray(PIXELS),
        CHW,
        CHW.float() / 255,
        (CHW.double() / 255).requires_grad_(),
        PIXELS,
        PIXELS / 255,
        PIXELS.astype(np.float32) / 255,
        (PIXELS, 3),
        [CHW, torch.tensor(3), "more"],
    ],
)
def test_items(item: object):
    source = open_source(Items(item))
    assert isinstance(source, DatasetSource)
    assert (source.kind, source.describe(0)) == ("dataset", "dataset[0]")
    pixels = source.load(0)
    assert np.array_equal(pixels, PIXELS)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert not np.shares_memory(pixels, PIXELS)


def test_gray_items():
    gray = PIXELS[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=2)
    source = DatasetSource(Items(gray, torch.from_numpy(gray)[None], torch.from_numpy(gray), Image.fromarray(gray)))
    for i in range(4):
        assert np.array_equal(source.load(i), expected)


def test_floats_are_rounded():
    # 0.0019 · 255 = .48 → 0, 0.002 · 255 = .51 → 1, 0.9985 · 255 = 254.6 → 255
    item = torch.tensor([0.0019, 0.002, 0.9985]).reshape(3, 1, 1)
    assert DatasetSource(Items(item)).load(0).tolist() == [[[0, 1, 255]]]


@pytest.mark.parametrize(
    ("label", "expected"), [(3, 3), (np.int64(4), 4), (torch.tensor(5), 5), (True, None), (0.5, None), ("cat", None)]
)
def test_labels_of_items(label: object, expected: int | None):
    assert DatasetSource(Items((PIXELS, label))).label(0) == expected
    assert DatasetSource(Items(PIXELS)).label(0) is None


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": 1}, r"dataset\[0\]: found a builtins.dict, expected a picture .*tuple"),
        ((), "found a builtins.tuple"),
        (torch.zeros(4, 8, 8), r"a tensor of shape \[4, 8, 8\] and dtype torch.float32, expected"),
        (torch.zeros(8, 8, 3), r"a tensor of shape \[8, 8, 3\]"),
        (np.zeros((3, 8, 8)), r"an array of shape \[3, 8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "dtype torch.int64, expected uint8, or floating"),
        (torch.full((3, 8, 8), 1.5), r"values from 1.5 to 1.5, expected \[0, 1\] .*normalisation"),
        (torch.full((3, 8, 8), float("nan")), "values from nan"),
    ],
)
def test_items_that_are_no_pictures(item: object, message: str):
    with pytest.raises(ImageError, match=message):
        DatasetSource(Items(item)).load(0)


def test_torchs_own_data_sets():
    images = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(4)])
    source = open_source(Subset(TensorDataset(images, torch.tensor([7, 8, 9, 10])), [3, 1]))
    assert [source.label(i) for i in range(len(source))] == [10, 8]
    assert np.array_equal(source.load(1), picture(1))


def test_dataset_fingerprint_survives_another_process():
    first, again = DatasetSource(Items(PIXELS, PIXELS)), DatasetSource(Items(PIXELS, PIXELS))
    # The default repr holds a memory address, which must not count.
    assert repr(first.dataset) != repr(again.dataset)
    assert first.fingerprint() == again.fingerprint()
    others = [Items(PIXELS), Items(PIXELS, picture(1)), Items((PIXELS, 1), PIXELS), Items(PIXELS, "broken")]
    assert len({DatasetSource(other).fingerprint() for other in others} | {first.fingerprint()}) == 5


def test_class_names_of_a_data_set():
    dataset = Items((PIXELS, 1))
    assert DatasetSource(dataset).class_names is None
    dataset.classes = ["cat", "dog"]
    assert DatasetSource(dataset).class_names == ["cat", "dog"]


def test_data_sets_that_cannot_serve():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([PIXELS])

    with pytest.raises(ImageError, match="Stream has no length"):
        open_source(Stream())
    with pytest.raises(ImageError, match="Items is empty"):
        open_source(Items())


# --- open_source ---


def test_missing_empty_and_unknown(tmp_path: Path):
    with pytest.raises(ImageError, match=r"nowhere does not exist \(give a folder of pictures, a .npy or"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=r"no pictures in .*looked in it and below for .bmp .gif .jpeg .jpg"):
        open_source(tmp_path)
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(ImageError, match=r"unknown ending '.h5' \(give a folder"):
        open_source(tmp_path / "x.h5")
    write(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="a single picture is no source: give its folder"):
        open_source(tmp_path / "x.jpg")


def test_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(open_source("~/photos")) == 5


# --- loading ---


@pytest.mark.parametrize("workers", [0, 3])
def test_load_keeps_order_and_lists_what_it_skips(folder: Path, workers: int):
    loaded = load_images(open_source(folder), [4, 2, 0], workers=workers)
    assert loaded.indices.dtype == np.int64
    assert loaded.indices.tolist() == [4, 0]
    for i, pixels in zip(loaded.indices, loaded.pictures, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), picture(int(i)))
    (skipped,) = loaded.skipped
    assert (skipped.index, skipped.name) == (2, "cat/deep/c.jpg")
    assert "cannot be decoded" in skipped.reason


def test_load_nothing(folder: Path):
    loaded = load_images(open_source(folder), np.array([], dtype=np.int64))
    assert (loaded.indices.tolist(), loaded.pictures, loaded.skipped) == ([], [], [])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(folder: Path, workers: int):
    batches = list(iter_batches(open_source(folder), np.array([0, 1, 3, 4, 2]), 2, workers=workers))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1], [3, 4], []]
    assert [len(batch.skipped) for batch in batches] == [0, 0, 1]
    assert all(pixels.dtype == torch.uint8 for batch in batches for pixels in batch.pictures)


class Recording(ArraySource):
    """Notes which pictures were decoded; picture 7 has a bug."""

    def __init__(self, n: int) -> None:
        super().__init__(np.zeros((n, 2, 2, 3), dtype=np.uint8))
        self.decoded: list[int] = []

    def load(self, index: int) -> np.ndarray:
        if index == 7:
            raise ZeroDivisionError("a bug, no damaged picture")
        self.decoded.append(index)
        return super().load(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_picture_is_decoded_once(workers: int):
    source = Recording(7)
    list(iter_batches(source, range(7), 3, workers=workers))
    assert sorted(source.decoded) == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_other_exceptions_pass(workers: int):
    before = threading.active_count()
    batches = iter_batches(Recording(20), range(20), 4, workers=workers)
    assert next(batches).indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(batches)
    assert threading.active_count() == before


def test_one_batch_is_decoded_ahead_and_no_more():
    source = Recording(7)
    batches = iter_batches(source, [0, 1, 2, 3, 4, 5], 2, workers=1)
    assert source.decoded == []
    next(batches)
    deadline = time.monotonic() + 5
    while len(source.decoded) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.decoded == [0, 1, 2, 3]
    batches.close()


def test_abandoned_generator_ends_its_threads():
    before = threading.active_count()
    batches = iter_batches(Recording(6), range(6), 2, workers=3)
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before


def test_bad_numbers(folder: Path):
    source = open_source(folder)
    with pytest.raises(ConfigError, match="batch_size is 0, expected at least 1"):
        iter_batches(source, [0], 0)
    with pytest.raises(ConfigError, match="workers is -1"):
        load_images(source, [0], workers=-1)


@pytest.mark.shared
def test_real_pictures(shared: Path):
    source = open_source(shared / "data" / "cifar10")
    assert len(source) == 10_000
    assert source.class_names == sorted(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    )
    assert [source.label(i) for i in (0, 999, 1000, 9999)] == [0, 0, 1, 9]
    loaded = load_images(source, [9999, 5], workers=2)
    assert [tuple(pixels.shape) for pixels in loaded.pictures] == [(3, 32, 32)] * 2
    file = Path(source.location) / source.describe(5)
    expected = np.asarray(Image.open(io.BytesIO(file.read_bytes())))
    assert np.array_equal(loaded.pictures[1].permute(1, 2, 0).numpy(), expected)
