"""What a training starts from: an untrained USAE that fits a buffer, the objective and its optimiser."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..buffer import ActivationBuffer
from ..config import TrainConfig, UsaeConfig
from ..config.sparsities import SPARSITY_KEYS, check_used
from ..errors import BufferIntegrityError, ConfigError
from ..world import World
from .initialisation import initialise_from_data
from .losses import Objective
from .model import USAE
from .optimiser import ConstrainedAdam
from .published import PublishedAdamW, PublishedObjective
from .regularisation import regularisation


def usae_for(
    buffer: ActivationBuffer,
    shape: UsaeConfig,
    how: TrainConfig,
    *,
    sites: list[str] | None = None,
    world: World | None = None,
) -> USAE:
    """Make an untrained USAE for a buffer: its sites, and mean and scale of its training rows.

    The scale makes E‖x̃‖² = d_in: s² = Σ_d variance_d / d_in. It is on the device that `world` has for `how.device`.

    Raises:
        BufferIntegrityError: when a site is not in the buffer or has no spread.
        ConfigError: for a setting of a sparsity that is not the one in use.
    """
    try:
        check_used(how.changed, shape.sparsity)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    chosen = list(buffer.sites) if sites is None else sites
    normalisation = {}
    for site in chosen:
        if site not in buffer.d_in:
            raise BufferIntegrityError(f"the buffer has no site '{site}'", hint=f"sites: {', '.join(buffer.sites)}")
        moments = buffer.moments(site)
        scale = math.sqrt(float(np.mean(moments.variance)))
        if not scale > 0:
            raise BufferIntegrityError(
                f"site '{site}' is constant over the {moments.n} training rows", hint="choose another layer"
            )
        normalisation[site] = (torch.from_numpy(moments.mean), scale)
    usae = USAE(
        {site: buffer.d_in[site] for site in chosen},
        shape.n_latents,
        shape.k,
        normalisation=normalisation,
        kernel=how.kernel,
        precision=how.precision,
        seed=how.seed,
        grid=next((buffer.specs[site].grid for site in chosen if buffer.specs[site].policy == "patch"), None),
        sparsity=shape.sparsity,
        sparsity_settings={key: getattr(how, key) for key in SPARSITY_KEYS.get(shape.sparsity, ())},
        matryoshka=shape.matryoshka,
    ).to((world or World()).device(how.device))
    if how.init == "data":
        initialise_from_data(usae, buffer, how)
    return usae


Engine = tuple[Objective, ConstrainedAdam] | tuple[PublishedObjective, PublishedAdamW]


def engine(usae: USAE, how: TrainConfig, n_rows: int) -> Engine:
    """Return what the steps of a recipe minimise, and by what.

    Args:
        usae: the model.
        how: the settings.
        n_rows: training rows, which the regularisation follows.

    Raises:
        ConfigError: when the recipe cannot be had for this USAE.
    """
    if how.recipe == "published":
        published = PublishedObjective(usae, how)
        return published, PublishedAdamW(published, how)
    against = regularisation(how, usae.d_in, n_rows)
    objective = Objective(usae, how, dropout=against.dropout)
    return objective, ConstrainedAdam(usae, how.grad_clip, weight_decay=against.decay)
