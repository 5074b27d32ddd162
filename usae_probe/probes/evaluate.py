"""Evaluation: one streaming pass over the held-out rows, one over training rows for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..buffer import ActivationBuffer
from ..config import ProbesConfig, settled
from ..errors import UsageError, nearest
from ..images import Annotation
from ..split import SplitName
from ..usae import USAE, ReconstructionSums
from .factors import FactorScores, Follows
from .firing import Fires, FiringCounts
from .intervals import ImageGroups, Resamples
from .linear import EVAL_ROWS, LinearReference, linear_reference
from .nulls import KeptFires, NullCounts
from .reconstruction import HeldOutSums
from .records import LatentRecord, PairRecord
from .report import LabelFacts, UniversalityReport
from .rows import RowProgress, check_rows, check_sites, one_site_per_model, rows_per_image, some_rows, whole_images
from .similarity import Similarity, similarity
from .universality import CATEGORIES, Classes, classify, split_latents


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
    and the test against chance takes one seeded row per image, because the rows of an image are not independent; what
    co-fires must then do so within places, too. Everything stands beside what images paired at random give.

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
        UsageError: when the annotations are those of other images, or `within` names none of them.
    """
    (config,) = settled((config or ProbesConfig(),), settings)
    class_sites = one_site_per_model(usae.sites, config.sites)
    within = label_within(annotations, config.within)
    check_sites(usae, buffer, usae.sites)
    check_rows(buffer, split)
    measuring = _Measuring(usae, buffer, class_sites, annotations, split, config)
    n_train = min(buffer.n_rows("train"), config.train_rows)
    several = len(usae.sites) > 1
    with_linear = several and config.linear and buffer.n_images("train") > 1
    n_linear = len(usae.sites) * (n_train + min(buffer.n_rows(split), EVAL_ROWS)) if with_linear else 0
    done = RowProgress(progress, buffer.n_rows(split) + n_train + n_linear)
    for rows in whole_images(buffer, split, usae.sites):
        measuring.add(rows.values, rows.image_index, rows.token_index)
        done.add(rows.n)
    training = ReconstructionSums(usae)
    for rows in some_rows(buffer, "train", n_train, usae.sites):
        training.add(rows.values)
        done.add(rows.n)
    linear, alike = None, None
    if with_linear:
        before = done.done
        linear = linear_reference(
            buffer,
            usae.sites,
            split=split,
            train_rows=config.train_rows,
            seed=config.seed,
            progress=lambda now, _: done.add(before + now - done.done),
        )
    if several and config.similarity_images:
        alike = similarity(
            buffer,
            usae.sites,
            split=split,
            n_images=config.similarity_images,
            k=config.neighbours,
            nulls=config.nulls,
            seed=config.seed,
        )
    return measuring.report(training, linear, alike, within)


def label_within(annotations: Sequence[Annotation], asked: str | None) -> Annotation | None:
    """Return the label within which images are exchanged: the one asked for, or the first; None where there is none.

    Raises:
        UsageError: when no label has the name that is asked for.
    """
    by_name = {one.name: one for one in annotations}
    if asked is None:
        return next(iter(annotations), None)
    if annotations and asked not in by_name:
        raise UsageError(
            f"probes.within names '{asked}', which is no label of the images",
            hint=f"{nearest(asked, by_name)} labels: {', '.join(by_name)}".strip(),
        )
    return by_name.get(asked)


class _Measuring:
    """What is gathered in one pass over held-out rows."""

    def __init__(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        class_sites: tuple[str, ...],
        annotations: Sequence[Annotation],
        split: SplitName,
        config: ProbesConfig,
    ) -> None:
        self.usae, self.class_sites, self.split, self.config = usae, class_sites, split, config
        self.annotations = annotations
        self.places = rows_per_image(buffer, usae.sites)
        self.groups = ImageGroups(buffer.n_images(split), config.seed)
        self.resamples = Resamples(self.groups.n, config.bootstrap, config.seed) if config.bootstrap else None
        self.sums = HeldOutSums(usae, self.groups.n)
        self.counts = FiringCounts(
            usae.sites,
            usae.n_latents,
            config.tau,
            None if self.places == 1 else np.random.default_rng(config.seed),
            pairs=list(combinations(class_sites, 2)),
            places=self.places,
            groups=self.groups.n if self.resamples else 0,
        )
        self.kept = KeptFires(class_sites, usae.n_latents)
        self.scores = FactorScores(class_sites, usae.n_latents, annotations)

    def add(self, values: Mapping[str, np.ndarray], image_index: np.ndarray, token_index: np.ndarray) -> None:
        """Measure the rows of whole images."""
        n, group = len(image_index), self.groups.of(image_index)
        codes = self.sums.add_rows(values, group)
        fires = {site: Fires.of(codes[site], self.config.tau) for site in self.usae.sites}
        self.counts.add_fires(fires, n, image_index, token_index, group)
        self.kept.add(fires, n, image_index, token_index)
        if self.annotations:
            self.scores.add(codes, image_index)

    def report(
        self,
        training: ReconstructionSums,
        linear: LinearReference | None,
        alike: Similarity | None,
        within: Annotation | None,
    ) -> UniversalityReport:
        """Put everything together."""
        usae, config, sites = self.usae, self.config, self.class_sites
        classes = classify(self.counts, sites, config, self.resamples)
        decoders = {site: usae.decoder(site).detach().cpu().numpy() for site in sites}
        split = split_latents(decoders, classes, sites, config.split_cosine)
        return UniversalityReport(
            sites=usae.sites,
            class_sites=sites,
            r2=self.sums.r2(),
            r2_train=training.r2(),
            r2_global_mean=self.sums.r2_global_mean(),
            counts={name: int((classes.category == name).sum()) for name in CATEGORIES},
            n_split=int(split.sum()),
            n_rows_train=training.n_rows,
            n_rows_eval=self.sums.n_rows,
            latents=list(self._records(classes, split)),
            factors=tuple(annotation.name for annotation in self.annotations),
            n_values=self.scores.n_values,
            auroc=config.auroc,
            measured_on=self.split,
            thresholds={"entropy": config.entropy, "phi": config.phi, "q": config.q},
            r2_interval=self.sums.intervals(self.resamples) if self.resamples else None,
            r2_quantiles=self.sums.quantiles(),
            linear=linear,
            similarity=alike,
            nulls=tuple(self._nulls(within)),
            labels=self._label_facts(classes),
        )

    def _nulls(self, within: Annotation | None) -> Iterator[NullCounts]:
        for labels in (None, within) if within else (None,):
            if found := self.kept.nulls(self.config, self.places, labels=labels):
                yield found

    def _label_facts(self, classes: Classes) -> LabelFacts | None:
        if not self.scores.n_values:
            return None
        universal = np.flatnonzero(classes.category == "universal").tolist()
        bound = self.scores.bound(self.config.nulls, self.config.seed) if self.config.nulls else float("nan")
        return LabelFacts(bound, self.config.nulls, *self.scores.agreement(universal))

    def _records(self, classes: Classes, split: np.ndarray) -> Iterator[LatentRecord]:
        usae, counts = self.usae, self.counts
        follows: Sequence[Follows | None] = self.scores.follows()
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
                positional=bool(classes.positional[k]),
                fires_in=tuple(site for i, site in enumerate(self.class_sites) if classes.fires_in[i, k]),
                entropy=float(classes.entropy[k]),
                q=float(classes.q_all[k]),
                pairs={
                    key: PairRecord(
                        **{name: column[k].item() for name, column in pair._asdict().items()},
                        q=float(classes.q[key][k]),
                    )
                    for key, pair in classes.pairs.items()
                },
                **{name: {site: values[site][k].item() for site in usae.sites} for name, values in by_site.items()},
                follows=follows[k],
            )
