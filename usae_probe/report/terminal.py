"""The terminal: progress with rate and remaining time, tables, errors. Everything but results goes to stderr."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..hooks import LayerInfo

_COLUMNS = 5
_MEANING = {
    "universal": "fires in all models, on the same images",
    "partial": "shared by some models, or at unequal rates",
    "chance": "fires in several models, not on the same images",
    "specific": "fires in one model",
    "rare": "fires in too few held-out images to tell",
    "dead": "never fires",
}


class StageProgress:
    """Progress bars of the stages of a run, as a context manager; lines instead of bars when not a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, stage: str, done: int, total: int, unit: str, note: str) -> None:
        """Show that `done` of `total` units of a stage are done."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done, unit=unit, rate="", note="")
        task = next(task for task in self._bars.tasks if task.id == self._tasks[stage])
        rate = (
            f"{task.speed:,.0f}/s" if task.speed and task.speed >= 10 else f"{task.speed:.1f}/s" if task.speed else ""
        )
        self._bars.update(self._tasks[stage], completed=done, total=total, rate=rate, note=note)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def finish(self, stage: str) -> None:
        """Take a stage's bar away."""
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))


def consoles() -> tuple[Console, Console]:
    """Return the consoles for results (stdout) and for everything else (stderr)."""
    return Console(highlight=False), Console(stderr=True, highlight=False)


def seconds(value: float) -> str:
    """Spell a duration: 8.3 s, 2 min 05 s."""
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60):02d} s"


def run_summary(metrics: Mapping[str, Any], files: Mapping[str, Path], note: str = "") -> RenderableType:
    """Return the closing screen of a run: R² matrix, classes of the latents, where the files are."""
    parts: list[RenderableType] = [Text(note, style="yellow")] if note else []
    return Group(*parts, *_r2_tables(metrics), _class_table(metrics), file_table(files))


def file_table(files: Mapping[str, Path]) -> Table:
    """Return where a run's results are."""
    where = Table.grid(padding=(0, 2))
    for name, path in files.items():
        where.add_row(name, escape(str(path)))
    return where


def _r2_tables(metrics: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the R² matrix, in blocks of columns that fit 80 characters without breaking a number."""
    sites = metrics["sites"]
    title = f"R² on {metrics['n_rows_eval']:,} held-out rows (on {metrics['n_rows_train']:,} training rows)"
    for start in range(0, len(sites), _COLUMNS):
        targets = sites[start : start + _COLUMNS]
        table = Table(title=title if start == 0 else "R², further targets", title_justify="left")
        table.add_column("code of ↓ decoded to →", overflow="fold")
        for target in targets:
            table.add_column(escape(target), justify="right", overflow="fold", min_width=7)
        for source in sites:
            cells = [_r2_cell(metrics["r2"][source][target], metrics["r2_train"][source][target]) for target in targets]
            table.add_row(escape(source), *cells)
        yield table


def _r2_cell(held_out: float | None, training: float | None) -> Text:
    def spell(value: float | None) -> str:
        return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"

    strength = 0.0 if held_out is None else min(max(held_out, 0.0), 1.0)
    style = "bold green" if strength >= 0.5 else "yellow" if strength >= 0.2 else "red"
    return Text.assemble((spell(held_out), style), (f"\n({spell(training)})", "dim"))


def _class_table(metrics: Mapping[str, Any]) -> Table:
    title = f"{metrics['n_latents']:,} latents, over {' and '.join(metrics['class_sites'])}"
    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, count in metrics["counts"].items():
        table.add_row(name, f"{count:,}", _MEANING[name])
    if metrics["n_split"]:
        table.add_row("  split", f"{metrics['n_split']:,}", "of the specific: one concept held by two latents")
    return table


def layer_tables(models: Mapping[str, Iterable[LayerInfo]]) -> Group:
    """Return the layers of each model as a table, in execution order."""
    return Group(*(_layer_table(name, layers) for name, layers in models.items()))


def _layer_table(name: str, layers: Iterable[LayerInfo]) -> Table:
    table = Table(title=escape(name), title_justify="left")
    for column, justify in (("layer", "left"), ("kind", "left"), ("output", "right"), ("layout", "left")):
        table.add_column(column, justify=justify, no_wrap=column == "layer")  # type: ignore[arg-type]
    table.add_column("parameters", justify="right")
    for info in layers:
        shape = "×".join(map(str, info.output_shape)) if info.output_shape else "–"
        calls = "never runs" if info.order is None else f"runs {info.calls}×" if info.calls > 1 else ""
        layout = calls or (str(info.layout) if info.layout else "–")
        table.add_row(escape(info.name), escape(info.kind), shape, layout, f"{info.parameters:,}")
    return table


def adapter_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the installed adapters as a table."""
    table = Table()
    for column in ("adapter", "from", "version", "state"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(row[key]) for key in ("name", "distribution", "version", "state")))
    return table


def error_text(message: str, hint: str) -> Text:
    """Return an error as one clear line, with what to do below it."""
    text = Text.assemble(("error: ", "bold red"), message)
    return Text.assemble(text, ("\n  " + hint, "dim")) if hint else text
