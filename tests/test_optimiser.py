"""The optimiser: equal to clipping, torch's Adam and renormalising one after the other, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import usae_probe.usae.optimiser as module
from usae_probe.errors import SiteError
from usae_probe.usae import USAE
from usae_probe.usae.optimiser import ConstrainedAdam, chunks

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN = {"a/x": 5, "b/y": 3, "c/z": 4}
Gradients = dict[str, Tensor]


def model(dtype: torch.dtype = torch.float64) -> USAE:
    usae = USAE(D_IN, n_latents=11, k=2, seed=3).to(dtype)
    usae.renormalise_decoder()  # to this precision
    return usae


def put(usae: USAE, gradients: Gradients) -> None:
    usae.zero_grad(set_to_none=True)
    for name, parameter in usae.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].clone()


def drawn(usae: USAE, step: int, encoders: Sequence[int], size: float) -> Gradients:
    """Gradients of decoder, its bias and some sites' encoders."""
    generator = torch.Generator().manual_seed(step)
    names = ["W_dec", "b_dec", *(f"{name}.{i}" for i in encoders for name in ("W_enc", "b_enc"))]
    found = {}
    for name in names:
        shape = usae.get_parameter(name).shape
        found[name] = size * torch.randn(shape, generator=generator, dtype=torch.float64).to(usae.W_dec.dtype)
    return found


class Plain:
    """The same in separate passes, straight from the formulas, with torch's own Adam on every parameter."""

    def __init__(self, usae: USAE, grad_clip: float, weight_decay: float = 0.0) -> None:
        self.usae, self.grad_clip = usae, grad_clip
        groups = [
            {"params": [p for n, p in usae.named_parameters() if n.startswith("W_enc")], "weight_decay": weight_decay},
            {"params": [p for n, p in usae.named_parameters() if not n.startswith("W_enc")], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, foreach=False)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        w = self.usae.W_dec
        norm = torch.nn.utils.clip_grad_norm_(self.usae.parameters(), self.grad_clip)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for k in range(len(w)):
            w[k] *= math.sqrt(len(D_IN)) / w[k].norm()
        return norm


def demand_same(one: USAE, other: USAE, rtol: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=[1 << 19, 40], ids=["one piece", "pieces"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", request.param)  # 40 numbers: three rows at a time, two in the last


@pytest.mark.usefixtures("_chunk")
class TestAgainstSeparatePasses:
    @pytest.mark.parametrize(
        ("size", "rtol"), [(1e-3, 1e-12), (1.0, 2e-6)], ids=["free", "clipped"]
    )  # torch's fused Adam takes the scale of clipped gradients in float32
    def test_sources_in_turn(self, size: float, rtol: float) -> None:
        usae, other = model(), model()
        mine, plain = ConstrainedAdam(usae, 1.0), Plain(other, 1.0)
        norms = []
        for step in range(40):
            encoders = [0, 1, 2] if step % 7 == 3 else [step % 2]  # the third site's encoder waits for step 3
            gradients = drawn(usae, step, encoders, size)
            put(usae, gradients)
            put(other, gradients)
            lr = 1e-2 * (1 + step % 3)
            norms.append(mine.step(lr))
            assert norms[-1].item() == pytest.approx(plain.step(lr).item(), rel=rtol)
            demand_same(usae, other, rtol)
        assert all((norm > 1.0) == (size == 1.0) for norm in norms)

    def test_weight_decay_is_of_the_encoders_alone(self) -> None:
        usae, other = model(), model()
        mine, plain = ConstrainedAdam(usae, 100.0, weight_decay=0.3), Plain(other, 100.0, weight_decay=0.3)
        for step in range(20):
            gradients = drawn(usae, step, [step % 3], 1e-2)
            put(usae, gradients)
            put(other, gradients)
            mine.step(0.05)
            plain.step(0.05)
        demand_same(usae, other, 1e-12)

    def test_float32_to_rounding(self) -> None:
        usae, other = model(torch.float32), model()
        mine, plain = ConstrainedAdam(usae, 0.5), Plain(other, 0.5)
        for step in range(30):
            gradients = drawn(other, step, [step % 3], 0.1)
            put(usae, {name: value.float() for name, value in gradients.items()})
            put(other, gradients)
            mine.step(1e-2)
            plain.step(1e-2)
        for a, b in zip(usae.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-5)

    def test_rows_keep_their_norm(self) -> None:
        usae = model(torch.float32)
        mine = ConstrainedAdam(usae, 1.0)
        for step in range(10):
            put(usae, drawn(usae, step, [0], 1.0))
            mine.step(0.3)
            torch.testing.assert_close(usae.W_dec.norm(dim=1), torch.full((11,), math.sqrt(3)))


def test_by_hand() -> None:
    # one site, one latent with w = (3/5, 4/5), ‖w‖ = 1 = √M; g = (−3, 4) has norm 5. Adam's first step moves every
    # entry against its sign by lr = .1 (bias-corrected m / √v is ±1, clipped or not): w = (.7, .7), renormalised
    # (√½, √½).
    usae = USAE({"a/x": 2}, n_latents=1, k=1).double()
    with torch.no_grad():
        usae.W_dec.copy_(torch.tensor([[0.6, 0.8]]))
    put(usae, {"W_dec": torch.tensor([[-3.0, 4.0]], dtype=torch.float64)})
    assert ConstrainedAdam(usae, 1.0).step(0.1).item() == pytest.approx(5.0)
    torch.testing.assert_close(usae.W_dec.detach(), torch.full((1, 2), math.sqrt(0.5)).double(), rtol=1e-6, atol=0)


def test_what_has_no_gradient_stays_as_it_is() -> None:
    usae = model()
    mine = ConstrainedAdam(usae, 1.0)
    before = {name: value.detach().clone() for name, value in usae.named_parameters()}
    put(usae, drawn(usae, 0, [1], 1.0))
    mine.step(0.1)
    moved = {name for name, value in usae.named_parameters() if not value.equal(before[name])}
    assert moved == {"W_dec", "b_dec", "W_enc.1", "b_enc.1"}
    assert {name for name in mine.tensors() if name.startswith("steps")} == {f"steps.{name}" for name in moved}
    usae.zero_grad(set_to_none=True)
    assert mine.step(0.1) == 0.0


class TestSomeSites:
    def test_the_others_stay_as_they_are(self) -> None:
        usae = model()
        mine = ConstrainedAdam(usae, 1.0)
        for step in range(3):  # so that all have moments that would move them
            put(usae, drawn(usae, step, [0, 1, 2], 1.0))
            mine.step(0.05)
        before = {name: value.detach().clone() for name, value in usae.named_parameters()}
        moments = {name: value.clone() for name, value in mine.tensors().items()}
        put(usae, drawn(usae, 9, [0, 1, 2], 1.0))
        mine.step(0.05, ["b/y"])
        own, others = usae.columns["b/y"], [usae.columns[site] for site in ("a/x", "c/z")]
        for columns in others:
            for name in ("W_dec", "b_dec"):
                assert usae.get_parameter(name)[..., columns].equal(before[name][..., columns])
                for what in "mv":
                    key = f"{what}.{name}"
                    assert mine.tensors()[key][..., columns].equal(moments[key][..., columns])
        assert not usae.W_dec[:, own].equal(before["W_dec"][:, own])
        assert not usae.b_dec[own].equal(before["b_dec"][own])
        moved = {n for n, v in usae.named_parameters() if "enc" in n and not v.equal(before[n])}
        assert moved == {"W_enc.1", "b_enc.1"}
        assert mine.tensors()["steps.W_dec"].tolist() == [3, 4, 3]
        assert mine.tensors()["steps.W_enc.0"].tolist() == [3]

    def test_are_updated_as_if_they_were_alone(self) -> None:
        # two optimisers on parts of one model: each site is trained as one of its own would be, whose rows have norm 1
        usae = model()
        mine = ConstrainedAdam(usae, 1.0)
        alone = {}
        for index, (site, d) in enumerate(D_IN.items()):
            single = USAE({site: d}, n_latents=11, k=2).double()
            with torch.no_grad():
                usae.decoder(site).div_(usae.decoder(site).norm(dim=1, keepdim=True))
                single.W_dec.copy_(usae.decoder(site))
                single.W_enc[0].copy_(usae.W_enc[index])
            alone[site] = (single, ConstrainedAdam(single, 1.0))
        for step in range(24):
            site = list(D_IN)[step * step * 2 % 7 % 3]
            index, columns = usae.site_index(site), usae.columns[site]
            gradients = drawn(usae, step, [index], 1.0)
            put(usae, gradients)
            single, optimiser = alone[site]
            named = {"W_enc.0": f"W_enc.{index}", "b_enc.0": f"b_enc.{index}"}
            put(single, {a: gradients[b] for a, b in named.items()})
            single.W_dec.grad = gradients["W_dec"][:, columns].clone()
            single.b_dec.grad = gradients["b_dec"][columns].clone()
            assert mine.step(0.02, [site]).item() == pytest.approx(optimiser.step(0.02).item(), rel=1e-9)
        for site, (single, _) in alone.items():
            torch.testing.assert_close(usae.decoder(site), single.W_dec.detach(), rtol=2e-6, atol=1e-8)
            torch.testing.assert_close(usae.W_enc[usae.site_index(site)].detach(), single.W_enc[0].detach())

    def test_and_all_again_with_different_counts(self) -> None:
        usae, other = model(), model()
        mine, plain = ConstrainedAdam(usae, 1e9), Plain(other, 1e9)
        for step in range(6):
            gradients = drawn(usae, step, [0, 1, 2], 1e-2)
            put(usae, gradients)
            mine.step(0.01, ["a/x"] if step < 3 else None)
            if step >= 3:
                put(other, gradients)
                plain.step(0.01)
        # the sites that waited have seen three steps, all of which the other model saw too; only norms are shared
        waited = slice(usae.columns["b/y"].start, None)
        assert mine.tensors()["steps.W_dec"].tolist() == [6, 3, 3]
        torch.testing.assert_close(usae.b_dec[waited], other.b_dec[waited], rtol=1e-9, atol=0)
        assert not torch.allclose(usae.b_dec[: waited.start], other.b_dec[: waited.start], rtol=1e-3)
        torch.testing.assert_close(usae.W_dec.norm(dim=1), torch.full((11,), math.sqrt(3)).double())

    def test_unknown(self) -> None:
        usae = model()
        put(usae, drawn(usae, 0, [0], 1.0))
        with pytest.raises(SiteError, match="no site 'a/y'"):
            ConstrainedAdam(usae, 1.0).step(0.1, ["a/y"])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["W_dec", "b_enc.0"])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float, where: str) -> None:
    usae = model()
    mine = ConstrainedAdam(usae, 1.0)
    put(usae, drawn(usae, 0, [0], 1.0))
    mine.step(0.1)
    before = [value.clone() for value in (*usae.parameters(), *mine.tensors().values())]
    gradients = drawn(usae, 1, [0], 1.0)
    gradients[where].view(-1)[2] = poison
    put(usae, gradients)
    assert not torch.isfinite(mine.step(0.1))
    assert all(a.equal(b) for a, b in zip(before, (*usae.parameters(), *mine.tensors().values()), strict=True))


def test_state_goes_on_bit_for_bit() -> None:
    def run(stop: Callable[[int], bool]) -> USAE:
        usae = model(torch.float32)
        mine = ConstrainedAdam(usae, 1.0, weight_decay=0.1)
        for step in range(12):
            put(usae, drawn(usae, step, [step % 3], 1.0))
            mine.step(0.01, None if step % 4 else ["b/y"])
            if stop(step):
                stored = {name: value.clone() for name, value in mine.tensors().items()}
                mine = ConstrainedAdam(usae, 1.0, weight_decay=0.1)
                mine.load(stored)
        return usae

    whole, stopped = run(lambda _: False), run(lambda step: step in (0, 1, 6))
    assert all(a.equal(b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))


def test_chunks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", 24)
    found = [(chunk.start, chunk.stop) for chunk in chunks(torch.zeros(8, 10))]
    assert found == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [(c.start, c.stop) for c in chunks(torch.zeros(3, 100))] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_on_cuda_as_on_cpu(size: float) -> None:
    usae, other = model().cuda(), model()
    mine, plain = ConstrainedAdam(usae, 1.0), ConstrainedAdam(other, 1.0)
    for step in range(12):
        gradients = drawn(other, step, [step % 3], size)
        put(usae, {name: value.cuda() for name, value in gradients.items()})
        put(other, gradients)
        sites = ["b/y"] if step % 5 == 4 else None
        mine.step(0.01, sites)
        plain.step(0.01, sites)
    for a, b in zip(usae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-5, atol=1e-8)
