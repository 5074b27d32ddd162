"""What natural images do to latents, against dense float64 codes of the whole buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.errors import BufferIntegrityError, NoLatentsError, SiteError, UsageError
from usae_probe.probes import natural, natural_activations, rows
from usae_probe.probes.natural import PerImage, reduced
from usae_probe.split import SPLITS
from usae_probe.usae import USAE

from . import oracles

DIMS = {"m/early": 5, "m/late": 6, "n/layer": 7}
LATENTS = [5, 0, 11]

pytestmark = pytest.mark.usefixtures("one_thread")


def made(path: Path, n: int = 300, per_image: int = 1, **how: float) -> ActivationBuffer:
    rng = np.random.default_rng(n)
    values = {site: rng.normal(size=(n, d)).astype(np.float32) for site, d in DIMS.items()}
    images = rng.permutation(n)[: n // per_image].repeat(per_image) + 1000
    return ActivationBuffer.from_arrays(
        values,
        path,
        image_index=images,
        dtype="float32",
        shard_images=32,
        **({"holdout": 0.3, "validation": 0.2} | how),
    )


def a_usae(seed: int = 1) -> USAE:
    usae = USAE(DIMS, 12, 3, seed=seed)
    with torch.no_grad():
        for bias in (*usae.b_enc, usae.b_dec):
            bias.add_(0.3 * torch.randn(bias.shape))
    return usae


@pytest.mark.parametrize(("per_image", "chunk"), [(1, 1024), (1, 7), (3, 1024), (3, 8)])
@pytest.mark.parametrize("how", [None, "mean", "max"])
def test_dense_codes_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_image: int, chunk: int, how: PerImage
) -> None:
    monkeypatch.setattr(rows, "CHUNK_ROWS", chunk)
    buffer, usae = made(tmp_path / "acts", per_image=per_image), a_usae()
    found = natural_activations(usae, buffer, [5, 0, 11, 5], sites=list(DIMS), per_image=how)
    assert list(found.sites) == list(DIMS)
    parts = {split: buffer.read(split) for split in SPLITS}
    image = np.concatenate([part.image_index for part in parts.values()])
    assert np.array_equal(found.image, image)
    assert np.array_equal(found.split, np.repeat([0, 1, 2], [part.n for part in parts.values()]))
    double = usae.double()
    x_of = {site: np.concatenate([part.values[site] for part in parts.values()]).astype(np.float64) for site in DIMS}
    z_of = oracles.dense_codes(double, x_of)
    for site, of_site in found.sites.items():
        x, z = x_of[site], z_of[site]
        with torch.no_grad():
            z_pre = double.pre_activation(torch.from_numpy(x), site, range(12)).numpy()
        if how and per_image > 1:
            z_pre = np.stack([getattr(z_pre[image == each], how)(axis=0) for each in dict.fromkeys(image.tolist())])
        assert of_site.slots == {5: 0, 0: 1, 11: 2}
        np.testing.assert_allclose(of_site.z, z[:, LATENTS], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_site.activation, z_pre[:, LATENTS], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_site.mean, z_pre.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_site.sd, z_pre.std(axis=0), rtol=1e-4)
        np.testing.assert_allclose(of_site.rate, (z > 0).mean(axis=0), rtol=1e-6)
        expected = (2.0 - z_pre[:, 11].mean()) / z_pre[:, 11].std()
        assert of_site.score(11, 2.0) == pytest.approx(expected, rel=1e-4)
    assert found.n == (300 // per_image if how else 300)
    assert found.unit == ("images" if how or per_image == 1 else "rows")


def test_moments_keep_their_digits_far_from_zero(tmp_path: Path) -> None:
    buffer, usae = made(tmp_path / "acts"), a_usae()
    before = natural_activations(usae, buffer, [0], sites=["m/late"]).sites["m/late"]
    with torch.no_grad():
        usae.b_enc[1] += 3000.0
    after = natural_activations(usae, buffer, [0], sites=["m/late"]).sites["m/late"]
    np.testing.assert_allclose(after.sd, before.sd, rtol=1e-3)  # float32 of 3000: three digits after the point
    np.testing.assert_allclose(after.mean, before.mean + 3000, rtol=1e-6)


def test_strongest_of_each_image_by_hand() -> None:
    found = natural.NaturalActivations({}, np.array([7, 7, 3, 3, 3]), np.zeros(5, dtype=np.int8), None)
    assert found.begins.tolist() == [0, 2]
    assert found.images.tolist() == [7, 3]
    assert found.strongest(np.array([1.0, 4.0, 2.0, 0.0, 3.0])).tolist() == [4.0, 3.0]
    assert found.strongest(np.array([5.0, 6.0])).tolist() == [5.0, 6.0]


def test_rows_of_an_image_by_hand() -> None:
    z_pre = torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, -6.0]])
    begins = torch.tensor([0, 2])
    assert reduced(z_pre, begins, "mean").tolist() == [[2.0, -3.0], [5.0, -6.0]]
    assert reduced(z_pre, begins, "max").tolist() == [[3.0, -2.0], [5.0, -6.0]]


def test_a_latent_that_no_image_fires_is_dead(tmp_path: Path) -> None:
    buffer, usae = made(tmp_path / "acts"), a_usae()
    with torch.no_grad():
        for bias in usae.b_enc:
            bias[3] = -1e3
        usae.b_enc[0][4] = -1e3  # dead in one site only
    found = natural_activations(usae, buffer, [3, 4], sites=["m/early", "n/layer"])
    found.demand_live(4)
    with pytest.raises(NoLatentsError, match=r"latent 3 is dead: none of 300 images fires it in m/early, n/layer"):
        found.demand_live(3)


def test_one_site_per_model_progress_and_mistakes(tmp_path: Path) -> None:
    buffer, usae = made(tmp_path / "acts"), a_usae()
    calls: list[tuple[int, int]] = []
    assert list(natural_activations(usae, buffer, [1], progress=lambda *at: calls.append(at)).sites) == [
        "m/late",
        "n/layer",
    ]
    assert calls[-1] == (300, 300)
    with pytest.raises(UsageError, match="latent 12 is out of range"):
        natural_activations(usae, buffer, [3, 12])
    with pytest.raises(SiteError, match="no site 'm/lat'"):
        natural_activations(usae, buffer, [3], sites=["m/lat"])
    with pytest.raises(BufferIntegrityError, match="no such site"):
        natural_activations(USAE({**DIMS, "o/x": 4}, 12, 3), buffer, [3])
