"""The `[sweep]` table, and `[[published]]`: figures of a paper to stand beside one's own."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .tables import Table


class SweepConfig(Table):
    """`[sweep]`: what `usae-probe sweep` goes through."""

    settings: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="values by key: {'usae.k' = [32, 64]}; --set on the command line comes before it",
    )
    seeds: int = Field(1, ge=1, description="trainings of each combination, from train.seed on")


class PublishedConfig(Table):
    """`[[published]]`: R² that a paper gives for some settings."""

    source: str = Field(description="where they were published")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="the settings they are of: {'usae.k' = 64}; shown where these are a run's own"
    )
    r2: dict[str, dict[str, float]] = Field(default_factory=dict, description="R² by source and target site")
    independent_r2: dict[str, float] = Field(
        default_factory=dict, description="R² of independent SAEs of themselves, by site"
    )
