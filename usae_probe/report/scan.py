"""The closing screen of a scan: in words, heat maps of layers by layers, the profile over depth, latents followed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..probes.scan import pairs_between
from ..sites import layer_of
from ..split import spoken
from .r2_table import finite, ramp, short
from .style import shortened
from .summary import file_table

WIDTH = 80
_NAME = 15
_BAR = 10
_FOLLOWED = 8
_LEVELS = " ▁▂▃▄▅▆▇█"
_SOLID = "not dim #56B4E9"
_MEASURES = {
    "r2": "R²",
    "linear": "ridge",
    "cka": "CKA",
    "mutual_knn": "k-NN",
    "universal": "universal",
    "closest": "closest",
    "phi": "φ",
}

Numbers = Mapping[str, Mapping[str, float | None]]


class _Map(NamedTuple):
    """One heat map: in hundredths, or whole numbers; the best source of a target is in its column, or `by_row`."""

    title: str
    values: Numbers
    hundredths: bool = True
    by_row: bool = False

    def largest(self, cells: Sequence[tuple[str, str]]) -> float | None:
        """Return the largest value of some cells, those of a layer with itself aside."""
        return max((value for a, b in cells if a != b and finite(value := self.values[a][b])), default=None)


def scan_summary(data: Mapping[str, Any], files: Mapping[str, Path], blocks: Mapping[str, int]) -> RenderableType:
    """Return the closing screen of a scan, at most 80 columns wide as far as the number of layers allows.

    Args:
        data: the content of `scan.json`.
        files: where the results are, by what they are.
        blocks: how many blocks each model has.
    """
    parts: list[RenderableType] = [_headline(data, blocks)]
    models = list(data["models"])
    for one, other in combinations(models, 2) if len(models) > 1 else [(models[0], models[0])]:
        parts += [Text(""), *_maps(data, one, other)]
    parts += [Text(""), *_profile(data)]
    for told in (_followed(data), _agreement(data), _floor(data), file_table(files) if files else None):
        if told:
            parts += [Text(""), told]
    return Group(*parts)


def _headline(data: Mapping[str, Any], blocks: Mapping[str, int]) -> Text:
    sizes, *said, rows = scan_said(data, blocks)
    lines = [line for sentence in said for line in textwrap.wrap(sentence, WIDTH)]
    body = "".join(f"{line}\n" for line in lines)
    return Text.assemble(("Scan", "bold"), f"  {sizes}\n{body}", (textwrap.fill(rows, WIDTH), "dim"))


def scan_said(data: Mapping[str, Any], blocks: Mapping[str, int]) -> list[str]:
    """Say of which layers a scan is, what it found, sentence by sentence, and on how many rows.

    Args:
        data: the content of `scan.json`.
        blocks: how many blocks each model has, as far as known.
    """
    said = [" × ".join(_size(model, len(sites), blocks.get(model, 0)) for model, sites in data["models"].items())]
    best = max((row for row in data["best_matches"] if finite(row.get("r2"))), key=lambda row: row["r2"], default=None)
    if best:
        linear = f" (a linear map {short(best['linear'])})" if finite(best.get("linear")) else ""
        said.append(
            f"{best['target']} is the layer best explained from another model: by {best['source']}'s code "
            f"R² {short(best['r2'])}{linear}."
        )
    alike = _most_alike(data)
    if alike:
        a, b, value, null = alike
        said.append(f"Most alike without a USAE: {a} and {b}, CKA {short(value)} (shuffled {short(null)}).")
    order = {name: value for name, value in data["order"].items() if name in ("r2", "cka") and value is not None}
    if order:
        spelled = ", ".join(f"by {_MEASURES[name]} {short(value)}" for name, value in order.items())
        said.append(f"Depth of a layer and of its best match, rank correlation: {spelled}.")
    trained = data["trained"]
    steps = ", ".join(f"{n:,} steps {name}" for name, n in trained["steps"].items())
    rows = f"{data['n_rows_train']:,} training rows, {data['n_rows']:,} {spoken(data['measured_on'])} rows measured"
    return [*said, f"{rows}; {trained['n_latents']:,} latents, {trained['k']} active, {steps}" if steps else rows]


def _size(model: str, n: int, blocks: int) -> str:
    of = f" of {blocks}" if blocks > n else ""
    return f"{model} ({n}{of} layers)"


def _most_alike(data: Mapping[str, Any]) -> tuple[str, str, float, float | None] | None:
    alike = data["similarity"]
    if not alike:
        return None
    known = [(a, b) for a, b in pairs_between(data["sites"]) if finite(alike["cka"][a][b])]
    if not known:
        return None
    a, b = max(known, key=lambda pair: alike["cka"][pair[0]][pair[1]])
    return a, b, alike["cka"][a][b], alike["cka_null"][a][b]


def _maps(data: Mapping[str, Any], one: str, other: str) -> Iterator[RenderableType]:
    """Yield heat maps of all measures, two side by side where they fit; rows are layers of one, columns of other."""
    rows, columns = data["models"][one], data["models"][other]
    codes = data["joint"] or data["pairs"]
    maps: list[_Map] = []
    if codes:
        turned = {a: {b: codes["r2"][b][a] for b in columns} for a in rows}
        maps.append(_Map(f"R², {one} → {other}", codes["r2"]))
        maps.append(_Map(f"R², {other} → {one}", turned, by_row=True))
    if data["similarity"]:
        maps.append(_Map("debiased CKA", data["similarity"]["cka"]))
        maps.append(_Map(f"mutual {data['similarity']['k']}-NN", data["similarity"]["mutual_knn"]))
    if codes:
        maps.append(_Map("universal latents", codes["universal"], hundredths=False))
        maps.append(_Map(f"closest, to {other}", codes["closest"], hundredths=False))
    label = min(_NAME, max(len(layer_of(site)) for site in rows))
    for at in range(0, len(maps), 2):
        both = maps[at : at + 2]
        wide = max(len(_spelled(m.values[a][b], m.hundredths)) for m in both for a in rows for b in columns)
        cell = max(wide, len(str(len(columns)))) + 1
        width = max(len(columns) * cell, *(len(m.title) for m in both))
        step = 2 if label + 1 + 2 * width + 3 <= WIDTH else 1
        for part in (both[i : i + step] for i in range(0, len(both), step)):
            yield _side_by_side(part, rows, columns, (label, width, cell))
    yield Text("hundredths or latents; brightest: a map's largest; underlined: best source", style="dim")
    names = "  ".join(f"{i}:{layer_of(site)}" for i, site in enumerate(columns, start=1))
    yield Text(f"columns, {other}: {names}", style="dim")


def _side_by_side(
    maps: Sequence[_Map], rows: Sequence[str], columns: Sequence[str], widths: tuple[int, int, int]
) -> Table:
    """Return maps in one table; `widths` are those of the rows' names, of a map and of a cell."""
    label, width, cell = widths
    table = Table.grid(padding=0)
    table.add_column(width=label + 1, no_wrap=True)
    for number, _ in enumerate(maps, start=1):
        table.add_column(width=min(width + 3 * (number < len(maps)), WIDTH), no_wrap=True)
    table.add_row("", *(Text(m.title, style="bold") for m in maps))
    table.add_row("", *(Text("".join(f"{i:>{cell}}" for i in range(1, len(columns) + 1)), style="dim") for _ in maps))
    tops = [m.largest([(a, b) for a in rows for b in columns]) or 1.0 for m in maps]
    for a in rows:
        lines = []
        for m, top in zip(maps, tops, strict=True):
            line = Text()
            for b in columns:
                rivals = [(a, c) for c in columns] if m.by_row else [(c, b) for c in rows]
                best = a != b and m.values[a][b] == m.largest(rivals)
                line.append_text(_cell(m.values[a][b], m.hundredths, top, cell, best=best))
            lines.append(line)
        table.add_row(Text(shortened(layer_of(a), label)), *lines)
    return table


def _cell(value: float | None, hundredths: bool, top: float, width: int, *, best: bool) -> Text:
    text = _spelled(value, hundredths)
    if not finite(value):
        return Text(f"{text:>{width}}", style="dim")
    share = value / top if top > 0 else 0.0
    ground, ink, _ = ramp(share)
    style = Style(color=ink, bgcolor=ground)
    padded = Text(" " * (width - len(text)), style=style)
    return padded.append(text, style=style + Style(underline=best, bold=best))


def _spelled(value: float | None, hundredths: bool) -> str:
    if not finite(value):
        return "–"
    shown = 100 * value if hundredths else value
    return f"{shown:z.0f}".replace("-", "−") if shown > -99.5 else "<"


def _profile(data: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield a table of the best match of each layer, with bars over depth."""
    matches = data["best_matches"]
    if not matches:
        return
    several = len(data["models"]) > 2
    measure = "r2" if any(finite(row.get("r2")) for row in matches) else "cka"
    yield Text("Universality over depth", style="bold")
    table = Table.grid(padding=(0, 1, 0, 0))
    headings = ["layer", "depth", "", "R² ± 95 %", "ridge", "from", "CKA", "universal"]
    for at, _ in enumerate(headings):
        table.add_column(justify="right" if at in (1, 3, 4, 6, 7) else "left", no_wrap=True)
    table.add_row(*(Text(heading, style="dim") for heading in headings))
    before = ""
    for row in matches:
        model = f"{row['target'].partition('/')[0]} ← {row['model']}"
        if model != before:
            table.add_row(Text(model, style="bold"))
            before = model
        source = row["source"] if several else layer_of(row["source"])
        table.add_row(
            shortened(layer_of(row["target"]), _NAME),
            short(data["depths"][row["target"]]),
            _bar(row.get(measure), row.get("linear")),
            _interval(row),
            short(row.get("linear")),
            f"{shortened(source, _NAME)}{'~' if row['as_good'] else ''}",
            short(row.get("cka")),
            f"{row['universal']:,.0f}" if finite(row.get("universal")) else "–",
        )
    yield table
    best = "that explains it best" if measure == "r2" else "that is most alike"
    notes = [f"from: the layer elsewhere {best}; bars: " + ("R², ░ up to ridge" if measure == "r2" else "CKA")]
    if any(row["as_good"] for row in matches):
        notes.append("~ other layers there are as good, within their intervals")
    shuffled = [f"CKA at most {short(max(found))}"] if (found := _known(matches, "cka_null")) else []
    shuffled += [f"universal latents {max(found):.1f}"] if (found := _known(matches, "universal_null")) else []
    if shuffled:
        notes.append(f"images shuffled: {', '.join(shuffled)}")
    yield Text("\n".join(notes), style="dim")


def _bar(value: float | None, reference: float | None) -> Text:
    solid = _length(value)
    whole = max(solid, _length(reference))
    return Text.assemble(("█" * solid, _SOLID), "░" * (whole - solid), " " * (_BAR - whole))


def _length(value: float | None) -> int:
    return round(min(max(value, 0.0), 1.0) * _BAR) if finite(value) else 0


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("r2_low"), row.get("r2_high")
    half = f" ±{short((high - low) / 2)}" if finite(low) and finite(high) else ""
    return f"{short(row.get('r2'))}{half}"


def _known(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for row in rows if finite(value := row.get(key))]


def _followed(data: Mapping[str, Any]) -> Group | None:
    """Return where in depth the strongest shared latents fire, as a line of blocks for each model."""
    if not data["followed"]:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    for _ in (*data["models"], "φ", "at", "follows"):
        table.add_column(no_wrap=True, overflow="ellipsis")
    heads = ["latent", *data["models"], "φ", "best match", "follows"]
    table.add_row(*(Text(head, style="dim") for head in heads))
    for latent in data["followed"][:_FOLLOWED]:
        traces = ["".join(_level(latent["phi_at"][site]) for site in sites) for sites in data["models"].values()]
        best = " · ".join(layer_of(site) for site in latent["best"])
        table.add_row(
            f"{latent['latent']}",
            *(Text(trace, style=_SOLID) for trace in traces),
            short(latent["phi"]),
            best,
            latent["follows"].replace("=", " = "),
        )
    n = len(data["followed"])
    title = Text.assemble(("Shared latents through depth", "bold"), (f"  the strongest of {n:,}", "dim"))
    note = "height: φ of firing there and at the best match elsewhere, first layer to last"
    return Group(title, table, Text(note, style="dim"))


def _level(value: float | None) -> str:
    if not finite(value):
        return " "
    return _LEVELS[min(max(math.ceil(value * 8 - 1e-9), 1), 8)]


def _agreement(data: Mapping[str, Any]) -> Text | None:
    """Say which measures rank the cells alike."""
    found = data["agreement"]
    shown = []
    for one, other in (("r2", "linear"), ("r2", "cka"), ("cka", "mutual_knn"), ("cka", "phi")):
        if finite(found.get(f"{one} and {other}")):
            shown.append(f"{_MEASURES[one]} and {_MEASURES[other]} {short(found[f'{one} and {other}'])}")
    strategies = [
        f"{_MEASURES[name]} {short(found[f'{name}: joint and pairs'])}"
        for name in ("r2", "universal", "phi")
        if finite(found.get(f"{name}: joint and pairs"))
    ]
    lines = ["Rank correlation over the cells:\n" + ", ".join(shown)] if shown else []
    lines += [f"One USAE over all layers and one for each pair: {', '.join(strategies)}"] if strategies else []
    return Text("\n".join(lines), style="dim") if lines else None


def _floor(data: Mapping[str, Any]) -> Text | None:
    """Say what untrained networks share, beside the trained ones."""
    if not data["floor"]:
        return None
    parts = []
    for measure in ("r2", "cka", "universal"):
        pair = [
            max((row[measure] for row in d["profile"] if finite(row[measure])), default=None)
            for d in (data, data["floor"])
        ]
        if all(map(finite, pair)):
            spelled = [f"{v:,.0f}" if measure == "universal" else short(v) for v in pair]
            parts.append(f"{_MEASURES[measure]} {spelled[1]} ({spelled[0]} trained)")
    return Text.assemble(("Floor", "bold"), f"  largest cell of the same networks untrained:\n{', '.join(parts)}")
