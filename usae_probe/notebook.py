"""How a thing shows itself in a notebook: small tables of text, without colours, so that they suit any theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def html_facts(title: str, facts: Mapping[str, object], *tables: str) -> str:
    """Return a heading, facts in one line each, and tables below, as HTML.

    Args:
        title: what it is.
        facts: {name: value}.
        tables: what `html_table` returned.
    """
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<div><strong>{escape(title)}</strong><table>{rows}</table>{''.join(tables)}</div>"


def html_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as HTML; everything in it is text."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
