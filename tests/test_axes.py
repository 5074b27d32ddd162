"""Axis tracing: layouts of hand-made modules with known answers, and of real architectures at small sizes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from usae_probe.errors import UsageError
from usae_probe.hooks.axes import AxisTracer, read_layout, read_tokens
from usae_probe.hooks.axis_algebra import NOTHING, Base, Digit, cut, join, merged, new_axis, regroup
from usae_probe.hooks.axis_rules import RULES
from usae_probe.hooks.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS = Base("row", 8), Base("column", 4)


class Module(nn.Module):
    """A module of one function of (self, x), with parameters of given shapes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parameters: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def traced(
    function: Callable[[Any, Tensor], Tensor], size: tuple[int, int] = (8, 4), **parameters: tuple[int, ...]
) -> Layout | None:
    """The layout of what `function` makes of two pictures; the values are checked to be those of a bare pass."""
    return followed(Module(function, **parameters), torch.randn(2, 3, *size))


def followed(module: nn.Module, batch: Tensor, tracer: type[AxisTracer] = AxisTracer) -> Layout | None:
    with torch.no_grad():
        bare = module(batch)
        with tracer(module) as axes:
            axes.picture(batch)
            output = module(batch)
    assert torch.equal(bare, output)
    return axes.layout(output)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def layouts(module: nn.Module, size: int) -> tuple[dict[str, Layout | None], dict[str, tuple[int, ...]]]:
    """The layout and the shape of every module that outputs a tensor (the first of several calls)."""
    batch, found, shapes = torch.randn(2, 3, size, size), {}, {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and name not in found:
                found[name], shapes[name] = axes.layout(output), tuple(output.shape)

        return hook

    handles = [part.register_forward_hook(record(name)) for name, part in module.named_modules()]
    with torch.no_grad(), AxisTracer(module.eval()) as axes:
        axes.picture(batch)
        module(batch)
    for handle in handles:
        handle.remove()
    return found, shapes


# ---- the algebra


def test_digits_that_follow_each_other_are_one() -> None:
    high, low = Digit(ROWS, 2, 4), Digit(ROWS, 4, 1)
    assert merged([high, low]) == (Digit(ROWS, 8, 1),)
    assert merged([low, high]) == (low, high)
    assert merged([Digit(ROWS, 2, 4), Digit(ROWS, 2, 1)]) == (Digit(ROWS, 2, 4), Digit(ROWS, 2, 1))


def test_a_window_partition_and_back_by_hand() -> None:
    rows, columns = (Digit(ROWS, 8, 1),), (Digit(COLUMNS, 4, 1),)
    split = regroup((rows, columns), (2, 4, 2, 2))
    assert split == ((Digit(ROWS, 2, 4),), (Digit(ROWS, 4, 1),), (Digit(COLUMNS, 2, 2),), (Digit(COLUMNS, 2, 1),))
    windows = regroup((split[0], split[2], split[1], split[3]), (4, 8))
    assert windows == (
        (Digit(ROWS, 2, 4), Digit(COLUMNS, 2, 2)),
        (Digit(ROWS, 4, 1), Digit(COLUMNS, 2, 1)),
    )
    back = regroup(windows, (2, 2, 4, 2))
    assert regroup((back[0], back[2], back[1], back[3]), (8, 4)) == (rows, columns)


def test_lengths_that_do_not_divide_the_digits_are_new_axes_and_nothing_else_is() -> None:
    rows, columns = (Digit(ROWS, 8, 1),), (Digit(COLUMNS, 4, 1),)
    batch = new_axis("batch", 2)
    three = new_axis("row", 3)
    found = regroup((batch, three, rows, columns), (2, 4, 6, 4))
    assert found[0] == batch
    assert found[3] == columns
    assert [axis[0].base.meaning for axis in found[1:3]] == ["unknown", "unknown"]


def test_lengths_of_one_go_where_a_view_makes_room() -> None:
    batch, cls, channels = new_axis("batch", 2), new_axis("parameter", 1, "cls_token"), new_axis("channel", 6)
    flat = regroup((batch, cls, channels), (2, 6))
    assert flat == (batch + cls, channels)
    assert regroup(flat, (2, 1, 6)) == (batch, cls, channels)
    row, column = new_axis("row", 1), new_axis("column", 1)
    assert regroup((batch, channels, row, column), (2, 6, 1)) == (batch, channels, row + column)
    assert regroup((batch, channels, row + column), (2, 6, 1, 1)) == (batch, channels, row, column)
    assert regroup((batch, channels), (1, 2, 6)) == (NOTHING, batch, channels)


def test_cutting_a_concatenation_takes_its_parts() -> None:
    cls, registers = new_axis("parameter", 1, "cls_token"), new_axis("parameter", 4, "reg")
    places = (Digit(ROWS, 8, 1), Digit(COLUMNS, 4, 1))
    whole = join([cls, registers, places])
    assert whole[0].size == 37
    assert cut(whole, 0, 1) == cls
    assert cut(whole, 5, 37) == places
    assert join([cut(whole, 0, 5), places])[0].base.parts == (cls, registers, places)
    (two,) = cut(cut(whole, 1, 5), 0, 2)
    assert (two.base.meaning, two.base.name, two.size) == ("parameter", "reg", 2)
    (part,) = cut(places, 0, 8)
    assert (part.base.meaning, part.size) == ("unknown", 8)


def test_tokens_in_windows_have_an_order() -> None:
    rows, columns = Base("row", 2), Base("column", 4)
    axis = (Digit(columns, 2, 2), Digit(rows, 2, 1), Digit(columns, 2, 1))
    # tokens: window 0 holds (0,0),(0,1),(1,0),(1,1); window 1 the columns 2 and 3
    assert read_tokens(axis) == Layout("tokens", prefix=0, grid=(2, 4), order=(0, 1, 4, 5, 2, 3, 6, 7))
    assert read_tokens((Digit(rows, 2, 1), Digit(columns, 4, 1))) == Layout("tokens", prefix=0, grid=(2, 4))
    assert read_tokens((Digit(rows, 2, 1), Digit(columns, 2, 1))) == Layout("tokens")  # only columns of one half


def test_the_inside_of_patches_is_no_grid_but_the_patches_are() -> None:
    batch = new_axis("batch", 2)
    patches = (Digit(ROWS, 2, 4), Digit(COLUMNS, 2, 2))
    inside = (Digit(ROWS, 4, 1), Digit(COLUMNS, 2, 1), *new_axis("channel", 3))
    assert read_layout((batch, patches, inside)) == Layout("tokens", prefix=0, grid=(2, 2))
    assert read_layout((batch, inside, patches)) is None
    assert read_layout((batch + patches, inside)) is None


# ---- small modules

GRID = Layout("tokens", prefix=0, grid=(8, 4))
CLS = Layout("tokens", prefix=1, has_cls=True, grid=(8, 4))


def windows(x: Tensor) -> Tensor:
    """[b,c,8,4] to windows of 4×2: [4b,8,c]."""
    return x.view(2, 3, 2, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 8, 3)


def test_maps_and_tokens() -> None:
    assert traced(lambda m, x: x) == Layout("nchw", prefix=0, grid=(8, 4))
    assert traced(lambda m, x: x.permute(0, 2, 3, 1)) == Layout("nhwc", prefix=0, grid=(8, 4))
    assert traced(lambda m, x: tokens(x)) == GRID
    assert traced(lambda m, x: x.flatten(2)) is None  # channels first
    assert traced(lambda m, x: x.transpose(2, 3)) is None
    assert traced(lambda m, x: x.mean((2, 3))) == Layout("vector")
    assert traced(lambda m, x: x.flatten(1)) == Layout("vector")
    assert traced(lambda m, x: x.mean(1).flatten(1)) is None  # places only
    assert traced(lambda m, x: x.permute(2, 3, 0, 1).flatten(0, 1)) == Layout(
        "tokens", prefix=0, grid=(8, 4), batch_axis=1
    )


def test_windows_are_none_and_make_the_map_again() -> None:
    assert traced(lambda m, x: windows(x)) is None
    assert traced(
        lambda m, x: windows(x).view(2, 2, 2, 4, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 4, 3)
    ) == Layout("nhwc", prefix=0, grid=(8, 4))
    in_order = traced(lambda m, x: windows(x).view(2, 32, 3))
    assert in_order is not None
    assert in_order.grid == (8, 4)
    assert in_order.order is not None
    # place (0,2) opens the second window of eight tokens, place (4,0) the third
    assert (in_order.order[:4], in_order.order[16]) == ((0, 1, 8, 9), 16)


def test_rolled_windows_are_rolled_back() -> None:
    assert traced(lambda m, x: torch.roll(x.permute(0, 2, 3, 1), (1, 1), (1, 2))) == Layout(
        "nhwc", prefix=0, grid=(8, 4)
    )


def test_heads() -> None:
    def split(m: Any, x: Tensor) -> Tensor:
        return F.linear(tokens(x), m.weight).view(2, 32, 3, 2, 5).permute(2, 0, 3, 1, 4)[0]

    first = Layout("tokens", prefix=0, grid=(8, 4), heads="first")
    assert traced(split, weight=(30, 3)) == first
    assert traced(lambda m, x: split(m, x).transpose(1, 2), weight=(30, 3)) == Layout(
        "tokens", prefix=0, grid=(8, 4), heads="last"
    )
    assert traced(lambda m, x: split(m, x).transpose(1, 2).reshape(2, 32, 10), weight=(30, 3)) == GRID
    maps = lambda m, x: (split(m, x) @ split(m, x).transpose(-2, -1)).softmax(-1)
    assert traced(maps, weight=(30, 3)) is None
    assert traced(lambda m, x: maps(m, x) @ split(m, x), weight=(30, 3)) == first
    assert traced(lambda m, x: F.scaled_dot_product_attention(*[split(m, x)] * 3), weight=(30, 3)) == first


def with_cls(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.cls_token.expand(2, -1, -1), tokens(x)], 1) + m.pos_embed


def test_prefix_tokens() -> None:
    named: dict[str, Any] = {"cls_token": (1, 1, 3), "pos_embed": (1, 33, 3)}
    assert traced(with_cls, **named) == CLS
    assert traced(lambda m, x: m.pos_embed + with_cls(m, x), **named) == CLS
    assert traced(lambda m, x: with_cls(m, x)[:, 1:], **named) == GRID
    assert traced(lambda m, x: with_cls(m, x)[:, 0], **named) == Layout("vector")
    only = Layout("tokens", prefix=1, has_cls=True)
    assert traced(lambda m, x: with_cls(m, x)[:, :1], **named) == only
    assert traced(lambda m, x: with_cls(m, x)[:, 0].unsqueeze(1), **named) == only
    assert traced(lambda m, x: F.layer_norm(with_cls(m, x), (3,)), **named) == CLS
    assert traced(lambda m, x: F.linear(with_cls(m, x), m.weight), weight=(6, 3), **named) == CLS
    assert traced(lambda m, x: F.linear(with_cls(m, x)[:, :1], m.weight), weight=(6, 3), **named) == only
    assert traced(lambda m, x: with_cls(m, x).transpose(0, 1), **named) == Layout(
        "tokens", prefix=1, has_cls=True, grid=(8, 4), batch_axis=1
    )


def test_registers_and_embeddings_of_one_axis() -> None:
    def registers(m: Any, x: Tensor) -> Tensor:
        first = [m.class_embedding.expand(2, 1, -1), m.register_tokens.repeat(2, 1, 1)]
        return torch.cat([*first, tokens(x)], 1)

    named: dict[str, Any] = {"class_embedding": (3,), "register_tokens": (1, 4, 3)}
    assert traced(registers, **named) == Layout("tokens", prefix=5, has_cls=True, grid=(8, 4))
    assert traced(
        lambda m, x: torch.cat([m.class_embedding + torch.zeros(2, 1, 3), tokens(x)], 1), class_embedding=(3,)
    ) == Layout("tokens", prefix=1, has_cls=True, grid=(8, 4))
    assert traced(lambda m, x: torch.cat([m.first.expand(2, -1, -1), tokens(x)], 1), first=(1, 2, 3)) == Layout(
        "tokens", prefix=2, grid=(8, 4)
    )
    after = lambda m, x: torch.cat([tokens(x), m.prompt.expand(2, -1, -1)], 1)
    assert traced(after, prompt=(1, 2, 3)) == Layout("tokens")
    assert traced(lambda m, x: after(m, x)[:, :32], prompt=(1, 2, 3)) == GRID


def test_class_attention_keeps_the_class_token() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        u = with_cls(m, x)
        q = F.linear(u[:, 0], m.weight).unsqueeze(1).reshape(2, 1, 2, 3).permute(0, 2, 1, 3)
        k = F.linear(u, m.weight).reshape(2, 33, 2, 3).permute(0, 2, 1, 3)
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(2, 1, 6)

    shapes: dict[str, Any] = {"cls_token": (1, 1, 3), "pos_embed": (1, 33, 3), "weight": (6, 3)}
    assert traced(attention, **shapes) == Layout("tokens", prefix=1, has_cls=True)


def test_token_mixing_keeps_the_tokens() -> None:
    mixed = lambda m, x: F.linear(tokens(x).transpose(1, 2), m.weight)
    assert traced(mixed, weight=(32, 32)) is None
    assert traced(lambda m, x: tokens(x) + mixed(m, x).transpose(1, 2), weight=(32, 32)) == GRID
    assert traced(lambda m, x: mixed(m, x).transpose(1, 2) + tokens(x), weight=(32, 32)) == GRID
    # what a weight makes from the left are channels, too
    assert traced(lambda m, x: m.weight @ tokens(x), weight=(5, 32)) is None


def test_convolutions_and_pooling() -> None:
    conv = lambda m, x: F.conv2d(x, m.weight, stride=2, padding=1)
    assert traced(conv, weight=(6, 3, 3, 3)) == Layout("nchw", prefix=0, grid=(4, 2))
    assert traced(lambda m, x: tokens(conv(m, x)), weight=(6, 3, 3, 3)) == Layout("tokens", prefix=0, grid=(4, 2))
    assert traced(lambda m, x: F.pixel_unshuffle(x, 2)) == Layout("nchw", prefix=0, grid=(4, 2))
    assert traced(lambda m, x: F.interpolate(x, scale_factor=2.0)) == Layout("nchw", prefix=0, grid=(16, 8))
    assert traced(lambda m, x: F.pad(x, (1, 1, 2, 2))[:, :, 2:-2, 1:-1]) == Layout("nchw", prefix=0, grid=(8, 4))
    assert traced(lambda m, x: F.unfold(x, 2, stride=2).transpose(1, 2)) == Layout("tokens", prefix=0, grid=(4, 2))
    assert traced(lambda m, x: torch.cat([x, x.relu()], 1)) == Layout("nchw", prefix=0, grid=(8, 4))
    halves = lambda m, x: torch.cat([x[..., 0::2, 0::2], x[..., 1::2, 1::2]], 1)
    assert traced(halves) == Layout("nchw", prefix=0, grid=(4, 2))
    # a pooled row is still in its window
    pooled = lambda m, x: F.max_pool2d(windows(x).transpose(1, 2).reshape(-1, 3, 4, 2), (2, 1))
    assert traced(
        lambda m, x: pooled(m, x).view(2, 2, 2, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 4, 4)
    ) == Layout("nchw", prefix=0, grid=(4, 4))


def test_maps_of_one_place() -> None:
    assert traced(lambda m, x: F.adaptive_avg_pool2d(x, 1)) == Layout("nchw", prefix=0, grid=(1, 1))
    assert traced(lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1)) == Layout("vector")
    assert traced(lambda m, x: tokens(F.adaptive_avg_pool2d(x, 1))) == Layout("tokens", prefix=0, grid=(1, 1))
    assert traced(lambda m, x: F.conv2d(x, m.weight), weight=(6, 3, 8, 4)) == Layout("nchw", prefix=0, grid=(1, 1))
    assert traced(lambda m, x: x, size=(1, 1)) == Layout("nchw", prefix=0, grid=(1, 1))


def test_choices_make_unknown_tokens() -> None:
    assert traced(lambda m, x: tokens(x).topk(4, 1).values) == Layout("tokens")
    assert traced(lambda m, x: tokens(x)[:, torch.tensor([3, 1])]) == Layout("tokens")
    assert traced(lambda m, x: tokens(x)[:, :5]) == Layout("tokens")
    assert traced(lambda m, x: tokens(x).mean(1)) == Layout("vector")
    assert traced(lambda m, x: tokens(x).amax(2)) is None


def test_in_place_operations_update_the_axes() -> None:
    assert traced(lambda m, x: tokens(x).clone().add_(m.pos), pos=(1, 32, 3)) == GRID
    assert traced(lambda m, x: torch.zeros(2, 32, 3).copy_(tokens(x))) == GRID
    assert traced(lambda m, x: tokens(x).transpose_(1, 2)) is None
    assert traced(lambda m, x: x.clone().unsqueeze_(0)) is None
    assert traced(lambda m, x: x.clone().unsqueeze_(0).squeeze_(0)) == Layout("nchw", prefix=0, grid=(8, 4))


def test_unknown_operations_are_untracked_and_change_no_value() -> None:
    assert traced(lambda m, x: torch.fft.fft2(x).real) is None
    assert traced(lambda m, x: torch.fft.fft2(x).real + x) == Layout("nchw", prefix=0, grid=(8, 4))
    assert traced(lambda m, x: torch.as_strided(x, (2, 3), (3, 1))) is None


def test_the_batch_must_be_whole() -> None:
    assert traced(lambda m, x: x[:1]) is None
    assert traced(lambda m, x: torch.cat([x, x])) is None
    assert traced(lambda m, x: torch.cat([x, x]).chunk(2)[1]) == Layout("nchw", prefix=0, grid=(8, 4))


def test_a_picture_has_four_axes() -> None:
    with pytest.raises(UsageError, match=r"\[3, 8, 4\]"):
        AxisTracer(nn.Identity()).picture(torch.zeros(3, 8, 4))


def test_a_rule_that_fails_leaves_the_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError

    monkeypatch.setitem(RULES, "mean", fail)
    assert traced(lambda m, x: x.mean((2, 3))) is None
    assert traced(lambda m, x: tokens(x)) == GRID


def test_the_fused_attention_of_torch() -> None:
    class Attends(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
            self.conv = nn.Conv2d(3, 4, 2, 2)
            self.batch_first = batch_first
            self.seen: list[str] = []

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.cls_token.expand(2, -1, -1), tokens(self.conv(x))], 1)
            x = x if self.batch_first else x.transpose(0, 1)
            return self.attention(x, x, x, need_weights=False)[0]

    class Names(AxisTracer):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)

    seen: list[str] = []
    for batch_first in (True, False):
        layout = followed(Attends(batch_first).eval(), torch.randn(2, 3, 8, 4), Names)
        assert layout == Layout("tokens", prefix=1, has_cls=True, grid=(4, 2), batch_axis=0 if batch_first else 1)
    assert "aten._native_multi_head_attention.default" in seen  # the fast path was taken


def test_a_whole_encoder_layer_in_one_operation() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), Module(lambda m, x: x.transpose(1, 2)), layer)
    found, _ = layouts(module, 8)
    assert found["3"] == Layout("tokens", prefix=0, grid=(4, 4))


def test_no_tensor_is_kept_alive_and_no_axes_outlive_theirs() -> None:
    module, batch = Module(lambda m, x: tokens(x)), torch.randn(2, 3, 8, 4)
    with torch.no_grad(), AxisTracer(module) as axes:
        axes.picture(batch)
        output = module(batch)
        gone = weakref.ref(output)
        assert axes.layout(output) == GRID
        del output
        gc.collect()
        assert gone() is None
        # tensors made since may well have its id; none has its axes
        assert all(axes.layout(torch.empty(2, 32, 3)) is None for _ in range(50))
        assert axes.layout(batch) is not None
        axes.forget()
        assert axes.layout(batch) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    assert traced(lambda m, x: F.conv2d(x.to(dtype), m.weight.to(dtype)), weight=(6, 3, 2, 2)) == Layout(
        "nchw", prefix=0, grid=(7, 3)
    )


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_other_modes_than_no_grad(mode: Callable[[], Any]) -> None:
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    batch = torch.randn(2, 3, 32, 32)
    with mode(), AxisTracer(module) as axes:
        axes.picture(batch)
        assert axes.layout(module.forward_features(batch)) == Layout("tokens", prefix=1, has_cls=True, grid=(2, 2))


# ---- architectures: the layout (as it is spelled) and the grid of a few layers

VIT = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL = {"img_size": 64}
T4, T2, CLS4 = ("0+tokens", (4, 4)), ("0+tokens", (2, 2)), ("cls+tokens", (4, 4))
MODELS: list[tuple[str, int, dict[str, Any], dict[str, tuple[str, tuple[int, int] | None] | None]]] = [
    (
        "vit_tiny_patch16_224",
        64,
        VIT,
        {
            "patch_embed.proj": ("nchw", (4, 4)),
            "patch_embed": T4,
            "blocks.1": CLS4,
            "blocks.0.attn.q_norm": ("heads.cls+tokens", (4, 4)),
            "head": ("vector", None),
        },
    ),
    ("deit_tiny_distilled_patch16_224", 64, VIT, {"blocks.1": ("cls+1+tokens", (4, 4))}),
    ("vit_small_patch14_reg4_dinov2", 56, {**VIT, "img_size": 56}, {"blocks.1": ("cls+4+tokens", (4, 4))}),
    ("vit_base_patch16_siglip_224", 64, VIT, {"blocks.1": T4, "attn_pool": ("vector", None)}),
    ("eva02_tiny_patch14_224", 56, {**VIT, "img_size": 56}, {"blocks.1": CLS4, "blocks.0.attn": CLS4}),
    ("beit_base_patch16_224", 64, VIT, {"blocks.1": CLS4}),
    ("cait_xxs24_224", 64, {**VIT, "depth": 1}, {"blocks.0": T4, "blocks_token_only.0": ("cls+tokens", None)}),
    (
        "xcit_nano_12_p16_224",
        64,
        {**VIT, "cls_attn_layers": 1},
        {"blocks.1": T4, "blocks.0.attn.attn_drop": None, "cls_attn_blocks.0": CLS4},
    ),
    ("mixer_s32_224", 64, SMALL, {"blocks.0": T2, "blocks.0.mlp_tokens.fc1": None, "norm": T2}),
    (
        "convnext_tiny",
        64,
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
        {"stages.3": ("nchw", (2, 2)), "stages.0.blocks.0.mlp.fc1": ("nhwc", (16, 16))},
    ),
    ("resnet18", 64, {}, {"layer4": ("nchw", (2, 2)), "global_pool": ("vector", None), "bn1": ("nchw", (32, 32))}),
    (
        "swin_tiny_patch4_window7_224",
        64,
        {**SMALL, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)},
        {"layers.0.blocks.1": ("nhwc", (16, 16)), "layers.0.blocks.1.attn": None, "layers.3": ("nhwc", (2, 2))},
    ),
    (
        "swinv2_tiny_window8_256",
        64,
        {**SMALL, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)},
        {"layers.0.blocks.1": ("nhwc", (16, 16)), "layers.1": ("nhwc", (8, 8))},
    ),
    (
        "maxvit_pico_rw_256",
        64,
        SMALL,
        {"stages.0": ("nchw", (16, 16)), "stages.0.blocks.0.attn_grid": ("nhwc", (16, 16))},
    ),
    ("pvt_v2_b0", 64, {}, {"stages.0.blocks.0": ("0+tokens", (16, 16)), "stages.3": ("nchw", (2, 2))}),
    ("mvitv2_tiny", 64, SMALL, {"stages.0.blocks.0.mlp": ("0+tokens", (16, 16)), "norm": T2}),
    (
        "coat_tiny",
        64,
        SMALL,
        {"serial_blocks1.0": ("cls+tokens", (16, 16)), "serial_blocks4.1": ("cls+tokens", (2, 2))},
    ),
    ("levit_128s", 224, {}, {"stages.0": ("0+tokens", (14, 14)), "stages.2": T4}),
    ("efficientformer_l1", 224, {}, {"stages.0": ("nchw", (56, 56)), "stages.3.blocks.4": ("0+tokens", (7, 7))}),
    (
        "volo_d1_224",
        64,
        SMALL,
        {"network.0.0.attn": ("nhwc", (8, 8)), "network.2": ("nhwc", (4, 4)), "norm": CLS4},
    ),
    (
        "pit_ti_distilled_224",
        224,
        {},
        {"transformers.0.blocks.0": ("cls+1+tokens", (27, 27)), "norm": ("cls+1+tokens", None)},
    ),
    ("twins_svt_small", 64, {}, {"blocks.0.0.attn": ("0+tokens", (16, 16)), "blocks.3.0": T2}),
    ("crossvit_tiny_240", 240, {}, {"norm.0": ("cls+tokens", (20, 20)), "norm.1": ("cls+tokens", (14, 14))}),
    ("tnt_s_legacy_patch16_224", 224, {"depth": 2}, {"norm": ("cls+tokens", (14, 14)), "pixel_embed": None}),
    ("mobilevit_xxs", 64, {}, {"stages.4": ("nchw", (2, 2)), "stages.3.1.transformer.0": None}),
    ("nest_tiny", 224, {}, {"levels.0": ("nchw", (56, 56)), "levels.0.transformer_encoder.0": None}),
    ("poolformer_s12", 64, {}, {"stages.3": ("nchw", (2, 2))}),
    (
        "focalnet_tiny_srf",
        64,
        {},
        {"layers.0.blocks.0": ("nchw", (16, 16)), "layers.3": ("nchw", (2, 2))},
    ),
    (
        "davit_tiny",
        64,
        {"depths": (1, 1, 1, 1)},
        {"stages.0.blocks.0.0": ("nchw", (16, 16)), "stages.3": ("nchw", (2, 2))},
    ),
    ("edgenext_xx_small", 64, {}, {"stages.3.blocks.1": ("nchw", (2, 2))}),
    ("gcvit_xxtiny", 224, {}, {"stages.0.blocks.1": ("nhwc", (56, 56)), "stages.3": ("nchw", (7, 7))}),
    ("sequencer2d_s", 64, SMALL, {"stages.0": ("nhwc", (9, 9))}),
    ("inception_next_atto", 64, {}, {"stages.3": ("nchw", (2, 2))}),
    ("densenet121", 64, {"block_config": (2, 2, 2, 2)}, {"features.denseblock4": ("nchw", (2, 2))}),
]


def expect(found: dict[str, Layout | None], expected: dict[str, tuple[str, tuple[int, int] | None] | None]) -> None:
    read = {name: found[name] for name in expected}
    assert {name: layout and (str(layout), layout.grid) for name, layout in read.items()} == expected
    assert all(layout is None or layout.order is None for layout in read.values())


@pytest.mark.parametrize(("name", "size", "options", "expected"), MODELS, ids=[model[0] for model in MODELS])
def test_architectures(name: str, size: int, options: dict[str, Any], expected: dict[str, Any]) -> None:
    found, _ = layouts(timm.create_model(name, **options), size)
    expect(found, expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_every_layer_is_tracked(name: str) -> None:
    options = {**SMALL, "depth": 2} if name[0] == "v" else {}
    found, shapes = layouts(timm.create_model(name, **options), 64)
    lost = [layer for layer, layout in found.items() if layout is None and shapes[layer][0] == 2]
    assert lost == []
    assert len(found) > 50


def test_unrolled_tokens_of_hiera() -> None:
    found, _ = layouts(timm.create_model("hiera_tiny_224", img_size=64), 64)
    first, later, last = (found[f"blocks.{i}"] for i in (0, 3, 11))
    assert first is not None
    assert later is not None
    assert first.grid == (16, 16)
    assert first.order is not None
    # The lowest bits of row and column come first: of 256 tokens, place (0,1) is at 64, (1,0) at 128, (0,2) at 16.
    assert (first.order[1], first.order[16], first.order[2], first.order[4]) == (64, 128, 16, 4)
    assert sorted(first.order) == list(range(256))
    assert later.grid == (4, 4)
    assert later.order == (0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15)
    assert last == Layout("tokens", prefix=0, grid=(2, 2))


def test_torchvision() -> None:
    from torchvision.models import VisionTransformer, swin_t

    vit = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    found, _ = layouts(vit, 32)
    expect(found, {"encoder.layers.encoder_layer_0": CLS4, "encoder.ln": CLS4, "heads": ("vector", None)})
    found, _ = layouts(swin_t(), 64)
    maps: dict[str, Any] = {"features.1.1.attn": ("nhwc", (16, 16)), "features.2": ("nhwc", (8, 8))}
    expect(found, maps)


def test_transformers() -> None:
    import transformers as hf

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    sizes["patch_size"] = 8
    vit, _ = layouts(hf.ViTModel(hf.ViTConfig(**sizes, intermediate_size=32)), 32)
    expect(vit, {"embeddings": CLS4, "layernorm": CLS4})
    dino, _ = layouts(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**sizes)), 32)
    expect(dino, {"embeddings": ("cls+4+tokens", (4, 4)), "encoder.layer.0": ("cls+4+tokens", (4, 4))})
    clip, _ = layouts(hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes, intermediate_size=32)), 32)
    expect(clip, {"embeddings": CLS4, "encoder.layers.0": CLS4})
