"""Evaluation: one streaming pass over the held-out rows, one over training rows for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..buffer import ActivationBuffer, Rows
from ..config import ProbesConfig, settled
from ..errors import BufferIntegrityError, SiteError, nearest
from ..images import Annotation
from ..sites import model_of
from ..split import SplitName
from ..usae import USAE, ReconstructionSums
from .factors import FactorScores, Follows
from .firing import FiringCounts, image_begins
from .records import LatentRecord, PairRecord
from .report import UniversalityReport
from .universality import CATEGORIES, Classes, classify, split_latents

CHUNK_ROWS = 1024


def evaluate(
    usae: USAE,
    buffer: ActivationBuffer,
    *,
    annotations: Sequence[Annotation] = (),
    split: SplitName = "holdout",
    config: ProbesConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> UniversalityReport:
    """Measure what the sites of a USAE have in common, on the buffer's held-out rows.

    Where images have several rows, R², rates, entropy, φ and Jaccard are over all of them; `min_fires` counts images,
    and the test against chance takes one seeded row per image, because the rows of an image are not independent.

    Args:
        usae: a trained USAE.
        buffer: row-paired activations of (at least) its sites.
        annotations: what is known about the images that were harvested, as `annotations_of(source)` gives it; then
            every latent is compared with every value (see `FactorScores`), which keeps its fires in memory.
        split: the rows that are measured; choices are made on "validation", so that "holdout" is read once.
        config: thresholds as read from a config file; single ones by name as `settings`.
        progress: called with (rows done, rows in all).

    Raises:
        BufferIntegrityError: when the buffer lacks a site or has no rows of the split.
        SiteError: when `sites` names something the USAE does not have.
        UsageError: when the annotations are those of other images.
    """
    (config,) = settled((config or ProbesConfig(),), settings)
    class_sites = one_site_per_model(usae.sites, config.sites)
    _check(usae, buffer, split)
    n_eval, n_train = buffer.n_rows(split), min(buffer.n_rows("train"), config.train_rows)
    done = RowProgress(progress, n_eval + n_train)
    held_out, training = ReconstructionSums(usae), ReconstructionSums(usae)
    draw = None if _one_row_per_image(usae, buffer) else np.random.default_rng(config.seed)
    counts = FiringCounts(usae.sites, usae.n_latents, config.tau, draw)
    scores = FactorScores(class_sites, usae.n_latents, annotations)
    for rows in _whole_images(buffer, split, list(usae.sites)):
        codes = held_out.add(rows.values)
        counts.add(codes, rows.image_index)
        if annotations:
            scores.add(codes, rows.image_index)
        done.add(rows.n)
    for rows in _some_rows(buffer, "train", n_train, list(usae.sites)):
        training.add(rows.values)
        done.add(rows.n)
    return replace(_report(usae, config, class_sites, held_out, training, counts, scores), measured_on=split)


def one_site_per_model(sites: Sequence[str], asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the sites that the classes are about: those asked for, or the last listed of each model.

    Raises:
        SiteError: for a site the USAE does not have, two of one model, or none at all.
    """
    if asked is None:
        return tuple({model_of(site): site for site in sites}.values())
    if not asked:
        raise SiteError("probes.sites is empty", hint=f"leave it out, or choose from: {', '.join(sites)}")
    for site in asked:
        if site not in sites:
            raise SiteError(
                f"probes.sites names '{site}', which is not trained on",
                hint=f"{nearest(site, sites)} sites: {', '.join(sites)}".strip(),
            )
    models = [model_of(site) for site in asked]
    for model in models:
        if models.count(model) > 1:
            raise SiteError(
                f"probes.sites names model '{model}' twice: {', '.join(asked)}",
                hint="classes compare one site per model",
            )
    return tuple(asked)


class RowProgress:
    """Tells a callback how many rows of how many are done.

    Args:
        callback: called with (rows done, rows in all); may be None.
        total: rows in all.
    """

    def __init__(self, callback: Callable[[int, int], None] | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def add(self, rows: int) -> None:
        """Say that so many more rows are done."""
        self.done += rows
        if self.callback:
            self.callback(self.done, self.total)


def check_sites(usae: USAE, buffer: ActivationBuffer, sites: Sequence[str]) -> None:
    """Check that the buffer has rows of these sites as the USAE was trained on.

    Raises:
        BufferIntegrityError: naming the first site that it has not, or of another width.
    """
    for site in sites:
        if buffer.d_in.get(site) != usae.d_in[site]:
            found = f"d_in {buffer.d_in[site]}" if site in buffer.d_in else "no such site"
            raise BufferIntegrityError(
                f"the USAE was trained on '{site}' with d_in {usae.d_in[site]}, the buffer has {found}",
                hint="evaluate on the buffer it was trained on",
            )


def _check(usae: USAE, buffer: ActivationBuffer, split: SplitName) -> None:
    check_sites(usae, buffer, usae.sites)
    if (n := buffer.n_rows(split)) < 2:
        kind = "held-out" if split == "holdout" else split
        raise BufferIntegrityError(
            f"the buffer has {n} {kind} rows, evaluation needs at least 2",
            hint=f"set images.{split} above 0 and harvest again" if split != "train" else "harvest more images",
        )


def _one_row_per_image(usae: USAE, buffer: ActivationBuffer) -> bool:
    return all(buffer.specs[site].rows_per_image == 1 for site in usae.sites)


def _whole_images(buffer: ActivationBuffer, split: SplitName, sites: list[str]) -> Iterator[Rows]:
    """Yield the rows of a split in chunks that end where an image ends."""
    per_image = buffer.specs[sites[0]].rows_per_image
    size = max(1, CHUNK_ROWS // max(per_image, 1)) * max(per_image, 1)
    held: Rows | None = None
    for rows in buffer.chunks(split, size, sites):
        if per_image:
            yield rows
            continue
        joined = rows if held is None else _joined(held, rows)
        last = int(image_begins(joined.image_index)[-1])  # more rows of the last image may follow
        held = _part(joined, slice(last, None))
        if last:
            yield _part(joined, slice(last))
    if held is not None:
        yield held


def _part(rows: Rows, part: slice) -> Rows:
    values = {site: x[part] for site, x in rows.values.items()}
    return Rows(values, rows.image_index[part], rows.token_index[part])


def _joined(first: Rows, then: Rows) -> Rows:
    values = {site: np.concatenate([x, then.values[site]]) for site, x in first.values.items()}
    return Rows(values, *(np.concatenate(pair) for pair in zip(first[1:], then[1:], strict=True)))


def _some_rows(buffer: ActivationBuffer, split: SplitName, n: int, sites: list[str]) -> Iterator[Rows]:
    """Yield n rows spread evenly over the split, in chunks."""
    total = buffer.n_rows(split)
    chosen = np.linspace(0, total, n, endpoint=False).astype(np.int64)
    for start in range(0, n, CHUNK_ROWS):
        yield buffer.gather(split, chosen[start : start + CHUNK_ROWS], sites)


def _report(
    usae: USAE,
    config: ProbesConfig,
    class_sites: tuple[str, ...],
    held_out: ReconstructionSums,
    training: ReconstructionSums,
    counts: FiringCounts,
    scores: FactorScores,
) -> UniversalityReport:
    classes = classify(counts, class_sites, config)
    decoders = {site: usae.decoder(site).detach().cpu().numpy() for site in class_sites}
    split = split_latents(decoders, classes, class_sites, config.split_cosine)
    return UniversalityReport(
        sites=usae.sites,
        class_sites=class_sites,
        r2=held_out.r2(),
        r2_train=training.r2(),
        r2_global_mean=held_out.r2_global_mean(),
        counts={name: int((classes.category == name).sum()) for name in CATEGORIES},
        n_split=int(split.sum()),
        n_rows_train=training.n_rows,
        n_rows_eval=held_out.n_rows,
        latents=list(_records(usae, counts, classes, split, scores.follows(), class_sites)),
        factors=tuple(annotation.name for annotation in scores.annotations),
        n_values=scores.n_values,
        auroc=config.auroc,
    )


def _records(
    usae: USAE,
    counts: FiringCounts,
    classes: Classes,
    split: np.ndarray,
    follows: Sequence[Follows | None],
    class_sites: tuple[str, ...],
) -> Iterator[LatentRecord]:
    norms = dict(zip(usae.sites, usae.decoder_norms().detach().cpu().double().numpy(), strict=True))
    norm_sum = np.maximum(sum(norms.values()), 1e-12)
    mean = {site: counts.mean(site) for site in usae.sites}
    by_site: Mapping[str, Mapping[str, np.ndarray]] = {
        "fires": counts.fires,
        "rate": {site: counts.fires[site] / counts.n_rows for site in usae.sites},
        "mean": mean,
        "maximum": counts.maximum,
        "energy": {site: mean[site] * norms[site] for site in usae.sites},
        "decoder_norm": {site: norms[site] / norm_sum for site in usae.sites},
    }
    for k in range(usae.n_latents):
        yield LatentRecord(
            latent=k,
            category=classes.category[k].item(),
            split=bool(split[k]),
            fires_in=tuple(site for i, site in enumerate(class_sites) if classes.fires_in[i, k]),
            entropy=float(classes.entropy[k]),
            q=float(classes.q_all[k]),
            pairs={
                key: PairRecord(
                    **{name: column[k].item() for name, column in pair._asdict().items()}, q=float(classes.q[key][k])
                )
                for key, pair in classes.pairs.items()
            },
            **{name: {site: values[site][k].item() for site in usae.sites} for name, values in by_site.items()},
            follows=follows[k],
        )
