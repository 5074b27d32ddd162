"""R² on held-out rows with its intervals and its spread over dimensions, streaming, against dense float64 versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from usae_probe.probes.intervals import ImageGroups, Resamples
from usae_probe.probes.reconstruction import QUANTILES, HeldOutSums, share_of
from usae_probe.usae import USAE, Matrix, ReconstructionSums

from . import oracles
from .test_reconstruction import DIMS, made


def drawn(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows whose dimensions have spreads of their own, and a mean."""
    rng = np.random.default_rng(seed)
    return {
        site: (rng.normal(size=(n, d)) * rng.uniform(0.5, 2, d) * (1 + i) + i).astype(np.float32)
        for i, (site, d) in enumerate(DIMS.items())
    }


def streamed(usae: USAE, rows: dict[str, np.ndarray], group: np.ndarray, groups: int, chunk: int) -> HeldOutSums:
    sums = HeldOutSums(usae, groups)
    for start in range(0, len(group), chunk):
        part = slice(start, start + chunk)
        sums.add_rows({site: values[part] for site, values in rows.items()}, group[part])
    return sums


def reconstructed(usae: USAE, rows: dict[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """x̂ in raw units by source and target, from dense codes."""
    p, codes = oracles.Parameters.of(usae), oracles.dense_codes(usae, rows)
    return {
        (source, target): p.decode(torch.from_numpy(codes[source]), target).detach().numpy() * float(usae.scale[j])
        + usae.mean[usae.columns[target]].double().numpy()
        for source in DIMS
        for j, target in enumerate(DIMS)
    }


def assert_close(found: Matrix, expected: Matrix, tolerance: float) -> None:
    assert list(found) == list(expected)
    for source, row in expected.items():
        assert found[source] == pytest.approx(row, abs=tolerance), source


GROUPS = 12
GROUP = np.random.default_rng(5).integers(GROUPS, size=60).repeat(3)
"""Three rows of each of 60 images, images in twelve groups."""


@pytest.mark.parametrize("chunk", [9, 27, 180])
@pytest.mark.parametrize(("dtype", "kernel", "tolerance"), [
    (torch.float32, "csr", 1e-6), (torch.float32, "reference", 1e-6), (torch.float64, "reference", 1e-9),
])  # fmt: skip
def test_r2_for_any_chunk(chunk: int, dtype: torch.dtype, kernel: str, tolerance: float) -> None:
    usae, rows = made(dtype, kernel), drawn(180)
    sums = streamed(usae, rows, GROUP, GROUPS, chunk)
    assert sums.n_rows == 180
    assert_close(sums.r2(), oracles.r2(usae, rows), tolerance)
    assert_close(sums.r2_global_mean(), oracles.r2(usae, rows, about="scalar"), tolerance)


def test_codes_are_given_back_as_by_the_plain_sums() -> None:
    usae, rows = made(), drawn(9)
    found, plain = HeldOutSums(usae, 2).add_rows(rows, np.zeros(9, dtype=np.int64)), ReconstructionSums(usae).add(rows)
    for site in DIMS:
        assert found[site].values.equal(plain[site].values)
        assert found[site].indices.equal(plain[site].indices)


@pytest.mark.parametrize("chunk", [9, 27, 180])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_quantiles_over_dimensions(chunk: int, offset: float) -> None:
    usae = made(torch.float64, "reference")
    rows = {site: x.astype(np.float64) + offset for site, x in drawn(180).items()}
    found = streamed(usae, rows, GROUP, GROUPS, chunk).quantiles()
    for (source, target), x_hat in reconstructed(usae, rows).items():
        x = rows[target]
        sse, sst = ((x - x_hat) ** 2).sum(0), ((x - x.mean(0)) ** 2).sum(0)
        by_dimension = [1 - sse[d] / sst[d] for d in range(len(sse))]
        expected = [np.quantile(by_dimension, level) for level in (0.05, 0.25, 0.5, 0.75, 0.95)]
        tolerance = 1e-6 if offset else 1e-11
        assert found[source][target] == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert QUANTILES == (0.05, 0.25, 0.5, 0.75, 0.95)


def test_quantiles_by_hand() -> None:
    # one site, two dimensions, one latent that reads and writes the first: R²_1 = 1, and the second is predicted as 0
    # x = (2, 1), (4, 3): SSE_2 = 1 + 9 = 10, SST_2 = 1 + 1 = 2: R²_2 = −4; quantiles of (−4, 1): −4 + 5 · level
    usae = USAE({"m/a": 2}, 1, 1)
    with torch.no_grad():
        usae.W_enc[0].copy_(torch.tensor([[1.0, 0.0]]))
        usae.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
    sums = HeldOutSums(usae, 2)
    sums.add_rows({"m/a": np.array([[2, 1], [4, 3]], np.float32)}, np.array([0, 1]))
    assert sums.quantiles()["m/a"]["m/a"] == pytest.approx([-3.75, -2.75, -1.5, -0.25, 0.75])
    # R² of both: SSE 10, SST 2 + 2 = 4: −1.5. Group 0: SSE 1, SST about (3, 2): 1 + 1; group 1: SSE 9, SST 2
    assert sums.r2()["m/a"]["m/a"] == pytest.approx(-1.5)
    resamples = Resamples(2, 2, seed=0)
    resamples.weights = np.array([[2.0, 0.0], [0.0, 2.0]])  # 1 − 2/4 = .5 and 1 − 18/4 = −3.5
    assert sums.intervals(resamples)["m/a"]["m/a"] == pytest.approx((-3.5 + 0.1, 0.5 - 0.1))


def test_quantiles_do_not_depend_on_the_unit() -> None:
    found = []
    for unit in (1.0, 1e-4):
        normalisation = {site: (torch.zeros(d), unit) for site, d in DIMS.items()}
        usae = USAE(DIMS, 16, 2, normalisation=normalisation, kernel="reference").to(torch.float64)
        rows = {site: x.astype(np.float64) * unit for site, x in drawn(30).items()}
        found.append(streamed(usae, rows, np.arange(30) % GROUPS, GROUPS, 30).quantiles())
    for source, row in found[0].items():
        for target, values in row.items():
            assert found[1][source][target] == pytest.approx(values, rel=1e-4)


def test_dimensions_that_do_not_vary_are_left_out() -> None:
    usae, rows = made(), drawn(30)
    group = np.arange(30) % GROUPS
    before = streamed(usae, rows, group, GROUPS, 30).quantiles()
    rows["n/b"][:, 1:] = 2.0
    found = streamed(usae, rows, group, GROUPS, 30).quantiles()
    x_hat = reconstructed(usae, rows)["m/a", "n/b"][:, 0]
    x = rows["n/b"][:, 0].astype(np.float64)
    expected = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean()) ** 2).sum()
    assert found["m/a"]["n/b"] == pytest.approx([expected] * 5, abs=1e-5)
    assert found["m/a"]["m/a"] == before["m/a"]["m/a"]
    rows["n/b"][:] = 2.0
    nothing = streamed(usae, rows, group, GROUPS, 30)
    assert all(math.isnan(value) for value in nothing.quantiles()["o/c"]["n/b"])
    assert math.isnan(nothing.r2()["o/c"]["n/b"])
    low, high = nothing.intervals(Resamples(GROUPS, 20, 0))["o/c"]["n/b"]
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("chunk", [9, 27, 180])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_intervals_equal_a_loop_over_resampled_rows(chunk: int, offset: float) -> None:
    """Errors and spreads, about the mean of all rows, of the very rows of each resample."""
    usae = made(torch.float64, "reference")
    rows = {site: x.astype(np.float64) + offset for site, x in drawn(180).items()}
    resamples = Resamples(GROUPS, 30, seed=1)
    found = streamed(usae, rows, GROUP, GROUPS, chunk).intervals(resamples)
    of_group = [np.flatnonzero(g == GROUP) for g in range(GROUPS)]
    for (source, target), x_hat in reconstructed(usae, rows).items():
        x, values = rows[target], []
        mean = x.mean(0)
        for weights in resamples.weights.astype(int):
            chosen = np.concatenate([of_group[g] for g in range(GROUPS) for _ in range(weights[g])])
            values.append(1 - ((x - x_hat)[chosen] ** 2).sum() / ((x - mean)[chosen] ** 2).sum())
        expected = np.quantile(values, [0.025, 0.975])
        assert found[source][target] == pytest.approx(tuple(expected), rel=1e-6, abs=1e-6)


def test_intervals_are_about_the_estimate_and_shrink_with_the_images() -> None:
    usae, widths = made(), []
    for n in (100, 3000):
        rows, groups = drawn(n), ImageGroups(n, seed=0)
        sums = streamed(usae, rows, groups.of(np.arange(n)), groups.n, 1000)
        intervals, r2 = sums.intervals(Resamples(groups.n, 200, 0)), sums.r2()
        for source in DIMS:
            for target in DIMS:
                low, high = intervals[source][target]
                assert low < r2[source][target] < high
        widths.append(intervals["m/a"]["m/a"].high - intervals["m/a"]["m/a"].low)
    assert 2.5 < widths[0] / widths[1] < 12  # √30 = 5.5


def test_one_group_has_no_interval() -> None:
    sums = streamed(made(), drawn(6), np.zeros(6, dtype=np.int64), 1, 6)
    for row in sums.intervals(Resamples(1, 5, 0)).values():
        assert all(math.isnan(end) for ends in row.values() for end in ends)


def test_shares_of_a_reference() -> None:
    r2 = {"a": {"a": 0.9, "b": 0.3}, "b": {"a": -0.1, "b": 0.8}}
    reference = {"a": {"a": math.nan, "b": 0.6}, "b": {"a": 0.5, "b": 0.0}}
    found = share_of(r2, reference)
    assert found["a"]["b"] == pytest.approx(0.5)
    assert found["b"]["a"] == pytest.approx(-0.2)
    assert math.isnan(found["a"]["a"])
    assert math.isnan(found["b"]["b"])  # there is nothing to have a share of
