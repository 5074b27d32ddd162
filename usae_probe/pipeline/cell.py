"""One cell of a sweep: a training with its own folder and the sweep's buffer, measured on rows of one split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..buffer import ActivationBuffer, JoinedBuffer
from ..errors import UsaeProbeError
from ..files import json_sha256, sha256, write_json
from ..probes import evaluate
from ..split import SplitName
from ..usae import TrainResult
from .grid import Combination
from .outcomes import Progress
from .record import RunRecord
from .run import Run
from .stages import RESULTS


@dataclass(frozen=True)
class CellResult:
    """What became of a cell.

    Attributes:
        combination: its settings and seed.
        folder: where its results are.
        kept: it was finished before, and nothing that it depends on has changed.
        why: why it was trained again although it was finished before; empty otherwise.
        note: what is worth saying about its training's end, early stopping say; empty otherwise.
        seconds: that its training took.
        metrics: as in `metrics.json`, on the split that the sweep measures; None when it failed.
        error: what made it fail: type, message, hint.
    """

    combination: Combination
    folder: Path
    kept: bool = False
    why: str = ""
    note: str = ""
    seconds: float | None = None
    metrics: dict[str, Any] | None = None
    error: dict[str, str] | None = None


class Cell(Run):
    """The run folder of a cell: its training is a run's, its activations are the sweep's.

    Args:
        combination: settings and seed.
        folder: its run folder; made if need be.
        buffer: the activations of all cells.
        progress: called as training and evaluation go on.
    """

    def __init__(
        self,
        combination: Combination,
        folder: Path,
        buffer: ActivationBuffer,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        super().__init__(combination.config, folder, progress=progress)
        self.measured_on = None  # a control of a run that has warned, or one of many in which less may be of interest
        self.combination, self._activations = combination, buffer
        joined = isinstance(buffer, JoinedBuffer)
        self._record.adopt("harvest", json_sha256(buffer.identity) if joined else sha256(buffer.path / "manifest.json"))

    def buffer(self) -> ActivationBuffer:
        """Return the sweep's buffer."""
        return self._activations

    def do(self, split: SplitName, others: Iterable[Path] = ()) -> CellResult:
        """Train and measure what is not finished yet.

        Args:
            split: the rows to measure on.
            others: folders of other cells; a finished training with the same settings is taken over from there.
        """
        if not self._is_trained():
            self._take_over(others)
        trained = self._stage("train")
        path = self.folder / ("metrics.json" if split == "holdout" else f"metrics.{split}.json")
        made_from = {
            "usae": sha256(self.folder / "usae.safetensors"),
            "probes": self.config.probes.model_dump(mode="json"),
        }
        metrics = _measured(path, made_from)
        kept = trained.kept and metrics is not None
        if metrics is None:
            report = evaluate(
                self.usae(),
                self._activations,
                split=split,
                config=self.config.probes,
                progress=lambda done, total: self._progress(Progress("evaluate", done, total, "rows")),
            )
            universal = [record.latent for record in report.universal]
            metrics = report.to_dict() | {"universal_latents": universal, "made_from": made_from}
            write_json(path, metrics)
        return CellResult(
            self.combination,
            self.folder,
            kept=kept,
            why=trained.why,
            note=trained.note,
            seconds=self._record.seconds("train"),
            metrics=metrics,
        )

    def _train_note(self, done: TrainResult, kernel: Mapping[str, Any] | None) -> str:
        return done.note  # the kernel is the same in most cells of a sweep: it is in their records

    def _is_trained(self) -> bool:
        finished = self._record.finished("train") and not self._missing("train")
        return finished and not self._record.changed("train", self.config)

    def _take_over(self, others: Iterable[Path]) -> None:
        """Copy a finished training with the very same settings: cells can differ in what is measured alone."""
        wanted = self.config.model_dump(include={"usae", "train"})
        for folder in others:
            try:
                record = RunRecord(folder)
                if (
                    folder == self.folder
                    or not record.finished("train")
                    or record.config().model_dump(include={"usae", "train"}) != wanted
                    or record.changed("train", self.config)
                    or not all((folder / name).is_file() for name in RESULTS["train"])
                ):
                    continue
            except UsaeProbeError:
                continue  # damaged, or of another version: it will be trained
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in RESULTS["train"]:
                shutil.copyfile(folder / name, self.folder / name)
            self._record.finish("train", self.config, record.seconds("train"), record.about("train"))
            return


def _measured(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Return the measures of an earlier call, if they are of this USAE and these probes."""
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return metrics if metrics["made_from"] == made_from else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
