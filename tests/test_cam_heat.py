"""Heat maps: exact for a linear model, by place where there are places, and for whom there is no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import usae_probe as up
from usae_probe.probes.cam import chosen_targets, heat_maps
from usae_probe.probes.cam.heat import gradient_times_input

from .cam_world import MEAN, STD, dictionary, network

pytestmark = pytest.mark.usefixtures("one_thread")
GIVEN: dict[str, Any] = {"image_size": 32, "mean": MEAN, "std": STD, "crop_pct": 1.0}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result.flatten(1)


def test_of_a_linear_model_the_map_sums_to_what_the_input_adds() -> None:
    """z_pre(x) − z_pre(0) = Σ ∂z_pre/∂x · x exactly; and pixel by pixel it is w x."""
    with up.attach(Linear(), name="m", layers=["layer@mean"], **GIVEN) as model:
        usae = dictionary({"m/layer@mean": 8}, double=False)
        (target,) = chosen_targets(usae, [model], None)
        x = torch.randn(2, 3, 32, 32)
        maps = heat_maps(target, x, [3, 7])
        with torch.no_grad():
            found, at_zero = (
                usae.pre_activation(model.rows(batch)["m/layer@mean"], "m/layer@mean", [3, 7]).diagonal()
                for batch in (x, torch.zeros_like(x))
            )
            torch.testing.assert_close(maps.sum(dim=(1, 2)), found - at_zero, rtol=1e-4, atol=1e-5)
            weight = usae.W_enc[0][3] @ model.module.layer.weight.flatten(1) / usae.scale[0]  # type: ignore
            torch.testing.assert_close(maps[0], (weight.reshape(3, 32, 32) * x[0]).sum(dim=0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layer"), [("resnet", "layer3@patch"), ("vit", "blocks.0@patch"), ("vit", "blocks.0@all")]
)
def test_by_place_a_map_shows_every_places_own_activation(kind: str, layer: str) -> None:
    with up.attach(network(kind), name=kind, layers=[layer], **GIVEN) as model:
        (site,) = model.sites
        usae = dictionary({str(site): model.d_in(site)}, double=False)
        (target,) = chosen_targets(usae, [model], None)
        x = torch.randn(2, 3, 32, 32)
        maps = heat_maps(target, x, [3, 7])
        with torch.no_grad():
            rows = model.rows(x)[str(site)]
            z_pre = usae.pre_activation(rows, str(site), [3, 7]).reshape(2, -1, 2)
        side = 2 if kind == "resnet" else 4
        own = torch.stack([z_pre[0, :, 0], z_pre[1, :, 1]])[:, -side * side :].reshape(2, side, side)
        step = 32 // side
        centres = maps.unfold(1, step, step).unfold(2, step, step)[
            ..., step // 2 - 1 : step // 2 + 1, step // 2 - 1 : step // 2 + 1
        ]
        assert maps.min() >= 0
        # a place's middle, between four pixels of the enlarged map, is nearly its own value
        torch.testing.assert_close(centres.mean(dim=(-1, -2)), own.relu(), rtol=0.2, atol=0.2 * float(own.abs().max()))
        assert (centres.mean(dim=(-1, -2)) - own.relu()).abs().mean() < 0.05 * own.abs().max()


def test_a_map_that_has_no_gradient_is_empty() -> None:
    module = Linear()
    module.requires_grad_(False)
    inner = module.layer.forward
    module.layer.forward = lambda x: inner(x.detach())  # type: ignore[method-assign]
    with up.attach(module, name="m", layers=["layer@mean"], **GIVEN) as model:
        usae = dictionary({"m/layer@mean": 8}, double=False)
        usae.requires_grad_(False)
        (target,) = chosen_targets(usae, [model], None)
        assert (gradient_times_input(target, torch.randn(1, 3, 32, 32), [3]) == 0).all()
