"""The controls of a run: what is trained beside it, each in a folder of its own, and kept once it is done."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..attaching import attach
from ..buffer import ActivationBuffer, JoinedBuffer
from ..config import RunConfig
from ..errors import UsaeProbeError, UsaeProbeWarning
from ..harvesting import harvest
from ..hooks import HookedModel
from ..images import Annotation, ImageSource
from ..probes import UniversalityReport
from ..probes.controls import Control, Controls, Length, Spread, self_r2
from ..probes.matching import Counterparts, code_matrix, counterparts, found_again
from ..probes.pixels import attach_pixel_statistics, fit_pixel_statistics
from ..probes.posthoc import matched_afterwards
from ..probes.records import or_nan
from ..sites import model_of
from ..untrained import reinitialise
from ..usae import USAE, StepRecord, TrainResult, train_independent
from .cell import Cell, CellResult
from .grid import Combination
from .models import attach_all
from .outcomes import Progress
from .run import Run

KINDS = ("steps", "encoder", "parts")
PIXELS = "pixels/statistics"
_LEAN: Mapping[str, Any] = {
    "controls": False,
    "linear": False,
    "similarity_images": 0,
    "fidelity_images": 0,
    "bootstrap": 0,
    "nulls": 0,
}


class ControlStage:
    """Trains and measures everything that a run's figures stand beside.

    Args:
        config: of the run.
        folder: the run folder; everything goes below `controls/` in it.
        buffer: the run's.
        source: its images; without them no untrained networks, pixels or labels.
        within: the label within which rows are exchanged.
        progress: called as trainings go on.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        buffer: ActivationBuffer,
        source: ImageSource | None,
        within: Annotation | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self.config, self.run_folder, self.folder = config, folder, folder / "controls"
        self.buffer, self.source, self.within = buffer, source, within
        self._progress = progress
        self._pixel_buffer: ActivationBuffer | None = None

    def do(self, usae: USAE, report: UniversalityReport) -> Controls:
        """Do what is not done yet.

        Raises:
            StageError: when training rows were dropped by a ring.
        """
        self.buffer.demand_all_rows()
        seeds = {self.config.train.seed: self.run_folder}
        own = {self.config.train.seed: {site: report.r2[site][site] for site in usae.sites}}
        live, universal, again = [report.n_live], [report.counts["universal"]], []
        numbers = [record.latent for record in report.universal]
        for seed in range(self.config.train.seed + 1, self.config.train.seed + self.config.probes.seeds):
            cell = self._trained(f"seed {seed}", self._changed(seed=seed), self.buffer)
            seeds[seed], metrics = cell.folder, cell.metrics or {}
            control = _of_cell(f"seed {seed}", "", cell)
            live.append(control.n_live)
            universal.append(control.counts["universal"])
            own[seed] = {site: or_nan(metrics["r2"][site][site]) for site in usae.sites}
            other = USAE.load(cell.folder / "usae.safetensors", kernel=self.config.train.kernel)
            again.append(found_again(usae, other, numbers, metrics["universal_latents"]))
        several = len(report.class_sites) > 1
        controls = tuple(self._controls(report.class_sites)) if several else ()
        independent = self._independent(seeds) if len(usae.sites) > 1 else {}
        first = independent.get("steps", {}).get(self.config.train.seed, {})
        saes = {site: done.usae for site, done in first.items()}
        classes = {site: saes[site] for site in report.class_sites if site in saes}
        compare = partial(matched_afterwards, classes, self.buffer, config=self.config.probes)
        return Controls(
            controls=controls,
            seeds=tuple(seeds),
            universal=tuple(universal),
            live=tuple(live),
            found_again=tuple(again),
            independent=self._lengths(independent, own) or None,
            posthoc=tuple(compare(matched_on=rows) for rows in ("holdout", "train")) if len(classes) > 1 else (),
            counterparts={site: self._counterparts(sae, usae, numbers) for site, sae in classes.items()} or None,
        )

    def _counterparts(self, sae: USAE, usae: USAE, universal: list[int]) -> Counterparts:
        """Compare the latents of an independent SAE that fire on held-out rows with the universal ones."""
        codes = code_matrix(sae, sae.sites[0], self.buffer, "holdout")
        return counterparts(sae, usae, universal, live=np.unique(codes.indices).tolist())

    def _controls(self, class_sites: tuple[str, ...]) -> Iterator[Control]:
        """Yield what should share less, then what should share everything; what fails is left out with a warning."""
        kinds: dict[str, Callable[[], Control]] = {
            "mispaired": partial(self._control, "mispaired", "rows of different images paired in training", "shuffled")
        }
        if self.within:
            name = self.within.name
            what = f"rows of images with the same {name} paired in training"
            kinds[f"within {name}"] = partial(self._control, f"within {name}", what, "label")
        if self.source:
            kinds["untrained"] = self._untrained
            kinds |= {
                f"pixels and {model_of(site)}": partial(self._with_pixels, self.source, site) for site in class_sites
            }
        kinds |= {f"{model_of(site)} twice": partial(self._twice, site) for site in class_sites}
        for name, made in kinds.items():
            try:
                yield made()
            except UsaeProbeError as error:
                warnings.warn(f"the control '{name}' is left out: {error}", UsaeProbeWarning, stacklevel=2)

    def _control(self, name: str, what: str, pairing: str) -> Control:
        return _of_cell(name, what, self._trained(name, self._changed(pairing=pairing), self.buffer))

    def _with_pixels(self, source: ImageSource, site: str) -> Control:
        name = f"pixels and {model_of(site)}"
        view = JoinedBuffer({PIXELS: (self._pixels(source), PIXELS), site: (self.buffer, site)})
        cell = self._trained(name, self._alone(), view)
        return _of_cell(name, f"image statistics (colour layout, Gabor energies) with {site}", cell)

    def _twice(self, site: str) -> Control:
        model, _, layer = site.partition("/")
        view = JoinedBuffer({site: (self.buffer, site), f"{model}-again/{layer}": (self.buffer, site)})
        cell = self._trained(f"{model} twice", self._alone(), view)
        return _of_cell(f"{model} twice", f"{site} with itself: as much as can be shared", cell)

    def _untrained(self) -> Control:
        follow = partial(self._told, "untrained")
        store = self.config.buffer.model_copy(update={"dtype": "float32", "online": False, "reuse": 1})
        config = self._changed().model_copy(update={"buffer": store})
        hashes = {spec.model: spec.weights_hash for spec in self.buffer.specs.values()}
        run = UntrainedRun(config, self.folder / "untrained", hashes, progress=follow)
        done = run.run(("harvest", "train", "evaluate"))
        what = "the same architectures with random weights"
        return Control.of("untrained", what, done.metrics or {}, run.seconds("train"))

    def _pixels(self, source: ImageSource) -> ActivationBuffer:
        """Harvest the image statistics of the run's images, once for all models."""
        if self._pixel_buffer is not None:
            return self._pixel_buffer
        images = self.config.images
        module = fit_pixel_statistics(source, self.buffer.read("train", []).image_index, seed=images.seed)
        with attach_pixel_statistics(module) as model:
            self._pixel_buffer = harvest(
                [model],
                source,
                self.folder / "pixels" / "buffer",
                images_config=images,
                progress=lambda now: self._told("pixels", Progress("harvest", now.done, now.total, "images")),
            )
        return self._pixel_buffer

    def _independent(self, seeds: Mapping[int, Path]) -> dict[str, dict[int, dict[str, TrainResult]]]:
        """Train the independent SAEs that match each seed's USAE: {kind: {seed: {site: SAE}}}."""
        parts = max(self.config.usae.k, self.config.usae.n_latents // len(self.buffer.sites))
        found: dict[str, dict[int, dict[str, TrainResult]]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for seed, folder in seeds.items():
                found[kind][seed] = train_independent(
                    self.buffer,
                    like=folder,
                    updates="encoder" if kind == "encoder" else "steps",
                    n_latents=parts if kind == "parts" else None,
                    progress=partial(self._stepped, f"independent SAEs, {kind}, seed {seed}"),
                    resume=self.folder / "independent" / f"{kind}-{seed}",
                )
        return found

    def _lengths(
        self,
        independent: Mapping[str, Mapping[int, Mapping[str, TrainResult]]],
        own: Mapping[int, Mapping[str, float]],
    ) -> dict[str, Length]:
        """Measure the independent SAEs, beside the self-R² of the USAEs that they match, {seed: {site: R²}}."""
        found = {}
        for kind, by_seed in independent.items():
            r2 = {
                seed: {site: self_r2(done.usae, self.buffer, "holdout")[site] for site, done in of_seed.items()}
                for seed, of_seed in by_seed.items()
            }
            sites = next(iter(r2.values()))
            found[kind] = Length(
                {site: Spread.of([r2[seed][site] for seed in r2]) for site in sites},
                {site: Spread.of([r2[seed][site] - own[seed][site] for seed in r2]) for site in sites},
            )
        return found

    def _trained(self, name: str, config: RunConfig, buffer: ActivationBuffer) -> CellResult:
        slug = re.sub(r"[^\w.+-]+", "-", name).strip("-")
        combination = Combination({}, config.train.seed, config)
        return Cell(combination, self.folder / slug, buffer, partial(self._told, name)).do("holdout")

    def _changed(self, **training: Any) -> RunConfig:
        """Return the run's config with other training settings, to be measured without what is not needed."""
        how = self.config.train.model_copy(update={"tensorboard": False, **training})
        return self.config.model_copy(
            update={"train": how, "probes": self.config.probes.model_copy(update=dict(_LEAN))}
        )

    def _alone(self) -> RunConfig:
        """Return a config for two sites that are not the run's: nothing in it names a site."""
        config = self._changed(source=_unnamed(self.config.train.source), site_weights=None)
        return config.model_copy(update={"probes": config.probes.model_copy(update={"sites": None})})

    def _told(self, name: str, now: Progress) -> None:
        self._progress(Progress("evaluate", now.done, now.total, now.unit, f"{name}: {now.stage}"))

    def _stepped(self, name: str, site: str, record: StepRecord) -> None:
        self._progress(Progress("evaluate", record.step, record.steps, "steps", f"{name}: {site}"))


class UntrainedRun(Run):
    """A run of the same architectures with random weights.

    Args:
        config: of the run, with the trained models.
        folder: a run folder of its own.
        trained: {model: hash of the trained weights}.
    """

    def __init__(self, config: RunConfig, folder: Path, trained: Mapping[str, str], **told: Any) -> None:
        fresh = {
            name: entry.model_copy(update={"pretrained": False, "checkpoint": None, "seed": entry.seed + 1 + i})
            for i, (name, entry) in enumerate(config.models.items())
        }
        super().__init__(config.model_copy(update={"models": fresh}), folder, **told)
        self._trained_hashes = trained

    def seconds(self, stage: Any) -> float:
        """Return how long a finished stage took."""
        return self._record.seconds(stage)

    def _attached(self, closing: ExitStack) -> list[HookedModel]:
        models = []
        for model in attach_all(self.config, closing, self._world):
            if model.weights_hash == self._trained_hashes.get(model.name):
                model = closing.enter_context(self._reinitialised(model))
            models.append(model)
        return models

    def _reinitialised(self, model: HookedModel) -> HookedModel:
        """Draw the weights of a model anew whose factory gives trained ones."""
        entry = self.config.models[model.name]
        model.close()
        return attach(
            reinitialise(model.module, entry.seed),
            name=model.name,
            layers=entry.layers,
            layout=entry.layout,
            preprocess=model.preprocess,
        )


def _of_cell(name: str, what: str, cell: CellResult) -> Control:
    return Control.of(name, what, cell.metrics or {}, cell.seconds or 0.0)


def _unnamed(source: str | dict[str, float]) -> str:
    return source if source in ("random", "all") and isinstance(source, str) else "random"
