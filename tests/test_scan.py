"""What a scan measures: planted depth is found, every cell beside its null, and nothing is done twice."""

from __future__ import annotations

import csv
import io
import json
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import usae_probe.probes.scan.measure as measure_module
from usae_probe import USAE, ActivationBuffer, evaluate, train
from usae_probe.config import ProbesConfig, ScanConfig, TrainConfig, UsaeConfig
from usae_probe.errors import UsageError
from usae_probe.images import Annotation
from usae_probe.probes.linear import linear_reference
from usae_probe.probes.scan import CodeMatrices, ScanReport, ScanSettings, joint_length, scan_buffer, scan_codes
from usae_probe.probes.scan.cells import KeptCells, pairs_between
from usae_probe.probes.scan.report import rank_correlation
from usae_probe.probes.similarity import similarity

from .planted import deep_world

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ScanSettings(
    ScanConfig(strategies=["joint", "pairs"]),
    UsaeConfig(n_latents=64, k=6),
    TrainConfig(steps=120, batch_size=128, validate_every=0),
    ProbesConfig(nulls=3, bootstrap=40, min_fires=5),
)
LAYERS = (0, 1, 2)
MEASURES = ("r2", "linear", "cka", "mutual_knn", "universal", "closest", "phi")


def joint_usae(buffer: ActivationBuffer, steps: int = 120) -> USAE:
    how = joint_length(SETTINGS.train.model_copy(update={"steps": steps}), len(buffer.sites), SETTINGS.scan)
    return train(buffer, usae_config=SETTINGS.usae, train_config=how).usae


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    return ActivationBuffer.from_arrays(deep_world(0, n=1500), tmp_path_factory.mktemp("deep") / "acts", validation=0.2)


@pytest.fixture(scope="module")
def usae(buffer: ActivationBuffer) -> USAE:
    return joint_usae(buffer)


@pytest.fixture(scope="module")
def report(buffer: ActivationBuffer, usae: USAE) -> ScanReport:
    return scan_buffer(buffer, usae, SETTINGS)


def block(report: ScanReport, measure: str, codes: CodeMatrices | None = None) -> np.ndarray:
    """Values from left's layers (rows) to right's (columns)."""
    matrix = getattr(codes, measure) if codes else report.matrix(measure)
    assert matrix is not None
    return np.array([[matrix[f"left/{a}"][f"right/{b}"] for b in LAYERS] for a in LAYERS])


def wins(values: np.ndarray) -> float:
    """Share of columns in which the diagonal is above all other sources."""
    return float(np.mean([(values[j, j] > np.delete(values[:, j], j)).all() for j in range(len(values))]))


# --- planted depth ---


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_are_matched_in_depth(report: ScanReport, measure: str) -> None:
    values = block(report, measure)
    assert wins(values) == wins(values.T) == 1.0
    assert report.order[measure] == pytest.approx(1.0)
    assert values[0, 0] > values[0, 1] >= values[0, 2]


def test_each_two_measures_have_an_agreement(report: ScanReport) -> None:
    measured = [measure for measure in MEASURES if report.matrix(measure)]
    assert len(measured) > 2
    expected = [f"{one} and {other}" for one, other in combinations(measured, 2)]
    assert list(report.agreement)[: len(expected)] == expected


def test_joint_and_pairs_rank_the_cells_alike(report: ScanReport) -> None:
    assert report.joint
    assert report.pairs
    assert wins(block(report, "r2", report.pairs)) == 1.0
    agreement = {name: report.agreement[f"{name}: joint and pairs"] for name in ("r2", "universal")}
    assert agreement["r2"] is not None
    assert agreement["r2"] >= 0.8, agreement
    assert agreement["universal"] is not None
    assert agreement["universal"] >= 0.7, agreement  # of nine pairs of layers in so short trainings


def test_a_model_against_itself_and_against_noise(tmp_path: Path) -> None:
    rows = {site: x for site, x in deep_world(1, n=1500).items() if site.startswith("left")}
    again = {site.replace("left", "right"): x for site, x in rows.items()}
    buffer = ActivationBuffer.from_arrays(rows | again, tmp_path / "same", validation=0.2)
    settings = SETTINGS._replace(scan=ScanConfig())
    same = scan_buffer(buffer, joint_usae(buffer, 160), settings)
    for measure in MEASURES:
        if measure != "universal":  # a latent that all layers share counts in every cell
            assert wins(block(same, measure)) >= 0.9, measure
    draw = np.random.default_rng(0)
    noise = {site: draw.normal(size=x.shape).astype(np.float32) for site, x in again.items()}
    floor_buffer = ActivationBuffer.from_arrays(rows | noise, tmp_path / "noise", validation=0.2)
    floor = scan_buffer(floor_buffer, joint_usae(floor_buffer), settings)
    assert block(floor, "universal").max() <= 1 < np.diag(block(same, "universal")).min()
    assert np.abs(block(floor, "cka")).max() < 0.05 < block(same, "cka").max()


# --- the numbers are those of the plain measures ---


def test_cells_are_those_of_the_plain_measures(report: ScanReport, buffer: ActivationBuffer) -> None:
    sites, probes = list(buffer.sites), SETTINGS.probes
    alike = similarity(buffer, sites, split="validation", nulls=probes.nulls, seed=probes.seed)
    linear = linear_reference(buffer, sites, split="validation")
    assert report.similarity is not None
    assert report.linear is not None
    for a, b in permutations(sites, 2):
        for name in ("cka", "cka_null", "mutual_knn", "mutual_knn_null"):
            assert getattr(report.similarity, name)[a][b] == pytest.approx(getattr(alike, name)[a][b])
        if a.split("/")[0] != b.split("/")[0]:
            assert report.linear.r2[a][b] == pytest.approx(linear.r2[a][b], abs=1e-9)
        else:
            assert np.isnan(report.linear.r2[a][b])


def test_codes_are_those_of_an_evaluation(report: ScanReport, usae: USAE, buffer: ActivationBuffer) -> None:
    pair = ("left/1", "right/1")
    plain = evaluate(usae, buffer, split="validation", config=SETTINGS.probes.model_copy(update={"sites": list(pair)}))
    assert report.joint is not None
    for a, b in permutations(buffer.sites, 2):
        assert report.joint.r2[a][b] == pytest.approx(plain.r2[a][b])
        assert plain.r2_interval is not None
        ends = report.joint.r2_low[a][b], report.joint.r2_high[a][b]
        assert ends == pytest.approx(tuple(plain.r2_interval[a][b]))
    a, b = pair
    assert report.joint.universal[a][b] == plain.counts["universal"]
    assert report.joint.energy[a][b] == pytest.approx(plain.universal_energy[b])


def test_r2_of_images_paired_at_random_is_the_mean_over_pairings(usae: USAE, buffer: ActivationBuffer) -> None:
    pairs = [("left/0", "right/0")]
    found, _ = scan_codes(usae, buffer, pairs, split="validation", config=SETTINGS.probes, follow=False)
    rows = buffer.read("validation").values
    source, target = pairs[0]
    with torch.no_grad():
        x_hat = usae.decode(usae.encode(torch.from_numpy(rows[source]), source), target).double().numpy()
    x = rows[target].astype(np.float64)
    total = np.square(x - x.mean(0)).sum()
    draw = np.random.default_rng(0)
    shuffled = [1 - np.square(x - x_hat[draw.permutation(len(x))]).sum() / total for _ in range(400)]
    error = np.std(shuffled) / 20
    assert found.r2_null[source][target] == pytest.approx(np.mean(shuffled), abs=4 * error)
    assert found.r2_null[source][target] == pytest.approx(-np.square(x_hat - x.mean(0)).sum() / total, rel=1e-4)
    assert found.r2_null[source][target] < 0 < found.r2[source][target]


def test_a_null_worked_out_by_hand(tmp_path: Path) -> None:
    # x = ±1 in the one dimension that varies, and a USAE whose decoder says +1 to everything.
    rows = {"a/x": np.array([[1.0, 0.0], [-1.0, 0.0]] * 40, dtype=np.float32)}
    buffer = ActivationBuffer.from_arrays(rows | {"b/x": rows["a/x"]}, tmp_path, holdout=0.0, validation=0.5)
    usae = USAE({"a/x": 2, "b/x": 2}, n_latents=1, k=1)
    with torch.no_grad():
        usae.W_enc[0].zero_()
        usae.b_enc[0].fill_(1.0)
        usae.W_dec.copy_(torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    found, _ = scan_codes(usae, buffer, [("a/x", "b/x")], split="validation", config=SETTINGS.probes, follow=False)
    x = buffer.read("validation").values["b/x"][:, 0].astype(np.float64)
    mean, total = x.mean(), np.square(x - x.mean()).sum()
    assert found.r2_null["a/x"]["b/x"] == pytest.approx(-len(x) * (1 - mean) ** 2 / total)
    assert found.r2["a/x"]["b/x"] == pytest.approx(1 - np.square(x - 1).sum() / total)


def test_a_followed_latent_has_no_energy_where_nothing_fires(tmp_path: Path) -> None:
    x = np.array([[1.0, 0.0], [-1.0, 0.0]] * 200, dtype=np.float32)
    sites = ("a/x", "a/y", "b/x")
    buffer = ActivationBuffer.from_arrays(dict.fromkeys(sites, x), tmp_path, holdout=0.0, validation=0.5)
    usae = USAE(dict.fromkeys(sites, 2), n_latents=1, k=1)
    with torch.no_grad():
        for encoder, of_site, bias in zip(usae.W_enc, usae.b_enc, (0.0, -9.0, 0.0), strict=True):
            encoder.copy_(torch.tensor([[1.0, 0.0]]))
            of_site.fill_(bias)
        usae.W_dec.copy_(torch.tensor([[1.0, 0.0] * 3]))
    pairs = [("a/x", "b/x"), ("a/y", "b/x")]
    _, (one,) = scan_codes(usae, buffer, pairs, split="validation", config=SETTINGS.probes)
    assert one.energy == {"a/x": 1.0, "a/y": 0.0, "b/x": 1.0}
    assert one.rate["a/y"] == 0.0
    assert one.strength == 2.0


def test_nulls_of_counts_are_small(report: ScanReport) -> None:
    assert report.joint is not None
    null = np.array([[report.joint.universal_null[f"left/{a}"][f"right/{b}"] for b in LAYERS] for a in LAYERS])
    assert null.max() <= 1 < block(report, "universal").max()


def test_closest_shares_out_the_universal_latents(report: ScanReport) -> None:
    assert report.joint is not None
    for target in ("right/0", "right/2"):
        shares = [report.joint.closest[f"left/{a}"][target] for a in LAYERS]
        counts = [report.joint.universal[f"left/{a}"][target] for a in LAYERS]
        assert all(share <= count for share, count in zip(shares, counts, strict=True))
        assert 0 < sum(shares) <= SETTINGS.usae.n_latents


def test_followed_latents_fire_where_they_were_planted(report: ScanReport) -> None:
    assert report.followed
    strengths = [latent.strength for latent in report.followed]
    assert strengths == sorted(strengths, reverse=True)
    for latent in report.followed:
        assert abs(int(latent.best[0][-1]) - int(latent.best[1][-1])) <= 1  # they live at one depth in both models
        assert latent.phi >= SETTINGS.probes.phi
        assert set(latent.rate) == set(latent.phi_at) == set(report.sites)
        assert all(latent.phi_at[site] == pytest.approx(latent.phi) for site in latent.best)
        assert latent.follows == ""
        assert latent.auroc is None
    assert all(sum(latent.energy[site] for latent in report.followed) <= 1 + 1e-6 for site in report.sites)


def test_followed_latents_say_what_label_they_follow(report: ScanReport, usae: USAE, buffer: ActivationBuffer) -> None:
    first = report.followed[0]
    x, site = buffer.read("validation"), first.best[0]
    codes = usae.encode(torch.from_numpy(x.values[site]), site)
    values = np.zeros(1500, dtype=np.int64)
    values[x.image_index] = ((codes.indices == first.latent) & (codes.values > 0)).any(1).numpy()
    mark = Annotation("mark", values, ["no", "yes"])
    config = SETTINGS.probes.model_copy(update={"auroc": 0.6, "nulls": 0})
    cells = pairs_between(buffer.sites)
    _, followed = scan_codes(usae, buffer, cells, split="validation", config=config, annotations=[mark])
    assert followed[0].latent == first.latent
    assert followed[0].follows == "mark=yes"
    assert followed[0].auroc is not None
    assert followed[0].auroc >= 0.6


# --- one model, and three ---


def test_one_model_is_compared_with_itself() -> None:
    assert pairs_between(["a/1", "a/2", "a/3"]) == [("a/1", "a/2"), ("a/1", "a/3"), ("a/2", "a/3")]


def test_three_models(tmp_path: Path) -> None:
    rows = deep_world(2, n=600, layers=2)
    rows |= {"third/1": rows["right/1"][:, ::-1].copy()}
    buffer = ActivationBuffer.from_arrays(rows, tmp_path, validation=0.3)
    settings = SETTINGS._replace(scan=ScanConfig(), train=TrainConfig(steps=30, batch_size=128, validate_every=0))
    how = joint_length(settings.train, len(rows), settings.scan)
    found = scan_buffer(buffer, train(buffer, usae_config=settings.usae, train_config=how).usae, settings)
    assert len(found.cells) == 2 * 2 + 2 + 2
    assert {(row["target"].split("/")[0], row["model"]) for row in found.best_matches} == set(
        permutations(("left", "right", "third"), 2)
    )
    assert found.similarity is not None
    assert found.similarity.cka["right/1"]["third/1"] == pytest.approx(1.0)
    assert found.best_source("third/1", "right", "cka") == "right/1"
    assert len(found.to_csv().splitlines()) == 1 + 2 * len(found.cells)


def test_a_single_layer_is_no_scan(tmp_path: Path) -> None:
    buffer = ActivationBuffer.from_arrays({"a/x": np.random.default_rng(0).normal(size=(40, 4))}, tmp_path)
    with pytest.raises(UsageError, match="was given 1: a/x"):
        scan_buffer(buffer, None, SETTINGS)


# --- what is kept ---


def test_finished_cells_are_not_done_again(
    tmp_path: Path, buffer: ActivationBuffer, usae: USAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = SETTINGS._replace(train=TrainConfig(steps=4, batch_size=64, validate_every=0))
    trained: list[tuple[str, ...]] = []

    def spy(*args: Any, **more: Any) -> Any:
        trained.append(tuple(more["sites"]))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(*args, **more)

    monkeypatch.setattr(measure_module, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        scan_buffer(buffer, usae, short, folder=tmp_path)
    assert len(trained) == 4
    for name in ("linear_reference", "pair_similarities", "scan_codes"):
        monkeypatch.setattr(measure_module, name, _never if name != "scan_codes" else getattr(measure_module, name))
    monkeypatch.setattr(measure_module, "pair_similarities", lambda _, pairs, **__: iter(_none(pairs)))
    whole = scan_buffer(buffer, usae, short, folder=tmp_path)
    assert len(trained) == 4 + 9 - 3
    monkeypatch.setattr(measure_module, "train", _never)
    again = scan_buffer(buffer, usae, short, folder=tmp_path)
    fresh = {"seconds"}
    one, other = (json.loads(found.to_json()) for found in (whole, again))
    assert {k: v for k, v in one.items() if k not in fresh} == {k: v for k, v in other.items() if k not in fresh}
    assert not list(tmp_path.glob("pair-*")), "states of finished trainings are removed"


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it was done already")


def _none(pairs: Any) -> list[Any]:
    assert not pairs
    return []


def test_other_settings_are_measured_anew(tmp_path: Path, buffer: ActivationBuffer, usae: USAE) -> None:
    first = SETTINGS._replace(scan=ScanConfig())
    one = scan_buffer(buffer, usae, first, folder=tmp_path)
    strict = first._replace(probes=first.probes.model_copy(update={"phi": 0.9}))
    other = scan_buffer(buffer, usae, strict, folder=tmp_path)
    assert one.joint
    assert other.joint
    assert other.joint.universal["left/0"]["right/0"] < one.joint.universal["left/0"]["right/0"]
    assert one.similarity == other.similarity


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    kept = KeptCells(path)
    kept.put("x", ["a", "b"], {"s": 1}, [1.5, None])
    kept.put("x", ["a", "c"], {"s": 1}, [2.5])
    path.write_bytes(path.read_bytes()[:-20])
    again = KeptCells(path)
    assert again.get("x", ["a", "b"], {"s": 1}) == [1.5, None]
    assert again.get("x", ["a", "c"], {"s": 1}) is None
    again.put("x", ["a", "c"], {"s": 1}, [3.5])
    assert KeptCells(path).get("x", ["a", "c"], {"s": 1}) == [3.5]
    assert KeptCells(path).get("x", ["a", "b"], {"s": 2}) is None


def test_progress_reaches_its_end(buffer: ActivationBuffer, usae: USAE) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    scan_buffer(
        buffer,
        usae,
        SETTINGS._replace(scan=ScanConfig()),
        progress=lambda now: told.setdefault(now.part, []).append((now.done, now.total)),
    )
    assert set(told) == {"similarity", "linear", "codes"}
    for steps in told.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1]


# --- what is written ---


def test_json_and_csv_say_the_same(report: ScanReport) -> None:
    data = json.loads(report.to_json())
    assert data["schema"] == 1
    assert data["sites"] == list(report.sites)
    assert data["trained"]["steps"] == {"joint": 360, "pairs": 120}
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(rows) == 18
    for row in rows:
        a, b = row["source"], row["target"]
        assert float(row["r2"]) == pytest.approx(data["joint"]["r2"][a][b], rel=1e-5)
        assert float(row["pairs_r2"]) == pytest.approx(data["pairs"]["r2"][a][b], rel=1e-5)
        assert float(row["cka_null"]) == pytest.approx(data["similarity"]["cka_null"][a][b], rel=1e-5)
        assert float(row["linear"]) == pytest.approx(data["linear"]["r2"][a][b], rel=1e-5)
    latents = list(csv.DictReader(io.StringIO(report.latents_csv())))
    assert [int(row["latent"]) for row in latents] == [one["latent"] for one in data["followed"]]
    assert float(latents[0]["rate[left/0]"]) == pytest.approx(data["followed"][0]["rate"]["left/0"], rel=1e-5)


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0]) == pytest.approx(0.8)  # 1 − 6·2 / (4·15)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_the_joint_training_is_as_long_for_each_encoder() -> None:
    how = TrainConfig(steps=100)
    assert joint_length(how, 12, ScanConfig()).steps == 600
    assert joint_length(how, 12, ScanConfig(updates="steps")).steps == 100
    assert joint_length(how, 2, ScanConfig()).steps == 100
    assert joint_length(TrainConfig(epochs=3), 8, ScanConfig()).epochs == 12
    assert joint_length(TrainConfig(), 4, ScanConfig()).epochs == 200
