"""Which kernel and precision run, and what is said where they cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from usae_probe.config import TrainConfig
from usae_probe.errors import ConfigError, UsaeProbeWarning
from usae_probe.usae import USAE, Support, choose_kernel, select_topk
from usae_probe.usae.kernels import CsrKernel, ReferenceKernel, SiteEncoder, choose, triton_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose._warn.cache_clear()
    yield
    choose._warn.cache_clear()


def chosen(*args: Any) -> tuple[str, list[str]]:
    """The kernel's name, and the warnings of choosing it twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = choose_kernel(*args)
        assert choose_kernel(*args).name == kernel.name
    assert all(warning.category is UsaeProbeWarning for warning in caught)
    return kernel.name, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("auto", torch.float32, "csr"),
        ("auto", torch.float64, "reference"),
        ("auto", torch.bfloat16, "reference"),
        ("csr", torch.float64, "csr"),
        ("reference", torch.float32, "reference"),
    ],
)
def test_on_cpu(name: str, dtype: torch.dtype, expected: str) -> None:
    assert chosen(name, CPU, dtype) == (expected, [])


def test_auto_elsewhere_is_the_reference() -> None:
    assert chosen("auto", torch.device("meta")) == ("reference", [])


def test_it_says_why() -> None:
    assert choose_kernel("auto", CPU).reason == "auto: float32 on cpu"
    assert choose_kernel("auto", CPU, torch.float64).reason == "auto: float64 on cpu"
    assert choose_kernel("csr", CPU).reason == "asked for"
    with pytest.warns(UsaeProbeWarning):
        assert choose_kernel("triton", CPU).reason == "triton cannot run: it runs on CUDA, not on cpu"


def test_one_warning_where_a_kernel_cannot_run() -> None:
    assert chosen("triton", CPU) == (
        "csr",
        ["the triton kernel cannot run: it runs on CUDA, not on cpu; csr takes its place"],
    )
    assert chosen("csr", CPU, torch.bfloat16) == (
        "reference",
        ["the csr kernel cannot run: it computes in float32 or float64, not in bfloat16; reference takes its place"],
    )
    assert chosen("csr", CUDA)[0] == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_cuda_without_a_device(name: str) -> None:
    name, said = chosen(name, CUDA)
    assert name == "reference"
    assert said == ["the triton kernel cannot run: torch sees no CUDA device; reference takes its place"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (ModuleNotFoundError("No module named 'triton'"), "ModuleNotFoundError: No module named 'triton'"),
        (RuntimeError("\nfailed to find a C compiler\nin these places"), "RuntimeError: failed to find a C compiler"),
    ],
)
def test_triton_that_fails_to_run(fault: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise fault

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_kernel, "_programs", broken)
    triton_kernel._trial.cache_clear()
    try:
        assert chosen("triton", CPU) == ("csr", [f"the triton kernel cannot run: {said}; csr takes its place"])
    finally:
        triton_kernel._trial.cache_clear()


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown kernel 'cuda', expected auto, reference, csr, triton"):
        choose_kernel("cuda", CPU)
    with pytest.raises(ConfigError, match="unknown precision 'fp8', expected fp32 or bf16"):
        choose_kernel("csr", CPU, torch.float32, "fp8")


def test_config_has_every_kernel() -> None:
    for name in ("auto", *choose.KERNELS):
        assert TrainConfig(kernel=name).kernel == name


class TestPrecision:
    def test_bf16_that_is_not_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        name, said = chosen("csr", CPU, torch.float32, "bf16")
        assert name == "csr"
        assert len(said) == 1
        assert "this processor has no matrix units for bfloat16" in said[0]
        assert choose_kernel("csr", CPU, torch.float32, "bf16").precision == "fp32"

    def test_bf16_with_amx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert chosen("csr", CPU, torch.float32, "bf16") == ("csr", [])
        assert choose_kernel("csr", CPU, torch.float32, "bf16").precision == "bf16"

    def test_bf16_needs_a_sparse_kernel_and_float32(self) -> None:
        assert "the reference kernel has none" in chosen("reference", CPU, torch.float32, "bf16")[1][0]
        assert "parameters are float64" in chosen("csr", CPU, torch.float64, "bf16")[1][0]

    def test_values_at_the_support_are_those_of_float32(self) -> None:
        g = torch.Generator().manual_seed(0)
        x, w_enc = torch.randn(16, 40, generator=g), torch.randn(2500, 40, generator=g)
        encoder = SiteEncoder(w_enc, torch.randn(2500, generator=g), torch.randn(40, generator=g))
        kernel, exact = CsrKernel("bf16"), ReferenceKernel().pre(x, encoder)
        z_pre = kernel.pre(x, encoder)
        assert z_pre.dtype == torch.float32
        # factors keep 8 bits and the product 8: each term is off by up to 2⁻⁸ of itself, the sum by 2⁻⁹ more
        size = (x - encoder.b_dec).abs() @ w_enc.abs().T + exact.abs()
        assert ((z_pre - exact).abs() <= 2**-7 * size).all()
        assert not z_pre.equal(exact)
        support = Support.of(select_topk(z_pre, 5), 2500)
        torch.testing.assert_close(
            kernel.at(z_pre, support, x, encoder).view(16, 5), exact.gather(1, support.columns.view(16, 5))
        )

    def test_gradients_are_those_of_the_selected_latents(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        usae = USAE({"a/x": 30}, n_latents=200, k=4, kernel="csr", precision="bf16")
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
        coded = usae.code(x, "a/x")
        usae.decode_all(coded.values, coded.support).square().sum().backward()
        assert usae.W_enc[0].grad is not None
        found = usae.W_enc[0].grad.clone()
        usae.zero_grad()
        plain = ReferenceKernel()
        values = torch.relu(plain.at(plain.pre(x, usae.encoder("a/x")), coded.support, x, usae.encoder("a/x")))
        plain.decode(values, coded.support, usae.W_dec).square().sum().backward()
        torch.testing.assert_close(found, usae.W_enc[0].grad)


def test_how_often_it_made_z_dense() -> None:
    # 2 of 20 latents are under 15 %, 4 of 20 above: two sparse products (z W, its weights' gradient), one dense
    kernel, w = choose_kernel("auto", CPU), torch.ones(20, 3, requires_grad=True)
    assert kernel.dense == 0.0
    few, many = (Support.of(torch.arange(k).repeat(5, 1), 20) for k in (2, 4))
    kernel.decode(torch.ones(10), few, w).sum().backward()
    assert kernel.dense == 0.0
    kernel.decode(torch.ones(20), many, w.detach())
    assert kernel.dense == pytest.approx(1 / 3)
    assert ReferenceKernel().dense == 1.0
    assert triton_kernel.TritonKernel().dense == 0.0


def test_a_usae_keeps_its_kernel_until_it_moves() -> None:
    usae = USAE({"a/x": 30}, n_latents=200, k=4)
    kernel = usae.kernel
    assert kernel.name == "csr"
    assert usae.kernel is kernel
    assert usae.double().kernel.name == "reference"
