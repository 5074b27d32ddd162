"""Matching the latents of two dictionaries: one to one, by the correlation of their codes or by their decoder rows."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from ..buffer import ActivationBuffer
from ..errors import UsageError
from ..split import SplitName
from ..usae import USAE
from .rows import check_sites, some_rows

GREEDY_ABOVE = 8192
"""Latents on either side above which `match` is greedy: the exact matching takes O(n³)."""
_BLOCK = 512
"""Rows of a product that are made at a time."""
_RANKED = 64
"""Columns of a row that the greedy matching ranks at a time."""


def match(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the one-to-one matching of rows with columns whose scores have the largest sum.

    Exact (Kuhn 1955; Munkres 1957), but where either side has more than `GREEDY_ABOVE` latents: there the largest score
    first (of equal ones that of the first row, then of the first column), then the largest of what is left, and so on.

    Args:
        score: [n_a, n_b]; NaN counts as −1.

    Returns:
        rows and columns of the min(n_a, n_b) pairs, int64, sorted by row.
    """
    known = np.where(np.isnan(score), -1.0, score).astype(score.dtype, copy=False)
    if max(known.shape) > GREEDY_ABOVE:
        return _greedy(known)
    rows, columns = linear_sum_assignment(known, maximize=True)
    return rows, columns


@torch.no_grad()
def code_matrix(
    usae: USAE, site: str, buffer: ActivationBuffer, split: SplitName, max_rows: int | None = None
) -> csr_array:
    """Encode the rows of one site and return their codes as a sparse matrix.

    Args:
        usae: a trained USAE or independent SAE.
        site: the site the rows come from.
        buffer: activations of (at least) that site.
        split: which rows.
        max_rows: at most so many, spread evenly over the split; all by default.

    Returns:
        [rows, n_latents] float32, rows in storage order: equal rows for equal buffer, split and `max_rows`. Stored are
        the fires, z > 0.

    Raises:
        BufferIntegrityError: when the buffer lacks the site, or has it with another width.
        SiteError: when the USAE does.
        UsageError: when `max_rows` is below 1.
    """
    usae.site_index(site)
    check_sites(usae, buffer, [site])
    if max_rows is not None and max_rows < 1:
        raise UsageError(f"{max_rows} rows were asked for; max_rows must be at least 1")
    counts, columns, data = [np.zeros(1, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for rows in some_rows(buffer, split, buffer.n_rows(split) if max_rows is None else max_rows, [site]):
        codes = usae.encode(torch.from_numpy(rows.values[site]), site)
        values, indices = (part.cpu().numpy() for part in codes)
        row, entry = np.nonzero(values > 0)
        counts.append(np.bincount(row, minlength=rows.n))
        columns.append(indices[row, entry].astype(np.int32))
        data.append(values[row, entry].astype(np.float32))
    pointers = np.concatenate(counts).cumsum()
    shape = (len(pointers) - 1, usae.n_latents)
    matrix = csr_array((np.concatenate(data), np.concatenate(columns), pointers), shape=shape)
    matrix.sort_indices()
    return matrix


def code_correlation(a: csr_array, b: csr_array) -> np.ndarray:
    """Return Pearson's correlation of every latent of one code with every latent of another over the same rows.

        r_kl = (Σ_i a_ik b_il / n − ā_k b̄_l) / (σ_k σ_l)

    Rows in which a latent is not active count, as z = 0 (arXiv 1511.07543 matches neurons like this). Sums are float64;
    no code is ever made dense.

    Args:
        a: [rows, n_a] codes, as `code_matrix` gives them.
        b: [rows, n_b] codes of the same rows.

    Returns:
        [n_a, n_b] float32, in [−1, 1]; 0 for a latent that does not vary.

    Raises:
        UsageError: when the numbers of rows differ.
    """
    n = a.shape[0]
    if b.shape[0] != n:
        raise UsageError(
            f"codes of {n} and of {b.shape[0]} rows cannot be correlated",
            hint="encode the same rows: equal buffer, split and max_rows",
        )
    found = np.zeros((a.shape[1], b.shape[1]), dtype=np.float32)
    if not n:
        return found
    left, mean_a, weight_a = _standard(a)
    right, mean_b, weight_b = _standard(b)
    left = left.T.tocsr()
    for start in range(0, len(found), _BLOCK):
        part = slice(start, start + _BLOCK)
        covariance = (left[part] @ right).toarray() / n - np.outer(mean_a[part], mean_b)
        found[part] = np.clip(covariance * weight_a[part, None] * weight_b, -1.0, 1.0)
    return found


def decoder_cosines(a: USAE, b: USAE, latents_a: Sequence[int], latents_b: Sequence[int]) -> np.ndarray:
    """Return how alike latents of two USAEs are in the decoder in which they are least alike.

        c_kl = min_i cos(W_dec,k^i of a, W_dec,l^i of b)        over all sites i; a zero row has cosine 0.

    Args:
        a: one USAE.
        b: another with the same sites.
        latents_a: numbers of latents of `a`.
        latents_b: numbers of latents of `b`.

    Returns:
        [len(latents_a), len(latents_b)] float32.

    Raises:
        UsageError: when their sites differ, or for a latent out of range.
    """
    if a.d_in != b.d_in:
        raise UsageError(
            f"the decoders of two USAEs with different sites cannot be compared: {_named(a)}, and {_named(b)}",
            hint="train both on the same sites",
        )
    least = np.ones((len(latents_a), len(latents_b)), dtype=np.float32)
    for site in a.sites:
        rows, others = _unit_decoder(a, site, latents_a), _unit_decoder(b, site, latents_b)
        for start in range(0, len(least), _BLOCK):
            part = slice(start, start + _BLOCK)
            np.minimum(least[part], rows[part] @ others.T, out=least[part])
    return least


class FoundAgain(NamedTuple):
    """How many latents of one USAE another has too.

    Attributes:
        share: of the first one's latents; NaN when there are none.
        n: latents of the first.
        cosine: least cosine in every decoder.
        median: of the matched pairs' cosines in the decoder in which each is least alike; NaN without a pair.
    """

    share: float
    n: int
    cosine: float
    median: float


def found_again(
    a: USAE, b: USAE, latents_a: Sequence[int], latents_b: Sequence[int], cosine: float = 0.7
) -> FoundAgain:
    """Say which share of the latents of one USAE another one has too: trained with another seed, say.

    Latents are matched one to one by `match(decoder_cosines(…))`. One that is left without a partner is not found.
    After Paulo & Belrose (arXiv 2501.16615), with the decoders of all sites.

    Args:
        a: one USAE.
        b: another with the same sites.
        latents_a: numbers of latents of `a`: its universal ones, say.
        latents_b: numbers of latents of `b` that may be their partners.
        cosine: least cosine of a latent and its partner, in every decoder.

    Raises:
        UsageError: when their sites differ, or for a latent out of range.
    """
    cosines = decoder_cosines(a, b, latents_a, latents_b)
    n, matched = len(latents_a), cosines[match(cosines)]
    share = int((matched >= cosine).sum()) / n if n else math.nan
    return FoundAgain(share, n, cosine, float(np.median(matched)) if len(matched) else math.nan)


class Counterparts(NamedTuple):
    """How many latents of an independent SAE a USAE has among its universal ones.

    Attributes:
        share: of the independent SAE's latents; NaN when there are none.
        random: the same share of as many random directions.
        n: latents of the independent SAE.
    """

    share: float
    random: float
    n: int


def counterparts(
    independent: USAE,
    usae: USAE,
    universal: Sequence[int],
    *,
    live: Sequence[int] | None = None,
    cosine: float = 0.7,
    seed: int = 0,
) -> Counterparts:
    """Say which share of an independent SAE's latents have a universal latent with about their decoder row.

    Several may have the same one. `random` is the share of isotropic Gaussian rows, as many as there are latents: what
    the directions of so many universal latents cover by chance.

    Args:
        independent: an SAE with one site.
        usae: a USAE that has that site.
        universal: numbers of its universal latents.
        live: latents of the independent SAE that count; all by default.
        cosine: least cosine of the two rows at that site.
        seed: of the random rows.

    Raises:
        UsageError: when `independent` has several sites, `usae` lacks its site (SiteError) or has it with another
            width, or for a latent out of range.
    """
    if len(independent.sites) != 1:
        raise UsageError(
            f"an independent SAE has one site, this one has {len(independent.sites)}: {', '.join(independent.sites)}",
            hint="give one of those that train_independent returns",
        )
    (site,) = independent.sites
    usae.site_index(site)
    if independent.d_in[site] != usae.d_in[site]:
        raise UsageError(
            f"site '{site}' has d_in = {independent.d_in[site]} in the independent SAE, {usae.d_in[site]} in the USAE",
            hint="train both on the same buffer",
        )
    rows = _unit_decoder(independent, site, range(independent.n_latents) if live is None else live)
    others = _unit_decoder(usae, site, universal)
    drawn = np.random.default_rng(seed).standard_normal(rows.shape, dtype=np.float32)
    return Counterparts(_share_near(rows, others, cosine), _share_near(_unit(drawn), others, cosine), len(rows))


def _greedy(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match the largest score first.

    The heap has one pair of each row that is free: its best when it was looked up. A column taken since is replaced by
    the row's next, so what is at the top and free is the largest of all.
    """
    free = np.ones(score.shape[1], dtype=bool)
    ranked = [iter(_ranked(score[row], free)) for row in range(len(score))]

    def best_of(row: int) -> tuple[float, int, int]:
        column = next((column for column in ranked[row] if free[column]), None)
        if column is None:
            ranked[row] = iter(_ranked(score[row], free))
            column = next(ranked[row])
        return -float(score[row, column]), row, column

    partner = np.full(len(score), -1, dtype=np.int64)
    heap = [best_of(row) for row in range(len(score))] if len(free) else []
    heapq.heapify(heap)
    for _ in range(min(score.shape)):
        while not free[heap[0][2]]:
            heapq.heapreplace(heap, best_of(heap[0][1]))
        _, row, column = heapq.heappop(heap)
        partner[row], free[column] = column, False
    rows = np.flatnonzero(partner >= 0)
    return rows, partner[rows]


def _ranked(scores: np.ndarray, free: np.ndarray) -> list[int]:
    """Return the free columns with the largest scores, at most `_RANKED`: largest first, the first of equal ones."""
    columns = np.flatnonzero(free)
    values = scores[columns]
    if len(values) > _RANKED:
        enough = np.flatnonzero(values >= np.partition(values, -_RANKED)[-_RANKED])
        columns, values = columns[enough], values[enough]
    best: list[int] = columns[np.argsort(-values, kind="stable")[:_RANKED]].tolist()
    return best


def _standard(codes: csr_array) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Return codes as float64 with the mean and 1 / σ of every latent; 0 for 1 / σ of one that does not vary."""
    n, width = codes.shape
    exact = codes.astype(np.float64, copy=True)
    exact.sum_duplicates()
    varies = exact.max(axis=0).toarray().ravel() > exact.min(axis=0).toarray().ravel()
    mean = np.bincount(exact.indices, weights=exact.data, minlength=width) / n
    # One that is active in every row may vary little about a large mean, and E[z²] − E[z]² would lose it.
    everywhere = np.bincount(exact.indices, minlength=width) == n
    exact.data -= np.where(everywhere, mean, 0.0)[exact.indices]
    mean = np.where(everywhere, 0.0, mean)
    variance = np.bincount(exact.indices, weights=exact.data**2, minlength=width) / n - mean**2
    return exact, mean, np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)


def _unit_decoder(usae: USAE, site: str, latents: Sequence[int]) -> np.ndarray:
    """Return the decoder rows of some latents at length 1, [len(latents), d_in] float32."""
    usae.check_latents(latents)
    rows = usae.decoder(site).detach()[torch.as_tensor(list(latents), dtype=torch.long)]
    return _unit(rows.cpu().float().numpy())


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def _share_near(rows: np.ndarray, others: np.ndarray, cosine: float) -> float:
    """Return the share of rows that have a cosine of at least `cosine` with one of the others."""
    blocks = range(0, len(rows), _BLOCK)
    near = sum(int((rows[start : start + _BLOCK] @ others.T >= cosine).any(1).sum()) for start in blocks)
    return near / len(rows) if len(rows) else math.nan


def _named(usae: USAE) -> str:
    return ", ".join(f"{site} [{d}]" for site, d in usae.d_in.items())
