"""The command that compares every layer of each model with every layer of the others: scan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Config, Device, Dtype, Json, guard, no_option, show, shown_warnings
from .running import say_stage

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..pipeline import Progress, Stage, StageResult
    from ..probes.scan import ScanProgress


def scan(
    config: Config,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth", min=0, help="Evenly spaced blocks of each model (8); 0: the layers listed in [models]."
        ),
    ] = None,
    every: Annotated[int | None, typer.Option("--every", min=1, help="Every so many blocks, from the last.")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers", help="model/layer with globs, 'vit/blocks.*@mean'; repeat, also for the other models."
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Token policy of the blocks: pool (default), cls, mean or patch.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="joint: one USAE over all layers (default); pairs: one for each two; or both."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time it may take, 10m: layers, images and steps are chosen to fit.")
    ] = None,
    floor: Annotated[
        bool, typer.Option("--floor", help="Scan the same architectures untrained, too: a floor for every cell.")
    ] = False,
    holdout: Annotated[
        bool, typer.Option("--holdout", help="Measure on the held-out rows: once, after layers were chosen.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", callback=no_option, help="Scan folder; default: runs/<config's name>-scan.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compare every layer of each model with every layer of the others: one harvest, one USAE over all of them, and
    CKA, nearest neighbours and ridge regression beside it. What is finished is kept, also of a scan that was
    interrupted."""
    folder = out or Path("runs") / f"{config.stem}-scan"
    with guard(as_json, str(folder)):
        from ..config import RunConfig, settled

        whole = RunConfig.load(config).on(device, dtype)
        options: dict[str, Any] = {
            "depth": depth,
            "every": every,
            "layers": layers or None,
            "policy": policy,
            "strategies": None
            if strategy is None
            else [p.strip() for p in strategy.replace("both", "joint,pairs").split(",")],
            "budget": budget,
            "floor": floor or None,
            "split": "holdout" if holdout else None,
        }
        if depth is not None or every is not None or layers:  # what is asked for here comes before the file's
            whole = whole.model_copy(update={"scan": whole.scan.model_copy(update={"every": None, "layers": None})})
        (how,) = settled((whole.scan,), {key: value for key, value in options.items() if value is not None})
        _scan(whole.model_copy(update={"scan": how}), folder, as_json)


def _scan(config: RunConfig, folder: Path, as_json: bool) -> None:
    from ..pipeline import Scan
    from ..report import terminal
    from ..report.scan import scan_summary

    _, stderr = terminal.consoles()
    with terminal.StageProgress(stderr) as bars, shown_warnings(bars.say):

        def announce(news: StageResult | tuple[Stage, str] | str) -> None:
            if isinstance(news, str):
                bars.say(news)
            else:
                say_stage(bars, news)

        def progress(now: Progress | ScanProgress) -> None:
            bars.update(*now)
            if now[1] >= now[2]:
                bars.finish(now[0])

        result = Scan(config, folder, progress=progress, announce=announce).run()
    names = {"measures": "scan.json", "table": "scan.csv", "latents": "scan-latents.csv", "figures": "figures"}
    if result.report.joint:
        names["USAE"] = "usae.safetensors"
    files = {what: folder / name for what, name in {**names, "activations": "buffer", "record": "run.json"}.items()}
    data = result.report.to_dict() | {
        "scan_dir": str(folder),
        "plan": result.plan._asdict(),
        "files": {what: str(path) for what, path in files.items()},
    }
    show(as_json, data, lambda: scan_summary(data, files, result.plan.blocks), crop=False)
