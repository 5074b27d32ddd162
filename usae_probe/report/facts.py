"""Tables of facts, of text alone: what the terminal and the page both show, each in its own way."""

from __future__ import annotations

from typing import NamedTuple


class Facts(NamedTuple):
    """One table.

    Attributes:
        title: above it; empty for notes alone.
        headings: of the columns, the first of which names the rows.
        rows: cells as they are spelled.
        notes: what the numbers are, and what is said beside them; a line each.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]
