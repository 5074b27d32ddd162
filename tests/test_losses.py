"""Losses against float64 autograd straight from the formulas."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from usae_probe.usae import USAE, Support
from usae_probe.usae.losses import StepLoss, alignment_loss, fired_latents, source_loss

from . import oracles

DIMS = {"m/a": 6, "n/b": 4, "o/c": 5}
N, K, B = 15, 3, 8
NO_DEAD = torch.zeros(N, dtype=torch.bool)
BOTH = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("reference", torch.float64), ("csr", torch.float64), ("csr", torch.float32), ("reference", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)


def case(kernel: str = "reference", dtype: torch.dtype = torch.float64, seed: int = 3) -> tuple[USAE, Tensor]:
    g = torch.Generator().manual_seed(seed)
    usae = USAE(DIMS, N, K, kernel=kernel, seed=seed)
    with torch.no_grad():
        for parameter in usae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return usae.to(dtype), torch.randn(B, sum(DIMS.values()), generator=g).to(dtype)


def by_site(usae: USAE, x: Tensor) -> dict[str, Tensor]:
    return {site: x[:, columns].double() for site, columns in usae.columns.items()}


def dead(*latents: int) -> Tensor:
    mask = NO_DEAD.clone()
    mask[list(latents)] = True
    return mask


def assert_same_gradients(usae: USAE, expected: oracles.Parameters, *, like: dict[str, float]) -> None:
    """Compare .grad of the USAE with that of the oracle's leaves; no gradient counts as zero."""

    def grad(leaf: Tensor) -> Tensor:
        return torch.zeros_like(leaf).double() if leaf.grad is None else leaf.grad.double()

    for i, site in enumerate(usae.sites):
        columns = usae.columns[site]
        pairs = [
            (grad(usae.W_enc[i]), grad(expected.w_enc[site])),
            (grad(usae.b_enc[i]), grad(expected.b_enc[site])),
            (grad(usae.W_dec)[:, columns], grad(expected.w_dec[site])),
            (grad(usae.b_dec)[columns], grad(expected.b_dec[site])),
        ]
        for found, oracle in pairs:
            torch.testing.assert_close(found, oracle, **like)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}


@BOTH
@pytest.mark.parametrize("source", DIMS)
@pytest.mark.parametrize(
    ("mask", "aux_k"),
    [(NO_DEAD, 5), (dead(0, 2, 5, 7, 8, 11), 4), (dead(0, 2, 5), 256), (dead(0, 2, 5), 0), (~NO_DEAD, 6)],
    ids=["none dead", "more dead than aux_k", "fewer dead than aux_k", "aux_k = 0", "all dead"],
)
def test_source_loss(kernel: str, dtype: torch.dtype, source: str, mask: Tensor, aux_k: int) -> None:
    usae, x = case(kernel, dtype)
    loss = source_loss(usae, x, source, dead=mask, aux_k=aux_k, aux_coef=0.25)
    loss.total.backward()
    p = oracles.Parameters.of(usae)
    total, mse, aux = oracles.source_loss(p, by_site(usae, x), source, K, mask, aux_k, 0.25)
    total.backward()
    close = tolerance(dtype)
    torch.testing.assert_close(loss.total.double(), total, **close)
    torch.testing.assert_close(loss.per_site.double(), torch.stack(list(mse.values())).detach(), **close)
    torch.testing.assert_close(loss.aux.double(), aux.detach(), **close)
    assert (float(loss.aux) == 0) == (aux_k == 0 or not mask.any())
    assert not loss.per_site.requires_grad
    assert not loss.aux.requires_grad
    assert_same_gradients(usae, p, like=close)


def test_aligning_keeps_no_encoder_product() -> None:
    made: list[weakref.ref[Tensor]] = []

    class Spied(USAE):
        def z_pre(self, x_normalised: Tensor, site: str) -> Tensor:
            z_pre = super().z_pre(x_normalised, site)
            made.append(weakref.ref(z_pre))
            assert sum(ref() is not None for ref in made) <= 2  # the sum, and one to be added
            return z_pre

    usae = Spied(DIMS, N, K, kernel="csr")
    rows = {site: torch.randn(B, d) for site, d in DIMS.items()}
    codes = usae.code_shared(rows)
    assert len(made) == 3
    assert [ref() for ref in made] == [None] * 3
    assert all(coded.values.grad_fn is not None for coded in codes.values())


@BOTH
@pytest.mark.parametrize("source", ["all", "m/a + o/c", "n/b + o/c"])
def test_alignment_loss(kernel: str, dtype: torch.dtype, source: str) -> None:
    usae, x = case(kernel, dtype)
    loss = alignment_loss(usae, x, source)
    loss.total.backward()
    p = oracles.Parameters.of(usae)
    sources = list(DIMS) if source == "all" else source.split(" + ")
    total, mse = oracles.alignment_loss(p, by_site(usae, x), K, sources)
    total.backward()
    close = tolerance(dtype)
    torch.testing.assert_close(loss.total.double(), total, **close)
    torch.testing.assert_close(loss.per_site.double(), torch.stack(list(mse.values())).detach(), **close)
    assert_same_gradients(usae, p, like=close)
    assert float(loss.aux) == 0
    learning = [parameter for parameter in usae.parameters() if parameter.grad is not None and parameter.grad.any()]
    assert len(learning) == 2 + 2 * len(sources)  # the sources' encoders and all decoders


def test_mse_by_hand() -> None:
    # one latent w = (1, 0) | (0, 1) of norm √2 over the sites; x̃_a = (2, 0): z = 2
    # a: error (0, 0), MSE 0; b: x̃_b = (3, 0), x̂_b = (0, 2), error (3, −2), MSE (9 + 4)/2 = 6.5
    usae = USAE({"m/a": 2, "n/b": 2}, 1, 1)
    with torch.no_grad():
        usae.W_enc[0].copy_(torch.tensor([[1.0, 0.0]]))
        usae.W_dec.copy_(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    x = torch.tensor([[2.0, 0.0, 3.0, 0.0]])
    loss = source_loss(usae, x, "m/a", dead=torch.tensor([False]), aux_k=1, aux_coef=1.0)
    assert loss.per_site.tolist() == [0.0, 6.5]
    assert loss.total.item() == 6.5
    assert loss.fired.tolist() == [True]


def test_predicting_the_mean_costs_one_per_site() -> None:
    usae, x = case()
    x = x - x.mean(0)
    for columns in usae.columns.values():
        x[:, columns] /= x[:, columns].square().mean().sqrt()  # E‖x̃‖² = d_in
    with torch.no_grad():
        usae.W_dec.zero_()
        usae.b_dec.zero_()
    loss = source_loss(usae, x, "m/a", dead=NO_DEAD, aux_k=0, aux_coef=0.0)
    torch.testing.assert_close(loss.per_site, torch.ones(3, dtype=torch.float64))


def gradients(usae: USAE, loss: StepLoss) -> dict[str, Tensor]:
    usae.zero_grad()
    loss.total.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in usae.named_parameters()}


@pytest.mark.parametrize("kernel", ["reference", "csr"])
def test_every_decoder_learns_from_a_cross_reconstruction_but_one_encoder_only(kernel: str) -> None:
    usae, x = case(kernel)
    grads = gradients(usae, source_loss(usae, x, "n/b", dead=NO_DEAD, aux_k=0, aux_coef=0.0))
    for site, columns in usae.columns.items():
        index, is_source = usae.site_index(site), site == "n/b"
        assert grads["W_dec"][:, columns].any(), site
        assert grads["b_dec"][columns].any(), site
        assert bool(grads[f"W_enc.{index}"].any()) is is_source
        assert bool(grads[f"b_enc.{index}"].any()) is is_source


@pytest.mark.parametrize("kernel", ["reference", "csr"])
def test_the_auxiliary_loss_moves_dead_latents_only(kernel: str) -> None:
    usae, x = case(kernel)
    mask = dead(11, 13)  # positive in some rows, among the largest three in none
    without = gradients(usae, source_loss(usae, x, "m/a", dead=mask, aux_k=2, aux_coef=0.0))
    loss = source_loss(usae, x, "m/a", dead=mask, aux_k=2, aux_coef=1.0)
    assert float(loss.aux) > 0
    assert not loss.fired[mask].any()  # what models the residual has not fired by that
    by_aux = {name: grad - without[name] for name, grad in gradients(usae, loss).items()}
    for name in ("W_dec", "W_enc.0", "b_enc.0"):
        # the residual is detached: nothing of x̂ moves, else live latents would be moved by this term
        assert not by_aux[name][~mask].any(), name
        assert by_aux[name][mask].any(), name
    assert not by_aux["W_enc.1"].any()


def test_the_auxiliary_term_uses_the_largest_dead_latents_of_each_row() -> None:
    usae, x = case()
    mask = dead(1, 4, 9)
    with torch.no_grad():
        usae.b_enc[0][mask] = torch.tensor([3.0, 2.0, -50.0], dtype=torch.float64)
    one = source_loss(usae, x, "m/a", dead=mask, aux_k=1, aux_coef=1.0)
    two = source_loss(usae, x, "m/a", dead=mask, aux_k=2, aux_coef=1.0)
    three = source_loss(usae, x, "m/a", dead=mask, aux_k=3, aux_coef=1.0)
    many = source_loss(usae, x, "m/a", dead=mask, aux_k=1000, aux_coef=1.0)
    assert one.aux != two.aux
    torch.testing.assert_close(two.aux, three.aux)  # the third has z_pre < 0: relu
    assert three.aux.equal(many.aux)  # only three are dead


def test_the_auxiliary_term_is_one_per_site_when_dead_latents_say_nothing() -> None:
    usae, x = case()
    mask = dead(1, 4, 9)
    with torch.no_grad():
        usae.b_enc[0][mask] = -50.0
    loss = source_loss(usae, x, "m/a", dead=mask, aux_k=3, aux_coef=0.5)
    torch.testing.assert_close(loss.aux, torch.tensor(3.0, dtype=torch.float64))  # ‖e − 0‖² / ‖e‖², 3 sites
    torch.testing.assert_close(loss.total.detach(), loss.per_site.sum() + 0.5 * 3)


def test_a_perfect_reconstruction_leaves_no_nan() -> None:
    usae, x = case()
    with torch.no_grad():
        usae.W_dec.zero_()
        usae.b_dec.zero_()
    loss = source_loss(usae, torch.zeros_like(x), "m/a", dead=~NO_DEAD, aux_k=2, aux_coef=1.0)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in usae.parameters() if p.grad is not None)


def test_fired_latents() -> None:
    support = Support.of(torch.tensor([[0, 3], [3, 1]]), 5)
    assert fired_latents(torch.tensor([1.0, 0.0, 2.0, 0.0]), support).tolist() == [True, False, False, True, False]
    usae, x = case()
    loss = alignment_loss(usae, x)
    z_pre = {site: oracles.Parameters.of(usae).z_pre(rows, site).detach() for site, rows in by_site(usae, x).items()}
    support_mask = oracles.largest(sum(z_pre.values()), K)
    expected = torch.stack([((z > 0) & support_mask).any(0) for z in z_pre.values()]).any(0)
    assert loss.fired.equal(expected)


def test_one_site_has_the_same_support_in_both_phases() -> None:
    usae, x = USAE({"m/a": 6}, 10, 2), torch.randn(8, 6)
    aligned = alignment_loss(usae, x)
    own = source_loss(usae, x, "m/a", dead=torch.zeros(10, dtype=torch.bool), aux_k=0, aux_coef=0.0)
    torch.testing.assert_close(aligned.total, own.total)
    assert aligned.fired.equal(own.fired)
