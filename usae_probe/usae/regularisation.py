"""How strongly a training is kept from learning its rows by heart, by the dimensions of each site and the rows.

Cross-reconstruction overfits long before self-reconstruction does. A linear map fitted to n rows of d dimensions loses
about d / n of its R² on new rows; both remedies here follow that ratio, so that they fade where rows are plenty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..config import TrainConfig

DECAY = 60.0
"""`weight_decay = "auto"`: times d_in / training rows."""
DROPOUT = 1.25
"""`latent_dropout = "auto"`: times d_in / training rows."""
MOST_DROPOUT = 0.25


class Regularisation(NamedTuple):
    """What keeps each site from overfitting.

    Attributes:
        decay: {site: decoupled weight decay of its encoder, per unit of learning rate}.
        dropout: {site: share of the active latents of its code that are left out at random}.
    """

    decay: Mapping[str, float]
    dropout: Mapping[str, float]


def regularisation(how: TrainConfig, d_in: Mapping[str, int], n_rows: int) -> Regularisation:
    """Return weight decay and dropout by site; `auto` is 60 d_in / n_rows, and 1.25 d_in / n_rows up to .25.

    Args:
        how: `weight_decay` and `latent_dropout`.
        d_in: {site: dimensions}.
        n_rows: training rows.
    """
    ratio = {site: d / max(1, n_rows) for site, d in d_in.items()}
    decay, dropout = how.weight_decay, how.latent_dropout
    return Regularisation(
        decay={site: DECAY * r if decay == "auto" else float(decay) for site, r in ratio.items()},
        dropout={
            site: min(MOST_DROPOUT, DROPOUT * r) if dropout == "auto" else float(dropout) for site, r in ratio.items()
        },
    )
