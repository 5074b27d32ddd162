"""Causal fidelity: reconstructions spliced into live models, against ordinary torch hooks and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.nn import functional

from usae_probe import HookedModel, attach
from usae_probe.buffer import ActivationBuffer
from usae_probe.errors import (
    BufferIntegrityError,
    ImageError,
    NonFiniteError,
    SiteError,
    UsageError,
)
from usae_probe.images import Annotation, ImageSource, open_source
from usae_probe.probes.ablation import Fires, draw_nulls
from usae_probe.probes.fidelity import Fidelity, fidelity
from usae_probe.probes.heads import Reading, final_features, fit_probe, has_head
from usae_probe.usae import USAE

from .toys import Does

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:k = .* active latents"),  # dictionaries that reconstruct exactly
]
SIDE = 4
N = 24


def hook(module: nn.Module, name: str, *, double: bool = True, side: int = SIDE, **options: Any) -> HookedModel:
    module.eval()
    model = attach(module, name=name, image_size=side, mean=(0.4, 0.5, 0.6), std=(0.3, 0.3, 0.3), **options)
    if double:
        module.double()
    return model


def linear_net(width: int = 5, classes: int = 4) -> nn.Sequential:
    """Layer 1 is a vector."""
    flat = 3 * SIDE * SIDE
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, width), nn.Tanh(), nn.Linear(width, classes))


def conv_net(width: int = 6, classes: int = 3, stride: int = 1) -> nn.Sequential:
    """Layer 0 is a map of 4x4 or 2x2 places; the head looks at all of them."""
    places = (SIDE // stride) ** 2
    first = nn.Conv2d(3, width, stride, stride=stride)
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width * places, classes))


class Tokens(nn.Module):
    """A class token and 4x4 places of width 6, then a nonlinear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(3, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.layer, self.head = Does(lambda t: t * 1), nn.Linear(6, 3)
        nn.init.normal_(self.head.weight, std=2.0)

    def forward(self, x: Tensor) -> Tensor:
        places = self.embed(x.flatten(2).transpose(1, 2))
        tokens = self.layer(torch.cat([self.cls + places.sum(1, keepdim=True), places], dim=1))
        return self.head(torch.tanh(tokens).mean(dim=1) + tokens[:, 0])


def drawings(n: int = N, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Noise about a colour of each picture's own."""
    rng = np.random.default_rng(seed)
    colours, noise = rng.uniform(0, 1, (n, 1, 1, 3)), rng.uniform(0, 1, (n, side, side, 3))
    return (255 * (0.7 * colours + 0.3 * noise)).astype(np.uint8)


def indexed(path: Path, n: int = N, **how: Any) -> ActivationBuffer:
    """A buffer that says which image was used for what; no rows of it are read."""
    rows = np.zeros((n, 1), dtype=np.float32)
    return ActivationBuffer.from_arrays({"m/l": rows}, path / "acts", **({"holdout": 0.5, "validation": 0.0} | how))


def rows_of(model: HookedModel, pictures: np.ndarray, grid: Any = None) -> dict[str, Tensor]:
    return model.rows(inputs_of(model, pictures), grid=grid)


def inputs_of(model: HookedModel, pictures: np.ndarray) -> Tensor:
    inputs: Tensor = model.preprocess([torch.from_numpy(p).permute(2, 0, 1).contiguous() for p in pictures])
    weight = model.weight
    assert weight is not None
    return inputs.to(weight.dtype)


def exact(models: Sequence[HookedModel], pictures: np.ndarray, grid: Any = None) -> USAE:
    """z holds the positive and the negative part of every dimension: x̂ = x in every site's own code."""
    rows = {site: x.double() for model in models for site, x in rows_of(model, pictures, grid).items()}
    d_in = {site: x.shape[1] for site, x in rows.items()}
    n = 2 * max(d_in.values())
    usae = USAE(d_in, n, n, normalisation={s: (x.mean(0), 0.5 + i) for i, (s, x) in enumerate(rows.items())}, grid=grid)
    with torch.no_grad():
        for i, d in enumerate(d_in.values()):
            both = torch.cat([torch.eye(d), -torch.eye(d), torch.zeros(n - 2 * d, d)])
            usae.W_enc[i].copy_(both)
            usae.W_dec[:, usae.columns[usae.sites[i]]] = both
    return usae.double()


def some(models: Sequence[HookedModel], pictures: np.ndarray, k: int = 3, grid: Any = None, n: int = 20) -> USAE:
    """Random weights; reconstructions are bad."""
    given = exact(models, pictures, grid)
    generator = torch.Generator().manual_seed(7)
    norms = {s: (given.mean[c].float(), float(given.scale[i])) for i, (s, c) in enumerate(given.columns.items())}
    usae = USAE(given.d_in, n, k, normalisation=norms, grid=grid, seed=3)
    with torch.no_grad():
        for bias in (*usae.b_enc, usae.b_dec):
            bias += 0.2 * torch.randn(bias.shape, generator=generator)
        usae.W_dec *= 0.2 + 2 * torch.rand(n, 1, generator=generator)
    return usae.double()


def without_decoder(usae: USAE) -> USAE:
    with torch.no_grad():
        usae.W_dec.zero_()
        usae.b_dec.zero_()
    return usae


# ---- plain implementations -------------------------------------------------------------------------------------------


def plain_run(module: nn.Module, inputs: Tensor, layer: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The model's output with what a layer puts out changed, by an ordinary forward hook."""
    handle = module.get_submodule(layer).register_forward_hook(lambda _module, _args, output: change(output))
    try:
        with torch.no_grad():
            return module(inputs)
    finally:
        handle.remove()


def plain_kl(clean: Tensor, other: Tensor) -> np.ndarray:
    """Σ_c p log(p / q) by loops."""
    found = []
    for a, b in zip(clean.tolist(), other.tolist(), strict=True):
        p, q = ([math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in (a, b))
        found.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return np.array(found)


def plain_top1(clean: Tensor, other: Tensor) -> float:
    return float(
        np.mean([a.index(max(a)) == b.index(max(b)) for a, b in zip(clean.tolist(), other.tolist(), strict=True)])
    )


def plain_z(usae: USAE, rows: Tensor, site: str) -> Tensor:
    """Dense codes of topk, from the formula."""
    i = usae.sites.index(site)
    x = (rows - usae.mean[usae.columns[site]]) / usae.scale[i]
    pre = (x - usae.b_dec[usae.columns[site]]) @ usae.W_enc[i].T + usae.b_enc[i]
    z = torch.zeros_like(pre)
    for row, values in enumerate(pre.tolist()):
        for latent in sorted(range(len(values)), key=lambda j: -values[j])[: usae.k]:
            z[row, latent] = max(values[latent], 0.0)
    return z


def plain_decode(usae: USAE, z: Tensor, site: str) -> Tensor:
    i, columns = usae.sites.index(site), usae.columns[site]
    return usae.mean[columns] + usae.scale[i] * (z @ usae.W_dec[:, columns] + usae.b_dec[columns])


def shift_map(new: Tensor) -> Callable[[Tensor], Tensor]:
    """`pool` of a map: every place shifted by the difference of the means."""
    return lambda output: output + (new - output.mean((2, 3)))[:, :, None, None]


def instead(new: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: new


def assert_recovers(found: Fidelity, site: str, share: float, **how: Any) -> None:
    assert found.share_recovered[site][site] == pytest.approx(share, **how)
    assert found.top1_recovered[site][site] == pytest.approx(share, **how)


# ---- exact and empty reconstructions ---------------------------------------------------------------------------------

POLICIES = [
    ("linear", "1", None),
    ("conv", "0", None),
    ("conv", "0@mean", None),
    ("conv", "0@patch", None),
    ("conv", "0@patch", (2, 2)),
    ("conv", "0@all", None),
    ("tokens", "layer", None),
    ("tokens", "layer@cls", None),
    ("tokens", "layer@mean", None),
    ("tokens", "layer@patch", None),
    ("tokens", "layer@patch", (2, 3)),
    ("tokens", "layer@all", None),
]


@pytest.mark.parametrize(("kind", "layer", "grid"), POLICIES)
def test_exact_recovers_1_and_nothing_recovers_0(tmp_path: Path, kind: str, layer: str, grid: Any) -> None:
    options: dict[str, Any] = {"layout": {"layer": "cls+4x4"}} if kind == "tokens" else {}
    module = {"linear": linear_net, "conv": conv_net, "tokens": Tokens}[kind]()
    pictures, how = drawings(), {"batch_size": 5, "least": 1e-4}
    buffer = indexed(tmp_path)
    with hook(module, "m", layers=[layer], **options) as model:
        site = str(model.sites[0])
        usae = exact([model], pictures, grid)
        found = fidelity(usae, [model], buffer, open_source(pictures), sites=[site], **how)
        assert found.n_images == 12
        assert found.head == {site: "logits"}
        assert found.effect == {site: "kl"}
        assert found.kl[site][site] == pytest.approx(0, abs=1e-10)
        assert found.kl_mean[site] > 1e-4
        assert found.share_recovered[site][site] == pytest.approx(1, abs=1e-6)
        assert found.top1[site][site] == 1
        nothing = fidelity(without_decoder(usae), [model], buffer, open_source(pictures), sites=[site], **how)
        assert nothing.kl_mean == found.kl_mean
        assert nothing.kl[site][site] == found.kl_mean[site]
        assert nothing.share_recovered[site][site] == 0.0
        if found.top1_mean[site] < 1:
            assert found.top1_recovered[site][site] == 1
            assert nothing.top1_recovered[site][site] == 0.0
        else:
            assert math.isnan(found.top1_recovered[site][site])


# ---- against plain hooks ---------------------------------------------------------------------------------------------


def test_the_matrix_equals_plain_hooks(tmp_path: Path) -> None:
    pictures, buffer = drawings(), indexed(tmp_path)
    a, b = linear_net(), conv_net()
    with hook(a, "a", layers=["1"]) as model_a, hook(b, "b", layers=["0"]) as model_b:
        usae = some([model_a, model_b], pictures)
        sites = ["a/1", "b/0"]
        found = fidelity(usae, [model_b, model_a], buffer, open_source(pictures), sites=sites, batch_size=5, least=1e-6)
        held_out = pictures[np.sort(buffer.read("holdout").image_index)]
        rows = {s: x for model in (model_a, model_b) for s, x in rows_of(model, held_out).items()}
        inputs = inputs_of(model_a, held_out)
    with torch.no_grad():
        clean = {"a/1": a(inputs), "b/0": b(inputs)}
        for target, module, layer, put in [("a/1", a, "1", instead), ("b/0", b, "0", shift_map)]:
            mean = usae.mean[usae.columns[target]].expand(len(held_out), -1)
            at_mean = plain_run(module, inputs, layer, put(mean))
            kl_mean, a_mean = plain_kl(clean[target], at_mean).mean(), plain_top1(clean[target], at_mean)
            assert found.kl_mean[target] == pytest.approx(kl_mean, rel=1e-6)
            assert found.top1_mean[target] == a_mean
            for source in sites:
                x_hat = plain_decode(usae, plain_z(usae, rows[source], source), target)
                spliced = plain_run(module, inputs, layer, put(x_hat))
                kl, agreed = plain_kl(clean[target], spliced).mean(), plain_top1(clean[target], spliced)
                assert found.kl[source][target] == pytest.approx(kl, rel=1e-6)
                assert found.share_recovered[source][target] == pytest.approx(1 - kl / kl_mean, rel=1e-6, abs=1e-9)
                assert found.top1[source][target] == agreed
                if a_mean < 1:
                    expected = (agreed - a_mean) / (1 - a_mean)
                    assert found.top1_recovered[source][target] == pytest.approx(expected, abs=1e-12)
    assert found.share_recovered["a/1"]["a/1"] != pytest.approx(found.share_recovered["b/0"]["a/1"], abs=1e-3)
    assert math.isnan(found.cosine["a/1"]["b/0"])


def test_places_of_the_common_grid_equal_plain_hooks(tmp_path: Path) -> None:
    """4x4 and 2x2 places: the finer map is shifted by the upsampled difference, the coarser one is replaced."""
    pictures, buffer, grid = drawings(), indexed(tmp_path), (2, 2)
    a, b = conv_net(stride=1), conv_net(stride=2, width=5)
    with hook(a, "a", layers=["0@patch"]) as model_a, hook(b, "b", layers=["0@patch"]) as model_b:
        usae = some([model_a, model_b], pictures, grid=grid)
        sites = ["a/0@patch", "b/0@patch"]
        found = fidelity(usae, [model_a, model_b], buffer, open_source(pictures), sites=sites, batch_size=5)
        same = fidelity(exact([model_a, model_b], pictures, grid), [model_a, model_b], buffer, open_source(pictures),
                        sites=sites, batch_size=5, least=0.0)  # fmt: skip
        held_out = pictures[np.sort(buffer.read("holdout").image_index)]
        inputs = inputs_of(model_a, held_out)
    assert same.kl[sites[0]][sites[0]] == pytest.approx(0, abs=1e-10)
    assert same.kl[sites[1]][sites[1]] == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        fine, coarse = a[0](inputs), b[0](inputs)
        # from 4x4 to 2x2 the antialiased filter spans 2 places on either side: weights 1 3 3 1 over 8, cut at the edges
        weights = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]], dtype=torch.float64) / 7
        small = torch.einsum("rh,cw,bdhw->bdrc", weights, weights, fine)
        as_rows = {sites[0]: small, sites[1]: coarse}
        for source, maps in as_rows.items():
            z = plain_z(usae, maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]), source)
            x_hat = {t: plain_decode(usae, z, t).reshape(-1, 2, 2, usae.d_in[t]).permute(0, 3, 1, 2) for t in sites}
            shift = functional.interpolate(x_hat[sites[0]] - small, size=(4, 4), mode="bilinear", align_corners=False)
            spliced = {
                sites[0]: plain_run(a, inputs, "0", instead(fine + shift)),
                sites[1]: plain_run(b, inputs, "0", instead(x_hat[sites[1]])),
            }
            for target, module in zip(sites, (a, b), strict=True):
                kl = plain_kl(module(inputs), spliced[target]).mean()
                assert found.kl[source][target] == pytest.approx(kl, rel=1e-5)


def test_what_is_exact_at_the_common_grid_leaves_the_output_as_it_is() -> None:
    """In float32, too: detail finer than the common grid is not smoothed away."""
    from usae_probe.probes.splicing import live_sites

    pictures = drawings()
    with hook(conv_net(), "m", layers=["0@patch"], double=False) as model:
        (live,) = live_sites(exact([model], pictures, (2, 2)).float(), [model], ["m/0@patch"])
        inputs = inputs_of(model, pictures)
        rows, clean = live.clean(inputs)
        assert rows.shape == (len(pictures) * 4, 6)
        x_hat = live.usae.decode(live.usae.encode(rows, live.key), live.key)
        spliced = live.replaced(inputs, lambda _: x_hat, "x̂")
        assert clean.logits is not None
        assert spliced.logits is not None
        torch.testing.assert_close(spliced.logits, clean.logits, rtol=0, atol=1e-5)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def one_pixel(weight: float, head: float = 1.0) -> nn.Sequential:
    """h = (weight · red, 0), logits = head · h, for pictures of one pixel."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[weight, 0, 0], [0, 0, 0]]))
        module[2].weight.copy_(head * torch.eye(2))
    return module


def half(site: str = "m/1") -> USAE:
    """x̂ = x / 2 where x₀ > 0: one latent, mean 0."""
    usae = USAE({site: 2}, 1, 1)
    with torch.no_grad():
        usae.W_enc[0].copy_(torch.tensor([[1.0, 0.0]]))
        usae.W_dec.copy_(torch.tensor([[0.5, 0.0]]))
    return usae


def pixels(*reds: int) -> np.ndarray:
    return np.array([[[[red, 0, 0]]] for red in reds], dtype=np.uint8)


def raw(module: nn.Module, name: str = "m", layers: Sequence[str] = ("1",)) -> HookedModel:
    return attach(
        module.eval(), name=name, image_size=1, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), layers=list(layers)
    )


class TestByHand:
    def test_kl_of_a_two_class_head(self, tmp_path: Path) -> None:
        # Two equal pictures: h = (ln 3, 0), p = (3/4, 1/4).
        # With the mean, 0: q = (1/2, 1/2); KL = 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812.
        # With x̂ = (ln 3 / 2, 0): q = (√3, 1) / (√3 + 1) = (0.633975, 0.366025);
        #   KL = 3/4 ln(0.75 / 0.633975) + 1/4 ln(0.25 / 0.366025) = 0.126052 - 0.095315 = 0.030737.
        # Share recovered: 1 - 0.030737 / 0.130812 = 0.765029. The argmax is kept: a = 1; (0, 0) has its first as well.
        with raw(one_pixel(math.log(3))) as model:
            buffer, source = indexed(tmp_path, 4), open_source(pixels(255, 255, 255, 255))
            found = fidelity(half(), [model], buffer, source, sites=["m/1"])
        assert found.kl_mean["m/1"] == pytest.approx(0.130812, abs=1e-6)
        assert found.kl["m/1"]["m/1"] == pytest.approx(0.030737, abs=1e-6)
        assert found.share_recovered["m/1"]["m/1"] == pytest.approx(0.765029, abs=1e-5)
        assert (found.top1["m/1"]["m/1"], found.top1_mean["m/1"]) == (1, 1)
        assert math.isnan(found.top1_recovered["m/1"]["m/1"])  # 1 - a_mean = 0

    def test_ablation(self, tmp_path: Path) -> None:
        # z = ln 3, so that h loses ln 3 / 2 and is (ln 3 / 2, 0): KL 0.030737, as above. Black pictures do not fire it:
        # of the two of the four that are held out, one is black or none is.
        with raw(one_pixel(math.log(3))) as model:
            source = open_source(pixels(255, 0, 255, 255, 0, 255))
            found = fidelity(half(), [model], indexed(tmp_path, 6), source, sites=["m/1"], latents=[0, 0])
        held_out = np.isin(indexed(tmp_path, 6).read("holdout").image_index, [0, 2, 3, 5]).sum()
        (record,) = found.latents
        assert record.n_firing == {"m/1": held_out}
        assert record.effect["m/1"] == pytest.approx(0.030737 * held_out / 3, abs=1e-6)
        assert math.isnan(record.correlation)
        assert math.isnan(record.null_correlation)

    def test_a_share_is_refused_where_its_denominator_is_small(self, tmp_path: Path) -> None:
        # logits 0.1 · h = (0.1099, 0): KL from (1/2, 1/2) is about 0.1099² / 8 = 0.00151, below 0.02
        with raw(one_pixel(math.log(3), head=0.1)) as model:
            buffer, source = indexed(tmp_path, 4), open_source(pixels(255, 255, 255, 255))
            refused = fidelity(half(), [model], buffer, source, sites=["m/1"])
            given = fidelity(half(), [model], buffer, source, sites=["m/1"], least=0.001)
        assert refused.kl_mean["m/1"] == given.kl_mean["m/1"] == pytest.approx(0.00151, abs=1e-5)
        assert math.isnan(refused.share_recovered["m/1"]["m/1"])
        assert given.share_recovered["m/1"]["m/1"] == pytest.approx(0.75, abs=0.01)  # half of h, a quarter of the KL
        assert refused.kl == given.kl

    def test_shares_are_not_clipped(self, tmp_path: Path) -> None:
        usae = half()
        with torch.no_grad():
            usae.W_dec.copy_(torch.tensor([[-1.0, 0.0]]))
        # x̂ = -h: q = (1/4, 3/4), KL = 3/4 ln 3 - 1/4 ln 3 = 0.549306; share 1 - 0.549306 / 0.130812 = -3.1992;
        # the argmax changes, that of (0, 0) does not: a = 0, a_mean = 1
        with raw(one_pixel(math.log(3))) as model:
            found = fidelity(
                usae, [model], indexed(tmp_path, 4), open_source(pixels(255, 255, 255, 255)), sites=["m/1"]
            )
        assert found.share_recovered["m/1"]["m/1"] == pytest.approx(-3.1992, abs=1e-3)
        assert (found.top1["m/1"]["m/1"], found.top1_mean["m/1"]) == (0, 1)

    def test_cosine(self) -> None:
        clean = Reading(None, torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64))
        other = Reading(None, torch.tensor([[4.0, 3.0], [0.0, 2.0]], dtype=torch.float64))
        assert clean.compared(other)["cosine"].tolist() == pytest.approx([24 / 25, 0])  # (12 + 12) / (5 · 5)
        assert clean.effect(other).tolist() == pytest.approx([1 / 25, 1])

    def test_final_features(self) -> None:
        assert final_features(torch.arange(6.0).reshape(1, 2, 3)).tolist() == [[1.5, 2.5, 3.5]]
        assert final_features(torch.arange(8.0).reshape(1, 2, 2, 2)).tolist() == [[1.5, 5.5]]
        assert final_features(torch.arange(3.0)).tolist() == [[0], [1], [2]]

    def test_nulls(self) -> None:
        energy = np.array([0.0, 1.0, 1.1, 5.0, 1.2, 0.9])
        # one live latent of twelve is left out: the farthest; a dead one never comes
        drawn = {draw_nulls({"a": energy, "b": energy}, [1], seed)["b", 1] for seed in range(40)}
        assert drawn == {2, 3, 4, 5}
        many = np.concatenate([np.linspace(1, 2, 11), [50.0]])
        drawn = {draw_nulls({"a": many, "b": many}, [0], seed)["b", 0] for seed in range(200)}
        assert drawn == set(range(1, 11))
        assert draw_nulls({"a": energy, "b": energy}, [0], 0) == {}  # it does not fire
        assert draw_nulls({"a": energy}, [1], 0) == {}
        both = draw_nulls({"a": energy, "b": energy}, [1, 2, 4], 5)
        assert both["b", 4] == draw_nulls({"a": energy, "b": energy}, [4], 5)["b", 4]


# ---- models without a head -------------------------------------------------------------------------------------------


def body() -> nn.Sequential:
    """Final features of width 6."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh())


def coloured(n: int) -> tuple[np.ndarray, Annotation]:
    """Reddish, greenish and bluish pictures."""
    values = np.arange(n) % 3
    pictures = drawings(n, side=SIDE) // 3
    pictures[np.arange(n), :, :, values] += 150
    return pictures, Annotation("class", values, ["red", "green", "blue"])


def test_without_labels_only_cosines(tmp_path: Path) -> None:
    pictures, buffer, module = drawings(), indexed(tmp_path), body()
    with hook(module, "m", layers=["1"]) as model:
        usae = some([model], pictures)
        found = fidelity(usae, [model], buffer, open_source(pictures), sites=["m/1"], latents=range(20), batch_size=5)
        held_out = pictures[np.sort(buffer.read("holdout").image_index)]
        rows, inputs = rows_of(model, held_out)["m/1"], inputs_of(model, held_out)
    assert (found.head, found.effect) == ({"m/1": "none"}, {"m/1": "cosine"})
    for matrix in (found.kl, found.share_recovered, found.top1, found.top1_recovered):
        assert math.isnan(matrix["m/1"]["m/1"])
    assert math.isnan(found.kl_mean["m/1"])
    assert found.probe_accuracy == {}
    with torch.no_grad():
        clean, z = module(inputs), plain_z(usae, rows, "m/1")
        for value, new in [
            (found.cosine["m/1"]["m/1"], plain_decode(usae, z, "m/1")),
            (found.cosine_mean["m/1"], usae.mean.expand(len(rows), -1)),
        ]:
            other = plain_run(module, inputs, "1", instead(new))
            expected = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(clean, other, strict=True)]
            assert value == pytest.approx(np.mean(expected), rel=1e-6)
        for record in found.latents:
            less = rows - usae.scale[0] * z[:, record.latent, None] * usae.W_dec[record.latent]
            other = plain_run(module, inputs, "1", instead(less))
            expected = [1 - (a @ b / (a.norm() * b.norm())).item() for a, b in zip(clean, other, strict=True)]
            assert record.effect["m/1"] == pytest.approx(np.mean(expected), rel=1e-6, abs=1e-12)


def test_labels_give_a_probe(tmp_path: Path) -> None:
    pictures, labels = coloured(90)
    labels.values[:30:2] = -1
    buffer = indexed(tmp_path, 90, holdout=0.3)
    source = open_source(pictures)
    how: dict[str, Any] = {"sites": ["m/1"], "labels": labels, "batch_size": 16, "least": 0.0}
    with hook(body(), "m", layers=["1"]) as model:
        usae = exact([model], pictures)
        found = fidelity(usae, [model], buffer, source, **how)
        nothing = fidelity(without_decoder(usae), [model], buffer, source, **how)
        few = fidelity(usae, [model], buffer, source, **how | {"probe_images": 3})
        one_label = labels._replace(values=np.zeros(90, dtype=np.int64))
        none = fidelity(usae, [model], buffer, source, **how | {"labels": one_label})
        one_label.values[::3] = -1  # what is unknown is no second label
        nor = fidelity(usae, [model], buffer, source, **how | {"labels": one_label})
    assert (found.head, found.effect) == ({"m/1": "probe"}, {"m/1": "kl"})
    assert found.probe_accuracy["m/1"] > 0.9
    assert_recovers(found, "m/1", 1, abs=1e-6)
    assert_recovers(nothing, "m/1", 0)
    assert found.kl_mean["m/1"] > 0.3
    assert found.cosine["m/1"]["m/1"] == pytest.approx(1)
    assert found.cosine_mean["m/1"] < 0.99
    assert few.kl_mean != found.kl_mean
    assert none.head == nor.head == {"m/1": "none"}
    assert none.probe_accuracy == {}


def test_the_probe_is_the_minimum(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60) * 2  # classes 0, 2 and 4
    features = rng.normal(size=(60, 4)) + labels[:, None] * np.array([0.5, 0, -0.5, 0]) + 7
    features[:, 3] = 3.5  # does not vary
    probe = fit_probe(torch.from_numpy(features), labels, l2=0.05)
    x = features - features.mean(0)
    x[:, :3] /= features[:, :3].std(0)

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        logits = x @ weight.T + bias
        picked = logits[np.arange(60), labels // 2]
        return float(np.mean(np.log(np.exp(logits).sum(1)) - picked) + 0.025 * (weight**2).sum())

    best = optimize.minimize(loss, np.zeros(15), method="BFGS", options={"gtol": 1e-7})
    weight = best.x[:12].reshape(3, 4)
    assert probe.classes.tolist() == [0, 2, 4]
    np.testing.assert_allclose(probe.weight.numpy(), weight, atol=1e-5)
    expected = x @ weight.T + best.x[12:]  # the bias is free up to a constant
    logits = probe.logits(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=1e-5
    )


def test_the_probe_does_not_depend_on_the_unit_of_a_feature() -> None:
    half = np.random.default_rng(0).normal(size=(20, 3))
    features = torch.from_numpy(np.concatenate([half, -half]))  # of mean 0
    labels = (features[:, 0] > 0.3).long().numpy()
    small = 1e-3 * features
    expected = fit_probe(features, labels).logits(features)
    torch.testing.assert_close(fit_probe(small, labels).logits(small), expected, rtol=1e-6, atol=1e-6)


class Wrapped(nn.Module):
    """A module whose output is made something of."""

    def __init__(self, inner: nn.Module, wrap: Callable[[Tensor], Any], **facts: Any) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap
        for name, fact in facts.items():
            setattr(self, name, fact)

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def same(x: Tensor) -> Tensor:
    return x


def convolved(*end: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *end, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def resnet(num_classes: int) -> nn.Module:
    tiny: nn.Module = timm.create_model("resnet10t", channels=(4, 4, 4, 4), stem_width=4, num_classes=num_classes)
    return tiny


def labelled(n: int) -> SimpleNamespace:
    return SimpleNamespace(num_labels=n)


HEADS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "the last is Linear": (linear_net, "1", True),
    "then softmax": (lambda: nn.Sequential(*linear_net(), nn.Dropout(), nn.Softmax(1)), "1", True),
    "then an activation": (body, "1", False),
    "one output": (lambda: linear_net(classes=1), "1", False),
    "1x1 convolution": (lambda: convolved(nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU()), "0", True),
    "another convolution": (convolved, "0", False),
    "num_classes": (lambda: Wrapped(body(), same, num_classes=6), "inner.1", True),
    "num_classes 0": (lambda: Wrapped(linear_net(), same, num_classes=0), "inner.1", False),
    "another number": (lambda: Wrapped(linear_net(), same, num_classes=9), "inner.1", True),
    "config": (lambda: Wrapped(body(), same, config=labelled(6)), "inner.1", True),
    "config of another": (lambda: Wrapped(linear_net(), same, config=labelled(2)), "inner.1", False),
    "logits by name": (lambda: Wrapped(body(), lambda x: {"hidden": x * 2, "logits": x}), "inner.1", True),
    "pooled": (lambda: Wrapped(body(), lambda x: {"hidden": x, "pooler_output": x}), "inner.1", False),
    "a tuple": (lambda: Wrapped(linear_net(), lambda x: (x, x * 2)), "inner.1", True),
    "timm": (lambda: resnet(5), "layer4", True),
    "timm without": (lambda: resnet(0), "layer4", False),
}


@pytest.mark.parametrize(("make", "layer", "expected"), HEADS.values(), ids=list(HEADS))
def test_which_models_have_a_head(make: Callable[[], nn.Module], layer: str, expected: bool) -> None:
    from usae_probe.probes.splicing import live_sites

    side = 32 if layer == "layer4" else SIDE
    with hook(make(), "m", layers=[layer], side=side, double=False) as model:
        site = str(model.sites[0])
        (live,) = live_sites(USAE({site: model.d_in(model.sites[0])}, 4, 1), [model], [site])
        assert live.head.own is expected
        assert has_head(model, None, torch.zeros(2, 3, 4)) is False
        _, reading = live.clean(torch.randn(3, 3, side, side))
        assert (reading.logits is None) is not expected
        assert (reading.features is None) is expected


# ---- ablating latents ------------------------------------------------------------------------------------------------


def readers(seed: int, channel: int) -> nn.Sequential:
    """h₀ is the mean red, h₁… h₅ are pixels of a channel of one's own, seen by two classes each."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 6), nn.Linear(6, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = torch.zeros(6, 3, SIDE, SIDE)
        weight[0, 0] = 1 / SIDE**2
        for j in range(1, 6):
            weight[j, channel, j % SIDE, j // SIDE] = 0.3
        module[1].weight.copy_(weight.flatten(1))
        module[1].bias.zero_()
        module[2].weight.copy_(torch.randn(3, 6, generator=generator))
    return module


def planted_pictures(n: int = 64) -> np.ndarray:
    """How red a picture is varies; what its pixels are in green and blue has nothing to do with each other."""
    rng = np.random.default_rng(5)
    pictures = rng.integers(0, 256, (n, SIDE, SIDE, 3))
    pictures[..., 0] = rng.uniform(0, 255, n)[:, None, None]
    return pictures.astype(np.uint8)


def planted(models: Sequence[HookedModel], pictures: np.ndarray) -> USAE:
    """Latent k is the positive part of dimension k in both sites."""
    rows = {site: x for model in models for site, x in rows_of(model, pictures).items()}
    usae = USAE(
        dict.fromkeys(rows, 6), 6, 6, normalisation={site: (x.mean(0).float(), 0.5) for site, x in rows.items()}
    )
    with torch.no_grad():
        for i, site in enumerate(usae.sites):
            usae.W_enc[i].copy_(torch.eye(6))
            usae.W_dec[:, usae.columns[site]] = torch.eye(6)
    return usae.double()


def test_a_shared_latent_has_correlated_effects_and_its_null_has_not(tmp_path: Path) -> None:
    pictures = planted_pictures(128)
    buffer, sites = indexed(tmp_path, 128), ["a/1", "b/1"]
    with hook(readers(1, 1), "a", layers=["1"]) as a, hook(readers(2, 2), "b", layers=["1"]) as b:
        usae = planted([a, b], pictures)
        found = fidelity(usae, [a, b], buffer, open_source(pictures), sites=sites, latents=range(6))
    shared, *others = found.latents
    reds = pictures[np.sort(buffer.read("holdout").image_index)][:, 0, 0, 0]
    above = int((reds > pictures[:, 0, 0, 0].mean()).sum())
    assert shared.n_firing == {"a/1": above, "b/1": above}  # of stored values those of 0 are no fires
    assert shared.correlation > 0.85
    assert shared.spearman > 0.9
    assert abs(shared.null_correlation) < 0.35  # of 64 images: 1/8 is one standard deviation
    assert abs(shared.null_spearman) < 0.35
    assert shared.both_firing > 0.75  # stronger where it is stronger in the other model, too
    assert max(abs(record.correlation) for record in others) < 0.4
    assert found.medians["correlation"] == np.median([record.correlation for record in found.latents])
    assert found.medians["null_spearman"] == np.median([record.null_spearman for record in found.latents])


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Σ (a − ā)(b − b̄) / √(Σ (a − ā)² Σ (b − b̄)²)."""
    da, db = a - a.mean(), b - b.mean()
    return float((da * db).sum() / math.sqrt((da**2).sum() * (db**2).sum())) if da.any() and db.any() else math.nan


def ranks(x: np.ndarray) -> np.ndarray:
    return np.array([((x < v).sum() + (x <= v).sum() + 1) / 2 for v in x])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_effects_equal_plain_hooks(tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usae_probe.probes.ablation.LEAST_BOTH", least := 3)
    pictures, buffer = drawings(), indexed(tmp_path)
    modules = {"a/0": conv_net(), "b/0": conv_net(width=4), "c/0": conv_net(width=5)}
    models = [hook(module, site[0], layers=["0"]) for site, module in modules.items()]
    usae, sites, latents = some(models, pictures), list(modules), list(range(20))
    found = fidelity(
        usae, models, buffer, open_source(pictures), sites=sites, latents=latents, batch_size=batch_size, seed=3
    )
    held_out = pictures[np.sort(buffer.read("holdout").image_index)]
    rows = {s: x for model in models for s, x in rows_of(model, held_out).items()}
    inputs = inputs_of(models[0], held_out)
    for model in models:
        model.close()

    def effect(site: str, latent: int) -> np.ndarray:
        z, i = plain_z(usae, rows[site], site), sites.index(site)
        less = rows[site] - usae.scale[i] * z[:, latent, None] * usae.W_dec[latent, usae.columns[site]]
        return plain_kl(modules[site](inputs), plain_run(modules[site], inputs, "0", shift_map(less)))

    with torch.no_grad():
        energy = {
            s: (plain_z(usae, rows[s], s).mean(0) * usae.W_dec[:, usae.columns[s]].norm(dim=1)).numpy() for s in sites
        }
        nulls, compared = draw_nulls(energy, latents, 3), 0
        for record in found.latents:
            k = record.latent
            own = {site: effect(site, k) for site in sites}
            fires = {s: plain_z(usae, rows[s], s).numpy() > 0 for s in sites}
            n_firing = {s: int(fires[s][:, record.latent].sum()) for s in sites}
            assert record.n_firing == n_firing
            assert record.effect == pytest.approx({site: x.mean() for site, x in own.items()}, rel=1e-6, abs=1e-12)
            pairs = [(a, b) for a, b in combinations(sites, 2) if n_firing[a] and n_firing[b]]
            against = [(own[a], effect(b, nulls[b, record.latent])) for a, b in pairs]
            together = [(own[a], own[b]) for a, b in pairs]
            for value, of in [(record.correlation, together), (record.null_correlation, against)]:
                expected = np.mean([pearson(x, y) for x, y in of]) if of else math.nan
                assert value == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
            both = [fires[a][:, k] & fires[b][:, k] for a, b in pairs]
            each = [pearson(x[i], y[i]) for i, (x, y) in zip(both, together, strict=True) if i.sum() >= least]
            known = [one for one in each if not math.isnan(one)]
            expected = np.mean(known) if known else math.nan
            assert record.both_firing == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
            compared += len(known)
            spearman = np.mean([pearson(ranks(x), ranks(y)) for x, y in together]) if together else math.nan
            assert record.spearman == pytest.approx(spearman, abs=1e-6, nan_ok=True)
    assert sum(math.isfinite(record.correlation) for record in found.latents) >= 2
    assert compared >= 2


@torch.no_grad()
def test_energy_is_the_mean_activation_over_rows_times_the_length_of_the_decoder_row() -> None:
    from usae_probe.probes.splicing import live_sites

    pictures, site = drawings(40), "m/0@patch"
    with hook(conv_net(), "m", layers=["0@patch"]) as model:
        usae = some([model], pictures, grid=(2, 2))
        (live,) = live_sites(usae, [model], [site])
        rows = rows_of(model, pictures, (2, 2))[site]
    found = Fires(usae, live)
    for part in (rows[:60], rows[60:]):  # of 15 and of 25 images
        found.add([usae.encode(part, site)], len(part) // 4)
    z = plain_z(usae, rows, site)
    expected = z.mean(0) * usae.W_dec.norm(dim=1)
    assert found.energy() == pytest.approx(expected.numpy(), rel=1e-9)
    fired = (z > 0).reshape(40, 4, -1).any(1)
    assert found.images() == {k: fired[:, k].nonzero().flatten().tolist() for k in range(20) if fired[:, k].any()}


def test_ablation_at_every_place_of_the_common_grid(tmp_path: Path) -> None:
    pictures, buffer, module = drawings(), indexed(tmp_path), conv_net()
    with hook(module, "m", layers=["0@patch"]) as model:
        usae = some([model], pictures, grid=(2, 2))
        source = open_source(pictures)
        found = fidelity(usae, [model], buffer, source, sites=["m/0@patch"], latents=range(20), batch_size=5)
        held_out = pictures[np.sort(buffer.read("holdout").image_index)]
        rows, inputs = rows_of(model, held_out, (2, 2))["m/0@patch"], inputs_of(model, held_out)
    with torch.no_grad():
        z, fine = plain_z(usae, rows, "m/0@patch"), module[0](inputs)
        for record in found.latents:
            lost = usae.scale[0] * z[:, record.latent, None] * usae.W_dec[record.latent]
            lost = lost.reshape(-1, 2, 2, 6).permute(0, 3, 1, 2)
            shift = functional.interpolate(lost, size=(4, 4), mode="bilinear", align_corners=False)
            other = plain_run(module, inputs, "0", instead(fine - shift))
            assert record.effect["m/0@patch"] == pytest.approx(
                plain_kl(module(inputs), other).mean(), rel=1e-4, abs=1e-9
            )
            assert record.n_firing["m/0@patch"] == (z.reshape(-1, 4, 20)[:, :, record.latent] > 0).any(1).sum()


def test_codes_of_any_width_in_any_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one image in several chunks, and rows with different numbers of active latents."""
    pictures, buffer = drawings(), indexed(tmp_path)
    modules = {"a": conv_net(), "b": conv_net(stride=2, width=5)}
    models = [hook(module, name, layers=["0@patch"]) for name, module in modules.items()]
    given = some(models, pictures, grid=(2, 2))
    norms = {s: (given.mean[c].float(), float(given.scale[i])) for i, (s, c) in enumerate(given.columns.items())}
    usae = USAE(given.d_in, 20, 3, normalisation=norms, grid=(2, 2), sparsity="l1").double()
    widths = {usae.encode(x, s).values.shape[1] for m in models for s, x in rows_of(m, pictures[:3], (2, 2)).items()}
    assert widths != {3}
    how: dict[str, Any] = {"sites": list(usae.sites), "latents": range(20), "batch_size": 5}
    whole = fidelity(usae, models, buffer, open_source(pictures), **how)
    for module in ("fidelity", "ablation"):  # by name: the package has a function called fidelity
        monkeypatch.setattr(import_module(f"usae_probe.probes.{module}"), "CHUNK_ROWS", 3)
    parts = fidelity(usae, models, buffer, open_source(pictures), **how)
    for model in models:
        model.close()
    for source in usae.sites:
        assert parts.kl[source] == pytest.approx(whole.kl[source], rel=1e-9)
    for one, other in zip(parts.latents, whole.latents, strict=True):
        assert one.n_firing == other.n_firing
        assert one.effect == pytest.approx(other.effect, rel=1e-6, abs=1e-12)
        assert one.null_correlation == pytest.approx(other.null_correlation, rel=1e-6, nan_ok=True)
    assert len({tuple(record.n_firing.values()) for record in whole.latents}) > 3


# ---- images, models and messages -------------------------------------------------------------------------------------


class Damaged:
    """A source some of whose pictures cannot be decoded."""

    kind, location, class_names = "array", "damaged", None

    def __init__(self, pictures: np.ndarray, broken: Sequence[int]) -> None:
        self.pictures, self.broken = pictures, set(broken)

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise ImageError(f"picture {index} is damaged")
        return self.pictures[index].copy()

    def describe(self, index: int) -> str:
        return str(index)

    def label(self, index: int) -> int | None:
        return None

    def fingerprint(self) -> str:
        return "f"


def test_damaged_pictures_are_left_out(tmp_path: Path) -> None:
    pictures, buffer = drawings(), indexed(tmp_path)
    held_out = np.sort(buffer.read("holdout").image_index).tolist()
    with hook(conv_net(), "m", layers=["0"]) as model:
        usae = some([model], pictures)
        how: dict[str, Any] = {"sites": ["m/0"], "latents": [2, 11], "batch_size": 3}
        source: ImageSource = Damaged(pictures, held_out[:4])
        found = fidelity(usae, [model], buffer, source, **how)
        assert found.n_images == 8
        kept = indexed(tmp_path / "kept", 8, holdout=0.0)
        only = fidelity(usae, [model], kept, open_source(pictures[held_out[4:]]), split="train", **how)
        assert found.kl["m/0"]["m/0"] == pytest.approx(only.kl["m/0"]["m/0"])
        assert [record.effect for record in found.latents] == [pytest.approx(record.effect) for record in only.latents]
        with pytest.raises(
            ImageError, match=r"none of 12 images of 'holdout' could be decoded \(picture \d+ is damaged"
        ):
            fidelity(usae, [model], buffer, Damaged(pictures, range(N)), **how)


def test_images_are_drawn_by_seed_and_progress_ends_at_its_total(tmp_path: Path) -> None:
    pictures, labels = coloured(N)
    buffer, source = indexed(tmp_path), open_source(pictures)
    said: list[tuple[int, int]] = []
    with hook(body(), "a", layers=["1"]) as a, hook(conv_net(), "b", layers=["0"]) as b:
        usae = some([a, b], pictures)
        how: dict[str, Any] = {"sites": ["a/1", "b/0"], "latents": [1, 2, 3], "labels": labels, "n_images": 7}
        first = fidelity(usae, [a, b], buffer, source, **how, batch_size=3, progress=lambda *now: said.append(now))
        again = fidelity(usae, [a, b], buffer, source, **how, batch_size=3)
        other = fidelity(usae, [a, b], buffer, source, **how, batch_size=3, seed=1)
    assert first.n_images == 7
    assert first.head == {"a/1": "probe", "b/0": "logits"}
    assert first.to_dict() == again.to_dict()
    assert first.kl["b/0"] != other.kl["b/0"]
    assert said[-1][0] == said[-1][1]
    done = [now for now, _ in said]
    assert done == sorted(done)
    assert all(now <= total for now, total in said)
    content = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert content["cosine"]["a/1"]["b/0"] is None
    assert content["latents"][0]["latent"] == 1
    names = ("correlation", "spearman", "both_firing")
    assert set(content["medians"]) == {*names, "null_correlation", "null_spearman"}
    assert content["measured_on"] == "holdout"


def test_models_are_as_they_were(tmp_path: Path) -> None:
    module, pictures = conv_net(), drawings()
    before = {name: dict(part.__dict__) for name, part in module.named_modules()}
    with hook(module, "m", layers=["0"], double=False) as model:
        usae = some([model], pictures).float()
        module[1].training = True
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        fidelity(usae, [model], indexed(tmp_path), open_source(pictures), sites=["m/0"], latents=[1, 2])
        assert module[1].training
        assert not module[0].training
        assert not any(part._forward_hooks for part in module.modules())
        assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
        assert torch.is_grad_enabled()
        module[1].training = False
    assert {name: set(part.__dict__) for name, part in module.named_modules()} == {n: set(d) for n, d in before.items()}


def test_half_precision_models_and_a_float32_usae(tmp_path: Path) -> None:
    pictures, buffer = drawings(), indexed(tmp_path)
    module = conv_net()
    how: dict[str, Any] = {"sites": ["m/0@patch"], "latents": [1, 2], "least": 1e-3}
    with hook(module, "m", layers=["0@patch"], double=False) as model:
        usae = some([model], pictures, grid=(2, 2)).float()
        expected = fidelity(usae, [model], buffer, open_source(pictures), **how)
        module.to(torch.bfloat16)
        found = fidelity(usae, [model], buffer, open_source(pictures), **how)
    assert found.kl["m/0@patch"]["m/0@patch"] == pytest.approx(expected.kl["m/0@patch"]["m/0@patch"], rel=0.1)
    assert found.latents[0].n_firing == expected.latents[0].n_firing


def test_messages(tmp_path: Path) -> None:
    pictures, buffer = drawings(), indexed(tmp_path)
    source = open_source(pictures)
    with hook(conv_net(), "a", layers=["0"]) as a, hook(conv_net(), "b", layers=["0@patch"]) as b:
        usae = some([a, b], pictures)

        def run(**how: Any) -> Fidelity:
            given: dict[str, Any] = {"models": [a, b], "sites": ["a/0"], "buffer": buffer, "source": source} | how
            return fidelity(usae, given.pop("models"), given.pop("buffer"), given.pop("source"), **given)

        with pytest.raises(UsageError, match="sites of b are wanted, but the models given are: a"):
            run(models=[a], sites=["a/0", "b/0@patch"])
        with pytest.raises(UsageError, match="two of the models given have one name"):
            run(models=[a, a])
        with pytest.raises(SiteError, match="no site 'a/1'"):
            run(sites=["a/1"])
        with pytest.raises(SiteError, match="sites is empty"):
            run(sites=[])
        with pytest.raises(SiteError, match="do not pair up: 1 and 16 per image"):
            run(sites=["a/0", "b/0@patch"])
        with pytest.raises(UsageError, match="latent 20 is out of range"):
            run(latents=[3, 20])
        with pytest.raises(UsageError, match="n_images=0"):
            run(n_images=0)
        with pytest.raises(BufferIntegrityError, match="no images of 'validation'"):
            run(split="validation")
        with pytest.raises(UsageError, match=r"the buffer has image \d+, but .* has 3 pictures"):
            run(source=open_source(pictures[:3]))
        wide = hook(conv_net(width=7), "a", layers=["0"])
        with pytest.raises(SiteError, match="d_in = 6 in the USAE, but 7 in the model given"):
            run(models=[wide])
    with hook(body(), "a", layers=["1"]) as a:
        usae = some([a], pictures)
        with pytest.raises(UsageError, match="3 labels for 24 pictures"):
            fidelity(usae, [a], buffer, source, sites=["a/1"], labels=Annotation("class", np.arange(3), list("abc")))
    with hook(nn.Sequential(*linear_net(), Does(lambda x: x / 0)), "a", layers=["1"]) as a:
        usae = some([a], pictures)
        with pytest.raises(NonFiniteError, match="NaN or infinite: model 'a' as it is"):
            fidelity(usae, [a], buffer, source, sites=["a/1"])
