"""`buffer.h5`: the whole buffer for any tool that reads HDF5, without a copy of its rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from usae_probe.buffer import ActivationBuffer, BufferWriter
from usae_probe.errors import BufferIntegrityError
from usae_probe.split import SPLITS

from .buffers import SITES, content, fill, make_spec, rows_of, write

NAMES = {site: site.replace("/", "__") for site in SITES}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("made") / "acts").path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "acts"))


def demand_equal(path: Path) -> None:
    """What plain h5py reads is what we read, in the stored dtype."""
    buffer = ActivationBuffer(path)
    with h5py.File(path / "buffer.h5", "r") as file:
        assert set(file) == set(SPLITS)
        for split in SPLITS:
            rows, group = buffer.read(split), file[split]
            assert set(group) == {*NAMES.values(), "image_index", "token_index"}
            for site, values in rows.values.items():
                assert group[NAMES[site]].dtype == buffer.dtype
                assert group[NAMES[site]].attrs["column"] == site
                np.testing.assert_array_equal(group[NAMES[site]][:], values.astype(buffer.dtype))
            for column, values in (("image_index", rows.image_index), ("token_index", rows.token_index)):
                assert group[column].dtype == values.dtype
                np.testing.assert_array_equal(group[column][:], values)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_plain_h5py_reads_what_we_read(tmp_path: Path, dtype: str) -> None:
    buffer = write(tmp_path / "acts", make_spec(dtype=dtype))
    demand_equal(buffer.path)
    with h5py.File(buffer.path / "buffer.h5", "r") as file:
        train = file["train/vit__blocks.8"]
        assert train.shape == (26, 6)
        expected = rows_of(make_spec().split.train)["vit/blocks.8"].astype(dtype)
        np.testing.assert_array_equal(train[:], expected)  # from the images, with nothing of ours between
        np.testing.assert_array_equal(train[3:9, 1:3], expected[3:9, 1:3])  # over the end of a shard
        assert train.is_virtual


def test_it_holds_no_rows(tmp_path: Path) -> None:
    """Ten times the width and the same size: names of files and counts of rows alone."""
    sizes = []
    for width in (100, 1000):
        path = tmp_path / str(width)
        ActivationBuffer.from_arrays({"m/a": np.ones((300, width))}, path, shard_images=30)
        sizes.append((path / "buffer.h5").stat().st_size)
    assert sizes[0] == sizes[1] < 300 * 100 * 2


def test_it_moves_with_the_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "else" / "where").mkdir(parents=True)
    moved = Path(shutil.move(path, tmp_path / "else" / "where" / "renamed"))
    assert not path.exists()
    demand_equal(moved)
    monkeypatch.chdir(tmp_path / "else")
    demand_equal(Path("where/renamed"))
    monkeypatch.chdir(moved)
    demand_equal(Path())


def test_another_process_reads_it_too(path: Path, tmp_path: Path) -> None:
    code = "import h5py, sys; print(h5py.File(sys.argv[1])['holdout/image_index'][:].tolist())"
    command = [sys.executable, "-c", code, str(path / "buffer.h5")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(make_spec().split.holdout.tolist())


def test_a_missing_shard_is_nan_there_and_an_error_here(path: Path) -> None:
    buffer = ActivationBuffer(path)
    first, gone, *_ = (entry for entry in buffer.shards if entry.split == "train")
    before = buffer.read("train")
    (path / gone.file).unlink()
    with pytest.raises(BufferIntegrityError, match=rf"{gone.file} is damaged .*missing"):
        ActivationBuffer(path).read("train")
    lost = np.arange(first.rows, first.rows + gone.rows)
    with h5py.File(path / "buffer.h5", "r") as file:
        for site, values in before.values.items():
            read = file["train"][NAMES[site]][:]
            assert np.isnan(read[lost]).all()
            np.testing.assert_array_equal(np.delete(read, lost, 0), np.delete(values, lost, 0).astype("f2"))
        for column in ("image_index", "token_index"):
            read = file["train"][column][:]
            assert (read[lost] == -1).all()
            assert (np.delete(read, lost) >= 0).all()
        assert not np.isnan(file["holdout/vit__blocks.8"][:]).any()


def test_splits_without_rows_have_none_there(tmp_path: Path) -> None:
    arrays = {"m/a": np.ones((12, 3)), "n/b": np.ones((12, 2))}
    buffer = ActivationBuffer.from_arrays(arrays, tmp_path, holdout=0.0, validation=0.0, shard_images=5)
    with h5py.File(tmp_path / "buffer.h5", "r") as file:
        for split, n in (("train", 12), ("validation", 0), ("holdout", 0)):
            shapes = {name: file[split][name].shape for name in file[split]}
            assert shapes == {"m__a": (n, 3), "n__b": (n, 2), "image_index": (n,), "token_index": (n,)}
            assert len(file[split]["m__a"][:]) == len(file[split]["image_index"][:]) == buffer.n_rows(split) == n


def test_a_shard_without_rows_takes_no_place(tmp_path: Path) -> None:
    spec = make_spec()
    with BufferWriter(tmp_path, spec) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                images = plan.images if plan.start else plan.images[:0]  # of each split the first has none
                for image in np.setdiff1d(plan.images, images):
                    shard.skip(int(image), "x", "y")
                shard.append(images, rows_of(images))
        writer.close()
    demand_equal(tmp_path)
    with h5py.File(tmp_path / "buffer.h5", "r") as file:
        assert file["train/image_index"][:].tolist() == spec.split.train[4:].tolist()


def test_it_is_there_once_the_buffer_is_complete(tmp_path: Path) -> None:
    with BufferWriter(tmp_path, make_spec()) as writer:
        fill(writer, writer.pending())
        assert not (tmp_path / "buffer.h5").exists()
        writer.close()
        assert (tmp_path / "buffer.h5").exists()


def test_equal_buffers_have_equal_bytes(made: Path, tmp_path: Path) -> None:
    """Also when they are written at other times, elsewhere, in pieces, or by several processes."""
    time.sleep(1.1)  # HDF5 would count seconds
    again, pieces, together = (tmp_path / name for name in ("again", "pieces", "together"))
    write(again)
    with BufferWriter(pieces, make_spec()) as writer:
        fill(writer, writer.pending()[:3])
    write(pieces)
    with BufferWriter(together, make_spec(), size=2) as writer:
        with BufferWriter(together, make_spec(), rank=1, size=2) as other:
            fill(other, other.pending())
        fill(writer, writer.pending())
        writer.close()
    for path in (again, pieces, together):
        assert content(path)["buffer.h5"] == content(made)["buffer.h5"]
        demand_equal(path)
