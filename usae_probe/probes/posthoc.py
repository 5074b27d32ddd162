"""Is a shared dictionary needed? Independent SAEs, their latents matched afterwards, put through the same test."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from ..buffer import ActivationBuffer
from ..config import ProbesConfig
from ..split import SplitName
from ..usae import USAE
from .firing import Fires, FiringCounts
from .matching import code_correlation, code_matrix, match
from .nulls import KeptFires
from .rows import rows_per_image, whole_images
from .universality import CATEGORIES, classify

MATCHED_ANEW = 3
"""Pairings for the null of latents that are matched on the tested rows: each takes a matching of its own."""


class PostHoc(NamedTuple):
    """Latents of independent SAEs, matched one to one, and what the co-firing test says of the pairs.

    Attributes:
        matched_on: the rows whose codes were correlated.
        n_pairs: matched pairs (or tuples, of more sites).
        counts: pairs per class, on held-out rows, as for the latents of a USAE.
        null: universal pairs with the tested images paired at random, in the mean; matched on them, they are paired
            before matching, so that this is what matching makes up.
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
    sites, n_latents = tuple(saes), next(iter(saes.values())).n_latents
    most = config.train_rows if matched_on == "train" else None
    place = partners({site: code_matrix(sae, site, buffer, matched_on, most) for site, sae in saes.items()})
    places = rows_per_image(buffer, sites)
    draw = None if places == 1 else np.random.default_rng(config.seed)
    counts = FiringCounts(sites, n_latents, config.tau, draw, pairs=list(combinations(sites, 2)), places=places)
    kept = KeptFires(sites, n_latents)
    for rows in whole_images(buffer, split, sites):
        values = {site: torch.from_numpy(x) for site, x in rows.values.items()}
        fires = {site: Fires.of(sae.encode(values[site], site), config.tau) for site, sae in saes.items()}
        counts.add_fires(_placed(fires, place), rows.n, rows.image_index, rows.token_index)
        kept.add(fires, rows.n, rows.image_index, rows.token_index)
    if matched_on == split:
        few = config.model_copy(update={"nulls": min(config.nulls, MATCHED_ANEW)})
        null = kept.nulls(few, places, renamed=partial(_matched_anew, saes))
    else:
        null = kept.nulls(config, places, renamed=lambda fires, _: _placed(fires, place))
    category = classify(counts, sites, config).category
    n_pairs = min(n_latents, *(int((place[site] >= 0).sum()) for site in sites[1:]))
    by_class: dict[str, int] = {name: int((category == name).sum()) for name in CATEGORIES}
    return PostHoc(matched_on, n_pairs, by_class, null.universal if null else None)


def partners(codes: Mapping[str, csr_array]) -> dict[str, Tensor]:
    """Return, by site, the latent of the first site that each latent is matched with; −1 where it has no partner.

    Args:
        codes: {site: [rows, its latents]}, two or more, of the same rows.
    """
    first, *others = codes
    place = {first: torch.arange(codes[first].shape[1])}
    for site in others:
        rows, columns = match(code_correlation(codes[first], codes[site]))
        place[site] = torch.full((codes[site].shape[1],), -1)
        place[site][torch.from_numpy(columns)] = torch.from_numpy(rows)
    return place


def _placed(fires: Mapping[str, Fires], place: Mapping[str, Tensor]) -> dict[str, Fires]:
    """Return the fires with each latent in the place of its partner, without those that have none."""
    found = {}
    for site, (row, latent, z) in fires.items():
        at = place[site][latent]
        found[site] = Fires(row[at >= 0], at[at >= 0], z[at >= 0])
    return found


def _matched_anew(saes: Mapping[str, USAE], fires: Mapping[str, Fires], n: int) -> dict[str, Fires]:
    """Match the latents on these n rows, however they are paired."""
    codes = {
        site: csr_array((z.numpy(), (row.numpy(), latent.numpy())), shape=(n, saes[site].n_latents))
        for site, (row, latent, z) in fires.items()
    }
    return _placed(fires, partners(codes))
