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
from .firing import FiringCounts, Pair

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
        jaccard: cofires / (fires in a + fires in b − cofires), the true union; NaN when neither fires.
        lift: cofires · n / (fires in a · fires in b); 1 is chance; NaN when one never fires.
        phi: correlation of the two binary firing vectors; 0 when one of them is constant.
        p: one-sided chance of at least as many cofires with images paired at random (see `chance`).
    """

    cofires: np.ndarray
    jaccard: np.ndarray
    lift: np.ndarray
    phi: np.ndarray
    p: np.ndarray


def co_firing(fires_a: np.ndarray, fires_b: np.ndarray, cofires: np.ndarray, n: int) -> CoFiring:
    """Compare co-fires with what random pairing of n rows would give.

    φ = (n c − a b) / √(a (n − a) b (n − b)).

    Args:
        fires_a, fires_b: [latents] rows in which each site fires the latent.
        cofires: [latents] rows in which both do.
        n: rows; p is that of n images with one row each.
    """
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (fires_a, fires_b, cofires))
    spread = a * (n - a) * b * (n - b)
    with np.errstate(invalid="ignore", divide="ignore"):
        union = a + b - c
        jaccard = np.where(union > 0, c / union, np.nan)
        lift = np.where(a * b > 0, c * n / (a * b), np.nan)
        phi = np.where(spread > 0, (n * c - a * b) / np.sqrt(spread), 0.0)
    return CoFiring(np.asarray(cofires), jaccard, lift, phi, chance(a, b, c, n))


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
    tested = (c > 0) & (a > 0) & (b > 0)
    p[tested] = stats.hypergeom.sf(c[tested] - 1, n, a[tested], b[tested])
    return np.clip(p, 0.0, 1.0)


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
        fires_in: [m, n] bool, counts as firing in that site.
        entropy: firing entropy over the class sites.
        pairs: co-firing per pair of class sites.
        q: per pair, over the latents firing in both.
        q_all: over the latents that fire in every site, of the maximum p over pairs.
    """

    category: np.ndarray
    fires_in: np.ndarray
    entropy: np.ndarray
    pairs: dict[Pair, CoFiring]
    q: dict[Pair, np.ndarray]
    q_all: np.ndarray


def classify(counts: FiringCounts, sites: Sequence[str], thresholds: ProbesConfig) -> Classes:
    """Put every latent into one of six classes, over `sites` (one per model).

    `universal`: fires in all, FE ≥ .9, φ ≥ .2 for every pair and q < .01, where p is the maximum over pairs and
    Benjamini–Hochberg runs over the latents that fire in every site. `partial`: some pair with φ ≥ .2 and q < .01
    (per pair, over the latents firing in both), but not universal. `chance`: fires in ≥ 2, no such pair. `specific`:
    fires in one. `rare`: fires, but under `min_fires` everywhere. `dead`: never fires.

    `min_fires` counts images. Where they have several rows, p is that of one drawn row per image, everything else that
    of all rows.

    Args:
        counts: firing statistics of held-out rows.
        sites: the class sites, in order.
        thresholds: `min_fires`, `min_rate_ratio`, `entropy`, `phi`, `q`.
    """
    fires = np.stack([counts.fires[site] for site in sites])
    busiest = fires.max(0)
    images = np.stack([counts.images[site] for site in sites])
    fires_in = (images >= thresholds.min_fires) & (fires >= thresholds.min_rate_ratio * busiest)
    entropy = firing_entropy(fires)
    pairs = {(a, b): _pair(counts, a, b) for a, b in combinations(sites, 2)}
    index = {site: i for i, site in enumerate(sites)}
    q = {(a, b): benjamini_hochberg(pair.p, fires_in[index[a]] & fires_in[index[b]]) for (a, b), pair in pairs.items()}
    everywhere = fires_in.all(0) & (len(sites) > 1)
    worst = np.max([pair.p for pair in pairs.values()], axis=0) if pairs else np.ones(counts.n_latents)
    q_all = benjamini_hochberg(worst, everywhere)
    strong = np.all([pair.phi >= thresholds.phi for pair in pairs.values()], axis=0) if pairs else everywhere
    universal = everywhere & (np.nan_to_num(entropy) >= thresholds.entropy) & strong & (q_all < thresholds.q)
    some = np.zeros(counts.n_latents, dtype=bool)
    for key, pair in pairs.items():
        some |= (pair.phi >= thresholds.phi) & (q[key] < thresholds.q)
    number = fires_in.sum(0)
    conditions = [universal, some, number >= 2, number == 1, busiest > 0]
    category = np.select(conditions, CATEGORIES[:5], default="dead")
    return Classes(category, fires_in, entropy, pairs, q, q_all)


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


def _pair(counts: FiringCounts, a: str, b: str) -> CoFiring:
    found = co_firing(counts.fires[a], counts.fires[b], _cofires(counts, a, b), counts.n_rows)
    drawn = counts.drawn
    if drawn is counts:
        return found
    return found._replace(p=chance(drawn.fires[a], drawn.fires[b], _cofires(drawn, a, b), drawn.n_rows))


def _cofires(counts: FiringCounts, a: str, b: str) -> np.ndarray:
    return counts.cofires[(a, b)] if (a, b) in counts.cofires else counts.cofires[(b, a)]


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12))
