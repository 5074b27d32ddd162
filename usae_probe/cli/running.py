"""Doing stages of a run: what is said on the way, and what is shown of the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import show, shown_warnings

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..pipeline import RunResult, Stage, StageResult
    from ..report.terminal import StageProgress
    from ..usae import World


def do_stages(
    config: RunConfig,
    folder: Path,
    as_json: bool,
    stages: tuple[Stage, ...] | None,
    hint: str = "",
    world: World | None = None,
) -> None:
    """Do stages (default: all of the run) with bars on stderr, and show their result; `hint` goes under its summary."""
    from ..pipeline import Progress, Run
    from ..report import terminal
    from ..report.dashboard import dashboard
    from ..report.summary import file_table, run_summary

    _, stderr = terminal.consoles()

    def announce(news: StageResult | tuple[Stage, str]) -> None:
        say_stage(bars, news)

    def progress(now: Progress) -> None:
        bars.update(*now)

    doing = Run(config, folder, progress=progress, announce=announce, world=world)
    with dashboard(stderr, stages or doing.stages, folder) as bars, shown_warnings(bars.say):
        result = doing.run(stages)
    files = _files(folder, result)

    def screen() -> Any:
        if result.metrics is None or stages == ("report",):
            return file_table(files)
        overview, whole = doing.overview(result.metrics, result.cam), stages == ("evaluate",)
        return run_summary(overview, result.metrics, files, hint=hint, whole=whole)

    show(as_json, _result_dict(result, files), screen)


def say_stage(bars: StageProgress, news: StageResult | tuple[Stage, str]) -> None:
    """Say in one line that a stage starts, or what became of it."""
    from ..pipeline import StageResult
    from ..report.terminal import seconds

    if isinstance(news, StageResult):
        bars.finish(news.stage, "kept" if news.kept else seconds(news.seconds))
        spent = "kept, already done" if news.kept else f"done in {seconds(news.seconds)}"
        bars.say(f"{news.stage}: {spent}{f'; {news.note}' if news.note else ''}")
    else:
        bars.begin(news[0])
        bars.say(f"{news[0]}: redone, {news[1]}" if news[1] else f"{news[0]} …")


def _files(folder: Path, result: RunResult) -> dict[str, Path]:
    """Return where the results of the stages up to the last are; those of later ones may belong to another config."""
    names = {"activations": "buffer", "record": "run.json"}
    if result.stages[-1].stage != "harvest":
        names = {"USAE": "usae.safetensors", **names}
    if result.metrics is not None:
        names = {"measures": "metrics.json", "latents": "latents.csv", "figures": "figures", **names}
    if any(stage.stage == "report" for stage in result.stages):
        names = {"page": "report.html", **names}
    if result.cam is not None:
        sheet = {"pictures": result.cam["sheets"][0]}
        names = {**sheet, **names} if result.stages[0].stage == "cam" else {**names, **sheet}
    return {what: folder / name for what, name in names.items()}


def _result_dict(result: RunResult, files: dict[str, Path]) -> dict[str, Any]:
    stages = {
        stage.stage: {"kept": stage.kept, "seconds": round(stage.seconds, 3), "why": stage.why, "note": stage.note}
        for stage in result.stages
    }
    data: dict[str, Any] = {"run_dir": str(result.folder), "stages": stages, "metrics": result.metrics}
    if result.cam is not None:
        data["cam"] = {key: value for key, value in result.cam.items() if key != "cards"}
        data["cam"]["cards"] = [_without_curves(card) for card in result.cam["cards"]]
    return data | {"files": {what: str(path) for what, path in files.items()}}


def _without_curves(card: dict[str, Any]) -> dict[str, Any]:
    pictures = [{key: value for key, value in picture.items() if key != "curves"} for picture in card["pictures"]]
    return {**card, "pictures": pictures}
