"""doctor: what works on a machine is called so, and what does not is named with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from usae_probe import attach
from usae_probe.adapter import AdapterEntry
from usae_probe.errors import AdapterError
from usae_probe.hooks import HookedModel
from usae_probe.pipeline import doctor
from usae_probe.usae.kernels import CsrKernel, check_kernel
from usae_probe.usae.kernels.selfcheck import TOLERANCE

from .command import Command, command

CPU = torch.device("cpu")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model and small steps: what is tested is what is said."""
    monkeypatch.setattr(doctor, "_MODEL", "resnet10t")
    monkeypatch.setattr(doctor, "_SIDE", 64)
    monkeypatch.setattr(doctor, "_WIDTHS", (12, 8))
    monkeypatch.setattr(doctor, "_LATENTS", 32)
    monkeypatch.setattr(doctor, "_K", 2)


def test_a_machine_on_which_all_works(cli: Command, tmp_path: Path) -> None:
    result = cli("doctor", "--json", "--out", str(tmp_path / "runs" / "deep"))
    found = result.document
    assert "error" not in found, found
    assert (result.status, found["problems"]) == (0, [])
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {row["name"]: row["state"] for row in found["adapters"]}["timm"] == "ok"
    checks = {check["kernel"]: check for check in found["kernels"] if check["device"] == "cpu"}
    assert 0 < checks["csr"]["error"] < TOLERANCE
    assert "CUDA" in checks["triton"]["problem"]
    assert found["hooks"]["equal"]
    assert found["disk"]["folder"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all(found["benchmark"][key] > 0 for key in ("images_per_second", "step_seconds", "dense_step_seconds"))
    for part in ("Kernels and hooks", "csr on cpu", "Everything works here"):
        assert part in result.err


def test_quick_leaves_out_the_benchmark(cli: Command) -> None:
    assert "benchmark" not in cli("doctor", "--quick", "--json").document


@pytest.mark.parametrize("share", [0.5, 2e-4, float("nan")])
def test_a_kernel_that_computes_wrong_numbers_is_found(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CsrKernel.decode
    monkeypatch.setattr(CsrKernel, "decode", lambda *args: right(*args) * (1 + share))
    check = check_kernel("csr", CPU)
    assert check.wrong
    assert (check.error is None) == (share != share)  # NaN is no error that JSON could hold
    assert not check_kernel("reference", CPU).wrong


def test_a_wrong_gradient_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CsrKernel.decode

    def half(self: Any, values: Any, support: Any, w_dec: Any) -> Any:
        out = right(self, values, support, w_dec)
        return 0.5 * out + 0.5 * out.detach()

    monkeypatch.setattr(CsrKernel, "decode", half)
    assert check_kernel("csr", CPU).error == pytest.approx(0.5, abs=0.1)


def test_what_does_not_work_is_named_with_a_way_out(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_kernel(*_: Any) -> Any:
        raise RuntimeError("no such instruction\nand a page more")

    def broken_adapter(self: AdapterEntry) -> Any:
        raise AdapterError(f"adapter '{self.name}' cannot be imported: operator torchvision::nms does not exist")

    capture = HookedModel.capture
    monkeypatch.setattr(CsrKernel, "decode", broken_kernel)
    monkeypatch.setattr(HookedModel, "capture", lambda *args: {k: v + 1 for k, v in capture(*args).items()})
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 10**18)
    monkeypatch.setattr(doctor, "_LITTLE_MEMORY", 10**18)
    monkeypatch.setattr(doctor, "all_entries", lambda: [AdapterEntry("timm", "a:B", "x", "1", None)])  # type: ignore
    with attach("timm:resnet10t", pretrained=False, image_size=64, device="cpu") as hooked:
        monkeypatch.setattr(doctor, "attach", lambda *_, **__: hooked)  # by an adapter that is broken from here on
        monkeypatch.setattr(AdapterEntry, "load", broken_adapter)
        result = cli("doctor", "--quick", "--json", "--out", "/proc/nowhere")
    assert "error" not in result.document, result.out
    assert result.status == 1
    problems = {each["problem"]: each["hint"] for each in json.loads(result.out)["problems"]}
    for part, way in (
        ("kernel csr on cpu: RuntimeError: no such instruction", "kernel = 'reference'"),
        ("operator torchvision::nms does not exist", "pip install --upgrade torch torchvision"),
        ("capture other numbers than a plain forward hook", "report"),
        ("cannot write to /proc", "--out"),
        ("free in /proc", "ring"),
        ("GB of memory", "batch_size"),
    ):
        assert [hint for problem, hint in problems.items() if part in problem and way in hint], part
    assert f"{len(problems)} problems" in result.err


def test_an_unknown_device_is_refused(cli: Command) -> None:
    result = cli("doctor", "--device", "gpu")
    assert (result.status, "auto, cpu, cuda or cuda:1" in result.err) == (2, True)
