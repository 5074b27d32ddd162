"""Token policies against values worked out by hand from the raw capture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from usae_probe import HookedModel, attach
from usae_probe.errors import SiteError, UsageError
from usae_probe.hooks import Layout, default_layout, to_rows

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, **SMALL, "qk_norm": True}, 32),
    "dynamic": ("vit_tiny_patch16_224", {"dynamic_img_size": True, **SMALL}, 64),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 32, **SMALL}, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, **SMALL}, 28),
    "average": ("vit_tiny_patch16_224", {"img_size": 32, **SMALL, "class_token": False, "global_pool": "avg"}, 32),
    "cait": ("cait_xxs24_224", {"img_size": 32, **SMALL}, 32),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 1, 1)},
        64,
    ),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 64),
    "resnet": ("test_resnet", {}, 64),
}


@contextmanager
def model(which: str) -> Iterator[HookedModel]:
    name, options, size = MODELS[which]
    with attach(f"timm:{name}", name="m", pretrained=False, options=options, image_size=size) as hooked:
        yield hooked


def raw_and_rows(which: str, layer: str, *policies: str) -> tuple[Tensor, list[Tensor]]:
    """The layer's output as it is, and its rows by each policy."""
    batch = torch.randn(3, 3, MODELS[which][2], MODELS[which][2])
    with model(which) as hooked:
        sites = hooked.expand([f"{layer}@{policy}" for policy in policies])
        rows = hooked.rows(batch, sites)
        raw = hooked.capture(batch, [layer])[layer]
        for site in sites:
            assert rows[str(site)].shape == (3, hooked.d_in(site))
    return raw, [rows[str(site)] for site in sites]


def info(hooked: HookedModel, layer: str) -> Any:
    return next(info for info in hooked.layers() if info.name == layer)


# --- values ---


@pytest.mark.parametrize(
    ("which", "layer", "prefix"),
    [
        ("vit", "blocks.1", 1),
        ("vit", "blocks.0.attn", 1),
        ("dynamic", "blocks.1", 1),
        ("deit", "blocks.1", 2),
        ("registers", "blocks.0", 5),
        ("registers", "norm", 5),
    ],
)
def test_tokens_with_a_class_token(which: str, layer: str, prefix: int) -> None:
    raw, (pool, cls, mean) = raw_and_rows(which, layer, "pool", "cls", "mean")
    places = 16 if which == "dynamic" else 4
    assert raw.shape == (3, prefix + places, 32)
    by_hand = torch.stack([raw[:, i] for i in range(prefix, prefix + places)]).sum(0) / places
    assert torch.equal(pool, raw[:, 0])
    assert torch.equal(cls, raw[:, 0])
    torch.testing.assert_close(mean, by_hand)
    assert not torch.allclose(mean, raw.mean(1))  # the prefix tokens would show


def test_the_patch_embedding_has_no_prefix() -> None:
    raw, (pool, mean) = raw_and_rows("vit", "patch_embed", "pool", "mean")
    assert raw.shape == (3, 4, 32)
    torch.testing.assert_close(pool, (raw[:, 0] + raw[:, 1] + raw[:, 2] + raw[:, 3]) / 4)
    assert torch.equal(pool, mean)
    with (
        model("vit") as hooked,
        pytest.raises(SiteError, match=r"@cls needs a class token, but the layer gives 0\+tokens"),
    ):
        hooked.expand(["patch_embed@cls"])


def test_tokens_without_a_class_token() -> None:
    raw, (pool, mean) = raw_and_rows("average", "blocks.1", "pool", "mean")
    assert raw.shape == (3, 4, 32)
    torch.testing.assert_close(pool, raw.sum(1) / 4)
    assert torch.equal(pool, mean)
    with model("average") as hooked, pytest.raises(SiteError, match="@cls needs a class token"):
        hooked.expand(["blocks.1@cls"])


def test_prefix_tokens_are_a_fact_of_the_layer() -> None:
    """CaiT's `blocks` have no class token, its `blocks_token_only` nothing else."""
    raw, (pool,) = raw_and_rows("cait", "blocks.1", "pool")
    torch.testing.assert_close(pool, raw.sum(1) / 4)
    raw, (pool, cls) = raw_and_rows("cait", "blocks_token_only.1", "pool", "cls")
    assert raw.shape == (3, 1, 32)
    assert torch.equal(pool, raw[:, 0])
    assert torch.equal(cls, raw[:, 0])
    raw, (pool, mean) = raw_and_rows("cait", "norm", "pool", "mean")
    assert raw.shape == (3, 5, 32)
    assert torch.equal(pool, raw[:, 0])
    torch.testing.assert_close(mean, raw[:, 1:].sum(1) / 4)
    with model("cait") as hooked:
        with pytest.raises(SiteError, match="@mean needs spatial tokens, but all 1 are prefix tokens"):
            hooked.expand(["blocks_token_only.0@mean"])
        with pytest.raises(SiteError, match="@cls needs a class token"):
            hooked.expand(["blocks.0@cls"])


@pytest.mark.parametrize("layer", ["layers.0", "layers.3", "norm", "patch_embed"])
def test_maps_with_channels_last(layer: str) -> None:
    raw, (pool, mean) = raw_and_rows("swin", layer, "pool", "mean")
    side, channels = {"layers.0": (16, 16), "patch_embed": (16, 16)}.get(layer, (2, 128))
    assert raw.shape == (3, side, side, channels)
    torch.testing.assert_close(pool, raw.flatten(1, 2).sum(1) / side**2)
    assert torch.equal(pool, mean)


def test_windows_of_all_pictures_are_no_rows() -> None:
    """Swin's window attention gives [b · windows, tokens, d]: its rows would not pair up with anything."""
    with model("swin") as hooked:
        assert info(hooked, "layers.0.blocks.0.attn").output_shape is None
        with pytest.raises(SiteError, match="the layer's output has no batch axis"):
            hooked.expand(["layers.0.blocks.0.attn.qkv"])


def test_heads_of_attention() -> None:
    batch = torch.randn(3, 3, 32, 32)
    with model("vit") as hooked:
        assert info(hooked, "blocks.0.attn.q_norm").output_shape == (2, 5, 16)
        assert str(info(hooked, "blocks.0.attn.q_norm").layout) == "heads.cls+tokens"
        raw = hooked.capture(batch, ["blocks.0.attn.q_norm", "blocks.0.attn.q_norm:1"])
        heads = raw["blocks.0.attn.q_norm"]
        assert torch.equal(raw["blocks.0.attn.q_norm:1"], heads[:, 1])
        sites = hooked.expand([f"blocks.0.attn.q_norm{end}" for end in ("", ":1", "@mean", ":0@patch", "@all")])
        assert [hooked.d_in(site) for site in sites] == [32, 16, 32, 16, 32]
        pool, one, mean, patch, every = hooked.rows(batch, sites).values()
    both = torch.cat([heads[:, 0], heads[:, 1]], dim=-1)  # [3, 5, 32]: the heads side by side
    assert torch.equal(pool, both[:, 0])
    assert torch.equal(one, heads[:, 1, 0])
    torch.testing.assert_close(mean, both[:, 1:].sum(1) / 4)
    assert torch.equal(patch, torch.cat([heads[i, 0, 1:] for i in range(3)]))
    assert torch.equal(every, torch.cat([both[i] for i in range(3)]))
    with model("vit") as hooked, pytest.raises(SiteError, match="head 2 of a layer that has 2 heads, numbered 0 to 1"):
        hooked.expand(["blocks.0.attn.q_norm:2"])


@pytest.mark.parametrize(
    ("which", "layer"), [("resnet", "layer1.0.bn2"), ("resnet", "layer4"), ("convnext", "stages.2")]
)
def test_maps_with_channels_first(which: str, layer: str) -> None:
    raw, (pool, mean) = raw_and_rows(which, layer, "pool", "mean")
    torch.testing.assert_close(pool, raw.flatten(2).sum(2) / raw[0, 0].numel())
    assert torch.equal(pool, mean)


def test_within_convnext_the_linear_layers_are_channels_last() -> None:
    with model("convnext") as hooked:
        layouts = {info.name: info.layout for info in hooked.layers()}
    assert layouts["stages.0.blocks.0.mlp.fc1"].kind == "nhwc"
    assert layouts["stages.0.blocks.0.conv_dw"].kind == "nchw"


def test_vectors_are_themselves() -> None:
    raw, (pool,) = raw_and_rows("resnet", "fc", "pool")
    assert torch.equal(pool, raw)
    with model("resnet") as hooked:
        with pytest.raises(SiteError, match="site 'm/fc@mean': @mean needs places, but the layer gives a vector"):
            hooked.expand(["fc@mean"])
        with pytest.raises(SiteError, match=r"@cls needs a class token, but the layer gives vector \[1000\]"):
            hooked.expand(["fc@cls"])
        with pytest.raises(SiteError, match="@cls needs a class token, but the layer gives nchw"):
            hooked.expand(["layer4@cls"])


def test_grids() -> None:
    with model("resnet") as hooked:
        assert hooked.grid(hooked.expand(["layer2"])[0]) == (8, 8)
        assert hooked.grid(hooked.expand(["fc"])[0]) is None
    with model("swin") as hooked:
        assert hooked.grid(hooked.expand(["layers.0"])[0]) == (16, 16)


# --- live modules that say nothing ---


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Lost(Tokens):
    """Cuts and transforms as no rule knows: tracing loses the axes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(super().forward(x).flatten(1)).real.reshape(len(x), 4, 6)


def test_tokens_that_a_live_module_makes_are_understood() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 8, 8), Tokens())
    with attach(module, name="m", image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) as hooked:
        assert info(hooked, "1").layout == Layout("tokens", prefix=0, grid=(2, 2))


def test_tokens_of_unknown_meaning_are_averaged_over_all() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 8, 8), Lost())
    batch = torch.randn(2, 3, 16, 16)
    with attach(module, name="m", image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) as hooked:
        raw = hooked.capture(batch, ["1"])["1"]
        assert str(info(hooked, "1").layout) == "tokens"
        for layer in ("1", "1@mean"):
            (rows,) = hooked.rows(batch, hooked.expand([layer])).values()
            torch.testing.assert_close(rows, raw.sum(1) / 4)
        with pytest.raises(SiteError, match="@cls needs a class token, but the layer does not say which tokens"):
            hooked.expand(["1@cls"])
        with pytest.raises(SiteError, match="@patch needs a grid of places, but the layer does not say which"):
            hooked.expand(["1@patch"])


# --- layouts that the user states ---


def stated(module: nn.Module, layout: Mapping[str, Layout | str], *layers: str) -> HookedModel:
    values = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return attach(module, name="m", layers=layers, layout=layout, image_size=16, mean=values[0], std=values[1])


def test_a_stated_layout_comes_first() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 8, 8), Lost())
    batch = torch.randn(3, 3, 16, 16)
    with stated(module, {"1": "cls+1x3"}, "1", "1@patch") as hooked:
        assert info(hooked, "1").layout == Layout("tokens", prefix=1, has_cls=True, grid=(1, 3))
        raw = hooked.capture(batch, ["1"])["1"]
        cls, patch = hooked.rows(batch).values()
        assert torch.equal(cls, raw[:, 0])
        assert torch.equal(patch, raw[:, 1:].reshape(9, 6))


def test_a_stated_layout_overrides_what_was_found_and_globs() -> None:
    with stated(nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU()), {"*": "nhwc"}, "0", "1") as hooked:
        assert [hooked.d_in(site) for site in hooked.sites] == [2, 2]
        assert info(hooked, "0").layout == Layout("nhwc", prefix=0, grid=(6, 2))


def test_tokens_before_the_batch_can_be_stated() -> None:
    class First(Lost):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1)

    module, batch = nn.Sequential(nn.Conv2d(3, 6, 8, 8), First()), torch.randn(3, 3, 16, 16)
    with pytest.raises(SiteError, match="no batch axis"):
        stated(module, {}, "1")
    with stated(module, {"1": "0+tokens, batch axis 1"}, "1", "1@all") as hooked:
        raw = hooked.capture(batch, ["1"])["1"]
        assert raw.shape == (4, 3, 6)
        mean, every = hooked.rows(batch).values()
        torch.testing.assert_close(mean, raw.mean(0))
        assert torch.equal(every, raw.transpose(0, 1).reshape(12, 6))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"1": "cls+2x2"}, r"outputs 4 tokens, not 1 and places on a grid of 2x2"),
        ({"1": "nchw"}, r"layout 'nchw' is stated for layer '1', which for 2 pictures outputs \[2, 4, 6\]"),
        ({"1": "tokens, batch axis 1"}, r"for 2 pictures outputs \[2, 4, 6\]"),
        ({"1": "clas+tokens"}, r"'clas\+tokens' is no layout"),
        ({"1~1": "tokens"}, "a layout is stated for 'm/1~1', but that layer runs 1 times"),
        ({"2": "tokens"}, "model 'm' has no layer '2'"),
    ],
)
def test_a_stated_layout_that_does_not_fit_is_refused(layout: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stated(nn.Sequential(nn.Conv2d(3, 6, 8, 8), Lost()), layout)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("vector", Layout("vector")),
        ("nchw", Layout("nchw", prefix=0)),
        ("tokens", Layout("tokens")),
        ("0+tokens", Layout("tokens", prefix=0)),
        ("3+tokens", Layout("tokens", prefix=3)),
        ("cls+tokens", Layout("tokens", prefix=1, has_cls=True)),
        ("cls+4+tokens", Layout("tokens", prefix=5, has_cls=True)),
        ("heads.cls+1+tokens", Layout("tokens", prefix=2, has_cls=True, heads="first")),
        ("cls+tokens.heads", Layout("tokens", prefix=1, has_cls=True, heads="last")),
        ("0+tokens, batch axis 1", Layout("tokens", prefix=0, batch_axis=1)),
    ],
)
def test_spellings(text: str, layout: Layout) -> None:
    assert Layout.parse(text) == layout
    assert str(layout) == text


# --- the functions themselves ---


def test_rows_by_hand() -> None:
    tokens = torch.tensor([[[10.0, 20.0], [1.0, 2.0], [3.0, 6.0]]])  # cls, then two places
    layout = Layout("tokens", prefix=1, has_cls=True)
    assert to_rows(tokens, layout, "pool").tolist() == [[10.0, 20.0]]
    assert to_rows(tokens, layout, "mean").tolist() == [[2.0, 4.0]]  # (1+3)/2, (2+6)/2
    registers = Layout("tokens", prefix=1)  # a prefix token that is no class token
    assert to_rows(tokens, registers, "pool").tolist() == [[2.0, 4.0]]
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert to_rows(maps, Layout("nchw"), "pool").tolist() == [[3.0]]  # (1+2+3+6)/4
    assert to_rows(maps, Layout("nhwc"), "pool").tolist() == [[2.0, 4.0]]  # (1+3)/2, (2+6)/2


def test_rows_are_never_a_view() -> None:
    vector, tokens = torch.ones(2, 3), torch.ones(2, 4, 3)
    rows = [to_rows(vector, Layout("vector"), "pool"), to_rows(tokens, Layout("tokens", 1, has_cls=True), "cls")]
    vector.zero_()
    tokens.zero_()
    assert all(torch.equal(values, torch.ones(2, 3)) for values in rows)


def test_layouts_by_type_and_rank() -> None:
    assert default_layout(nn.Conv2d(1, 1, 1), (7, 4, 5)) == Layout("nchw", prefix=0, grid=(4, 5))
    assert default_layout(nn.Linear(1, 1), (4, 5, 7)) == Layout("nhwc", prefix=0, grid=(4, 5))
    assert default_layout(nn.ReLU(), (4, 5, 7)) is None  # three numbers say nothing of which are the channels
    assert default_layout(nn.ReLU(), (9,)) == Layout("vector")
    assert default_layout(nn.ReLU(), (9, 2)) == Layout("tokens")
    assert default_layout(nn.ReLU(), (9, 2, 2, 2)) is None
    assert default_layout(nn.ReLU(), ()) is None


def test_an_adapters_rule_comes_before_the_general_one() -> None:
    def rule(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout | None]:
        assert shapes == {"0": (6, 2, 2), "1": (4, 6)}
        return {"1": Layout("tokens", prefix=1, has_cls=True), "0": None}

    module = nn.Sequential(nn.Conv2d(3, 6, 8, 8), Tokens())
    hooked = HookedModel(module, name="m", preprocess=lambda _: torch.zeros(1, 3, 16, 16), layout_rule=rule)
    assert str(info(hooked, "1").layout) == "cls+tokens"
    assert hooked.expand(["1@cls"])[0].policy == "cls"
    with pytest.raises(SiteError, match=r"outputs \[b, 6, 2, 2\], neither a vector nor tokens nor a map"):
        hooked.expand(["0"])
