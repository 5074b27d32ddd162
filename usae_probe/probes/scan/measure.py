"""The measures of a scan on one buffer, cell by cell, each kept once it is done."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...buffer import ActivationBuffer
from ...config import DEFAULT_EPOCHS, ProbesConfig, ScanConfig, TrainConfig, UsaeConfig
from ...errors import StageError, UsaeProbeWarning, UsageError
from ...files import json_sha256
from ...images import Annotation
from ...sites import file_stem
from ...usae import USAE, Matrix, StepRecord, empty_matrix, train
from ..linear import LinearReference, linear_reference
from ..records import jsonable, or_nan
from ..rows import check_rows
from ..similarity import Similarity, pair_similarities
from .cells import KeptCells, Pair, pairs_between
from .codes import CodeMatrices, Followed, scan_codes
from .report import ScanReport


class ScanProgress(NamedTuple):
    """How far a scan is: `done` of `total` units of a part of it, and what it is at."""

    part: str
    done: int
    total: int
    unit: str
    note: str = ""


class ScanSettings(NamedTuple):
    """The config tables that a scan goes by."""

    scan: ScanConfig = ScanConfig()
    usae: UsaeConfig = UsaeConfig()
    train: TrainConfig = TrainConfig()
    probes: ProbesConfig = ProbesConfig()


def scan_buffer(
    buffer: ActivationBuffer,
    usae: USAE | None,
    settings: ScanSettings,
    *,
    steps: int | None = None,
    depths: Mapping[str, float] | None = None,
    annotations: Sequence[Annotation] = (),
    labels: np.ndarray | None = None,
    folder: Path | None = None,
    progress: Callable[[ScanProgress], None] | None = None,
) -> ScanReport:
    """Compare every layer of each model with every layer of the others, on one buffer.

    Args:
        buffer: row-paired activations of all sites, model by model in the order of depth.
        usae: a USAE over all of them, for the strategy `joint`; None without it.
        settings: `[scan]`, and `[usae]`, `[train]`, `[probes]` for trainings and measures.
        steps: that the USAE was trained for; default: those that the settings ask for.
        depths: {site: relative depth}; default: the places in their model's list.
        annotations: what is known about the images.
        labels: of all images, for trainings with `pairing = "label"`.
        folder: keeps every finished cell and the state of a training that is under way, so that an interrupted scan
            goes on; default: nothing is kept.
        progress: called as it goes on.

    Raises:
        UsageError: when there is nothing to compare.
        BufferIntegrityError: when the split has fewer than 2 rows.
        StageError: for the strategy `pairs` on what a ring left.
    """
    doing = _Scan(buffer, settings, annotations, labels, folder, progress)
    return doing.do(usae, steps, depths or listed_depths(buffer.sites))


def joint_length(how: TrainConfig, n_sites: int, scan: ScanConfig) -> TrainConfig:
    """Return the training of a USAE over all sites: with `updates = "encoder"` M / 2 times as long.

    Of M encoders a random source trains each in 1 / M of the steps, of two in half of them.
    """
    times = times_as_long(n_sites, scan)
    if how.steps is not None:
        return how.model_copy(update={"steps": max(1, round(times * how.steps))})
    return how.model_copy(update={"epochs": times * (how.epochs or DEFAULT_EPOCHS)})


def times_as_long(n_sites: int, scan: ScanConfig) -> float:
    """Return how many times as long as a pair's the training of a USAE over all sites is."""
    return max(1.0, n_sites / 2) if scan.updates == "encoder" else 1.0


def listed_depths(sites: Sequence[str]) -> dict[str, float]:
    """Return each site's place among those of its model, in (0, 1].

    >>> listed_depths(["a/1", "a/2", "b/1"])
    {'a/1': 0.5, 'a/2': 1.0, 'b/1': 1.0}
    """
    models = [site.partition("/")[0] for site in sites]
    places = [models[: i + 1].count(model) / models.count(model) for i, model in enumerate(models)]
    return dict(zip(sites, places, strict=True))


class _Scan:
    def __init__(
        self,
        buffer: ActivationBuffer,
        settings: ScanSettings,
        annotations: Sequence[Annotation],
        labels: np.ndarray | None,
        folder: Path | None,
        progress: Callable[[ScanProgress], None] | None,
    ) -> None:
        self.buffer, self.settings, self.annotations, self.labels = buffer, settings, annotations, labels
        self.folder, self._progress = folder, progress or (lambda _: None)
        self.split, self.sites = settings.scan.split, list(buffer.sites)
        self.pairs = pairs_between(self.sites)
        self.kept = KeptCells(folder / "cells.jsonl" if folder else None)
        self.seconds: dict[str, float] = {}
        self._of_buffer = json_sha256(buffer.identity)

    def do(self, usae: USAE | None, steps: int | None, depths: Mapping[str, float]) -> ScanReport:
        if not self.pairs:
            raise UsageError(
                f"a scan compares layers, and was given {len(self.sites)}: {', '.join(self.sites)}",
                hint="choose more layers: --depth, --every or --layers",
            )
        check_rows(self.buffer, self.split)
        probes = self.settings.probes
        similarity = self._timed("similarity", self._similarity) if probes.similarity_images else None
        linear = self._timed("linear", self._linear) if probes.linear else None
        joint, followed = None, []
        if "joint" in self.settings.scan.strategies and usae is not None:
            joint, followed = self._timed("codes", lambda: self._joint(usae))
        pairs = None
        if "pairs" in self.settings.scan.strategies:
            pairs = self._timed("pairs", self._trained_pairs)
        shape, how = self.settings.usae, self.settings.train
        epoch = self.buffer.steps_per_epoch("train", how.batch_size)
        taken = {}
        if joint:
            taken["joint"] = steps or joint_length(how, len(self.sites), self.settings.scan).n_steps(epoch)
        if pairs:
            taken["pairs"] = how.n_steps(epoch)
        return ScanReport(
            sites=tuple(self.sites),
            depths={site: depths[site] for site in self.sites},
            measured_on=self.split,
            n_rows=self.buffer.n_rows(self.split),
            n_rows_train=self.buffer.n_rows("train"),
            similarity=similarity,
            linear=linear,
            joint=joint,
            pairs=pairs,
            followed=tuple(followed),
            trained={"n_latents": shape.n_latents, "k": shape.k, "steps": taken, "batch_size": how.batch_size},
            seconds=self.seconds,
        )

    def _timed(self, part: str, do: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = do()
        self.seconds[part] = time.perf_counter() - started
        return found

    def _tell(self, part: str, done: int, total: int, unit: str, note: str = "") -> None:
        self._progress(ScanProgress(part, done, total, unit, note))

    def _similarity(self) -> Similarity:
        probes = self.settings.probes
        how: dict[str, Any] = {"split": self.split, "n_images": probes.similarity_images, "k": probes.neighbours}
        how |= {"nulls": probes.nulls, "seed": probes.seed}
        settings = how | {"buffer": self._of_buffer}
        between = set(self.pairs)
        within = [pair for pair in combinations(self.sites, 2) if pair not in between]
        every = [*self.pairs, *within, *((site, site) for site in self.sites)]
        known = {pair: self.kept.get("similarity", pair, settings) for pair in every}
        missing = [pair for pair in every if known[pair] is None]
        done = len(every) - len(missing)
        for alike in pair_similarities(self.buffer, missing, **how):
            known[alike.pair] = jsonable([alike.n_images, *alike[2:]])
            self.kept.put("similarity", alike.pair, settings, known[alike.pair])
            done += 1
            self._tell("similarity", done, len(every), "cells")
        matrices = [empty_matrix(self.sites) for _ in range(4)]
        n_images = 0
        for (a, b), kept in known.items():
            n_images, *values = kept or (0,)
            for matrix, value in zip(matrices, map(or_nan, values), strict=True):
                matrix[a][b] = matrix[b][a] = value
        return Similarity(n_images, max(1, min(probes.neighbours, n_images - 1)), probes.nulls, *matrices)

    def _linear(self) -> LinearReference | None:
        try:
            self.buffer.demand_all_rows()
        except StageError:
            warnings.warn(
                "the linear reference is left out: a ring has dropped the training rows that it would be fitted on",
                UsaeProbeWarning,
                stacklevel=2,
            )
            return None
        probes = self.settings.probes
        how: dict[str, Any] = {"split": self.split, "train_rows": probes.train_rows, "seed": probes.seed}
        settings = how | {"buffer": self._of_buffer}
        r2, penalty = empty_matrix(self.sites), empty_matrix(self.sites)
        n_train = n_eval = 0
        for at, source in enumerate(self.sites):
            targets = [b if a == source else a for a, b in self.pairs if source in (a, b)]
            cell = [source, *targets]
            found = self.kept.get("linear", cell, settings)
            if found is None:
                fitted = linear_reference(self.buffer, cell, pairs={(source, t) for t in targets}, **how)
                found = jsonable([fitted.r2[source], fitted.penalty[source], fitted.n_rows_train, fitted.n_rows_eval])
                self.kept.put("linear", cell, settings, found)
            for matrix, row in zip((r2, penalty), found, strict=False):
                matrix[source].update({target: or_nan(value) for target, value in row.items()})
            n_train, n_eval = found[2:]
            self._tell("linear", at + 1, len(self.sites), "layers", source)
        return LinearReference(r2, penalty, n_train, n_eval)

    def _joint(self, usae: USAE) -> tuple[CodeMatrices, list[Followed]]:
        settings = self._measured_by() | {"weights": weights_sha256(usae), "labels": [a.name for a in self.annotations]}
        found = self.kept.get("joint", self.sites, settings)
        if found is None:
            matrices, followed = scan_codes(
                usae,
                self.buffer,
                self.pairs,
                split=self.split,
                config=self.settings.probes,
                annotations=self.annotations,
                progress=lambda done, total: self._tell("codes", done, total, "rows"),
            )
            found = {"matrices": jsonable(matrices), "followed": [jsonable(one) for one in followed]}
            self.kept.put("joint", self.sites, settings, found)
        followed = [Followed(one[0], one[1], (one[2][0], one[2][1]), *one[3:]) for one in found["followed"]]
        return _matrices(found["matrices"]), followed

    def _trained_pairs(self) -> CodeMatrices:
        self.buffer.demand_all_rows()
        found = CodeMatrices.empty(self.sites)
        for at, pair in enumerate(self.pairs):
            settings = self._measured_by() | {
                "usae": self.settings.usae.model_dump(),
                "train": self.settings.train.model_dump(exclude={"log_every", "tensorboard", "workers", "device"}),
            }
            values = self.kept.get("pair", pair, settings)
            if values is None:
                values = jsonable(self._trained_pair(pair, at))
                self.kept.put("pair", pair, settings, values)
            found.update(_matrices(values))
            self._tell("pairs", at + 1, len(self.pairs), "pairs")
        return found

    def _trained_pair(self, pair: Pair, at: int) -> CodeMatrices:
        state = self.folder / f"pair-{file_stem(pair[0])}--{file_stem(pair[1])}.safetensors" if self.folder else None

        def follow(record: StepRecord) -> None:
            note = f"{pair[0]} and {pair[1]}: step {record.step:,} of {record.steps:,}"
            self._tell("pairs", at, len(self.pairs), "pairs", note)

        done = train(
            self.buffer,
            sites=list(pair),
            usae_config=self.settings.usae,
            train_config=self.settings.train.model_copy(update={"tensorboard": False}),
            progress=follow,
            resume=state,
            labels=self.labels,
        )
        matrices, _ = scan_codes(
            done.usae, self.buffer, [pair], split=self.split, config=self.settings.probes, follow=False
        )
        if state:
            state.unlink(missing_ok=True)
        return matrices

    def _measured_by(self) -> dict[str, Any]:
        idle = {"sites", "controls", "seeds", "fidelity_images", "fidelity_latents", "within", "split_cosine"}
        return {
            "buffer": self._of_buffer,
            "split": self.split,
            "probes": self.settings.probes.model_dump(exclude=idle | {"linear", "similarity_images", "neighbours"}),
        }


def _matrices(values: Sequence[Mapping[str, Mapping[str, float | None]]]) -> CodeMatrices:
    """Return matrices that were kept as JSON."""
    read: list[Matrix] = [{a: {b: or_nan(v) for b, v in row.items()} for a, row in matrix.items()} for matrix in values]
    return CodeMatrices(*read)


def weights_sha256(usae: USAE) -> str:
    """Hash everything that a USAE's codes depend on."""
    digest = hashlib.sha256(repr((usae.d_in, usae.n_latents, usae.k)).encode())
    for name, tensor in sorted(usae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
