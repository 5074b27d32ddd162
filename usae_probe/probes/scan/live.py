"""`scan`: from live models and images to every layer against every layer, in one harvest and one training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...buffer import ActivationBuffer
from ...config import BufferConfig, ImagesConfig, ProbesConfig, ScanConfig, TrainConfig, UsaeConfig, settled
from ...errors import ConfigError, NotBuiltError
from ...files import json_sha256, write_json
from ...harvesting import HarvestProgress, harvest
from ...hooks import HookedModel
from ...images import ImageSource, annotations_of, open_source
from ...usae import USAE, StepRecord, train
from ..evaluate import label_within
from .choosing import choose_sites, depths_of, looking_at
from .measure import ScanProgress, ScanSettings, joint_length, scan_buffer
from .report import ScanReport

_AMBIGUOUS = ("seed", "batch_size", "sites")


def scan(
    models: Sequence[HookedModel],
    images: Any,
    *,
    out: str | Path | None = None,
    scan_config: ScanConfig | None = None,
    images_config: ImagesConfig | None = None,
    buffer_config: BufferConfig | None = None,
    usae_config: UsaeConfig | None = None,
    train_config: TrainConfig | None = None,
    probes_config: ProbesConfig | None = None,
    progress: Callable[[ScanProgress], None] | None = None,
    **settings: Any,
) -> ScanReport:
    """Compare every layer of each model with every layer of the others.

    One harvest pass gives the rows of all layers; one USAE over all of them gives cross-R² and universal latents of
    every pair (`strategies=["joint"]`); debiased CKA, mutual k-NN and ridge regression stand beside, and every cell
    has its value for images paired at random. Measured on validation rows, because a scan is there to choose layers
    by; `split="holdout"` once, at the end.

    Args:
        models: hooked models with different names; their own sites are looked at with `depth=0` alone, and stay.
        images: as for `harvest`.
        out: a folder for activations, USAE and finished cells: called again, an interrupted scan goes on in it.
            Default: a temporary one, which is removed.
        scan_config, images_config, buffer_config, usae_config, train_config, probes_config: settings as read from a
            config file.
        progress: called as it goes on.
        settings: or single settings by the config's names: `depth`, `every`, `layers`, `policy`, `strategies`,
            `limit`, `n_latents`, `k`, `steps`, …

    Raises:
        UsageError: for a model in which no blocks are found, unknown layers or settings.
        NotBuiltError: for what needs a config file (`usae-probe scan`): a budget, a floor, a ring.

    Example:
        `grid = up.scan([resnet, vit], "photos/", depth=8, n_latents=2042, k=64, steps=2000)`
    """
    for key in _AMBIGUOUS:
        if key in settings:
            raise ConfigError(
                f"'{key}' is a setting of several tables", hint=f"give train_config=TrainConfig({key}=…), say"
            )
    given = (
        scan_config or ScanConfig(),
        images_config or ImagesConfig(source=""),
        buffer_config or BufferConfig(),
        usae_config or UsaeConfig(),
        train_config or TrainConfig(),
        probes_config or ProbesConfig(),
    )
    how, pictures, store, shape, training, probes = settled(given, settings)
    if how.budget or how.floor or store.trains_along:
        what = "budget" if how.budget else "floor" if how.floor else "training along with the harvest"
        raise NotBuiltError(f"up.scan() of live models has no {what}", hint="`usae-probe scan CONFIG.toml` has")
    source = images if isinstance(images, ImageSource) else open_source(images, options=pictures.options)
    sites = choose_sites(models, how)
    tell = progress or (lambda _: None)

    def harvested(now: HarvestProgress) -> None:
        tell(ScanProgress("harvest", now.done, now.total, "images"))

    with ExitStack() as closing:
        folder = Path(out) if out is not None else Path(closing.enter_context(tempfile.TemporaryDirectory()))
        with looking_at(models, sites):
            buffer = harvest(
                models,
                source,
                folder / "buffer",
                images_config=pictures,
                buffer_config=store,
                progress=harvested,
            )
        annotations = annotations_of(source)
        within = label_within(annotations, probes.within)
        labels = None if within is None or training.pairing != "label" else within.values
        usae = None
        if "joint" in how.strategies:
            longer = joint_length(training, len(buffer.sites), how)
            usae = _trained(folder, buffer, shape, longer, labels, tell)
        return scan_buffer(
            buffer,
            usae,
            ScanSettings(how, shape, training, probes),
            depths=depths_of(models, sites),
            annotations=annotations,
            labels=labels,
            folder=folder,
            progress=tell,
        )


def _trained(
    folder: Path,
    buffer: ActivationBuffer,
    shape: UsaeConfig,
    how: TrainConfig,
    labels: Any,
    tell: Callable[[ScanProgress], None],
) -> USAE:
    """Train the USAE over all sites, or load it where this very training is done."""
    path, done = folder / "usae.safetensors", folder / "trained.json"
    key = json_sha256({"buffer": buffer.identity, "usae": shape.model_dump(), "train": how.model_dump()})
    if path.exists() and done.exists() and key in done.read_text(encoding="utf-8"):
        return USAE.load(path, kernel=how.kernel)

    def follow(record: StepRecord) -> None:
        tell(ScanProgress("train", record.step, record.steps, "steps", f"loss {record.loss:.3f}"))

    state = folder / "training-state.safetensors"
    trained = train(buffer, usae_config=shape, train_config=how, progress=follow, resume=state, labels=labels)
    trained.usae.save(path)
    write_json(done, {"of": key})
    state.unlink(missing_ok=True)
    return trained.usae
