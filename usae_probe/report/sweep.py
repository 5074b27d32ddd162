"""The table of a sweep in the terminal: a row per combination, its mean over seeds and below it the range."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from ..sites import layer_of, model_of
from ..split import spoken
from .facts import Facts
from .published import published_facts
from .r2_table import finite, short
from .summary import file_table
from .tables import facts_table

WIDTH = 80
_GAP = 2
_SHOWN_FAILURES = 8

Spread = Mapping[str, float] | None


class _Column(NamedTuple):
    """A column: its heading, and per combination the mean and the range below it."""

    heading: str
    cells: list[tuple[str, str]]

    @property
    def width(self) -> int:
        return max(len(line) for cell in (*self.cells, tuple(self.heading.split("\n"))) for line in cell)


def sweep_summary(data: Mapping[str, Any], files: Mapping[str, Path]) -> RenderableType:
    """Return the closing screen of a sweep, at most 80 columns wide as far as names and values allow.

    With two sites both cross-R² are shown, beside the means or, where they do not fit there, in a table below.

    Args:
        data: the content of `sweep.json`.
        files: where the results are, by what they are.
    """
    settings, means, pairs = _settings(data), list(_means(data)), list(_pairs(data))
    beside = sum(column.width + _GAP for column in (*settings, *means, *pairs)) - _GAP <= WIDTH
    tables = [[*settings, *means[:2], *pairs, *means[2:]]] if beside else [[*settings, *means]]
    if pairs and not beside:
        tables.append([*settings, *pairs])
    parts: list[RenderableType] = [_title(data)]
    for columns in tables:
        parts += [Text(""), _drawn(columns, n_settings=len(settings))]
    parts += [part for table in _published(data) for part in (Text(""), Constrain(facts_table(table), WIDTH))]
    for told in (_best(data), _failures(data), file_table(files) if files else None):
        if told:
            parts += [Text(""), told]
    return Group(*parts)


def shown_key(key: str, data: Mapping[str, Any]) -> str:
    """Return a key without its table, where another key has not the same name."""
    name: str = key.rpartition(".")[2]
    return name if sum(other.rpartition(".")[2] == name for other in data["keys"]) == 1 else key


def shown_value(value: Any) -> str:
    """Spell a value as in TOML, strings bare, large and small numbers short.

    >>> shown_value(1e12), shown_value(0.003), shown_value(2042), shown_value([64, 128]), shown_value("all")
    ('1e+12', '0.003', '2042', '[64,128]', 'all')
    """
    if isinstance(value, str):
        return value
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value, separators=(",", ":"))


def rows_measured(data: Mapping[str, Any]) -> str:
    """Say which rows the numbers are about: `900 validation rows`."""
    kind = spoken(data["split"])
    return f"{data['n_rows']:,} {kind} rows" if data["n_rows"] else f"{kind} rows"


def _title(data: Mapping[str, Any]) -> Text:
    n, seeds = len(data["combinations"]), len(data["seeds"])
    what = f"{n} combination{'' if n == 1 else 's'} × {seeds} seed{'' if seeds == 1 else 's'}"
    over = ["means, below them the range over seeds"] if seeds > 1 else []
    over += ["R²: over sites, over pairs of them"] if len(data["sites"]) > 1 else []
    below = "\n" + "; ".join(over) if over else ""
    return Text.assemble(("Sweep", "bold"), f"  {what}, measured on {rows_measured(data)}", (below, "dim"))


def _settings(data: Mapping[str, Any]) -> list[_Column]:
    return [
        _Column(shown_key(key, data), [(shown_value(row["settings"][key]), "") for row in data["combinations"]])
        for key in data["keys"]
    ]


def _means(data: Mapping[str, Any]) -> Iterator[_Column]:
    rows = data["combinations"]
    yield _column("self\nR²", [row["self_r2"] for row in rows], short)
    if len(data["sites"]) > 1:
        yield _column("cross\nR²", [row["cross_r2"] for row in rows], short)
    yield _column("uni-\nversal", [row["universal"] for row in rows], _whole)
    yield _column("dead", [row["dead_share"] for row in rows], _percent)
    if len(data["sites"]) > 1:
        yield _column("split", [row["split_latents"] for row in rows], _whole)
    yield _column("seconds", [row["seconds"] for row in rows], _seconds)


def _pairs(data: Mapping[str, Any]) -> Iterator[_Column]:
    """Yield cross-R² of both directions, when there are two sites."""
    sites = data["sites"]
    if len(sites) != 2:
        return
    names = {site: model_of(site) for site in sites}
    if len(set(names.values())) < 2:
        names = {site: layer_of(site) for site in sites}
    for source, target in permutations(sites):
        spreads = [row["r2"].get(source, {}).get(target) for row in data["combinations"]]
        yield _column(f"{names[source]}\n→{names[target]}", spreads, short)


def _column(heading: str, spreads: Sequence[Spread], spell: Callable[[float], str]) -> _Column:
    return _Column(heading, [_cell(spread, spell) for spread in spreads])


def _cell(spread: Spread, spell: Callable[[float], str]) -> tuple[str, str]:
    if spread is None:
        return "–", ""
    low, high = spell(spread["min"]), spell(spread["max"])
    joint = "…" if low.startswith("−") else "–"
    return spell(spread["mean"]), f"{low}{joint}{high}" if low != high else ""


def _drawn(columns: Sequence[_Column], *, n_settings: int) -> Table:
    table = Table.grid(padding=(0, _GAP, 0, 0))
    for _ in columns:
        table.add_column(justify="right", no_wrap=True, vertical="bottom")
    table.add_row(*(Text(column.heading, style="dim") for column in columns))
    for at in range(len(columns[0].cells)):
        ranges = any(column.cells[at][1] for column in columns)
        cells = []
        for number, column in enumerate(columns):
            mean, spread = column.cells[at]
            strong = "" if number < n_settings else "bold"
            cells.append(Text.assemble((mean, strong), (f"\n{spread}" if ranges else "", "dim")))
        table.add_row(*cells)
    return table


def _published(data: Mapping[str, Any]) -> Iterator[Facts]:
    """Yield the figures of papers beside those of the first training with the same settings."""
    for cell in data["cells"]:
        if cell.get("published") and cell["seed"] == data["seeds"][0] and not cell["error"]:
            for facts in published_facts(cell["published"], cell):
                yield facts._replace(title=f"{_named(cell, data)}: {facts.title}", notes=[])


def _best(data: Mapping[str, Any]) -> Text | None:
    """Say which combination is the best by R² and by universal latents, and how many others are as good for a seed."""
    rows = [row for row in data["combinations"] if row["self_r2"]]
    if len(rows) < 2:
        return None
    lines = []
    for measure, name, spell in (
        ("self_r2", "self-R²", short),
        ("cross_r2", "cross-R²", short),
        ("universal", "universal latents", _whole),
    ):
        there = [row for row in rows if row[measure] and finite(row[measure]["mean"])]
        best = max(there, key=lambda row: row[measure]["mean"], default=None)
        if best and (measure != "universal" or best[measure]["mean"] > 0):
            value, equals = spell(best[measure]["mean"]), _equals(best, there, measure)
            lines.append(f"most {name}: {_named(best, data)} ({value}){equals}")
    return Text("\n".join(lines)) if lines else None


def _equals(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], measure: str) -> str:
    """Say how many other combinations have a seed that is better than a seed of the best one."""
    n = sum(row is not best and row[measure]["max"] > best[measure]["min"] for row in rows)
    return f"; {n} other{'' if n == 1 else 's'} within the seeds' range" if n else ""


def _failures(data: Mapping[str, Any]) -> RenderableType | None:
    failed = [cell for cell in data["cells"] if cell["error"]]
    if not failed:
        return None
    lines = [Text(f"{len(failed)} of {len(data['cells'])} cells failed", style="bold red")]
    for cell in failed[:_SHOWN_FAILURES]:
        lines.append(Text.assemble(f"  {cell['name']}: {cell['error']['message']}"))
    if more := len(failed) - _SHOWN_FAILURES:
        lines += [Text(f"  and {more} more, see sweep.json")] if more > 0 else []
    return Constrain(Group(*lines), WIDTH)


def _named(row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Name a combination by the keys that differ between them."""
    spelled = {key: shown_value(value) for key, value in row["settings"].items()}
    differ = [
        key for key in spelled if any(shown_value(o["settings"][key]) != spelled[key] for o in data["combinations"])
    ]
    return ", ".join(f"{shown_key(key, data)} = {spelled[key]}" for key in differ)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share == 0 or share >= 0.0995 else f"{100 * share:.1f}%"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
