"""Cross-scores by hand and against a slow comparison, failures, transfer under the null, verdicts by their rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from usae_probe.probes import Exemplars, NaturalActivations, Overlap
from usae_probe.probes.cam import CamPicture, CrossScore, best_restarts, judge, transfers
from usae_probe.probes.cam.verify import compared, failed, rate_matched
from usae_probe.probes.natural import SiteNatural


def natural(values: np.ndarray, rate: np.ndarray, sd: np.ndarray | None = None) -> NaturalActivations:
    """Activations of all latents at site a/x, [rows, n]."""
    z = np.maximum(values, 0)
    site = SiteNatural(
        {k: k for k in range(values.shape[1])},
        z,
        values,
        values.mean(axis=0),
        values.std(axis=0) if sd is None else sd,
        rate,
    )
    return NaturalActivations({"a/x": site}, np.arange(len(values)), np.zeros(len(values), dtype=np.int8), None)


def test_a_comparison_by_hand() -> None:
    # latent 0: activations −1, 0, 1, 4, mean 1, sd √(14/4) ≈ 1.87083; latents 1, 2, 3 with mean 0 and sd 1
    values = np.array([[-1.0, 1, 1, 1], [0, -1, -1, -1], [1, 1, 1, 1], [4, -1, -1, -1]])
    found = natural(values, rate=np.array([0.5, 0.4, 0.01, 0.0]))
    one = compared(found, "a/x", 0, 2.0, np.array([2.0, 0.5, 0.6, 9.0]), n_controls=100)
    assert one.score == pytest.approx((2 - 1) / math.sqrt(3.5))
    assert (one.percentile, one.n, one.above_all) == (75.0, 4, False)
    assert one.ratio == pytest.approx((2 - 1) / (4 - 1))
    # .5345 σ is above latent 1 (.5) and not above latent 2 (.6); latent 3 never fires and is no control
    assert (one.transfer, one.n_controls) == (0.5, 2)
    nearest = compared(found, "a/x", 0, 2.0, np.array([2.0, 0.5, 0.6, 9.0]), n_controls=1)
    assert (nearest.transfer, nearest.n_controls) == (1.0, 1)  # latent 1, of rate .4, is nearer than .01
    above = compared(found, "a/x", 0, 4.01, np.zeros(4), 100)
    assert (above.percentile, above.above_all) == (100.0, True)
    equal = compared(found, "a/x", 0, 4.0, np.zeros(4), 100)
    assert (equal.percentile, equal.above_all) == (75.0, False)  # as strong as the strongest is not above it
    unknown = compared(None, "a/x", 0, 4.0, np.zeros(4), 100)
    assert all(map(math.isnan, (unknown.score, unknown.percentile, unknown.ratio, unknown.transfer)))
    assert (unknown.n, unknown.above_all, unknown.n_controls) == (0, False, 0)


def test_controls_fire_about_as_often() -> None:
    rate = np.array([0.10, 0.0, 0.11, 0.4, 0.09, 0.001, 0.2])
    site = natural(np.zeros((2, 7)), rate, sd=np.ones(7)).sites["a/x"]
    # ratios to .10: 1.1, 4, 1/.9 = 1.11, 100, 2
    assert rate_matched(site, 0, 4).tolist() == [2, 4, 6, 3]
    assert rate_matched(site, 1, 2).tolist() == [5, 4]  # one that never fires: the rarest
    assert 1 not in rate_matched(site, 0, 99)
    assert len(rate_matched(natural(np.zeros((2, 2)), np.zeros(2), np.ones(2)).sites["a/x"], 0, 9)) == 0


def test_transfer_under_the_null_is_uniform_and_finds_what_is_planted() -> None:
    """Pictures that do to the latent what they do to any: shares of 0 to 1. With 3 σ more: nearly all above .9."""
    rng = np.random.default_rng(0)
    found = natural(rng.normal(size=(500, 101)) * rng.uniform(0.5, 5, 101), np.full(101, 0.05))
    site = found.sites["a/x"]
    null, planted = [], []
    for _ in range(400):
        drive = site.mean + site.sd * (2 + rng.normal(size=101))  # it drives everything: out of distribution
        null.append(compared(found, "a/x", 0, float(drive[0]), drive, 100).transfer)
        strong = float(drive[0] + 3 * site.sd[0])
        planted.append(compared(found, "a/x", 0, strong, drive, 100).transfer)
    assert np.mean(null) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.array(null) >= 0.9) == pytest.approx(0.1, abs=0.04)
    assert np.mean(np.array(planted) >= 0.9) > 0.9


def score(
    percentile: float = 100.0, above: bool = True, transfer: float = 1.0, n: int = 50, of: float = 3.0
) -> CrossScore:
    return CrossScore(1.0, 1.0, True, of, percentile, n, above, 1.2, transfer, 100)


def picture(own: str, mode: Any = "independent", fail: bool | None = False, **scores: CrossScore) -> CamPicture:
    by_site = {f"{name}/x": value for name, value in scores.items()}
    sites = tuple(by_site) if mode == "joint" else (f"{own}/x",)
    nothing = np.zeros((2, 2, 3), dtype=np.uint8)
    return CamPicture(1, mode, sites, 0, nothing, {}, 0, by_site, fail)


def test_failure_by_hand() -> None:
    scores = {"a/x": score(), "b/x": score(98.0, False), "c/x": score(99.5, False)}
    assert failed(scores, ["a/x"], joint=False) is False
    assert failed(scores, ["c/x"], joint=False) is True  # 99.5 % is not every image
    assert failed(scores, ["a/x", "c/x"], joint=True) is False
    assert failed(scores, ["a/x", "b/x"], joint=True) is True
    assert failed({"a/x": score(n=0)}, ["a/x"], joint=False) is None


def exemplars(share: float, correlation: float, n: int = 20) -> Exemplars:
    pair = ("a/x", "b/x")
    return Exemplars({}, {}, {}, {pair: Overlap(round(share * n), n, 0.1)}, {pair: correlation})


AGREE = [picture("a", a=score(), b=score()), picture("b", a=score(), b=score())]
ALONE = [picture("a", a=score(), b=score(transfer=0.3)), picture("b", a=score(50.0, False), b=score())]
HALF = [AGREE[0], ALONE[1]]
FAILED = [AGREE[0], picture("b", fail=True, a=score(), b=score())]
UNCHECKED = [AGREE[0], picture("b", fail=None, a=score(), b=score())]


@pytest.mark.parametrize(
    ("share", "correlation", "pictures", "expected"),
    [
        (0.25, 0.0, AGREE, "same concept"),
        (0.0, 0.5, AGREE, "same concept"),
        (0.25, 0.9, HALF, "same concept, drawn differently"),
        (0.25, 0.9, ALONE, "same concept, drawn differently"),
        (0.05, 0.1, ALONE, "different"),
        (0.05, 0.1, HALF, "undecided"),  # other images, but one picture says the same
        (0.05, 0.1, AGREE, "undecided"),
        (0.1, 0.1, ALONE, "undecided"),  # neither the same nor other images
        (0.05, 0.3, ALONE, "undecided"),
        (0.9, 0.9, FAILED, "undecided"),
        (0.9, 0.9, UNCHECKED, "undecided"),
        (0.9, 0.9, [], "undecided"),
        (0.0, math.nan, ALONE, "different"),  # a code that never fires does not vary
    ],
)
def test_verdicts_follow_their_rule(
    share: float, correlation: float, pictures: list[CamPicture], expected: str
) -> None:
    verdict = judge(exemplars(share, correlation), pictures)
    assert verdict is not None
    assert verdict.judgement == expected
    assert verdict.n_pictures == len(pictures)


def test_a_verdict_shows_its_numbers() -> None:
    verdict = judge(exemplars(0.25, 0.9), [*ALONE, picture("", "joint", a=score(), b=score(transfer=0.0))])
    assert verdict is not None
    assert (verdict.overlap, verdict.correlation, verdict.transfer, verdict.percentile) == (0.25, 0.9, 0.3, 50.0)
    assert (verdict.n_transferring, verdict.n_pictures) == (0, 2)  # joint pictures say nothing of transfer
    assert judge(Exemplars({}, {}, {}, {}, {}), AGREE[:1]) is None


def test_of_three_models_the_least_alike_two_decide() -> None:
    pairs = {("a/x", "b/x"): (0.9, 0.9), ("a/x", "c/x"): (0.0, 0.05), ("b/x", "c/x"): (0.0, 0.05)}
    found = Exemplars(
        {}, {}, {}, {pair: Overlap(round(20 * share), 20, 0.1) for pair, (share, _) in pairs.items()},
        {pair: r for pair, (_, r) in pairs.items()},
    )  # fmt: skip
    verdict = judge(found, ALONE)
    assert verdict is not None
    assert verdict.judgement == "different"


def test_transfer_and_the_best_of_restarts() -> None:
    assert [transfers(each) for each in (*AGREE, *ALONE)] == [True, True, False, False]
    assert not transfers(picture("a", a=score(), b=score(89.0)))
    assert not transfers(picture("a", a=score(), b=score(transfer=math.nan)))
    weak, strong = picture("a", a=score(of=2.0), b=score()), picture("a", a=score(of=5.0), b=score())
    other = picture("b", a=score(), b=score(of=1.0))
    assert best_restarts([weak, other, strong]) == [strong, other]
