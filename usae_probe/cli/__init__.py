"""The command line: the only parser of arguments. Heavy imports happen inside the commands.

Exit status: 0 done; 2 anything that can be known from arguments, config and model structure; 1 everything else that
fails; 130 interrupted; 143 ended by SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from . import buffer, doctor, export, models, scan, stages, sweep

app = typer.Typer(
    name="usae-probe",
    help="What do trained vision models represent in common? Universal sparse autoencoders on layers of live models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(asked: bool) -> bool:
    if asked:
        sys.stdout.write(f"usae-probe {__version__}\n")
        raise typer.Exit
    return asked


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_say_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an unforeseen error happened; may stand anywhere.")
    ] = False,
) -> None:
    pass


for _command in (
    stages.run,
    stages.harvest,
    stages.train,
    stages.evaluate,
    sweep.sweep,
    scan.scan,
    stages.demo,
    stages.cam,
    stages.report,
    export.export,
    models.adapters,
    models.layers,
    doctor.doctor,
):
    app.command()(_command)
app.add_typer(buffer.app)


def main() -> None:
    """Run the command line; usage errors follow `--json` too."""
    arguments = sys.argv[1:]
    as_json = "--json" in arguments
    if "--debug" in arguments:
        os.environ["USAE_PROBE_DEBUG"] = "1"  # of processes that this one starts, too
        arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        status = app(arguments, standalone_mode=False)
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
