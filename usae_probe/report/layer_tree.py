"""A model's layers as a tree in the terminal.

Names are whole wherever they stand, for they are what one copies into a config; what parents say already is dimmed.
Nothing is wider than the terminal: columns that say less give way first. In a pipe nothing is left out.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..hooks import LayerInfo, Layout
from ..sites import POLICIES, Policy
from .layers import ModelLayers, Readable, Row, fitting_depth, rows_to, rows_with, tree

_BAR = 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_ENDLESS = 10_000
_FOLD = 6
"""Outputs of one layer that get a row each."""


def layer_trees(
    found: Sequence[ModelLayers], *, depth: int | None = None, matches: Sequence[Collection[str]] | None = None
) -> RenderableType:
    """Return the trees of all models, and how a site is written.

    Args:
        found: what was found out about each model.
        depth: how many levels are shown, 0 for all; default: as many as fit a screen.
        matches: by model, the layers that were searched for; only they are shown, whatever their depth.
    """
    shown: list[RenderableType] = []
    for number, model in enumerate(found):
        only = None if matches is None else matches[number]
        if only is None or only or len(found) == 1:
            shown += [LayerTree(model, depth, only), Text()]
    return _AsWideAsNeeded(Group(*shown, _site_hint(found, matches)))


class _AsWideAsNeeded(NamedTuple):
    """In a pipe, lines as long as they are, to be searched (print with `crop=False`); no blanks at their ends."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segment]:
        told = options.is_terminal or os.environ.get("COLUMNS")
        for line in console.render_lines(self.content, options if told else options.update(width=_ENDLESS), pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
            yield from line
            yield Segment.line()


class _Line(NamedTuple):
    """One line of the tree: its name with the lines before it, and a cell for each column."""

    name: Text
    cells: dict[str, Text]


@dataclass(frozen=True)
class _Form:
    """Which columns are shown, and how."""

    columns: tuple[str, ...]
    gap: int = 2
    kind: int = 99


_ALL = ("kind", "output", "layout", "grid", "d_in", "policies", "time", "bar", "parameters", "also")
_LEFT_OUT = (
    "also",
    "parameters",
    "bar",
    "grid",
    "",
    "",
    "policies",
    "layout",
    "kind",
    "time",
    "output",
    "some policies",
    "d_in",
)
"""What gives way, in this order; at the nameless steps columns move together, and kinds are cut short. Policies only
get shorter: what a row can always be is said once, above the column."""
_ALWAYS: tuple[Policy, ...] = ("pool", "all")
_HEADERS = {"bar": "", "also": "also called", "some policies": "pool,all +"}


def _forms() -> Iterator[_Form]:
    """Ways to show the columns, from all there is to the least."""
    form = _Form(_ALL)
    yield form
    for number, name in enumerate(_LEFT_OUT):
        shorter = ("some policies",) if name == "policies" else ()
        columns = tuple(part for column in form.columns for part in ((column,) if column != name else shorter))
        form = _Form(columns, gap=1 if number > 3 else 2, kind=12 if number > 4 else 99)
        yield form


@dataclass
class LayerTree:
    """A model's layers, drawn as wide as there is room.

    Attributes:
        model: what was found out about it.
        depth: as for `layer_trees`.
        only: layers that were searched for.
    """

    model: ModelLayers
    depth: int | None = None
    only: Collection[str] | None = None
    _rows: list[Row] = field(init=False)
    _cut: int = field(init=False, default=0)
    _policies: list[Policy] = field(init=False)

    def __post_init__(self) -> None:
        roots = tree(self.model.layers)
        readable = [one for runs in self.model.runs.values() for run in runs for one in run]
        self._policies = [policy for policy in POLICIES if any(policy in one.d_in for one in readable)]
        if self.only is not None:
            self._rows = rows_with(roots, self.only)
            return
        self._cut = fitting_depth(roots, self.model.used) if self.depth is None else self.depth
        self._rows = rows_to(roots, self._cut, self.model.used)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segment]:
        room = None if options.max_width >= _ENDLESS else options.max_width
        lines = [line for row in self._rows for line in self._lines(row)]
        table = _fitting(lines, room)
        yield self._title(room)
        yield from self._about_sites()
        yield table
        if end := self._end():
            yield end

    def _title(self, room: int | None) -> Text:
        model = self.model
        facts = [f"{len(model.layers)} layers", f"{_short(model.parameters)} parameters"]
        facts += [f"input {_times(model.input_shape)}", f"forward pass {_duration(model.seconds)}"]
        said = " · ".join(facts)
        between = "  " if room is None or len(model.title) + 2 + len(said) <= room else "\n"
        return Text.assemble((model.title, "bold"), (between + said, "dim"))

    def _about_sites(self) -> Iterator[Text]:
        if self.model.sites:
            yield Text.assemble(("● ", "green"), "sites: ", ", ".join(map(str, self.model.sites)))
        for problem in self.model.problems:
            yield Text(f"! {problem}", style="red")

    def _end(self) -> Text | None:
        if self.only is not None:
            return Text(f"{len(self.only)} of {len(self.model.layers)} layers match", style="dim")
        hidden = sum(row.hidden for row in self._rows)
        if not hidden:
            return None
        return Text(
            f"+N: N layers more below it; … {hidden} in all (--depth {self._cut + 1}; --depth 0: everything)",
            style="dim",
        )

    def _lines(self, row: Row) -> Iterator[_Line]:
        branch, info = row.branch, row.branch.info
        on_the_way = self.only is not None and branch.name not in self.only
        name = self._name(row, on_the_way)
        if info is None or on_the_way:
            yield _Line(name, {})
            return
        runs = self.model.runs[info.name]
        outputs = _different(runs)
        about = {"kind": Text(info.kind), "parameters": Text(_short(info.parameters) if info.parameters else "")}
        about |= {"also": Text("= " + ", ".join(info.aliases) if info.aliases else "", style="dim")}
        about |= _time_cells(self.model.time_shares.get(info.name))
        if info.calls > 1 and len(outputs) == len(runs[0]):
            name.append(f" ×{info.calls}", style="yellow")
        if len(outputs) == 1:
            yield _Line(name, about | self._output_cells(outputs[0], info))
            return
        if not outputs:
            never = "" if branch.runs and info.order is None else "never runs" if not branch.runs else "no tensor"
            yield _Line(name, about | {"output": Text(never, style="dim")})
            return
        yield _Line(name, about | {"output": Text(f"{len(outputs)} outputs", style="dim")})
        guide = row.guide.replace("├─", "│ ").replace("└─", "  ") + ("│ " if branch.below else "  ")
        for output in outputs[:_FOLD]:
            site = Text.assemble((guide, "dim"), (info.name, "dim"), (output.suffix, "yellow"))
            yield _Line(site, self._output_cells(output, info))
        if more := outputs[_FOLD:]:
            yield _Line(Text(f"{guide}… {len(more)} more, to {more[-1].suffix} (--json)", style="dim"), {})

    def _name(self, row: Row, on_the_way: bool) -> Text:
        above, dot, last = row.branch.name.rpartition(".")
        used = bool(self.model.sites_of(row.branch.name))
        mark = [("● " if used else "  ", "green")] if self.model.sites else []
        style = "dim" if on_the_way or row.branch.info is None else "bold green" if used else "bold"
        name = Text.assemble(*mark, (row.guide, "dim"), (above + dot, "dim"), (last, style))
        return name.append(f" +{row.hidden}", style="dim cyan") if row.hidden else name

    def _output_cells(self, readable: Readable, info: LayerInfo) -> dict[str, Text]:
        output, d_in = readable.output, readable.d_in
        layout = output.layout
        grid = layout.grid if layout else None
        used = {site.policy for site in self.model.sites_of(info.name)}
        cells = {
            "output": Text(_times(output.shape or output.full_shape), style="" if output.shape else "dim"),
            "layout": Text(_spelled(layout) if layout else "?" if output.shape else "no batch axis"),
            "grid": Text(_times(grid) if grid else ""),
            "d_in": Text(", ".join(map(str, sorted(set(d_in.values())))) or "–"),
        }
        slots = self._policies if d_in else ()
        cells["policies"] = _slots(slots, d_in, used)
        cells["some policies"] = _slots([policy for policy in slots if policy not in _ALWAYS], d_in, used)
        return cells


def _different(runs: Sequence[tuple[Readable, ...]]) -> list[Readable]:
    """Return the outputs that get a row each: those of one run where all runs are alike, else those of every run."""
    if len({tuple(readable.output for readable in run) for run in runs}) <= 1:
        return [readable for run in runs[:1] for readable in run]
    return [readable for run in runs for readable in run]


def _slots(slots: Sequence[Policy], d_in: Collection[Policy], used: Collection[Policy]) -> Text:
    """Spell policies, each below its like: what is missing leaves a gap."""
    text = Text()
    for policy in slots:
        spelled = policy if policy in d_in else " " * len(policy)
        text.append(f"{spelled} ", style="bold green" if policy in used else "")
    text.rstrip()
    return text


def _spelled(layout: Layout) -> str:
    """Spell a layout with its grid, as a stated one may be."""
    text = str(layout)
    grid = layout.grid if layout.kind == "tokens" else None
    return text.removeprefix("0+").replace("tokens", f"{grid[0]}x{grid[1]}") if grid else text


def _time_cells(share: float | None) -> dict[str, Text]:
    if share is None:
        return {}
    eighths = round(min(max(share, 0.0), 1.0) * 8 * _BAR)
    bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    return {"time": Text(f"{share:.0%}"), "bar": Text(bar, style="cyan")}


def _fitting(lines: Sequence[_Line], room: int | None) -> Table:
    """Return the fullest table that is not wider than `room`."""
    longest = max((line.name.cell_len for line in lines), default=0)
    for form in _forms():
        widths = {name: _width(lines, name, form) for name in form.columns}
        used = [name for name in form.columns if widths[name]]
        if room is None or longest + sum(widths[name] + form.gap for name in used) <= room:
            break
    table = Table(box=None, padding=(0, form.gap, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("layer", overflow="fold", no_wrap=room is None)
    for name in used:
        right = name in ("output", "d_in", "time", "parameters")
        table.add_column(
            _HEADERS.get(name, name), justify="right" if right else "left", no_wrap=True, width=widths[name]
        )
    for line in lines:
        table.add_row(line.name, *(line.cells.get(name, Text()) for name in used))
    return table


def _width(lines: Sequence[_Line], column: str, form: _Form) -> int:
    """Return how wide a column is; 0 without anything in it."""
    longest = max((line.cells[column].cell_len for line in lines if column in line.cells), default=0)
    return (
        min(max(longest, len(_HEADERS.get(column, column))), form.kind if column == "kind" else 999) if longest else 0
    )


def _times(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _short(number: int) -> str:
    """Spell a number in at most four figures: 832, 23.5k, 85.8M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return str(number)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.995 else f"{seconds:.1f} s"


def _site_hint(found: Sequence[ModelLayers], matches: Sequence[Collection[str]] | None) -> Text:
    """Say how a site is written, by an example from what is shown: the last layer with places, best one that learns."""
    sites = [
        ("mean" in readable.d_in, info.parameters > 0, f"{model.name}/{info.name}{readable.suffix}")
        for number, model in enumerate(found)
        for info in model.layers
        if matches is None or info.name in matches[number]
        for readable in (model.runs[info.name] or [()])[-1]
        if readable.d_in
    ]
    text = "site: model/layer[@policy]"
    if sites:
        has_mean, _, site = max(reversed(sites), key=lambda one: one[:2])
        text += f", e.g. {site}@mean" if has_mean else f", e.g. {site}"
    return Text(text, style="dim")
