"""HookedModel: what it captures is what plain hooks see, and nothing is left behind in the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from usae_probe import HookedModel, attach
from usae_probe.errors import (
    SiteError,
    UnknownLayerError,
    UsaeProbeError,
    UsageError,
)
from usae_probe.hooks import LayerInfo

pytestmark = pytest.mark.usefixtures("one_thread")


def hook(module: nn.Module, *layers: str, name: str = "m", size: int = 32) -> HookedModel:
    return attach(module, name=name, layers=layers, image_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def pictures(n: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def plain(module: nn.Module, batch: Tensor, names: list[str], *, clone: bool = True) -> dict[str, Tensor]:
    """What plain forward hooks see, in eval mode."""
    kept: dict[str, Tensor] = {}
    parts = dict(module.named_modules())

    def keep(name: str) -> Any:
        def record(_module: nn.Module, _args: Any, output: Tensor) -> None:
            kept[name] = output.clone() if clone else output

        return record

    handles = [parts[name].register_forward_hook(keep(name)) for name in names]
    flags = {part: part.training for part in module.modules()}
    module.eval()
    module(batch)
    for part, flag in flags.items():
        part.training = flag
    for handle in handles:
        handle.remove()
    return {name: kept[name] for name in names}


def create(name: str, **options: Any) -> nn.Module:
    """An untrained timm model; timm's blocks begin as the identity (their last norm is zero), these do not."""
    module = timm.create_model(name, **options).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


class Net(nn.Module):
    """Convolution, then what each test needs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.pool(self.conv(x))))


# --- values ---


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("test_resnet", ["bn1", "layer1.0.bn2", "layer3.0.bn3", "layer1.0.act1", "maxpool"]),
        ("resnet10t", ["bn1", "layer1.0.bn2", "layer4"]),
        ("resnet18", ["bn1", "layer1.0.bn2", "layer3"]),
        ("dla46_c", ["level2.root", "level2.root.bn", "level5.root", "base_layer", "fc"]),
        ("test_vit", ["blocks.0", "blocks.5.attn", "norm", "patch_embed"]),
    ],
)
def test_captures_equal_plain_cloned_hooks_bit_for_bit(model: str, layers: list[str]) -> None:
    module = create(model)
    batch = pictures() if model != "test_vit" else pictures(size=160)
    with torch.no_grad():
        expected = plain(module, batch, layers)
    with hook(module, size=batch.shape[-1]) as hooked:
        captured = hooked.capture(batch, layers)
    assert equal(captured, expected)


def test_in_place_relu_and_addition_follow_and_do_not_show() -> None:
    """The layers above are the hard ones: without a clone, plain hooks see something else."""
    module = create("test_resnet")
    layers = ["bn1", "layer1.0.bn2"]
    with torch.no_grad():
        overwritten = plain(module, pictures(), layers, clone=False)
    with hook(module) as hooked:
        captured = hooked.capture(pictures(), layers)
    for layer in layers:
        assert captured[layer].min() < 0 <= overwritten[layer].min()


def test_any_order_and_duplicates() -> None:
    module = create("test_resnet")
    order = ["layer4", "bn1", "layer2", "bn1", "layer1.0.bn1", "layer4"]
    with torch.no_grad():
        expected = plain(module, pictures(), list(dict.fromkeys(order)))
    with hook(module) as hooked:
        captured = hooked.capture(pictures(), order)
        assert hooked.capture(pictures(), []) == {}
    assert equal({name: captured[name] for name in expected}, expected)
    assert list(captured) == ["layer4", "bn1", "layer2", "layer1.0.bn1"]


def test_rows_in_the_order_of_the_sites_whatever_the_order_of_execution() -> None:
    module = create("test_resnet")
    with hook(module, "layer4", "layer1.0.bn2", "layer2@mean") as hooked:
        assert [str(site) for site in hooked.sites] == ["m/layer4", "m/layer1.0.bn2", "m/layer2@mean"]
        rows, raw = hooked.rows(pictures()), hooked.capture(pictures(), ["layer4", "layer1.0.bn2", "layer2"])
    assert list(rows) == ["m/layer4", "m/layer1.0.bn2", "m/layer2@mean"]
    for values, maps in zip(rows.values(), raw.values(), strict=True):
        assert torch.equal(values, maps.mean(dim=(2, 3)))


# --- flags, gradients, early stop ---


def test_training_mode_is_put_aside_and_given_back_module_by_module() -> None:
    module = create("test_resnet", drop_rate=0.5).train()
    module.layer1.eval()
    module.bn1.eval()
    flags = {name: part.training for name, part in module.named_modules()}
    running = module.layer2[0].bn1.running_mean.clone()
    with torch.no_grad():
        expected = plain(module, pictures(), ["bn1", "layer4"])
    hooked = hook(module)
    captured = hooked.capture(pictures(), ["bn1", "layer4"])
    assert {name: part.training for name, part in module.named_modules()} == flags
    hooked.close()
    assert {name: part.training for name, part in module.named_modules()} == flags
    assert equal(captured, expected)  # batch norm took its running statistics
    assert torch.equal(module.layer2[0].bn1.running_mean, running)


def test_outputs_without_gradient_can_be_trained_on() -> None:
    with hook(Net().eval()) as hooked:
        captured = hooked.capture(pictures(), ["conv"])["conv"]
        rows = hooked.rows(pictures(), hooked.expand(["fc"]))["m/fc"]
    assert not captured.requires_grad
    assert not captured.is_inference()
    assert not rows.is_inference()
    layer = nn.Linear(5, 1)
    layer(rows).sum().backward()
    assert torch.equal(layer.weight.grad[0], rows.sum(0))


def test_gradients_to_the_pixels_equal_those_of_plain_hooks() -> None:
    module = create("test_resnet")
    layers = ["bn1", "layer3"]
    weights = {"bn1": 1.0, "layer3": -3.0}

    def gradient(captured: dict[str, Tensor], pixels: Tensor) -> Tensor:
        sum(weights[name] * captured[name].square().mean() for name in layers).backward()
        return pixels.grad

    expected_pixels, pixels = (pictures().requires_grad_() for _ in range(2))
    expected = gradient(plain(module, expected_pixels, layers), expected_pixels)
    with hook(module) as hooked:
        with torch.no_grad():  # as a caller may have it
            captured = hooked.capture(pixels, layers, grad=True)
        found = gradient(captured, pixels)
        assert found.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        again = pictures().requires_grad_()
        hooked.rows(again, hooked.expand(["layer3"]), grad=True)["m/layer3"].sum().backward()
        assert again.grad.abs().max() > 0


def test_the_forward_pass_ends_after_the_last_layer_wanted() -> None:
    module = create("test_resnet")
    hooked = hook(module)
    calls = dict.fromkeys(["layer1", "layer2", "layer4", "fc"], 0)

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    for name in calls:
        getattr(module, name).register_forward_pre_hook(count(name))
    hooked.capture(pictures(), ["layer1", "bn1"])
    assert calls == {"layer1": 1, "layer2": 0, "layer4": 0, "fc": 0}
    hooked.capture(pictures(), ["layer2"])
    assert calls == {"layer1": 2, "layer2": 1, "layer4": 0, "fc": 0}
    hooked.close()


# --- leaving nothing behind ---


def state_of(module: nn.Module) -> dict[str, Any]:
    return {
        name: (
            type(part),
            sorted(part.__dict__),
            part.__dict__.get("forward"),
            {key: list(value) for key, value in part.__dict__.items() if "hooks" in key and value},
            part.training,
            [(key, id(p), p.requires_grad, p.grad is None, p.sum().item()) for key, p in part.named_parameters()],
        )
        for name, part in module.named_modules()
    }


def test_close_leaves_the_model_as_it_was() -> None:
    module = create("test_resnet").train()
    module.layer3.eval()
    module.register_forward_hook(lambda *_: None)
    module.layer1.forward = module.layer1.forward  # somebody else's patch, an instance attribute
    before, random = state_of(module), torch.get_rng_state()
    hooked = hook(module, "layer1", "layer4")
    assert state_of(module) == before  # nothing is wrapped before the first capture
    hooked.rows(pictures())
    hooked.capture(pictures(), ["bn1"], grad=True)
    assert "__nnsight__" in module.__dict__
    hooked.close()
    assert state_of(module) == before
    assert torch.equal(torch.get_rng_state(), random)
    hooked.close()  # twice is once
    assert state_of(module) == before


def test_leaving_the_block_by_an_exception_closes() -> None:
    module = create("test_resnet")
    before = state_of(module)
    hooked = hook(module, "layer1")

    def leave() -> None:
        with hooked:
            hooked.rows(pictures())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
    assert state_of(module) == before
    with pytest.raises(UsaeProbeError, match="hooked model 'm' is closed"):
        hooked.rows(pictures())


class Fuse(Net):
    """Fails in the middle of the forward pass while `armed`."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.armed:
            raise ValueError("the fuse has blown")
        return self.fc(self.flat(self.pool(x)))


def test_an_exception_inside_the_forward_pass_leaves_nothing_behind() -> None:
    module = Fuse().train()
    module.pool.eval()
    before = state_of(module)
    hooked = hook(module, "fc")
    expected = hooked.rows(pictures())
    module.armed = True
    with pytest.raises(ValueError, match="the fuse has blown"):
        hooked.rows(pictures())
    assert module.training
    assert not module.pool.training
    module.armed = False
    assert equal(hooked.rows(pictures()), expected)  # and captures go on
    hooked.close()
    assert state_of(module) == before


def test_a_dry_run_that_fails_leaves_nothing_behind_and_says_what_was_given() -> None:
    module = Fuse().train()
    module.armed = True
    before = state_of(module)
    with pytest.raises(UsageError, match=r"Fuse cannot take an input of shape \[1, 3, 32, 32\]: the fuse has blown"):
        hook(module)
    assert state_of(module) == before


def test_two_hooked_models_on_one_module_in_any_order_of_closing() -> None:
    module = create("test_resnet")
    before = state_of(module)
    first, second = hook(module, "layer1", name="a"), hook(module, "bn1", name="b")
    expected = first.rows(pictures())
    other = second.rows(pictures())
    assert equal(first.rows(pictures()), expected)
    first.close()
    assert equal(second.rows(pictures()), other)
    second.close()
    assert state_of(module) == before


def test_export_works_again_after_close() -> None:
    module = Net().eval()
    batch = (pictures(),)
    torch.export.export(module, batch)
    with hook(module, "fc") as hooked:
        hooked.rows(*batch)
    program = torch.export.export(module, batch)
    assert torch.equal(program.module()(*batch), module(*batch))


def test_capture_after_close_is_refused() -> None:
    hooked = hook(Net().eval(), "fc")
    hooked.close()
    with pytest.raises(UsaeProbeError, match=r"hooked model 'm' is closed \(attach the model again\)"):
        hooked.capture(pictures(), ["fc"])
    assert [info.name for info in hooked.layers()] == ["conv", "pool", "flat", "fc"]  # what is known stays known


# --- layers ---


class Odd(Net):
    """A module that runs twice, one that never runs, tuples and dicts, an alias, a root of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.spare = nn.Linear(2, 3)
        self.two = Several(lambda x: (x, x * 2))
        self.one = Several(lambda x: (x + 1, "a note", None))
        self.named = Several(lambda x: {"hidden": x * 3, "n": 7})
        self.scalar = Several(lambda x: x.mean())
        self.output = nn.Linear(5, 5)
        self.alias = self.output

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.act(x)))
        x = self.two(x)[0]
        x = self.one(x)[0]
        x = self.named(x)["hidden"]
        self.scalar(x)
        return self.output(self.fc(self.flat(self.pool(x))))


class Several(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.fixture
def odd() -> Iterator[HookedModel]:
    with hook(Odd().eval()) as hooked:
        yield hooked


def test_layers_lists_everything_in_execution_order(odd: HookedModel) -> None:
    infos = {info.name: info for info in odd.layers()}
    names = ["act", "conv", "two", "one", "named", "scalar", "pool", "flat", "fc", "output"]
    assert list(infos) == [*names, "spare"]  # what never runs comes last
    assert infos["conv"] == LayerInfo("conv", "Conv2d", (4, 16, 16), 1, 1, 3 * 4 * 9 + 4, infos["conv"].layout)
    assert (infos["act"].calls, infos["act"].order) == (2, 0)
    assert (infos["spare"].calls, infos["spare"].order, infos["spare"].output_shape) == (0, None, None)
    assert infos["output"].aliases == ("alias",)
    assert infos["two"].output_shape is None
    assert infos["one"].output_shape == infos["named"].output_shape == (4, 16, 16)


def test_one_tensor_in_a_tuple_or_dict_is_taken(odd: HookedModel) -> None:
    captured = odd.capture(pictures(), ["named", "one", "conv"])
    assert torch.equal(captured["one"], captured["conv"].relu() + 1)
    assert torch.equal(captured["named"], captured["one"] * 3)


def test_several_tensors_are_told_apart_by_element(odd: HookedModel) -> None:
    captured = odd.capture(pictures(), ["two#0", "two#1", "one"])
    assert torch.equal(captured["two#1"], captured["two#0"] * 2)
    assert torch.equal(captured["one"], captured["two#0"] + 1)
    sites = odd.expand(["two#1", "one#0", "named#hidden", "one"])
    assert [str(site) for site in sites] == ["m/two#1", "m/one", "m/named"]  # the only tensor needs no element
    rows = odd.rows(pictures(), sites)
    torch.testing.assert_close(rows["m/two#1"], captured["two#1"].mean(dim=(2, 3)))
    for ask in (lambda: odd.capture(pictures(), ["two"]), lambda: odd.expand(["two"])):
        with pytest.raises(SiteError, match="layer 'two' outputs 2 tensors") as caught:
            ask()
        assert caught.value.hint == "choose one of: two#0, two#1"
    with pytest.raises(SiteError, match="layer 'two' has no element '#2' in its output") as caught:
        odd.expand(["two#2"])
    assert caught.value.hint == "it has: two#0, two#1"
    with pytest.raises(SiteError, match="layer 'conv' has no element '#0'") as caught:
        odd.expand(["conv#0"])
    assert caught.value.hint == "its output is one tensor: write 'conv'"


def test_an_output_without_a_batch_axis_is_no_site(odd: HookedModel) -> None:
    assert odd.capture(pictures(), ["scalar"])["scalar"].shape == ()
    with pytest.raises(SiteError, match="site 'm/scalar': the layer's output has no batch axis"):
        odd.expand(["scalar"])


def test_each_call_of_a_layer_that_runs_twice(odd: HookedModel) -> None:
    captured = odd.capture(pictures(), ["act~1", "conv", "act~0"])
    assert torch.equal(captured["act~0"], pictures().relu())
    assert torch.equal(captured["act~1"], captured["conv"].relu())
    assert [str(site) for site in odd.expand(["act~1", "conv~0"])] == ["m/act~1", "m/conv"]
    for ask in (lambda: odd.capture(pictures(), ["act"]), lambda: odd.expand(["act"])):
        with pytest.raises(SiteError, match="layer 'act' of model 'm' runs 2 times in a forward pass") as caught:
            ask()
        assert caught.value.hint == "choose one: act~0, act~1"
    with pytest.raises(SiteError, match="site 'm/act~2': call 2 of a layer that runs 2 times"):
        odd.expand(["act~2"])


def test_heads_and_policies_that_a_layer_does_not_have(odd: HookedModel) -> None:
    with pytest.raises(SiteError, match="site 'm/conv:1': head 1 of a layer that has no axis of attention heads"):
        odd.expand(["conv:1"])
    with pytest.raises(SiteError, match="@patch needs a grid of places, but the layer gives vector"):
        odd.expand(["fc@patch"])
    with pytest.raises(SiteError, match="'conv@mean': a capture is the layer's whole output and takes no @mean"):
        odd.capture(pictures(), ["conv@mean"])
    with pytest.raises(UnknownLayerError, match=r"matches '\*' and can serve 'm/\*@cls'"):
        odd.expand(["*@cls"])


def test_a_layer_may_be_given_as_the_module_itself(odd: HookedModel) -> None:
    assert [str(site) for site in odd.expand([odd.module.conv, odd.module.alias])] == ["m/conv", "m/output"]
    captured = odd.capture(pictures(), [odd.module.fc])
    assert torch.equal(captured["fc"], odd.capture(pictures(), ["fc"])["fc"])
    with pytest.raises(UnknownLayerError, match="the Linear given as a layer is no part of model 'm'"):
        odd.expand([nn.Linear(2, 2)])


def test_a_layer_that_never_runs_is_refused(odd: HookedModel) -> None:
    with pytest.raises(UnknownLayerError, match="layer 'spare' of model 'm' never runs"):
        odd.capture(pictures(), ["spare"])


def test_an_unknown_layer_lists_the_nearest() -> None:
    with hook(create("test_resnet")) as hooked:
        with pytest.raises(UnknownLayerError, match="model 'm' has no layer 'layer5'") as caught:
            hooked.capture(pictures(), ["layer5"])
        assert "'layer4'" in caught.value.hint
        with pytest.raises(UnknownLayerError, match=r"no layer of model 'm' matches 'layer9\.\*'"):
            hooked.expand(["layer9.*"])


def test_aliases_name_the_same_module(odd: HookedModel) -> None:
    captured = odd.capture(pictures(), ["alias", "output", "fc"])
    assert torch.equal(captured["alias"], captured["output"])
    assert not torch.equal(captured["output"], captured["fc"])  # not the envoy's own `.output`
    assert [str(site) for site in odd.expand(["alias", "output"])] == ["m/alias"]  # one site, as it came first
    assert [str(site) for site in odd.expand(["*t", "alias"])] == ["m/flat", "m/output"]


def test_a_star_stays_within_a_dot_and_two_stars_do_not() -> None:
    def layers(hooked: HookedModel, pattern: str) -> list[str]:
        return [site.layer for site in hooked.expand([pattern])]

    with hook(create("test_resnet")) as hooked:
        order = [info.name for info in hooked.layers()]
        assert layers(hooked, "layer*") == ["layer1", "layer2", "layer3", "layer4"]
        assert layers(hooked, "layer1.*") == ["layer1.0"]
        assert layers(hooked, "layer?.0.bn1") == [f"layer{i}.0.bn1" for i in (1, 2, 3, 4)]
        assert layers(hooked, "layer1.**") == [name for name in order if name.startswith("layer1.")]
        assert layers(hooked, "**.bn1") == [name for name in order if name.endswith(".bn1")]
        assert layers(hooked, "*") == [name for name in order if "." not in name]
        assert [str(site) for site in hooked.expand(["layer*.0.bn2@mean"])][:1] == ["m/layer1.0.bn2@mean"]
        assert [site.layer for site in hooked.expand(["layer4", "layer*"])] == ["layer4", "layer1", "layer2", "layer3"]


def test_globs_pass_over_what_cannot_be_one_site(odd: HookedModel) -> None:
    assert [site.layer for site in odd.expand(["*"])] == ["conv", "one", "named", "pool", "flat", "fc", "output"]
    assert [site.layer for site in odd.expand(["*@patch"])] == ["conv", "one", "named", "pool"]


def test_bad_names() -> None:
    with pytest.raises(SiteError, match="model name 'a/b' is not usable"):
        hook(Net(), name="a/b")
    with pytest.raises(SiteError, match="'co nv' is no layer of the form"):
        hook(Net(), "co nv")


def test_repr_and_weights_hash() -> None:
    torch.manual_seed(1)
    module = Net()
    hooked, same = hook(module, "fc"), hook(module.train(), name="other")
    assert repr(hooked) == "HookedModel(m: Net, 4 layers, sites: m/fc)"
    assert hooked.weights_hash == same.weights_hash
    with torch.no_grad():
        module.fc.bias[0] += 1
    assert hook(module).weights_hash != hooked.weights_hash


def test_a_model_in_half_precision_without_parameters_too() -> None:
    with hook(Net().to(torch.bfloat16), "fc") as hooked:
        assert hooked.rows(pictures())["m/fc"].dtype == torch.bfloat16
    with hook(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), "1") as hooked:
        rows = hooked.rows(pictures())["m/1"]
    assert torch.equal(rows, nn.functional.avg_pool2d(pictures(), 4).flatten(1))


# --- threads ---


def test_two_models_in_parallel_threads() -> None:
    modules = [create("test_resnet"), create("resnet10t")]
    models = [hook(module, name=f"m{i}") for i, module in enumerate(modules)]
    layers = ["layer1.0.bn2", "layer4"]
    batches = [pictures(seed=seed) for seed in range(6)]
    with torch.no_grad():
        expected = [[plain(module, batch, layers) for batch in batches] for module in modules]
    start = threading.Barrier(2)

    def work(model: HookedModel) -> list[dict[str, Tensor]]:
        start.wait()
        return [model.capture(batch, layers) for batch in batches]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, models))
    for of_model, wanted in zip(found, expected, strict=True):
        assert all(equal(a, b) for a, b in zip(of_model, wanted, strict=True))
    for model in models:
        model.close()


def test_one_model_from_two_threads_takes_turns() -> None:
    module = create("test_resnet")
    batches = [pictures(seed=seed) for seed in range(12)]
    with torch.no_grad():
        expected = [plain(module, batch, ["layer2", "layer1.0.bn2"]) for batch in batches]
    with hook(module) as model, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda batch: model.capture(batch, ["layer2", "layer1.0.bn2"]), batches))
        assert model.capture(batches[0], ["layer2"], grad=True)["layer2"].requires_grad
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
