"""The images that fire a latent most, against dense codes of the whole buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.errors import BufferIntegrityError, SiteError, UsageError
from usae_probe.probes import Exemplar, NaturalFires, exemplars, find_exemplars
from usae_probe.split import SPLITS
from usae_probe.usae import USAE, Codes

from . import oracles

DIMS = {"m/early": 5, "m/late": 6, "n/layer": 7}


def made(path: Path, n: int = 300, per_image: int = 1, **how: float) -> ActivationBuffer:
    rng = np.random.default_rng(n)
    rows = {site: rng.normal(size=(n, d)).astype(np.float32) for site, d in DIMS.items()}
    images = rng.permutation(n)[: n // per_image].repeat(per_image) + 1000
    return ActivationBuffer.from_arrays(
        rows, path, image_index=images, dtype="float32", shard_images=32, **({"holdout": 0.3, "validation": 0.2} | how)
    )


def expected(usae: USAE, buffer: ActivationBuffer, latent: int, site: str, n: int) -> NaturalFires:
    best: dict[int, Exemplar] = {}
    maximum = 0.0
    for split in SPLITS:
        rows = buffer.read(split)
        z = oracles.dense_codes(usae, rows.values)[site][:, latent]
        for image, value in zip(rows.image_index.tolist(), z.tolist(), strict=True):
            if value > 0 and (image not in best or best[image].value < value):
                best[image] = Exemplar(image, value, split)
            maximum = max(maximum, value) if split == "holdout" else maximum
    ranked = sorted(best.values(), key=lambda found: (-found.value, found.image))
    return NaturalFires(ranked[:n], maximum, len(set(buffer.read("holdout").image_index.tolist())))


def assert_same(found: NaturalFires, wanted: NaturalFires) -> None:
    assert [(e.image, e.split) for e in found.exemplars] == [(e.image, e.split) for e in wanted.exemplars]
    assert [e.value for e in found.exemplars] == pytest.approx([e.value for e in wanted.exemplars], rel=1e-4)
    assert found.held_out_maximum == pytest.approx(wanted.held_out_maximum, rel=1e-4)
    assert found.n_held_out == wanted.n_held_out


@pytest.mark.parametrize(("per_image", "chunk", "n"), [(1, 1024, 4), (1, 7, 3), (3, 1024, 4), (3, 8, 200)])
def test_dense_codes_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_image: int, chunk: int, n: int
) -> None:
    monkeypatch.setattr(exemplars, "CHUNK_ROWS", chunk)
    buffer = made(tmp_path / "acts", per_image=per_image)
    usae = USAE(DIMS, 12, 3, seed=1)
    latents = [5, 0, 11, 5]
    found = find_exemplars(usae, buffer, latents, sites=list(DIMS), n=n)
    assert list(found) == [5, 0, 11]
    for latent, by_site in found.items():
        assert list(by_site) == list(DIMS)
        for site, natural in by_site.items():
            assert_same(natural, expected(usae, buffer, latent, site, n))
    assert {exemplar.split for exemplar in found[5]["m/late"].exemplars} <= set(SPLITS)


def single(*values: float) -> dict[str, np.ndarray]:
    return {"m/a": np.array(values)[:, None]}


def planted() -> USAE:
    """Latent 0 of the one site is max(x, 0), latent 1 is max(−x, 0); k = 1."""
    usae = USAE({"m/a": 1, "n/b": 1}, 2, 1)
    with torch.no_grad():
        for encoder in usae.W_enc:
            encoder.copy_(torch.tensor([[1.0], [-1.0]]))
    return usae


@pytest.mark.filterwarnings("ignore:k = 1 active latents")
class TestByHand:
    def test_ties_go_by_number_and_silence_is_no_exemplar(self, tmp_path: Path) -> None:
        rows = single(3.0, -1.0, 5.0, 3.0, 0.0, 3.0)
        images = np.array([9, 8, 7, 6, 5, 4])
        buffer = ActivationBuffer.from_arrays(
            rows, tmp_path / "acts", image_index=images, holdout=0.0, validation=0.0, dtype="float32"
        )
        found = find_exemplars(planted(), buffer, [0, 1], sites=["m/a"], n=3)
        assert [e[:2] for e in found[0]["m/a"].exemplars] == [(7, 5.0), (4, 3.0), (6, 3.0)]
        assert found[1]["m/a"] == NaturalFires([Exemplar(8, 1.0, "train")], 0.0, 0)
        assert type(found[0]["m/a"].exemplars[0].image) is int

    def test_an_image_comes_once_with_its_best_row(self, tmp_path: Path) -> None:
        # image 0 has rows 2 and 6, image 1 has 5 and 4, image 2 has 1 and −3
        buffer = ActivationBuffer.from_arrays(
            single(2, 6, 5, 4, 1, -3), tmp_path / "acts", image_index=np.array([0, 0, 1, 1, 2, 2]), holdout=0.0,
            validation=0.0, dtype="float32",
        )  # fmt: skip
        found = find_exemplars(planted(), buffer, [0], sites=["m/a"], n=2)
        assert [e[:2] for e in found[0]["m/a"].exemplars] == [(0, 6.0), (1, 5.0)]

    def test_a_dropped_image_comes_back_with_a_better_row(self) -> None:
        best = exemplars._Best([0], 2, 1)
        for image, value in [(0, 5.0), (1, 1.0), (1, 9.0), (2, 7.0)]:  # image 1 does not get the one place at first
            codes = Codes(torch.tensor([[value]]), torch.tensor([[0]]))
            best.add(codes, np.array([image]), "train")
        assert best.natural(0, 0).exemplars == [Exemplar(1, 9.0, "train")]

    def test_the_held_out_maximum_is_of_held_out_images(self, tmp_path: Path) -> None:
        buffer = ActivationBuffer.from_arrays(
            single(*range(1, 41)), tmp_path / "acts", holdout=0.25, validation=0.25, dtype="float32"
        )
        natural = find_exemplars(planted(), buffer, [0], sites=["m/a"], n=40)[0]["m/a"]
        held_out = buffer.read("holdout").values["m/a"]
        assert natural.held_out_maximum == held_out.max()
        assert natural.n_held_out == 10
        assert [e.value for e in natural.exemplars] == [float(v) for v in range(40, 0, -1)]
        for exemplar in natural.exemplars:
            assert exemplar.image in buffer.read(exemplar.split).image_index


def test_sites_by_default_progress_and_no_latents(tmp_path: Path) -> None:
    buffer, usae = made(tmp_path / "acts"), USAE(DIMS, 12, 3)
    seen: list[tuple[int, int]] = []
    found = find_exemplars(usae, buffer, [2], progress=lambda done, total: seen.append((done, total)))
    assert list(found[2]) == ["m/late", "n/layer"]
    assert len(found[2]["m/late"].exemplars) == 4
    assert seen == [(168, 300), (210, 300), (300, 300)]  # train, validation, holdout
    assert find_exemplars(usae, buffer, []) == {}


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    best, usae = exemplars._Best([0, 1, 2], 12, 4), USAE(DIMS, 12, 3)
    for seed in range(5):
        x = torch.randn(500, 6, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            best.add(usae.encode(x, "m/late"), np.arange(500) + 500 * seed, "train")
        assert len(best.slot) == len(best.value) == len(best.image) == len(best.split) == 12


def test_what_cannot_be(tmp_path: Path) -> None:
    buffer, usae = made(tmp_path / "acts"), USAE(DIMS, 12, 3)
    for latent in (12, -1):
        with pytest.raises(UsageError, match=rf"there is no latent {latent} \(the USAE's latents are numbered 0 to 11"):
            find_exemplars(usae, buffer, [3, latent])
    with pytest.raises(SiteError, match=r"the USAE has no site 'm/lat'.*did you mean 'm/late'"):
        find_exemplars(usae, buffer, [3], sites=["m/lat"])
    with pytest.raises(UsageError, match="0 exemplars were asked for; n must be at least 1"):
        find_exemplars(usae, buffer, [3], n=0)
    with pytest.raises(BufferIntegrityError, match="trained on 'm/late' with d_in 3, the buffer has d_in 6"):
        find_exemplars(USAE({"m/late": 3}, 12, 2), buffer, [3])
