"""Several processes that write one buffer: what they leave is what one alone leaves, byte for byte."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from usae_probe.buffer import ActivationBuffer, BufferWriter
from usae_probe.errors import BufferMismatchError, StageError
from usae_probe.files import json_sha256

from .buffers import content, fill, make_spec, process, write

N_SHARDS = 11


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(write(tmp_path_factory.mktemp("whole") / "acts").path)


def write_part(path: Path, size: int, done: list[int]) -> None:
    """What a job of `size` processes leaves that is killed when rank r has sealed `done[r]` shards."""
    with ExitStack() as stack:
        writers = [stack.enter_context(BufferWriter(path, make_spec(), rank=r, size=size)) for r in range(size)]
        for writer, n in zip(writers, done, strict=True):
            fill(writer, writer.pending()[:n])
    for name in ("shard-00010.h5.tmp", ".manifest.part-00001.json.tmp-47"):
        (path / name).write_bytes(b"half")


def go_on(path: Path, size: int) -> list[list[int]]:
    """Finish a buffer with `size` processes, the last first; return the shards that each wrote."""
    with ExitStack() as stack:
        writers = [stack.enter_context(BufferWriter(path, make_spec(), rank=r, size=size)) for r in range(size)]
        due = [[plan.index for plan in writer.pending()] for writer in writers]
        for writer in writers[::-1]:
            fill(writer, writer.pending())
        assert writers[0].close().complete
    return due


def sealed_at(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in sorted(path.glob("shard-*.h5"))}


# --- together ---


@pytest.mark.parametrize(("size", "shares"), [(2, [6, 5]), (3, [4, 4, 3]), (12, [1] * 11 + [0])])
def test_several_write_what_one_writes(tmp_path: Path, whole: dict[str, bytes], size: int, shares: list[int]) -> None:
    due = go_on(tmp_path, size)
    assert [len(share) for share in due] == shares
    assert sorted(index for share in due for index in share) == list(range(N_SHARDS))
    assert content(tmp_path) == whole


def test_real_processes_write_what_one_writes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """This one and two others, at the same time."""
    path = tmp_path / "acts"
    with BufferWriter(path, make_spec(), size=3) as writer:
        with process("write", path, "1", "3") as one, process("write", path, "2", "3") as two:
            fill(writer, writer.pending())
            assert [other.communicate(timeout=60)[0] for other in (one, two)] == ["", ""]
            assert one.returncode == two.returncode == 0
        assert writer.close().verify() == []
    assert content(path) == whole


def test_what_each_has_to_do(tmp_path: Path) -> None:
    with BufferWriter(tmp_path, make_spec(), size=2) as writer:
        other = BufferWriter(tmp_path, make_spec(), rank=1, size=2)
        assert [plan.index for plan in writer.pending()] == [0, 2, 4, 6, 8, 10]
        assert [plan.index for plan in other.pending()] == [1, 3, 5, 7, 9]
        # shards of 4, 2 | 4, 4 | 4, 4, 4, 4, 4, 4, 2 images
        assert (writer.n_images, other.n_images) == (4 + 4 + 4 + 4 + 4 + 2, 2 + 4 + 4 + 4 + 4)
        fill(other, other.pending()[:2])
        assert (writer.images_done, other.images_done) == (0, 6)
        assert [plan.index for plan in other.pending()] == [5, 7, 9]
        assert ActivationBuffer(tmp_path).shards == []  # until process 0 says so


def test_process_0_comes_first(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"process 1 of 2 finds no buffer in .*acts \(process 0 has to make it"):
        BufferWriter(tmp_path / "acts", make_spec(), rank=1, size=2)
    assert not (tmp_path / "acts").exists()
    with BufferWriter(tmp_path / "acts", make_spec(), size=2):
        BufferWriter(tmp_path / "acts", make_spec(), rank=1, size=2)  # takes no lock
        with pytest.raises(BufferMismatchError, match="dtype"):
            BufferWriter(tmp_path / "acts", make_spec(dtype="float32"), rank=1, size=2)


def test_process_0_cannot_close_before_the_others_are_done(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with BufferWriter(tmp_path, make_spec(), size=2) as writer:
        other = BufferWriter(tmp_path, make_spec(), rank=1, size=2)
        fill(other, other.pending()[:2])
        fill(writer, writer.pending())
        with pytest.raises(StageError, match="still lacks 3 of 11 shards"):
            writer.close()
        assert [entry.index for entry in ActivationBuffer(tmp_path).shards] == [0, 1, 2, 3, 4, 6, 8, 10]
        fill(other, other.pending())
        writer.close()
    assert content(tmp_path) == whole


# --- killed, and gone on with ---


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("done", [[0, 0], [2, 0], [0, 3], [3, 1], [6, 4], [6, 5]])
def test_a_killed_job_is_gone_on_with(tmp_path: Path, whole: dict[str, bytes], size: int, done: list[int]) -> None:
    write_part(tmp_path, 2, done)
    before = sealed_at(tmp_path)
    assert len(before) == sum(done)
    due = go_on(tmp_path, size)
    assert sum(map(len, due)) == N_SHARDS - sum(done)
    assert content(tmp_path) == whole
    assert before.items() <= sealed_at(tmp_path).items()  # what was sealed was not written again


def test_jobs_of_many_sizes_one_after_the_other(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write_part(tmp_path, 3, [1, 0, 2])
    write_part(tmp_path, 1, [1])
    write_part(tmp_path, 2, [0, 2])
    write_part(tmp_path, 1, [2])
    before = sealed_at(tmp_path)
    assert len(before) == 8
    go_on(tmp_path, 3)
    assert content(tmp_path) == whole
    assert before.items() <= sealed_at(tmp_path).items()


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "changed": lambda text: text.replace('"rows": 4', '"rows": 3', 1),
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "of another schema": lambda text: signed(json.loads(text) | {"schema": 1}),
    "of another buffer": lambda text: signed(json.loads(text) | {"identity": "0" * 64}),
    "with a foreign file": lambda text: signed(json.loads(text.replace("shard-00001.h5", "../../etc/passwd"))),
}


def signed(document: dict[str, object]) -> str:
    document.pop("sha256", None)
    return json.dumps(document | {"sha256": json_sha256(document)})


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("size", [1, 2])
def test_a_damaged_part_costs_its_shards_alone(tmp_path: Path, whole: dict[str, bytes], what: str, size: int) -> None:
    write_part(tmp_path, 2, [3, 3])
    part = tmp_path / "manifest.part-00001.json"
    text = part.read_text()
    part.write_text(DAMAGE[what](text))
    assert part.read_text() != text
    before = sealed_at(tmp_path)
    due = go_on(tmp_path, size)
    assert sorted(index for share in due for index in share) == [1, 3, 5, 6, 7, 8, 9, 10]
    after = sealed_at(tmp_path)
    assert [name for name in before if after[name] == before[name]] == [f"shard-0000{i}.h5" for i in (0, 2, 4)]
    assert content(tmp_path) == whole


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_buffer_that_is_gone_are_none_of_the_next(
    tmp_path: Path, whole: dict[str, bytes], size: int
) -> None:
    """The manifest and shards of a killed job were removed, its parts were not."""
    write_part(tmp_path, 3, [2, 2, 2])
    for file in (tmp_path / "manifest.json", *tmp_path.glob("shard-*")):
        file.unlink()
    write_part(tmp_path, size, [1] * size)
    go_on(tmp_path, size)
    assert len(ActivationBuffer(tmp_path).shards) == N_SHARDS
    assert content(tmp_path) == whole


def test_a_shard_in_two_parts_counts_once(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write_part(tmp_path, 2, [3, 3])
    parts = [tmp_path / f"manifest.part-0000{rank}.json" for rank in (1, 2)]
    parts[1].write_bytes(parts[0].read_bytes())
    go_on(tmp_path, 2)
    assert len(ActivationBuffer(tmp_path).shards) == N_SHARDS
    assert content(tmp_path) == whole
