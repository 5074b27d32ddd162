"""The report page in headless Chromium with 8,168 latents and 200 cards: first paint, table usable, sorting, a card.

Beside it, in the same browser, a plain page: the same rows as one HTML table, all of them in the document, sorted by
moving the rows. Prints JSON: milliseconds (median, least, greatest of several loads), and ours over plain.

    python tests/benchmarks/page.py [--latents 8168] [--cards 200] [--loads 5]
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from selenium import webdriver

from tests.browser import chromium
from tests.explorer_pages import columns, page
from usae_probe.report.explorer import write_explorer

_PAINTED = """
const done = arguments[arguments.length - 1], click = arguments[0], from = performance.now();
click();
requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - from)));
"""
_PLAIN_SORT = """
let down = true;
function sort() {
  const body = document.querySelector('tbody'), value = (row) => +row.cells[0].textContent || -9;
  body.append(...[...body.rows].sort((a, b) => (down ? 1 : -1) * (value(b) - value(a))));
  down = !down;
}
"""


def plain(latents: dict[str, list[str]], path: Path) -> None:
    """Write the same rows as a table that is all in the document."""
    kinds = ("phi", "latent", "category", "total_energy", "entropy", "correlation", "rate", "follows", "auroc")
    shown = [name for kind in kinds for name in latents if name.partition("[")[0] == kind]
    rows = zip(*(latents[name] for name in shown), strict=True)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    path.write_text(f"<!doctype html><table><tbody>\n{body}</tbody></table><script>{_PLAIN_SORT}</script>")


def painted(driver: webdriver.Chrome, action: str) -> float:
    """Milliseconds from a click to the second frame after it."""
    script = _PAINTED.replace("click = arguments[0]", f"click = () => {{ {action} }}")
    found: float = driver.execute_async_script(script)
    return found


def load(driver: webdriver.Chrome, path: Path) -> dict[str, float]:
    """Open a page; milliseconds from the start of the navigation."""
    driver.get("about:blank")
    driver.get(path.as_uri())
    found: dict[str, float] = driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => setTimeout(() => {"
        " const at = (entry) => entry && entry.startTime, n = performance.getEntriesByType('navigation')[0];"
        " done({first_paint: at(performance.getEntriesByName('first-contentful-paint')[0]),"
        " table: at(performance.getEntriesByName('latents')[0]) ?? n.domInteractive,"
        " all_read: n.domInteractive}) }, 100))"
    )
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 1), "least": round(min(values), 1), "greatest": round(max(values), 1)}


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latents", type=int, default=8168)
    parser.add_argument("--cards", type=int, default=200)
    parser.add_argument("--loads", type=int, default=5)
    asked = parser.parse_args()
    ours: dict[str, list[float]] = {}
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, chromium() as driver:
        path, other = Path(name) / "report.html", Path(name) / "plain.html"
        write_explorer(page(asked.latents, asked.cards), path)
        plain(columns(asked.latents), other)
        for _ in range(asked.loads):
            found = load(driver, path)
            found["sort"] = painted(driver, "document.querySelector('#head-phi button').click()")
            found["search"] = painted(
                driver,
                "const s = document.getElementById('search'); s.value = 'horse'; "
                "s.dispatchEvent(new Event('input', {bubbles: true}))",
            )
            found["card"] = painted(driver, "location.hash = 'latent-3'")
            for key, value in found.items():
                ours.setdefault(key, []).append(value)
            found = load(driver, other)
            found["sort"] = painted(driver, "sort()")
            for key, value in found.items():
                rows.setdefault(key, []).append(value)
        size = path.stat().st_size
    ratios = {key: round(median(ours[key]) / median(rows[key]), 3) for key in ("first_paint", "table", "sort")}
    result: dict[str, Any] = {
        "benchmark": "page",
        "latents": asked.latents,
        "cards": asked.cards,
        "megabytes": round(size / 1e6, 1),
        "ms": {key: spread(values) for key, values in ours.items()},
        "plain_ms": {key: spread(values) for key, values in rows.items()},
        "ours_over_plain": ratios,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
