"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from usae_probe.files import json_sha256, json_text, publish, replacing, sha256, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_path_appears_on_leaving(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # a rename within one file system
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["a.txt"]


def interrupted(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt


def test_an_exception_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_writer_that_wrote_nothing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_killed_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    program = (
        "import os, signal, sys; from pathlib import Path; from usae_probe.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # what the killed process left is in nobody's way
    assert path.read_text() == "new"


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    old = os.umask(0o027)
    try:
        with replacing(path) as temporary:
            temporary.touch(mode=0o600)
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"φ": 0.2, "sites": ["m/a"], "none": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"φ": 0.2, "sites": ["m/a"], "none": None}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"r2": number})
    assert json.loads(path.read_text(encoding="utf-8"))["φ"] == 0.2
    assert json_text({"a": 1}) == '{\n  "a": 1\n}\n'
    write_text(path, "φ ≥ .2")
    assert path.read_text(encoding="utf-8") == "φ ≥ .2"


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc" * 100_000)
    assert sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_json_sha256(tmp_path: Path) -> None:
    expected = hashlib.sha256(b'{"a": [1, "x/y"], "b": null}').hexdigest()
    assert json_sha256({"b": None, "a": [1, Path("x/y")]}) == json_sha256({"a": (1, "x/y"), "b": None}) == expected


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "bytes")
        fsync(handle)

    def spy_replace(source: Path, target: Path) -> None:
        happened.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    (tmp_path / "temporary").write_text("whole")
    publish(tmp_path / "temporary", tmp_path / "final")
    assert happened == ["bytes", "name", "folder"]
    assert names(tmp_path) == ["final"]
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "none", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "whole"
