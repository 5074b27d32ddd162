"""What people see: figures that open, and tables, progress and errors in the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console, RenderableType

from usae_probe.probes import UniversalityReport
from usae_probe.probes.universality import CATEGORIES
from usae_probe.report import figures, heat_maps, style, terminal

NAN = float("nan")


def sites_of(n: int) -> tuple[str, ...]:
    return tuple(f"model{i % 4}/blocks.{i}.attention.projection@mean" for i in range(n))


def matrix(sites: tuple[str, ...], offset: float = 0.0) -> dict[str, dict[str, float]]:
    """Different numbers everywhere: .000, .007, .014, …"""
    n = len(sites)
    return {s: {t: offset + 0.007 * (i * n + j) for j, t in enumerate(sites)} for i, s in enumerate(sites)}


def report(sites: tuple[str, ...], **changes: Any) -> UniversalityReport:
    values: dict[str, Any] = {
        "sites": sites,
        "class_sites": sites[:2],
        "r2": matrix(sites),
        "r2_train": matrix(sites, 0.001),
        "r2_global_mean": matrix(sites),
        "counts": dict.fromkeys(CATEGORIES, 3),
        "n_split": 2,
        "n_rows_train": 9000,
        "n_rows_eval": 1000,
        "latents": [],
    }
    return UniversalityReport(**(values | changes))


def history(sites: tuple[str, ...], *, source: str | None = None, r2: float | None = 0.5) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "phase": "align" if step < 3 else "main",
            "source": source or sites[step % len(sites)],
            "losses": dict.fromkeys(sites, 1 / step),
            "r2": {s: dict.fromkeys(sites, r2) for s in sites} if step % 2 == 0 else None,
        }
        for step in range(1, 9)
    ]


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


# --- figures ---


@pytest.mark.parametrize(("n", "height"), [(1, 300), (2, 350), (12, 1800)])
def test_the_matrix_is_a_picture_of_the_right_size(tmp_path: Path, n: int, height: int) -> None:
    figures.r2_matrix(report(sites_of(n)), tmp_path / "r2.png")
    pixels = opened(tmp_path / "r2.png")
    assert pixels.shape[1] <= 9 * 150  # text does not shrink when there are more sites: panels go below each other
    assert pixels.shape[0] == pytest.approx(height, rel=0.15)
    assert len(np.unique(pixels[::9, ::9].reshape(-1, 3), axis=0)) > 20
    assert {file.name for file in tmp_path.iterdir()} == {"r2.png", "r2.svg"}  # no temporary file is left


def test_a_number_that_is_none_is_legible_in_the_matrix(tmp_path: Path) -> None:
    """White on the white of an empty cell would not be."""
    sites = ("a/x", "b/y")
    values = matrix(sites)
    values["a/x"]["b/y"] = NAN
    figures.r2_matrix(report(sites, r2=values, r2_train=values), tmp_path / "nan.png")
    axis = style.new_figure((3.0, 3.0)).subplots()
    heat_maps.heat_map(axis, heat_maps.Panel("", values), sites, heat_maps.Layout.of(sites, 1))
    assert [(text.get_text(), text.get_color()) for text in axis.texts] == [
        ("0.000", "white"),
        ("–", "black"),
        ("0.014", "white"),
        ("0.021", "white"),
    ]
    assert opened(tmp_path / "nan.png").max() == 255


@pytest.mark.parametrize(
    "records",
    [
        history(sites_of(1)),
        history(sites_of(2)),
        history(sites_of(3), source="all"),
        history(sites_of(4), source=" + ".join(sites_of(4)[1:3])),
        history(sites_of(12)),
        history(sites_of(2), r2=NAN),
        history(sites_of(2), r2=None),  # as history.jsonl spells NaN
        history(sites_of(2))[:1],
        [],
    ],
    ids=["one site", "two", "all sources", "two of four", "twelve", "nan", "null", "one record", "no record"],
)
def test_training_curves_are_a_picture_of_the_right_size(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    figures.training_curves(records, tmp_path / "training.png")
    pixels = opened(tmp_path / "training.png")
    assert pixels.shape[1] == 1440
    assert 540 <= pixels.shape[0] <= 840  # higher with more names below
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_a_site_among_several_sources_is_decoded_from_its_own_code() -> None:
    sources = ["a/x", "b/y", "all", "a/x + b/y", "b/y + c/z"]
    axis = Figure().subplots()
    records = [{"step": i, "source": source, "losses": {"a/x": i, "b/y": 9}} for i, source in enumerate(sources)]
    figures._loss_lines(axis, records, "a/x", "red")
    assert [list(line.get_xdata()) for line in axis.lines] == [[0, 2, 3], [1, 4]]


# --- the terminal ---


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text  # no colours in a pipe
    assert all(len(line) <= width for line in text.splitlines())
    return text


def test_the_colours_of_twelve_sites_differ() -> None:
    for n in (1, 7, 8, 12):
        assert len(set(style.cycle(n))) == n


def test_markup_in_names_is_shown_as_it_is() -> None:
    row = {"name": "[red]", "distribution": "[a]", "version": "[b]", "origin": "[o]", "state": "[/c]"}
    text = printed(terminal.adapter_table([row]))
    assert all(value in text for value in row.values())
    assert "[red]oh [/x]" in printed(terminal.error_text("[red]oh [/x]", "[hint]"))


def test_progress_into_a_pipe_is_lines() -> None:
    console = Console(file=io.StringIO(), width=80)
    with terminal.StageProgress(console) as bars:
        bars.say("harvest … [red]")
        bars.update("harvest", 3, 9, "images", "[bold]2 skipped")
        bars.update("harvest", 9, 9, "images", "")
        bars.finish("harvest")
        bars.finish("never begun")
        bars.say("x" * 200)  # never wrapped: somebody may search for it
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "harvest … [red]"
    assert "x" * 200 in lines


def test_durations() -> None:
    assert [terminal.seconds(value) for value in (0.04, 8.31, 59.9, 60.0, 125.0, 3601.0)] == [
        "0.0 s", "8.3 s", "59.9 s", "1 min 00 s", "2 min 05 s", "60 min 01 s"
    ]  # fmt: skip
