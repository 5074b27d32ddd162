"""Memory stays flat over thousands of passes, and a hooked model keeps nothing alive."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from usae_probe import HookedModel, attach

pytestmark = pytest.mark.usefixtures("one_thread")
MB = 1 << 20
LAYERS = ["1", "3", "4", "7"]


def resident() -> int:
    """Bytes of this process in memory; what is free goes back first, or a leak would hide in what others have freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(step: Callable[[], None], times: int) -> float:
    """MB that memory grows by in the steps after the first 50."""
    for _ in range(50):
        step()
    before = resident()
    for _ in range(times - 50):
        step()
    return (resident() - before) / MB


def hook(module: nn.Module) -> HookedModel:
    return attach(module, name="m", image_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    """Small, so that thousands of passes are quick; what leaks per pass leaks here too."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()


def test_the_measure_sees_a_leak() -> None:
    kept: list[Tensor] = []
    assert growth(lambda: kept.append(torch.ones(22_000)), 450) > 20  # 35 MB


def test_two_thousand_captures(module: nn.Module) -> None:
    """All captures kept would be 80 MB."""
    batch = torch.randn(2, 3, 32, 32)
    with hook(module) as hooked:
        assert sum(value.nbytes for value in hooked.capture(batch, LAYERS).values()) == 4 * 2 * (4 + 8 + 8) * 256 + 64
        assert growth(lambda: hooked.capture(batch, LAYERS) and None, 2000) < 5


@pytest.mark.parametrize("backward", [True, False])
def test_three_hundred_captures_with_gradient(module: nn.Module, backward: bool) -> None:
    """Graphs are freed with the captured tensors, walked or not."""
    with hook(module) as hooked:

        def step() -> None:
            pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
            captured = hooked.capture(pixels, LAYERS, grad=True)
            if backward:
                torch.autograd.grad(captured["7"].sum() + captured["1"].sum(), pixels)

        assert growth(step, 300) < 5


def test_splices_rows_and_exceptions(module: nn.Module) -> None:
    batch = torch.randn(2, 3, 32, 32)
    kept = module[3].register_forward_hook(lambda _m, _a, out: out + 1)
    with hook(module) as hooked:
        sites = hooked.expand(["3", "6@patch"])

        def fails(rows: Tensor) -> Tensor:
            raise ArithmeticError(rows)

        def step() -> None:
            hooked.rows(batch, sites)
            hooked.splice(batch, "3", lambda rows: rows * 2)
            with pytest.raises(ArithmeticError):
                hooked.splice(batch, "5", fails)

        try:
            assert growth(step, 200) < 5
        finally:
            kept.remove()


@pytest.mark.parametrize("closed", [True, False])
def test_a_model_goes_when_its_user_lets_go(closed: bool) -> None:
    model = timm.create_model("test_resnet").eval()
    hooked = hook(model)
    captured = hooked.capture(torch.randn(1, 3, 32, 32, requires_grad=True), ["layer4"])
    hooked.splice(torch.randn(1, 3, 32, 32), "layer4", lambda rows: rows)
    alive = weakref.ref(model), weakref.ref(model.layer4)
    if closed:
        hooked.close()
    del model, hooked
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert captured["layer4"].shape[0] == 1


def test_a_captured_tensor_holds_no_more_than_itself(module: nn.Module) -> None:
    with hook(module) as hooked:
        captured = hooked.capture(torch.randn(2, 3, 32, 32), ["6"])["6"]
        rows = hooked.rows(torch.randn(2, 3, 32, 32), hooked.expand(["6"]))["m/6"]
    for tensor in (captured, rows):
        assert tensor.grad_fn is None
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
