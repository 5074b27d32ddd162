"""The linear reference: how well ridge regression predicts one site's rows from another's, without a USAE."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..buffer import ActivationBuffer, Moments, Rows
from ..errors import BufferIntegrityError, UsageError
from ..split import SplitName
from ..usae import Matrix, empty_matrix
from .rows import RowProgress, check_rows, some_rows

PENALTIES = np.logspace(-5, 1, 19)
"""λ / (n · mean variance of the source's dimensions) that are tried."""

EVAL_ROWS = 100_000
"""Measured rows, at most."""

Columns = Mapping[str, slice]
"""Where each site's dimensions are in the stacked row of all sites."""


class LinearReference(NamedTuple):
    """What ridge regression reaches between each two sites.

    Attributes:
        r2: {source: {target: R²}} on held-out rows; NaN on the diagonal and for a target that does not vary.
        penalty: {source: {target: λ}} as chosen, in units of n · mean variance of the source's dimensions; NaN on the
            diagonal.
        n_rows_train, n_rows_eval: rows that it was fitted on and measured on.
    """

    r2: Matrix
    penalty: Matrix
    n_rows_train: int
    n_rows_eval: int


def linear_reference(
    buffer: ActivationBuffer,
    sites: Sequence[str],
    *,
    split: SplitName = "holdout",
    train_rows: int = 20_000,
    eval_rows: int = EVAL_ROWS,
    folds: int = 5,
    seed: int = 0,
    pairs: Collection[tuple[str, str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LinearReference:
    """Return R² of ridge regression with intercept from every site's rows to every other's.

    ŷ = mean_y + (x − mean_x) B, B = (XᵀX + λI)⁻¹ XᵀY of the centred training rows;
    R² = 1 − Σ‖y − ŷ‖² / Σ‖y − mean‖² about the per-dimension mean of the held-out rows. λ is chosen per pair by
    cross-validation on training rows: one of `PENALTIES` · n · mean variance of x, where all rows of an image are in
    one fold. Sums are float64; memory is O(folds · d_source · Σd), whatever the rows.

    Args:
        buffer: row-paired activations of these sites.
        sites: sources and targets.
        split: the rows that are measured.
        train_rows: at most so many training rows, spread evenly over them.
        eval_rows: at most so many measured rows, spread evenly over the split.
        folds: of the cross-validation; as many as there are images, where there are fewer.
        seed: draws each image's fold.
        pairs: (source, target) that are fitted; default: all. The others are NaN.
        progress: called with (rows done, rows in all); each source reads all rows once.

    Raises:
        BufferIntegrityError: with fewer than 2 training images or 2 rows to measure on.
        UsageError: for fewer than 2 folds (SiteError: for an unknown site).
    """
    if folds < 2:
        raise UsageError(f"cross-validation was asked for with folds={folds}; it needs at least 2")
    centres = {site: buffer.moments(site).mean for site in sites}
    sites = list(centres)
    n_train, n_eval = min(buffer.n_rows("train"), train_rows), min(buffer.n_rows(split), eval_rows)
    r2, penalty = empty_matrix(sites), empty_matrix(sites)
    targets = {
        source: [t for t in sites if t != source and (pairs is None or (source, t) in pairs)] for source in sites
    }
    sources = [source for source in sites if targets[source]]
    if sources:
        fold = _image_folds(buffer, n_train, folds, seed)
        check_rows(buffer, split)
        varies = _m2(buffer, split, n_eval, list(dict.fromkeys(t for s in sources for t in targets[s])))
        done = RowProgress(progress, len(sources) * (n_train + n_eval))
        for source in sources:
            fit = _Fit.of(buffer, {site: centres[site] for site in (source, *targets[source])}, source, fold, done)
            sse = _errors(fit, buffer, split, n_eval, done)
            for target in fit.penalty:
                penalty[source][target] = fit.penalty[target]
                if varies[target] > 0:
                    r2[source][target] = float(1.0 - sse[target] / varies[target])
    return LinearReference(r2, penalty, n_train, n_eval)


@dataclass
class _Sums:
    """Sums over rows of all sites, stacked to y [D], and of one of them, x [d]; both less some centre.

    Attributes:
        n: rows.
        own: where x is in y.
        total: [D] Σ y.
        products: [d, D] Σ xᵀy; its columns `own` are Σ xᵀx.
    """

    n: int
    own: slice
    total: np.ndarray
    products: np.ndarray

    @classmethod
    def empty(cls, own: slice, width: int) -> _Sums:
        return cls(0, own, np.zeros(width), np.zeros((own.stop - own.start, width)))

    def add(self, rows: np.ndarray) -> None:
        self.n += len(rows)
        self.total += rows.sum(0)
        self.products += rows[:, self.own].T @ rows

    def merge(self, other: _Sums) -> None:
        self.n += other.n
        self.total += other.total
        self.products += other.products

    def about(self, mean: np.ndarray) -> _Sums:
        """Return the sums over the same rows less `mean` [D]."""
        # Σ (x − m)ᵀ(y − m) = Σ xᵀy − mᵀΣy − (Σx − n·m)ᵀm
        products = self.products - np.outer(mean[self.own], self.total)
        products -= np.outer(self.total[self.own] - self.n * mean[self.own], mean)
        return _Sums(self.n, self.own, self.total - self.n * mean, products)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def gram(self) -> np.ndarray:
        return self.products[:, self.own]


@dataclass
class _Fit:
    """Ridge regression of one source to the other sites.

    Attributes:
        columns: of all sites.
        source: the site it predicts from.
        mean: [D] of the training rows.
        weights: [d, D] B, with zeros in the source's own columns.
        penalty: {target: λ}, relative.
    """

    columns: dict[str, slice]
    source: str
    mean: np.ndarray
    weights: np.ndarray
    penalty: dict[str, float]

    @classmethod
    def of(
        cls,
        buffer: ActivationBuffer,
        centres: Mapping[str, np.ndarray],
        source: str,
        fold: np.ndarray,
        done: RowProgress,
    ) -> _Fit:
        """Fit to the training rows of which `fold` [n] has the folds, λ being the best on the folds left out.

        `centres` [d_in] by site are about the means, so that no digits are lost in sums of squares.
        """
        columns, centre = _columns(centres), np.concatenate(list(centres.values()))
        parts = _fold_sums(buffer, columns, source, centre, fold, done)
        everything = _joined(parts)
        all_rows = everything.about(everything.mean)
        unit = float(np.trace(all_rows.gram)) / len(all_rows.gram)
        targets = {site: part for site, part in columns.items() if site != source}
        sse = np.zeros((len(targets), len(PENALTIES)))
        for number, left_out in enumerate(parts):
            fit_on = _joined(parts[:number] + parts[number + 1 :])
            sse += _fold_errors(fit_on, left_out, list(targets.values()), PENALTIES * unit)
        penalty = dict(zip(targets, PENALTIES[sse.argmin(1)].tolist(), strict=True))
        weights = np.zeros_like(all_rows.products)
        values, vectors = np.linalg.eigh(all_rows.gram)
        for target, part in targets.items():
            (shrink,) = _inverse(values, np.array([penalty[target] * unit]))
            weights[:, part] = vectors @ (shrink[:, None] * (vectors.T @ all_rows.products[:, part]))
        return cls(columns, source, centre + everything.mean, weights, penalty)


def _fold_errors(fit_on: _Sums, left_out: _Sums, targets: list[slice], penalties: np.ndarray) -> np.ndarray:
    """Return Σ‖y − ŷ‖² − Σ‖y‖² over the rows left out, [targets, penalties], from sums alone.

    About the means of the rows that were fitted on, Σ‖y − xB‖² = tr YᵀY − 2 tr BᵀXᵀY + tr BᵀXᵀXB, the first of which
    is the same for every λ and left out; with XᵀX = VΛVᵀ of those rows, B = V (Λ + λ)⁻¹ A, A = VᵀXᵀY, so that each λ
    costs a product of a vector and a matrix.
    """
    fitted, left = fit_on.about(fit_on.mean), left_out.about(fit_on.mean)
    values, vectors = np.linalg.eigh(fitted.gram)
    shrink = _inverse(values, penalties)
    along, left_along = vectors.T @ fitted.products, vectors.T @ left.products
    left_gram = left_along[:, left.own] @ vectors
    sse = []
    for part in targets:
        a = along[:, part]
        linear = shrink @ (a * left_along[:, part]).sum(1)
        quadratic = ((shrink @ (left_gram * (a @ a.T))) * shrink).sum(1)
        sse.append(quadratic - 2 * linear)
    return np.stack(sse)


def _inverse(values: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Return 1 / (Λ + λ), [penalties, d]; 0 where nothing varies and nothing is added."""
    sums = np.maximum(values, 0.0) + penalties[:, None]
    inverse: np.ndarray = np.zeros_like(sums)
    np.divide(1.0, sums, out=inverse, where=sums > 0)
    return inverse


def _image_folds(buffer: ActivationBuffer, n: int, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each of n training rows: images are drawn into folds of equal size, give or take one.

    Raises:
        BufferIntegrityError: for rows of fewer than 2 images.
    """
    image_index = np.concatenate([rows.image_index for rows in some_rows(buffer, "train", n, [])] or [np.empty(0)])
    images, image = np.unique(image_index, return_inverse=True)
    if len(images) < 2:
        raise BufferIntegrityError(
            f"linear regression has training rows of {len(images)} images; it needs at least 2, to choose its penalty",
            hint="harvest more images, or allow more training rows",
        )
    of_image: np.ndarray = np.random.default_rng(seed).permutation(len(images)) % min(folds, len(images))
    return np.asarray(of_image[image])


def _fold_sums(
    buffer: ActivationBuffer,
    columns: Columns,
    source: str,
    centre: np.ndarray,
    fold: np.ndarray,
    done: RowProgress,
) -> list[_Sums]:
    """Return the sums of each fold's rows, less `centre` [D]."""
    sums = [_Sums.empty(columns[source], len(centre)) for _ in range(fold.max() + 1)]
    start = 0
    for rows in some_rows(buffer, "train", len(fold), list(columns)):
        values, of_row = _stacked(rows, columns) - centre, fold[start : start + rows.n]
        for number in np.unique(of_row):
            sums[number].add(values[of_row == number])
        start += rows.n
        done.add(rows.n)
    return sums


def _joined(parts: Sequence[_Sums]) -> _Sums:
    joined = _Sums.empty(parts[0].own, len(parts[0].total))
    for part in parts:
        joined.merge(part)
    return joined


def _errors(fit: _Fit, buffer: ActivationBuffer, split: SplitName, n: int, done: RowProgress) -> dict[str, float]:
    """Return {target: Σ‖y − ŷ‖²} over n rows of the split."""
    sse = np.zeros(len(fit.mean))
    for rows in some_rows(buffer, split, n, list(fit.columns)):
        values = _stacked(rows, fit.columns) - fit.mean
        sse += np.square(values - values[:, fit.columns[fit.source]] @ fit.weights).sum(0)
        done.add(rows.n)
    return {target: float(sse[fit.columns[target]].sum()) for target in fit.penalty}


def _m2(buffer: ActivationBuffer, split: SplitName, n: int, sites: list[str]) -> dict[str, float]:
    """Return {site: Σ‖y − mean‖²} over n rows of the split."""
    moments = {site: Moments(buffer.d_in[site]) for site in sites}
    for rows in some_rows(buffer, split, n, sites):
        for site, values in rows.values.items():
            moments[site].update(values)
    return {site: float(moments[site].m2.sum()) for site in sites}


def _columns(centres: Mapping[str, np.ndarray]) -> dict[str, slice]:
    ends = np.cumsum([len(centre) for centre in centres.values()]).tolist()
    return {site: slice(end - len(centre), end) for end, (site, centre) in zip(ends, centres.items(), strict=True)}


def _stacked(rows: Rows, sites: Columns) -> np.ndarray:
    return np.concatenate([rows.values[site] for site in sites], axis=1).astype(np.float64)
