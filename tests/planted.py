"""Planted worlds: rows made of known atoms, so that what a USAE should find is known.

Two models see the same images. Each image has 6 of 128 *shared* concepts, present in both models (as another direction
in each, with the same strength), and in each model 2 of its own 64 *private* concepts. A row is

    x_i = Σ_shared c_s a_s^i + Σ_private c_p b_p^i + noise,   c ~ U(.5, 1.5), ‖a‖ = ‖b‖ = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from usae_probe.probes import UniversalityReport
from usae_probe.probes.records import LatentRecord
from usae_probe.usae import USAE

SITES = {"left/layer": 96, "right/layer": 128}
HARD_SITES = {"one/layer": 128, "two/layer": 160, "three/layer": 192}


class World(NamedTuple):
    """Rows by site, and the atoms that they are made of: [n_shared, d] and [n_private, d] by site."""

    rows: dict[str, np.ndarray]
    shared: dict[str, np.ndarray]
    private: dict[str, np.ndarray]


class Found(NamedTuple):
    """How much of a planted world a USAE found, as shares.

    Attributes:
        recall: shared atoms for which ONE latent has cosine ≥ .9 in BOTH decoders.
        universal: of those, with such a latent classed `universal` on held-out rows.
        private: by site, private atoms with a latent of cosine ≥ .9 there that has ≥ .9 of its fires there.
        n_universal, n_split: latents classed `universal`, and marked split.
        r2: R²[source][target] on held-out rows.
    """

    recall: float
    universal: float
    private: dict[str, float]
    n_universal: int
    n_split: int
    r2: dict[str, dict[str, float]]


def planted_world(
    seed: int,
    *,
    n: int = 20_000,
    sites: Mapping[str, int] = SITES,
    n_shared: int = 128,
    n_private: int = 64,
    active_shared: int = 6,
    active_private: int = 2,
    noise: float = 0.02,
) -> World:
    """Draw a world and n rows of it."""
    rng = np.random.default_rng(seed)
    shared = {site: _unit(rng.normal(size=(n_shared, d))) for site, d in sites.items()}
    private = {site: _unit(rng.normal(size=(n_private, d))) for site, d in sites.items()}
    world = World({}, shared, private)
    return world._replace(rows=_rows(world, rng, n, active_shared, active_private, noise))


def planted_rows(world: World, n: int, *, seed: int) -> dict[str, np.ndarray]:
    """Draw more rows of a world, with the numbers of active atoms and the noise of `planted_world`'s defaults."""
    return _rows(world, np.random.default_rng((seed, 2)), n, 6, 2, 0.02)


def _rows(
    world: World, rng: np.random.Generator, n: int, active_shared: int, active_private: int, noise: float
) -> dict[str, np.ndarray]:
    common = _strengths(rng, n, len(next(iter(world.shared.values()))), active_shared)
    rows = {}
    for site, shared in world.shared.items():
        own = _strengths(rng, n, len(world.private[site]), active_private)
        x = common @ shared + own @ world.private[site] + noise * rng.normal(size=(n, shared.shape[1]))
        rows[site] = x.astype(np.float32)
    return rows


class HardWorld(NamedTuple):
    """A world of three models: rows and atoms by site, and what kind each atom is.

    Attributes:
        rows: [n, d] by site.
        atoms: [n_atoms, d] by site; zero where the model does not have the atom.
        owners: for each atom the sites that have it.
        rate: for each atom the share of the rows that have it.
    """

    rows: dict[str, np.ndarray]
    atoms: dict[str, np.ndarray]
    owners: list[tuple[str, ...]]
    rate: np.ndarray


def hard_world(seed: int, *, n: int = 20_000, noise: float = 0.02) -> HardWorld:
    """Draw rows that are hard to take apart.

    128 atoms are shared by all three models, 32 by each two of them, 32 are private to each. Rates follow Zipf's law
    (rate ∝ rank^-.7, about 12 atoms a row), every model has an atom with a gain of its own (log-normal, σ = .5), 16
    pairs of the shared atoms are correlated (the second follows the first in 60 % of its rows), and one shared atom is
    dense (half of the rows).
    """
    rng = np.random.default_rng((seed, 1))
    sites = list(HARD_SITES)
    owners = [tuple(sites)] * 128
    owners += [pair for pair in combinations(sites, 2) for _ in range(32)]
    owners += [(site,) for site in sites for _ in range(32)]
    rate = rng.permutation(np.arange(1, len(owners) + 1) ** -0.7)
    rate = np.minimum(rate * 12 / rate.sum(), 0.25)
    rate[0] = 0.5
    on = rng.random((n, len(owners))) < rate
    for first in range(2, 34, 2):
        on[:, first + 1] |= on[:, first] & (rng.random(n) < 0.6)
    strength = on * rng.uniform(0.5, 1.5, size=on.shape)
    rows, atoms = {}, {}
    for site, d in HARD_SITES.items():
        has = np.array([site in names for names in owners])
        atoms[site] = _unit(rng.normal(size=(len(owners), d))) * has[:, None]
        gain = np.exp(0.5 * rng.normal(size=len(owners)))
        rows[site] = ((strength * gain) @ atoms[site] + noise * rng.normal(size=(n, d))).astype(np.float32)
    return HardWorld(rows, atoms, owners, on.mean(0))


def found_hard(world: HardWorld, usae: USAE, report: UniversalityReport, *, cosine: float = 0.9) -> dict[str, Any]:
    """Return how much of a hard world was found, by the number of models that share an atom.

    `recall` counts atoms for which one latent has cosine ≥ .9 in the decoder of every model that has the atom; `pure`
    those with such a latent that has ≥ .9 of its fires in those models and φ ≥ .5 between each two of them.
    """
    decoders = {site: _unit(usae.decoder(site).detach().double().numpy()) for site in usae.sites}
    cosines = {site: world.atoms[site] @ decoders[site].T for site in usae.sites}
    recall: dict[int, list[bool]] = {1: [], 2: [], 3: []}
    pure: dict[int, list[bool]] = {1: [], 2: [], 3: []}
    for atom, owners in enumerate(world.owners):
        fit = np.min([cosines[site][atom] for site in owners], axis=0) >= cosine
        recall[len(owners)].append(bool(fit.any()))
        pure[len(owners)].append(any(_is_pure(report.latents[k], owners) for k in np.flatnonzero(fit)))
    return {
        "recall": {f"shared by {m}": float(np.mean(hits)) for m, hits in recall.items()},
        "pure": {f"shared by {m}": float(np.mean(hits)) for m, hits in pure.items()},
        "counts": report.counts,
        "n_split": report.n_split,
        "r2": report.r2,
    }


def _is_pure(latent: LatentRecord, owners: tuple[str, ...]) -> bool:
    within = sum(latent.fires[site] for site in owners)
    pairs = [latent.pairs[a, b] for a, b in combinations(owners, 2)]
    return within >= 0.9 * max(sum(latent.fires.values()), 1) and within > 0 and all(pair.phi >= 0.5 for pair in pairs)


def found(world: World, usae: USAE, report: UniversalityReport, *, cosine: float = 0.9, own: float = 0.9) -> Found:
    """Compare a USAE and its report with the world that its rows were made of."""
    decoders = {site: _unit(usae.decoder(site).detach().double().numpy()) for site in usae.sites}
    both = np.min([world.shared[site] @ decoders[site].T for site in usae.sites], axis=0) >= cosine
    universal = np.array([record.category == "universal" for record in report.latents])
    fires = {site: np.array([record.fires[site] for record in report.latents]) for site in usae.sites}
    in_all = np.maximum(sum(fires.values()), 1)
    recalled = both.any(1)
    return Found(
        recall=float(recalled.mean()),
        universal=float(both[:, universal].any(1)[recalled].mean()) if recalled.any() else 0.0,
        private={
            site: float(
                ((world.private[site] @ decoders[site].T >= cosine) & (fires[site] / in_all >= own)).any(1).mean()
            )
            for site in usae.sites
        },
        n_universal=int(universal.sum()),
        n_split=report.n_split,
        r2=report.r2,
    )


def _strengths(rng: np.random.Generator, n: int, atoms: int, active: int) -> np.ndarray:
    """Return [n, atoms]: `active` of them in every row, U(.5, 1.5), else 0."""
    strengths = np.zeros((n, atoms))
    chosen = np.argpartition(rng.random((n, atoms)), active, axis=1)[:, :active]
    np.put_along_axis(strengths, chosen, rng.uniform(0.5, 1.5, size=chosen.shape), axis=1)
    return strengths


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def deep_world(seed: int, *, n: int = 2000, layers: int = 3, concepts: int = 36) -> dict[str, np.ndarray]:
    """Draw rows of two models of several layers each, in which what is shared moves on with depth.

    Concept j lives around depth p_j = j · layers / concepts, in both models: at layer l its strength is multiplied by
    exp(−((p_j − l − ½) / .8)²). So layer l of one model is most like layer l of the other, the less the further off.

    Returns:
        {site: [n, 24]}, sites `left/0`, `left/1`, …, `right/0`, …
    """
    rng = np.random.default_rng((seed, 3))
    strengths = _strengths(rng, n, concepts, 6)
    position = np.arange(concepts) * layers / concepts
    rows = {}
    for model in ("left", "right"):
        for layer in range(layers):
            weight = np.exp(-(((position - layer - 0.5) / 0.8) ** 2))
            atoms = _unit(rng.normal(size=(concepts, 24))) * weight[:, None]
            rows[f"{model}/{layer}"] = (strengths @ atoms + 0.02 * rng.normal(size=(n, 24))).astype(np.float32)
    return rows
