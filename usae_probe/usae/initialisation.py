"""Data initialisation: the first dictionary is made of paired training rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..buffer import ActivationBuffer
from ..config import TrainConfig
from .draws import PAIRING, ROWS
from .model import USAE


def initialise_from_data(usae: USAE, buffer: ActivationBuffer, how: TrainConfig) -> None:
    """Put training rows into encoders and decoders, drawn by `how.seed`.

    Rows are drawn without repetition. Unless rows are paired by image, the parts of a decoder row come from different
    rows, so that the mispaired controls start from nothing that is paired.

    Args:
        usae: the model, in place; on any device.
        buffer: where its training rows are.
        how: `seed` and `pairing`.
    """
    sites, n_rows = list(usae.sites), buffer.rows_at_start()
    if not n_rows:  # a ring that has dropped them: the training goes on from a state
        return
    draw = np.random.default_rng((how.seed, ROWS))
    chosen = draw.permutation(n_rows)[: usae.n_latents]
    rows = buffer.gather("train", chosen, sites).values
    if how.pairing != "image":
        apart = np.random.default_rng((how.seed, PAIRING, 0))
        rows = {site: rows[site][apart.permutation(len(chosen))] for site in sites}
    put_rows(usae, rows, seed=how.seed)


@torch.no_grad()
def put_rows(usae: USAE, rows: Mapping[str, np.ndarray], *, seed: int) -> None:
    """Make latent k's decoder row from paired row k: W_dec,k = √M · x̃_k / ‖x̃_k‖ over all sites side by side.

    Encoders are tied: W_enc,i = the columns of site i. Biases stay as they are. With more latents than rows the latents
    left over get mixtures a x̃_r + (1 − a) x̃_t of two of the rows, a ~ U(.25, .75); a row that is the mean (norm 0)
    gives a random direction.

    Args:
        usae: the model, in place.
        rows: {site: [r, d_in]}, r ≥ 1, in the models' own units; those after the first n_latents are not used.
        seed: of the mixtures.
    """
    device = usae.W_dec.device
    x = torch.cat([usae.normalise(torch.as_tensor(rows[site], device=device), site) for site in usae.sites], dim=1)
    generator = torch.Generator().manual_seed(seed)
    directions = _enough(x[: usae.n_latents], usae.n_latents, generator)
    norms = directions.norm(dim=1, keepdim=True)
    other = torch.randn(directions.shape, generator=generator).to(directions)
    directions = torch.where(norms > 1e-6, directions, other)
    usae.W_dec.copy_(math.sqrt(len(usae.sites)) * torch.nn.functional.normalize(directions, dim=1))
    for index, site in enumerate(usae.sites):
        usae.W_enc[index].copy_(usae.decoder(site))


def _enough(x: Float[Tensor, "r D"], n: int, generator: torch.Generator) -> Float[Tensor, "n D"]:
    """Return the rows, and mixtures of two of them until there are n."""
    missing = n - len(x)
    if missing <= 0:
        return x
    one = torch.randint(len(x), (missing,), generator=generator)
    apart = 1 + torch.randint(max(1, len(x) - 1), (missing,), generator=generator)
    other = (one + apart) % len(x)  # another row, where there is one
    share = (0.25 + 0.5 * torch.rand(missing, 1, generator=generator)).to(x)
    return torch.cat([x, share * x[one.to(x.device)] + (1.0 - share) * x[other.to(x.device)]])
