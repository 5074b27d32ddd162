"""One writer per buffer: others are told who writes, and the lock is free again however its holder ended."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

import usae_probe.buffer.writer as writer_module
from usae_probe.buffer import ActivationBuffer, BufferWriter, discard_buffer
from usae_probe.errors import BufferMismatchError, FolderLockedError, UsaeProbeError
from usae_probe.lock import FolderLock

from .buffers import content, fill, make_spec, process, write

LOCK, HOLDER = ".writer.lock", ".writer.json"


def demand_free(path: Path) -> None:
    with BufferWriter(path, make_spec()) as writer:
        assert (path / HOLDER).exists()
        assert writer.pending()


def demand_taken(path: Path, pid: int) -> None:
    before = content(path)
    with pytest.raises(FolderLockedError, match=rf"acts is being written by process {pid} on \S+ \(wait until"):
        BufferWriter(path, make_spec())
    assert content(path) == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A buffer that lacks all but its first shard."""
    path = tmp_path / "acts"
    with BufferWriter(path, make_spec()) as writer:
        fill(writer, writer.pending()[:1])
    return path


# --- who holds it ---


def test_a_second_writer_is_refused_and_told_who_writes(path: Path) -> None:
    with BufferWriter(path, make_spec()) as writer:
        holder = json.loads((path / HOLDER).read_text())
        assert holder == {"pid": os.getpid(), "host": socket.gethostname()}
        demand_taken(path, os.getpid())
        with process("write", path) as other:
            out, _ = other.communicate(timeout=60)
        assert out.startswith(f"FolderLockedError: {path} is being written by process {os.getpid()} on ")
        demand_taken(path, os.getpid())  # who was refused took nothing away
        assert ActivationBuffer(path).read("validation").n == 4  # to read it is always allowed
        fill(writer, writer.pending())
        assert writer.close().complete
    assert content(path) == content(write(path.with_name("whole")).path)


def test_a_new_folder_is_locked_at_once(tmp_path: Path) -> None:
    with BufferWriter(tmp_path / "acts", make_spec()):
        demand_taken(tmp_path / "acts", os.getpid())
    demand_free(tmp_path / "acts")


def test_it_is_free_after_close(tmp_path: Path) -> None:
    with BufferWriter(tmp_path / "acts", make_spec()) as writer:
        fill(writer, writer.pending())
        writer.close()
        assert not (tmp_path / "acts" / HOLDER).exists()
        FolderLock(tmp_path / "acts").release()
    assert (tmp_path / "acts" / LOCK).exists()  # to remove it would let two hold it


def test_it_is_free_after_an_exception(path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        BufferWriter(path, make_spec()) as writer,
        writer.shard(writer.pending()[0]),
    ):
        raise KeyboardInterrupt
    assert not (path / HOLDER).exists()
    demand_free(path)


def test_it_is_free_after_a_writer_that_could_not_be_made(path: Path) -> None:
    for _ in range(2):
        with pytest.raises(BufferMismatchError) as caught:  # which keeps all frames alive
            BufferWriter(path, make_spec(dtype="float32"))
        assert not (path / HOLDER).exists()
    demand_free(path)
    assert "dtype" in str(caught.value)


def test_to_release_twice_takes_nothing_from_the_next(path: Path) -> None:
    with BufferWriter(path, make_spec()) as writer:
        writer.release()
        with BufferWriter(path, make_spec()):
            writer.release()
            demand_taken(path, os.getpid())


@pytest.mark.parametrize("how", ["hold", "fork"])
def test_it_is_free_after_a_kill(path: Path, how: str) -> None:
    """Also while a process lives on that the holder had forked, as data loaders do."""
    with process(how, path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        demand_taken(path, holder.pid)
        holder.send_signal(signal.SIGKILL)
        assert holder.wait(30) == -signal.SIGKILL
        assert (path / HOLDER).exists()  # what it left says nothing
        demand_free(path)
        assert holder.stdin is not None
        holder.stdin.close()  # ends the child
    assert not (path / HOLDER).exists()


def test_a_holder_that_cannot_be_read_is_another_process(path: Path) -> None:
    with BufferWriter(path, make_spec()):
        for text in ("", "{", "[]", "{}"):
            (path / HOLDER).write_text(text)
            with pytest.raises(FolderLockedError, match="is being written by another process"):
                BufferWriter(path, make_spec())


def test_who_waited_to_make_a_buffer_does_not_make_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two find no buffer; one makes it, and is done before the other has the lock."""

    def late(folder: Path) -> FolderLock:
        monkeypatch.undo()
        write(folder)
        return FolderLock(folder)

    monkeypatch.setattr(writer_module, "FolderLock", late)
    with BufferWriter(tmp_path / "acts", make_spec()) as writer:
        assert writer.pending() == []
        assert writer.close().n_rows("train") == 26
    assert content(tmp_path / "acts") == content(write(tmp_path / "whole").path)


def test_a_buffer_is_discarded_whole_and_not_while_it_is_written(path: Path) -> None:
    (path / "notes.txt").write_text("mine")
    strays = ("shard-00001.h5.tmp", "manifest.json.tmp", ".buffer.h5.tmp-47", "manifest.part-00001.json")
    with BufferWriter(path, make_spec()):
        before = content(path)
        with pytest.raises(FolderLockedError, match=f"is being written by process {os.getpid()} on"):
            discard_buffer(path)
        assert content(path) == before
    for make in (lambda: None, lambda: write(path)):
        make()
        for name in strays:
            (path / name).write_bytes(b"half")
        discard_buffer(path)
        assert list(content(path)) == ["notes.txt"]
        assert not (path / HOLDER).exists()
    discard_buffer(path)  # nothing there to remove
    demand_free(path)


# --- folders that cannot be written to ---


@pytest.fixture
def locked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], list[str]]]:
    """Return what makes a folder read-only, for root too, and a list of everything that tried to write to it."""
    folders: list[Path] = []

    def lock_up(folder: Path) -> list[str]:
        tried: list[str] = []

        def refusing(module: Any, name: str, writes: Callable[..., bool]) -> None:
            real = getattr(module, name)

            def run(path: Any, *args: Any, **options: Any) -> Any:
                if isinstance(path, str | Path) and Path(path).is_relative_to(folder) and writes(*args, **options):
                    tried.append(f"{name}({path})")
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, *args, **options)

            monkeypatch.setattr(module, name, run)

        def writing(mode: str = "r", *_: Any, **__: Any) -> bool:
            return not set(mode).isdisjoint("wax+")

        for module, name in ((io, "open"), (builtins, "open")):
            refusing(module, name, writing)
        refusing(os, "open", lambda flags, *_, **__: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "truncate", "chmod"):
            refusing(os, name, lambda *_, **__: True)
        real_init = h5py.File.__init__

        def init(self: h5py.File, name: Any, mode: str = "r", *args: Any, **options: Any) -> None:
            if writing(mode):
                tried.append(f"h5py({name})")
                raise PermissionError(13, "Permission denied", str(name))
            real_init(self, name, mode, *args, **options)

        monkeypatch.setattr(h5py.File, "__init__", init)
        return tried

    def lock_up_for_all(folder: Path) -> list[str]:
        folders.append(folder)
        folder.chmod(0o555)
        return lock_up(folder)

    yield lock_up_for_all
    monkeypatch.undo()
    for folder in folders:
        folder.chmod(0o755)


def test_a_complete_buffer_can_be_opened_where_nothing_can_be_written(
    tmp_path: Path, locked_up: Callable[[Path], list[str]]
) -> None:
    path = write(tmp_path / "acts").path
    before = content(path)
    tried = locked_up(path)
    with BufferWriter(path, make_spec()) as writer, BufferWriter(path, make_spec()) as other:
        assert writer.pending() == other.pending() == []
        assert writer.close().read("train").n == other.close().read("train").n == 26
    assert tried == []
    assert content(path) == before


def test_an_incomplete_one_that_cannot_be_written_to_says_so(
    path: Path, locked_up: Callable[[Path], list[str]]
) -> None:
    tried = locked_up(path)
    with pytest.raises(UsaeProbeError, match=r"the buffer .*acts cannot be written to: Permission denied") as caught:
        BufferWriter(path, make_spec())
    assert type(caught.value) is UsaeProbeError
    assert "permissions" in caught.value.hint
    assert len(tried) > 0  # the fixture does what it says
    assert ActivationBuffer(path).read("validation").n == 4


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path, locked_up: Callable[[Path], list[str]]) -> None:
    (tmp_path / "disk").mkdir()
    locked_up(tmp_path / "disk")
    with pytest.raises(UsaeProbeError, match=r"cannot be written to .*acts: Permission denied .*permissions"):
        BufferWriter(tmp_path / "disk" / "acts", make_spec())


def test_a_disk_that_is_full_keeps_nobody_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsaeProbeError, match="cannot be written to: No space left on device") as caught:
        BufferWriter(path, make_spec())
    monkeypatch.undo()
    demand_free(path)
    assert caught.value.hint  # the error is still there, with the frames of whoever had the lock
