"""The command that makes a run's USAE ready for other people: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, guard, no_option, show


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run that is trained.")],
    site: Annotated[
        list[str] | None, typer.Option("--site", help="Only this site; repeat for more. Default: all.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", callback=no_option, help="Folder; default: export in the run's.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format", help="saelens: a folder per site that SAELens loads; safetensors: a plain file per site."
        ),
    ] = "saelens",
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Write encoder and decoder of every site for other tools, with a model card: measures, controls, limits."""
    with guard(as_json):
        from ..pipeline.export import export_run
        from ..report.summary import file_table

        done = export_run(run_dir, to, sites=site or (), format=format, force=force)
        data = {
            "folder": str(done.folder),
            "sites": done.sites,
            "measured": done.measured,
            "files": [str(path) for path in done.files],
        }
        where = {entry["site"]: done.folder / entry["file"] for entry in done.sites} | {"model card": done.files[-1]}
        show(as_json, data, lambda: file_table(where))
