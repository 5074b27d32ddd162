"""Commands that do stages of a run: run, harvest, train, evaluate, demo, cam, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Config, Device, Dtype, Json, Out, Strict, guard, no_option
from .running import do_stages
from .several import help_process_0, together

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..pipeline import Stage


def run(
    config: Config,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Do all stages: harvest, train, evaluate, report (and cam, with a [cam] table). Finished ones are kept, also of a
    run that was interrupted. Under torchrun all processes train."""
    _stages(config, out, lambda c: c.on(device, dtype, strict=strict), as_json, None)


def harvest(
    config: Config,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Stream the activations of all sites into the run's buffer."""
    _stages(config, out, lambda c: c.on(device, dtype, strict=strict), as_json, ("harvest",))


def train(config: Config, out: Out = None, device: Device = None, dtype: Dtype = None, as_json: Json = False) -> None:
    """Train the USAE from the run's buffer, which harvest has made. Under torchrun all processes train."""
    _stages(config, out, lambda c: c.on(device, dtype), as_json, ("train",))


def evaluate(
    config: Config, out: Out = None, device: Device = None, dtype: Dtype = None, as_json: Json = False
) -> None:
    """Measure what the sites have in common, on held-out rows."""
    _stages(config, out, lambda c: c.on(device, dtype), as_json, ("evaluate",))


def demo(
    out: Annotated[Path, typer.Option("--out", callback=no_option, help="Run folder.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Do it all on two small trained networks and drawn images: no network, no data, two to four minutes."""
    with guard(as_json, str(out)):
        from ..demo import prepare_demo
        from ..world import one_thread

        hint = (
            f"Your own models: start from a copy of {out / 'demo.toml'};\n"
            "usae-probe layers timm:resnet18 lists a model's layers."
        )
        with one_thread():
            do_stages(prepare_demo(out), out, as_json, None, hint=hint)


def cam(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run.")],
    latents: Annotated[
        str | None,
        typer.Option(
            "--latents",
            help="top:8 (universal), specific:4 (of one model), factors:8 (that follow a label), or numbers: 273,8; "
            "default: as the run's config says.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="independent, joint, contrast, or several: independent,joint (the default)."),
    ] = None,
    parametrisation: Annotated[
        str | None, typer.Option("--parametrisation", help="fourier (default), maco, or pixels.")
    ] = None,
    start: Annotated[str | None, typer.Option("--start", help="noise (default), or exemplar: accentuation.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of gradient ascent per picture, at most.")] = None,
    restarts: Annotated[int | None, typer.Option("--restarts", help="Pictures per latent, mode and model.")] = None,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", help="Pictures in one forward pass: bounds the memory.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of starts and transforms.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw what makes each model fire shared latents: gradient ascent to the pixels, checked against natural images,
    other latents and the other models, beside the images that fire them most.
    """
    with guard(as_json, str(run_dir)):
        from ..config import settled
        from ..pipeline import RunRecord

        record = RunRecord(run_dir)
        config = record.config().on(device)
        options = {
            "latents": latents,
            "modes": None if mode is None else [part.strip() for part in mode.split(",")],
            "parametrisation": parametrisation,
            "start": start,
            "steps": steps,
            "restarts": restarts,
            "max_batch": max_batch,
            "seed": seed,
        }
        (pictures,) = settled((config.cam,), {key: value for key, value in options.items() if value is not None})
        changed = config.model_copy(update={"cam": pictures})
        # A page that is there shows the new pictures, too.
        do_stages(changed, run_dir, as_json, ("cam", "report") if record.finished("report") else ("cam",))


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run.")],
    cards: Annotated[
        int | None,
        typer.Option("--cards", min=0, help="Latents with images in the page (200): each adds some 100 kB."),
    ] = None,
    scan: Annotated[
        Path | None,
        typer.Option("--scan", metavar="SCAN_DIR", help="Scan that the page shows; default: RUN_DIR-scan, if there."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write report.html: all that was found, in one page that opens from disk, with cards of the latents worth one."""
    with guard(as_json, str(run_dir)):
        from ..config import settled
        from ..errors import UsageError
        from ..pipeline import RunRecord

        if (run_dir / "scan.json").is_file():
            raise UsageError(
                f"'{run_dir}' is a scan's folder, and a page is of a run",
                hint=f"usae-probe report RUN_DIR --scan {run_dir} shows it on its run's page",
            )
        config = RunRecord(run_dir).config().on(device)
        options = {"cards": cards, "scan": None if scan is None else str(scan.resolve())}
        (page,) = settled((config.report,), {key: value for key, value in options.items() if value is not None})
        do_stages(config.model_copy(update={"report": page}), run_dir, as_json, ("report",))


def _stages(
    config: Path,
    out: Path | None,
    asked: Callable[[RunConfig], RunConfig],
    as_json: bool,
    stages: tuple[Stage, ...] | None,
) -> None:
    folder = out or Path("runs") / config.stem
    with guard(as_json, str(folder), joins=True), together() as world:
        from ..config import RunConfig

        loaded = asked(RunConfig.load(config))
        if world and not world.main:
            help_process_0(loaded, folder, stages, world)
        else:
            do_stages(loaded, folder, as_json, stages, world=world)
