"""Universality of latents: firing entropy, co-firing against chance, and the six classes that partition them.

Firing entropy alone only compares rates: two models that fire a latent equally often on different images score 1. So
every class also asks for co-firing on the same images, with an effect size and a test against chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy import stats

from ..config import ProbesConfig
from .chance import chance, chance_by_place
from .firing import FiringCounts, Pair
from .intervals import Resamples

Category = Literal["universal", "partial", "chance", "specific", "rare", "dead"]
CATEGORIES: tuple[Category, ...] = get_args(Category)


def firing_entropy(fires: np.ndarray) -> np.ndarray:
    """Return FE_k = −Σ_i p_i log p_i / log M with p_i = f_i / Σ_j f_j (arXiv 2502.03714).

    Args:
        fires: [m, n] fires of each latent in each site (equal numbers of rows).

    Returns:
        [n]; 1 for equal rates, 0 for one site only, NaN where a latent never fires, or for one site.
    """
    fires = np.asarray(fires, dtype=np.float64)
    total = fires.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = fires / total
        terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)
        entropy = -terms.sum(0) / np.log(len(fires))
    return np.where((total > 0) & (len(fires) > 1), entropy, np.nan) + 0.0


class CoFiring(NamedTuple):
    """Co-firing of every latent in one pair of sites, [n] each.

    Attributes:
        cofires: rows in which both fire.
        share_a, share_b: of the rows in which that site fires, those in which both do; NaN when it never fires.
        jaccard: cofires / (fires in a + fires in b − cofires), the true union; NaN when neither fires.
        lift: cofires · n / (fires in a · fires in b); 1 is chance; NaN when one never fires.
        phi: correlation of the two binary firing vectors; 0 when one of them is constant.
        phi_low, phi_high: its 95 % interval, images resampled; NaN where none was asked for.
        correlation: Pearson's of the two codes over all rows; NaN when one is constant.
        p: one-sided chance of at least as many cofires with images paired at random (see `chance`).
        phi_place, p_place: the same within places (`phi_by_place`, `chance_by_place`), where images have several rows;
            NaN otherwise.
    """

    cofires: np.ndarray
    share_a: np.ndarray
    share_b: np.ndarray
    jaccard: np.ndarray
    lift: np.ndarray
    phi: np.ndarray
    phi_low: np.ndarray
    phi_high: np.ndarray
    correlation: np.ndarray
    p: np.ndarray
    phi_place: np.ndarray
    p_place: np.ndarray


def co_firing(fires_a: np.ndarray, fires_b: np.ndarray, cofires: np.ndarray, n: int) -> CoFiring:
    """Compare co-fires with what random pairing of n rows would give.

    φ = (n c − a b) / √(a (n − a) b (n − b)).

    Args:
        fires_a, fires_b: [latents] rows in which each site fires the latent.
        cofires: [latents] rows in which both do.
        n: rows; p is that of n images with one row each.
    """
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (fires_a, fires_b, cofires))
    spread, nothing = a * (n - a) * b * (n - b), np.full(len(a), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        union = a + b - c
        return CoFiring(
            cofires=np.asarray(cofires),
            share_a=np.where(a > 0, c / a, np.nan),
            share_b=np.where(b > 0, c / b, np.nan),
            jaccard=np.where(union > 0, c / union, np.nan),
            lift=np.where(a * b > 0, c * n / (a * b), np.nan),
            phi=np.where(spread > 0, (n * c - a * b) / np.sqrt(spread), 0.0),
            phi_low=nothing,
            phi_high=nothing,
            correlation=nothing,
            p=chance(a, b, c, n),
            phi_place=nothing,
            p_place=nothing,
        )


def phi_by_place(fires_a: np.ndarray, fires_b: np.ndarray, cofires: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return the correlation of two binary firing vectors within places, [latents]; 0 when one is constant there.

        φ_place = Σ_s (c_s − a_s b_s / n_s) / √(Σ_s a_s (n_s − a_s) / n_s · Σ_s b_s (n_s − b_s) / n_s)

    (both vectors centred by place: what depends on the place alone correlates with nothing).

    Args:
        fires_a, fires_b, cofires: [places, latents] rows.
        n: [places] rows.
    """
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (fires_a, fires_b, cofires))
    rows = np.maximum(np.asarray(n, dtype=np.float64), 1.0)[:, None]
    common = (c - a * b / rows).sum(0)
    spread = (a * (rows - a) / rows).sum(0) * (b * (rows - b) / rows).sum(0)
    return np.where(spread > 1e-9, common / np.sqrt(np.where(spread > 1e-9, spread, 1.0)), 0.0)


def benjamini_hochberg(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Return q values over the tested latents; 1 for the others."""
    q = np.ones(len(p))
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q


class Classes(NamedTuple):
    """What every latent is, [n] each, and the evidence.

    Attributes:
        category: one of `CATEGORIES`.
        positional: [n] bool, co-fires with some pair's φ and q, but not within places: its place explains it.
        fires_in: [m, n] bool, counts as firing in that site.
        entropy: firing entropy over the class sites.
        pairs: co-firing per pair of class sites.
        q: per pair, over the latents firing in both.
        q_all: over the latents that fire in every site, of the maximum p over pairs.
    """

    category: np.ndarray
    positional: np.ndarray
    fires_in: np.ndarray
    entropy: np.ndarray
    pairs: dict[Pair, CoFiring]
    q: dict[Pair, np.ndarray]
    q_all: np.ndarray


def classify(
    counts: FiringCounts, sites: Sequence[str], thresholds: ProbesConfig, resamples: Resamples | None = None
) -> Classes:
    """Put every latent into one of six classes, over `sites` (one per model).

    `universal`: fires in all, FE ≥ .9, φ ≥ .2 for every pair and q < .01, where p is the maximum over pairs and
    Benjamini–Hochberg runs over the latents that fire in every site. `partial`: some pair with φ ≥ .2 and q < .01
    (per pair, over the latents firing in both), but not universal. `chance`: fires in ≥ 2, no such pair. `specific`:
    fires in one, and in each other site at less than `min_rate_ratio` of that rate. `rare`: fires, but under
    `min_fires` where it would have to be seen to say which of these it is. `dead`: never fires.

    `min_fires` counts images. Where they have several rows, p is that of one drawn row per image, everything else that
    of all rows; and φ and p must hold within places, too: both are then the weaker of the two.

    Args:
        counts: firing statistics of held-out rows.
        sites: the class sites, in order.
        thresholds: `min_fires`, `min_rate_ratio`, `entropy`, `phi`, `q`.
        resamples: of the groups of images in `counts`, for the intervals of φ; default: none are made.
    """
    fires = np.stack([counts.fires[site] for site in sites])
    busiest = fires.max(0)
    images = np.stack([counts.images[site] for site in sites])
    often = fires >= thresholds.min_rate_ratio * busiest
    fires_in = (images >= thresholds.min_fires) & often
    silent = (fires == 0) | ~often
    entropy = firing_entropy(fires)
    pairs = {pair: _pair(counts, pair, resamples) for pair in combinations(sites, 2)}
    index = {site: i for i, site in enumerate(sites)}
    both = {(a, b): fires_in[index[a]] & fires_in[index[b]] for a, b in pairs}
    p = {key: np.fmax(pair.p, pair.p_place) for key, pair in pairs.items()}  # fmax leaves NaN aside
    phi = {key: np.fmin(pair.phi, pair.phi_place) for key, pair in pairs.items()}
    q = {key: benjamini_hochberg(p[key], both[key]) for key in pairs}
    everywhere = fires_in.all(0) & (len(sites) > 1)
    worst = np.max(list(p.values()), axis=0) if pairs else np.ones(counts.n_latents)
    q_all = benjamini_hochberg(worst, everywhere)
    strong = np.all([phi[key] >= thresholds.phi for key in pairs], axis=0) if pairs else everywhere
    universal = everywhere & (np.nan_to_num(entropy) >= thresholds.entropy) & strong & (q_all < thresholds.q)
    some, positional = (np.zeros(counts.n_latents, dtype=bool) for _ in range(2))
    for key, pair in pairs.items():
        shown = (phi[key] >= thresholds.phi) & (q[key] < thresholds.q)
        some |= shown
        positional |= ~shown & (pair.phi >= thresholds.phi) & (benjamini_hochberg(pair.p, both[key]) < thresholds.q)
    number = fires_in.sum(0)
    specific = (number == 1) & (fires_in | silent).all(0)
    conditions = [universal, some, number >= 2, specific, busiest > 0]
    category = np.select(conditions, CATEGORIES[:5], default="dead")
    return Classes(category, positional, fires_in, entropy, pairs, q, q_all)


def split_latents(
    decoders: Mapping[str, np.ndarray], classes: Classes, sites: Sequence[str], cosine: float
) -> np.ndarray:
    """Mark latents of one site whose decoder rows in all sites equal those of a latent of another site.

    Such a pair stands in the place of one shared latent, and R² does not show it.

    Args:
        decoders: {site: W_dec [n, d_in]}.
        classes: what `classify` found over the same sites.
        sites: the class sites.
        cosine: least cosine of the two rows, in every site.

    Returns:
        [n] bool.
    """
    unit = {site: _unit_rows(decoders[site]) for site in sites}
    split = np.zeros(len(classes.category), dtype=bool)
    specific = {site: (classes.category == "specific") & classes.fires_in[i] for i, site in enumerate(sites)}
    for a, b in combinations(sites, 2):
        of_a, of_b = np.flatnonzero(specific[a]), np.flatnonzero(specific[b])
        if not len(of_a) or not len(of_b):
            continue
        least = np.min([unit[site][of_a] @ unit[site][of_b].T for site in sites], axis=0)
        split[of_a[(least >= cosine).any(1)]] = True
        split[of_b[(least >= cosine).any(0)]] = True
    return split


def _pair(counts: FiringCounts, pair: Pair, resamples: Resamples | None) -> CoFiring:
    (a, b), kept = pair, pair if pair in counts.cofires else (pair[1], pair[0])
    found = co_firing(counts.fires[a], counts.fires[b], counts.cofires[kept], counts.n_rows)
    found = found._replace(correlation=counts.correlation(kept))
    if resamples and counts.by_group:
        low, high = resamples.phi(counts.by_group, kept)
        found = found._replace(phi_low=low, phi_high=high)
    drawn = counts.drawn
    if drawn is counts:
        return found
    found = found._replace(p=chance(drawn.fires[a], drawn.fires[b], drawn.cofires[kept], drawn.n_rows))
    if not (counts.by_place and drawn.by_place):
        return found
    places, one = ((by.fires[a], by.fires[b], by.cofires[kept], by.n) for by in (counts.by_place, drawn.by_place))
    return found._replace(phi_place=phi_by_place(*places), p_place=chance_by_place(*one))


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12))
