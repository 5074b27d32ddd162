"""The `[report]` table."""

from __future__ import annotations

from pydantic import Field

from .tables import Table


class ReportConfig(Table):
    """`[report]`: the HTML page of a run."""

    cards: int = Field(
        200, ge=0, description="latents with images in report.html: those with pictures first, then by class and energy"
    )
    scan: str | None = Field(
        None, description="folder of a scan that the page shows; default: the run folder's name with -scan, if there"
    )
