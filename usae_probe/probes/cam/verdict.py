"""What the images and the pictures of a latent say together: is it one concept in all models?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..exemplars import Exemplars
from .picture import CamPicture

Judgement = Literal["same concept", "same concept, drawn differently", "different", "undecided"]
JUDGEMENTS: tuple[Judgement, ...] = get_args(Judgement)

SAME_OVERLAP, SAME_CORRELATION = 0.25, 0.5
OTHER_OVERLAP, OTHER_CORRELATION = 0.1, 0.2
TRANSFER, PERCENTILE = 0.9, 90.0

RULE = (
    f"The same images: every two models share {SAME_OVERLAP:.0%} of their strongest 20, or their codes correlate at "
    f"{SAME_CORRELATION}. Other images: some two share under {OTHER_OVERLAP:.0%} and correlate under "
    f"{OTHER_CORRELATION}. A picture transfers when every other model scores it above {PERCENTILE:.0f} % of natural "
    f"activations and above {TRANSFER:.0%} of the control latents. Same concept: the same images, and all pictures "
    "transfer. Drawn differently: the same images, and some do not. Different: other images, and none does. Undecided: "
    "else, and where a picture failed in its own model."
)


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of a latent; see `RULE`.

    Attributes:
        judgement: one of four.
        overlap: smallest share of strongest images over pairs of sites; NaN where a site has none.
        correlation: smallest of the codes, over pairs of sites; NaN where a code does not vary.
        transfer: smallest share of control latents below, over pictures of one model and the other models.
        percentile: smallest percentile among natural activations, likewise.
        n_transferring: pictures of one model that every other model agrees with.
        n_pictures: pictures of one model (the best restart of each site).
    """

    judgement: Judgement
    overlap: float
    correlation: float
    transfer: float
    percentile: float
    n_transferring: int
    n_pictures: int


def transfers(picture: CamPicture) -> bool:
    """Say whether every other model agrees with a picture of one."""
    return all(
        score.transfer >= TRANSFER and score.percentile >= PERCENTILE
        for site, score in picture.scores.items()
        if site not in picture.sites
    )


def judge(exemplars: Exemplars, pictures: Iterable[CamPicture]) -> Verdict | None:
    """Judge a latent by its images and its independent pictures; None for one site, which agrees with itself.

    Args:
        exemplars: of the latent, over all sites.
        pictures: of the latent; only independent ones count, and of restarts the best one.
    """
    if not exemplars.overlap:
        return None
    independent = best_restarts([picture for picture in pictures if picture.mode == "independent"])
    shares = [found.share for found in exemplars.overlap.values()]
    correlations = list(exemplars.correlation.values())
    elsewhere = [
        score for picture in independent for site, score in picture.scores.items() if site not in picture.sites
    ]
    pairs = list(zip(shares, correlations, strict=True))
    same = all(share >= SAME_OVERLAP or r >= SAME_CORRELATION for share, r in pairs)
    other = any(not share >= OTHER_OVERLAP and not r >= OTHER_CORRELATION for share, r in pairs)
    return Verdict(
        _judgement(same, other, independent),
        overlap=_least(shares),
        correlation=_least(correlations),
        transfer=_least([score.transfer for score in elsewhere]),
        percentile=_least([score.percentile for score in elsewhere]),
        n_transferring=sum(map(transfers, independent)),
        n_pictures=len(independent),
    )


def best_restarts(pictures: Sequence[CamPicture]) -> list[CamPicture]:
    """Return of each mode and site the picture that its own model scores highest, in the order of the first."""
    best: dict[tuple[str, tuple[str, ...]], CamPicture] = {}
    for picture in pictures:
        key = (picture.mode, picture.sites)
        if key not in best or picture.own.score > best[key].own.score:
            best[key] = picture
    return list(best.values())


def _judgement(same: bool, other: bool, independent: Sequence[CamPicture]) -> Judgement:
    if not independent or any(picture.failed is not False for picture in independent):
        return "undecided"
    agreed = [transfers(picture) for picture in independent]
    if same:
        return "same concept" if all(agreed) else "same concept, drawn differently"
    return "different" if other and not any(agreed) else "undecided"


def _least(values: Sequence[float]) -> float:
    """Return the smallest; NaN when one is not known, or there are none."""
    return math.nan if not values or any(map(math.isnan, values)) else min(values)
