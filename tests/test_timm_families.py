"""Every family of timm: what a hooked model says and captures of it, against timm's source and plain hooks.

The truth about the layouts is in `timm_families.py`, written down from the architectures' source; rows are worked out
here from what plain hooks see and that truth alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import timm
import torch
from torch import Tensor, nn

from usae_probe import HookedModel, attach
from usae_probe.errors import SiteError
from usae_probe.hooks import LayerInfo, Layout
from usae_probe.world import one_thread

from .timm_families import FAMILIES, LEFT_OUT, Family, Truth, unrolled

TABLED = "1.0.31"
"""The version of timm whose modules are all in the table; a newer one may have more."""

POLICIES = ("pool", "cls", "mean", "patch", "all")

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Case:
    """A family's model, hooked, beside what plain hooks saw of it before it was."""

    model: str
    module: nn.Module
    hooked: HookedModel
    batch: Tensor
    truths: dict[str, Truth]
    order: list[str]
    raw: dict[str, Tensor]
    gradient: Tensor
    before: dict[str, Any]

    @property
    def tensors(self) -> list[str]:
        """The listed layers that give one tensor."""
        return list(self.raw)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.model)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    family: Family = request.param
    with one_thread():
        torch.manual_seed(0)
        module = create(family)
        batch, truths = torch.randn(2, 3, *family.size), family.truths()
        pixels = batch.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sum(projected(plain(module, pixels, list(truths))[1]).values()), pixels)
        with torch.no_grad():  # attention with a bias picks another kernel, with other last bits, under gradient
            order, raw = plain(module, batch, list(truths))
        before = state(module)
        with unchecked():
            hooked = attach(module, name="m", image_size=family.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        with hooked:
            yield Case(family.model, module, hooked, batch, truths, order, raw, gradient, before)


@contextmanager
def unchecked() -> Iterator[None]:
    """Leave the annotations unchecked: checking every step of the tracing takes longer than all else here together."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def create(family: Family) -> nn.Module:
    """The untrained model; what timm begins with one value (zero or 1e-6 on the way of a block) begins at random."""
    module = family.factory(family.model, pretrained=False, **family.options).eval()
    for parameter in module.parameters():
        if parameter.min() == parameter.max():
            nn.init.normal_(parameter)
    return module


def plain(module: nn.Module, batch: Tensor, layers: list[str]) -> tuple[list[str], dict[str, Tensor]]:
    """What plain forward hooks see in one pass: layers in the order they end in, and outputs."""
    order: dict[str, None] = {}
    outputs: dict[str, Any] = {}
    wanted = {layer.partition("#")[0] for layer in layers}

    def record(name: str, output: Any) -> None:
        if name in wanted and name not in order:
            outputs[name] = cloned(output)
        order.setdefault(name)

    handles = [
        part.register_forward_hook(lambda _part, _args, output, name=name: record(name, output))
        for name, part in module.named_modules()
        if name
    ]
    module(batch)
    for handle in handles:
        handle.remove()
    found = {layer: the_one(outputs[layer.partition("#")[0]], layer.partition("#")[2]) for layer in layers}
    return list(order), {layer: output for layer, output in found.items() if output is not None}


def cloned(output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return [cloned(item) for item in output]
    return output.clone() if isinstance(output, Tensor) else output


def the_one(output: Any, element: str) -> Tensor | None:
    """The element asked for, or the only tensor, or None."""
    if isinstance(output, Tensor):
        return output
    if element:
        return output[int(element)]
    tensors = [item for item in output if isinstance(item, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def projected(captured: dict[str, Tensor]) -> dict[str, Tensor]:
    """A random direction of each output (a plain sum has no gradient after a norm)."""
    return {
        layer: (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum()
        for layer, output in captured.items()
    }


def state(module: nn.Module) -> dict[str, Any]:
    """All that attaching could leave behind."""
    parts = {
        name: (sorted(part.__dict__), part.training, len(part._forward_hooks), len(part._forward_pre_hooks), type(part))
        for name, part in module.named_modules()
    }
    return parts | {name: (value.requires_grad, value.grad) for name, value in module.named_parameters()}


# --- by hand ---


def served(truth: Truth) -> set[str]:
    """The token policies that mean something on a layer."""
    if truth.kind == "none":
        return set()
    if truth.kind == "vector":
        return {"pool", "all"}
    if truth.kind == "tokens" and truth.prefix is None:
        return {"pool", "mean", "all"}
    return {"pool", "all"} | ({"cls"} if truth.has_cls else set()) | ({"mean", "patch"} if truth.grid else set())


def by_hand(raw: Tensor, truth: Truth, policy: str) -> Tensor:
    """Rows of a layer's output: one token per place, worked out from the truth alone."""
    if truth.kind == "vector":
        return raw
    if truth.kind == "nchw":
        raw = torch.stack([image.reshape(truth.channels, -1).T for image in raw])
    elif truth.kind == "nhwc":
        raw = torch.stack([image.reshape(-1, truth.channels) for image in raw])
    elif truth.heads:
        raw = torch.cat([raw[:, head] for head in range(truth.heads)], dim=-1)
    if policy == "all":
        return torch.cat(list(raw))
    if policy == "cls" or (policy == "pool" and truth.has_cls):
        return raw[:, 0]
    places = raw[:, truth.prefix or 0 :]
    if policy == "patch":
        return torch.cat([image if truth.order is None else image[list(truth.order)] for image in places])
    return places.sum(1) / places.shape[1]


def described(case: Case, layer: str) -> tuple[LayerInfo, tuple[int, ...] | None, Layout | None]:
    """What `layers()` says of a layer, or of an element of its output in its first run."""
    name, _, element = layer.partition("#")
    info = next(info for info in case.hooked.layers() if info.name == name)
    if not element:
        return info, info.output_shape, info.layout
    output = next(output for output in info.runs[0].outputs if output.element == element)
    return info, output.shape, output.layout


# --- the table ---


def test_every_module_of_timm_is_here() -> None:
    names = {family.model for family in FAMILIES}
    missing = {module for module in timm.list_modules() if not names & set(timm.list_models(module=module))}
    assert missing >= set(LEFT_OUT)
    assert missing == set(LEFT_OUT) or timm.__version__ != TABLED
    assert len(names) == len(FAMILIES) >= 120


def test_truths_are_read_as_spelled() -> None:
    assert Truth.parse("24 cls+4+tokens 2x3") == Truth("tokens", 24, 0, 5, True, (2, 3), None)
    assert Truth.parse("24 cls+4+tokens 2x3").shape == (11, 24)
    assert Truth.parse("24 cls+tokens").shape == (1, 24)
    assert Truth.parse("2*12 heads.0+tokens 2x3").shape == (2, 6, 12)
    assert Truth.parse("8 nhwc 2x3").shape == (2, 3, 8)
    assert unrolled(2, 4, 1) == (0, 2, 1, 3, 4, 6, 5, 7)
    # two levels: first the place within the 2 × 2 square, then the square within the 4 × 4 one
    assert unrolled(4, 4, 2) == (0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15)


def test_rows_by_hand() -> None:
    tokens = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]])
    truth = Truth("tokens", 1, 0, 1, True, (1, 3), (2, 0, 1))
    assert by_hand(tokens, truth, "pool").tolist() == [[1.0]]
    assert by_hand(tokens, truth, "mean").tolist() == [[5.0]]
    assert by_hand(tokens, truth, "patch").tolist() == [[9.0], [2.0], [4.0]]
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])  # two channels, one row of two places
    assert by_hand(maps, Truth("nchw", 2, 0, 0, False, (1, 2)), "all").tolist() == [[1.0, 3.0], [2.0, 5.0]]
    assert by_hand(maps, Truth("nchw", 2, 0, 0, False, (1, 2)), "pool").tolist() == [[1.5, 4.0]]


# --- per family; the last of them closes the model ---


def test_layers_are_all_modules_in_execution_order(case: Case) -> None:
    layers = case.hooked.layers()
    assert {info.name for info in layers} == {name for name, _ in case.module.named_modules() if name}
    assert [info.name for info in layers if info.order is not None] == case.order


def test_shapes_and_layouts_are_those_of_the_architecture(case: Case) -> None:
    wrong = {}
    for layer, truth in case.truths.items():
        _, shape, layout = described(case, layer)
        if truth.kind == "none":
            if layout is not None:
                wrong[layer] = (truth, shape, layout)
            continue
        expected = Layout(
            truth.kind,  # type: ignore[arg-type]
            truth.prefix,
            truth.has_cls,
            truth.grid,
            "first" if truth.heads else None,
            truth.order,
        )
        if layout != expected or shape is None or shape != (truth.shape or (*shape[:-1], truth.channels)):
            wrong[layer] = (truth, shape, layout)
    assert wrong == {}


def test_captures_equal_plain_hooks_bit_for_bit(case: Case) -> None:
    captured = case.hooked.capture(case.batch, case.tensors)
    assert list(captured) == case.tensors
    assert [layer for layer in captured if not torch.equal(captured[layer], case.raw[layer])] == []


def test_rows_equal_those_worked_out_from_the_truth(case: Case) -> None:
    expected = {
        f"m/{layer}" + (f"@{policy}" if policy != "pool" else ""): by_hand(case.raw[layer], truth, policy)
        for layer, truth in case.truths.items()
        for policy in POLICIES
        if policy in served(truth)
    }
    sites = case.hooked.expand([site.removeprefix("m/") for site in expected])
    rows = case.hooked.rows(case.batch, sites)
    assert list(rows) == list(expected)
    for site, values in expected.items():
        torch.testing.assert_close(rows[site], values, msg=lambda text, site=site: f"{site}: {text}")
        if site.endswith(("@cls", "@all", "@patch")):
            assert torch.equal(rows[site], values), site


def test_policies_without_a_meaning_are_refused(case: Case) -> None:
    accepted = []
    for layer, truth in case.truths.items():
        for policy in set(POLICIES) - served(truth):
            try:
                case.hooked.expand([f"{layer}@{policy}"])
                accepted.append(f"{layer}@{policy}")
            except SiteError:
                pass
    assert accepted == []


def test_gradients_reach_the_pixels(case: Case) -> None:
    pixels = case.batch.clone().requires_grad_()
    found = projected(case.hooked.capture(pixels, case.tensors, grad=True))
    of_layers = {layer: torch.autograd.grad(value, pixels, retain_graph=True)[0] for layer, value in found.items()}
    assert [layer for layer, gradient in of_layers.items() if not gradient.isfinite().all()] == []
    assert [layer for layer, gradient in of_layers.items() if not gradient.any()] == []
    biggest = max(float(gradient.abs().max()) for gradient in of_layers.values())
    torch.testing.assert_close(sum(of_layers.values()), case.gradient, rtol=1e-4, atol=1e-5 * biggest)


def test_close_leaves_the_model_as_it_was(case: Case) -> None:
    case.hooked.close()
    assert state(case.module) == case.before
