"""How likely co-firing is by chance: exact tests for images paired at random, also when they are so within places."""

from __future__ import annotations

import numpy as np
from scipy import special, stats

_LARGE = 30.0
"""Variance of a sum of co-fires from which on its distribution is taken to be normal but for its skewness."""
_NOTHING = 1e-15
"""Where p is certainly below, no sum is made, and its bound stands for it."""


def chance(fires_a: np.ndarray, fires_b: np.ndarray, cofires: np.ndarray, n: int) -> np.ndarray:
    """Return the chance of at least as many co-fires with images paired at random, exactly.

    p = P[H ≥ c], H ~ hypergeometric(n, a, b); 1 when one of the sites never fires.

    Args:
        fires_a, fires_b: [latents] images in which each site fires the latent.
        cofires: [latents] images in which both do.
        n: images, which must be independent of each other.
    """
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (fires_a, fires_b, cofires))
    p = np.ones(len(a))
    tested = np.flatnonzero((c > np.maximum(a + b - n, 0)) & (a > 0) & (b > 0))
    upper = c[tested] > a[tested] * b[tested] / n  # the side with fewer images, so that small p keep all their digits
    for part, side in ((tested[upper], 1), (tested[~upper], -1)):
        tail = _one_side(a[part], b[part], c[part] if side > 0 else c[part] - 1, float(n), side)
        p[part] = tail if side > 0 else 1.0 - tail
    return np.clip(p, 0.0, 1.0)


def _one_side(a: np.ndarray, b: np.ndarray, at: np.ndarray, n: float, side: int) -> np.ndarray:
    """Return P[H ≥ at] (side 1) or P[H ≤ at] (side −1), from the mode outwards: the terms fall, and are summed.

    pmf(h + 1) / pmf(h) = (a − h) (b − h) / ((h + 1) (n − a − b + h + 1)); all latents at once, until nothing is added.
    (`scipy.stats.hypergeom` factorises the binomials, up to 100,000 images: seconds for 8,000 latents, per pairing.)
    """
    total = np.exp(_log_choose(a, at) + _log_choose(n - a, b - at) - _log_choose(n, b))
    term, h, left = total.copy(), at.copy(), np.arange(len(at))
    while len(left):
        if side > 0:
            ratio = (a[left] - h) * (b[left] - h) / ((h + 1) * (n - a[left] - b[left] + h + 1))
        else:
            ratio = h * (n - a[left] - b[left] + h) / ((a[left] - h + 1) * (b[left] - h + 1))
        term, h = term * ratio, h + side
        total[left] += term
        goes_on = term > 1e-17 * total[left]
        left, term, h = left[goes_on], term[goes_on], h[goes_on]
    return np.asarray(total)


def _log_choose(n: np.ndarray | float, k: np.ndarray) -> np.ndarray:
    return np.asarray(special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1))


def chance_by_place(fires_a: np.ndarray, fires_b: np.ndarray, cofires: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return the chance of at least as many co-fires with images paired at random among those with the same place.

        p = P[Σ_s H_s ≥ Σ_s c_s],   H_s ~ hypergeometric(n_s, a_s, b_s), independent

    (the exact conditional test of stratified 2×2 tables: Mantel & Haenszel 1959; Gart 1970). What fires by place alone,
    at the border say, co-fires in every pairing of this kind: its p is 1. The distribution of the sum is the
    convolution of the strata's; where its variance is above 30, a normal one with skewness (Cornish & Fisher 1938, of
    second order) stands for it. Where Bernstein's bound exp(−t² / (2 (σ² + t / 3))) of a t above the mean is below
    1e-15, p is that bound: a hypergeometric variable is a sum of independent Bernoulli ones (Vatutin & Mikhailov 1982).

    Args:
        fires_a, fires_b: [places, latents] images, one row of each, in which each site fires the latent at that place.
        cofires: [places, latents] images in which both do.
        n: [places] images with that place.
    """
    drawn = np.asarray(n) > 0  # a place that no image was drawn at says nothing
    a, b, c = (np.asarray(x, dtype=np.int64)[drawn] for x in (fires_a, fires_b, cofires))
    strata = np.asarray(n, dtype=np.int64)[drawn][:, None]
    p = np.ones(a.shape[1])
    observed, least = c.sum(0), np.maximum(a + b - strata, 0)
    mean, variance, third = _moments(a, b, strata)
    tested = (observed > least.sum(0)) & (variance > 0)
    above = np.maximum(observed - mean, 0.0)
    bound = np.exp(-(above**2) / (2 * (np.where(tested, variance, 1.0) + above / 3)))
    far = tested & (bound < _NOTHING)
    p[far] = bound[far]
    normal = tested & ~far & (variance > _LARGE)
    z = (observed - 0.5 - mean)[normal] / np.sqrt(variance[normal])
    skewness = third[normal] / variance[normal] ** 1.5
    p[normal] = stats.norm.sf(z - skewness / 6 * (z**2 - 1) + skewness**2 / 36 * (4 * z**3 - 7 * z))
    exact = np.flatnonzero(tested & ~far & ~normal)
    # those that need equally long distributions together
    for part in np.array_split(exact[np.argsort(observed[exact] - least.sum(0)[exact])], max(1, len(exact) // 256)):
        if len(part):
            p[part] = _tail(a[:, part], b[:, part], strata, least[:, part], observed[part])
    return np.clip(p, 0.0, 1.0)


def _tail(a: np.ndarray, b: np.ndarray, n: np.ndarray, least: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return P[Σ H ≥ observed] from the distribution of Σ (H − least) below it."""
    excess = observed - least.sum(0)
    length = int(excess.max())
    below = np.zeros((len(excess), length))
    below[:, 0] = 1.0
    for s in range(len(a)):
        most = int(min((np.minimum(a[s], b[s]) - least[s]).max(), length - 1))
        values = np.arange(most + 1)[:, None]
        chances = stats.hypergeom.pmf(values + least[s], n[s, 0], a[s], b[s])
        summed = below * chances[0][:, None]
        for value in range(1, most + 1):
            summed[:, value:] += below[:, : length - value] * chances[value][:, None]
        below = summed
    reached = np.arange(length) >= excess[:, None]
    return np.asarray(1.0 - np.where(reached, 0.0, below).sum(1))


def _moments(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, variance and third central moment of Σ_s H_s, [latents] each."""
    x, y, m = a.astype(np.float64), b.astype(np.float64), np.maximum(n.astype(np.float64), 1.0)
    mean = x * y / m
    variance = mean * (m - x) * (m - y) / (m * np.maximum(m - 1, 1))
    third = variance * (m - 2 * x) * (m - 2 * y) / (m * np.maximum(m - 2, 1))
    return mean.sum(0), variance.sum(0), third.sum(0)
