"""A disk that is full, and a folder that somebody else works in, at every stage: said, and nothing is lost."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path

import pytest
from safetensors import SafetensorError

from usae_probe import Run, RunConfig
from usae_probe.errors import FolderLockedError
from usae_probe.files import replacing, write_text
from usae_probe.lock import FolderLock, claiming
from usae_probe.pipeline import Stage, measuring

from .command import Command, command
from .tiny_run import changed, put_tiny_run, toml

pytestmark = pytest.mark.usefixtures("one_thread")
WORK = {
    "harvest": ("harvest", "c.toml", "--out", "r"),
    "train": ("train", "c.toml", "--out", "r"),
    "evaluate": ("evaluate", "c.toml", "--out", "r"),
    "cam": ("cam", "r", "--latents", "0", "--steps", "2"),
    "report": ("report", "r"),
    "sweep": ("sweep", "c.toml", "--set", "usae.k=1,2", "--out", "r"),
    "scan": ("scan", "c.toml", "--depth", "0", "--out", "r"),
}
BEFORE: dict[str, tuple[Stage, ...]] = {
    "train": ("harvest",),
    "evaluate": ("harvest", "train"),
    "cam": ("harvest", "train", "evaluate"),
    "report": ("harvest", "train", "evaluate"),
}
EXPORTS = {
    "export": ("export", "r", "--to", "out"),
    "buffer export": ("buffer", "export", "r", "--site", "a/2", "--to", "out/rows.npy"),
    "buffer export, safetensors": ("buffer", "export", "r", "--site", "a/2", "--to", "out/rows.safetensors"),
}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    put_tiny_run(tmp_path)
    (tmp_path / "c.toml").write_text(toml(changed(report={"cards": 2})))
    monkeypatch.chdir(tmp_path)
    return command(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def _few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the many that take most of the time."""

    def one(_: object, folder: Path) -> list[Path]:
        write_text(folder / "figure.svg", "<svg/>")
        return [folder / "figure.svg"]

    monkeypatch.setattr(measuring, "universality_figures", one)


def before(work: str, folder: str = "r") -> None:
    """Do the stages that come before some work."""
    if stages := BEFORE.get(work):
        Run(RunConfig.load("c.toml"), folder).run(stages)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Called with n, no file after the n-th that is synced from then on fits; with None all do."""
    real, left = os.fsync, [inf]

    def fsync(descriptor: int) -> None:
        left[0] -= stat.S_ISREG(os.fstat(descriptor).st_mode)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    def holds(files: int | None) -> None:
        left[0] = inf if files is None else files

    monkeypatch.setattr(os, "fsync", fsync)
    yield holds
    holds(None)


def results(folder: str) -> dict[str, bytes]:
    """What a folder holds, without what tells of time and memory."""
    told = {"run.json", "report.html", "training.json", "sweep.json", "sweep.csv", "scan.json"}
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name not in told)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if ".lock" not in path.name}


@pytest.mark.parametrize("work", WORK)
def test_a_disk_that_is_full_at_any_file(cli: Command, disk: Callable[[int | None], None], work: str) -> None:
    """Named each time; what was finished is kept, and in the end all is as if there had been space."""
    before(work)
    for n in (0, 1, 3, 9, 27, 81):
        disk(n)
        done = cli(*WORK[work])
        disk(None)
        if done.status == 0:
            break
        said = " ".join(done.err.split())
        assert (done.status, "No space left on device" in said, "r/" in said) == (1, True, True), said
        assert "Traceback" not in said
        assert "bug" not in said
        assert not [path for path in Path("r").rglob("*") if ".tmp" in path.name]
    assert n > 0, "nothing was written"
    assert cli(*WORK[work]).status == 0
    Path("r").rename("interrupted")
    before(work)
    assert cli(*WORK[work]).status == 0
    assert results("interrupted") == results("r")


@pytest.mark.parametrize("work", EXPORTS)
def test_an_export_onto_a_full_disk_leaves_nothing(cli: Command, disk: Callable[[int | None], None], work: str) -> None:
    before("evaluate")
    for n in (0, 1, 3, 9):
        disk(n)
        done = cli(*EXPORTS[work])
        disk(None)
        if done.status == 0:
            break
        assert (done.status, "No space left on device" in done.err, "bug" in done.err) == (1, True, False), done.err
        assert not [path for path in Path("out").rglob("*") if path.is_file()]
    assert n > 0, "nothing was written"
    Path("out").rename("first")
    assert cli(*EXPORTS[work]).status == 0
    assert results("first").keys() == results("out").keys()


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    """Whatever wrote: Python, safetensors, or the name that the file should get."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken") as caught:
        write_text(tmp_path / "taken", "x")
    assert caught.value.filename
    with pytest.raises(OSError, match="No space left") as full, replacing(tmp_path / "w.safetensors"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (full.value.errno, full.value.filename) == (28, str(tmp_path / "w.safetensors"))
    with pytest.raises(SafetensorError, match="header"), replacing(tmp_path / "w.safetensors"):
        raise SafetensorError("header too large")
    with pytest.raises(OSError, match="other") as other, replacing(tmp_path / "file"):
        raise OSError(5, "Input/output error", "other")
    assert other.value.filename == "other"  # what was being read, say
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


# --- two in one folder ---


@pytest.mark.parametrize("work", WORK)
def test_a_second_one_in_the_folder_is_refused(cli: Command, work: str) -> None:
    before(work)
    Path("r").mkdir(exist_ok=True)
    there = results("r")
    lock = FolderLock(Path("r"), name="run", what="the folder")
    try:
        refused = cli(*WORK[work], "--json")
    finally:
        lock.release()
    error = refused.document["error"]
    assert (refused.status, error["type"]) == (1, "FolderLockedError")
    assert f"r is being written by process {os.getpid()} on" in error["message"]
    assert "wait until it is done" in error["hint"]
    assert results("r") == there
    assert cli(*WORK[work]).status == 0


def test_a_folder_is_claimed_by_one_thread_as_often_as_it_likes(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with claiming(folder), claiming(folder), ThreadPoolExecutor(1) as pool:
        with claiming(tmp_path / "r/../r"):
            (folder / "result").touch()
        with pytest.raises(FolderLockedError, match=f"process {os.getpid()}"):
            pool.submit(lambda: claiming(folder).__enter__()).result()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: claiming(folder).__enter__()).result()


def test_a_folder_in_which_nothing_came_to_be_is_gone_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claiming(tmp_path / "r"):
        raise KeyboardInterrupt
    assert not (tmp_path / "r").exists()
    (tmp_path / "empty").mkdir()
    with claiming(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()  # it is the user's
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    with claiming(tmp_path / "there"):
        assert (tmp_path / "there/.run.json").exists()
    assert {path.name for path in (tmp_path / "there").iterdir()} <= {"file", ".run.lock"}


def test_where_nothing_can_be_written_there_is_nothing_to_claim(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with claiming(tmp_path / "file"), claiming(tmp_path / "file/below"):
        pass  # who writes there says why it does not go
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
