"""The contrastive term: codes of the same row by different sites are more alike than codes of different rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..shapes import RowMatrix
from ..world import current
from .model import USAE

MOST_ROWS = 256
"""Rows of a batch that the term compares, about: their codes are spread out, [256, n_latents]."""


def info_nce(a: Float[Tensor, "b n"], b: Float[Tensor, "b n"], temperature: float) -> Tensor:
    """Return the symmetric InfoNCE of paired rows (arXiv 1807.03748; both directions, as in 2103.00020).

        s_rt = cos(a_r, b_t) / τ,   ½ [ mean_r −log softmax_t(s_rt)[t = r]  +  mean_t −log softmax_r(s_rt)[r = t] ]

    log b when nothing tells the pairs apart; a row without an active latent has cosine 0 with every other.

    Args:
        a, b: codes of the same rows by two sites.
        temperature: τ > 0.
    """
    cosines = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T
    paired = torch.arange(len(a), device=a.device)
    logits = cosines / temperature
    return 0.5 * (functional.cross_entropy(logits, paired) + functional.cross_entropy(logits.T, paired))


def contrastive_loss(
    usae: USAE,
    x: Float[Tensor, "b D"],
    sites: Sequence[str],
    temperature: float,
    *,
    noisy: Callable[[RowMatrix], RowMatrix] | None = None,
    fixed: Collection[str] = (),
) -> Tensor:
    """Return the mean InfoNCE over all pairs of `sites`, each site's own code against the other's.

    Every ⌈b / MOST_ROWS⌉-th row of the batch stands for it, so that nothing of size [b, n_latents] is kept; they are
    encoded for this term, also in the alignment phase: it is each site's own choice of latents that is to agree. With
    several processes the rows of all of them are compared.

    Args:
        usae: the model.
        x: normalised rows of all sites side by side.
        sites: at least two.
        temperature: of the softmax.
        noisy: put between rows and encoder.
        fixed: sites whose codes are taken as given, without a gradient.
    """
    world, codes = current(), []
    stride = max(1, -(-len(x) * world.size // MOST_ROWS))
    for site in sites:
        with torch.set_grad_enabled(torch.is_grad_enabled() and site not in fixed):
            rows = x[::stride, usae.columns[site]]
            coded = usae.code(noisy(rows) if noisy else rows, site)
            empty = coded.values.new_zeros(len(rows), usae.n_latents)
            at = (coded.support.rows, coded.support.columns)
            codes.append(world.gather(empty.index_put(at, coded.values, accumulate=True)))
    return torch.stack([info_nce(a, b, temperature) for a, b in combinations(codes, 2)]).mean()
