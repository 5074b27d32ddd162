"""The command that trains and measures many settings from one buffer: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Config, Device, Dtype, Json, guard, no_option, show, shown_warnings
from .running import say_stage

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..pipeline import CellResult, Stage, StageResult
    from ..split import SplitName


def sweep(
    config: Config,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Values of a key of [usae], [train] or [probes]: usae.k=32,64. Repeat for more. Default: [sweep].",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Trainings of each combination, from train.seed on (1).")
    ] = None,
    buffer: Annotated[
        Path | None,
        typer.Option("--buffer", metavar="RUN_DIR", help="Finished run whose buffer is used; default: harvest one."),
    ] = None,
    holdout: Annotated[
        bool,
        typer.Option("--holdout", help="Measure on the held-out rows: once, after the choice was made on validation."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=no_option, help="Sweep folder; default: runs/<config's name>-sweep."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Train and measure all combinations of settings from one buffer. Finished ones are kept, also of a sweep that was
    interrupted."""
    folder = out or Path("runs") / f"{config.stem}-sweep"
    with guard(as_json, str(folder)):
        from ..config import RunConfig

        whole = RunConfig.load(config).on(device, dtype)
        n_failed = _sweep(whole, settings or [], seeds, buffer, "holdout" if holdout else "validation", folder, as_json)
    if n_failed:
        raise typer.Exit(1)


def _sweep(
    config: RunConfig,
    settings: list[str],
    seeds: int | None,
    buffer: Path | None,
    split: SplitName,
    folder: Path,
    as_json: bool,
) -> int:
    """Do a sweep, show it, and return how many of its cells failed."""
    from ..pipeline import CellResult, Sweep, SweepProgress, parsed_settings
    from ..report import terminal
    from ..report.sweep import sweep_summary

    _, stderr = terminal.consoles()
    with terminal.StageProgress(stderr) as bars, shown_warnings(bars.say):

        def announce(news: CellResult | StageResult | tuple[Stage, str]) -> None:
            if isinstance(news, CellResult):
                for stage in ("train", "evaluate"):
                    bars.finish(stage)
                bars.say(_cell_line(news))
            else:
                say_stage(bars, news)

        def progress(at: SweepProgress) -> None:
            if at.at:
                bars.update("sweep", at.at - 1, at.n_cells, "cells", at.cell)
            bars.update(*at.now)

        doing = Sweep(
            config,
            folder,
            parsed_settings(settings) or config.sweep.settings,
            seeds=seeds or config.sweep.seeds,
            buffer=buffer,
            split=split,
            progress=progress,
            announce=announce,
        )
        result = doing.run()
    names = ("sweep.json", "sweep.csv", "sweep.png", "cells")
    files = dict(zip(("measures", "table", "figure", "USAEs"), (folder / name for name in names), strict=True))
    data = result.to_dict() | {"sweep_dir": str(folder), "files": {what: str(path) for what, path in files.items()}}
    if result.failed:
        first = result.failed[0].error or {}
        message = f"{len(result.failed)} of {len(result.cells)} cells failed; the first: {first['message']}"
        data["error"] = {"type": first["type"], "message": message, "hint": first["hint"]}
    show(as_json, data, lambda: sweep_summary(data, files), crop=False)
    return len(result.failed)


def _cell_line(cell: CellResult) -> str:
    """Say in one line what became of a cell."""
    from ..report.terminal import seconds

    name = cell.combination.label
    if cell.error:
        return f"{name}: failed, {cell.error['message']}"
    if cell.kept:
        return f"{name}: kept, already done"
    parts = [f"training {seconds(cell.seconds or 0.0)}", cell.note, f"redone, {cell.why}" if cell.why else ""]
    return f"{name}: done, {'; '.join(part for part in parts if part)}"
