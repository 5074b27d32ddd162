"""What a live model loses when one latent is taken out of its activation, and whether two models lose it together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..images import ImageSource, iter_batches
from ..shapes import RowMatrix
from ..usae import USAE, Codes
from .heads import PerImage, Reading
from .rows import CHUNK_ROWS
from .splicing import LiveSite

N_NEAREST = 10
"""Live latents nearest in energy, of which one is drawn for the null."""
LEAST_BOTH = 8
"""Images in which both sites must fire for a correlation over them."""
_CONSTANT = 1e-10
"""Effects that differ by less over the images are rounding."""

Nulls = Mapping[tuple[str, int], int]
"""{(site, latent): another latent, of about its energy there}."""


class LatentFidelity(NamedTuple):
    """What ablating one latent does to the models' outputs.

    Attributes:
        latent: its number.
        correlation: Pearson's, over images, of its effects in two sites; mean over the pairs of sites where both vary.
        null_correlation: the same with, in the second site, a random latent of about the same energy there.
        spearman, null_spearman: the same with Spearman's.
        both_firing: Pearson's over the images in which both fire, `LEAST_BOTH` or more: that they fire on the same
            images, which alone correlates their effects, has no part in it, so that unrelated effects have 0.
        n_firing: {site: images in which it fires}.
        effect: {site: its effect, mean over all images}; 0 for images in which it does not fire.
    """

    latent: int
    correlation: float
    null_correlation: float
    spearman: float
    null_spearman: float
    both_firing: float
    n_firing: dict[str, int]
    effect: dict[str, float]


class Fires:
    """Which images fire which latents of one site, with what energy; memory O(fires)."""

    def __init__(self, usae: USAE, site: LiveSite) -> None:
        self.usae, self.site, self.n_images = usae, site, 0
        self._z_sum = np.zeros(usae.n_latents)
        self._keys: list[np.ndarray] = []

    def add(self, codes: Sequence[Codes], n_images: int) -> None:
        """Add the codes of the rows of further images."""
        n, per_image, row = self.usae.n_latents, self.site.rows_per_image, 0
        for values, indices in ((part.values.cpu().numpy(), part.indices.cpu().numpy()) for part in codes):
            image = self.n_images + np.arange(row, row + len(values)) // per_image
            self._z_sum += np.bincount(indices.ravel(), weights=values.ravel(), minlength=n)
            self._keys.append(np.unique((image[:, None] * n + indices)[values > 0]))
            row += len(values)
        self.n_images += n_images

    def images(self) -> dict[int, list[int]]:
        """Return {latent: places of the images that fire it, ascending}, of the latents that fire."""
        image, latent = np.divmod(np.unique(np.concatenate(self._keys)), self.usae.n_latents)
        found: dict[int, list[int]] = defaultdict(list)
        for k, i in zip(latent.tolist(), image.tolist(), strict=True):
            found[k].append(i)
        return dict(found)

    def energy(self) -> np.ndarray:
        """Return E|z_k| ‖W_dec,k‖ over the rows, [n_latents]."""
        norms = self.usae.decoder(self.site.key).norm(dim=1).cpu().double().numpy()
        energy: np.ndarray = self._z_sum / (self.n_images * self.site.rows_per_image) * norms
        return energy


class Ablation:
    """Effects of ablating latents, image by image; a model runs only on images in which a latent fires.

    Args:
        fires: of every site.
        clean: the sites' models' outputs as they are, for all images.
        images: numbers of those images in the source, in that order.
        latents: which ones.
        batch_size: images per forward pass.
        seed: of the latents for the null.

    Attributes:
        effects: {(site, latent): [n_images]}, complete once `run` is.
        nulls: for every site but the first, what stands for each latent that fires there.
    """

    def __init__(
        self,
        fires: Sequence[Fires],
        clean: Mapping[str, Reading],
        images: Sequence[int],
        latents: Sequence[int],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.clean, self.images, self.latents, self.batch_size = clean, images, latents, batch_size
        self.usae, self.live = fires[0].usae, [one.site for one in fires]
        self.firing = {one.site.key: one.images() for one in fires}
        self.nulls = draw_nulls({one.site.key: one.energy() for one in fires}, latents, seed)
        self.effects: dict[tuple[str, int], PerImage] = {}
        self._wanted: dict[str, dict[int, list[int]]] = {site: defaultdict(list) for site in self.firing}
        drawn = [(site, null) for (site, _), null in self.nulls.items()]
        for site, latent in dict.fromkeys([*((site, k) for site in self.firing for k in latents), *drawn]):
            self.effects[site, latent] = np.zeros(len(images))
            for image in self.firing[site].get(latent, ()):
                self._wanted[site][image].append(latent)

    @property
    def n_batches(self) -> int:
        """Forward batches that `run` takes."""
        pairs = (sum(map(len, wanted.values())) for wanted in self._wanted.values())
        return sum(-(-n // self.batch_size) for n in pairs)

    def run(self, source: ImageSource) -> Iterator[None]:
        """Run the models, on batches of (image, latent); yields after each."""
        if not self.n_batches:
            return
        waiting: dict[str, list[tuple[int, int, Tensor]]] = defaultdict(list)
        place = {image: i for i, image in enumerate(self.images)}
        for batch in iter_batches(source, self.images, self.batch_size):
            places = [place[image] for image in batch.indices.tolist()]
            for one in self.live:
                wanted, queue = self._wanted[one.key], waiting[one.key]
                if any(i in wanted for i in places):
                    inputs = one.model.preprocess(batch.pictures)
                    queue += [(i, k, x) for i, x in zip(places, inputs, strict=True) for k in wanted.get(i, ())]
                while len(queue) >= self.batch_size:
                    self._ablate(one, queue[: self.batch_size])
                    del queue[: self.batch_size]
                    yield
        for one in self.live:
            if waiting[one.key]:
                self._ablate(one, waiting[one.key])
                yield

    def records(self) -> list[LatentFidelity]:
        """Return what was found, a record per latent."""
        return [self._record(latent) for latent in self.latents]

    def _ablate(self, one: LiveSite, pairs: Sequence[tuple[int, int, Tensor]]) -> None:
        images, latents = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        per_row = torch.tensor(latents).repeat_interleave(one.rows_per_image)
        without = partial(without_latent, self.usae, one.key, per_row)
        reading = one.replaced(torch.stack([pair[2] for pair in pairs]), without, "its rows without one latent")
        effects = self.clean[one.key].at(images).effect(reading)
        for image, latent, effect in zip(images, latents, effects.tolist(), strict=True):
            self.effects[one.key, latent][image] = effect

    def _record(self, latent: int) -> LatentFidelity:
        own = {one.key: self.effects[one.key, latent] for one in self.live}
        found = []
        for a, b in combinations(own, 2):
            together = _correlations(own[a], own[b])
            if not math.isnan(together[0]):  # else there is nothing that a null could stand beside
                null = self.effects.get((b, self.nulls.get((b, latent), -1)), np.zeros(0))
                found.append((*together, *_correlations(own[a], null), self._both_firing(latent, a, b)))
        pearson, spearman, null_pearson, null_spearman, both_firing = (
            map(_mean, zip(*found, strict=True)) if found else _NOTHING
        )
        return LatentFidelity(
            latent=latent,
            correlation=pearson,
            null_correlation=null_pearson,
            spearman=spearman,
            null_spearman=null_spearman,
            both_firing=both_firing,
            n_firing={site: len(self.firing[site].get(latent, ())) for site in own},
            effect={site: float(effects.mean()) for site, effects in own.items()},
        )

    def _both_firing(self, latent: int, a: str, b: str) -> float:
        """Return Pearson's correlation of a latent's effects in two sites over the images in which it fires in both."""
        both = np.intersect1d(self.firing[a].get(latent, ()), self.firing[b].get(latent, ())).astype(np.int64)
        if len(both) < LEAST_BOTH:
            return math.nan
        return _correlations(self.effects[a, latent][both], self.effects[b, latent][both])[0]


def without_latent(usae: USAE, site: str, latents: Tensor, rows: RowMatrix) -> RowMatrix:
    """Return x − s z_k W_dec,k, where k is each row's own latent: what the USAE does not explain stays.

    Args:
        usae: on any device.
        site: the site the rows come from.
        latents: int64 [b].
        rows: [b, d_in] in the model's own units.
    """
    scale, decoder = usae.scale[usae.site_index(site)], usae.decoder(site)
    parts = []
    of_rows = latents.to(decoder.device)
    for x, k in zip(torch.split(rows, CHUNK_ROWS), torch.split(of_rows, CHUNK_ROWS), strict=True):
        codes = usae.encode(x, site)
        z = (codes.values * (codes.indices == k[:, None])).sum(1, keepdim=True)
        parts.append(x - (scale * z * decoder[k]).to(x.device))
    return torch.cat(parts)


def draw_nulls(energy: Mapping[str, np.ndarray], latents: Sequence[int], seed: int) -> dict[tuple[str, int], int]:
    """Draw for each latent another one that fires in the same site with about its energy.

    Args:
        energy: {site: [n_latents]}; the first site is never second in a pair, and gets none.
        latents: which ones; what is drawn for one does not depend on the others.
        seed: of the draw.

    Returns:
        {(site, latent): one of the ten live latents nearest in energy}; without latents that do not fire there.
    """
    drawn = {}
    for place, (site, of_site) in list(enumerate(energy.items()))[1:]:
        live = np.flatnonzero(of_site)
        for latent in latents:
            others = live[live != latent]
            if of_site[latent] > 0 and len(others):
                gap = np.abs(of_site[others] - of_site[latent])
                nearest = others[np.argsort(gap, kind="stable")[:N_NEAREST]]
                drawn[site, latent] = int(np.random.default_rng((seed, latent, place)).choice(nearest))
    return drawn


_NOTHING = (math.nan,) * 5


def _correlations(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation; NaN where one of the two is constant, or there is none."""
    if len(a) != len(b) or min(np.ptp(a), np.ptp(b)) <= _CONSTANT:
        return math.nan, math.nan
    ranks = stats.rankdata(a), stats.rankdata(b)
    return float(np.corrcoef(a, b)[0, 1]), float(np.corrcoef(*ranks)[0, 1])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
