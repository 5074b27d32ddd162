"""The stages of a run, harvest → train → evaluate, in a run folder, each redone only when its config keys changed."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .adapter import attach, check_device
from .buffer import ActivationBuffer
from .config import RunConfig
from .errors import BufferIntegrityError, CheckpointError, StageError
from .files import sha256, write_json, write_text
from .harvesting import buffer_spec, harvest
from .hooks import HookedModel
from .images import open_source
from .probes import UniversalityReport, evaluate, one_site_per_model
from .report import figures
from .usae import USAE, HistoryFile, StepRecord, read_history, train, warn_without_bottleneck

Stage = Literal["harvest", "train", "evaluate"]
STAGES: tuple[Stage, ...] = ("harvest", "train", "evaluate")
SCHEMA = 1
_PACKAGES = ("usae-probe", "torch", "torchvision", "timm", "nnsight", "numpy", "h5py", "scipy")


class Progress(NamedTuple):
    """How far a stage is: `done` of `total` in `unit`s, and what else is worth a glance."""

    stage: Stage
    done: int
    total: int
    unit: str
    note: str = ""


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        stage: its name.
        kept: it was finished before and its config keys are the same.
        seconds: how long it took when it ran.
        why: why it was redone although it was finished before; empty otherwise.
    """

    stage: Stage
    kept: bool
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class RunResult:
    """A run folder, what became of its stages, and the report when there is one."""

    folder: Path
    stages: list[StageResult]
    metrics: dict[str, Any] | None
    report: UniversalityReport | None = None


class Run:
    """A run folder and the stages in it.

    Args:
        config: the checked config.
        folder: the run folder; made if need be.
        progress: called as stages go on.
        announce: called when a stage starts (`stage`, why it is redone) and when it is over (its result).
    """

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        *,
        progress: Callable[[Progress], None] | None = None,
        announce: Callable[[StageResult | tuple[Stage, str]], None] | None = None,
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self._progress = progress or (lambda _: None)
        self._announce = announce or (lambda _: None)
        self._report: UniversalityReport | None = None
        self._record = _read_record(self.folder)

    def run(self, stages: tuple[Stage, ...] = STAGES) -> RunResult:
        """Do `stages` in order; a single later stage needs the earlier ones' results in the folder.

        Raises:
            StageError: when an earlier stage's results are missing or belong to another config.
        """
        for earlier in STAGES[: STAGES.index(stages[0])]:
            self._require(earlier)
        results = [self._stage(stage) for stage in stages]
        metrics = self.folder / "metrics.json"
        done = "evaluate" in stages
        return RunResult(
            self.folder, results, json.loads(metrics.read_text(encoding="utf-8")) if done else None, self._report
        )

    def _stage(self, stage: Stage) -> StageResult:
        changed, missing = self._changed(stage), self._missing(stage)
        finished = stage in self._record["stages"]
        if finished and not changed and not missing:
            result = StageResult(stage, kept=True, seconds=0.0)
            self._announce(result)
            return result
        why = f"{', '.join(changed[:3])}{', …' if len(changed) > 3 else ''} changed" if changed else missing
        why = why if finished else ""
        self._announce((stage, why))
        started = time.perf_counter()
        {"harvest": self._harvest, "train": self._train, "evaluate": self._evaluate}[stage]()
        result = StageResult(stage, kept=False, seconds=time.perf_counter() - started, why=why)
        self._finish(result)
        self._announce(result)
        return result

    def _harvest(self) -> None:
        config = self.config
        check_device(config.train.device)
        with ExitStack() as closing:
            models = [closing.enter_context(self._attach(name)) for name in config.models]
            d_in = {str(site): model.d_in(site) for model in models for site in model.sites}
            warn_without_bottleneck(d_in, config.usae.k)
            one_site_per_model(list(d_in), config.probes.sites)
            source = open_source(config.image_path)
            spec = buffer_spec(models, source, config.images, config.buffer)
            self._discard_other_buffer(spec.identity())
            harvest(
                models,
                source,
                self.folder / "buffer",
                images_config=config.images,
                buffer_config=config.buffer,
                progress=lambda p: self._progress(
                    Progress("harvest", p.done, p.total, "images", f"{p.skipped} skipped" if p.skipped else "")
                ),
            )

    def _train(self) -> None:
        check_device(self.config.train.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / "training-state.safetensors"
        with HistoryFile(self.folder / "history.jsonl") as history:

            def follow(record: StepRecord) -> None:
                history.add(record, keep=record.is_kept(self.config.train))
                self._progress(Progress("train", record.step, record.steps, "steps", _training_note(record)))

            usae = train(
                self.buffer(),
                usae_config=self.config.usae,
                train_config=self.config.train,
                progress=follow,
                resume=state,
            ).usae
        usae.save(self.folder / "usae.safetensors")
        state.unlink(missing_ok=True)

    def _evaluate(self) -> None:
        report = evaluate(
            self.usae(),
            self.buffer(),
            config=self.config.probes,
            progress=lambda done, total: self._progress(Progress("evaluate", done, total, "rows")),
        )
        write_text(self.folder / "metrics.json", report.to_json() + "\n")
        write_text(self.folder / "latents.csv", report.to_csv())
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        figures.r2_matrix(report, folder / "r2.png")
        figures.training_curves(list(read_history(self.folder / "history.jsonl")), folder / "training.png")
        self._report = report

    def buffer(self) -> ActivationBuffer:
        """Open the run's buffer."""
        return ActivationBuffer(self.folder / "buffer")

    def usae(self) -> USAE:
        """Load the run's USAE."""
        return USAE.load(self.folder / "usae.safetensors", kernel=self.config.train.kernel)

    def _attach(self, name: str) -> HookedModel:
        given = self.config.models[name].model_dump(exclude={"adapter", "name", "layers"})
        entry = self.config.models[name]
        return attach(entry.name, adapter=entry.adapter, name=name, layers=entry.layers, base=self.config.base, **given)

    def _depends_on(self, stage: Stage) -> dict[str, Any]:
        """Return the config keys that a stage's results depend on, flattened to `table.key`."""
        config = json.loads(self.config.model_dump_json())
        for model in config["models"].values():
            del model["device"]
        del config["images"]["workers"]
        config["images"]["source"] = self.config.image_path
        for key in ("log_every", "kernel", "device"):
            del config["train"][key]
        upstream = ("models", "images", "buffer")
        trained = (*upstream, "usae", "train")
        tables: dict[Stage, tuple[str, ...]] = {"harvest": upstream, "train": trained, "evaluate": (*trained, "probes")}
        keys = dict(_flatten({table: config[table] for table in tables[stage]}))
        for earlier in STAGES[: STAGES.index(stage)]:  # the same keys with other pictures behind them, say
            keys[f"the {earlier}'s result"] = self._record["results"].get(earlier)
        return keys

    def _changed(self, stage: Stage) -> list[str]:
        before = self._record["stages"].get(stage, {}).get("depends_on", {})
        now = self._depends_on(stage)
        return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))

    def _missing(self, stage: Stage) -> str:
        """Return what is missing of a finished stage's results; empty when all is there."""
        if stage == "harvest":
            try:
                buffer = self.buffer()
                buffer.demand_present()
                return "" if buffer.complete else "the buffer is not complete"
            except BufferIntegrityError as error:
                return error.message
        names = {
            "train": ("usae.safetensors", "usae.json", "history.jsonl"),
            "evaluate": ("metrics.json", "latents.csv"),
        }
        absent = [name for name in names[stage] if not (self.folder / name).is_file()]
        return f"{', '.join(absent)} not there" if absent else ""

    def _require(self, stage: Stage) -> None:
        if stage not in self._record["stages"] or (missing := self._missing(stage)):
            detail = missing if stage in self._record["stages"] else f"stage {stage} has not been done"
            raise StageError(
                f"'{self.folder}' has no finished {stage}: {detail}",
                hint=f"do `usae-probe {stage}` with the same config first, or `usae-probe run` for all stages",
            )
        if changed := self._changed(stage):
            raise StageError(
                f"the {stage} in '{self.folder}' was done with another config: {', '.join(changed)} changed",
                hint=f"do `usae-probe {stage}` again, or `usae-probe run`; or choose another --out",
            )

    def _discard_other_buffer(self, identity: dict[str, Any]) -> None:
        """Remove a buffer that lacks shards or is made from something else; called once all that is new is checked.

        Raises:
            BufferIntegrityError: for a manifest that cannot be read, of a newer schema say: nothing is removed then.
        """
        folder = self.folder / "buffer"
        manifest = folder / "manifest.json"
        if not folder.is_dir() or (manifest.exists() and self._is_whole(ActivationBuffer(folder), identity)):
            return
        manifest.unlink(missing_ok=True)
        for shard in folder.glob("shard-*.h5"):
            shard.unlink()

    @staticmethod
    def _is_whole(buffer: ActivationBuffer, identity: dict[str, Any]) -> bool:
        try:
            buffer.demand_present()
        except BufferIntegrityError:
            return False
        return buffer.identity == identity

    def _finish(self, result: StageResult) -> None:
        self._record["config"] = json.loads(self.config.model_dump_json())
        self._record["versions"] = {"python": platform.python_version(), **dict(_versions())}
        self._record["stages"][result.stage] = {
            "seconds": round(result.seconds, 3),
            "peak_memory_bytes": peak_memory(),
            "depends_on": self._depends_on(result.stage),
        }
        files = {"harvest": "buffer/manifest.json", "train": "usae.safetensors", "evaluate": "metrics.json"}
        self._record["results"][result.stage] = sha256(self.folder / files[result.stage])
        write_json(self.folder / "run.json", self._record)


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _training_note(record: StepRecord) -> str:
    phase = "aligning, " if record.phase == "align" else ""
    return f"{phase}loss {record.loss:.3f}, dead {record.dead_share:.0%}"


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    fresh: dict[str, Any] = {"schema": SCHEMA, "config": {}, "versions": {}, "stages": {}, "results": {}}
    if not path.exists():
        return fresh
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise StageError(
                f"'{path}' has schema {record['schema']}, this version reads {SCHEMA}", hint="update usae-probe"
            )
        return {**fresh, **record, "stages": dict(record["stages"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is damaged: {error}", hint="restore it, or remove it to do all stages again"
        ) from error


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
