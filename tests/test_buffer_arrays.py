"""`ActivationBuffer.from_arrays`: activations that were computed elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.buffer import ActivationBuffer
from usae_probe.errors import BufferMismatchError, ConfigError, NonFiniteError, PrecisionError, SiteError, UsageError
from usae_probe.split import SPLITS, draw_split


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
