"""`attach` on any `nn.Module`: of every library, compiled, wrapped, hooked, parametrised, failing, interrupted."""

from __future__ import annotations

import copy
import hashlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from usae_probe import HookedModel, attach
from usae_probe.errors import SiteError, UnknownLayerError, UsaeProbeError, UsaeProbeWarning

from .toys import Does, flat_net

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 8


def hook(module: nn.Module, *layers: Any, size: int = SIZE, **options: Any) -> HookedModel:
    given: dict[str, Any] = {"image_size": size, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return attach(module, name="m", layers=layers, **{**given, **options})


def pictures(n: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def net(*middle: nn.Module) -> nn.Sequential:
    return flat_net(SIZE, 4, *middle)


def tensors(value: Any) -> Any:
    """A clone of what a plain hook is given."""
    if isinstance(value, Tensor):
        return value.clone()
    items = value.items() if hasattr(value, "items") else enumerate(value)
    return {str(key): item.clone() for key, item in items if isinstance(item, Tensor)}


@contextmanager
def watched(module: nn.Module, *names: str) -> Iterator[dict[str, list[Any]]]:
    """What plain forward hooks, registered last, see of each layer: one entry per call."""
    seen: dict[str, list[Any]] = {name: [] for name in names}
    parts = dict(module.named_modules(remove_duplicate=False))
    handles = [
        parts[name].register_forward_hook(lambda _m, _a, out, name=name: seen[name].append(tensors(out)))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def plain(module: nn.Module, call: Callable[[], Any], *names: str) -> dict[str, list[Any]]:
    with watched(module, *names) as seen, torch.no_grad():
        call()
    return seen


def same_as_plain(module: nn.Module, *names: str, size: int = SIZE, call: Any = None, **options: Any) -> None:
    """Captures of these layers equal what plain hooks clone, bit for bit, and the model's output is its own."""
    batch = pictures(size=size)
    call = call or (lambda: module(batch))
    seen = plain(module, call, *names)
    before = state_of(module)
    with hook(module, size=size, **options) as hooked:
        captured = hooked.capture(batch, names)
    assert list(captured) == list(names)
    for name in names:
        assert len(seen[name]) == 1, name
        assert torch.equal(captured[name], seen[name][0]), name
        assert captured[name].dtype == seen[name][0].dtype
    assert state_of(module) == before


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that has to be as it was: `__dict__` keys, hooks, flags, gradients, bytes."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        held = [*part._parameters.items(), *part._buffers.items()]
        found[name] = (
            list(part.__dict__),
            {key: list(value.items()) for key, value in part.__dict__.items() if "hook" in key and value},
            part.training,
            [(key, id(t), t.requires_grad, t.grad is None, _hash(t)) for key, t in held if t is not None],
        )
    return found


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# --- libraries ---


@pytest.mark.parametrize(
    ("name", "options", "size", "layers"),
    [
        ("resnet18", {"num_classes": 5}, 32, ["bn1", "layer1.0.bn1", "layer2.1", "avgpool", "fc"]),
        ("convnext_tiny", {"num_classes": 5}, 32, ["features.0", "features.1.0", "features.1.0.block.3", "avgpool"]),
    ],
)
def test_torchvision_models(name: str, options: dict[str, Any], size: int, layers: list[str]) -> None:
    same_as_plain(getattr(torchvision.models, name)(**options).eval(), *layers, size=size)


def test_torchvision_transformers() -> None:
    vit = torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5).eval()
    same_as_plain(vit, "conv_proj", "encoder.layers.encoder_layer_0", "encoder.ln", "heads.head", size=16)
    swin = torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5).eval()
    same_as_plain(swin, "features.0", "features.1.0.attn", "features.1", "norm", "avgpool", size=16)


TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def hugging_face(kind: str) -> nn.Module:
    import transformers as hf

    vit = {**TINY, "image_size": 16, "patch_size": 8}
    convnext = {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}
    made: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**vit)),
        "classifier": lambda: hf.ViTForImageClassification(hf.ViTConfig(**vit, num_labels=5)),
        "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(**convnext)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**vit)),
        "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**vit)),
    }
    return made[kind]().eval()


@pytest.mark.parametrize(
    ("kind", "size", "layers"),
    [
        ("vit", 16, ["embeddings", "layers.0", "layernorm", "pooler"]),
        ("classifier", 16, ["vit.embeddings", "vit.layernorm", "classifier"]),
        ("convnext", 32, ["embeddings", "encoder.stages.1", "layernorm"]),
        ("dinov2", 16, ["embeddings", "encoder.layer.1", "layernorm"]),
        ("clip", 16, ["embeddings", "encoder.layers.0", "post_layernorm"]),
    ],
)
def test_hugging_face_models(kind: str, size: int, layers: list[str]) -> None:
    module = hugging_face(kind)
    same_as_plain(module, *layers, size=size, forward_args=lambda x: {"pixel_values": x})


def test_outputs_that_are_dataclasses_have_their_fields_as_elements() -> None:
    module = nn.Sequential()  # the parts that output dataclasses are below the top
    module.vit, module.clip = hugging_face("vit"), hugging_face("clip")
    module.forward = lambda x: module.vit(x).pooler_output + module.clip(x, output_hidden_states=True).pooler_output
    batch = pictures(size=16)
    with torch.no_grad():
        vit, clip = module.vit(batch), module.clip(batch, output_hidden_states=True)
    names = ["vit#last_hidden_state", "vit#pooler_output", "clip#pooler_output", "clip#hidden_states.1"]
    with hook(module, size=16) as hooked:
        captured = hooked.capture(batch, names)
        with pytest.raises(SiteError, match="layer 'vit' outputs 2 tensors") as caught:
            hooked.capture(batch, ["vit"])
    assert caught.value.hint == "choose one of: vit#last_hidden_state, vit#pooler_output"
    expected = [vit.last_hidden_state, vit.pooler_output, clip.pooler_output, clip.hidden_states[1]]
    for name, value in zip(names, expected, strict=True):
        assert torch.equal(captured[name], value), name


def test_inputs_other_than_one_tensor() -> None:
    double = Does(lambda left, right, *, scale, flags: (left - right) * scale if flags["on"] else left)
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    module.double = double
    module.forward = lambda *args, **kwargs: module[1](module[0](double(*args, **kwargs)))
    module.eval()
    batch = pictures()
    named = {"scale": 3.0, "flags": {"on": True}}
    for given in (
        lambda x: {"left": x, "right": x / 2, **named},
        lambda x: {"right": x / 2, "left": x, **named},
    ):
        with hook(module, forward_args=given) as hooked:
            assert torch.equal(hooked.capture(batch, ["double"])["double"], (batch - batch / 2) * 3)
    pair = net()
    pair.forward = lambda left, right: pair[1](pair[0](left + right))
    with hook(pair, forward_args=lambda x: (x, 2 * x)) as hooked:
        assert torch.equal(hooked.capture(batch, ["0"])["0"], (batch + 2 * batch).flatten(1))
    listed = net()
    listed.forward = lambda pictures: listed[1](torch.stack([listed[0](one[None])[0] for one in pictures]))
    with hook(listed, forward_args=list) as hooked:  # a list of pictures, as detection models take it
        assert torch.equal(hooked.capture(batch, ["1"])["1"], listed[1](batch.flatten(1)).detach())


def test_a_model_that_takes_no_pictures_at_all() -> None:
    """It takes the pictures' means, and `preprocess` brings pictures of any sizes to one."""
    module = nn.Sequential(nn.Linear(3, 2, bias=False)).eval()
    nn.init.ones_(module[0].weight)
    given = [torch.full((3, 4, 5), 2, dtype=torch.uint8), torch.full((3, 9, 9), 5, dtype=torch.uint8)]

    def preprocess(pictures: Any) -> Tensor:
        return torch.stack([picture[:, :4, :4].float() for picture in pictures])

    options: dict[str, Any] = {"preprocess": preprocess, "forward_args": lambda x: x.mean(dim=(2, 3))}
    with attach(module, name="m", layers=["0"], **options) as hooked:
        assert hooked.rows(hooked.preprocess(given))["m/0"].tolist() == [[6.0, 6.0], [15.0, 15.0]]


# --- compiled, wrapped, other dtypes and devices ---


def test_a_compiled_model_is_unwrapped_and_says_so() -> None:
    module = net(nn.ReLU())
    compiled = torch.compile(module, backend="eager")
    batch = pictures()
    with torch.no_grad():
        expected = compiled(batch)
    with pytest.warns(UsaeProbeWarning, match=r"OptimizedModule around Sequential is left aside: .* in '._orig_mod'"):
        hooked = hook(compiled)
    with hooked:
        assert hooked.module is module
        assert [info.name for info in hooked.layers()] == ["0", "1", "2", "3"]
        captured = hooked.capture(batch, ["1", "3"])
        with torch.no_grad():
            assert torch.equal(compiled(batch), expected)  # while it is attached to
    assert torch.equal(captured["1"], module[1](batch.flatten(1)).detach())
    assert torch.equal(captured["3"], expected)
    with torch.no_grad():
        assert torch.equal(compiled(batch), expected)


def test_a_model_compiled_in_place() -> None:
    module = net(nn.ReLU())
    expected = plain(module, lambda: module(pictures()), "1", "3")
    module.compile(backend="eager")
    before = state_of(module)
    with torch.no_grad():
        assert torch.equal(module(pictures()), expected["3"][0])
    with hook(module) as hooked:
        for _ in range(2):
            captured = hooked.capture(pictures(), ["1", "3"])
            assert torch.equal(captured["1"], expected["1"][0])
            assert torch.equal(captured["3"], expected["3"][0])
            with torch.no_grad():
                assert torch.equal(module(pictures()), expected["3"][0])
        spliced = hooked.splice(pictures(), "2", torch.zeros_like)
    assert torch.equal(spliced, module[3].bias.detach().expand(3, 4))
    assert state_of(module) == before
    with torch.no_grad():
        assert torch.equal(module(pictures()), expected["3"][0])


def test_a_compiled_part_of_a_model() -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    module = net(torch.compile(inner, backend="eager"))
    with torch.no_grad():
        expected = module(pictures())
    with hook(module, "2*") as hooked:
        names = [info.name for info in hooked.layers()]
        assert {"2", "2._orig_mod.0", "2._orig_mod.1"} <= set(names)
        captured = hooked.capture(pictures(), ["1", "2._orig_mod.0", "2._orig_mod.1", "3"])
        whole = hooked.capture(pictures(), ["2"])["2"]
    with torch.no_grad():
        assert torch.equal(captured["2._orig_mod.0"], inner[0](captured["1"]))
        assert torch.equal(whole, captured["2._orig_mod.1"])
        assert torch.equal(captured["3"], expected)
        assert torch.equal(module(pictures()), expected)


def test_compiled_models_in_two_threads() -> None:
    """That compilation is put aside is a setting of the whole process: who is done first must not end it."""
    runs: list[str] = []
    hold, held, done = (threading.Event() for _ in range(3))

    def backend(graph: Any, _inputs: Any) -> Any:
        runs.append("compiled")
        return graph.forward

    def slow(x: Tensor) -> Tensor:
        if hold.is_set():
            held.set()
            done.wait(10)
        return x + 0

    slow_one, quick = net(Does(slow), nn.ReLU()), net(Does(torch.relu))
    expected = plain(slow_one, lambda: slow_one(pictures()), "2", "4")
    slow_one[3].compile(backend=backend)
    quick.compile(backend=backend)
    with hook(slow_one) as first, hook(quick) as second, ThreadPoolExecutor(1) as pool:
        hold.set()
        captured = pool.submit(first.capture, pictures(), ["2", "3", "4"])
        assert held.wait(10)
        second.capture(pictures(), ["1"])
        done.set()
        assert torch.equal(captured.result()["4"], expected["4"][0])
        hold.clear()
    assert runs == []
    quick(pictures())
    assert runs == ["compiled"]  # it works again


def test_data_parallel_is_unwrapped_and_says_so() -> None:
    module = net(nn.ReLU())
    wrapped = torch.compile(nn.DataParallel(module), backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hooked = hook(wrapped)
    assert [str(each.message).partition(" is left")[0] for each in caught] == [
        "OptimizedModule around DataParallel",
        "DataParallel around Sequential",
    ]
    with hooked:
        assert hooked.module is module
        assert torch.equal(hooked.capture(pictures(), ["3"])["3"], module(pictures()).detach())
    assert torch.equal(nn.DataParallel(module)(pictures()), module(pictures()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)).eval().to(dtype)
    same_as_plain(module, "0", "1", "3", call=lambda: module(pictures().to(dtype)))
    with hook(module) as hooked:
        rows = hooked.rows(pictures(), hooked.expand(["0", "3"]))
        out = hooked.splice(pictures(), "3", lambda rows: rows.float())
    assert rows["m/0"].dtype == rows["m/3"].dtype == out.dtype == dtype
    assert torch.equal(out, module(pictures().to(dtype)).detach())


def test_a_live_model_is_cast_only_when_asked() -> None:
    assert hook(net()).capture(pictures(), ["1"])["1"].dtype == torch.float32
    assert hook(net(), dtype="bfloat16").capture(pictures(), ["1"])["1"].dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_cuda(dtype: torch.dtype) -> None:
    module = net(nn.ReLU(inplace=True)).cuda().to(dtype)
    batch = pictures()
    seen = plain(module, lambda: module(batch.cuda().to(dtype)), "1", "3")
    with hook(module) as hooked:
        captured = hooked.capture(batch, ["1", "3"])  # pictures on the CPU are brought over
        spliced = hooked.splice(batch, "1", lambda rows: rows)
        assert sum(hooked.time_shares().values()) > 0
    assert captured["1"].device.type == "cuda"
    assert all(torch.equal(captured[name], seen[name][0]) for name in captured)
    assert torch.equal(spliced, seen["3"][0])


# --- names ---


class Awkward(nn.Module):
    """Children whose names mean something to nnsight or to Python."""

    NAMES = ("output", "input", "inputs", "source", "root", "skip", "device", "inner", "tap", "iter", "a-b", "stop")

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.parts = nn.ModuleDict({name: nn.Linear(192, 192) for name in self.NAMES})
        self.output = nn.Linear(192, 5)
        self.list = nn.ModuleList([nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        for part in self.parts.values():
            x = part(x)
        return self.list[0](self.output(x))


def test_names_that_mean_something_elsewhere_and_submodules_in_containers() -> None:
    same_as_plain(Awkward().eval(), *(f"parts.{name}" for name in Awkward.NAMES), "output", "list.0")
    hidden = nn.Module()
    for name in ("root", "output", "source"):
        hidden.add_module(name, net())
    hidden.forward = lambda x: hidden.output(x) + hidden.source(x) + hidden.root(x)
    same_as_plain(nn.Sequential(hidden).eval(), "0.root", "0.output", "0.source.2", "0")


def test_the_same_tensor_asked_for_in_several_ways() -> None:
    module = net(nn.ReLU())
    module.append(module[3])
    module[4] = nn.Sequential(module[3], nn.Identity())
    module[3] = nn.Linear(6, 6)
    with hook(module) as hooked:
        site, *_ = hooked.expand(["1"])
        once = hooked.rows(pictures(), [site])
        assert torch.equal(hooked.rows(pictures(), [site, site])["m/1"], once["m/1"])
        captured = hooked.capture(pictures(), ["1", module[1], "1~0", "4", "4.1", "4.0"])
    assert list(captured) == ["1", "1~0", "4", "4.1", "4.0"]
    assert torch.equal(captured["1"], captured["1~0"])
    assert torch.equal(captured["4"], captured["4.0"])
    assert captured["1"].data_ptr() != captured["1~0"].data_ptr()


def test_layers_by_glob_and_by_module() -> None:
    module = net(nn.ReLU())
    with hook(module, "*") as hooked:
        assert [site.layer for site in hooked.sites] == ["0", "1", "2", "3"]
        assert list(hooked.capture(pictures(), [module[2], module[1]])) == ["2", "1"]
        with pytest.raises(UnknownLayerError, match="the ReLU given as a layer is no part of model 'm'"):
            hooked.capture(pictures(), [nn.ReLU()])
        with pytest.raises(UnknownLayerError, match="the Sequential given as a layer is no part of model 'm'"):
            hooked.capture(pictures(), [module])
    with hook(module, module[1], "3") as hooked:
        assert [str(site) for site in hooked.sites] == ["m/1", "m/3"]


def test_shared_modules_are_one_layer_with_calls() -> None:
    shared = nn.Linear(6, 6)
    module = net(shared, nn.ReLU(), shared)
    seen = plain(module, lambda: module(pictures()), "2")["2"]
    with hook(module) as hooked:
        info = {info.name: info for info in hooked.layers()}["2"]
        assert (info.calls, info.aliases) == (2, ("4",))
        captured = hooked.capture(pictures(), ["4~1", "2~0", "2~1"])
        with pytest.raises(SiteError, match="layer '4' of model 'm' runs 2 times"):
            hooked.capture(pictures(), ["4"])
    assert torch.equal(captured["2~0"], seen[0])
    assert torch.equal(captured["4~1"], seen[1])
    assert torch.equal(captured["2~1"], seen[1])
    assert not torch.equal(seen[0], seen[1])


class Deep(nn.Module):
    """Calls itself through a child, `depth` times."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.again = Does(lambda x, depth: self(x, depth))

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        return self.linear(self.again(x, depth + 1) if depth < 2 else x)


def test_a_module_that_calls_itself() -> None:
    module = net(Deep())
    seen = plain(module, lambda: module(pictures()), "2", "2.linear", "2.again")
    names = ["2~1", "2.again~0", "2~0", "2.linear~2", "2~2"]
    with hook(module) as hooked:
        captured = hooked.capture(pictures(), names)
        alone = {name: hooked.capture(pictures(), [name])[name] for name in names}
    for name in names:
        layer, _, call = name.partition("~")
        assert torch.equal(captured[name], seen[layer][int(call)])
        assert torch.equal(alone[name], seen[layer][int(call)])


def test_a_batch_that_takes_another_way_is_refused_not_guessed() -> None:
    act, swap = nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def in_some_order(x: Tensor) -> Tensor:
        first, second = swap if len(x) > 1 else reversed(swap)
        return second(first(x))

    often = net(Does(lambda x: torch.stack([act(one) for one in x])), act)
    ways = net(Does(in_some_order), nn.Identity())
    ways[2].add_module("swap", swap)
    with hook(often, layout={"3~2": "vector"}) as hooked:  # act runs once per picture, then once more
        assert {info.name: info.calls for info in hooked.layers()}["3"] == 3
        for ask in (
            lambda: hooked.capture(pictures(1), ["3~2"]),
            lambda: hooked.splice(pictures(1), "3~2", lambda rows: rows),
        ):
            with pytest.raises(UsaeProbeError, match="3~2' was not reached: the batch takes another way") as caught:
                ask()
            assert "ask for one layer at a time" in caught.value.hint
        assert hooked.capture(pictures(2), ["3~2"])["3~2"].shape == (2, 6)
    with hook(ways) as hooked:
        with pytest.raises(UsaeProbeError, match=r"'2\.swap\.1' was not reached"):
            hooked.capture(pictures(1), ["2.swap.0", "2.swap.1"])
        alone = hooked.capture(pictures(1), ["2.swap.0"])["2.swap.0"]
    assert torch.equal(alone, plain(ways, lambda: ways(pictures(1)), "2.swap.0")["2.swap.0"][0])


# --- what layers do ---


def test_parametrised_layers_and_in_place_activations() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm is deprecated, but in many models
        old = weight_norm(nn.Linear(6, 6))
    spectral, new = parametrizations.spectral_norm(nn.Linear(6, 6)), parametrizations.weight_norm(nn.Linear(6, 6))
    module = net(old, nn.ReLU(inplace=True), spectral, nn.ReLU(inplace=True), new, nn.Hardswish(inplace=True)).eval()
    same_as_plain(module, "2", "3", "4", "5", "6", "7", "8")


def test_views_and_expanded_outputs() -> None:
    """A layer that gives its input back, or a view of it, followed by one that overwrites it."""
    module = net(nn.Identity(), Does(lambda x: x[:, ::2].repeat(1, 2)), Does(lambda x: x.view(-1, 2, 3).flatten(1)))
    module.insert(5, nn.ReLU(inplace=True))
    module.insert(5, Does(lambda x: x.mean(1, keepdim=True).expand(-1, 6)))
    module.insert(6, Does(lambda x: x + 0))
    same_as_plain(module, "1", "2", "3", "4", "5", "6", "7", "8")


def test_frozen_parameters_and_flags_stay() -> None:
    module = net(nn.Dropout(0.5), nn.BatchNorm1d(6), nn.ReLU()).train()
    module[1].requires_grad_(False)
    module[3].eval()
    before = state_of(module)
    pixels = pictures().requires_grad_()
    with hook(module) as hooked:
        captured = hooked.capture(pixels, ["2", "3"], grad=True)
        assert torch.equal(captured["2"], module[1](pixels.flatten(1)))  # dropout is off
        captured["3"].sum().backward()
        assert pixels.grad.abs().max() > 0
        assert module[1].weight.grad is None
        module.zero_grad()
    assert state_of(module) == before


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of reentrant ones
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(reentrant: bool) -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    module = net(Does(lambda x: checkpoint(inner, x, use_reentrant=reentrant)))
    module[2].add_module("inner", inner)
    seen = plain(module, lambda: module(pictures()), "2.inner.1", "3")
    expected, pixels = pictures().requires_grad_(), pictures().requires_grad_()
    module(expected).square().sum().backward()
    with hook(module) as hooked:
        captured = hooked.capture(pixels, ["2.inner.1", "3"], grad=True)
        captured["3"].square().sum().backward()
        early = hooked.capture(pixels, ["2.inner.1"], grad=True)["2.inner.1"]
    assert torch.equal(captured["2.inner.1"], seen["2.inner.1"][0])
    assert torch.equal(early, seen["2.inner.1"][0])
    assert torch.equal(pixels.grad, expected.grad)
    if not reentrant:
        wanted, pixels = pictures().requires_grad_(), pictures().requires_grad_()
        inner[1](inner[0](module[1](module[0](wanted)))).sum().backward()
        with hook(module) as hooked:
            hooked.capture(pixels, ["2.inner.1"], grad=True)["2.inner.1"].sum().backward()
        assert torch.equal(pixels.grad, wanted.grad)


def test_an_empty_batch() -> None:
    with hook(net()) as hooked:
        assert hooked.capture(pictures(0), ["1"])["1"].shape == (0, 6)
        assert hooked.splice(pictures(0), "1", lambda rows: rows).shape == (0, 4)


# --- a user's own hooks ---


def edits(kind: str, module: nn.Module) -> Any:
    """Register a hook that changes the layer's output; returns its handle."""
    if kind == "new value":
        return module.register_forward_hook(lambda _m, _a, out: out * 2)
    if kind == "in place":
        return module.register_forward_hook(_triple)
    if kind == "with kwargs":
        return module.register_forward_hook(lambda _m, _a, kwargs, out: out + 1, with_kwargs=True)
    if kind == "always called":
        return module.register_forward_hook(lambda _m, _a, out: out - 1, always_call=True)
    if kind == "first":
        return module.register_forward_hook(lambda _m, _a, out: out * 5, prepend=True)
    if kind == "input":
        return module.register_forward_pre_hook(lambda _m, args: (args[0] - 2,))
    return register_module_forward_hook(lambda m, _a, out: out * 7 if m is module else None)


def _triple(_module: nn.Module, _args: Any, out: Tensor) -> None:
    out.mul_(3)


KINDS = ["new value", "in place", "with kwargs", "always called", "first", "input", "global"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before attach", "between captures"])
def test_a_hook_that_edits_a_layers_output_is_seen(kind: str, when: str) -> None:
    module = net(nn.ReLU())
    before = plain(module, lambda: module(pictures()), "1", "2", "3")
    handle = edits(kind, module[1]) if when == "before attach" else None
    hooked = hook(module)
    if when == "between captures":
        assert torch.equal(hooked.capture(pictures(), ["1"])["1"], before["1"][0])
        handle = edits(kind, module[1])
    expected = plain(module, lambda: module(pictures()), "1", "2", "3")
    captured = hooked.capture(pictures(), ["1", "2", "3"])
    for name in captured:
        assert torch.equal(captured[name], expected[name][0]), name
        assert not torch.equal(expected[name][0], before[name][0]), name
    assert torch.equal(hooked.splice(pictures(), "1", lambda rows: rows), expected["3"][0])
    handle.remove()
    again = hooked.capture(pictures(), ["1", "2", "3"])
    assert all(torch.equal(again[name], before[name][0]) for name in again)
    hooked.close()


def test_several_hooks_in_their_order_and_on_layers_above() -> None:
    module = nn.Sequential(net(nn.ReLU()), nn.ReLU()).eval()
    handles = [
        module[0][1].register_forward_hook(lambda _m, _a, out: out + 1),
        module[0][1].register_forward_hook(lambda _m, _a, out: out * 10),
        module[0].register_forward_hook(lambda _m, _a, out: out * 100),
        module.register_forward_hook(lambda _m, _a, out: out + 1000),
    ]
    first = pictures().flatten(1) @ module[0][1].weight.T + module[0][1].bias
    captured = {}
    with hook(module) as hooked:
        captured = hooked.capture(pictures(), ["0.1", "0.3", "0", "1"])
        output = hooked.splice(pictures(), "0.1", lambda rows: rows)
    torch.testing.assert_close(captured["0.1"], (first + 1) * 10)
    assert torch.equal(captured["0"], captured["0.3"] * 100)
    assert torch.equal(output, captured["1"] + 1000)
    assert all(len(part._forward_hooks) == n for part, n in ((module[0][1], 2), (module[0], 1), (module, 1)))
    for handle in handles:
        handle.remove()


def test_hooks_on_a_layer_with_several_calls_and_elements() -> None:
    act, pair = nn.ReLU(), Does(lambda x: {"left": x, "right": (x * 2, "note")})
    module = net(act, nn.Linear(6, 6), act, pair, Does(lambda out: out["left"] + out["right"][0]))
    count = iter(range(100))
    handles = [
        act.register_forward_hook(lambda _m, _a, out: out + 10 * next(count)),
        pair.register_forward_hook(lambda _m, _a, out: {"left": out["left"] - 1, "right": out["right"]}),
    ]
    names = ["2~0", "2~1", "5#left", "5#right.0", "3"]
    with hook(module) as hooked:
        count = iter(range(100))
        seen = plain(module, lambda: module(pictures()), "2", "3", "6")
        count = iter(range(100))
        captured = hooked.capture(pictures(), names)
        count = iter(range(100))
        late = hooked.capture(pictures(), ["2~1"])["2~1"]
    assert torch.equal(captured["2~0"], seen["2"][0])
    assert torch.equal(captured["2~1"], seen["2"][1])
    assert torch.equal(late, seen["2"][1])
    assert captured["2~1"].min() >= 10
    assert torch.equal(captured["5#left"] + captured["5#right.0"], seen["6"][0])
    for handle in handles:
        handle.remove()


def test_global_hooks_see_the_models_modules_and_no_others() -> None:
    module, seen = net(nn.ReLU()), []
    with hook(module) as hooked:
        handle = register_module_forward_hook(lambda m, _a, _o: seen.append(m))
        try:
            hooked.splice(pictures(), "1", lambda rows: rows)
        finally:
            handle.remove()
    assert seen == [*module, module]


# --- what goes wrong ---


class Blows(nn.Module):
    """Raises what it is armed with."""

    def __init__(self) -> None:
        super().__init__()
        self.armed: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.armed is signal.SIGINT:
            signal.raise_signal(signal.SIGINT)  # what the terminal does on Ctrl-C
        elif self.armed is not None:
            raise self.armed
        return x


@pytest.mark.parametrize("armed", [KeyboardInterrupt(), signal.SIGINT, SystemExit(3), ValueError("blown")])
@pytest.mark.parametrize("hooked_by_user", [False, True])
def test_the_pass_is_interrupted_and_the_model_stays_as_it_was(armed: Any, hooked_by_user: bool) -> None:
    module = net(Blows(), nn.Dropout(), nn.ReLU()).train()
    module[4].eval()
    handle = module[3].register_forward_hook(lambda _m, _a, out: out * 2) if hooked_by_user else None
    before = state_of(module)
    kind = KeyboardInterrupt if armed is signal.SIGINT else type(armed)
    hooked = hook(module)
    expected = hooked.capture(pictures(), ["1", "3", "5"])
    for run in (
        lambda: hooked.capture(pictures(), ["1", "3", "5"]),
        lambda: hooked.capture(pictures(), ["3"], grad=True),
        lambda: hooked.splice(pictures(), "3", lambda rows: rows),
        lambda: hooked.splice(pictures(), "1", lambda rows: rows * 2),
        hooked.time_shares,
    ):
        module[2].armed = armed
        with pytest.raises(kind) as caught:
            run()
        assert armed is signal.SIGINT or caught.value is armed
        module[2].armed = None
        assert [part.training for part in module] == [True, True, True, True, False, True]
        again = hooked.capture(pictures(), ["1", "3", "5"])
        assert all(torch.equal(again[name], expected[name]) for name in expected)
    hooked.close()
    assert state_of(module) == before
    assert handle is None or len(module[3]._forward_hooks) == 1


def test_attaching_is_interrupted() -> None:
    module = net(Blows()).train()
    module[2].armed = KeyboardInterrupt()
    before = state_of(module)
    with pytest.raises(KeyboardInterrupt):
        hook(module)
    assert state_of(module) == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, RuntimeError])
def test_the_caller_is_interrupted(kind: type[BaseException]) -> None:
    module = net().train()
    before = state_of(module)

    def caller() -> None:
        with hook(module) as hooked:
            hooked.capture(pictures(), ["1"])
            assert "__nnsight__" in module[1].__dict__
            raise kind

    with pytest.raises(kind):
        caller()
    assert state_of(module) == before


def test_what_can_be_done_with_a_model_can_be_done_again() -> None:
    module = net(nn.ReLU())
    with hook(module) as hooked:
        hooked.capture(pictures(), ["1"])
    program = torch.export.export(module, (pictures(),))
    assert torch.equal(program.module()(pictures()), module(pictures()))
    assert torch.equal(copy.deepcopy(module)(pictures()), module(pictures()))
    assert torch.equal(torch.compile(module, backend="eager")(pictures()), module(pictures()))
    assert torch.equal(torch.fx.symbolic_trace(module)(pictures()), module(pictures()))
