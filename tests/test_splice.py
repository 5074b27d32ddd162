"""Splicing: the model's output with one activation replaced, in the layer's own layout, container and dtype."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from usae_probe import HookedModel, attach
from usae_probe.errors import SiteError, UnknownLayerError, UsaeProbeError, UsageError
from usae_probe.hooks import Layout, Point
from usae_probe.hooks.tokens import from_rows, to_rows

from .toys import Does, flat_net

pytestmark = pytest.mark.usefixtures("one_thread")


def hook(module: nn.Module, size: int = 4, **options: Any) -> HookedModel:
    return attach(module, name="m", image_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **options)


def pictures(n: int = 3, size: int = 4) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(rows: Tensor) -> Tensor:
    return rows


def net(*middle: nn.Module) -> nn.Sequential:
    return flat_net(4, 2, *middle)


# --- by hand ---


def test_a_linear_net_by_hand() -> None:
    """y = 2 h0 - h1, h = (r, g + b) of a picture of one pixel."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
        module[2].weight.copy_(torch.tensor([[2.0, -1.0]]))
    batch = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).reshape(2, 3, 1, 1)
    given = []

    def fn(rows: Tensor) -> Tensor:
        given.append(rows.tolist())
        return rows + torch.tensor([10.0, 1.0])

    with hook(module, size=1) as hooked:
        assert hooked.splice(batch, "1", same).tolist() == [[-3.0], [-3.0]]  # 2·1 - 5, 2·4 - 11
        assert hooked.splice(batch, "1", fn).tolist() == [[16.0], [16.0]]  # 2·11 - 6, 2·14 - 12
        assert given == [[[1.0, 5.0], [4.0, 11.0]]]
        assert hooked.splice(batch, "2", lambda rows: rows * 0 + 7).tolist() == [[7.0], [7.0]]
        assert hooked.splice(batch, "1", lambda rows: rows.flip(0)).tolist() == [[-3.0], [-3.0]]
        assert hooked.splice(batch, "1", lambda rows: rows.mul_(2)).tolist() == [[-6.0], [-6.0]]  # in place is fine too
        assert hooked.capture(batch, ["1"])["1"].tolist() == [[1.0, 5.0], [4.0, 11.0]]


VALUES = torch.arange(12.0).reshape(1, 4, 3)  # four tokens: 0 1 2, 3 4 5, 6 7 8, 9 10 11


@pytest.mark.parametrize(
    ("layout", "policy", "rows", "new", "expected"),
    [
        ("cls+tokens", "cls", [[0, 1, 2]], [[7, 7, 7]], [[7, 7, 7], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        ("cls+tokens", "pool", [[0, 1, 2]], [[7, 7, 7]], [[7, 7, 7], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        ("cls+tokens", "mean", [[6, 7, 8]], [[7, 7, 7]], [[0, 1, 2], [4, 4, 4], [7, 7, 7], [10, 10, 10]]),
        ("cls+1+tokens", "mean", [[7.5, 8.5, 9.5]], [[8.5] * 3], [[0, 1, 2], [3, 4, 5], [7, 7, 7], [10, 10, 10]]),
        ("0+tokens", "pool", [[4.5, 5.5, 6.5]], [[5.5] * 3], [[1, 1, 1], [4, 4, 4], [7, 7, 7], [10, 10, 10]]),
        (
            "cls+1x3",
            "patch",
            [[3, 4, 5], [6, 7, 8], [9, 10, 11]],
            [[1, 1, 1], [2, 2, 2], [3, 3, 3]],
            [[0, 1, 2], [1, 1, 1], [2, 2, 2], [3, 3, 3]],
        ),
        (
            "cls+tokens",
            "all",
            [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
            [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]],
            [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]],
        ),
    ],
)
def test_tokens_by_hand(layout: str, policy: Any, rows: Any, new: Any, expected: Any) -> None:
    stated = Layout.parse(layout)
    assert to_rows(VALUES, stated, policy).tolist() == rows
    back = from_rows(torch.tensor(new).float(), VALUES, stated, policy)
    assert back[0].tolist() == expected
    assert VALUES[0, 0].tolist() == [0, 1, 2]


def test_maps_by_hand() -> None:
    maps = torch.arange(8.0).reshape(1, 2, 2, 2)  # channels 0 1 2 3 and 4 5 6 7
    nchw = Layout("nchw", prefix=0, grid=(2, 2))
    assert to_rows(maps, nchw, "mean").tolist() == [[1.5, 5.5]]
    shifted = from_rows(torch.tensor([[2.5, 5.5]]), maps, nchw, "mean")
    assert shifted.flatten().tolist() == [1, 2, 3, 4, 4, 5, 6, 7]
    places = torch.tensor([[0.0, 10], [1, 11], [2, 12], [3, 13]])
    assert from_rows(places, maps, nchw, "patch").flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert from_rows(places, maps, nchw, "all").flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    nhwc = Layout("nhwc", prefix=0, grid=(2, 2))
    assert to_rows(maps, nhwc, "mean").tolist() == [[3, 4]]
    assert from_rows(torch.tensor([[4.0, 4]]), maps, nhwc, "mean").flatten().tolist() == [1, 1, 3, 3, 5, 5, 7, 7]


def test_heads_and_other_orders_by_hand() -> None:
    values = torch.arange(8.0).reshape(1, 2, 2, 2)  # [b, heads, tokens, d] or [b, tokens, heads, d]
    first, last = Layout("tokens", 0, heads="first"), Layout("tokens", 0, heads="last")
    assert to_rows(values, first, "all").tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert to_rows(values, last, "all", head=1).tolist() == [[2, 3], [6, 7]]
    new = torch.tensor([[9.0, 9], [8, 8]])
    assert from_rows(new, values, last, "all", head=1).flatten().tolist() == [0, 1, 9, 9, 4, 5, 8, 8]
    assert from_rows(new, values, first, "all", head=0).flatten().tolist() == [9, 9, 8, 8, 4, 5, 6, 7]
    ordered = Layout("tokens", 1, True, (1, 3), order=(2, 0, 1))  # the first place is token 2 behind the prefix
    assert to_rows(VALUES, ordered, "patch")[:, 0].tolist() == [9, 3, 6]
    back = from_rows(torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3]), VALUES, ordered, "patch")
    assert back[0, :, 0].tolist() == [0, 2, 3, 1]


LAYOUTS: list[tuple[str, tuple[int, ...], list[str]]] = [
    ("vector", (3, 5), ["pool", "all"]),
    ("cls+4x4", (3, 17, 5), ["pool", "cls", "mean", "patch", "all"]),
    ("cls+4+4x4", (3, 21, 5), ["pool", "cls", "mean", "patch", "all"]),
    ("0+tokens", (3, 7, 5), ["pool", "mean", "all"]),
    ("tokens", (3, 7, 5), ["pool", "mean", "all"]),
    ("nchw", (3, 5, 4, 2), ["pool", "mean", "patch", "all"]),
    ("nhwc", (3, 4, 2, 5), ["pool", "mean", "patch", "all"]),
    ("cls+tokens.heads", (3, 7, 2, 5), ["pool", "cls", "mean", "all"]),
    ("heads.cls+tokens", (3, 2, 7, 5), ["pool", "cls", "mean", "all"]),
    ("cls+tokens, batch axis 1", (7, 3, 5), ["pool", "cls", "mean", "all"]),
    ("cls+tokens.heads, batch axis 1", (7, 3, 2, 5), ["pool", "cls", "mean", "all"]),
    ("heads.cls+2x3, batch axis 1", (2, 3, 7, 5), ["pool", "cls", "mean", "patch", "all"]),
    ("nhwc, batch axis 2", (4, 2, 3, 5), ["pool", "mean", "patch", "all"]),
]


def spelled(layout: str, shape: tuple[int, ...]) -> Layout:
    found = Layout.parse(layout)
    grids = {"nchw": shape[2:], "nhwc": (4, 2)}
    return Layout(**{**vars(found), "grid": grids.get(found.kind, found.grid)})


@pytest.mark.parametrize(
    ("layout", "shape", "policy"), [(layout, shape, policy) for layout, shape, all_ in LAYOUTS for policy in all_]
)
def test_rows_and_back_in_every_layout(layout: str, shape: tuple[int, ...], policy: Any) -> None:
    stated, values = spelled(layout, shape), torch.randn(shape)
    kept = values.clone()
    for head in (None, 1) if stated.heads else (None,):
        rows = to_rows(values, stated, policy, head=head)
        assert torch.equal(from_rows(rows, values, stated, policy, head=head), values)  # bit for bit
        new = torch.randn_like(rows)
        back = from_rows(new, values, stated, policy, head=head)
        assert back.shape == values.shape
        torch.testing.assert_close(to_rows(back, stated, policy, head=head), new)
        assert torch.equal(values, kept)
        back.zero_()
        assert torch.equal(values, kept)


# --- in models ---


class Tokens(nn.Module):
    """Pictures [b,3,4,4] to what `shape` makes of [b,17,6] tokens, then a nonlinear head."""

    def __init__(self, shape: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(3, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.layer, self.back, self.head = Does(shape), Does(back), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = self.embed(x.flatten(2).transpose(1, 2))
        tokens = self.back(self.layer(torch.cat([self.cls.expand(len(x), -1, -1), places], dim=1).clone()))
        return self.head(torch.tanh(tokens).mean(dim=1) + tokens[:, 0])


MODELS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cls+4x4": (lambda t: t, lambda t: t),
    "cls+4x4, batch axis 1": (lambda t: t.transpose(0, 1).contiguous(), lambda t: t.transpose(0, 1)),
    "cls+4x4.heads": (lambda t: t.unflatten(2, (2, 3)), lambda t: t.flatten(2)),
    "heads.cls+4x4": (lambda t: t.unflatten(2, (2, 3)).transpose(1, 2), lambda t: t.transpose(1, 2).flatten(2)),
    "nchw": (
        lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (4, 4)),
        lambda t: t.flatten(2).transpose(1, 2),
    ),
    "nhwc": (lambda t: t[:, 1:].unflatten(1, (4, 4)), lambda t: t.flatten(1, 2)),
    "vector": (lambda t: t[:, 0], lambda t: t[:, None]),
}


@pytest.mark.parametrize("layout", MODELS)
def test_the_identity_gives_the_models_own_output_bit_for_bit(layout: str) -> None:
    module = Tokens(*MODELS[layout]).eval()
    batch = pictures()
    with torch.no_grad():
        expected = module(batch)
    with hook(module, layout={"layer": layout}) as hooked:
        maps, vector = layout.startswith("n"), layout == "vector"
        policies = ["pool"] if vector else ["pool", "mean", "patch", "all", *([] if maps else ["cls"])]
        heads = ["", ":0", ":1"] if "heads" in layout else [""]
        for name in [f"layer{head}@{policy}" for policy in policies for head in heads]:
            site = hooked.expand([name])[0]
            rows = hooked.rows(batch, [site])[str(site)]
            given: list[Tensor] = []
            output = hooked.splice(batch, name, lambda r, given=given: given.append(r.clone()) or r)
            assert torch.equal(output, expected), name
            assert torch.equal(given[0], rows), name  # what `fn` is given is what `rows` gives
            assert given[0].shape[1] == hooked.d_in(site)
            assert torch.equal(hooked.splice(batch, site, same), expected), name
            assert not torch.equal(hooked.splice(batch, name, lambda r: r + 1), expected), name
        module.layer.function, kept = MODELS[layout][0], module.layer
        assert torch.equal(hooked.splice(batch, kept, same), expected)  # by module


def test_only_what_the_policy_means_is_replaced() -> None:
    module = Tokens(*MODELS["cls+4x4, batch axis 1"]).eval()
    seen: list[Tensor] = []
    batch = pictures()
    with hook(module, layout={"layer": "cls+4x4, batch axis 1"}) as hooked:
        before = hooked.capture(batch, ["layer"])["layer"]
        module.back.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
        for policy in ("cls", "mean", "patch"):
            hooked.splice(batch, f"layer@{policy}", lambda rows: rows + 2)
    cls, mean, patch = (after - before for after in seen)
    assert cls.shape == (17, 3, 6)
    torch.testing.assert_close(cls[0], torch.full((3, 6), 2.0))
    assert not cls[1:].any()
    for change in (mean, patch):
        torch.testing.assert_close(change[1:], torch.full((16, 3, 6), 2.0))
        assert not change[0].any()


def test_a_function_that_gives_something_else_back() -> None:
    module = net()
    expected = module(pictures()).detach()
    with hook(module) as hooked:
        for fn, shape in (
            (lambda rows: rows[:2], r"\[2, 6\]"),
            (lambda rows: rows[:, :5], r"\[3, 5\]"),
            (lambda rows: rows.sum(), r"\[\]"),
            (lambda rows: rows[:1], r"\[1, 6\]"),  # would broadcast
            (lambda rows: None, None),
        ):
            given = "NoneType was" if shape is None else f"rows of shape {shape} were"
            with pytest.raises(UsageError, match=rf"{given} given back where \[3, 6\] are expected"):
                hooked.splice(pictures(), "1", fn)
            assert torch.equal(hooked.splice(pictures(), "1", same), expected)
        double = hooked.splice(pictures(), "1", lambda rows: rows.double())
        assert double.dtype == torch.float32
        assert torch.equal(double, expected)


def test_what_the_function_keeps_and_gives_is_not_overwritten() -> None:
    module = net(nn.ReLU(inplace=True))
    given: list[Tensor] = []
    constant = nn.Parameter(torch.full((3, 6), -1.0))  # a leaf: autograd refuses to overwrite it
    with hook(module) as hooked:
        hooked.splice(pictures(), "1", lambda rows: given.append(rows) or rows)
        output = hooked.splice(pictures(), "1", lambda _rows: constant, grad=True)
        output.sum().backward()
    assert given[0].min() < 0
    assert torch.equal(constant.detach(), torch.full((3, 6), -1.0))
    assert torch.equal(output, module[3].bias.expand(3, 2))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 0],
        lambda x: x[:, :, 1:],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(2, 0, 1).permute(1, 2, 0),
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x.unfold(2, 4, 1)[:, 0],
    ],
)
def test_the_memory_layout_of_an_output_stays(view: Callable[[Tensor], Tensor]) -> None:
    """Bits of later sums can depend on it, and `view` can fail."""
    seen: list[Tensor] = []
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 42), Does(lambda x: view(x.reshape(-1, 6, 7))))
    module.append(Does(lambda x: seen.append(x) or x.sum()[None]))
    with hook(module.eval(), layout={"2": "vector" if view(torch.zeros(2, 6, 7)).dim() == 2 else "0+tokens"}) as hooked:
        hooked.capture(pictures(), ["3"])
        hooked.splice(pictures(), "2@all", same)
    assert torch.equal(seen[-1], seen[-2])
    dense = 0 not in seen[-2].stride() and seen[-2].stride() != (42, 1, 1)
    assert (seen[-1].stride() == seen[-2].stride()) is dense  # expanded ones cannot


class Own(Exception):
    pass


@pytest.mark.parametrize("kind", [Own, KeyboardInterrupt, StopIteration, UsageError])
@pytest.mark.parametrize("hooked_by_user", [False, True])
def test_an_exception_in_the_function_reaches_the_caller_as_itself(
    kind: type[BaseException], hooked_by_user: bool
) -> None:
    module = net(nn.Dropout()).train()
    if hooked_by_user:
        module[1].register_forward_hook(lambda _m, _a, out: out * 2)
    keys = [list(part.__dict__) for part in module.modules()]
    error = kind("mine")

    def fails(_rows: Tensor) -> Tensor:
        raise error

    hooked = hook(module)
    expected = hooked.splice(pictures(), "1", same)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            hooked.splice(pictures(), "1", fails)
        assert caught.value is error
        assert all(part.training for part in module.modules())
        assert torch.equal(hooked.splice(pictures(), "1", same), expected)
    hooked.close()
    assert [list(part.__dict__) for part in module.modules()] == keys
    assert len(module[1]._forward_hooks) == hooked_by_user


def test_layers_that_cannot_be_spliced_say_so() -> None:
    module = net(Does(lambda x: x.sum()), Does(lambda x: x.expand(3, 6) if x.dim() == 0 else x))
    module[3] = Does(lambda x: torch.ones(3, 6) * x)
    double = Point(module[1], convert=lambda x: x * 2)
    assert double.revert is None
    with hook(module) as hooked:
        with pytest.raises(SiteError, match="site 'm/2': the layer's output has no batch axis"):
            hooked.splice(pictures(), "2", same)
        with pytest.raises(UnknownLayerError, match="model 'm' has no layer 'nowhere'"):
            hooked.splice(pictures(), "nowhere", same)
        with pytest.raises(UnknownLayerError, match=r"model 'm' has no layer '1\*'"):
            hooked.splice(pictures(), "1*", same)
        with pytest.raises(SiteError, match="@cls needs a class token"):
            hooked.splice(pictures(), "1@cls", same)


def test_named_points_are_converted_and_put_back() -> None:
    module = net()
    points = {
        "double": Point(module[1], convert=lambda x: x * 2, revert=lambda x: x / 2),
        "oneway": Point(module[1], convert=lambda x: x * 3),
        "plain": Point(module[1]),
    }
    grey = torch.zeros(1, 3, 4, 4)
    with HookedModel(module, name="m", preprocess=lambda _: grey, example=grey, points=points) as hooked:
        batch = pictures()
        captured = hooked.capture(batch, ["plain", "double", "oneway"])
        assert torch.equal(captured["double"], captured["plain"] * 2)
        shifted = hooked.splice(batch, "double", lambda rows: rows + 1)
        assert torch.equal(shifted, hooked.splice(batch, "plain", lambda rows: (rows * 2 + 1) / 2))
        with pytest.raises(SiteError, match="layer 'oneway' cannot be spliced: the adapter converts it"):
            hooked.splice(batch, "oneway", same)


# --- calls and containers ---


def test_one_call_of_several() -> None:
    shared = nn.Linear(6, 6)
    module = net(shared, nn.Tanh(), shared)
    batch, zero = pictures(), torch.zeros_like
    with torch.no_grad():
        expected = module(batch)
        first = module[5](shared(torch.zeros(3, 6)))
        second = module[5](torch.zeros(3, 6))
    with hook(module) as hooked:
        assert torch.equal(hooked.splice(batch, "2~0", same), expected)
        assert torch.equal(hooked.splice(batch, "2~1", same), expected)
        assert torch.equal(hooked.splice(batch, "2~0", zero), first)
        assert torch.equal(hooked.splice(batch, "4~1", zero), second)
        with pytest.raises(SiteError, match="layer '2' of model 'm' runs 2 times"):
            hooked.splice(batch, "2", zero)


Old = namedtuple("Old", ["x", "note"])


class Named(NamedTuple):
    x: Tensor
    note: Any


@dataclass(frozen=True)
class Record:
    x: Tensor
    note: Any = "note"


def hugging_face(x: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=x, hidden_states=(x * 2, x * 3))


@pytest.mark.parametrize(
    ("make", "element", "get"),
    [
        (lambda x: (x, x * 2), "0", lambda out: out[0]),
        (lambda x: [x * 2, x, None], "1", lambda out: out[1]),
        (lambda x: {"x": x, "y": x * 2, "n": 7}, "x", lambda out: out["x"]),
        (lambda x: {"deep": [x * 2, {"x": x}]}, "deep.1.x", lambda out: out["deep"][1]["x"]),
        (lambda x: Named(x, x * 2), "x", lambda out: out.x),
        (lambda x: Old(x, "note"), "x", lambda out: out.x),
        (lambda x: Record(x, x * 2), "x", lambda out: out.x),
        (hugging_face, "last_hidden_state", lambda out: out.last_hidden_state),
        (hugging_face, "hidden_states.1", lambda out: out.hidden_states[1] / 3),
    ],
)
@pytest.mark.parametrize("hooked_by_user", [False, True])
def test_an_element_of_a_container(make: Any, element: str, get: Any, hooked_by_user: bool) -> None:
    seen: list[Any] = []
    module = net(Does(make), Does(lambda out: seen.append(out) or get(out)))
    if hooked_by_user:
        module[2].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        expected = module(pictures())
    original = seen[-1]
    with hook(module) as hooked:
        assert torch.equal(hooked.splice(pictures(), f"2#{element}", same), expected)
        changed = hooked.splice(pictures(), f"2#{element}", torch.zeros_like)
    assert torch.equal(changed, module[4].bias.detach().expand(3, 2))
    assert type(seen[-1]) is type(original)
    assert get(seen[-1]).abs().max() == 0
    assert list(vars(seen[-1])) == list(vars(original)) if hasattr(original, "__dict__") else True


@pytest.mark.parametrize("edit", ["new value", "in place", "removed"])
def test_a_user_hook_on_the_layer_comes_before_the_splice(edit: str) -> None:
    module = net()
    first = module[1](pictures().flatten(1)).detach()
    given: list[Tensor] = []

    def in_place(_module: nn.Module, _args: Any, out: Tensor) -> None:
        out.add_(1)

    handle = module[1].register_forward_hook(in_place if edit == "in place" else lambda _m, _a, out: out + 1)
    if edit == "removed":
        handle.remove()
    with hook(module) as hooked:
        output = hooked.splice(pictures(), "1", lambda rows: given.append(rows.clone()) or rows * 0 + 1)
    assert torch.equal(given[0], first if edit == "removed" else first + 1)
    assert torch.equal(output, module[2](torch.ones(3, 6)).detach())  # and what `fn` gives goes on unchanged


def test_model_outputs_that_are_no_single_tensor() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    tiny = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    module = ViTForImageClassification(ViTConfig(**tiny, image_size=16, patch_size=8, num_labels=5)).eval()
    batch = pictures(size=16)
    with torch.no_grad():
        expected = module(batch, output_hidden_states=True)
    with hook(module, size=16, forward_args=lambda x: {"pixel_values": x}) as hooked:
        assert torch.equal(hooked.splice(batch, "vit.layernorm@all", same), expected.logits)
        assert torch.equal(hooked.splice(batch, "vit#last_hidden_state@all", same), expected.logits)
        zero = hooked.splice(batch, "vit#last_hidden_state@all", torch.zeros_like)
        assert torch.equal(zero, module.classifier.bias.detach().expand(3, 5))
    options: dict[str, Any] = {"forward_args": lambda x: {"pixel_values": x, "output_hidden_states": True}}
    with hook(module, size=16, **options) as hooked:
        with pytest.raises(SiteError, match=r"layer '\(output\)' outputs 4 tensors") as caught:
            hooked.splice(batch, "vit.layernorm@all", same)
        assert caught.value.hint.startswith("choose one of: (output)#logits")
        assert torch.equal(hooked.splice(batch, "classifier", same, output="logits"), expected.logits)
        hidden = hooked.splice(batch, "vit.layernorm@all", same, output="hidden_states.2")
        assert torch.equal(hidden, expected.hidden_states[2])


# --- gradients ---


class Smooth(nn.Module):
    """All steps smooth, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 2), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("policy", ["pool", "patch", "all"])
def test_gradients_agree_with_finite_differences(policy: str) -> None:
    module = Smooth().eval()
    pixels = pictures(2, size=3).double().requires_grad_()
    scale = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
    with hook(module, size=3) as hooked:

        def output(x: Tensor, s: Tensor) -> Tensor:
            return hooked.splice(x, f"conv@{policy}", lambda rows: torch.sin(rows) * s, grad=True)

        assert torch.autograd.gradcheck(output, (pixels, scale))
        plain = hooked.splice(pixels, "conv", same, grad=True)
        assert torch.autograd.gradcheck(lambda x: hooked.splice(x, "conv", same, grad=True), (pixels,))
        assert not hooked.splice(pixels, "conv", same).requires_grad
    wanted = torch.autograd.grad(module(pixels).sum(), pixels)[0]
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), pixels)[0], wanted)
    assert module.conv.weight.requires_grad
    assert module.conv.weight.grad is None


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_inside_activation_checkpointing_are_right_or_refused(reentrant: bool) -> None:
    """A backward pass would run the checkpointed part anew, without the splice: wrong gradients in silence."""
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    module = net(Does(lambda x: checkpoint(inner, x, use_reentrant=reentrant)))
    module[2].add_module("inner", inner)
    pixels = pictures().requires_grad_()
    with hook(module) as hooked:
        with torch.no_grad():
            expected = module[3](inner[3](inner[2](inner[1](inner[0](module[1](pixels.flatten(1)))) * 2)))
        output = hooked.splice(pixels, "2.inner.1", lambda rows: rows * 2)
        assert torch.equal(output, expected)
        with pytest.raises(UsaeProbeError, match=r"'m/2\.inner\.1' .*checkpoint"):
            hooked.splice(pixels, "2.inner.1", lambda rows: rows * 2, grad=True)
        before = hooked.splice(pixels, "1", lambda rows: rows * 2, grad=True)
        before.sum().backward()
    wanted = pictures().requires_grad_()
    module[3](inner(module[1](wanted.flatten(1)) * 2)).sum().backward()
    torch.testing.assert_close(pixels.grad, wanted.grad)
