"""What `recipe = "published"` sets in `[train]` and what cannot be changed beside it, and tables of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PUBLISHED_START: Mapping[str, Any] = MappingProxyType(
    {"lr": 3e-4, "lr_final": 1e-6 / 3e-4, "grad_clip": 1.0, "weight_decay": 1e-5}
)
"""Keys of the published recipe that may be given beside it."""

PUBLISHED_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "loss": "l1",
        "source": "random",
        "update": "source",
        "site_weights": None,
        "self_share": "equal",
        "align_warmup": 0.0,
        "aux_k": 0,
        "contrastive_coef": 0.0,
        "input_noise": 0.0,
        "latent_dropout": 0.0,
        "init": "random",
        "ema": 0.0,
    }
)
"""Keys that make it the published recipe: another value beside it is refused."""

_BY_ROWS = ("weight_decay", "latent_dropout")  # "auto" is then the recipe's own value


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `[train]` with those that their `recipe` sets.

    Raises:
        ValueError: for a key that contradicts the recipe.
    """
    if given.get("recipe") != "published":
        return dict(given)
    asked = {key: value for key, value in given.items() if value != "auto" or key not in _BY_ROWS}
    for key, value in PUBLISHED_FIXED.items():
        if key in asked and asked[key] != value:
            expected = "nothing" if value is None else repr(value)
            raise ValueError(
                f"{key} = {given[key]!r} contradicts recipe = 'published', which has {expected} there: "
                f"leave {key} out, or the recipe"
            )
    return {**PUBLISHED_START, **asked, **PUBLISHED_FIXED}


def weights(given: Mapping[Any, Any]) -> dict[str, float]:
    """Return a table {site: weight} as floats.

    Args:
        given: the table.

    Raises:
        ValueError: for a weight that is no number or negative, naming the site, or where none is above 0.
    """
    for site, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"the weight of '{site}' is {weight!r}, expected a number")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of '{site}' is {weight}, expected a finite number of at least 0")
    if not any(given.values()):
        named = ", ".join(f"'{site}'" for site in given)
        raise ValueError(f"no weight is above 0 ({named or 'the table is empty'}): give one to a site at least")
    return {str(site): float(weight) for site, weight in given.items()}
