"""The screen of a run while it works: stages, the one at work with rate and remaining time, R² as it improves,
memory and disk. It goes when the run ends; what it said of each stage stays.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..machine import folder_size, memory
from .buffer import spelled_bytes
from .r2_table import finite, ramp, short
from .style import shortened
from .terminal import R2, StageProgress, is_plain

_MOST_SITES = 6
_WIDTH, _LABEL, _CELL = 80, 26, 20  # columns: of all, and at most of names and numbers
_MEASURE_EVERY = 2.0  # seconds


def dashboard(console: Console, stages: Sequence[str], folder: Path) -> StageProgress:
    """Return what shows the stages of a run: a dashboard, or plain lines where nothing may move.

    Args:
        console: where it goes.
        stages: those that the run does, in order.
        folder: the run folder, whose size is shown.
    """
    return StageProgress(console) if is_plain(console) else Dashboard(console, stages, folder)


class Dashboard(StageProgress):
    """The screen of a run on a terminal."""

    def __init__(self, console: Console, stages: Sequence[str], folder: Path) -> None:
        super().__init__(console)
        self.folder = folder
        self.states: dict[str, str] = dict.fromkeys(stages, "")
        self.now = ""
        self.r2: R2 | None = None
        self.r2_before: R2 | None = None
        self.r2_step = 0
        self._disk = (-_MEASURE_EVERY, "")
        self._moving = Live(console=console, get_renderable=self.screen, transient=True, refresh_per_second=4)

    def begin(self, stage: str) -> None:
        """Say that a stage starts."""
        self.now = stage

    def update(self, stage: str, done: int, total: int, unit: str, note: str, r2: R2 | None = None) -> None:
        """Show that `done` of `total` units of a stage are done; R², where it was measured, beside the one before."""
        super().update(stage, done, total, unit, note)
        self.now = stage
        if r2 is not None:
            self.r2_before, self.r2, self.r2_step = self.r2, r2, done

    def finish(self, stage: str, state: str = "") -> None:
        """Take a stage's bar away, and show what became of it."""
        super().finish(stage)
        self.states[stage] = state or "done"
        if self.now == stage:
            self.now = ""

    def screen(self) -> RenderableType:
        """Return all that is shown now."""
        parts: list[RenderableType] = [Text(""), self._stages(), self._bars.get_renderable()]
        if self.r2 and self.now == "train":
            parts.append(_matrix(self.r2, self.r2_before, self.r2_step))
        return Group(*parts, Text(self._machine(), style="dim"))

    def _stages(self) -> Text:
        line = Text()
        for stage, state in self.states.items():
            if state:
                line.append(f"✓ {stage} {state}   ", style="dim")
            elif stage == self.now:
                line.append(f"▸ {stage}   ", style="bold")
            else:
                line.append(f"· {stage}   ", style="dim")
        return line

    def _machine(self) -> str:
        measured, disk = self._disk
        if time.monotonic() - measured >= _MEASURE_EVERY:
            free = shutil.disk_usage(self.folder if self.folder.exists() else Path.cwd()).free
            disk = f"run folder {spelled_bytes(folder_size(self.folder))}, {spelled_bytes(free)} of disk free"
            self._disk = (time.monotonic(), disk)
        return f"memory {spelled_bytes(memory())} · {disk}"


def _matrix(r2: R2, before: R2 | None, step: int) -> RenderableType:
    """Return R² on validation rows, each with its change since the last time; of many sites the means."""
    head = Text.assemble(("R²", "bold"), (f"  code of ↓ decoded to →, validation rows, step {step:,}", "dim"))
    sites = list(r2)
    if len(sites) > _MOST_SITES:
        own = [r2[site][site] for site in sites]
        cross = [r2[a][b] for a in sites for b in sites if a != b]
        means = f"own code {_mean(own)}, other codes {_mean(cross)}, in the mean of {len(sites)} sites"
        return Group(head, Text(means))
    label = min(max(map(len, sites)), _LABEL)
    cell = min((_WIDTH - label - 2) // len(sites), _CELL)
    table = Table.grid(padding=0)
    table.add_column(width=label + 1, no_wrap=True)
    for _ in sites:
        table.add_column(width=cell, justify="center", no_wrap=True)
    table.add_row("", *(Text(shortened(site, cell - 1), style="dim") for site in sites))
    for source in sites:
        cells = [_cell(r2[source][target], before[source][target] if before else None, cell) for target in sites]
        table.add_row(Text(shortened(source, label)), *cells)
    return Group(head, table)


def _cell(value: float | None, before: float | None, width: int) -> Text:
    if not finite(value):
        return Text("–".center(width))
    change = value - before if finite(before) else 0.0
    arrow = "▲" if change >= 0.005 else "▼" if change <= -0.005 else " "
    ground, ink, _ = ramp(value)
    return Text(f"{short(value)} {arrow}".center(width), style=Style(color=ink, bgcolor=ground))


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if finite(value)]
    return short(sum(known) / len(known)) if known else "–"
