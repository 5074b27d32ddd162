"""Commands on a buffer of activations: what it holds, whether it is intact, and rows of it for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BufferIntegrityError, UsageError, nearest
from .common import Json, guard, no_option, show

if TYPE_CHECKING:
    from ..buffer import ActivationBuffer
    from ..buffer.export import Exported
    from ..buffer.manifest import ShardEntry
    from ..report.terminal import StageProgress

app = typer.Typer(
    name="buffer",
    help="Look at a run's activations. What its buffer holds, whether it is intact; rows of it for other tools.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder, or a buffer's own folder.")]


@app.command()
def info(run_dir: RunDir, as_json: Json = False) -> None:
    """Show what a buffer holds: sites, splits, images. Also of one that is still being written."""
    with guard(as_json):
        from ..buffer import ActivationBuffer
        from ..report.buffer import buffer_screen, described

        data = described(ActivationBuffer(_buffer_in(run_dir)))
        show(as_json, data, lambda: buffer_screen(data))


@app.command()
def verify(run_dir: RunDir, as_json: Json = False) -> None:
    """Compare all of a buffer with its checksums. Exit status 1 when anything is damaged or missing."""
    with guard(as_json):
        from ..report import terminal
        from ..report.buffer import verified_screen

        _, stderr = terminal.consoles()
        with terminal.StageProgress(stderr) as bars:
            data = _verified(_buffer_in(run_dir), bars)
        show(as_json, data, lambda: verified_screen(data))
    if not data["ok"]:
        raise typer.Exit(1)


@app.command()
def export(
    run_dir: RunDir,
    site: Annotated[str, typer.Option("--site", help="Whose rows, such as vit/blocks.8; info lists the sites.")],
    to: Annotated[
        Path,
        typer.Option(
            "--to", callback=no_option, metavar="FILE", help="FILE.npy (and FILE.index.npz) or FILE.safetensors."
        ),
    ],
    split: Annotated[str, typer.Option("--split", help="train, validation, holdout, or all in this order.")] = "all",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float16 or float32; default: as the rows are stored.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write the rows of one site, [n, d_in], to a file. With the image, the token and the split of every row."""
    with guard(as_json):
        from ..buffer import ActivationBuffer
        from ..buffer.export import export as export_rows
        from ..report import terminal
        from ..report.buffer import exported_screen

        _, stderr = terminal.consoles()
        buffer = ActivationBuffer(_buffer_in(run_dir))
        with terminal.StageProgress(stderr) as bars:

            def progress(done: int, total: int) -> None:
                bars.update("export", done, total, "rows", "")

            written = export_rows(buffer, site, to, split=split, dtype=dtype, force=force, progress=progress)
        data = _exported(buffer, written)
        show(as_json, data, lambda: exported_screen(data))


def _verified(folder: Path, bars: StageProgress) -> dict[str, Any]:
    """Read all of a buffer and return what is wrong with it."""
    from ..buffer import ActivationBuffer
    from ..buffer.shard import RESTORE
    from ..report.buffer import GO_ON, described, what_is_missing, without_columns

    try:
        buffer = ActivationBuffer(folder)
    except BufferIntegrityError as error:
        return _verdict(folder, [], [{"message": error.message, "hint": error.hint}])
    there = [entry for entry in buffer.shards if not entry.dropped]
    read: list[str] = []

    def progress(file: str) -> None:
        read.append(file)
        bars.update("verify", len(read), len(there), "shards", file)

    wrong = _without_dropped(folder, buffer.verify(progress))
    problems = [{"message": without_columns(buffer, message), "hint": RESTORE} for message in wrong]
    if not buffer.complete:
        held = described(buffer)
        hint = "wait until it is written" if held["writer"] else GO_ON
        problems.append({"message": f"the buffer is not complete: {what_is_missing(held)}", "hint": hint})
    return _verdict(folder, there, problems)


def _without_dropped(folder: Path, wrong: list[str]) -> list[str]:
    """Leave out shards that a ring has dropped meanwhile."""
    from ..buffer import ActivationBuffer

    shards = ActivationBuffer(folder).shards if wrong else []
    gone = tuple(f"shard {folder / entry.file} " for entry in shards if entry.dropped)
    return [what for what in wrong if not what.startswith(gone)]


def _verdict(folder: Path, read: Sequence[ShardEntry], problems: list[dict[str, str]]) -> dict[str, Any]:
    size = sum(entry.size for entry in read)
    return {"folder": str(folder), "ok": not problems, "shards": len(read), "bytes": size, "problems": problems}


def _exported(buffer: ActivationBuffer, written: Exported) -> dict[str, Any]:
    dropped = [entry for entry in buffer.shards if entry.dropped and entry.split in written.rows]
    return {
        "file": str(written.path),
        "index": None if written.index_path is None else str(written.index_path),
        "site": written.site,
        "rows": written.n_rows,
        "d_in": written.d_in,
        "dtype": written.dtype,
        "splits": written.rows,
        "bytes": written.path.stat().st_size,
        "complete": buffer.complete,
        "dropped_rows": sum(entry.rows for entry in dropped),
        "source_fingerprint": buffer.source["fingerprint"],
    }


def _buffer_in(folder: Path) -> Path:
    """Return the buffer that a run folder holds, or that the folder is.

    Raises:
        UsageError: when it is neither; names runs near to it.
    """
    from ..buffer.manifest import MANIFEST

    for found in (folder, folder / "buffer"):
        if (found / MANIFEST).is_file():
            return found
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        near = "" if folder.exists() else nearest(folder.name, _folders(folder.parent))
        hint = near or "give a run's folder, or a buffer's"
        raise UsageError(f"'{folder}' {what}; a folder with a buffer was expected", hint=hint)
    runs = [str(run) for run in map(folder.joinpath, _folders(folder)) if (run / "buffer" / MANIFEST).is_file()]
    hint = "give a run's folder, or a buffer's" + (f", such as {', '.join(runs[:3])}" if runs else "")
    if (folder / "run.json").is_file():
        hint = "this run has not begun to harvest: usae-probe harvest makes its buffer"
    raise UsageError(
        f"'{folder}' holds no buffer: there is neither {folder / MANIFEST} nor {folder / 'buffer' / MANIFEST}",
        hint=hint,
    )


def _folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
