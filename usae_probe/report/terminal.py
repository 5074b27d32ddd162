"""The terminal: progress with rate and remaining time, tables, errors. Everything but results goes to stderr."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

R2 = Mapping[str, Mapping[str, float]]


class StageProgress:
    """Progress bars of the stages of a run, as a context manager; when not a terminal or with `NO_COLOR` plain lines.

    Args:
        console: where they go.
        every: seconds between the plain lines of a stage.
    """

    def __init__(self, console: Console, *, every: float = 30.0) -> None:
        self.console, self.every = console, every
        self.plain = is_plain(console)
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
            disable=self.plain,
        )
        self._moving: Progress | Live = self._bars
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> StageProgress:
        self._moving.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._moving.stop()

    def begin(self, stage: str) -> None:
        """Say that a stage starts."""

    def update(self, stage: str, done: int, total: int, unit: str, note: str, r2: R2 | None = None) -> None:
        """Show that `done` of `total` units of a stage are done; `r2` is shown where there is room for it."""
        if stage in self._tasks and self._task(stage).fields["unit"] != unit:
            self._bars.remove_task(self._tasks.pop(stage))  # rate and rest of other things than these
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done, unit=unit, rate="", note="")
            self._said.setdefault(stage, time.monotonic())
        task = self._task(stage)
        rate = (
            f"{task.speed:,.0f}/s" if task.speed and task.speed >= 10 else f"{task.speed:.1f}/s" if task.speed else ""
        )
        self._bars.update(self._tasks[stage], completed=done, total=total, rate=rate, note=note)
        if self.plain and time.monotonic() - self._said[stage] >= self.every and done < total:
            self._said[stage] = time.monotonic()
            left = f"{seconds(float(task.time_remaining))} left" if task.time_remaining is not None else ""
            far = f"{done:,} of {total:,} {unit}" if unit else ""  # of some work only what it is at is known
            self.say(f"{stage}: {', '.join(part for part in (far, rate, left, note) if part)}")

    def _task(self, stage: str) -> Task:
        return next(task for task in self._bars.tasks if task.id == self._tasks[stage])

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def finish(self, stage: str, state: str = "") -> None:
        """Take a stage's bar away; `state` is what became of it, in a word or two."""
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))
        self._said.pop(stage, None)


def is_plain(console: Console) -> bool:
    """Say whether nothing may move on a console: it is no terminal, or `NO_COLOR` is set."""
    return not console.is_terminal or console.is_dumb_terminal or bool(os.environ.get("NO_COLOR"))


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
