"""What the page says of a scan of layers; from `scan.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..facts import Facts
from ..r2_table import finite, short
from ..scan import scan_said


def scan_section(data: Mapping[str, Any]) -> tuple[list[str], list[Facts]]:
    """Return what a scan found in sentences, the last of which says on how many rows, and the best match of each layer.

    Args:
        data: the content of `scan.json`.
    """
    headings = ["layer", "depth", "best match", "R²", "95 %", "ridge", "CKA (shuffled)", "universal (shuffled)"]
    matches = Facts("Best match of each layer", headings, [], [])
    for row in data["best_matches"]:
        ends = row.get("r2_low"), row.get("r2_high")
        matches.rows.append(
            [
                row["target"],
                short(data["depths"][row["target"]]),
                f"{row['source']}{' ~' if row['as_good'] else ''}",
                short(row.get("r2")),
                f"[{short(ends[0])}, {short(ends[1])}]" if all(map(finite, ends)) else "–",
                short(row.get("linear")),
                _beside(short(row.get("cka")), short(row.get("cka_null"))),
                _beside(_count(row.get("universal")), _count(row.get("universal_null"))),
            ]
        )
    if any(row["as_good"] for row in data["best_matches"]):
        matches.notes.append("~ other layers there are as good, within their intervals")
    return scan_said(data, {}), [matches] if matches.rows else []


def _beside(value: str, null: str) -> str:
    return value if null == "–" else f"{value} ({null})"


def _count(n: float | None) -> str:
    return f"{n:,.1f}".removesuffix(".0") if finite(n) else "–"
