"""Sweeps: one buffer, every combination of settings with every seed trained and measured, resumed where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from ..attaching import check_device
from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import BufferIntegrityError, ConfigError, StageError, UsaeProbeError
from ..files import csv_text, write_json, write_text
from ..lock import claiming
from ..probes import one_site_per_model
from ..report.sweep_figure import sweep_figure
from ..split import SplitName
from ..usae import check_tensorboard
from ..usae.draws import check_weighted_sites
from .cell import Cell, CellResult
from .grid import Combination, combinations
from .outcomes import Progress, StageResult
from .record import RunRecord
from .run import Run
from .stages import Stage
from .training import buffer_of

SCHEMA = 1


class SweepProgress(NamedTuple):
    """How far a sweep is: cell number `at` of `n_cells`, and how far its stage is; at 0 while harvesting."""

    cell: str
    at: int
    n_cells: int
    now: Progress


@dataclass(frozen=True)
class SweepResult:
    """What became of a sweep.

    Attributes:
        folder: the sweep's folder.
        keys: what was set, in the order given.
        seeds: of the trainings.
        split: the rows that were measured.
        buffer: where the activations are.
        cells: one per combination and seed, as far as they are done.
    """

    folder: Path
    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    split: SplitName
    buffer: Path
    cells: tuple[CellResult, ...]

    @property
    def failed(self) -> tuple[CellResult, ...]:
        """The cells that could not be trained or measured."""
        return tuple(cell for cell in self.cells if cell.error)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `sweep.json`: `combinations` over the seeds, and every cell."""
        measured = next((cell.metrics for cell in self.cells if cell.metrics), None)
        rows = [_row(cell, self.folder) for cell in self.cells]
        return {
            "schema": SCHEMA,
            "keys": list(self.keys),
            "seeds": list(self.seeds),
            "split": self.split,
            "n_rows": measured["n_rows_eval"] if measured else None,
            "sites": measured["sites"] if measured else [],
            "buffer": str(self.buffer),
            "n_failed": len(self.failed),
            "combinations": _over_seeds(rows),
            "cells": rows,
        }

    def to_csv(self) -> str:
        """Return a row per cell (the content of `sweep.csv`): what was set, the seed and what was measured."""
        data = self.to_dict()
        rows = []
        for cell in data["cells"]:
            r2 = {f"r2[{source}->{target}]": cell["r2"].get(source, {}).get(target) for source, target in _pairs(data)}
            plain = {key: cell[key] for key in (*_MEASURED, "seconds")} | cell["counts"]
            error = {"error": cell["error"]["message"] if cell["error"] else None}
            rows.append({**cell["settings"], "seed": cell["seed"], "split": self.split, **plain, **r2, **error})
        return csv_text(rows)  # a failed cell has no counts


class Sweep:
    """All combinations of settings, each with several seeds, trained from one buffer and measured.

    Finished cells are kept; a cell that was interrupted goes on from its training's state; what depends on a changed
    config is done again.

    Args:
        config: what all cells have in common; its `train.seed` is the first seed.
        folder: the sweep's folder: `buffer/`, `cells/<name>/`, `sweep.json`, `sweep.csv`, `sweep.png`.
        settings: values by dotted key of [usae], [train] or [probes]; {} varies the seed alone.
        seeds: trainings of each combination.
        buffer: a finished run's folder whose buffer is used; by default one is harvested into `folder`.
        split: rows that are measured: "validation", because a sweep is there to choose by; "holdout" once, at the end.
        progress: called as stages go on.
        announce: called with what becomes of the harvest (as by `Run`) and of every cell.

    Raises:
        ConfigError, UsageError: for anything wrong with a combination: nothing is run then.

    Example:
        `Sweep(config, "runs/sizes", {"usae.n_latents": [2042, 8168], "usae.k": [32, 64]}, seeds=3).run()`
    """

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        settings: Mapping[str, Sequence[Any]],
        *,
        seeds: int = 1,
        buffer: str | Path | None = None,
        split: SplitName = "validation",
        progress: Callable[[SweepProgress], None] | None = None,
        announce: Callable[[CellResult | StageResult | tuple[Stage, str]], None] | None = None,
    ) -> None:
        self.folder, self.split = Path(folder), split
        self.cells = combinations(config, settings, seeds)
        self._keys = tuple(settings)
        self._lender = None if buffer is None else Path(buffer)
        self._progress = progress or (lambda _: None)
        self._announce = announce or (lambda _: None)
        for device in {cell.config.train.device for cell in self.cells}:
            check_device(device)
        if any(cell.config.train.tensorboard for cell in self.cells):
            check_tensorboard()
        if config.buffer.trains_along:
            raise ConfigError(
                "a sweep trains many times from one buffer, none of them along with its harvest",
                hint="leave online out of [buffer], and mode = 'ring'",
            )

    def run(self) -> SweepResult:
        """Do what is not done yet; a cell that fails is recorded, and the others go on.

        Raises:
            StageError: when the run that lends its buffer was harvested with another config, or not at all.
            BufferIntegrityError: when the buffer has no rows to measure on.
            FolderLockedError: when another process is at work in the folder.
        """
        with claiming(self.folder):
            return self._done()

    def _done(self) -> SweepResult:
        buffer = self._buffer()
        self._check(buffer)
        seeds = tuple(dict.fromkeys(cell.seed for cell in self.cells))
        result = SweepResult(self.folder, self._keys, seeds, self.split, buffer.path, ())
        for at, combination in enumerate(self.cells, start=1):
            cell = self._cell(combination, buffer, at)
            result = replace(result, cells=(*result.cells, cell))
            self._announce(cell)
            write_json(self.folder / "sweep.json", result.to_dict())
        write_text(self.folder / "sweep.csv", result.to_csv())
        sweep_figure(result.to_dict(), self.folder / "sweep.png")
        return result

    def _cell(self, combination: Combination, buffer: ActivationBuffer, at: int) -> CellResult:
        folder = self.folder / "cells" / combination.folder
        others = sorted(path for path in folder.parent.glob("*") if path.is_dir())

        def follow(now: Progress) -> None:
            self._progress(SweepProgress(combination.label, at, len(self.cells), now))

        try:
            return Cell(combination, folder, buffer, follow).do(self.split, others)
        except (UsaeProbeError, MemoryError, RuntimeError) as error:  # torch has no better name for too little memory
            message, hint = (error.message, error.hint) if isinstance(error, UsaeProbeError) else (str(error), "")
            told = {"type": type(error).__name__, "message": message, "hint": hint}
            return CellResult(combination, folder, error=told)

    def _buffer(self) -> ActivationBuffer:
        """Open the buffer that is lent, or harvest one."""
        first = self.cells[0].config
        if self._lender is None:

            def follow(now: Progress) -> None:
                self._progress(SweepProgress("", 0, len(self.cells), now))

            run = Run(first, self.folder, progress=follow, announce=self._announce)
            run.run(("harvest",))
            return run.buffer()
        record = RunRecord(self._lender)
        if not record.finished("harvest"):
            raise StageError(
                f"'{self._lender}' has no finished harvest",
                hint="give the folder of a run, or leave --buffer out to harvest for the sweep",
            )
        if changed := record.changed("harvest", first):
            raise StageError(
                f"the harvest in '{self._lender}' was done with another config: {', '.join(changed)} changed",
                hint="sweep with the config of that run, or leave --buffer out to harvest for the sweep",
            )
        buffer = buffer_of(first, self._lender)
        buffer.demand_present()
        return buffer

    def _check(self, buffer: ActivationBuffer) -> None:
        """Check what can be known before the first training, once the sites are."""
        if (n := buffer.n_rows(self.split)) < 2:
            raise BufferIntegrityError(
                f"the buffer has {n} {self.split} rows, a sweep needs at least 2 to measure on",
                hint=f"set images.{self.split} above 0 and harvest again"
                + (", or measure on the holdout: --holdout" if self.split == "validation" else ""),
            )
        for cell in self.cells:
            check_weighted_sites(buffer.sites, cell.config.train)
            one_site_per_model(buffer.sites, cell.config.probes.sites)


_MEASURED = ("self_r2", "cross_r2", "universal", "dead_share", "split_latents")


def _row(cell: CellResult, folder: Path) -> dict[str, Any]:
    """Return what `sweep.json` says of a cell; `self_r2` and `cross_r2` are means over sites and ordered pairs."""
    metrics = cell.metrics or {}
    r2, counts = metrics.get("r2", {}), metrics.get("counts", {})
    values = dict.fromkeys(_MEASURED)
    if metrics:
        values |= {
            "self_r2": _mean([r2[site][site] for site in r2]),
            "cross_r2": _mean([r2[source][target] for source, target in permutations(r2, 2)]),
            "universal": counts["universal"],
            "dead_share": counts["dead"] / metrics["n_latents"],
            "split_latents": metrics["n_split"],
        }
    return {
        "name": cell.combination.label,
        "settings": cell.combination.settings,
        "seed": cell.combination.seed,
        "folder": str(cell.folder.relative_to(folder)),
        "published": [each.model_dump() for each in cell.combination.config.published_here()],
        "r2_global_mean": metrics.get("r2_global_mean", {}),
        "kept": cell.kept,
        "why": cell.why,
        "note": cell.note,
        "seconds": cell.seconds,
        **values,
        "counts": counts,
        "r2": r2,
        "error": cell.error,
    }


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the cells of each combination together: mean, least and greatest over its seeds."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr(row["settings"]), []).append(row)
    found = []
    for group in groups.values():
        sites = next((list(row["r2"]) for row in group if row["r2"]), [])
        matrix = {
            source: {target: _spread([row["r2"][source][target] for row in group if row["r2"]]) for target in sites}
            for source in sites
        }
        spreads = {key: _spread([row[key] for row in group]) for key in (*_MEASURED, "seconds")}
        failed = sum(row["error"] is not None for row in group)
        found.append(
            {"settings": group[0]["settings"], "n_cells": len(group), "n_failed": failed, **spreads, "r2": matrix}
        )
    return found


def _spread(values: Sequence[float | int | None]) -> dict[str, float] | None:
    there = [float(value) for value in values if value is not None]
    return {"mean": sum(there) / len(there), "min": min(there), "max": max(there)} if there else None


def _mean(values: Sequence[float | int | None]) -> float | None:
    spread = _spread(values)
    return spread["mean"] if spread else None


def _pairs(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(source, target) for source in data["sites"] for target in data["sites"]]
