"""Is a shared dictionary needed? Independent SAEs, their latents matched afterwards, put through the same test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from ..buffer import ActivationBuffer
from ..config import ProbesConfig
from ..split import SplitName
from ..usae import USAE
from .firing import Fires, FiringCounts
from .matching import code_correlation, code_matrix, match
from .nulls import KeptFires
from .rows import rows_per_image, whole_images
from .universality import CATEGORIES, classify


class PostHoc(NamedTuple):
    """Latents of independent SAEs, matched one to one, and what the co-firing test says of the pairs.

    Attributes:
        matched_on: the rows whose codes were correlated.
        n_pairs: matched pairs (or tuples, of more sites).
        counts: pairs per class, on held-out rows, as for the latents of a USAE.
        null: universal pairs with images paired at random after matching, in the mean.
    """

    matched_on: SplitName
    n_pairs: int
    counts: dict[str, int]
    null: float | None


@torch.no_grad()
def matched_afterwards(
    saes: Mapping[str, USAE],
    buffer: ActivationBuffer,
    *,
    config: ProbesConfig,
    matched_on: SplitName = "holdout",
    split: SplitName = "holdout",
) -> PostHoc:
    """Match the latents of independent SAEs by the correlation of their codes, and test the pairs for co-firing.

    Every site's latents are matched with those of the first one (`match`); pair k takes the place of latent k in
    `classify`. Matched on the rows that the test then uses, it is optimistic: partners were chosen for co-firing there.
    Matched on training rows it is not; independent SAEs have seen no pairing.

    Args:
        saes: {site: independent SAE}, two or more.
        buffer: paired activations.
        config: thresholds.
        matched_on: rows whose codes are correlated (of training rows, at most `train_rows`).
        split: rows of the test.
    """
    sites = tuple(saes)
    first, n_latents = sites[0], saes[sites[0]].n_latents
    place = partners(saes, buffer, matched_on, config.train_rows if matched_on == "train" else None)
    places = rows_per_image(buffer, sites)
    draw = None if places == 1 else np.random.default_rng(config.seed)
    counts = FiringCounts(sites, n_latents, config.tau, draw, pairs=list(combinations(sites, 2)), places=places)
    kept = KeptFires(sites, n_latents)
    for rows in whole_images(buffer, split, sites):
        fires = {}
        for site, sae in saes.items():
            row, latent, z = Fires.of(sae.encode(torch.from_numpy(rows.values[site]), site), config.tau)
            at = place[site][latent]
            fires[site] = Fires(row[at >= 0], at[at >= 0], z[at >= 0])
        counts.add_fires(fires, rows.n, rows.image_index, rows.token_index)
        kept.add(fires, rows.n, rows.image_index, rows.token_index)
    category = classify(counts, sites, config).category
    null = kept.nulls(config, places)
    return PostHoc(
        matched_on,
        min(n_latents, *(int((place[site] >= 0).sum()) for site in sites if site != first)),
        {name: int((category == name).sum()) for name in CATEGORIES},
        null.universal if null else None,
    )


def partners(
    saes: Mapping[str, USAE], buffer: ActivationBuffer, split: SplitName, max_rows: int | None
) -> dict[str, torch.Tensor]:
    """Return, by site, the latent of the first site that each latent is matched with; −1 where it has no partner."""
    sites: Sequence[str] = tuple(saes)
    codes = code_matrix(saes[sites[0]], sites[0], buffer, split, max_rows)
    place = {sites[0]: torch.arange(saes[sites[0]].n_latents)}
    for site in sites[1:]:
        other = code_matrix(saes[site], site, buffer, split, max_rows)
        rows, columns = match(code_correlation(codes, other))
        place[site] = torch.full((saes[site].n_latents,), -1)
        place[site][torch.from_numpy(columns)] = torch.from_numpy(rows)
    return place
