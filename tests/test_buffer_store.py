"""Reading: damage is an error and never a number, and every way to read gives the same rows."""

import json
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.buffer import ActivationBuffer, Rows, reader
from usae_probe.errors import BufferIntegrityError, SiteError, UsageError
from usae_probe.files import json_sha256
from usae_probe.split import SPLITS

from .buffers import as_schema_1

VIT, RESNET = "vit/blocks.8@mean", "resnet/layer4"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images in shards of 9: 36 training rows in four shards, 4 validation, 10 holdout in two."""
    rng = np.random.default_rng(0)
    arrays = {VIT: rng.normal(size=(50, 6)), RESNET: rng.normal(size=(50, 4))}
    path = tmp_path_factory.mktemp("made") / "acts"
    ActivationBuffer.from_arrays(arrays, path, holdout=0.2, shard_images=9)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "acts"))


@pytest.fixture
def shard(path: Path) -> Path:
    """The second training shard: rows 9 to 17."""
    return path / training_shards(path)[1]


def training_shards(path: Path) -> list[str]:
    return [entry.file for entry in ActivationBuffer(path).shards if entry.split == "train"]


def same(left: Rows, right: Rows) -> bool:
    pairs = [(left.image_index, right.image_index), (left.token_index, right.token_index)]
    pairs += [(left.values[site], right.values[site]) for site in {*left.values, *right.values}]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 0x10
    file.write_bytes(content)


def place_of(file: Path, dataset: str) -> int:
    with h5py.File(file, "r") as opened:
        return opened[dataset].id.get_offset()


def test_a_memory_map_at_the_offset_is_the_dataset(made: Path) -> None:
    rows = ActivationBuffer(made).read("train")
    start = 0
    for file in training_shards(made):
        with h5py.File(made / file, "r") as opened:  # plain h5py, no help from us
            for site in (VIT, RESNET):
                dataset = opened[site.replace("/", "__")]
                mapped = np.memmap(made / file, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
                np.testing.assert_array_equal(mapped, dataset[:])
                np.testing.assert_array_equal(rows.values[site][start : start + len(mapped)], dataset[:].astype("f4"))
        start += len(mapped)
    assert start == rows.n == 36


def test_a_flipped_bit_is_an_error_that_names_shard_and_site(path: Path, shard: Path) -> None:
    flip(shard, place_of(shard, "resnet__layer4") + 5)
    buffer = ActivationBuffer(path)
    assert buffer.read("train", [VIT]).n == 36  # the other site is sound
    for read in (
        lambda: buffer.read("train"),
        lambda: list(buffer.chunks("train", 10)),
        lambda: buffer.gather("train", np.array([10]), [RESNET]),
        lambda: next(buffer.batches("train", 5, seed=0)),
        lambda: ActivationBuffer(path, memory_budget=0).gather("train", np.array([10])),
    ):
        with pytest.raises(
            BufferIntegrityError, match=rf"{shard.name} is damaged \({RESNET}\): its CRC32 .*harvest again"
        ):
            read()
    assert ActivationBuffer(path, memory_budget=0).gather("train", np.array([0, 20])).n == 2  # other shards are sound
    [problem] = buffer.verify()
    assert shard.name in problem
    assert RESNET in problem
    assert ActivationBuffer(path, verify="never").read("train").n == 36


def test_damage_to_the_moments_of_a_shard_is_found_and_named(path: Path, shard: Path) -> None:
    flip(shard, place_of(shard, "moments/resnet__layer4") + 5)
    buffer = ActivationBuffer(path, verify="always")
    assert buffer.read("train").n == 36  # its rows are sound
    [problem] = buffer.verify()
    assert f"{shard.name} is damaged (moments:{RESNET}): its CRC32" in problem


def test_when_bytes_are_verified(path: Path, shard: Path) -> None:
    first = ActivationBuffer(path, memory_budget=0)
    always = ActivationBuffer(path, verify="always")
    for buffer in (first, always):
        buffer.gather("train", np.array([10]))
    with open(shard, "rb+") as file:  # in place: the maps see it
        file.seek(place_of(shard, "resnet__layer4") + 5)
        file.write(b"\xff\xff")
    assert first.gather("train", np.array([10])).n == 1
    with pytest.raises(BufferIntegrityError, match=RESNET):
        always.gather("train", np.array([10]))


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_a_truncated_shard_is_an_error(path: Path, shard: Path, cut: int) -> None:
    os.truncate(shard, shard.stat().st_size - cut)
    with pytest.raises(BufferIntegrityError, match=rf"{shard.name} .*{VIT}, {RESNET}.* bytes where the manifest says"):
        ActivationBuffer(path).read("train")
    assert ActivationBuffer(path).read("holdout").n == 10


def test_a_deleted_shard_is_an_error(path: Path, shard: Path) -> None:
    (shard).unlink()
    buffer = ActivationBuffer(path)
    with pytest.raises(BufferIntegrityError, match=rf"{shard.name} .*{VIT}, {RESNET}.*missing.*restore"):
        buffer.read("train")
    assert len(buffer.verify()) == 1


def test_a_link_out_of_the_folder_is_refused_and_others_are_not(path: Path, shard: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.h5"
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)
    with pytest.raises(BufferIntegrityError, match=r"is a link out of the buffer, to .*elsewhere.h5"):
        ActivationBuffer(path).read("train")
    shard.unlink()
    shutil.move(elsewhere, path / "beside.h5")
    shard.symlink_to("beside.h5")
    (tmp_path / "linked").symlink_to(path, target_is_directory=True)
    assert ActivationBuffer(tmp_path / "linked").read("train").n == 36


@pytest.mark.parametrize(
    "name", ["../shard-00001.h5", "/etc/passwd", "shard-00001.h5/../x", "shard-1.h5", "shard-٠٠٠٠١.h5"]
)
def test_a_manifest_cannot_name_files_elsewhere(path: Path, name: str) -> None:
    document = json.loads((path / "manifest.json").read_text())
    document["shards"][1]["file"] = name
    document.pop("sha256")
    (path / "manifest.json").write_text(json.dumps(document | {"sha256": json_sha256(document)}))
    with pytest.raises(BufferIntegrityError, match="is no name of a shard"):
        ActivationBuffer(path)


def test_shards_that_changed_places_are_an_error(path: Path, shard: Path) -> None:
    other, aside = path / training_shards(path)[2], path / "aside"
    for old, new in ((shard, aside), (other, shard), (aside, other)):
        old.rename(new)
    with pytest.raises(BufferIntegrityError, match="CRC32"):
        ActivationBuffer(path).read("train", [VIT])


def test_a_file_of_another_shape_is_an_error(path: Path, shard: Path) -> None:
    size = shard.stat().st_size
    with h5py.File(shard, "w", libver="v110") as file:
        for name, shape in (("vit__blocks.8@mean", (9, 5)), ("resnet__layer4", (9, 4)), ("image_index", (9,))):
            file.create_dataset(name, data=np.zeros(shape, "f2"))
        file.create_dataset("token_index", data=np.zeros(9, "i4"))
        for name in ("moments/vit__blocks.8@mean", "moments/resnet__layer4"):
            file.create_dataset(name, data=np.zeros((2, 4)))
    assert shard.stat().st_size <= size
    os.truncate(shard, size)  # longer, with zeros that HDF5 overlooks
    with pytest.raises(BufferIntegrityError, match=r"float16 \[9, 5\] at byte \d+ .* says float16 \[9, 6\]"):
        ActivationBuffer(path).read("train", [VIT])


def test_no_flipped_byte_of_a_shard_changes_a_number(path: Path, shard: Path) -> None:
    sound = ActivationBuffer(path).read("train")
    refused = 0
    for byte in range(0, shard.stat().st_size, 13):
        flip(shard, byte)
        try:
            read = ActivationBuffer(path).read("train")
        except BufferIntegrityError:
            refused += 1
        else:
            assert same(read, sound)  # a byte that nothing uses
        flip(shard, byte)
    assert refused > 50


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_no_flipped_byte_of_the_manifest_passes(
    made: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "manifest-only"
    path.mkdir(exist_ok=True)
    shutil.copy(made / "manifest.json", path)
    document = json.loads((path / "manifest.json").read_text())
    flip(path / "manifest.json", data.draw(st.integers(0, (path / "manifest.json").stat().st_size - 2)))
    try:
        ActivationBuffer(path)
    except BufferIntegrityError:
        return
    assert json.loads((path / "manifest.json").read_text()) == document  # white space


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"schema": 1}', '{"schema": "x"}', "\xff\xfe"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BufferIntegrityError, match=r"manifest\.json is damaged"):
        ActivationBuffer(tmp_path)


def test_a_newer_schema_says_so(path: Path) -> None:
    document = json.loads((path / "manifest.json").read_text()) | {"schema": 3, "sha256": "of another kind"}
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BufferIntegrityError, match=r"schema 3; this version of usae-probe reads .* up to 2 \(upgrade"):
        ActivationBuffer(path)


def test_a_complete_buffer_of_schema_1_reads_as_it_did(path: Path) -> None:
    before = {split: ActivationBuffer(path).read(split) for split in SPLITS}
    moments = ActivationBuffer(path).moments(VIT).to_dict()
    as_schema_1(path)
    assert json.loads((path / "manifest.json").read_text())["schema"] == 1
    buffer = ActivationBuffer(path)
    assert (buffer.complete, buffer.verify()) == (True, [])
    assert [entry.split for entry in buffer.shards] == ["train"] * 4 + ["validation"] + ["holdout"] * 2
    assert all(same(buffer.read(split), rows) for split, rows in before.items())
    assert same(buffer.gather("train", np.arange(36)), before["train"])
    assert buffer.moments(VIT).to_dict() == moments


def test_a_folder_that_is_no_buffer(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BufferIntegrityError, match=r"is no buffer: it has no manifest\.json"):
            ActivationBuffer(path)


def test_what_is_asked_for_must_exist(made: Path) -> None:
    buffer = ActivationBuffer(made)
    with pytest.raises(SiteError, match=r"no site 'resnet/layer3' .*did you mean 'resnet/layer4'"):
        buffer.read("train", ["resnet/layer3"])
    with pytest.raises(SiteError, match="no site"):
        buffer.moments("x/y")
    with pytest.raises(UsageError, match=r"'test' is no split .*train, validation, holdout"):
        buffer.n_images("test")
    with pytest.raises(UsageError, match="did you mean 'holdout'"):
        buffer.read("hold-out")
    for rows in ([-1], [0, 36], [[0]]):
        with pytest.raises(UsageError, match=r"do not lie in 0 … 35 of 'train'"):
            buffer.gather("train", np.array(rows))
    with pytest.raises(UsageError, match="size must be at least 1"):
        buffer.chunks("train", 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.lists(st.integers(0, 35), max_size=60), st.booleans(), st.booleans())
def test_every_way_to_read_gives_the_same_rows(made: Path, size: int, rows: list[int], small: bool, one: bool) -> None:
    buffer = ActivationBuffer(made, memory_budget=0 if small else 2**30)
    sites = [RESNET] if one else None
    whole = buffer.read("train", sites)
    pieces = list(buffer.chunks("train", size, sites))
    assert [piece.n for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    for name in whole.values:
        np.testing.assert_array_equal(np.concatenate([piece.values[name] for piece in pieces]), whole.values[name])
    np.testing.assert_array_equal(np.concatenate([piece.image_index for piece in pieces]), whole.image_index)
    wanted = np.array(rows, dtype=np.int64)
    expected = Rows(
        {site: values[wanted] for site, values in whole.values.items()},
        whole.image_index[wanted],
        whole.token_index[wanted],
    )
    assert same(buffer.gather("train", wanted, sites), expected)


def test_rows_are_copies(made: Path) -> None:
    for budget in (0, 2**30):
        buffer = ActivationBuffer(made, memory_budget=budget)
        for read in (lambda: buffer.read("train"), lambda: buffer.gather("train", np.arange(36))):  # noqa: B023
            before = read()
            before.values[VIT][:] = 7
            before.image_index[:] = 7
            assert not (read().values[VIT] == 7).any()
            assert len(set(read().image_index)) == 36


def test_no_image_is_in_two_splits(made: Path) -> None:
    buffer = ActivationBuffer(made)
    images = [set(buffer.read(split).image_index.tolist()) for split in ("train", "validation", "holdout")]
    assert [len(part) for part in images] == [36, 4, 10]
    assert set.union(*images) == set(range(50))


def test_maps_are_bounded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every map keeps a file descriptor, and a large buffer has more shards than a process may have of those."""
    monkeypatch.setattr(reader, "_MAPPED", 2)
    before = len(os.listdir("/proc/self/fd"))
    buffer = ActivationBuffer(made, memory_budget=0)
    for rows in (np.arange(36), np.array([35, 0, 20])):
        expected = ActivationBuffer(made).gather("train", rows)
        assert same(buffer.gather("train", rows), expected)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_no_handle_stays_open_and_a_fork_or_a_pickle_reads_on(made: Path) -> None:
    buffer = ActivationBuffer(made, memory_budget=0)
    whole = buffer.read("train")
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0
    child = os.fork()
    if child == 0:
        os._exit(0 if same(buffer.read("train"), whole) and buffer.verify() == [] else 1)
    assert os.waitpid(child, 0)[1] == 0
    pickled = pickle.dumps(buffer)
    assert len(pickled) < 20_000
    assert same(pickle.loads(pickled).read("train"), whole)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_reads_on_although_another_thread_was_reading(made: Path) -> None:
    """As when a data loader forks while `batches(workers=…)` reads ahead: no thread of it is in the child."""
    buffer = ActivationBuffer(made, memory_budget=0)
    reading, done = threading.Event(), threading.Event()

    def read_slowly() -> None:
        with buffer._reader._lock:
            reading.set()
            done.wait(60)

    thread = threading.Thread(target=read_slowly)
    thread.start()
    reading.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        try:
            os._exit(0 if buffer.gather("train", np.arange(9)).n == 9 else 1)
        finally:
            os._exit(2)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
