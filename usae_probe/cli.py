"""The command line: the only parser of arguments. Heavy imports happen inside the commands.

Exit status: 0 done; 2 anything that can be known from arguments, config and model structure; 1 everything else that
fails; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsaeProbeError, UsageError, WorkerError

if TYPE_CHECKING:
    from .config import RunConfig
    from .pipeline import CellResult, RunResult, Stage, StageResult
    from .report.layers import ModelLayers
    from .report.terminal import StageProgress
    from .split import SplitName
    from .usae import World

app = typer.Typer(
    name="usae-probe",
    help="What do trained vision models represent in common? Universal sparse autoencoders on layers of live models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Config of the run.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/<config's name>.")]


@app.command()
def run(config: Config, out: Out = None, as_json: Json = False) -> None:
    """Do all stages: harvest, train, evaluate (and cam, with a [cam] table). Finished ones are kept, also of a run that
    was interrupted."""
    _stages(config, out, as_json, None)


@app.command()
def harvest(config: Config, out: Out = None, as_json: Json = False) -> None:
    """Stream the activations of all sites into the run's buffer."""
    _stages(config, out, as_json, ("harvest",))


@app.command()
def train(config: Config, out: Out = None, as_json: Json = False) -> None:
    """Train the USAE from the run's buffer."""
    _stages(config, out, as_json, ("train",))


@app.command()
def evaluate(config: Config, out: Out = None, as_json: Json = False) -> None:
    """Measure what the sites have in common, on held-out rows."""
    _stages(config, out, as_json, ("evaluate",))


@app.command()
def sweep(
    config: Config,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Values of a key of [usae], [train] or [probes]: usae.k=32,64. Repeat for more keys."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Trainings of each combination, from train.seed on.")
    ] = 1,
    buffer: Annotated[
        Path | None,
        typer.Option("--buffer", metavar="RUN_DIR", help="Finished run whose buffer is used; default: harvest one."),
    ] = None,
    holdout: Annotated[
        bool,
        typer.Option("--holdout", help="Measure on the held-out rows: once, after the choice was made on validation."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Sweep folder; default: runs/<config's name>-sweep.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train and measure all combinations of settings from one buffer. Finished ones are kept, also of a sweep that was
    interrupted."""
    folder = out or Path("runs") / f"{config.stem}-sweep"
    with _guard(as_json, str(folder)):
        n_failed = _sweep(
            config, settings or [], seeds, buffer, "holdout" if holdout else "validation", folder, as_json
        )
    if n_failed:
        raise typer.Exit(1)


def _sweep(
    config: Path, settings: list[str], seeds: int, buffer: Path | None, split: SplitName, folder: Path, as_json: bool
) -> int:
    """Do a sweep, show it, and return how many of its cells failed."""
    from .config import RunConfig
    from .pipeline import CellResult, Sweep, SweepProgress, parsed_settings
    from .report import terminal
    from .report.sweep import sweep_summary

    _, stderr = terminal.consoles()
    with terminal.StageProgress(stderr) as bars, _shown_warnings(bars.say):

        def announce(news: CellResult | StageResult | tuple[Stage, str]) -> None:
            if isinstance(news, CellResult):
                for stage in ("train", "evaluate"):
                    bars.finish(stage)
                bars.say(_cell_line(news))
            else:
                _announce(bars, news)

        def progress(at: SweepProgress) -> None:
            if at.at:
                bars.update("sweep", at.at - 1, at.n_cells, "cells", at.cell)
            bars.update(*at.now)

        doing = Sweep(
            RunConfig.load(config),
            folder,
            parsed_settings(settings),
            seeds=seeds,
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
    _show(as_json, data, lambda: sweep_summary(data, files), crop=False)
    return len(result.failed)


def _cell_line(cell: CellResult) -> str:
    """Say in one line what became of a cell."""
    from .report.terminal import seconds

    name = cell.combination.label
    if cell.error:
        return f"{name}: failed, {cell.error['message']}"
    if cell.kept:
        return f"{name}: kept, already done"
    parts = [f"training {seconds(cell.seconds or 0.0)}", cell.note, f"redone, {cell.why}" if cell.why else ""]
    return f"{name}: done, {'; '.join(part for part in parts if part)}"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"), as_json: Json = False
) -> None:
    """Do it all on two small trained networks and drawn images: no network, no data, about two minutes."""
    with _guard(as_json, str(out)):
        from .demo import one_thread, prepare_demo

        hint = (
            f"Your own models: start from a copy of {out / 'demo.toml'};\n"
            "usae-probe layers timm:resnet18 lists a model's layers."
        )
        with one_thread():
            _run_stages(prepare_demo(out), out, as_json, None, hint=hint)


@app.command()
def cam(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run.")],
    latents: Annotated[
        str | None,
        typer.Option(
            "--latents",
            help="top:8 (universal, by energy), factors:8 (those that follow a label), or numbers: 273,8; "
            "default: as the run's config says.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of gradient ascent per picture.")] = None,
    as_json: Json = False,
) -> None:
    """Draw what makes each model fire shared latents: gradient ascent to the pixels, beside the images that do."""
    with _guard(as_json, str(run_dir)):
        from .config import settled
        from .pipeline import RunRecord

        config = RunRecord(run_dir).config()
        given = {key: value for key, value in {"latents": latents, "steps": steps}.items() if value is not None}
        (pictures,) = settled((config.cam,), given)
        changed = config.model_copy(update={"cam": pictures})
        _run_stages(changed, run_dir, as_json, ("cam",))


@app.command()
def adapters(as_json: Json = False) -> None:
    """List the installed adapters: name, version, origin, and whether they work."""
    with _guard(as_json):
        from .adapter import all_entries, load_adapter
        from .report.terminal import adapter_table

        rows = []
        for entry in all_entries():
            try:
                load_adapter(entry.name)
                state = "ok"
            except UsaeProbeError as error:
                state = error.message
            shown = {key: value for key, value in entry._asdict().items() if isinstance(value, str)}
            rows.append({**shown, "origin": entry.origin, "state": state})
        _show(as_json, {"adapters": rows}, lambda: adapter_table(rows))


@app.command()
def layers(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="timm:resnet18, module:file.py:factory, or a CONFIG.toml.")
    ],
    option: Annotated[list[str] | None, typer.Option("--option", help="key=value for the adapter's factory.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Pixels; default: the model's own.")] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=0, help="Levels of the tree; 0: all; default: what fits a screen.")
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option("--grep", help="Only layers whose name, alias or kind holds this (regex, case does not matter)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers as a tree, in execution order, with what sites can read there (no weights are loaded)."""
    with _guard(as_json):
        from .report.layer_tree import layer_trees
        from .report.layers import described, matching

        found = list(_hooked_layers(model, option or [], image_size))
        matches = None if grep is None else matching(found, grep)
        data = {model.title: described(model, matches[at] if matches else None) for at, model in enumerate(found)}
        _show(as_json, {"models": data}, lambda: layer_trees(found, depth=depth, matches=matches), crop=False)


def _hooked_layers(model: str, option: list[str], image_size: int | None) -> Iterator[ModelLayers]:
    from .attaching import attach
    from .report.layers import survey

    if model.endswith(".toml"):
        from .config import RunConfig

        config = RunConfig.load(model)
        keys = {"options", "image_size", "mean", "std", "interpolation", "crop_pct", "layout"}
        for name, entry in config.models.items():
            given = entry.model_dump(include=keys)
            with attach(
                entry.name, adapter=entry.adapter, name=name, base=config.base, pretrained=False, **given
            ) as hooked:
                yield survey(hooked, name, entry.layers)
        return
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # values do not matter for shapes
    options = dict(_parsed_option(text) for text in option)
    with attach(model, pretrained=False, options=options, image_size=image_size, mean=zeros, std=ones) as hooked:
        yield survey(hooked, model)


def _parsed_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option '{text}' is not key=value", hint="e.g. --option img_size=112")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _stages(config: Path, out: Path | None, as_json: bool, stages: tuple[Stage, ...] | None) -> None:
    folder = out or Path("runs") / config.stem
    with _guard(as_json, str(folder), joins=True), _together() as world:
        from .config import RunConfig

        if world and not world.main:
            _help(RunConfig.load(config), folder, stages, world)
        else:
            _run_stages(RunConfig.load(config), folder, as_json, stages, world=world)


@contextmanager
def _together() -> Iterator[World | None]:
    """Join the processes that torchrun started with this one; nothing is imported for a process alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    from .usae.distributed import joined

    with joined() as world:
        yield world


def _help(config: RunConfig, folder: Path, stages: tuple[Stage, ...] | None, world: World) -> None:
    """Train with process 0, which does all the rest."""
    if stages is None or "train" in stages:
        from .pipeline import help_train

        help_train(folder, config, world)


def _run_stages(
    config: RunConfig,
    folder: Path,
    as_json: bool,
    stages: tuple[Stage, ...] | None,
    hint: str = "",
    world: World | None = None,
) -> None:
    from .pipeline import Progress, Run
    from .report import terminal
    from .report.summary import file_table, run_summary

    _, stderr = terminal.consoles()
    with terminal.StageProgress(stderr) as bars, _shown_warnings(bars.say):

        def announce(news: StageResult | tuple[Stage, str]) -> None:
            _announce(bars, news)

        def progress(now: Progress) -> None:
            bars.update(*now)

        doing = Run(config, folder, progress=progress, announce=announce, world=world)
        result = doing.run(stages)
    files = _files(folder, result)

    def screen() -> Any:
        if result.metrics is None:
            return file_table(files)
        return run_summary(doing.overview(result), result.metrics, files, hint=hint)

    _show(as_json, _result_dict(result, files), screen)


def _announce(bars: StageProgress, news: StageResult | tuple[Stage, str]) -> None:
    """Say in one line that a stage starts, or what became of it."""
    from .pipeline import StageResult
    from .report.terminal import seconds

    if isinstance(news, StageResult):
        bars.finish(news.stage)
        spent = "kept, already done" if news.kept else f"done in {seconds(news.seconds)}"
        bars.say(f"{news.stage}: {spent}{f'; {news.note}' if news.note else ''}")
    else:
        bars.say(f"{news[0]}: redone, {news[1]}" if news[1] else f"{news[0]} …")


def _files(folder: Path, result: RunResult) -> dict[str, Path]:
    """Return where the results of the stages up to the last are; those of later ones may belong to another config."""
    names = {"activations": "buffer", "record": "run.json"}
    if result.stages[-1].stage != "harvest":
        names = {"USAE": "usae.safetensors", **names}
    if result.metrics is not None:
        names = {"measures": "metrics.json", "latents": "latents.csv", "figures": "figures", **names}
    if result.cam is not None:
        names = {"pictures": result.cam["sheets"][0], **names}
    return {what: folder / name for what, name in names.items()}


def _result_dict(result: RunResult, files: dict[str, Path]) -> dict[str, Any]:
    stages = {
        stage.stage: {"kept": stage.kept, "seconds": round(stage.seconds, 3), "why": stage.why, "note": stage.note}
        for stage in result.stages
    }
    data: dict[str, Any] = {"run_dir": str(result.folder), "stages": stages, "metrics": result.metrics}
    if result.cam is not None:
        data["cam"] = {key: value for key, value in result.cam.items() if key != "pictures"}
        data["cam"]["pictures"] = [
            {key: value for key, value in picture.items() if key != "curve"} for picture in result.cam["pictures"]
        ]
    return data | {"files": {what: str(path) for what, path in files.items()}}


def _show(as_json: bool, data: dict[str, Any], renderable: Callable[[], Any], *, crop: bool = True) -> None:
    """Print JSON on stdout (and the table on stderr), or the table on stdout; `crop` lines to the console's width."""
    from .report.terminal import consoles

    stdout, stderr = consoles()
    (stderr if as_json else stdout).print(renderable(), crop=crop)
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


@contextmanager
def _guard(as_json: bool, folder: str = "", *, joins: bool = False) -> Iterator[None]:
    """Turn errors into one clear line (or JSON) and the exit status of the contract.

    Of several processes that torchrun started only commands that say they `join` them run in more than one.
    """
    try:
        if not joins:
            _demand_alone()
        yield
    except WorkerError as error:
        if error.told:
            raise typer.Exit(1) from error
        _fail(as_json, type(error).__name__, error.message, error.hint, 1)
    except UsaeProbeError as error:
        _fail(as_json, type(error).__name__, error.message, error.hint, 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        state = f"what was finished is kept in {folder}; give the same command again to go on" if folder else ""
        _fail(as_json, "Interrupted", "interrupted", state, 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say
        raise typer.Exit(1) from None
    except OSError as error:
        _fail(as_json, type(error).__name__, str(error), "check space and permissions; what was finished is kept", 1)
    except Exception as error:
        if os.environ.get("USAE_PROBE_DEBUG"):
            raise
        hint = "this is a bug or an unusual model: set USAE_PROBE_DEBUG=1 to see where it happened"
        _fail(as_json, type(error).__name__, str(error) or repr(error), hint, 1)


def _demand_alone() -> None:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if several and os.environ.get("RANK") != "0":
        raise WorkerError("this command works in one process", told=True)
    if several:
        raise UsageError(
            f"this command works in one process, {os.environ['WORLD_SIZE']} were started",
            hint="only run, harvest, train and evaluate can be started by torchrun",
        )


def _fail(as_json: bool, kind: str, message: str, hint: str, status: int) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": {"type": kind, "message": message, "hint": hint}}, indent=2) + "\n")
    else:
        from .report.terminal import consoles, error_text

        consoles()[1].print(error_text(message, hint), soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def _shown_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Show this package's own warnings as plain lines, each text once."""
    from .errors import UsaeProbeWarning

    seen: set[str] = set()
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, UsaeProbeWarning):
            before(message, category, *rest, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UsaeProbeWarning)
        warnings.showwarning = show
        yield


def main() -> None:
    """Run the command line; usage errors follow `--json` too."""
    as_json = "--json" in sys.argv[1:]
    try:
        status = app(standalone_mode=False)
    except typer.Exit as leaving:
        status = leaving.exit_code
    except typer.Abort:
        status = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own errors all have it
            raise
        status = getattr(error, "exit_code", 2)
        if as_json:
            document = {"error": {"type": "UsageError", "message": error.format_message(), "hint": "see --help"}}
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            error.show()  # type: ignore[attr-defined]
    sys.exit(status if isinstance(status, int) else 0)
