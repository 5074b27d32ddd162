"""A run's USAE for other people: encoder and decoder of its sites in formats that tools read, and a model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import StageError, UsageError
from ..files import read_json, write_text
from ..report.model_card import model_card
from ..report.summary import network_name
from ..sites import Site, file_stem, model_of
from ..usae import export_sae
from ..usae.sharing import architecture
from .about import about_run
from .record import RunRecord
from .run import Run

CARD = "README.md"


class Exported(NamedTuple):
    """What was written.

    Attributes:
        folder: where.
        sites: of every site `site`, `d_in`, `architecture`, `format` and `file`, from the folder.
        files: all of them, the card last.
        measured: whether the card has measures.
    """

    folder: Path
    sites: list[dict[str, Any]]
    files: list[Path]
    measured: bool


def export_run(
    run_dir: Path,
    to: Path | None = None,
    *,
    sites: Sequence[str] = (),
    format: str = "saelens",
    force: bool = False,
) -> Exported:
    """Write encoders and decoders of a run's sites, and a model card with its measures and controls.

    Args:
        run_dir: a run folder whose training is done.
        to: where to; default: `export/` in it.
        sites: which ones; default: all.
        format: `saelens` (a folder per site) or `safetensors` (a file per site).
        force: replace files that exist.

    Raises:
        UsageError: when the folder holds no run, or files are there already.
        StageError: when it is not trained.
        SiteError: for a site that it does not have.
    """
    record = RunRecord(run_dir)
    config = record.config()
    if not record.finished("train"):
        raise StageError(
            f"'{run_dir}' has no finished train: there is no USAE to export", hint="usae-probe run does all stages"
        )
    run = Run(config, run_dir)
    usae, folder = run.usae(), run_dir / "export" if to is None else to
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file, a folder was expected", hint="give another place for --to")
    wanted = list(dict.fromkeys(sites)) or list(usae.sites)
    for site in wanted:
        usae.site_index(site)
        Site.parse(site)  # it becomes the name of a file
    if (folder / CARD).exists() and not force:
        raise UsageError(
            f"'{folder / CARD}' is there already", hint="give another place (--to), or --force to replace it"
        )
    metrics = read_json(run_dir / "metrics.json") if run.is_done("evaluate") else None
    overview = run.overview(metrics or {"sites": list(usae.sites)}, None)
    described, files = [], list[Path]()
    with _all_or_nothing(files, keep=force):
        for site in wanted:
            name = file_stem(site) if format == "saelens" else f"{file_stem(site)}.safetensors"
            model = config.models[model_of(site)]
            about = {
                "model_name": network_name(model.name),
                "adapter": model.adapter,
                "dataset_path": Path(config.images.source).name,
            }
            files += export_sae(usae, site, folder / name, format=format, about=about, force=force)
            described.append({"site": site, "d_in": usae.d_in[site], "architecture": architecture(usae, site)})
            described[-1] |= {"format": format, "file": name}
        facts = list(about_run(record.data, overview, metrics))
        write_text(folder / CARD, model_card(run_dir.resolve().name, overview, facts, described, metrics))
    return Exported(folder, described, [*files, folder / CARD], metrics is not None)


@contextmanager
def _all_or_nothing(files: list[Path], *, keep: bool) -> Iterator[None]:
    """Remove the files again when not all can be written, unless there may have been others in their places."""
    try:
        yield
    except BaseException:
        for path in () if keep else files:
            path.unlink(missing_ok=True)
        raise
