"""A scan in a folder: layers chosen, one harvest, trainings and measures, each kept and gone on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import ConfigError, UsageError
from ..files import json_sha256, write_json, write_text
from ..hooks import HookedModel
from ..images import annotations_of
from ..lock import claiming
from ..probes.scan import ScanProgress, ScanReport, ScanSettings, choose_sites, depths_of, joint_length, scan_buffer
from ..report.scan_figures import scan_figures
from ..sites import layer_of
from ..usae import read_history
from .budget import fit_budget
from .controls import UntrainedRun
from .models import attach_all
from .outcomes import Progress, StageResult
from .run import Run
from .source import images_of, labels_of, same_source
from .stages import Stage


class ScanPlan(NamedTuple):
    """What a scan looks at.

    Attributes:
        layers: of each model, as `[models]` would list them.
        depths: {site: relative depth}.
        blocks: how many blocks each model has.
        limit, steps: in the place of the config's; None where these stay.
        about: what a budget chose, in words; empty without one.
    """

    layers: dict[str, list[str]]
    depths: dict[str, float]
    blocks: dict[str, int]
    limit: int | None = None
    steps: int | None = None
    about: str = ""


@dataclass(frozen=True)
class ScanResult:
    """What became of a scan: its report, what was looked at, and where its figures are."""

    folder: Path
    plan: ScanPlan
    report: ScanReport
    figures: tuple[Path, ...]


class Scan:
    """Every layer of each model against every layer of the others, in a folder that keeps what is done.

    Args:
        config: `[scan]` says which layers, and how; their lists in `[models]` are for `depth = 0`.
        folder: of the scan: `plan.json`, `buffer/`, `usae.safetensors`, `cells.jsonl`, `scan.json`, …
        progress: called as it goes on.
        announce: called with what becomes of harvest and training (as by `Run`), and with lines worth saying.

    Raises:
        ConfigError: when the strategy needs rows that a ring drops.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        *,
        progress: Callable[[Progress | ScanProgress], None] | None = None,
        announce: Callable[[StageResult | tuple[Stage, str] | str], None] | None = None,
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self._progress = progress or (lambda _: None)
        self._announce = announce or (lambda _: None)
        if config.buffer.mode == "ring" and config.scan.strategies != ["joint"]:
            raise ConfigError(
                "scan.strategies = 'pairs' trains many times from rows that buffer.mode = 'ring' drops",
                hint="set mode = 'store', or leave pairs out",
            )

    def run(self) -> ScanResult:
        """Do what is not done yet.

        Raises:
            UsageError: when no layers can be chosen, a budget is too short, or the folder is that of a run.
            FolderLockedError: when another process is at work in the folder.
        """
        if (self.folder / "run.json").exists() and not (self.folder / "plan.json").exists():
            raise UsageError(
                f"'{self.folder}' is the folder of a run, whose results a scan would replace",
                hint="choose another --out; the default is runs/<config's name>-scan",
            )
        with claiming(self.folder):
            return self._done()

    def _done(self) -> ScanResult:
        plan = self._plan()
        if plan.about:
            self._announce(plan.about)
        config = self._settled(plan)
        report = self._scanned(config, plan, self.folder, Run)
        if config.scan.floor:
            hashes = {spec.model: spec.weights_hash for spec in ActivationBuffer(self.folder / "buffer").specs.values()}
            store = config.buffer.model_copy(update={"dtype": "float32"})
            fresh = config.model_copy(update={"buffer": store})

            def untrained(config: RunConfig, folder: Path, **told: Any) -> Run:
                return UntrainedRun(config, folder, hashes, **told)

            self._announce("the floor: the same with untrained networks")
            floor = self._scanned(fresh, plan, self.folder / "untrained", untrained)
            report = replace(report, floor=floor)
        write_text(self.folder / "scan.json", report.to_json() + "\n")
        write_text(self.folder / "scan.csv", report.to_csv())
        write_text(self.folder / "scan-latents.csv", report.latents_csv())
        return ScanResult(self.folder, plan, report, tuple(scan_figures(report, self.folder / "figures")))

    def _scanned(self, config: RunConfig, plan: ScanPlan, folder: Path, make: Callable[..., Run]) -> ScanReport:
        """Harvest, train and measure in a folder."""
        joint = "joint" in config.scan.strategies
        longer = config.train
        if config.buffer.mode != "ring":  # a ring has steps for its rows, and no more
            longer = joint_length(config.train, len(plan.depths), config.scan)
        run = make(
            config.model_copy(update={"train": longer}), folder, progress=self._progress, announce=self._announce
        )
        run.measured_on = config.scan.split
        run.run(("harvest", "train") if joint else ("harvest",))
        buffer = run.buffer()
        source = same_source(config, buffer)
        return scan_buffer(
            buffer,
            run.usae() if joint else None,
            ScanSettings(config.scan, config.usae, config.train, config.probes),
            steps=_steps_taken(folder) if joint else None,
            depths=plan.depths,
            annotations=annotations_of(source) if source else (),
            labels=labels_of(config),
            folder=folder,
            progress=self._progress,
        )

    def _settled(self, plan: ScanPlan) -> RunConfig:
        """Return the config with what was chosen."""
        models = {
            name: entry.model_copy(update={"layers": plan.layers[name]}) for name, entry in self.config.models.items()
        }
        update: dict[str, Any] = {"models": models, "probes": self.config.probes.model_copy(update={"sites": None})}
        if plan.limit is not None:
            update["images"] = self.config.images.model_copy(update={"limit": plan.limit})
        if plan.steps is not None:
            update["train"] = self.config.train.model_copy(update={"steps": plan.steps, "epochs": None})
        return self.config.model_copy(update=update)

    def _plan(self) -> ScanPlan:
        """Choose layers, images and steps, or read what was chosen for the same config: so that a scan goes on."""
        path, key = self.folder / "plan.json", self._plan_key()
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if kept.pop("of") == key:
                    return ScanPlan(**kept)
            except (OSError, ValueError, KeyError, TypeError):
                pass  # it is chosen again
        plan = self._chosen()
        write_json(path, {"of": key, **plan._asdict()})
        return plan

    def _plan_key(self) -> str:
        whole = json.loads(self.config.model_dump_json(exclude={"cam"}))
        scan = whole.pop("scan")
        keys = {key: scan[key] for key in ("depth", "every", "layers", "policy", "budget")}
        if scan["budget"] is None:
            return json_sha256({"models": whole["models"], "scan": keys})
        return json_sha256({**whole, "scan": scan})

    def _chosen(self) -> ScanPlan:
        began = time.perf_counter()
        with ExitStack() as closing:
            models = self._structures(closing)
            sites = choose_sites(models, self.config.scan)
            limit = steps = None
            about = ""
            if self.config.scan.budget:
                source = images_of(self.config)
                wanted = sites
                chosen = fit_budget(self.config, models, source, sites, spent=time.perf_counter() - began)
                sites, limit, steps = chosen.sites, chosen.images, chosen.steps
                of = ", ".join(f"{len(sites[name])} of {len(wanted[name])} layers of {name}" for name in sites)
                about = (
                    f"budget {self.config.scan.budget}: {of}, {limit:,} images, {steps:,} steps as for two layers; "
                    f"about {_minutes(chosen.harvest)} of harvest, {_minutes(chosen.training)} of training, "
                    f"{_minutes(chosen.measures)} of measures"
                )
            return ScanPlan(
                layers={name: [layer_of(str(site)) for site in chosen_sites] for name, chosen_sites in sites.items()},
                depths=depths_of(models, sites),
                blocks={model.name: len(model.blocks) for model in models},
                limit=limit,
                steps=steps,
                about=about,
            )

    def _structures(self, closing: ExitStack) -> Sequence[HookedModel]:
        """Attach to the architectures: which layers there are does not depend on weights, which may be large."""
        listed = self.config.scan.depth == 0 and self.config.scan.every is None and self.config.scan.layers is None
        entries: Mapping[str, Any] = {
            name: entry.model_copy(
                update={"pretrained": False, "checkpoint": None} | ({} if listed else {"layers": []})
            )
            for name, entry in self.config.models.items()
        }
        return attach_all(self.config.model_copy(update={"models": entries}), closing)


def _steps_taken(folder: Path) -> int | None:
    """Return the last step in a training's history: a ring has as many as its rows are enough for."""
    return max((int(record["step"]) for record in read_history(folder / "history.jsonl")), default=None)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
