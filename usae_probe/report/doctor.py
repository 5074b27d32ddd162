"""What `doctor` found, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_Rows = list[list[str]]


def doctor_screen(found: Mapping[str, Any]) -> Group:
    """Return the whole as it is shown: facts, a few speeds, and problems with what to do last."""
    versions = " · ".join(f"{package} {version}" for package, version in found["versions"].items())
    error = "errors: values and gradients against dense float64, as a share of the largest"
    parts = (
        *_section("usae-probe doctor", _machine(found), versions),
        *_section("Adapters", [[row["name"], row["from"], row["state"]] for row in found["adapters"]]),
        *_section("Kernels and hooks", _kernels(found), error),
        *_section("Speed", _speeds(found)),
    )
    return Group(*parts, _verdict(found))


def _section(title: str, rows: _Rows, note: str = "") -> list[RenderableType]:
    if not rows:
        return []
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    notes = [Text(note, style="dim")] if note else []
    return [Text(title, style="bold"), table, *notes, Text()]


def _machine(found: Mapping[str, Any]) -> _Rows:
    machine, disk, hub = found["machine"], found["disk"], found["hub"]
    memory = machine["memory_bytes"]
    devices = [_device(device) for device in found["devices"]]
    return [
        ["machine", machine["platform"]],
        ["processor", f"{machine['cores']} cores, torch uses {machine['threads']}; {machine['instructions']}"],
        ["memory", "unknown" if memory is None else _bytes(memory)],
        *(["device", device] for device in devices),
        ["disk", f"{_bytes(disk['free_bytes'])} free in {disk['folder']}"],
        ["weights", f"{hub['HF_HOME']}{' (offline: HF_HUB_OFFLINE)' if hub['offline'] else ''}"],
    ]


def _device(device: Mapping[str, Any]) -> str:
    memory = f", {_bytes(device['memory_bytes'])}" if "memory_bytes" in device else ""
    return f"{device['name']}: {device['what']}{memory}"


def _kernels(found: Mapping[str, Any]) -> _Rows:
    rows = []
    for check in found["kernels"]:
        state = "ok" if not check["wrong"] else "WRONG"
        if check["error"] is None:
            state = "failed" if check["wrong"] else "not here"
        detail = check["problem"] or f"{check['error']:.1e}"
        rows.append([f"{check['kernel']} on {check['device']}", state, detail])
    hooks = found["hooks"]
    rows.append([f"hooks on {hooks['model']}", "ok" if hooks["equal"] else "WRONG", "as a plain forward hook"])
    return rows


def _speeds(found: Mapping[str, Any]) -> _Rows:
    rows = []
    if "write_bytes_per_second" in found["disk"]:
        rows.append(["disk, written and synced", f"{_bytes(found['disk']['write_bytes_per_second'])}/s"])
    timed = found.get("benchmark")
    if timed:
        step, dense = timed["step_seconds"], timed["dense_step_seconds"]
        size = f"{timed['n_latents']:,} latents, k = {timed['k']}, {timed['batch_size']:,} rows of two sites"
        if timed["images_per_second"] is not None:
            rows.append(
                [f"resnet18 with hooks, 224 px, on {timed['device']}", f"{timed['images_per_second']:.0f} images/s"]
            )
        rows.append([f"training step, {size}", f"{1000 * step:.0f} ms"])
        rows.append(["the same with the dense kernel", f"{1000 * dense:.0f} ms, {dense / step:.1f} times as long"])
    return rows


def _verdict(found: Mapping[str, Any]) -> Text:
    problems = found["problems"]
    if not problems:
        return Text("Everything works here.", style="bold")
    lines = [Text(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}", style="bold red")]
    for each in problems:
        lines += [Text(f"- {each['problem']}"), Text(f"  {each['hint']}", style="dim")]
    return Text("\n").join(lines)


def _bytes(size: int | float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
