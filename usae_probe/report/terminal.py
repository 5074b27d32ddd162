"""The terminal: progress with rate and remaining time, tables, errors. Everything but results goes to stderr."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


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
    # Left to itself, rich takes NO_COLOR as no colours, but still writes the escape codes of bold and dim text.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return (
        Console(highlight=False, color_system=colours),
        Console(stderr=True, highlight=False, color_system=colours),
    )


def seconds(value: float) -> str:
    """Spell a duration: 8.3 s, 2 min 05 s."""
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60):02d} s"


def adapter_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the installed adapters as a table."""
    table = Table()
    for column in ("adapter", "from", "version", "where", "state"):
        table.add_column(column, overflow="fold")  # a path that is cut short says nothing
    for row in rows:
        table.add_row(*(escape(row[key]) for key in ("name", "distribution", "version", "origin", "state")))
    return table


def error_text(message: str, hint: str) -> Text:
    """Return an error as one clear line, with what to do below it."""
    text = Text.assemble(("error: ", "bold red"), message)
    return Text.assemble(text, ("\n  " + hint, "dim")) if hint else text
