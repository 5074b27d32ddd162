"""What `usae-probe buffer` says: what a buffer holds, what is wrong with it, what was exported of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..buffer import ActivationBuffer, SiteSpec
from ..buffer.parts import read_parts
from ..errors import BufferIntegrityError
from ..lock import holder
from ..split import SPLITS, SplitName
from .summary import file_table

WIDTH = 80
_HASH = 12
_SHOWN_SKIPPED = 5
GO_ON = "give the command that harvests again: it goes on with what is missing"


# --- what it holds ---


def described(buffer: ActivationBuffer) -> dict[str, Any]:
    """Return what a buffer holds, for JSON and for `buffer_screen`."""
    splits = {split: _split(buffer, split) for split in SPLITS}
    writer = holder(buffer.path)
    return {
        "folder": str(buffer.path),
        "schema": buffer.schema,
        "complete": buffer.complete,
        "writer": writer._asdict() if writer else None,
        "problem": None if writer else _absent(buffer),
        "missing": _missing(buffer, splits),
        "mode": "ring" if buffer.identity.get("ring") else "store",
        "dropped": {what: sum(of["dropped"][what] for of in splits.values()) for what in ("shards", "rows")},
        "dtype": buffer.dtype,
        "bytes": sum(of["bytes"] for of in splits.values()),
        "shards": sum(of["shards"] for of in splits.values()),
        "images_per_shard": buffer.identity["shard_images"],
        "sites": [_site(buffer, spec) for spec in buffer.specs.values()],
        "splits": splits,
        "skipped": [{"index": image.index, "name": image.name, "reason": image.reason} for image in buffer.skipped],
        "source": buffer.source,
        "split_request": buffer.split_request,
    }


def _split(buffer: ActivationBuffer, split: SplitName) -> dict[str, Any]:
    sealed = [entry for entry in buffer.shards if entry.split == split]
    there = [entry for entry in sealed if not entry.dropped]
    planned = buffer.identity["split"][split]
    return {
        "images": sum(entry.n_images for entry in sealed),
        "images_planned": planned,
        "images_missing": planned - sum(entry.n_planned for entry in sealed),
        "rows": sum(entry.rows for entry in there),
        "shards": len(there),
        "shards_missing": math.ceil(planned / buffer.identity["shard_images"]) - len(sealed),
        "bytes": sum(entry.size for entry in there),
        "skipped": sum(len(entry.skipped) for entry in sealed),
        "dropped": {"shards": len(sealed) - len(there), "rows": sum(entry.rows for entry in sealed if entry.dropped)},
    }


def _site(buffer: ActivationBuffer, spec: SiteSpec) -> dict[str, Any]:
    moments = buffer.moments(spec.site)
    there = moments.n > 0
    return {
        "site": spec.site,
        "model": spec.model,
        "layer": spec.layer,
        "policy": spec.policy,
        "d_in": spec.d_in,
        "grid": None if spec.grid is None else list(spec.grid),
        "rows_per_image": spec.rows_per_image,
        "weights_hash": spec.weights_hash,
        "preprocessing": spec.preprocessing,
        "train_rows": moments.n,
        "mean": float(moments.mean.mean()) if there else None,
        "sd": math.sqrt(moments.pooled_m2() / (moments.n * moments.d)) if there else None,
    }


def _missing(buffer: ActivationBuffer, splits: Mapping[SplitName, Mapping[str, Any]]) -> dict[str, int]:
    """Count what was planned and is not sealed; `unlisted` shards of it are, by one of several processes."""
    unlisted = 0 if buffer.complete else len({entry.file for entry in read_parts(buffer.path, buffer.identity)})
    return {
        "shards": sum(of["shards_missing"] for of in splits.values()),
        "images": sum(of["images_missing"] for of in splits.values()),
        "unlisted": unlisted,
    }


def _absent(buffer: ActivationBuffer) -> str | None:
    try:
        buffer.demand_present()
    except BufferIntegrityError as error:
        return without_columns(buffer, error.message)
    return None


def without_columns(buffer: ActivationBuffer, message: str) -> str:
    """Leave out the list of what is damaged where it is all of a shard."""
    for entry in buffer.shards:
        message = message.replace(f"{entry.file} is damaged ({', '.join(entry.crc)})", f"{entry.file} is damaged")
    return message


# --- what it holds, as a screen ---


def buffer_screen(data: Mapping[str, Any]) -> RenderableType:
    """Return what `described` found, at most 80 columns wide."""
    parts: list[RenderableType | None] = [
        Group(_headline(data), *_notes(data)),
        _sites(data),
        _splits(data),
        _skipped(data),
        _origin(data),
    ]
    spaced: list[RenderableType] = [item for part in parts if part is not None for item in (part, Text(""))]
    return Constrain(Group(*spaced[:-1]), WIDTH)


def _headline(data: Mapping[str, Any]) -> Text:
    splits = data["splits"].values()
    images, rows = (sum(split[what] for split in splits) for what in ("images", "rows"))
    per_image = data["sites"][0]["rows_per_image"]
    each = f"{per_image:,} per image" if per_image else "as many per image as it has"
    state = "damaged" if data["problem"] else "complete" if data["complete"] else "incomplete"
    kind = "ring, " if data["mode"] == "ring" else ""
    what = f"{_many(len(data['sites']), 'site')} · {_many(images, 'image')} · {_many(rows, 'row')} ({each})"
    shards = f"{_many(data['shards'], 'shard')} of up to {_many(data['images_per_shard'], 'image')}"
    how = f"{shards} · {data['dtype']} · {spelled_bytes(data['bytes'])}"
    return Text.assemble(("Buffer", "bold"), f"  {kind}{state}\n{what}\n{how}")


def _notes(data: Mapping[str, Any]) -> Iterator[Text]:
    """Say what is not as in a buffer that is whole and at rest."""
    missing, dropped = data["missing"], data["dropped"]
    if data["writer"]:
        yield Text("being written by process {pid} on {host}; this is how it stands now".format(**data["writer"]))
    if not data["complete"]:
        yield Text(what_is_missing(data))
        if not data["writer"]:
            yield Text(f"  {GO_ON}", style="dim")
    elif missing["shards"]:
        left = f"{_many(missing['shards'], 'shard')} ({_many(missing['images'], 'image')})"
        yield Text(f"closed early: {left} not wanted any more")
    if dropped["shards"]:
        yield Text(f"dropped once used: {_many(dropped['shards'], 'shard')}, {_many(dropped['rows'], 'training row')}")
    if data["problem"]:
        yield Text(f"{_from(data['folder'], data['problem'])}; verify lists all that is wrong")


def what_is_missing(data: Mapping[str, Any]) -> str:
    """Say what an incomplete buffer lacks."""
    missing = data["missing"]
    if not missing["shards"]:
        return "all shards are sealed, but the buffer was not closed"
    planned = sum(split["images_planned"] for split in data["splits"].values())
    sealed = data["shards"] + data["dropped"]["shards"]
    text = f"{missing['shards']:,} of {_many(sealed + missing['shards'], 'shard')} missing"
    text += f", with {missing['images']:,} of {_many(planned, 'image')}"
    unlisted = missing["unlisted"]
    return f"{text} ({unlisted:,} of them written by one of several processes, to be listed)" if unlisted else text


def _sites(data: Mapping[str, Any]) -> Group:
    sites = data["sites"]
    table = _grid("site", "policy", ">d_in", ">grid", ">mean", ">sd", *(["weights"] if _hashed(data) else []))
    for site in sites:
        grid = "×".join(map(str, site["grid"])) if site["grid"] else "–"
        row = [site["site"], site["policy"], f"{site['d_in']:,}", grid, _number(site["mean"]), _number(site["sd"])]
        if _hashed(data):
            row.append(site["weights_hash"][:_HASH] or "–")
        table.add_row(*map(Text, row))
    n = sites[0]["train_rows"]
    what = f"mean, sd: of the {_many(n, 'training row')}, over all dimensions" if n else "no training row yet"
    return Group(table, Text(what, style="dim"))


def _hashed(data: Mapping[str, Any]) -> bool:
    return any(site["weights_hash"] for site in data["sites"])


def _splits(data: Mapping[str, Any]) -> Table:
    splits = data["splits"]
    dropped, skipped = data["dropped"]["shards"] > 0, bool(data["skipped"])
    more = [heading for heading, wanted in ((">skipped", skipped), (">dropped rows", dropped)) if wanted]
    table = _grid("split", ">images", ">rows", ">shards", ">bytes", *more)
    for name, split in splits.items():
        whole = not split["images_missing"]
        images = f"{split['images']:,}" if whole else f"{split['images']:,} of {split['images_planned']:,}"
        shards = split["shards"] + split["shards_missing"]
        row = [name, images, f"{split['rows']:,}"]
        row.append(f"{split['shards']:,}" if whole else f"{split['shards']:,} of {shards:,}")
        row.append(spelled_bytes(split["bytes"]))
        row += [f"{split['skipped']:,}"] * skipped + [f"{split['dropped']['rows']:,}"] * dropped
        table.add_row(*map(Text, row))
    return table


def _skipped(data: Mapping[str, Any]) -> Group | None:
    skipped = data["skipped"]
    if not skipped:
        return None
    lines = [
        Text.assemble(f"{image['name']}: ", (" ".join(image["reason"].split()), "dim"))
        for image in skipped[:_SHOWN_SKIPPED]
    ]
    if len(skipped) > _SHOWN_SKIPPED:
        lines.append(Text(f"and {len(skipped) - _SHOWN_SKIPPED:,} more; --json lists all"))
    shown = Padding(Group(*lines), (0, 0, 0, 2), expand=False)
    return Group(Text(f"{_many(len(skipped), 'image')} skipped", style="bold"), shown)


def _origin(data: Mapping[str, Any]) -> Table:
    """Say where the rows came from, and where they are."""
    source, request = data["source"], data["split_request"]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    where = source["location"] or ("computed elsewhere" if source["kind"] == "arrays" else "")
    images = f"{source['kind']} of {_many(source['n_images'], 'image')}"
    table.add_row("source", Text(f"{where}\n{images}, fingerprint {source['fingerprint'][:_HASH]}".lstrip()))
    drawn = [f"{key} {'none' if value is None else value}" for key, value in request.items()]
    table.add_row("split by", Text(", ".join(drawn)))
    table.add_row("folder", Text(f"{data['folder']} (schema {data['schema']})"))
    return table


# --- what is wrong with it, and what was exported of it ---


def verified_screen(data: Mapping[str, Any]) -> RenderableType:
    """Return what reading all of a buffer found.

    Args:
        data: `folder`, `ok`, `shards`, `bytes`, and `problems`: [{"message", "hint"}].
    """
    read = f"{_many(data['shards'], 'shard')}, {spelled_bytes(data['bytes'])}"
    if data["ok"]:
        return Text(f"{read}: all intact")
    found = Text.assemble((_many(len(data["problems"]), "problem"), "bold red"), f" in {data['folder']} ({read})")
    table = Table.grid(padding=(0, 1, 0, 0))
    for hint, problems in groupby(data["problems"], key=lambda problem: problem["hint"]):
        for problem in problems:
            table.add_row("•", Text(_from(data["folder"], problem["message"])))
        if hint:
            table.add_row("", Text(hint, style="dim"))
    return Group(found, table)


def exported_screen(data: Mapping[str, Any]) -> RenderableType:
    """Return what was exported and where it is.

    Args:
        data: `site`, `rows`, `d_in`, `dtype`, `bytes`; `splits`: {split: rows}; `complete`, `dropped_rows`: of the
            buffer; `file`, `index`.
    """
    splits = ", ".join(f"{n:,} {split}" for split, n in data["splits"].items())
    what = f"{_many(data['rows'], 'row')} of {data['d_in']:,} · {data['dtype']} · {spelled_bytes(data['bytes'])}"
    lines: list[RenderableType] = [Text.assemble((data["site"], "bold"), f"  {what}\n{splits}")]
    if not data["complete"]:
        lines.append(Text("the buffer is not complete: these are the rows that it has by now"))
    if data["dropped_rows"]:
        lines.append(Text(f"without {_many(data['dropped_rows'], 'training row')}, which the ring has dropped"))
    files = {"rows": data["file"], "index": data["index"]}
    return Group(*lines, file_table({what: Path(path) for what, path in files.items() if path}))


# --- spelling ---


def spelled_bytes(n: int) -> str:
    """Spell a size in three digits.

    >>> spelled_bytes(512), spelled_bytes(83_000), spelled_bytes(5_230_000), spelled_bytes(2_000_000_000_000)
    ('512 B', '83.0 kB', '5.23 MB', '2,000 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            digits = 2 if n < 10 * size else 1 if n < 100 * size else 0
            return f"{n / size:,.{digits}f} {unit}"
    return f"{n} B"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def _many(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _from(folder: str, message: str) -> str:
    """Spell the files of a folder by their names alone."""
    inside = f"{folder}{os.sep}"
    return message.replace(f"shard {inside}", "").replace(inside, "")


def _grid(*headings: str) -> Table:
    """Return a table without lines; a heading with `>` stands to the right."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for at, heading in enumerate(headings):
        right = heading.startswith(">")
        table.add_column(justify="right" if right else "left", no_wrap=at > 0, overflow="fold")
    table.add_row(*(Text(heading.removeprefix(">"), style="dim") for heading in headings))
    return table
