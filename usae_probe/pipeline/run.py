"""A run folder and the stages in it, each redone only when something that it depends on has changed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..attaching import attach, check_device
from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import BufferIntegrityError, NoLatentsError, StageError, UsaeProbeWarning
from ..files import write_text
from ..harvesting import buffer_spec, harvest
from ..hooks import HookedModel
from ..images import annotations_of, open_source
from ..probes import UniversalityReport, evaluate, one_site_per_model
from ..report import figures
from ..split import SPLITS
from ..usae import USAE, StepRecord, TrainResult, World, check_tensorboard, read_history, warn_without_bottleneck
from .outcomes import Progress, RunResult, StageEnd, StageResult
from .pictures import CamStage
from .record import RunRecord
from .source import same_source
from .stages import MEASURING, RESULTS, STAGES, Stage, earlier
from .training import kernel_note, kernel_of, note_of, train_in


class Run:
    """A run folder and the stages in it.

    Args:
        config: the checked config.
        folder: the run folder; made if need be.
        progress: called as stages go on.
        announce: called when a stage starts (`stage`, why it is redone) and when it is over (its result).
        world: the processes that train together, of which this is process 0: it alone does all the rest.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        *,
        progress: Callable[[Progress], None] | None = None,
        announce: Callable[[StageResult | tuple[Stage, str]], None] | None = None,
        world: World | None = None,
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self._progress = progress or (lambda _: None)
        self._announce = announce or (lambda _: None)
        self._world = world or World()
        self._report: UniversalityReport | None = None
        self._record = RunRecord(self.folder)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What `run` does by default: all stages, the pictures only when the config has a `[cam]` table."""
        return STAGES if "cam" in self.config.model_fields_set else MEASURING

    def run(self, stages: tuple[Stage, ...] | None = None) -> RunResult:
        """Do `stages` in order; a single later stage needs the earlier ones' results in the folder.

        A whole run that finds no latent to make pictures of warns and ends without.

        Raises:
            StageError: when an earlier stage's results are missing or belong to another config.
            NoLatentsError: when only pictures were asked for, and there is no latent to make them of.
            ConfigError: when the config asks for TensorBoard's files and its package is not installed.
        """
        stages = stages or self.stages
        if "train" in stages and self.config.train.tensorboard:
            check_tensorboard()
        for before in earlier(stages[0]):
            self._require(before)
        results = []
        for stage in stages:
            try:
                results.append(self._stage(stage))
            except NoLatentsError as error:
                if not results:
                    raise
                warnings.warn(str(error), UsaeProbeWarning, stacklevel=2)
        measured = "evaluate" in (*earlier(stages[-1]), *stages)
        return RunResult(
            self.folder,
            results,
            metrics=self._json("metrics.json") if measured else None,
            cam=self._json("cam/cam.json") if any(done.stage == "cam" for done in results) else None,
            report=self._report,
        )

    def _stage(self, stage: Stage) -> StageResult:
        changed, missing = self._record.changed(stage, self.config), self._missing(stage)
        finished = self._record.finished(stage)
        if finished and not changed and not missing:
            if stage == "train":
                self._world.tell("kept")
            result = StageResult(stage, kept=True, seconds=0.0)
            self._announce(result)
            return result
        why = f"{', '.join(changed[:3])}{', …' if len(changed) > 3 else ''} changed" if changed else missing
        why = why if finished else ""
        self._announce((stage, why))
        started = time.perf_counter()
        doing = {"harvest": self._harvest, "train": self._train, "evaluate": self._evaluate, "cam": self._cam}[stage]
        end = doing() or StageEnd()
        result = StageResult(stage, kept=False, seconds=time.perf_counter() - started, why=why, note=end.note)
        self._record.finish(stage, self.config, result.seconds, end.about)
        self._announce(result)
        return result

    def _harvest(self) -> None:
        config = self.config
        check_device(config.train.device)
        with ExitStack() as closing:
            models = self._attach(closing)
            d_in = {str(site): model.d_in(site) for model in models for site in model.sites}
            warn_without_bottleneck(d_in, config.usae.k, config.usae.sparsity)
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

    def _train(self) -> StageEnd:
        check_device(self.config.train.device)

        def follow(record: StepRecord) -> None:
            self._progress(Progress("train", record.step, record.steps, "steps", note_of(record)))

        done = train_in(self.folder, self.config, self.buffer(), follow, self._world)
        kernel = kernel_of(done)
        return StageEnd(self._train_note(done, kernel), {"kernel": kernel} if kernel else {})

    def _train_note(self, done: TrainResult, kernel: Mapping[str, Any] | None) -> str:
        return "; ".join(part for part in (done.note, kernel_note(kernel)) if part)

    def _evaluate(self) -> None:
        buffer = self.buffer()
        source = same_source(self.config, buffer)
        report = evaluate(
            self.usae(),
            buffer,
            config=self.config.probes,
            annotations=annotations_of(source) if source else (),
            progress=lambda done, total: self._progress(Progress("evaluate", done, total, "rows")),
        )
        write_text(self.folder / "metrics.json", report.to_json() + "\n")
        write_text(self.folder / "latents.csv", report.to_csv())
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        figures.r2_matrix(report, folder / "r2.png")
        figures.training_curves(list(read_history(self.folder / "history.jsonl")), folder / "training.png")
        self._report = report

    def overview(self, result: RunResult) -> dict[str, Any]:
        """Return what an evaluated run compared, for its summary: models with their sites, images, sizes, pictures."""
        metrics, buffer = result.metrics or {}, self.buffer()
        models = {
            name: {"name": entry.name, "sites": [s for s in metrics.get("sites", []) if s.startswith(f"{name}/")]}
            for name, entry in self.config.models.items()
        }
        images: dict[str, Any] = {"source": self.config.images.source}
        images |= {split: buffer.n_images(split) for split in SPLITS}
        cam: dict[str, Any] | None = None
        if result.cam is not None:
            cam = {key: result.cam[key] for key in ("n_pictures", "n_above", "latents")}
            cam["grid"] = str(self.folder / result.cam["sheets"][0])
        usae = self.config.usae
        return {"models": models, "images": images, "n_latents": usae.n_latents, "k": usae.k, "cam": cam}

    def buffer(self) -> ActivationBuffer:
        """Open the run's buffer."""
        return ActivationBuffer(self.folder / "buffer")

    def usae(self) -> USAE:
        """Load the run's USAE."""
        return USAE.load(self.folder / "usae.safetensors", kernel=self.config.train.kernel)

    def _cam(self) -> None:
        with ExitStack() as closing:
            CamStage(self.config, self.folder).do(
                self.usae(),
                self.buffer(),
                self._attach(closing),
                progress=lambda p: self._progress(Progress("cam", p.done, p.total, "steps", p.site)),
            )

    def _attach(self, closing: ExitStack) -> list[HookedModel]:
        """Attach to all models; they are closed with `closing`."""
        models = []
        for name, entry in self.config.models.items():
            given = entry.model_dump(exclude={"adapter", "name", "layers"})
            model = attach(
                entry.name,
                adapter=entry.adapter,
                name=name,
                layers=entry.layers,
                base=self.config.base,
                where=self.config.lists_layers,
                **given,
            )
            models.append(closing.enter_context(model))
        return models

    def _json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return content

    def _missing(self, stage: Stage) -> str:
        """Return what is missing of a finished stage's results; empty when all is there."""
        if stage == "harvest":
            try:
                buffer = self.buffer()
                buffer.demand_present()
                return "" if buffer.complete else "the buffer is not complete"
            except BufferIntegrityError as error:
                return error.message
        absent = [name for name in RESULTS[stage] if not (self.folder / name).is_file()]
        return f"{', '.join(absent)} not there" if absent else ""

    def _require(self, stage: Stage) -> None:
        done = self._record.finished(stage)
        if not done or (missing := self._missing(stage)):
            detail = missing if done else f"stage {stage} has not been done"
            raise StageError(
                f"'{self.folder}' has no finished {stage}: {detail}",
                hint=f"do `usae-probe {stage}` with the same config first, or `usae-probe run` for all stages",
            )
        if changed := self._record.changed(stage, self.config):
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
