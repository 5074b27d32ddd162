"""The USAE by itself: units, normalisation, initialisation, decoder norms, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.errors import ConfigError, SiteError, UsaeProbeWarning, UsageError
from usae_probe.usae import USAE, Codes

from . import oracles

KERNELS = ["reference", "csr"]
DIMS = {"vit/blocks.11": 7, "resnet/layer4@mean": 5, "dino/blocks.3@cls": 6}


def random_usae(kernel: str = "auto", dtype: torch.dtype = torch.float64, seed: int = 0) -> USAE:
    """Three sites with random biases, decoders that are no longer tied, and a normalisation."""
    g = torch.Generator().manual_seed(seed)
    normalisation = {site: (torch.randn(d, generator=g), 0.5 + i) for i, (site, d) in enumerate(DIMS.items())}
    usae = USAE(DIMS, n_latents=20, k=3, normalisation=normalisation, kernel=kernel, seed=seed)
    with torch.no_grad():
        for parameter in usae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    usae.to(dtype).renormalise_decoder()
    return usae


@pytest.mark.parametrize("kernel", KERNELS)
def test_by_hand(kernel: str) -> None:
    # site a: d = 2, mean (1, 2), scale 2; site b: d = 2, mean (10, 0), scale 1/2; 3 latents, 1 active
    # x = (4, 4) at a: x̃ = (3, 2)/2 = (1.5, 1); minus b_dec,a = (.5, 0): (1, 1)
    # z_pre = W_enc,a (1, 1) + b_enc,a = (1, 1, 2) + (0, .5, −1) = (1, 1.5, 1): latent 1 with z = 1.5
    # x̂_a = mean + scale · (1.5 · (0, 1) + (.5, 0)) = (1, 2) + 2 · (.5, 1.5) = (2, 5)
    # x̂_b = mean + scale · (1.5 · (1, −2) + (0, .25)) = (10, 0) + .5 · (1.5, −2.75) = (10.75, −1.375)
    usae = USAE(
        {"m/a": 2, "n/b": 2},
        3,
        1,
        normalisation={"m/a": (torch.tensor([1.0, 2.0]), 2.0), "n/b": (torch.tensor([10.0, 0.0]), 0.5)},
        kernel=kernel,
    )
    with torch.no_grad():
        usae.W_enc[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        usae.b_enc[0].copy_(torch.tensor([0.0, 0.5, -1.0]))
        usae.W_dec[1] = torch.tensor([0.0, 1.0, 1.0, -2.0])
        usae.b_dec.copy_(torch.tensor([0.5, 0.0, 0.0, 0.25]))
    codes = usae.encode(torch.tensor([[4.0, 4.0]]), "m/a")
    assert codes.indices.tolist() == [[1]]
    assert codes.values.tolist() == [[1.5]]
    assert usae.decode(codes, "m/a").tolist() == [[2.0, 5.0]]
    assert usae.decode(codes, "n/b").tolist() == [[10.75, -1.375]]
    assert usae.to_dense(codes).tolist() == [[0.0, 1.5, 0.0]]
    # x = (−9, −2): x̃ = (−5, −2), minus b_dec: (−5.5, −2); every z_pre < 0: the selected latent does not fire
    codes = usae.encode(torch.tensor([[-9.0, -2.0]]), "m/a")
    assert codes.values.tolist() == [[0.0]]
    assert usae.decode(codes, "m/a").tolist() == [[2.0, 2.0]]  # mean + scale · b_dec


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_encode_and_decode_every_site_against_the_oracle(kernel: str, dtype: torch.dtype) -> None:
    usae = random_usae(kernel, dtype)
    rows = {site: 3 * torch.randn(9, d, dtype=dtype) + 2 for site, d in DIMS.items()}
    expected = oracles.dense_codes(usae, {site: x.numpy() for site, x in rows.items()})
    parameters = oracles.Parameters.of(usae)
    for source in DIMS:
        codes = usae.encode(rows[source], source)
        assert codes.values.shape == codes.indices.shape == (9, 3)
        z = torch.from_numpy(expected[source])
        torch.testing.assert_close(usae.to_dense(codes).double(), z, rtol=1e-4, atol=1e-5)
        for j, target in enumerate(DIMS):
            x_hat = usae.mean[usae.columns[target]] + usae.scale[j] * parameters.decode(z, target)
            torch.testing.assert_close(usae.decode(codes, target).double(), x_hat, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), shift=st.floats(-5, 5), factor=st.floats(0.1, 10))
def test_units_of_the_rows_do_not_matter(seed: int, shift: float, factor: float) -> None:
    usae = random_usae(seed=seed)
    moved = random_usae(seed=seed)
    site, index = "resnet/layer4@mean", 1
    moved.mean[moved.columns[site]] = moved.mean[moved.columns[site]] * factor + shift
    moved.scale[index] *= factor
    x = torch.randn(4, DIMS[site], dtype=torch.float64)
    one, other = usae.encode(x, site), moved.encode(x * factor + shift, site)
    torch.testing.assert_close(usae.to_dense(other), usae.to_dense(one))
    torch.testing.assert_close(moved.decode(other, site), usae.decode(one, site) * factor + shift)


def test_z_pre_is_the_centred_form() -> None:
    usae = random_usae()
    for site, d in DIMS.items():
        x = torch.randn(6, d, dtype=torch.float64)
        torch.testing.assert_close(usae.z_pre(x, site), oracles.Parameters.of(usae).z_pre(x, site))


def test_gradients_reach_raw_rows_through_the_values() -> None:
    usae = random_usae()
    site = "vit/blocks.11"
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    codes = usae.encode(x, site)
    (grad,) = torch.autograd.grad(codes.values.sum(), x)
    # dz/dx = Σ over firing latents of W_enc / s
    firing = (usae.to_dense(codes) > 0).double()
    torch.testing.assert_close(grad, firing @ usae.W_enc[0] / usae.scale[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pre_activation_of_a_few_latents_with_its_gradient(kernel: str, dtype: torch.dtype) -> None:
    usae = random_usae(kernel, dtype)
    parameters = oracles.Parameters.of(usae)
    latents = [19, 0, 7, 7]
    for i, (site, d) in enumerate(DIMS.items()):
        x = (3 * torch.randn(5, d, dtype=torch.float64) + 2).requires_grad_()
        mean, scale = usae.mean[usae.columns[site]].double(), usae.scale[i].double()
        expected = parameters.z_pre((x - mean) / scale, site)[:, latents]
        weights = torch.randn(5, 4, dtype=torch.float64)  # the gradient is asked for where z_pre < 0 too
        (expected_grad,) = torch.autograd.grad((weights * expected).sum(), x)
        for chosen in (latents, torch.tensor(latents)):
            rows = x.detach().to(dtype).requires_grad_()
            found = usae.pre_activation(rows, site, chosen)
            (grad,) = torch.autograd.grad((weights.to(dtype) * found).sum(), rows)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5)
    assert usae.pre_activation(rows, site, []).shape == (5, 0)
    assert usae.pre_activation(rows.half(), site, [3]).dtype == dtype  # rows of a model in another dtype
    for wrong in (20, -1):
        with pytest.raises(UsageError, match=f"latent {wrong} is out of range: the USAE has latents 0 to 19"):
            usae.pre_activation(rows, site, [3, wrong])
    with pytest.raises(SiteError, match=r"given rows of shape \[5, 1\]"):
        usae.pre_activation(rows[:, :1], site, [3])


def test_tied_initialisation() -> None:
    usae = USAE(DIMS, 50, 3, seed=4)
    for i, site in enumerate(DIMS):
        assert usae.W_enc[i].equal(usae.decoder(site))
        torch.testing.assert_close(usae.W_enc[i].norm(dim=1), torch.ones(50))
        assert not usae.b_enc[i].any()
    assert not usae.b_dec.any()
    assert usae.W_enc[0].data_ptr() != usae.W_dec.data_ptr()  # tied at the start only
    torch.testing.assert_close(usae.W_dec.norm(dim=1), torch.full((50,), math.sqrt(3)))
    again, other = USAE(DIMS, 50, 3, seed=4), USAE(DIMS, 50, 3, seed=5)
    assert again.W_dec.equal(usae.W_dec)
    assert not other.W_dec.equal(usae.W_dec)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    USAE(DIMS, 50, 3)
    assert torch.get_rng_state().equal(before)  # the caller's random numbers are left alone


def test_decoder_norm_is_that_of_the_concatenated_row() -> None:
    usae = random_usae()
    with torch.no_grad():
        usae.W_dec.mul_(torch.rand(20, 1, dtype=torch.float64) * 5 + 0.1)
        usae.W_dec[3] = 0
        direction = torch.nn.functional.normalize(usae.W_dec)
    usae.renormalise_decoder()
    norms = usae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms[torch.arange(20) != 3], torch.full((19,), math.sqrt(3), dtype=torch.float64))
    assert norms[3] == 0  # no direction, no NaN
    torch.testing.assert_close(torch.nn.functional.normalize(usae.W_dec), direction)
    by_site = usae.decoder_norms()
    assert by_site.shape == (3, 20)
    torch.testing.assert_close(by_site.square().sum(0).sqrt(), norms)
    assert by_site[:, 0].unique().numel() == 3  # a latent may write more into one site than into another


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_site_is_an_ordinary_sparse_autoencoder(kernel: str) -> None:
    usae = USAE({"m/a": 6}, 12, 2, kernel=kernel)
    torch.testing.assert_close(usae.W_dec.norm(dim=1), torch.ones(12))
    x = torch.randn(5, 6)
    z_pre = x @ usae.W_enc[0].T
    z = torch.relu(z_pre) * oracles.largest(z_pre, 2)
    torch.testing.assert_close(usae.decode(usae.encode(x, "m/a"), "m/a"), z @ usae.W_dec)


def test_a_code_made_by_hand_decodes_to_every_site() -> None:
    usae = random_usae("csr", torch.float32)
    codes = Codes(torch.tensor([[2.0]]), torch.tensor([[7]]))  # one latent, fewer than k
    for j, site in enumerate(DIMS):
        columns = usae.columns[site]
        expected = usae.mean[columns] + usae.scale[j] * (2 * usae.W_dec[7, columns] + usae.b_dec[columns])
        torch.testing.assert_close(usae.decode(codes, site)[0], expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows(kernel: str) -> None:
    usae = random_usae(kernel, torch.float32)
    codes = usae.encode(torch.zeros(0, 7), "vit/blocks.11")
    assert codes.values.shape == codes.indices.shape == (0, 3)
    assert usae.decode(codes, "dino/blocks.3@cls").shape == (0, 6)


def test_half_precision_rows_are_taken() -> None:
    usae = random_usae(dtype=torch.float32)
    x = torch.randn(4, 7).half()
    torch.testing.assert_close(usae.encode(x, "vit/blocks.11").values, usae.encode(x.float(), "vit/blocks.11").values)


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="k = 9 is not between 1 and n_latents = 8"):
        USAE({"m/a": 20}, 8, 9)
    with pytest.raises(ConfigError, match="k = 0 is not between"):
        USAE({"m/a": 20}, 8, 0)
    with pytest.raises(ConfigError, match="at least one site"):
        USAE({}, 8, 2)
    with pytest.raises(ConfigError, match="unknown kernel 'cuda'"):
        _ = USAE({"m/a": 20}, 8, 2, kernel="cuda").kernel
    with pytest.raises(SiteError, match=r"no site 'm/b' \(did you mean 'm/a'\? sites: m/a\)"):
        USAE({"m/a": 20}, 8, 2, normalisation={"m/b": (torch.zeros(20), 1.0)})
    with pytest.raises(SiteError, match=r"'m/a' has d_in = 20, given a mean of shape \[1\]"):
        USAE({"m/a": 20}, 8, 2, normalisation={"m/a": (torch.zeros(1), 1.0)})


def test_sites_that_are_not_there() -> None:
    usae = random_usae(dtype=torch.float32)
    codes = usae.encode(torch.randn(2, 7), "vit/blocks.11")
    for call in (
        lambda: usae.encode(torch.randn(2, 7), "vit/blocks.12"),
        lambda: usae.decode(codes, "vit/blocks.12"),
        lambda: usae.decoder("vit/blocks.12"),
    ):
        with pytest.raises(SiteError, match=r"no site 'vit/blocks.12' \(did you mean 'vit/blocks.11'.*sites: vit/"):
            call()
    with pytest.raises(SiteError, match=r"no site 'x' \(sites: vit/blocks.11, resnet/layer4@mean, dino/blocks.3@cls\)"):
        usae.site_index("x")


def test_rows_of_another_width_are_refused_not_broadcast() -> None:
    usae = random_usae(dtype=torch.float32)
    for width in (1, 5, 8):
        with pytest.raises(SiteError, match=rf"'vit/blocks.11' has d_in = 7, given rows of shape \[4, {width}\]"):
            usae.encode(torch.randn(4, width), "vit/blocks.11")


@pytest.mark.parametrize(("k", "warns"), [(4, False), (5, True), (6, True)])
def test_no_bottleneck_warns(k: int, warns: bool, recwarn: pytest.WarningsRecorder) -> None:
    USAE({"m/wide": 30, "n/narrow": 5}, 40, k)
    messages = [str(warning.message) for warning in recwarn if warning.category is UsaeProbeWarning]
    assert len(messages) == warns
    if warns:
        assert f"k = {k} active latents for rows of d_in = 5 ('n/narrow') is no bottleneck" in messages[0]


def test_repr_and_parameters() -> None:
    usae = USAE({"m/a": 4, "n/b": 6}, 16, 2)
    assert repr(usae) == "USAE(n_latents=16, k=2, sites: m/a [4], n/b [6])"
    assert sum(p.numel() for p in usae.parameters()) == 2 * 16 * 10 + 2 * 16 + 10
