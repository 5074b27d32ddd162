"""A run folder and the stages in it, each redone only when something that it depends on has changed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..attaching import check_device
from ..buffer import ActivationBuffer, BufferSpec
from ..config import RunConfig
from ..errors import BufferIntegrityError, ConfigError, ImageError, NoLatentsError, StageError, UsaeProbeWarning
from ..files import read_json
from ..harvesting import HarvestProgress, buffer_spec, demand_all_decoded, harvest
from ..hooks import HookedModel
from ..images import ImageSource
from ..lock import claiming
from ..probes import UniversalityReport, one_site_per_model
from ..split import SPLITS, SplitName
from ..usae import USAE, StepRecord, TrainResult, World, check_tensorboard, warn_without_bottleneck
from .buffers import discard_other_buffer, train_along
from .explorer import ReportStage
from .measuring import measure, warn_of_rare_latents
from .models import attach_all
from .outcomes import Progress, RunResult, StageEnd, StageResult
from .pictures import CamStage
from .record import RunRecord
from .source import demand_same_images, images_of, labelled_source, labels_of
from .stages import RESULTS, STAGES, Stage, earlier, scan_folder
from .training import buffer_of, kernel_note, kernel_of, train_in


class Run:
    """A run folder and the stages in it.

    Args:
        config: the checked config.
        folder: the run folder; made if need be.
        progress: called as stages go on.
        announce: called when a stage starts (`stage`, why it is redone) and when it is over (its result).
        world: the processes that train together, of which this is process 0: it alone does all the rest.
    """

    measured_on: SplitName | None = "holdout"  # where latents are looked for; None: however few images these are

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
        return tuple(stage for stage in STAGES if stage != "cam" or "cam" in self.config.model_fields_set)

    def run(self, stages: tuple[Stage, ...] | None = None) -> RunResult:
        """Do `stages` in order; a single later stage needs the earlier ones' results in the folder.

        A whole run that finds no latent to make pictures of warns and ends without.

        Raises:
            StageError: when an earlier stage's results are missing or belong to another config.
            NoLatentsError: when only pictures were asked for, and there is no latent to make them of.
            ConfigError: when the config asks for TensorBoard's files and its package is not installed.
            UsageError: when the config names a scan for the page that is not there.
            FolderLockedError: when another process is at work in the folder.
        """
        stages = stages or self.stages
        self._check_along(stages)
        if "train" in stages and self.config.train.tensorboard:
            check_tensorboard()
        if "report" in stages:
            scan_folder(self.config, self.folder)  # a scan that is not there is known before any work
        for before in earlier(stages[0]):
            self._require(before)
        with claiming(self.folder):
            results = self._done(stages)
        measured = "evaluate" in (*earlier(stages[-1]), *stages)
        return RunResult(
            self.folder,
            results,
            metrics=read_json(self.folder / "metrics.json") if measured else None,
            cam=read_json(self.folder / "cam/cam.json") if any(done.stage == "cam" for done in results) else None,
            report=self._report,
        )

    def _done(self, stages: tuple[Stage, ...]) -> list[StageResult]:
        results: list[StageResult] = []
        for stage in stages:
            try:
                results += self._stages(stage, stages)
            except NoLatentsError as error:
                if not results:
                    raise
                warnings.warn(str(error), UsaeProbeWarning, stacklevel=3)
        return results

    def _check_along(self, stages: tuple[Stage, ...]) -> None:
        """Check what is asked for of a training that goes along with its harvest.

        Raises:
            ConfigError: when it would have to be taken apart, or shared by several processes.
        """
        store = self.config.buffer
        if store.trains_along and self._world.size > 1 and {"harvest", "train"} & set(stages):
            raise ConfigError(
                f"training along with the harvest works in one process, {self._world.size} were started",
                hint="set [buffer] mode = 'store' and online = false: all processes then harvest, and train after that",
            )
        if store.mode == "ring" and len({"harvest", "train"} & set(stages)) == 1:
            raise ConfigError(
                "a ring is harvested and trained from at the same time: one without the other is nothing",
                hint="do `usae-probe run` with this config; or set [buffer] mode = 'store'",
            )

    def _stages(self, stage: Stage, stages: tuple[Stage, ...]) -> list[StageResult]:
        """Do a stage; nothing for a harvest that the training will do along the way, and both then."""
        along = self.config.buffer.trains_along and {"harvest", "train"} <= set(stages)
        if not along or stage not in ("harvest", "train") or not self._harvest_is_due():
            return [self._stage(stage)]
        if stage == "harvest":
            return []
        started = time.perf_counter()
        why = {each: self._why(each) for each in ("harvest", "train")}
        self._announce(("harvest", why["harvest"]))
        done = self._stage("train", why=why["train"] or why["harvest"])
        together = StageResult(
            "harvest", kept=False, seconds=time.perf_counter() - started, why=why["harvest"], note="along with training"
        )
        self._announce(together)
        return [together, done]

    def _harvest_is_due(self) -> bool:
        """Say whether there are shards to harvest while training; a ring keeps none for another training."""
        if self.is_done("harvest"):
            return self.config.buffer.mode == "ring" and not self.is_done("train")
        return True

    def is_done(self, stage: Stage) -> bool:
        """Say whether a stage was finished with this config, and its results are there."""
        return self._record.finished(stage) and not self._why(stage)

    def _why(self, stage: Stage) -> str:
        """Return why a finished stage is to be redone; nothing for one that is not, or was not finished."""
        if not self._record.finished(stage):
            return ""
        changed = self._record.changed(stage, self.config)
        few = f"{', '.join(changed[:3])}{', …' if len(changed) > 3 else ''} changed"
        return few if changed else self._missing(stage)

    def _stage(self, stage: Stage, why: str | None = None) -> StageResult:
        """Do a stage, unless it is done and there is no `why` to redo it."""
        because = self._why(stage) if why is None else why
        if why is None and self._record.finished(stage) and not because:
            self._tell(stage, "kept")
            if stage == "harvest":
                self._demand_same_images()
            result = StageResult(stage, kept=True, seconds=0.0)
            self._announce(result)
            return result
        self._announce((stage, because))
        started = time.perf_counter()
        doing: dict[Stage, Callable[[], StageEnd | None]] = {
            "harvest": self._harvest,
            "train": self._train,
            "evaluate": self._evaluate,
            "cam": self._cam,
            "report": self._write_page,
        }
        end = doing[stage]() or StageEnd()
        result = StageResult(stage, kept=False, seconds=time.perf_counter() - started, why=because, note=end.note)
        self._record.finish(stage, self.config, result.seconds, end.about)
        self._announce(result)
        return result

    def _tell(self, stage: Stage, word: str) -> None:
        """Let the other processes, which help with two stages, know what becomes of one."""
        if stage in ("harvest", "train"):
            self._world.tell(word)

    def _demand_same_images(self) -> None:
        """Check that a buffer that is kept was made of the images that are there now; they need not be there.

        Raises:
            BufferMismatchError: with both fingerprints.
            ImageError: when images were left out, and `images.strict` is set.
        """
        if self.config.images.strict:
            demand_all_decoded(self.buffer().skipped)
        with suppress(ImageError, OSError):
            demand_same_images(images_of(self.config), self.buffer())

    def _harvest(self) -> None:
        config = self.config
        check_device(config.train.device)
        with ExitStack() as closing:
            source, models, spec = self._prepared(closing)
            discard_other_buffer(self.folder / "buffer", spec)
            self._tell("harvest", "harvest")
            harvest(
                models,
                source,
                self.folder / "buffer",
                images_config=config.images,
                buffer_config=config.buffer,
                progress=self._harvested,
                world=self._world,
            )

    def _attached(self, closing: ExitStack) -> list[HookedModel]:
        return attach_all(self.config, closing, self._world)

    def _prepared(self, closing: ExitStack) -> tuple[ImageSource, list[HookedModel], BufferSpec]:
        """Open the images, attach to all models, and check what can be known before the first image is looked at."""
        config = self.config
        source = labelled_source(config)  # before the models, which take longer
        models = self._attached(closing)
        d_in = {str(site): model.d_in(site) for model in models for site in model.sites}
        warn_without_bottleneck(d_in, config.usae.k, config.usae.sparsity)
        one_site_per_model(list(d_in), config.probes.sites)
        spec = buffer_spec(models, source, config.images, config.buffer)
        warn_of_rare_latents(config, self.measured_on, spec.n_images, spec.sites[0].rows_per_image)
        return source, models, spec

    def _harvested(self, now: HarvestProgress) -> None:
        self._progress(
            Progress("harvest", now.done, now.total, "images", f"{now.skipped} skipped" if now.skipped else "")
        )

    def _trained(self, record: StepRecord) -> None:
        self._progress(Progress("train", record.step, record.steps, "steps", record.note, record.r2))

    def _train(self) -> StageEnd:
        check_device(self.config.train.device)
        if self.config.buffer.trains_along:
            done = self._train_along()
        else:
            buffer, labels = self.buffer(), labels_of(self.config)
            rows = next(iter(buffer.specs.values())).rows_per_image
            warn_of_rare_latents(self.config, self.measured_on, buffer.n_images, rows)
            done = train_in(self.folder, self.config, buffer, self._trained, self._world, labels)
        kernel = kernel_of(done)
        return StageEnd(self._train_note(done, kernel), {"kernel": kernel} if kernel else {})

    def _train_along(self) -> TrainResult:
        started, due = time.perf_counter(), self._harvest_is_due()
        with ExitStack() as closing:
            prepared = self._prepared(closing)
            done = train_along(self.folder, self.config, *prepared, harvested=self._harvested, trained=self._trained)
        if due:
            self._record.finish("harvest", self.config, time.perf_counter() - started)
        return done

    def _train_note(self, done: TrainResult, kernel: Mapping[str, Any] | None) -> str:
        return "; ".join(part for part in (done.note, kernel_note(kernel)) if part)

    def _evaluate(self) -> None:
        self._report = measure(
            self.config, self.folder, self.usae(), self.buffer(), attached=self._attached, progress=self._progress
        )

    def overview(self, metrics: Mapping[str, Any], cam: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what an evaluated run compared, for its summary: models with their sites, images, sizes, pictures."""
        buffer = self.buffer()
        models = {
            name: {"name": entry.name, "sites": [s for s in metrics.get("sites", []) if s.startswith(f"{name}/")]}
            for name, entry in self.config.models.items()
        }
        images: dict[str, Any] = {"source": self.config.images.source}
        images |= {split: buffer.n_images(split) for split in SPLITS}
        usae = self.config.usae
        published = [each.model_dump() for each in self.config.published_here()]
        shape = {"n_latents": usae.n_latents, "k": usae.k}
        return {"models": models, "images": images, **shape, "published": published, "cam": cam}

    def buffer(self) -> ActivationBuffer:
        """Open the run's buffer."""
        return buffer_of(self.config, self.folder)

    def usae(self) -> USAE:
        """Load the run's USAE."""
        return USAE.load(self.folder / "usae.safetensors", kernel=self.config.train.kernel)

    def _cam(self) -> None:
        with ExitStack() as closing:
            CamStage(self.config, self.folder).do(
                self.usae(),
                self.buffer(),
                attach_all(self.config, closing),
                progress=lambda p: self._progress(Progress("cam", p.done, p.total, "steps", p.site)),
            )

    def _write_page(self) -> StageEnd:
        stage = ReportStage(self.config, self.folder)
        cam = read_json(self.folder / "cam/cam.json") if self.is_done("cam") else None
        about = self.overview(stage.metrics, cam)
        note = stage.do(
            self.usae(), self.buffer(), about, self._record.data, attached=self._attached, progress=self._progress
        )
        return StageEnd(note)

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
        if absent:
            return f"{', '.join(absent)} not there"
        return "" if self._record.intact(stage) else f"{RESULTS[stage][0]} is not the file that it wrote"

    def _require(self, stage: Stage) -> None:
        done = self._record.finished(stage)
        if not done or (missing := self._missing(stage)):
            detail = missing if done else f"stage {stage} has not been done"
            raise StageError(
                f"'{self.folder}' has no finished {stage}: {detail}",
                hint=f"do `usae-probe {stage}` with the same config first, or `usae-probe run` for all stages",
            )
        if changed := self._record.changes(stage, self.config):
            raise StageError(
                f"the {stage} in '{self.folder}' was done with another config: {'; '.join(changed)}",
                hint=f"do `usae-probe {stage}` again, or `usae-probe run`; or choose another --out",
            )
