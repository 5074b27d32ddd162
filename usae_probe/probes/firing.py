"""Firing statistics of the latents, streaming: memory O(sites² × n_latents), whatever the number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..usae import Codes

Pair = tuple[str, str]
_SCRATCH = 2**24
"""Numbers that are spread out at a time to find the fires that two sites have in common."""


class Fires(NamedTuple):
    """The fires of one site in a chunk of rows, [fires] each, row by row: row, latent and z > τ."""

    row: Tensor
    latent: Tensor
    z: Tensor

    @classmethod
    def of(cls, codes: Codes, tau: float) -> Fires:
        """Return the entries of codes that are above τ."""
        values, indices = codes.values.detach().cpu(), codes.indices.cpu()
        fired = values > tau
        rows = torch.arange(len(values)).unsqueeze(1).expand_as(indices)
        return cls(rows[fired], indices[fired], values[fired])

    def between(self, start: int, stop: int) -> Fires:
        """Return those of the rows from `start` to `stop`, which are then counted from 0."""
        first, last = torch.searchsorted(self.row, torch.tensor([start, stop])).tolist()
        return Fires(self.row[first:last] - start, self.latent[first:last], self.z[first:last])


class Common(NamedTuple):
    """Fires that two sites have in common, [cofires] each: row, latent, and z of both."""

    row: Tensor
    latent: Tensor
    z_a: Tensor
    z_b: Tensor


class FiringCounts:
    """Per latent: fires, mean and maximum activation by site; co-fires and Σ z_a z_b by pair of sites.

    A site fires latent k on a row where z_k > τ; below, z_k counts as 0. Rows of one image are not independent, so
    where images have several rows, images are counted beside rows, and one drawn row per image by itself: what a test
    against chance may use.

    Args:
        sites: in the order of the pairs.
        n_latents: latents of the code.
        tau: the threshold τ.
        draw: draws the one row of each image, uniformly; None when every row is an image.
        pairs: of sites; default: all.
        places: rows of each image, where they are as many in all: then counts are kept by place, too.
        groups: of images, for intervals (`ImageGroups`).

    Attributes:
        n_rows: rows added so far.
        fires: {site: [n] int64}.
        total, squares: {site: [n] float64}, Σ z_k and Σ z_k² over rows.
        maximum: {site: [n] float64}.
        cofires: {(site, site): [n] int64}, rows in which both sites fire the latent.
        products: {(site, site): [n] float64}, Σ z_a z_b over rows.
        images: {site: [n] int64}, images with a row in which the site fires the latent.
        drawn: the same counts over one row of each image; these counts themselves when every row is an image.
        by_place: counts by place; none where every row is an image.
        by_group: counts by group of images; none without groups.
    """

    def __init__(
        self,
        sites: Sequence[str],
        n_latents: int,
        tau: float = 0.0,
        draw: np.random.Generator | None = None,
        *,
        pairs: Sequence[Pair] | None = None,
        places: int = 0,
        groups: int = 0,
    ) -> None:
        self.sites, self.n_latents, self.tau = tuple(sites), n_latents, tau
        self.pairs = list(combinations(self.sites, 2)) if pairs is None else list(pairs)
        self.n_rows = 0
        self.fires = {site: np.zeros(n_latents, dtype=np.int64) for site in self.sites}
        self.total, self.squares, self.maximum = ({site: np.zeros(n_latents) for site in self.sites} for _ in range(3))
        self.cofires = {pair: np.zeros(n_latents, dtype=np.int64) for pair in self.pairs}
        self.products = {pair: np.zeros(n_latents) for pair in self.pairs}
        self._draw = draw
        self.images = {site: np.zeros(n_latents, dtype=np.int64) for site in self.sites} if draw else self.fires
        self.by_place = CountsBy(self, places) if places > 1 else None
        self.by_group = CountsBy(self, groups) if groups else None
        self.drawn: FiringCounts = self
        if draw:
            self.drawn = FiringCounts(self.sites, n_latents, tau, pairs=self.pairs, places=places)
        self._scratch = torch.empty(0)

    def add(
        self,
        codes: Mapping[str, Codes],
        image_index: np.ndarray | None = None,
        token_index: np.ndarray | None = None,
        group: np.ndarray | None = None,
    ) -> None:
        """Add the codes of the same rows by every site.

        Args:
            codes: by site.
            image_index: [rows] image of each row, the rows of one image together and in one call; needed with `draw`.
            token_index: [rows] place of each row; needed with `places`.
            group: [rows] group of each row's image; needed with `groups`.
        """
        self.add_fires(
            {site: Fires.of(codes[site], self.tau) for site in self.sites},
            len(codes[self.sites[0]].values),
            image_index,
            token_index,
            group,
        )

    def add_fires(
        self,
        fires: Mapping[str, Fires],
        n: int,
        image_index: np.ndarray | None = None,
        token_index: np.ndarray | None = None,
        group: np.ndarray | None = None,
    ) -> None:
        """Add the fires of the same n rows by every site; see `add`."""
        for site in self.sites:
            self._add_site(site, fires[site])
        by = [(self.by_place, token_index), (self.by_group, group)]
        labelled = [
            (counts, torch.from_numpy(label.astype(np.int64))) for counts, label in by if counts and label is not None
        ]
        for counts, label in labelled:
            counts.add_sites(fires, label)
        for pair in self.pairs:
            for start, both in self._in_common(fires[pair[0]], fires[pair[1]], n):
                self.cofires[pair] += self._count(both.latent)
                self.products[pair] += self._sum(both.latent, both.z_a.double() * both.z_b)
                for counts, label in labelled:
                    counts.add_pair(pair, both, label[start:])
        self.n_rows += n
        if self._draw is not None and image_index is not None:
            self._add_images(fires, image_index, token_index, self._draw)

    def mean(self, site: str) -> np.ndarray:
        """Return E[z_k] over all rows, [n]."""
        return self.total[site] / max(self.n_rows, 1)

    def correlation(self, pair: Pair) -> np.ndarray:
        """Return Pearson's correlation of z_k in the two sites over all rows, [n]; NaN where one does not vary.

        r = (N Σ z_a z_b − Σ z_a Σ z_b) / √((N Σ z_a² − (Σ z_a)²) (N Σ z_b² − (Σ z_b)²)).
        """
        n = self.n_rows
        (sum_a, spread_a), (sum_b, spread_b) = (
            (self.total[site], n * self.squares[site] - self.total[site] ** 2) for site in pair
        )
        known = (spread_a > 1e-12 * n * self.squares[pair[0]]) & (spread_b > 1e-12 * n * self.squares[pair[1]])
        spread = np.sqrt(np.where(known, spread_a * spread_b, 1.0))
        return np.where(known, np.clip((n * self.products[pair] - sum_a * sum_b) / spread, -1.0, 1.0), np.nan)

    def _in_common(self, a: Fires, b: Fires, n: int) -> Iterator[tuple[int, Common]]:
        """Yield what two sites have in common, block of rows by block, with the first row of each."""
        size = max(1, min(n, _SCRATCH // self.n_latents))
        if len(self._scratch) < size * self.n_latents:
            self._scratch = torch.zeros(size * self.n_latents)
        for start in range(0, n, size):
            first, then = (fires.between(start, start + size) if n > size else fires for fires in (a, b))
            keys = first.row * self.n_latents + first.latent
            self._scratch[keys] = first.z.to(self._scratch)
            found = self._scratch[then.row * self.n_latents + then.latent]
            self._scratch[keys] = 0.0
            both = found > 0
            yield start, Common(then.row[both], then.latent[both], found[both], then.z[both])

    def _add_images(
        self,
        fires: Mapping[str, Fires],
        image_index: np.ndarray,
        token_index: np.ndarray | None,
        draw: np.random.Generator,
    ) -> None:
        begins = image_begins(image_index)
        counts = np.diff(begins, append=len(image_index))
        # One number per image, whatever the chunks: the rows drawn depend on the seed and the order of images alone.
        rows = begins + (draw.random(len(begins)) * counts).astype(np.int64)
        place = np.full(len(image_index), -1)
        place[rows] = np.arange(len(rows))
        at, image = torch.from_numpy(place), torch.from_numpy(np.repeat(np.arange(len(begins)), counts))
        one = {}
        for site in self.sites:
            row, latent, z = fires[site]
            chosen = at[row] >= 0
            one[site] = Fires(at[row[chosen]], latent[chosen], z[chosen])
            seen = torch.zeros(len(begins), self.n_latents, dtype=torch.bool)
            seen[image[row], latent] = True
            self.images[site] += seen.sum(0).numpy()
        self.drawn.add_fires(one, len(rows), token_index=None if token_index is None else token_index[rows])

    def _add_site(self, site: str, fires: Fires) -> None:
        latents, z = fires.latent, fires.z.double()
        self.fires[site] += self._count(latents)
        self.total[site] += self._sum(latents, z)
        self.squares[site] += self._sum(latents, z * z)
        top = torch.zeros(self.n_latents, dtype=torch.float64)
        top.scatter_reduce_(0, latents, z, "amax", include_self=True)
        np.maximum(self.maximum[site], top.numpy(), out=self.maximum[site])

    def _count(self, latents: Tensor) -> np.ndarray:
        return torch.bincount(latents, minlength=self.n_latents).numpy()

    def _sum(self, latents: Tensor, values: Tensor) -> np.ndarray:
        return torch.zeros(self.n_latents, dtype=torch.float64).index_add_(0, latents, values).numpy()


class CountsBy:
    """Fires and co-fires by a label of the rows: their place in the image, or a group of images.

    Attributes:
        n: [labels] rows.
        fires: {site: [labels, n_latents] int32}, of the sites that are in a pair.
        cofires: {pair: [labels, n_latents] int32}.
    """

    def __init__(self, counts: FiringCounts, labels: int) -> None:
        self.n_latents, shape = counts.n_latents, (labels, counts.n_latents)
        self.n = np.zeros(labels, dtype=np.int64)
        paired = dict.fromkeys(site for pair in counts.pairs for site in pair)
        self.fires = {site: np.zeros(shape, dtype=np.int32) for site in paired}
        self.cofires = {pair: np.zeros(shape, dtype=np.int32) for pair in counts.pairs}

    def add_sites(self, fires: Mapping[str, Fires], label: Tensor) -> None:
        """Add the rows, by their labels, and every site's fires."""
        self.n += torch.bincount(label, minlength=len(self.n)).numpy()
        for site, counts in self.fires.items():
            self._add(counts, label[fires[site].row], fires[site].latent)

    def add_pair(self, pair: Pair, both: Common, label: Tensor) -> None:
        """Add what a pair has in common; rows are counted from the first label."""
        self._add(self.cofires[pair], label[both.row], both.latent)

    def _add(self, counts: np.ndarray, label: Tensor, latent: Tensor) -> None:
        ones = torch.ones(len(latent), dtype=torch.int32)
        torch.from_numpy(counts).view(-1).index_add_(0, label * self.n_latents + latent, ones)


def image_begins(image_index: np.ndarray) -> np.ndarray:
    """Return the rows at which another image begins; the rows of an image lie together."""
    return np.flatnonzero(np.append(True, image_index[1:] != image_index[:-1])[: len(image_index)])
