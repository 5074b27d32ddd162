"""Fidelity: how much of a live model's output survives a reconstruction in the place of a layer's activation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from ..buffer import ActivationBuffer
from ..errors import BufferIntegrityError, ImageError, UsageError
from ..hooks import HookedModel
from ..images import Annotation, ImageSource, LoadedImages, iter_batches
from ..shapes import RowMatrix
from ..split import SplitName
from ..usae import USAE, Matrix
from .ablation import Ablation, Fires, LatentFidelity
from .heads import Effect, HeadKind, PerImage, Reading
from .records import jsonable
from .rows import CHUNK_ROWS
from .splicing import LiveSite, Probing, drawn, images_of, live_sites

_GUESSED_RATE = 0.1
"""Share of images in which a latent fires, before that is known; for the progress alone."""


@dataclass(frozen=True)
class Fidelity:
    """What is recovered of live models' outputs; matrices are {source site: {target site: number}}.

    What is not known is NaN: `kl` and `top1` without logits, `cosine` with a head, shares whose denominator is small.

    Attributes:
        n_images: images behind it, of the split `measured_on`.
        head: {site: where its model's logits come from}; `effect` what differences are measured by.
        kl: KL(clean ‖ spliced) in nats, mean over images; `share_recovered` = 1 − KL / KL_mean, unclipped.
        top1: share of images that keep the clean argmax; `top1_recovered` = (a − a_mean) / (1 − a_mean), unclipped.
        cosine: of clean and spliced final features, of models without a head.
        kl_mean, top1_mean, cosine_mean: {target: the same with the site's mean training row in the place of its rows}.
        probe_accuracy: {site: share of the images whose label the probe finds}, where there is a probe.
        latents: what ablating each latent does.
    """

    n_images: int
    head: dict[str, HeadKind]
    effect: dict[str, Effect]
    kl: Matrix
    share_recovered: Matrix
    top1: Matrix
    top1_recovered: Matrix
    cosine: Matrix
    kl_mean: dict[str, float]
    top1_mean: dict[str, float]
    cosine_mean: dict[str, float]
    probe_accuracy: dict[str, float]
    latents: list[LatentFidelity]
    measured_on: SplitName = "holdout"

    @property
    def medians(self) -> dict[str, float]:
        """Medians of the correlations, over the latents that have one and its null, if it has any; NaN without."""
        found: dict[str, float] = {}
        for names in (("correlation", "null_correlation"), ("spearman", "null_spearman"), ("both_firing",)):
            rows = [[getattr(record, name) for name in names] for record in self.latents]
            known = [row for row in rows if all(map(math.isfinite, row))]
            middle = np.median(known, axis=0).tolist() if known else [math.nan] * len(names)
            found |= dict(zip(names, middle, strict=True))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; what is not a number there is null."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {"latents": [record._asdict() for record in self.latents], "medians": self.medians}
        return {name: jsonable(value) for name, value in content.items()}


@torch.no_grad()
def fidelity(
    usae: USAE,
    models: Sequence[HookedModel],
    buffer: ActivationBuffer,
    source: ImageSource,
    *,
    sites: Sequence[str],
    latents: Sequence[int] = (),
    labels: Annotation | None = None,
    split: SplitName = "holdout",
    n_images: int = 256,
    probe_images: int = 2048,
    batch_size: int = 32,
    least: float = 0.02,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Measure how much of live models' outputs a USAE's reconstructions recover.

    Model j runs on images with its site's rows replaced by x̂_j(z_i), for every source i and target j; with p, q the
    softmax of its clean and its spliced logits

        share recovered = 1 − E KL(p ‖ q) / E KL(p ‖ q_mean),   top-1 recovered = (a − a_mean) / (1 − a_mean),

    where q_mean has the mean training row in their place and a is the share of images with the clean argmax. What a
    policy leaves out (other tokens, the spread about a mean, detail finer than the common grid) stays in both.

    Ablating latent k takes z_k W_dec,k from the site's rows where it fires; what the USAE does not explain stays. Its
    effect on an image is KL(p ‖ q), or 1 − cosine of final features without logits. The null of its correlation
    between sites A and B has in B a latent drawn from the ten live ones nearest to k in energy E|z| ‖W_dec‖ there.

    Args:
        usae: a trained USAE.
        models: hooked models, those of the sites among them.
        buffer: which images were harvested, and for what.
        source: those images.
        sites: the sites of the matrix, one per model.
        latents: which ones are ablated.
        labels: of the source's images; models without a head then get a linear probe, fitted on training images.
        split: the images that are measured.
        n_images, probe_images: images measured and for the probe, at most; drawn by seed.
        batch_size: images per forward pass.
        least: denominators (KL_mean, 1 − a_mean) below this give no share.
        seed: of all draws.
        progress: called with (forward batches done, in all); how many in all is at first an estimate.

    Raises:
        SiteError: for an unknown site, or sites whose rows do not pair up.
        UsageError: when a site's model is not given, for a latent out of range, or images or labels of another source.
        BufferIntegrityError: when the buffer has no images of the split.
        ImageError: when none of them can be decoded.
        NonFiniteError: when an output is not finite.
    """
    if min(n_images, batch_size) < 1:
        raise UsageError(f"n_images={n_images} and batch_size={batch_size} must be at least 1")
    live = live_sites(usae, models, sites)
    asked = [int(latent) for latent in dict.fromkeys(latents)]
    usae.check_latents(asked)
    chosen = drawn(images_of(buffer, source, split), n_images, (seed, 0))
    if not len(chosen):
        raise BufferIntegrityError(f"the buffer has no images of '{split}'", hint=f"set images.{split} above 0")
    steps = _Steps(progress, len(asked) * len(live) * int(len(chosen) * _GUESSED_RATE / batch_size + 1))
    table = _Table(usae, live, chosen, batch_size, steps)
    probing = None
    if labels is not None and any(not one.head.own for one in live):
        probing = Probing([one for one in live if not one.head.own], buffer, source, labels, probe_images, seed)
        steps.plan(probing.n_batches(batch_size))
        for _ in probing.fit(batch_size):
            steps.add(1)
    table.fill(source, split)
    ablation = Ablation(table.fires, table.clean, table.images, asked, batch_size=batch_size, seed=seed)
    steps.settle(ablation.n_batches)
    for _ in ablation.run(source):
        steps.add(1)
    accuracy = probing.accuracy(table.images, table.clean) if probing else {}
    return table.result(least, split, ablation.records(), accuracy)


class _Steps:
    """Tells a callback how many forward batches of how many are done.

    Args:
        callback: called with both; may be None.
        guess: of the batches that nobody has planned.
    """

    def __init__(self, callback: Callable[[int, int], None] | None, guess: int) -> None:
        self.callback, self.done, self.planned, self.guess = callback, 0, 0, guess

    def plan(self, batches: int) -> None:
        self.planned += batches

    def settle(self, batches: int) -> None:
        """Put the number in the place of the guess."""
        self.planned, self.guess = self.planned + batches, 0
        self.add(0)

    def add(self, batches: int) -> None:
        self.done += batches
        if self.callback:
            self.callback(self.done, self.planned + self.guess)


class _Table:
    """The models' outputs, as they are and with every reconstruction in the place of their sites' rows.

    Attributes:
        images: the images that were decoded, in order.
        fires: of every site, on these images.
        clean: {site: its model's output as it is}.
    """

    def __init__(
        self, usae: USAE, live: Sequence[LiveSite], chosen: np.ndarray, batch_size: int, steps: _Steps
    ) -> None:
        self.usae, self.live, self.chosen, self.batch_size, self.steps = usae, live, chosen, batch_size, steps
        self.images: list[int] = []
        self.fires = [Fires(usae, one) for one in live]
        self.clean: dict[str, Reading] = {}
        self._found: dict[tuple[str | None, str, str], list[PerImage]] = defaultdict(list)
        self._passes = len(live) * (2 + len(live))  # each model as it is, with the mean, with every site's x̂
        steps.plan(self._passes * -(-len(chosen) // batch_size))

    def fill(self, source: ImageSource, split: SplitName) -> None:
        """Run the models.

        Raises:
            ImageError: when no image can be decoded.
        """
        clean: dict[str, list[Reading]] = defaultdict(list)
        reason = ""
        for batch in iter_batches(source, self.chosen, self.batch_size):
            reason = reason or next((miss.reason for miss in batch.skipped), "")
            if batch.pictures:
                for site, reading in self._run(batch).items():
                    clean[site].append(reading)
                self.images += batch.indices.tolist()
            self.steps.add(self._passes)
        if not self.images:
            raise ImageError(f"none of {len(self.chosen)} images of '{split}' could be decoded", hint=reason)
        self.clean = {site: Reading.joined(parts) for site, parts in clean.items()}

    def result(
        self, least: float, split: SplitName, latents: list[LatentFidelity], probe_accuracy: dict[str, float]
    ) -> Fidelity:
        keys = [one.key for one in self.live]

        def matrix(measure: str) -> Matrix:
            return {source: {target: self._mean(source, target, measure) for target in keys} for source in keys}

        def ablated(measure: str) -> dict[str, float]:
            return {target: self._mean(None, target, measure) for target in keys}

        kl, top1, kl_mean, top1_mean = matrix("kl"), matrix("top1"), ablated("kl"), ablated("top1")
        return Fidelity(
            n_images=len(self.images),
            head={one.key: one.head.kind for one in self.live},
            effect={one.key: one.head.effect for one in self.live},
            kl=kl,
            share_recovered=_shares(kl, kl_mean, 0.0, least),
            top1=top1,
            top1_recovered=_shares(top1, top1_mean, 1.0, least),
            cosine=matrix("cosine"),
            kl_mean=kl_mean,
            top1_mean=top1_mean,
            cosine_mean=ablated("cosine"),
            probe_accuracy=probe_accuracy,
            latents=latents,
            measured_on=split,
        )

    def _run(self, batch: LoadedImages) -> dict[str, Reading]:
        inputs = {one.key: one.model.preprocess(batch.pictures) for one in self.live}
        clean, codes = {}, {}
        for one, fires in zip(self.live, self.fires, strict=True):
            rows, clean[one.key] = one.clean(inputs[one.key])
            codes[one.key] = [self.usae.encode(part, one.key) for part in torch.split(rows, CHUNK_ROWS)]
            fires.add(codes[one.key], len(batch.pictures))
        for target in self.live:
            news: dict[str | None, Callable[[RowMatrix], RowMatrix]] = {None: target.mean}
            for source, parts in codes.items():
                news[source] = partial(_instead, torch.cat([self.usae.decode(part, target.key) for part in parts]))
            for name, new in news.items():
                reading = target.replaced(inputs[target.key], new, f"x̂ from '{name}'" if name else "the mean")
                for measure, values in clean[target.key].compared(reading).items():
                    self._found[name, target.key, measure].append(values)
        return clean

    def _mean(self, source: str | None, target: str, measure: str) -> float:
        """Return the mean over the images; source None is the mean ablation; NaN where it was not measured."""
        values = self._found.get((source, target, measure))
        return float(np.concatenate(values).mean()) if values else math.nan


def _instead(x_hat: RowMatrix, _rows: RowMatrix) -> RowMatrix:
    return x_hat


def _shares(found: Matrix, at_mean: dict[str, float], best: float, least: float) -> Matrix:
    """Return (found − at_mean) / (best − at_mean) by target; NaN where the denominator is small, or unknown."""
    return {
        source: {
            target: (value - at_mean[target]) / (best - at_mean[target])
            if abs(best - at_mean[target]) >= least
            else math.nan
            for target, value in row.items()
        }
        for source, row in found.items()
    }
