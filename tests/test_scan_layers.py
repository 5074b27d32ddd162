"""Which layers a scan looks at: blocks are found, chosen evenly, by number or by glob, and mistakes are named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn

from usae_probe import HookedModel, attach
from usae_probe.config import ScanConfig
from usae_probe.errors import SiteError, UnknownLayerError, UsageError
from usae_probe.hooks import evenly
from usae_probe.probes.scan import choose_sites, depths_of
from usae_probe.sites import Site

VIT = {"img_size": 32, "depth": 6, "embed_dim": 48, "num_heads": 3}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = x + self.mix(self.body(x))
        return mixed


def net(n: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Sequential(*(Block(4) for _ in range(n))), nn.Flatten())


def attached(module: nn.Module, name: str = "net", size: int = 16, **more: object) -> HookedModel:
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return attach(module, name=name, image_size=size, **plain, **more)  # type: ignore[arg-type]


@pytest.fixture
def model() -> Iterator[HookedModel]:
    with attached(net()) as hooked:
        yield hooked


def chosen(model: HookedModel, **how: object) -> list[str]:
    return [str(site) for site in choose_sites([model], ScanConfig.model_validate(how))[model.name]]


@pytest.mark.parametrize(
    ("name", "size", "options", "n", "first", "last"),
    [
        ("resnet18", 32, {}, 8, "layer1.0", "layer4.1"),
        ("vit_tiny_patch16_224", 32, VIT, 6, "blocks.0", "blocks.5"),
        ("convnext_atto", 64, {}, 12, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("tf_efficientnet_lite0", 64, {}, 16, "blocks.0.0", "blocks.6.0"),
        ("regnety_002", 64, {}, 13, "s1.b1", "s4.b7"),
        ("resnet10t", 32, {}, 4, "layer1.0", "layer4.0"),
    ],
)  # fmt: skip
def test_blocks_of_timm_models(name: str, size: int, options: dict[str, int], n: int, first: str, last: str) -> None:
    with attached(timm.create_model(name, pretrained=False, **options), size=size) as hooked:
        assert (len(hooked.blocks), hooked.blocks[0], hooked.blocks[-1]) == (n, first, last)


def test_blocks_are_not_their_parts(model: HookedModel) -> None:
    assert model.blocks == ("1.0", "1.1", "1.2", "1.3", "1.4")


def test_evenly_takes_the_last_and_keeps_order() -> None:
    assert evenly(range(12), 9) == [0, 1, 3, 4, 5, 7, 8, 9, 11]
    assert all(evenly(range(total), n)[-1] == total - 1 for total in (1, 5, 12) for n in (1, 3, 20))
    assert all(len(set(evenly(range(27), n))) == n for n in range(1, 28))


def test_depth_and_every(model: HookedModel) -> None:
    assert chosen(model) == [f"net/1.{i}" for i in range(5)]
    assert chosen(model, depth=2) == ["net/1.1", "net/1.4"]
    assert chosen(model, every=2) == ["net/1.0", "net/1.2", "net/1.4"]
    assert chosen(model, every=3) == ["net/1.1", "net/1.4"]
    assert chosen(model, depth=2, policy="patch") == ["net/1.1@patch", "net/1.4@patch"]
    assert chosen(model, depth=1, policy="mean") == ["net/1.4"]  # a map has no class token: mean is what pool is


def test_mean_is_said_where_there_is_a_class_token() -> None:
    with attached(timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT), "vit", 32) as vit:
        assert chosen(vit, depth=2, policy="mean") == ["vit/blocks.2@mean", "vit/blocks.5@mean"]
        assert chosen(vit, depth=2) == ["vit/blocks.2", "vit/blocks.5"]


def test_globs_come_in_order_of_depth(model: HookedModel) -> None:
    assert chosen(model, layers=["net/1.4", "net/1.*@patch"])[:2] == ["net/1.0@patch", "net/1.1@patch"]
    assert chosen(model, layers=["net/1.*.mix", "net/0"]) == ["net/0", *(f"net/1.{i}.mix" for i in range(5))]


def test_listed_layers() -> None:
    with attached(net(), layers=["1.3", "0"]) as hooked:
        assert chosen(hooked, depth=0) == ["net/0", "net/1.3"]


def test_relative_depth_counts_blocks(model: HookedModel) -> None:
    sites = {"net": model.expand(["0", "1.0.mix", "1.0", "1.4", "2"])}
    depths = depths_of([model], sites)
    assert depths == {"net/0": 0.0, "net/1.0.mix": 0.0, "net/1.0": 0.2, "net/1.4": 1.0, "net/2": 1.0}


def test_without_blocks_it_says_what_to_do() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with attached(plain) as hooked:
        assert hooked.blocks == ()
        with pytest.raises(UsageError, match=r"no blocks are found in model 'net'.*scan\.layers = \['net/"):
            chosen(hooked)
        assert chosen(hooked, layers=["net/*"]) == ["net/0", "net/1", "net/2"]
        assert hooked.relative_depth(Site("net", "0")) < hooked.relative_depth(Site("net", "2")) == 1.0


def test_mistakes_in_layers_are_named(model: HookedModel) -> None:
    with attached(net(), "other") as other:
        with pytest.raises(SiteError, match=r"there is no model 'nte'.*did you mean 'net'"):
            choose_sites([model, other], ScanConfig(layers=["nte/1.*"]))
        with pytest.raises(SiteError, match=r"names no layer of model 'other'.*'other/\*\*'"):
            choose_sites([model, other], ScanConfig(layers=["net/1.*"]))
    with pytest.raises(UnknownLayerError, match="no layer of model 'net' matches"):
        chosen(model, layers=["net/blocks.*"])
    with pytest.raises(SiteError, match="has no sites"):
        chosen(model, depth=0)
