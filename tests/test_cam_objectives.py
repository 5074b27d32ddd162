"""What pictures are climbed for: every term by hand, with gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from usae_probe.config import CamConfig
from usae_probe.probes import NaturalActivations
from usae_probe.probes.cam.objectives import (
    Objective,
    Seen,
    Standard,
    distance_from_grey,
    likeness,
    mean_squared_frequency,
    softmin,
    total_variation,
)
from usae_probe.probes.cam.targets import Target
from usae_probe.probes.natural import SiteNatural
from usae_probe.sites import Site


def objective(mode: Any, sites: str = "ab", **settings: Any) -> Objective:
    """An objective over sites a/x, b/x of no model: enough to put activations together."""
    nothing: Any = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "__init__", lambda self, site: self.__dict__.update(site=site, model=nothing))
        aims = tuple(Target(Site.parse(f"{site}/x")) for site in sites)  # type: ignore[call-arg]
    return Objective(mode, aims, CamConfig(**settings))


def standards(**medians: float) -> dict[str, Standard]:
    return {
        f"{site}/x": Standard(torch.zeros(2), torch.ones(2), torch.full((2,), median), torch.ones(2))
        for site, median in medians.items()
    }


def test_modes_by_hand() -> None:
    score = {"a/x": torch.tensor([3.0, 1.0]), "b/x": torch.tensor([2.0, -1.0])}
    of = standards(a=0.0, b=0.5)
    assert objective("independent", "a").value(score, of).tolist() == [3.0, 1.0]
    # −2 log((e^−1.5 + e^−1)/2) = −2 (log(.22313 + .36788) − log 2) = 2.43795 at T = 2
    joint = objective("joint", softmin=2.0).value(score, of)
    assert joint[0].item() == pytest.approx(-2 * math.log((math.exp(-1.5) + math.exp(-1)) / 2))
    # b is 1.5 above its median in the first picture, below it in the second: 3 − 2 · 1.5 = 0, and 1
    assert objective("contrast", contrast=2.0).value(score, of).tolist() == [0.0, 1.0]


def test_the_soft_minimum_lies_between_minimum_and_mean() -> None:
    scores = torch.randn(3, 50, dtype=torch.float64)
    least, mean = scores.amin(dim=0), scores.mean(dim=0)
    for temperature in (0.01, 1.0, 100.0):
        found = softmin(scores, temperature)
        assert (found >= least).all()
        assert (found <= mean + 1e-12).all()
    torch.testing.assert_close(softmin(scores, 1e-4), least, rtol=0, atol=2e-4)
    torch.testing.assert_close(softmin(scores, 1e5), mean, rtol=0, atol=1e-4)
    assert torch.autograd.gradcheck(lambda s: softmin(s, 0.7), scores.requires_grad_())


def test_regularisers_by_hand() -> None:
    # levels 0 1 / 0 1 in all three colours: no step down, a step of 1 to the right
    stripes = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64).expand(1, 3, 2, 2)
    assert total_variation(stripes).item() == 1.0
    assert distance_from_grey(stripes).item() == 0.25
    assert mean_squared_frequency(stripes).item() == pytest.approx(0.25)  # all power at 1/2 cycle per pixel
    checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64).expand(1, 3, 2, 2)
    assert mean_squared_frequency(checks).item() == pytest.approx(0.5)  # 1/4 + 1/4: the most there is
    grey = torch.full((1, 3, 4, 5), 0.5, dtype=torch.float64)
    assert [float(f(grey)) for f in (total_variation, distance_from_grey, mean_squared_frequency)] == [0.0, 0.0, 0.0]


def test_a_wave_has_its_own_frequency() -> None:
    x = torch.arange(16, dtype=torch.float64)
    wave = (0.5 + 0.3 * torch.cos(2 * torch.pi * 3 * x / 16)).expand(1, 3, 8, 16)
    assert mean_squared_frequency(wave).item() == pytest.approx((3 / 16) ** 2)


@pytest.mark.parametrize("regulariser", [total_variation, distance_from_grey, mean_squared_frequency])
def test_gradients_of_regularisers(regulariser: Any) -> None:
    assert torch.autograd.gradcheck(regulariser, torch.rand(2, 3, 4, 5, dtype=torch.float64).requires_grad_())


def test_likeness_by_hand() -> None:
    # latent 7 has three pictures: (1, 0), (0, 1), (.6, .8); cosines 0, .6, .8. Latent 3 has one.
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    assert likeness(directions, [7, 7, 7, 3]).tolist() == pytest.approx([0.3, 0.4, 0.7, 0.0])


def test_standard_units_are_those_of_each_picture() -> None:
    values = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 90.0]], dtype=np.float32)
    site = SiteNatural({4: 0, 2: 1}, values, values, np.full(5, 3.0), np.array([1.0, 1, 2, 1, 4]), np.ones(5))
    natural = NaturalActivations({"a": site}, np.arange(3), np.zeros(3, dtype=np.int8), None)
    found = Standard.of(natural, "a", [2, 4, 2], torch.zeros((), dtype=torch.float64))
    assert found.sd.tolist() == [2.0, 4.0, 2.0]
    assert found.median.tolist() == [(20 - 3) / 2, (2 - 3) / 4, (20 - 3) / 2]
    z_pre = torch.tensor([5.0, 5.0, 1.0], dtype=torch.float64)
    assert found(z_pre).tolist() == [1.0, 0.5, -1.0]
    assert found.at([1]).sd.tolist() == [4.0]
    assert found.strongest.tolist() == [(90 - 3) / 2, (6 - 3) / 4, (90 - 3) / 2]
    plain = Standard.of(None, "a", [2, 4, 2], torch.zeros(()))
    assert plain(z_pre).tolist() == z_pre.tolist()


def test_regularisers_are_weighed_and_taken_off() -> None:
    pictures = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    seen = Seen({}, {})
    found = objective("independent", "a", tv=2.0, l2=3.0, spectrum=5.0).penalty(pictures, seen, [1, 2])
    parts: list[Tensor] = [total_variation(pictures), distance_from_grey(pictures), mean_squared_frequency(pictures)]
    torch.testing.assert_close(found, 2 * parts[0] + 3 * parts[1] + 5 * parts[2])
    assert objective("independent", "a").penalty(pictures, seen, [1, 2]).tolist() == [0.0, 0.0]
