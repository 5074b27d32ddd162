"""`ActivationBuffer.from_arrays` and `from_npz`: activations that were computed elsewhere."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.buffer import ActivationBuffer
from usae_probe.errors import BufferMismatchError, ConfigError, NonFiniteError, PrecisionError, SiteError, UsageError
from usae_probe.split import SPLITS, draw_split

from .buffers import content


def arrays(n: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"vit/blocks.11@cls": rng.normal(size=(n, 5)), "resnet/layer4": rng.normal(size=(n, 3)).astype(np.float32)}


def test_row_i_is_image_i(tmp_path: Path) -> None:
    given_arrays = arrays()
    buffer = ActivationBuffer.from_arrays(given_arrays, tmp_path / "acts", seed=4, shard_images=7)
    expected = draw_split(30, seed=4)
    for split in SPLITS:
        rows = buffer.read(split)
        np.testing.assert_array_equal(rows.image_index, expected[split])
        for site, values in given_arrays.items():
            stored = values[rows.image_index].astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(rows.values[site], stored)
    assert buffer.specs["vit/blocks.11@cls"].layer == "blocks.11"
    assert buffer.specs["vit/blocks.11@cls"].policy == "cls"
    assert buffer.specs["resnet/layer4"].policy == "pool"
    assert buffer.source["kind"] == "arrays"
    assert buffer.source["n_images"] == 30
    assert buffer.split_request == {"limit": None, "holdout": 0.1, "validation": 0.1, "seed": 4}
    assert (buffer.complete, buffer.dtype, buffer.verify()) == (True, "float16", [])


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 9), min_size=12, max_size=60), st.integers(1, 5), st.integers(0, 99))
def test_images_with_several_rows_stay_whole(
    tmp_path_factory: pytest.TempPathFactory, index: list[int], shard_images: int, seed: int
) -> None:
    index_array = np.array([*index, 3, 8, 1])  # at least three images
    rows = np.arange(len(index_array), dtype=np.float32)[:, None]
    out = tmp_path_factory.mktemp("several")
    buffer = ActivationBuffer.from_arrays(
        {"m/a": rows, "n/b": -rows}, out, image_index=index_array, seed=seed, shard_images=shard_images, dtype="float32"
    )
    seen: list[int] = []
    for split in SPLITS:
        read = buffer.read(split)
        np.testing.assert_array_equal(read.values["m/a"], -read.values["n/b"])
        numbers = read.values["m/a"][:, 0].astype(int)
        np.testing.assert_array_equal(index_array[numbers], read.image_index)
        for image in dict.fromkeys(read.image_index.tolist()):
            own = np.flatnonzero(read.image_index == image)
            assert own.tolist() == list(range(own[0], own[0] + len(own)))  # together
            assert numbers[own].tolist() == np.flatnonzero(index_array == image).tolist()  # whole, in order
            assert read.token_index[own].tolist() == list(range(len(own)))
            seen.append(image)
    assert sorted(seen) == sorted(set(index_array.tolist()))  # every image in one split only


def test_equal_counts_are_kept_in_the_spec(tmp_path: Path) -> None:
    values = {"m/a@patch": np.ones((24, 2))}
    even = ActivationBuffer.from_arrays(values, tmp_path / "even", image_index=np.tile(np.arange(6), 4))
    uneven = ActivationBuffer.from_arrays(values, tmp_path / "uneven", image_index=np.r_[0, 0, 1:23])
    assert even.specs["m/a@patch"].rows_per_image == 4
    assert uneven.specs["m/a@patch"].rows_per_image == 0


def test_same_content_is_opened_other_content_refused(tmp_path: Path) -> None:
    first = ActivationBuffer.from_arrays(arrays(), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    again = ActivationBuffer.from_arrays(arrays(), tmp_path)
    assert again.identity == first.identity
    for change in ({"arrays": arrays(seed=1)}, {"image_index": np.arange(30)[::-1]}, {"seed": 1}, {"dtype": "float32"}):
        options = {"arrays": arrays(), "out": tmp_path} | change
        with pytest.raises(BufferMismatchError, match=r"on disk, .* asked for"):
            ActivationBuffer.from_arrays(**options)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_anything_like_an_array_is_taken(tmp_path: Path) -> None:
    buffer = ActivationBuffer.from_arrays({"m/a": [[1, 2], [3, 4], [5, 6]], "m/b": np.ones((3, 8))[:, ::2]}, tmp_path)
    assert buffer.d_in == {"m/a": 2, "m/b": 4}
    read = np.concatenate([buffer.read(split).values["m/a"] for split in SPLITS])
    assert sorted(read.tolist()) == [[1, 2], [3, 4], [5, 6]]


def test_arrays_that_cannot_be_a_buffer(tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, values: dict, **options: object) -> None:
        with pytest.raises(error, match=message):
            ActivationBuffer.from_arrays(values, tmp_path / "acts", **options)

    refused(SiteError, "given no array", {})
    refused(SiteError, "'layer4' is no site key", {"layer4": np.ones((4, 2))})
    refused(UsageError, r"m/a: 4, m/b: 5", {"m/a": np.ones((4, 2)), "m/b": np.ones((5, 2))})
    refused(UsageError, r"m/a: an array \[n, d\] .* not float64 \[4\]", {"m/a": np.ones(4)})
    refused(UsageError, r"not <U1 \[1, 1\]", {"m/a": np.array([["x"]])})
    two = {"m/a": np.ones((2, 2))}
    refused(UsageError, r"image_index must be 2 integers from 0, not int64 \[3\]", two, image_index=[0, 1, 2])
    refused(UsageError, "image_index must be", two, image_index=[-1, 2])
    refused(UsageError, r"image_index must be .* not float64", two, image_index=[0.0, 1.0])
    refused(ConfigError, "leave none for training", {"m/a": np.ones((0, 2))})
    refused(NonFiniteError, "layer 'a' of model 'm' gave nan for image 2", {"m/a": np.array([[1.0], [1.0], [np.nan]])})
    refused(PrecisionError, r"m/a: 1e\+06 in dimension 0 for image 1 .*dtype", {"m/a": np.array([[1.0], [1e6], [1.0]])})
    assert not (tmp_path / "acts").exists()  # nothing is left in the way
    values = {"m/a": np.array([[1.0], [1e6], [1.0]])}
    assert ActivationBuffer.from_arrays(values, tmp_path / "acts", dtype="float32").complete


# --- from a file ---


def test_an_npz_file_gives_what_its_arrays_give(tmp_path: Path) -> None:
    given_arrays, index = arrays(), np.arange(30) // 2
    np.savez(tmp_path / "plain.npz", **given_arrays)
    np.savez_compressed(tmp_path / "indexed.npz", image_index=index, **given_arrays)
    settings: dict[str, Any] = {"seed": 4, "holdout": 0.2, "shard_images": 7, "dtype": "float32"}
    expected = ActivationBuffer.from_arrays(given_arrays, tmp_path / "a", **settings)
    plain = ActivationBuffer.from_npz(tmp_path / "plain.npz", tmp_path / "b", **settings)
    assert plain.sites == ["vit/blocks.11@cls", "resnet/layer4"]  # keys with a slash
    assert content(plain.path) == content(expected.path)
    expected = ActivationBuffer.from_arrays(given_arrays, tmp_path / "c", image_index=index, **settings)
    indexed = ActivationBuffer.from_npz(str(tmp_path / "indexed.npz"), str(tmp_path / "d"), **settings)
    assert content(indexed.path) == content(expected.path)
    assert indexed.specs["resnet/layer4"].rows_per_image == 2
    assert "image_index" not in indexed.sites
    before = content(indexed.path)
    assert ActivationBuffer.from_npz(tmp_path / "indexed.npz", tmp_path / "d", **settings).complete
    assert content(indexed.path) == before


class Fires:
    """What unpickling it would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("fired"),)


def test_a_pickled_object_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Fires()], dtype=object)
    np.savez("objects.npz", **{"m/a": np.ones((4, 2)), "m/b": objects})
    Path("pickle.npz").write_bytes(pickle.dumps(objects))
    for name in ("objects.npz", "pickle.npz"):
        with pytest.raises(UsageError, match=rf"'{name}' cannot be read as \.npz: .*allow_pickle=") as caught:
            ActivationBuffer.from_npz(name, "acts")
        assert "without pickled objects" in caught.value.hint
    assert not Path("fired").exists()
    assert not Path("acts").exists()


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", **{"m/a": np.random.default_rng(0).normal(size=(40, 9))})
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.ones((4, 2)))
    files = {
        "text.npz": b"model/layer,1,2,3",
        "empty.npz": b"",
        "cut.npz": whole[:-40],
        "flipped.npz": whole[:1000] + bytes([whole[1000] ^ 0xFF]) + whole[1001:],
        "stored.npz": whole[:100] + bytes(800) + whole[900:],
        "array.npz": (tmp_path / "array.npy").read_bytes(),
    }
    for name, read in files.items():
        (tmp_path / name).write_bytes(read)
    (tmp_path / "folder.npz").mkdir()
    for name in (*files, "folder.npz", "absent.npz"):
        with pytest.raises(UsageError, match=rf"'.*{name}' cannot be read as \.npz: .+\(write it with np\.savez"):
            ActivationBuffer.from_npz(tmp_path / name, tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_arrays_of_a_file_are_checked_as_any(tmp_path: Path) -> None:
    for error, message, values in (
        (SiteError, "'layer4' is no site key", {"layer4": np.ones((4, 2))}),
        (SiteError, "given no array", {"image_index": np.arange(4)}),
        (UsageError, "image_index must be 4 integers", {"m/a": np.ones((4, 2)), "image_index": np.arange(5)}),
        (UsageError, "m/a: 4, m/b: 5", {"m/a": np.ones((4, 2)), "m/b": np.ones((5, 2))}),
    ):
        np.savez(tmp_path / "x.npz", **values)
        with pytest.raises(error, match=message):
            ActivationBuffer.from_npz(tmp_path / "x.npz", tmp_path / "acts")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("m/a.txt", "no array")
    with pytest.raises(UsageError, match=r"m/a\.txt: an array \[n, d\] of numbers is expected"):
        ActivationBuffer.from_npz(tmp_path / "x.npz", tmp_path / "acts")
