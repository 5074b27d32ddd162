"""Slow float64 versions of kernels, losses and measures, straight from the formulas: what the fast ones must equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from usae_probe.usae import USAE, Codes


class Parameters(NamedTuple):
    """Float64 leaves of a USAE by site: w_enc [n, d], b_enc [n], w_dec [n, d], b_dec [d]."""

    w_enc: dict[str, Tensor]
    b_enc: dict[str, Tensor]
    w_dec: dict[str, Tensor]
    b_dec: dict[str, Tensor]

    @classmethod
    def of(cls, usae: USAE) -> Parameters:
        def leaf(value: Tensor) -> Tensor:
            return value.detach().double().clone().requires_grad_()

        numbered = list(enumerate(usae.sites))
        return cls(
            {site: leaf(usae.W_enc[i]) for i, site in numbered},
            {site: leaf(usae.b_enc[i]) for i, site in numbered},
            {site: leaf(usae.W_dec[:, usae.columns[site]]) for _, site in numbered},
            {site: leaf(usae.b_dec[usae.columns[site]]) for _, site in numbered},
        )

    def z_pre(self, x: Tensor, site: str) -> Tensor:
        """z_pre = (x − b_dec) W_encᵀ + b_enc."""
        return (x - self.b_dec[site]) @ self.w_enc[site].T + self.b_enc[site]

    def decode(self, z: Tensor, site: str) -> Tensor:
        """x_hat = z W_dec + b_dec."""
        return z @ self.w_dec[site] + self.b_dec[site]


def largest(z_pre: Tensor, k: int) -> Tensor:
    """Which entries of each row are among its k largest, [b, n] bool."""
    mask = torch.zeros_like(z_pre, dtype=torch.bool)
    for row in range(len(z_pre)):
        numbers = z_pre[row].tolist()
        ranked = sorted(range(len(numbers)), key=lambda latent: -numbers[latent])
        mask[row, ranked[:k]] = True
    return mask


def at(x: Tensor, w_enc: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    """values[r, j] = relu(x_r · w_enc[indices[r, j]] + bias[indices[r, j]]), entry by entry."""
    rows, k = indices.shape
    entries = [
        torch.clamp(x[r] @ w_enc[indices[r, j]] + bias[indices[r, j]], min=0.0) for r in range(rows) for j in range(k)
    ]
    return torch.stack(entries).reshape(rows, k) if entries else x.new_zeros(rows, k) + 0 * x.sum()


def decode(values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
    """x_hat_r = Σ_j values[r, j] w_dec[indices[r, j]], entry by entry."""
    rows, k = indices.shape
    sums = [torch.stack([values[r, j] * w_dec[indices[r, j]] for j in range(k)]).sum(0) for r in range(rows)]
    return torch.stack(sums) if sums else values.new_zeros(0, w_dec.shape[1]) + 0 * values.sum()


def source_loss(
    p: Parameters, x: Mapping[str, Tensor], source: str, k: int, dead: Tensor, aux_k: int, aux_coef: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Total, normalised MSE by target and auxiliary term of one source."""
    z_pre = p.z_pre(x[source], source)
    z = torch.relu(z_pre) * largest(z_pre, k)
    error = {site: x[site] - p.decode(z, site) for site in x}
    mse = {site: (e**2).sum() / e.numel() for site, e in error.items()}
    aux = torch.zeros((), dtype=torch.float64)
    if dead.any() and aux_k and aux_coef:
        ranked = torch.where(dead, z_pre.detach(), torch.tensor(-math.inf, dtype=torch.float64))
        z_dead = torch.relu(z_pre) * (largest(ranked, aux_k) & dead)
        for site, e in error.items():
            residual = e.detach()
            aux = aux + ((residual - z_dead @ p.w_dec[site]) ** 2).sum() / (residual**2).sum()
    return sum(mse.values()) + aux_coef * aux, mse, aux


def alignment_loss(
    p: Parameters, x: Mapping[str, Tensor], k: int, sources: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and normalised MSE by target, over sources (all) with one support: the top k of their Σ_i z_pre,i."""
    z_pre = {site: p.z_pre(x[site], site) for site in sources or x}
    mask = largest(sum(z_pre.values()), k)
    mse = {site: torch.zeros((), dtype=torch.float64) for site in x}
    for source in z_pre:
        z = torch.relu(z_pre[source]) * mask
        for target in x:
            error = x[target] - p.decode(z, target)
            mse[target] = mse[target] + (error**2).sum() / error.numel() / len(z_pre)
    return sum(mse.values()), mse


def dense_codes(usae: USAE, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """z of every site, [rows, n_latents] float64, from raw rows."""
    p, codes = Parameters.of(usae), {}
    for i, site in enumerate(usae.sites):
        mean, scale = usae.mean[usae.columns[site]].double(), float(usae.scale[i])
        z_pre = p.z_pre((torch.from_numpy(rows[site]).double() - mean) / scale, site).detach()
        codes[site] = (torch.relu(z_pre) * largest(z_pre, usae.k)).numpy()
    return codes


def r2(usae: USAE, rows: Mapping[str, np.ndarray], *, about: str = "dimension") -> dict[str, dict[str, float]]:
    """1 − SSE/SST per source and target, in raw units; SST about the per-dimension mean or one `scalar` mean."""
    p, codes, result = Parameters.of(usae), dense_codes(usae, rows), {}
    for source in usae.sites:
        result[source] = {}
        for j, target in enumerate(usae.sites):
            x = rows[target].astype(np.float64)
            mean = usae.mean[usae.columns[target]].double().numpy()
            x_hat = p.decode(torch.from_numpy(codes[source]), target).detach().numpy() * float(usae.scale[j]) + mean
            sst = ((x - (x.mean(0) if about == "dimension" else x.mean())) ** 2).sum()
            result[source][target] = 1 - ((x - x_hat) ** 2).sum() / sst if sst > 0 else math.nan
    return result


def spread(codes: Codes, n_latents: int) -> np.ndarray:
    """z as a dense [rows, n_latents] float64 matrix, entry by entry."""
    z = np.zeros((len(codes.values), n_latents))
    for row, (values, indices) in enumerate(zip(codes.values.tolist(), codes.indices.tolist(), strict=True)):
        for value, latent in zip(values, indices, strict=True):
            z[row, latent] = value
    return z


def firing_entropy(fires: Sequence[int]) -> float:
    """−Σ p log p / log M of one latent's fires by site."""
    if sum(fires) == 0 or len(fires) == 1:
        return math.nan
    shares = [f / sum(fires) for f in fires]
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(fires))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two boolean vectors."""
    return (a & b).sum() / (a | b).sum() if (a | b).any() else math.nan


def lift(a: np.ndarray, b: np.ndarray) -> float:
    """P(A, B) / (P(A) P(B))."""
    return (a & b).mean() / (a.mean() * b.mean()) if a.any() and b.any() else math.nan


def phi(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two boolean vectors; 0 when one is constant."""
    x, y = a - a.mean(), b - b.mean()
    return (x @ y) / math.sqrt((x @ x) * (y @ y)) if 0 < a.sum() < len(a) and 0 < b.sum() < len(b) else 0.0


def auroc(z: Sequence[float], has: Sequence[bool]) -> float:
    """P(z⁺ > z⁻) + P(z⁺ = z⁻) / 2 over all pairs of a row with the value and one without."""
    pairs = [(a, b) for a, h in zip(z, has, strict=True) if h for b, g in zip(z, has, strict=True) if not g]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def chance_p(a: int, b: int, cofires: int, n: int) -> float:
    """P[H ≥ cofires], H hypergeometric: an exact sum of whole numbers."""
    ways = sum(math.comb(a, h) * math.comb(n - a, b - h) for h in range(cofires, min(a, b) + 1))
    return float(ways / math.comb(n, b))


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """q_i = min over p_j ≥ p_i of p_j · m / rank_j."""
    m = len(p)
    rank = {value: sum(other <= value for other in p) for value in p}
    return [min(1.0, min(other * m / rank[other] for other in p if other >= value)) for value in p]


def categories(
    fired: Mapping[str, np.ndarray],
    *,
    min_fires: int = 10,
    ratio: float = 0.1,
    entropy: float = 0.9,
    least_phi: float = 0.2,
    level: float = 0.01,
) -> list[str]:
    """Classes of all latents from dense firing, {site: [rows, n] bool}, one latent after the other."""
    sites, (n_rows, n) = list(fired), next(iter(fired.values())).shape
    pairs = list(combinations(sites, 2))
    fires = [{site: int(fired[site][:, k].sum()) for site in sites} for k in range(n)]
    within = [
        [s for s in sites if fires[k][s] >= min_fires and fires[k][s] / max(fires[k].values()) >= ratio]
        for k in range(n)
    ]
    p = {
        (k, a, b): chance_p(fires[k][a], fires[k][b], int((fired[a][:, k] & fired[b][:, k]).sum()), n_rows)
        for k in range(n)
        for a, b in pairs
    }
    strong = {(k, a, b): phi(fired[a][:, k], fired[b][:, k]) >= least_phi for k, a, b in p}
    q_pair: dict[tuple[int, str, str], float] = {}
    for a, b in pairs:
        both = [k for k in range(n) if a in within[k] and b in within[k]]
        q_pair |= {(k, a, b): q for k, q in zip(both, benjamini_hochberg([p[k, a, b] for k in both]), strict=True)}
    everywhere = [k for k in range(n) if len(within[k]) == len(sites) > 1]
    worst = [max(p[k, a, b] for a, b in pairs) for k in everywhere]
    q_all = dict(zip(everywhere, benjamini_hochberg(worst), strict=True))
    result = []
    for k in range(n):
        if (
            q_all.get(k, 1.0) < level
            and firing_entropy(list(fires[k].values())) >= entropy
            and all(strong[k, a, b] for a, b in pairs)
        ):
            result.append("universal")
        elif any(strong[k, a, b] and q_pair.get((k, a, b), 1.0) < level for a, b in pairs):
            result.append("partial")
        elif len(within[k]) >= 2:
            result.append("chance")
        elif len(within[k]) == 1 and all(
            fires[k][s] == 0 or fires[k][s] / max(fires[k].values()) < ratio for s in sites if s not in within[k]
        ):
            result.append("specific")
        else:
            result.append("rare" if max(fires[k].values()) else "dead")
    return result


class ClassesOfAtoms(NamedTuple):
    """Live latents that have the decoder rows of a planted atom, and the share of them with the class that it has."""

    matched: int
    right: float


def classes_of_atoms(
    shared: Mapping[str, np.ndarray],
    private: Mapping[str, np.ndarray],
    decoders: Mapping[str, np.ndarray],
    categories: Sequence[str],
    fires_in: Sequence[Sequence[str]],
    *,
    cosine: float = 0.9,
) -> ClassesOfAtoms:
    """Latent by latent: the atom with the largest cosine, in the least alike of its models' decoders; is it named so?

    An atom that all models have makes a `universal` latent, one of a single model a `specific` one that fires there.

    Args:
        shared, private: {site: atoms [n, d], unit vectors}; shared atom i is row i of every site.
        decoders: {site: W_dec [n, d]}.
        categories, fires_in: of each latent; rare and dead ones do not count.
        cosine: least cosine of a latent and its atom.
    """
    sites = tuple(decoders)
    atoms = [{site: shared[site][i] for site in sites} for i in range(len(shared[sites[0]]))]
    atoms += [{site: atom} for site in sites for atom in private[site]]
    unit = {}
    for site, rows in decoders.items():
        unit[site] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    right = []
    for latent, category in enumerate(categories):
        if category in ("rare", "dead"):
            continue
        fit = [min(float(unit[site][latent] @ vector) for site, vector in atom.items()) for atom in atoms]
        best = max(range(len(atoms)), key=lambda i: fit[i])
        if fit[best] < cosine:
            continue
        owners = tuple(atoms[best])
        expected = "universal" if len(owners) == len(sites) else "specific"
        right.append(category == expected and tuple(fires_in[latent]) == owners)
    return ClassesOfAtoms(len(right), sum(right) / len(right) if right else math.nan)
