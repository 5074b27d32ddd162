"""R² of every source and target against a float64 oracle, streaming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.usae import USAE, Matrix, ReconstructionSums

from . import oracles

DIMS = {"m/a": 6, "n/b": 4, "o/c": 5}


def made(dtype: torch.dtype = torch.float32, kernel: str = "auto", seed: int = 0) -> USAE:
    g = torch.Generator().manual_seed(seed)
    normalisation = {site: (torch.randn(d, generator=g), 0.5 + i) for i, (site, d) in enumerate(DIMS.items())}
    return USAE(DIMS, 16, 2, normalisation=normalisation, kernel=kernel, seed=seed).to(dtype)


def drawn(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        site: (rng.normal(size=(n, d)) * (1 + i) + i).astype(np.float32) for i, (site, d) in enumerate(DIMS.items())
    }


def streamed(usae: USAE, rows: dict[str, np.ndarray], chunk: int) -> ReconstructionSums:
    sums = ReconstructionSums(usae)
    for start in range(0, len(rows["m/a"]), chunk):
        sums.add({site: values[start : start + chunk] for site, values in rows.items()})
    return sums


def assert_close(found: Matrix, expected: Matrix, tolerance: float) -> None:
    assert list(found) == list(expected)
    for source, row in expected.items():
        assert found[source] == pytest.approx(row, abs=tolerance), source


@pytest.mark.parametrize("chunk", [1, 7, 64, 200, 1000])
@pytest.mark.parametrize(("dtype", "kernel", "tolerance"), [
    (torch.float32, "csr", 1e-5), (torch.float32, "reference", 1e-5), (torch.float64, "reference", 1e-9),
])  # fmt: skip
def test_every_cell_for_any_chunk(chunk: int, dtype: torch.dtype, kernel: str, tolerance: float) -> None:
    usae, rows = made(dtype, kernel), drawn(200)
    sums = streamed(usae, rows, chunk)
    assert sums.n_rows == 200
    assert_close(sums.r2(), oracles.r2(usae, rows), tolerance)
    assert_close(sums.r2_global_mean(), oracles.r2(usae, rows, about="scalar"), tolerance)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 40), chunk=st.integers(1, 45), seed=st.integers(0, 2**20))
def test_chunks_do_not_matter(n: int, chunk: int, seed: int) -> None:
    usae, rows = made(torch.float64, "reference", seed), drawn(n, seed)
    assert_close(streamed(usae, rows, chunk).r2(), streamed(usae, rows, n).r2(), 1e-9)


def test_codes_are_given_back() -> None:
    usae, rows = made(), drawn(9)
    codes = ReconstructionSums(usae).add(rows)
    for site, z in oracles.dense_codes(usae, rows).items():
        np.testing.assert_allclose(oracles.spread(codes[site], 16), z, atol=1e-5)
        alone = usae.encode(torch.from_numpy(rows[site]), site)
        assert codes[site].indices.sort(1).values.equal(alone.indices.sort(1).values)
        assert not codes[site].values.requires_grad


def test_by_hand() -> None:
    # one latent, one row per site: w_a = (1, 0), w_b = (0, 1); no normalisation
    # rows a: (2, 0), (4, 2): z_a = 2, 4: x̂_a = (2, 0), (4, 0): SSE_aa = 0 + 4 = 4
    #   mean_a = (3, 1): SST_a = (1 + 1) + (1 + 1) = 4: R²_aa = 1 − 4/4 = 0
    #   one scalar mean 2: SST = 0 + 4 + 4 + 0 = 8: r2_global_mean_aa = 1 − 4/8 = .5
    # rows b: (0, 2), (0, 5): x̂_b of z_a = (0, 2), (0, 4): SSE_ab = 0 + 1 = 1; SST_b = 2 · 1.5² = 4.5: R²_ab = 7/9
    # z_b = 2, 5: x̂_b exact: R²_bb = 1; x̂_a of z_b = (2, 0), (5, 0): SSE_ba = 0 + (1 + 4) = 5: R²_ba = −1/4
    usae = USAE({"m/a": 2, "n/b": 2}, 1, 1)
    with torch.no_grad():
        usae.W_enc[0].copy_(torch.tensor([[1.0, 0.0]]))
        usae.W_enc[1].copy_(torch.tensor([[0.0, 1.0]]))
        usae.W_dec.copy_(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    sums = ReconstructionSums(usae)
    sums.add({"m/a": np.array([[2, 0], [4, 2]], np.float32), "n/b": np.array([[0, 2], [0, 5]], np.float32)})
    assert sums.r2()["m/a"] == pytest.approx({"m/a": 0.0, "n/b": 7 / 9})
    assert sums.r2()["n/b"] == pytest.approx({"m/a": -0.25, "n/b": 1.0})
    assert sums.r2_global_mean()["m/a"]["m/a"] == pytest.approx(0.5)


def test_predicting_the_mean_of_each_dimension_scores_zero() -> None:
    rng = np.random.default_rng(0)
    rows = {"m/a": (rng.normal(size=(300, 6)) + 4 * rng.normal(size=6)).astype(np.float32)}
    mean = torch.from_numpy(rows["m/a"].astype(np.float64).mean(0))
    usae = USAE({"m/a": 6}, 8, 2, normalisation={"m/a": (mean, 1.0)})
    with torch.no_grad():
        usae.b_enc[0].fill_(-1e6)  # nothing fires: x̂ is the mean
    sums = ReconstructionSums(usae)
    sums.add(rows)
    assert sums.r2()["m/a"]["m/a"] == pytest.approx(0.0, abs=1e-6)
    assert sums.r2_global_mean()["m/a"]["m/a"] > 0.5  # which is why it is for comparison only


def test_large_means_do_not_cancel() -> None:
    rows = {site: values + np.float32(500) for site, values in drawn(400).items()}
    usae = made(torch.float64, "reference")
    assert_close(streamed(usae, rows, 64).r2(), oracles.r2(usae, rows), 1e-6)


def test_a_target_that_does_not_vary_is_nan() -> None:
    rows = drawn(20)
    rows["n/b"][:] = 3.3
    sums = streamed(made(), rows, 6)
    for row in sums.r2().values():
        assert math.isnan(row["n/b"])
        assert math.isfinite(row["m/a"])
    assert math.isnan(ReconstructionSums(made()).r2()["m/a"]["m/a"])  # and so is no row at all
