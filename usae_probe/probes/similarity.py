"""How alike sites are without a USAE: debiased CKA and mutual nearest neighbours, each beside shuffled pairings."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..buffer import ActivationBuffer
from ..errors import UsageError
from ..split import SplitName
from ..usae import Matrix, empty_matrix
from .rows import CHUNK_ROWS

LEAST_IMAGES = 4
"""The unbiased HSIC divides by n − 3."""
_QUANTILE = 0.95
_TIE = 1e-13  # cosines that differ by less are equal: above their rounding, below all else


class Similarity(NamedTuple):
    """How alike each two sites are on the same images.

    Both measures are symmetric, with 1 on the diagonal. A null is the largest value over `nulls` shuffles of which
    images are paired; NaN on the diagonal. NaN everywhere with fewer than 4 images, and for a site that does not vary.

    Attributes:
        n_images: images compared, one row each.
        k: neighbours per image.
        nulls: shuffles.
        cka: {site: {site: debiased linear CKA}}; may be negative.
        cka_null: its null.
        mutual_knn: {site: {site: share of nearest neighbours in common}}; chance is k / (n − 1).
        mutual_knn_null: its null.
    """

    n_images: int
    k: int
    nulls: int
    cka: Matrix
    cka_null: Matrix
    mutual_knn: Matrix
    mutual_knn_null: Matrix


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return the linear CKA of paired rows with the unbiased HSIC: about 0 for independent ones, also where d > n.

    CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) (arXiv 1905.00414), K = xxᵀ and L = yyᵀ with zeroed diagonals,
    HSIC = (tr KL + 1ᵀK1 1ᵀL1 / ((n−1)(n−2)) − 2 · 1ᵀKL1 / (n−2)) / (n(n−3)) (Song et al. 2012; for CKA: Nguyen et al.,
    arXiv 2010.15327).

    Args:
        x, y: [n, d1], [n, d2], n ≥ 4.

    Returns:
        In [−1, 1]; NaN where one of them does not vary, or in one row only.

    Raises:
        UsageError: for other shapes or too few rows.
    """
    _check(x, y, LEAST_IMAGES, "debiased CKA")
    return _Features.of(x).cka(_Features.of(y))


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int = 10) -> float:
    """Return the mean share of k nearest neighbours that paired rows have in common (Huh et al., arXiv 2405.07987).

    mean_i |N_x(i) ∩ N_y(i)| / k, N(i) the k rows other than i with the largest cosine, of values that are clamped to ±
    the mean over rows of their .95-quantile of |x|, as in the paper's code. Chance is k / (n − 1). Of rows that are
    equally near, some are drawn, by a seed from the content of x: sites do not agree just by the numbers of rows.

    Args:
        x, y: [n, d1], [n, d2], n ≥ 2.
        k: neighbours; n − 1 if there are fewer rows.

    Returns:
        In [0, 1]; NaN where one of them (once clamped) does not vary.

    Raises:
        UsageError: for other shapes or k < 1.
    """
    _check(x, y, 2, "mutual nearest neighbours", k)
    k = min(k, len(x) - 1)
    return _overlap(_neighbours(x, k), _neighbours(y, k))


def similarity(
    buffer: ActivationBuffer,
    sites: Sequence[str],
    *,
    split: SplitName = "holdout",
    n_images: int = 4096,
    k: int = 10,
    nulls: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Similarity:
    """Return how alike each two sites of a buffer are, on one row of each image.

    Args:
        buffer: row-paired activations of these sites.
        sites: which ones.
        split: whose images.
        n_images: at most so many, drawn; where images have several rows, one of each is drawn.
        k: nearest neighbours per image; at most all others.
        nulls: shuffles of the pairing, the same for every pair of sites; 0 for none.
        seed: of images, rows and shuffles.
        progress: called with (steps done, steps in all), one for every site and one for every pair.

    Raises:
        UsageError: for k < 1 or nulls < 0 (SiteError: for an unknown site).
    """
    sites = list(dict.fromkeys(sites))
    pairs = list(combinations(sites, 2))
    how: dict[str, Any] = {"split": split, "n_images": n_images, "k": k, "nulls": nulls, "seed": seed}
    compared = pair_similarities(buffer, [(site, site) for site in sites] + pairs, **how)
    n, found = 0, Similarity(0, k, nulls, *(empty_matrix(sites) for _ in range(4)))
    for done, alike in enumerate(compared, start=1):
        n = alike.n_images
        for a, b in (alike.pair, alike.pair[::-1]):
            found.cka[a][b], found.mutual_knn[a][b] = alike.cka, alike.mutual_knn
            found.cka_null[a][b], found.mutual_knn_null[a][b] = alike.cka_null, alike.mutual_knn_null
        if progress:
            progress(done, len(sites) + len(pairs))
    return found._replace(n_images=n, k=max(1, min(k, n - 1)))


class PairSimilarity(NamedTuple):
    """How alike two sites are on the same images, with the largest of shuffled pairings; see `Similarity`.

    Of a site with itself the measures are 1 and there is no null.
    """

    pair: tuple[str, str]
    n_images: int
    cka: float
    cka_null: float
    mutual_knn: float
    mutual_knn_null: float


def pair_similarities(
    buffer: ActivationBuffer,
    pairs: Sequence[tuple[str, str]],
    *,
    split: SplitName = "holdout",
    n_images: int = 4096,
    k: int = 10,
    nulls: int = 20,
    seed: int = 0,
) -> Iterator[PairSimilarity]:
    """Yield, pair by pair, what `similarity` says of two sites; which other pairs are asked for changes none of them.

    Raises:
        UsageError: for k < 1 or nulls < 0 (SiteError: for an unknown site).
    """
    if k < 1 or nulls < 0:
        raise UsageError(f"similarity was asked for with k={k} and nulls={nulls}; k must be above 0, nulls not below")
    rng, nothing = np.random.default_rng(seed), float("nan")
    rows = _one_row_per_image(buffer, split, n_images, rng)
    n = len(rows)
    shuffles = [rng.permutation(n) for _ in range(nulls)]
    drawn: dict[str, _Drawn] = {}
    for pair in pairs:
        if n < LEAST_IMAGES:
            yield PairSimilarity(pair, n, nothing, nothing, nothing, nothing)
            continue
        for site in pair:
            if site not in drawn:
                values = buffer.gather(split, rows, [site]).values[site]
                drawn[site] = _Drawn.of(values, max(1, min(k, n - 1)))
        x, y = (drawn[site] for site in pair)
        if pair[0] == pair[1]:
            own = 1.0 if x.features.norm > 0 else nothing
            yield PairSimilarity(pair, n, own, nothing, _overlap(x.near, x.near), nothing)
            continue
        cka_null = max((x.features.cka(y.features, order) for order in shuffles), default=nothing)
        knn_null = max((_overlap(x.near, _shuffled(y.near, order)) for order in shuffles), default=nothing)
        yield PairSimilarity(pair, n, x.features.cka(y.features), cka_null, _overlap(x.near, y.near), knn_null)


class _Features(NamedTuple):
    """Rows as debiased CKA needs them.

    HSIC does not change when rows are shifted or turned. Of centred x and y, with p_i = ‖x_i‖² and q_i = ‖y_i‖² and the
    rows of xxᵀ summing to 0, n(n−3) HSIC = ‖xᵀy‖² − n/(n−2) Σ p_i q_i + Σp Σq / ((n−1)(n−2)): no n×n matrix, and a
    shuffled pairing costs one product.

    Attributes:
        x: [n, min(d, n)] centred, of about unit variance.
        squares: [n] ‖x_i‖².
        norm: √(n(n−3) HSIC) of x with itself; 0 where that is not told from rounding.
    """

    x: np.ndarray
    squares: np.ndarray
    norm: float

    @classmethod
    def of(cls, rows: np.ndarray) -> _Features:
        x = rows.astype(np.float64)
        x -= x[0].copy()  # exact zeros where nothing varies
        x -= x.mean(0)
        x /= np.sqrt(np.square(x).mean()) or 1.0
        if x.shape[1] > len(x):
            x = np.asarray(np.linalg.qr(x.T, mode="r")).T
        alone = cls(x, np.square(x).sum(1), 0.0)
        own = alone._hsic(alone)
        largest = float(np.square(x.T @ x).sum())
        return alone._replace(norm=own**0.5 if own > 1e-12 * largest else 0.0)

    def cka(self, other: _Features, order: np.ndarray | None = None) -> float:
        """Return CKA with another's rows, or with those rows in another order."""
        norm = self.norm * other.norm
        return self._hsic(other, order) / norm if norm > 0 else float("nan")

    def _hsic(self, other: _Features, order: np.ndarray | None = None) -> float:
        n = len(self.x)
        y, q = (other.x, other.squares) if order is None else (other.x[order], other.squares[order])
        same = np.square(self.x.T @ y).sum() - n / (n - 2) * (self.squares @ q)
        return float(same + self.squares.sum() * q.sum() / ((n - 1) * (n - 2)))


class _Drawn(NamedTuple):
    """One site's rows as both measures need them."""

    features: _Features
    near: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, k: int) -> _Drawn:
        return cls(_Features.of(rows), _neighbours(rows, k))


def _neighbours(rows: np.ndarray, k: int) -> np.ndarray:
    """Return the k nearest other rows of each, [n, k] in no order; [n, 0] where the rows do not vary."""
    x = rows.astype(np.float64)
    limit = np.quantile(np.abs(x), _QUANTILE, axis=1).mean()
    x = np.clip(x, -limit, limit)
    if (x == x[0]).all():
        return np.empty((len(x), 0), dtype=np.int64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    # Of equally near rows the first would be taken, alike in every site; a seed from the content keeps x nearest to x.
    rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(x).tobytes()))
    near = np.empty((len(x), k), dtype=np.int64)
    for start in range(0, len(x), CHUNK_ROWS):
        cosine = x[start : start + CHUNK_ROWS] @ x.T
        cosine += _TIE * rng.random(cosine.shape)
        chunk = np.arange(len(cosine))
        cosine[chunk, start + chunk] = -np.inf
        near[start : start + CHUNK_ROWS] = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
    return near


def _overlap(near: np.ndarray, other: np.ndarray) -> float:
    """Return the mean share of neighbours in common; NaN where one has none."""
    if not near.size or not other.size:
        return float("nan")
    first = np.arange(len(near))[:, None] * len(near)
    both = np.intersect1d(first + near, first + other, assume_unique=True)
    return len(both) / near.size


def _shuffled(near: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the neighbours of rows in another order: row i is then row order[i], as number j is order[j]."""
    return np.asarray(np.argsort(order)[near[order]])


def _one_row_per_image(buffer: ActivationBuffer, split: SplitName, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the numbers of one drawn row of each of at most n drawn images; the rows of an image lie together."""
    begins, last, seen = [np.empty(0, dtype=np.int64)], -1, 0
    for rows in buffer.chunks(split, 2**16, []):
        begins.append(seen + np.flatnonzero(np.diff(rows.image_index, prepend=last)))
        last, seen = int(rows.image_index[-1]), seen + rows.n
    of_image = np.concatenate(begins)
    counts = np.diff(of_image, append=seen)
    drawn = of_image + (rng.random(len(of_image)) * counts).astype(np.int64)
    return np.sort(rng.choice(drawn, min(n, len(drawn)), replace=False))


def _check(x: np.ndarray, y: np.ndarray, least: int, what: str, k: int = 1) -> None:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < least or k < 1:
        asked = f" and k={k}" if k < 1 else ""
        raise UsageError(
            f"{what} was given arrays of shape {list(x.shape)} and {list(y.shape)}{asked}",
            hint=f"give rows of the same n ≥ {least} images, [n, d] each{', and k above 0' if k < 1 else ''}",
        )
