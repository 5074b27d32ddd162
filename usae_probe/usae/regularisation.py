"""How strongly a training is kept from learning its rows by heart, by the dimensions of each site and the rows.

Cross-reconstruction overfits long before self-reconstruction does. A linear map fitted to n rows of d dimensions loses
about d / n of its R² on new rows; both remedies here follow that ratio, so that they fade where rows are plenty. Decay
is of a site's own encoder, so its own d counts; a code is decoded to all sites, so dropout goes by their mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..config import TrainConfig

DECAY = 60.0
"""`weight_decay = "auto"`: times d_in / training rows."""
MOST_DECAY = 0.2
"""Share of an encoder that `auto` takes away in a step, at most: with few rows it would be more than there is."""
DROPOUT = 3.4
"""`latent_dropout = "auto"`: times the sites' mean d_in / training rows."""
MOST_DROPOUT = 0.35


class Regularisation(NamedTuple):
    """What keeps a training from overfitting.

    Attributes:
        decay: {site: decoupled weight decay of its encoder, per unit of learning rate}.
        dropout: share of the active latents of every code that are left out at random.
    """

    decay: Mapping[str, float]
    dropout: float


def regularisation(how: TrainConfig, d_in: Mapping[str, int], n_rows: int) -> Regularisation:
    """Return weight decay by site and dropout.

    `auto` is 60 d_in / n_rows, up to .2 / lr, and 3.4 mean(d_in) / n_rows, up to .35.

    Args:
        how: `weight_decay`, `latent_dropout` and `lr`.
        d_in: {site: dimensions}.
        n_rows: training rows.
    """
    ratio = {site: d / max(1, n_rows) for site, d in d_in.items()}
    decay, dropout = how.weight_decay, how.latent_dropout
    if dropout == "auto":
        dropout = min(MOST_DROPOUT, DROPOUT * sum(ratio.values()) / len(ratio))
    return Regularisation(
        decay={
            site: min(DECAY * r, MOST_DECAY / how.lr) if decay == "auto" else float(decay) for site, r in ratio.items()
        },
        dropout=float(dropout),
    )
