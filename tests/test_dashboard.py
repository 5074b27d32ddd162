"""A run on a terminal shows where it is; where nothing may move it says so in lines."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from usae_probe.report import terminal
from usae_probe.report.dashboard import Dashboard, dashboard

STAGES = ("harvest", "train", "evaluate", "report")
A, B = "resnet/layer4", "vit/blocks.5"


def console(*, tty: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=tty, width=80, highlight=False, color_system=None)


def drawn(board: Dashboard) -> str:
    out = console(tty=False)
    out.print(board.screen())
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    return text


def r2(own: float, cross: float) -> dict[str, dict[str, float]]:
    return {A: {A: own, B: cross}, B: {A: cross, B: own}}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dashboard:
    monkeypatch.delenv("NO_COLOR", raising=False)
    (tmp_path / "buffer").mkdir()
    (tmp_path / "buffer/x").write_bytes(b"0" * 5_230_000)
    made = dashboard(console(tty=True), STAGES, tmp_path)
    assert isinstance(made, Dashboard)
    return made


def test_stages_bars_and_machine(board: Dashboard) -> None:
    board.begin("harvest")
    board.finish("harvest", "21.0 s")
    board.begin("train")
    board.update("train", 30, 60, "steps", "loss 0.213, dead 2%")
    text = drawn(board)
    assert "✓ harvest 21.0 s   ▸ train   · evaluate   · report" in text
    assert "30/60 steps" in text
    assert "loss 0.213, dead 2%" in " ".join(text.split())
    assert "run folder 5.23 MB" in text
    assert "memory" in text
    assert "R²" not in text  # not measured yet
    board.finish("train", "9 s")
    assert "30/60" not in drawn(board)


def test_r2_as_it_improves(board: Dashboard) -> None:
    board.update("train", 100, 600, "steps", "", r2(0.5, 0.2))
    first = drawn(board)
    assert "validation rows, step 100" in first
    assert "▲" not in first
    board.update("train", 150, 600, "steps", "")
    board.update("train", 200, 600, "steps", "", r2(0.61, 0.19))
    second = drawn(board)
    assert "validation rows, step 200" in second
    assert second.count(".61 ▲") == 2
    assert second.count(".19 ▼") == 2
    board.update("evaluate", 1, 10, "rows", "")
    assert "validation rows" not in drawn(board)


def test_of_many_sites_the_means(board: Dashboard) -> None:
    sites = [f"m{i}/layer" for i in range(9)]
    board.update("train", 5, 6, "steps", "", {a: {b: 0.9 if a == b else float("nan") for b in sites} for a in sites})
    assert "own code .90, other codes –, in the mean of 9 sites" in drawn(board)


def test_a_stage_that_counts_something_else_starts_anew(board: Dashboard) -> None:
    board.update("evaluate", 60, 60, "rows", "")
    board.update("evaluate", 1, 64, "batches", "fidelity")
    text = drawn(board)
    assert "1/64 batches" in text
    assert "rows" not in text


@pytest.mark.parametrize("why", ["pipe", "NO_COLOR"])
def test_plain_lines(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if why == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    out = console(tty=why == "NO_COLOR")
    clock = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with dashboard(out, STAGES, tmp_path) as board:
        assert not isinstance(board, Dashboard)
        board.begin("train")
        for step in range(1, 601):
            clock[0] += 0.25
            board.update("train", step, 600, "steps", "loss [b]0.213[/b]", r2(0.5, 0.2) if step == 300 else None)
        board.say("train: done in 2 min 00 s")
    lines = [line for line in out.file.getvalue().splitlines() if line]  # type: ignore[attr-defined]
    assert [line.split(" of ")[0] for line in lines[:-1]] == ["train: 121", "train: 241", "train: 361", "train: 481"]
    assert all(line.endswith("loss [b]0.213[/b]") for line in lines[:-1])
    assert "\x1b" not in "".join(lines)


def test_the_screen_goes_and_what_was_said_stays(board: Dashboard) -> None:
    with board:
        board.begin("train")
        board.say("harvest: done in 21 s")
        board.update("train", 1, 2, "steps", "")
    written: Any = board.console.file
    assert "harvest: done in 21 s" in written.getvalue()


def test_work_of_which_nobody_knows_how_much_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines then say only what it is at."""
    out, clock = console(tty=False), [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with dashboard(out, STAGES, tmp_path) as board:
        board.update("doctor", 0, 1, "", "kernels")
        clock[0] += 40
        board.update("doctor", 0, 1, "", "training steps")
    assert out.file.getvalue().strip() == "doctor: training steps"  # type: ignore[attr-defined]
