"""The command that looks whether everything works on this machine: doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, guard, no_option, show, shown_warnings


def doctor(
    out: Annotated[Path, typer.Option("--out", callback=no_option, help="Where runs would be written.")] = Path("runs"),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the benchmark of about five seconds.")] = False,
    as_json: Json = False,
) -> None:
    """Look whether everything works on this machine: versions, devices, adapters, kernels against their oracle, hooks,
    disk, and how fast it is. Exit status 1 if something does not."""
    with guard(as_json):
        from ..pipeline.doctor import diagnose
        from ..report import terminal
        from ..report.doctor import doctor_screen

        _, stderr = terminal.consoles()
        with terminal.StageProgress(stderr) as bars, shown_warnings(bars.say):
            found = diagnose(
                out, device=device, benchmark=not quick, announce=lambda what: bars.update("doctor", 0, 1, "", what)
            )
        show(as_json, found, lambda: doctor_screen(found))
    if found["problems"]:
        raise typer.Exit(1)
