"""The `[scan]` table."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from ..split import SplitName
from .tables import Table

ScanStrategy = Literal["joint", "pairs"]
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class ScanConfig(Table):
    """`[scan]`: every layer of each model against every layer of the others."""

    depth: int = Field(8, ge=0, description="evenly spaced blocks of each model; 0: the layers listed in [models]")
    every: int | None = Field(None, ge=1, description="instead of depth: every so many blocks, counted from the last")
    layers: list[str] | None = Field(
        None, min_length=1, description="instead of both: 'model/layer' with globs: ['vit/blocks.*@mean', 'resnet/*.*']"
    )
    policy: Literal["pool", "cls", "mean", "patch"] = Field(
        "pool", description="token policy of blocks that depth or every chooses; mean: where there is a class token"
    )
    strategies: list[ScanStrategy] = Field(
        ["joint"], min_length=1, description="joint: one USAE over all sites; pairs: one per pair of sites, to check it"
    )
    updates: Literal["encoder", "steps"] = Field(
        "encoder",
        description="length of the joint training of M sites: encoder: M / 2 times [train]'s, so that each "
        "encoder learns as often as in a pair; steps: as many steps",
    )
    split: SplitName = Field("validation", description="rows that are measured: validation; holdout once, at the end")
    budget: str | None = Field(None, description="time it may take, '10m': layers, images and steps are chosen to fit")
    floor: bool = Field(False, description="scan the architectures untrained, too: what is shared without training")

    @property
    def seconds(self) -> float | None:
        """The budget in seconds; None without one."""
        return None if self.budget is None else budget_seconds(self.budget)

    @field_validator("budget")
    @classmethod
    def _budget(cls, text: str | None) -> str | None:
        if text is not None:
            budget_seconds(text)
        return text

    @field_validator("strategies")
    @classmethod
    def _once(cls, strategies: list[ScanStrategy]) -> list[ScanStrategy]:
        return list(dict.fromkeys(strategies))


def budget_seconds(text: str) -> float:
    """Return the seconds of a time that is spelled with its units.

    >>> budget_seconds("90s"), budget_seconds("10m"), budget_seconds("1h30m"), budget_seconds("1.5 h")
    (90.0, 600.0, 5400.0, 5400.0)

    Raises:
        ValueError: for anything else, and for no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smh])", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if re.sub(r"\d+(?:\.\d+)?\s*[smh]", "", text).strip() or not total > 0:
        raise ValueError("a time is spelled 90s, 10m or 1h30m")
    return total
