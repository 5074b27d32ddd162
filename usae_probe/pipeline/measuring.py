"""The evaluate stage: measures on held-out rows, fidelity in the live models, controls, and the files of it all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import UsaeProbeError, UsaeProbeWarning
from ..files import write_text
from ..harvesting import demand_same_models
from ..hooks import HookedModel
from ..images import Annotation, ImageSource, annotations_of
from ..probes import Fidelity, UniversalityReport, evaluate, fidelity, label_within
from ..report import figures
from ..report.universality_figures import universality_figures
from ..split import SplitName, spoken
from ..usae import USAE, read_history
from .outcomes import Progress
from .source import same_source

Attached = Callable[[ExitStack], list[HookedModel]]


def warn_of_rare_latents(
    config: RunConfig, split: SplitName | None, images: Callable[[SplitName], int], rows_per_image: int
) -> None:
    """Warn before any work when latents will be too rare to tell anything of them, `[probes] min_fires`.

    mean firing images of a latent ≤ images · min(1, rows_per_image · k / n_latents); `l1` does not use k.

    Args:
        config: of the run.
        split: that latents are looked for in; None where it does not matter how many there are.
        images: says how many a split has.
        rows_per_image: rows of each; 0 where they vary.
    """
    if split is None or config.usae.sparsity == "l1":
        return
    usae, least, n_images = config.usae, config.probes.min_fires, images(split)
    rows_per_image = max(1, rows_per_image)
    mean = n_images * min(1.0, rows_per_image * usae.k / usae.n_latents)
    if n_images and mean < least:
        rows = f" × {rows_per_image} rows" if rows_per_image > 1 else ""
        warnings.warn(
            f"a latent will fire in {mean:.1f} {spoken(split)} images in the mean ({n_images:,}{rows} × k = {usae.k} / "
            f"{usae.n_latents:,} latents), and of one that fires in fewer than probes.min_fires = {least} nothing can "
            f"be told: take more images, fewer latents, or a larger images.{split}",
            UsaeProbeWarning,
            stacklevel=3,
        )


def measure(
    config: RunConfig,
    folder: Path,
    usae: USAE,
    buffer: ActivationBuffer,
    *,
    attached: Attached,
    progress: Callable[[Progress], None],
) -> UniversalityReport:
    """Measure what a run's sites have in common, and write `metrics.json`, `latents.csv` and the figures.

    Args:
        config: of the run.
        folder: the run folder.
        usae: the trained USAE.
        buffer: the activations.
        attached: attaches to the run's models, to be closed with the stack.
        progress: called as it goes on.
    """
    source = same_source(config, buffer)
    annotations = annotations_of(source) if source else []
    within = label_within(annotations, config.probes.within)
    report = evaluate(
        usae,
        buffer,
        config=config.probes,
        annotations=annotations,
        progress=lambda done, total: progress(Progress("evaluate", done, total, "rows")),
    )
    if source and config.probes.fidelity_images:
        found = _fidelity(config, usae, buffer, source, within, report, attached, progress)
        report = replace(report, fidelity=found)
    if config.probes.controls:
        from .controls import ControlStage  # here: its cells are runs

        stage = ControlStage(config, folder, buffer, source, within, progress)
        report = replace(report, controls=stage.do(usae, report))
    write_text(folder / "metrics.json", report.to_json() + "\n")
    write_text(folder / "latents.csv", report.to_csv())
    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    universality_figures(report, pictures)
    figures.training_curves(list(read_history(folder / "history.jsonl")), pictures / "training.png")
    return report


def _fidelity(
    config: RunConfig,
    usae: USAE,
    buffer: ActivationBuffer,
    source: ImageSource,
    labels: Annotation | None,
    report: UniversalityReport,
    attached: Attached,
    progress: Callable[[Progress], None],
) -> Fidelity | None:
    """Splice reconstructions into the live models; None, with a warning, when these cannot be had any more."""
    probes = config.probes
    try:
        with ExitStack() as closing:
            models = attached(closing)
            demand_same_models(models, buffer)
            return fidelity(
                usae,
                models,
                buffer,
                source,
                sites=report.class_sites,
                latents=[record.latent for record in report.universal[: probes.fidelity_latents]],
                labels=labels,
                n_images=probes.fidelity_images,
                batch_size=config.images.batch_size,
                seed=probes.seed,
                progress=lambda done, total: progress(
                    Progress("evaluate", done, total, "batches", "fidelity in the live models")
                ),
            )
    except UsaeProbeError as error:
        warnings.warn(f"fidelity is left out: {error}", UsaeProbeWarning, stacklevel=2)
        return None
