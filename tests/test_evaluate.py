"""Evaluation end to end on small buffers: what is read, what is measured, what is written."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import ProbesConfig
from usae_probe.errors import BufferIntegrityError, ConfigError, SiteError, UsageError
from usae_probe.images import Annotation
from usae_probe.probes import CATEGORIES, LatentRecord, UniversalityReport, evaluate, one_site_per_model
from usae_probe.probes.factors import FactorScores
from usae_probe.probes.intervals import ImageGroups, Resamples
from usae_probe.probes.linear import linear_reference
from usae_probe.probes.similarity import similarity
from usae_probe.probes.universality import Category
from usae_probe.usae import USAE, train

from . import oracles

DIMS = {"m/early": 7, "m/late": 9, "n/layer": 6}
CLASS_SITES = ("m/late", "n/layer")


def correlated(n: int = 900) -> dict[str, np.ndarray]:
    """Three views of the same sparse causes."""
    rng = np.random.default_rng(0)
    causes = rng.exponential(size=(n, 12)) * (rng.random((n, 12)) < 0.15)
    return {site: causes @ rng.normal(size=(12, d)) + 2 for site, d in DIMS.items()}


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    return ActivationBuffer.from_arrays(
        correlated(), tmp_path_factory.mktemp("evaluate") / "acts", dtype="float32", holdout=0.4, shard_images=128
    )


@pytest.fixture(scope="module")
def usae(buffer: ActivationBuffer) -> USAE:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # quicker than two on matrices as small as these
    trained = train(buffer, n_latents=24, k=4, steps=250, batch_size=64, lr=1e-2, validate_every=0).usae
    torch.set_num_threads(threads)
    return trained


@pytest.fixture(scope="module")
def report(usae: USAE, buffer: ActivationBuffer) -> UniversalityReport:
    return evaluate(usae, buffer)


def fired(usae: USAE, buffer: ActivationBuffer, tau: float = 0.0) -> dict[str, np.ndarray]:
    codes = oracles.dense_codes(usae, buffer.read("holdout").values)
    return {site: z > tau for site, z in codes.items()}


def test_r2_of_held_out_and_of_training_rows(usae: USAE, buffer: ActivationBuffer, report: UniversalityReport) -> None:
    held_out, training = buffer.read("holdout").values, buffer.read("train").values
    assert (report.n_rows_eval, report.n_rows_train) == (360, 486)
    for found, expected in (
        (report.r2, oracles.r2(usae, held_out)),
        (report.r2_train, oracles.r2(usae, training)),
        (report.r2_global_mean, oracles.r2(usae, held_out, about="scalar")),
    ):
        assert list(found) == list(DIMS)
        for source in DIMS:
            assert found[source] == pytest.approx(expected[source], abs=1e-5)
    assert report.r2["m/late"]["n/layer"] > 0.3  # it is no empty comparison


def test_no_row_of_validation_or_training_reaches_the_held_out_figures(
    usae: USAE, buffer: ActivationBuffer, report: UniversalityReport, tmp_path: Path
) -> None:
    rows = correlated()
    for split in ("train", "validation"):
        for values in rows.values():
            values[buffer.read(split).image_index] = 77.0
    other = evaluate(usae, ActivationBuffer.from_arrays(rows, tmp_path / "acts", dtype="float32", holdout=0.4))
    for source in DIMS:
        assert other.r2[source] == pytest.approx(report.r2[source])
    assert other.counts == report.counts
    assert other.r2_train != report.r2_train


def test_classes_are_those_of_the_oracle(usae: USAE, buffer: ActivationBuffer, report: UniversalityReport) -> None:
    dense = fired(usae, buffer)
    expected = oracles.categories({site: dense[site] for site in CLASS_SITES})
    assert [record.category for record in report.latents] == expected
    assert report.counts == {name: expected.count(name) for name in CATEGORIES}
    assert sum(report.counts.values()) == len(report.latents) == 24
    assert expected.count("universal") > 3


def test_every_record_against_dense_codes(usae: USAE, buffer: ActivationBuffer, report: UniversalityReport) -> None:
    codes = oracles.dense_codes(usae, buffer.read("holdout").values)
    norms = {site: usae.decoder(site).detach().double().norm(dim=1).numpy() for site in DIMS}
    for k, record in enumerate(report.latents):
        assert record.latent == k
        for site, z in codes.items():
            assert record.fires[site] == (z[:, k] > 0).sum()
            assert record.rate[site] == pytest.approx((z[:, k] > 0).mean())
            assert record.mean[site] == pytest.approx(z[:, k].mean(), abs=1e-6)
            assert record.maximum[site] == pytest.approx(z[:, k].max(), abs=1e-5)
            assert record.energy[site] == pytest.approx(z[:, k].mean() * norms[site][k], abs=1e-5)
            assert record.decoder_norm[site] == pytest.approx(norms[site][k] / sum(n[k] for n in norms.values()))
        assert sum(record.decoder_norm.values()) == pytest.approx(1.0)
        assert record.total_energy == pytest.approx(sum(record.energy.values()))
        assert list(record.pairs) == [CLASS_SITES]
        a, b = (codes[site][:, k] > 0 for site in CLASS_SITES)
        pair = record.pairs[CLASS_SITES]
        assert pair.cofires == (a & b).sum()
        assert pair.phi == pytest.approx(oracles.phi(a, b), abs=1e-9)
        assert pair.jaccard == pytest.approx(oracles.jaccard(a, b), abs=1e-9, nan_ok=True)
        expected = oracles.firing_entropy([int(a.sum()), int(b.sum())])
        assert record.entropy == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_energy_by_hand(tmp_path: Path) -> None:
    # every row is (2, 0) at a and (0, 3) at b; latent 0 reads (1, 0) at a, latent 1 reads (0, 1) at b
    # W_dec of latent 0: (3, 4) at a, (0, 1) at b: norms 5 and 1; of latent 1: (0, 0) at a, (1, 0) at b: 0 and 1
    # energies E|z| ‖W_dec‖: latent 0: a 2 · 5 = 10, b 0; latent 1: a 0, b 3 · 1 = 3
    usae = USAE({"m/a": 2, "n/b": 2}, 2, 1)
    with torch.no_grad():
        usae.W_enc[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        usae.W_enc[1].copy_(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
        usae.W_dec.copy_(torch.tensor([[3.0, 4.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]))
    rows = {"m/a": np.tile([2.0, 0.0], (200, 1)), "n/b": np.tile([0.0, 3.0], (200, 1))}
    report = evaluate(usae, ActivationBuffer.from_arrays(rows, tmp_path / "acts"))
    assert report.latents[0].energy == {"m/a": 10.0, "n/b": 0.0}
    assert report.latents[1].energy == {"m/a": 0.0, "n/b": 3.0}
    assert report.latents[0].decoder_norm == pytest.approx({"m/a": 5 / 6, "n/b": 1 / 6})
    assert [record.total_energy for record in report.latents] == [10.0, 3.0]
    assert [record.category for record in report.latents] == ["specific", "specific"]
    assert [record.fires_in for record in report.latents] == [("m/a",), ("n/b",)]
    # rows that do not vary have no R²: NaN here, null in the file, and never the text NaN
    assert all(math.isnan(value) for row in report.r2.values() for value in row.values())
    assert json.loads(report.to_json())["r2"] == {s: {"m/a": None, "n/b": None} for s in ("m/a", "n/b")}
    assert "NaN" not in report.to_json()


def test_universal_latents_come_by_energy(report: UniversalityReport) -> None:
    universal = report.universal
    assert {record.latent for record in universal} == {r.latent for r in report.latents if r.category == "universal"}
    energies = [record.total_energy for record in universal]
    assert energies == sorted(energies, reverse=True)
    assert len(energies) == report.counts["universal"]


def test_json(report: UniversalityReport) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content = json.loads(report.to_json(), parse_constant=refuse)
    assert content["schema"] == 1
    assert content["sites"] == list(DIMS)
    assert content["class_sites"] == list(CLASS_SITES)
    assert content["r2"] == report.r2
    assert content["r2_train"] == report.r2_train
    assert content["r2_global_mean"] == report.r2_global_mean
    assert list(content["counts"]) == list(CATEGORIES)
    assert sum(content["counts"].values()) == content["n_latents"] == 24
    assert (content["n_rows_train"], content["n_rows_eval"]) == (486, 360)
    assert "universal" in repr(report)


def test_csv(report: UniversalityReport) -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [int(row["latent"]) for row in rows] == list(range(24))
    by_site = [
        f"{name}[{site}]" for name in ("fires", "rate", "mean", "maximum", "energy", "decoder_norm") for site in DIMS
    ]
    of_pairs = "cofires share_a share_b jaccard lift phi phi_low phi_high correlation p phi_place p_place q"
    by_pair = [f"{name}[m/late|n/layer]" for name in of_pairs.split()]
    plain = ["latent", "category", "split", "positional", "fires_in", "entropy", "q", "total_energy"]
    labels = ["follows", *(f"{name}[{site}]" for name in ("auroc", "purity", "best") for site in CLASS_SITES)]
    assert list(rows[0]) == plain + by_site + by_pair + labels
    for row, record in zip(rows, report.latents, strict=True):
        assert row["category"] == record.category
        assert row["split"] == str(int(record.split))
        assert row["fires_in"].split() == list(record.fires_in)
        assert int(row["fires[m/late]"]) == record.fires["m/late"]
        assert float(row["energy[n/layer]"]) == pytest.approx(record.energy["n/layer"], rel=1e-5)
        assert float(row["phi[m/late|n/layer]"]) == pytest.approx(record.pairs[CLASS_SITES].phi, rel=1e-5, abs=1e-12)
        assert "nan" not in ",".join(row.values()).lower()
        assert (row["entropy"] == "") == math.isnan(record.entropy)
        assert [row[column] for column in labels] == [""] * 7  # nothing is known about these images


@pytest.fixture(scope="module")
def known(usae: USAE, buffer: ActivationBuffer, report: UniversalityReport) -> list[Annotation]:
    """Images are red that fire one universal latent in one of the models; noise tells nothing."""
    chosen = report.universal[0].latent
    rows = buffer.read("holdout")
    fires = oracles.dense_codes(usae, rows.values)["n/layer"][:, chosen] > 0
    hue = np.full(900, -1)  # nothing is known about the images of other splits
    hue[rows.image_index] = fires
    noise = np.random.default_rng(3).integers(0, 3, 900)
    return [Annotation("noise", noise, ["a", "b", "c"]), Annotation("hue", hue, ["grey", "red"])]


@pytest.fixture(scope="module")
def labelled(usae: USAE, buffer: ActivationBuffer, known: list[Annotation]) -> UniversalityReport:
    return evaluate(usae, buffer, annotations=known, auroc=0.7)


class TestFactors:
    def test_every_latent_against_pairs(
        self, usae: USAE, buffer: ActivationBuffer, known: list[Annotation], labelled: UniversalityReport
    ) -> None:
        rows = buffer.read("holdout")
        codes = oracles.dense_codes(usae, rows.values)
        for k in range(0, 24, 5):
            scores = {
                (one.name, name): {
                    site: oracles.auroc(codes[site][:, k], one.values[rows.image_index] == v) for site in CLASS_SITES
                }
                for one in known
                for v, name in enumerate(one.names)
            }
            follows = labelled.latents[k].follows
            assert follows is not None
            # float32 codes and float64 ones can order near-equal values otherwise
            assert follows.auroc == pytest.approx(scores[follows.factor, follows.value], abs=1e-3)
            assert min(follows.auroc.values()) >= max(min(s.values()) for s in scores.values()) - 1e-3

    def test_the_latent_that_was_planted(self, report: UniversalityReport, labelled: UniversalityReport) -> None:
        record = labelled.universal[0]
        assert record.latent == report.universal[0].latent
        assert record.follows is not None
        assert record.follows[:2] == ("hue", "red")
        assert record.follows.auroc["n/layer"] == 1.0
        assert list(record.follows.auroc) == list(CLASS_SITES)
        assert record in labelled.following

    def test_following(self, labelled: UniversalityReport) -> None:
        for record in labelled.latents:
            expected = len(record.fires_in) == 2 and record.follows and min(record.follows.auroc.values()) >= 0.7
            assert (record in labelled.following) == bool(expected)
        energies = [record.total_energy for record in labelled.following]
        assert energies == sorted(energies, reverse=True)

    def test_files(self, labelled: UniversalityReport) -> None:
        content = json.loads(labelled.to_json())
        assert content["factors"] == {
            "names": ["noise", "hue"],
            "n_values": 5,
            "auroc": 0.7,
            "n_following": len(labelled.following),
        }
        first = content["top_latents"][0]["follows"]
        assert (first["factor"], first["value"], first["auroc"]["n/layer"]) == ("hue", "red", 1.0)
        rows = list(csv.DictReader(io.StringIO(labelled.to_csv())))
        row, record = rows[labelled.universal[0].latent], labelled.universal[0]
        assert row["follows"] == "hue=red"
        assert float(row["auroc[m/late]"]) == pytest.approx(record.follows.auroc["m/late"], rel=1e-5)

    def test_what_labels_say_of_all_latents(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        known: list[Annotation],
        report: UniversalityReport,
        labelled: UniversalityReport,
    ) -> None:
        rows = buffer.read("holdout")
        scores = FactorScores(CLASS_SITES, usae.n_latents, known)
        codes = {site: usae.encode(torch.from_numpy(rows.values[site]), site) for site in CLASS_SITES}
        scores.add(codes, rows.image_index)
        universal = [record.latent for record in labelled.universal]
        assert report.labels is None
        assert labelled.labels is not None
        bound, permutations, *agreement = labelled.labels
        assert agreement == pytest.approx(list(scores.agreement(universal)), nan_ok=True)
        assert permutations == ProbesConfig().nulls
        assert bound == pytest.approx(scores.bound(permutations), abs=1e-9)

    def test_nothing_else_changes(self, report: UniversalityReport, labelled: UniversalityReport) -> None:
        without = [replace(record, follows=None) for record in labelled.latents]
        assert repr(without) == repr(report.latents)  # NaN equals no NaN, but is spelt like it
        assert report.to_dict()["factors"] is None
        assert report.following == []
        assert {record.follows for record in report.latents} == {None}

    def test_annotations_of_other_images(self, usae: USAE, buffer: ActivationBuffer) -> None:
        short = Annotation("hue", np.zeros(500, dtype=np.int64), ["red"])
        with pytest.raises(UsageError, match=r"annotation 'hue' has 500 values, none for image \d+ \(give the annot"):
            evaluate(usae, buffer, annotations=[short])


class TestSummaries:
    def test_top_latents(self, report: UniversalityReport) -> None:
        top = report.to_dict()["top_latents"]
        partial = sorted(
            (record for record in report.latents if record.category == "partial"), key=lambda r: -r.total_energy
        )
        expected = (report.universal + partial)[:10]
        assert [entry["latent"] for entry in top] == [record.latent for record in expected]
        for entry, record in zip(top, expected, strict=True):
            names = ["latent", "category", "rate", "entropy", "phi", "correlation", "total_energy", "follows"]
            assert list(entry) == names
            assert entry["correlation"] == record.pairs[CLASS_SITES].correlation
            assert entry["category"] == record.category
            assert entry["rate"] == {site: record.rate[site] for site in CLASS_SITES}
            assert (entry["entropy"], entry["total_energy"]) == (record.entropy, record.total_energy)
            assert entry["phi"] == record.pairs[CLASS_SITES].phi
            assert entry["follows"] is None

    def test_universal_come_before_partial_and_ten_are_enough(self, report: UniversalityReport) -> None:
        base = report.universal[0]

        def made(latent: int, category: Category, energy: float) -> LatentRecord:
            return replace(base, latent=latent, category=category, energy=dict.fromkeys(DIMS, energy))

        records = [made(i, "partial" if i % 2 else "universal", float(i)) for i in range(16)]
        top = replace(report, latents=[*records, made(16, "chance", 99.0)]).to_dict()["top_latents"]
        assert [entry["latent"] for entry in top] == [14, 12, 10, 8, 6, 4, 2, 0, 15, 13]

    def test_the_smallest_phi_of_three_pairs(self, report: UniversalityReport) -> None:
        record = report.universal[0]
        pair = record.pairs[CLASS_SITES]
        three = {("a", "b"): pair._replace(phi=0.7), ("a", "c"): pair._replace(phi=0.3), ("b", "c"): pair}
        assert replace(record, pairs=three).phi == min(0.3, pair.phi)
        assert math.isnan(replace(record, pairs={}).phi)
        assert replace(record, pairs={}, entropy=math.nan).to_dict(CLASS_SITES)["phi"] is None

    def test_entropy_histogram_by_hand(self, report: UniversalityReport) -> None:
        base = report.latents[0]
        # .3 begins the bin [.3, .4); 1, and 1 by a rounding error more, end the last; NaN, rare and dead count nowhere
        given: list[tuple[Category, float]] = [
            ("universal", 1.0), ("universal", 0.95), ("universal", 1.0 + 2e-16), ("partial", 1.0), ("chance", 0.3),
            ("specific", 0.0), ("specific", 0.0999), ("specific", math.nan), ("rare", 0.5), ("dead", math.nan),
        ]  # fmt: skip
        latents = [replace(base, category=category, entropy=entropy) for category, entropy in given]
        assert replace(report, latents=latents).to_dict()["entropy_histogram"] == {
            "edges": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            "universal": [0, 0, 0, 0, 0, 0, 0, 0, 0, 3],
            "others": [2, 0, 0, 1, 0, 0, 0, 0, 0, 1],
        }

    def test_entropy_histogram_counts_all_that_fire(self, report: UniversalityReport) -> None:
        bins = report.to_dict()["entropy_histogram"]
        assert sum(bins["universal"]) == report.counts["universal"]
        assert sum(bins["others"]) == sum(report.counts[name] for name in ("partial", "chance", "specific"))


class TestClassSites:
    def test_the_last_listed_of_each_model(self) -> None:
        assert one_site_per_model(("m/early", "n/layer", "m/late")) == ("m/late", "n/layer")
        assert one_site_per_model(("m/a",)) == ("m/a",)

    def test_others_may_be_asked_for(self, usae: USAE, buffer: ActivationBuffer) -> None:
        report = evaluate(usae, buffer, sites=["n/layer", "m/early"])
        assert report.class_sites == ("n/layer", "m/early")
        dense = fired(usae, buffer)
        expected = oracles.categories({site: dense[site] for site in ("n/layer", "m/early")})
        assert [record.category for record in report.latents] == expected
        assert list(report.latents[0].pairs) == [("n/layer", "m/early")]
        assert list(report.r2) == list(DIMS)  # reconstruction is about all sites
        assert set(report.latents[0].fires) == set(DIMS)

    def test_that_cannot_be(self, usae: USAE, buffer: ActivationBuffer) -> None:
        with pytest.raises(
            SiteError, match=r"names 'm/lat', which is not trained on \(did you mean 'm/late'.*sites: m/"
        ):
            evaluate(usae, buffer, sites=["m/lat"])
        with pytest.raises(SiteError, match="names model 'm' twice: m/early, m/late"):
            evaluate(usae, buffer, sites=["m/early", "m/late"])
        with pytest.raises(SiteError, match=r"probes.sites is empty \(leave it out, or choose from: m/early, m/late"):
            evaluate(usae, buffer, sites=[])


class TestSettings:
    def test_thresholds_by_name_or_config(
        self, usae: USAE, buffer: ActivationBuffer, report: UniversalityReport
    ) -> None:
        strict = evaluate(usae, buffer, phi=1.0)
        assert strict.counts["universal"] < report.counts["universal"]
        assert evaluate(usae, buffer, config=ProbesConfig(phi=1.0)).counts == strict.counts
        assert evaluate(usae, buffer, config=ProbesConfig(phi=1.0), phi=0.2).counts == report.counts

    def test_tau(self, usae: USAE, buffer: ActivationBuffer) -> None:
        found = evaluate(usae, buffer, tau=0.5)
        dense = fired(usae, buffer, 0.5)
        assert [r.fires["m/late"] for r in found.latents] == dense["m/late"].sum(0).tolist()

    def test_fewer_training_rows_are_spread_over_all(self, usae: USAE, buffer: ActivationBuffer) -> None:
        found = evaluate(usae, buffer, train_rows=54)
        assert found.n_rows_train == 54
        every_ninth = {site: values[::9] for site, values in buffer.read("train").values.items()}
        assert found.r2_train["m/late"] == pytest.approx(oracles.r2(usae, every_ninth)["m/late"], abs=1e-5)

    def test_unknown(self, usae: USAE, buffer: ActivationBuffer) -> None:
        with pytest.raises(ConfigError, match=r"unknown setting 'phy' \(did you mean 'phi'"):
            evaluate(usae, buffer, phy=0.3)

    def test_progress(self, usae: USAE, buffer: ActivationBuffer) -> None:
        seen: list[tuple[int, int]] = []
        evaluate(usae, buffer, progress=lambda done, total: seen.append((done, total)))
        # held-out rows, training rows, and both once more for each of three sources of the linear reference
        assert seen[:2] == [(360, 846 * 4), (846, 846 * 4)]
        assert seen[-1] == (846 * 4, 846 * 4)
        assert seen == sorted(seen)


def test_one_site_alone(buffer: ActivationBuffer) -> None:
    single = train(buffer, sites=["n/layer"], n_latents=24, k=3, steps=5).usae
    report = evaluate(single, buffer)
    assert list(report.r2) == ["n/layer"]
    assert {record.category for record in report.latents} <= {"specific", "rare", "dead"}
    assert report.universal == []
    assert report.latents[0].pairs == {}
    assert report.to_dict()["entropy_histogram"]["others"] == [0] * 10
    assert "NaN" not in report.to_json()
    assert len(report.to_csv().splitlines()) == 25


def test_split_latents_are_marked_and_counted(buffer: ActivationBuffer) -> None:
    # latents 0 and 1 fire for one model each and write the same; all the others never fire
    usae = USAE({"m/late": 9, "n/layer": 6}, 4, 1)
    with torch.no_grad():
        for encoder, bias, own in zip(usae.W_enc, usae.b_enc, (0, 1), strict=True):
            encoder.zero_()
            bias.fill_(-1.0)
            bias[own] = 1.0
        usae.W_dec[1] = usae.W_dec[0]
    report = evaluate(usae, buffer)
    assert [record.category for record in report.latents] == ["specific", "specific", "dead", "dead"]
    assert [record.split for record in report.latents] == [True, True, False, False]
    assert report.n_split == report.to_dict()["n_split"] == 2


class TestBuffersThatDoNotServe:
    def test_missing_site_or_other_width(self, usae: USAE, tmp_path: Path) -> None:
        rows = correlated(60)
        other = ActivationBuffer.from_arrays({site: rows[site] for site in ("m/early", "n/layer")}, tmp_path / "a")
        with pytest.raises(BufferIntegrityError, match="trained on 'm/late' with d_in 9, the buffer has no such site"):
            evaluate(usae, other)
        wider = rows | {"m/late": np.ones((60, 10))}
        with pytest.raises(BufferIntegrityError, match="trained on 'm/late' with d_in 9, the buffer has d_in 10"):
            evaluate(usae, ActivationBuffer.from_arrays(wider, tmp_path / "b"))

    @pytest.mark.parametrize(("n", "holdout"), [(60, 0.0), (5, 0.1)])
    def test_no_held_out_rows(self, usae: USAE, tmp_path: Path, n: int, holdout: float) -> None:
        buffer = ActivationBuffer.from_arrays(correlated(n), tmp_path / "acts", holdout=holdout)
        with pytest.raises(BufferIntegrityError, match=r"has [01] held-out rows, .* at least 2 \(set images.holdout"):
            evaluate(usae, buffer)


IMAGE_OF = {"equal": np.arange(900) // 4, "varying": np.repeat(np.arange(300), np.tile([1, 5, 3], 100))}
"""The same 900 rows as four of each of 225 images, or as one, five and three of 300."""


class TestSeveralRowsPerImage:
    def made(self, tmp_path: Path, kind: str) -> ActivationBuffer:
        return ActivationBuffer.from_arrays(
            correlated(), tmp_path / "acts", image_index=IMAGE_OF[kind], dtype="float32", holdout=0.4
        )

    @pytest.mark.parametrize("kind", ["equal", "varying"])
    def test_rows_images_and_one_drawn_row(self, usae: USAE, tmp_path: Path, kind: str) -> None:
        buffer = self.made(tmp_path, kind)
        rows = buffer.read("holdout")
        found = evaluate(usae, buffer, seed=5)
        assert found.n_rows_eval == rows.n
        assert found.r2["m/late"] == pytest.approx(oracles.r2(usae, rows.values)["m/late"], abs=1e-5)
        images, begins, counts = np.unique(rows.image_index, return_index=True, return_counts=True)
        order = np.argsort(begins)  # images as they are stored
        begins, counts = begins[order], counts[order]
        drawn = begins + (np.random.default_rng(5).random(len(images)) * counts).astype(int)
        fires = fired(usae, buffer)
        (a, b), tested = CLASS_SITES, 0
        for k, record in enumerate(found.latents):
            x, y = fires[a][:, k], fires[b][:, k]
            pair = record.pairs[CLASS_SITES]
            assert (record.fires[a], record.fires[b]) == (x.sum(), y.sum())
            assert record.rate[a] == pytest.approx(x.mean())
            assert pair.cofires == (x & y).sum()
            assert pair.phi == pytest.approx(oracles.phi(x, y), abs=1e-9)
            assert pair.jaccard == pytest.approx(oracles.jaccard(x, y), abs=1e-9, nan_ok=True)
            p = oracles.chance_p(x[drawn].sum(), y[drawn].sum(), (x & y)[drawn].sum(), len(images))
            assert pair.p == pytest.approx(p, rel=1e-9)
            tested += 0 < p < 1
            of = {site: np.add.reduceat(fires[site][:, k], begins) for site in CLASS_SITES}
            rate = {site: fires[site][:, k].sum() for site in CLASS_SITES}
            expected = [s for s in CLASS_SITES if (of[s] > 0).sum() >= 10 and rate[s] >= 0.1 * max(rate.values())]
            assert list(record.fires_in) == expected
        assert tested > 10

    @pytest.mark.parametrize("kind", ["equal", "varying"])
    def test_chunks_do_not_matter(self, usae: USAE, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = self.made(tmp_path, kind)
        known = [Annotation("x", np.arange(900) % 3, ["a", "b", "c"])]
        reports = []
        for size in (1024, 7):  # the package's attribute of that name is the function
            monkeypatch.setattr(importlib.import_module("usae_probe.probes.rows"), "CHUNK_ROWS", size)
            reports.append(evaluate(usae, buffer, annotations=known, linear=False, nulls=3))
        assert reports[0].counts == reports[1].counts
        for one, same in zip(reports[0].latents, reports[1].latents, strict=True):
            assert (one.fires, one.fires_in) == (same.fires, same.fires_in)
            np.testing.assert_allclose(one.pairs[CLASS_SITES], same.pairs[CLASS_SITES], rtol=1e-5, atol=1e-6)
            assert (one.follows is None) == (same.follows is None)
            if one.follows and same.follows:
                # products of other shapes round otherwise, which may exchange two nearly equal activations: of a value
                # that 14 images have against 17 others that is .004
                assert one.follows.auroc == pytest.approx(same.follows.auroc, abs=1e-2)

    def test_another_seed_draws_other_rows(self, usae: USAE, tmp_path: Path) -> None:
        buffer = self.made(tmp_path, "equal")
        first, again, other = (evaluate(usae, buffer, seed=seed) for seed in (0, 0, 1))
        assert first.to_csv() == again.to_csv()
        p = [[record.pairs[CLASS_SITES].p for record in report.latents] for report in (first, other)]
        assert p[0] != p[1]
        assert [r.pairs[CLASS_SITES].phi for r in first.latents] == [r.pairs[CLASS_SITES].phi for r in other.latents]

    def test_the_seed_is_of_no_account_with_one_row_per_image(
        self, usae: USAE, buffer: ActivationBuffer, report: UniversalityReport
    ) -> None:
        first, other = (evaluate(usae, buffer, seed=seed, bootstrap=0) for seed in (0, 9))
        assert first.to_csv() == other.to_csv()
        assert first.counts == report.counts


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


class TestWhatStandsBesideIt:
    """Intervals, the linear reference, similarity, nulls, and the table of pairs."""

    def test_keys(self, report: UniversalityReport) -> None:
        content = json.loads(report.to_json(), parse_constant=refuse)
        assert content["measured_on"] == "holdout"
        assert content["thresholds"] == {"entropy": 0.9, "phi": 0.2, "q": 0.01}
        assert content["n_live"] == 24 - content["counts"]["rare"] - content["counts"]["dead"] == report.n_live
        live = [record for record in report.latents if record.category not in ("rare", "dead")]
        assert content["n_equal_rates"] == sum(record.entropy >= 0.9 for record in live) == report.n_equal_rates
        assert content["n_equal_rates"] >= content["counts"]["universal"]
        assert content["n_positional"] == 0
        assert content["labels"] is None
        assert content["fidelity"] is None
        assert set(content["r2_interval"]) == set(DIMS)
        assert set(content["r2_quantiles"]) == {"levels", *DIMS}

    def test_every_matrix_has_a_number_or_null_for_every_pair(self, report: UniversalityReport) -> None:
        content = report.to_dict()
        of = content["similarity"]
        alike = [of[name] for name in ("cka", "cka_null", "mutual_knn", "mutual_knn_null")]
        names = ("r2", "r2_train", "r2_global_mean", "r2_interval", "r2_ridge", "r2_share")
        for matrix in (*(content[name] for name in names), *alike):
            assert list(matrix) == list(DIMS)
            assert all(list(row) == list(DIMS) for row in matrix.values())
        for source in DIMS:
            for target in DIMS:
                ridge, share = content["r2_ridge"][source][target], content["r2_share"][source][target]
                if source == target:
                    assert (ridge, share) == (None, None)
                    continue
                assert share == pytest.approx(content["r2"][source][target] / ridge)
        assert content["r2_ridge"]["m/late"]["n/layer"] > 0.3

    def test_intervals_and_quantiles_are_about_the_figures(self, report: UniversalityReport) -> None:
        assert report.r2_interval is not None
        assert report.r2_quantiles is not None
        for source in DIMS:
            for target in DIMS:
                low, high = report.r2_interval[source][target]
                assert low < report.r2[source][target] < high < low + 0.5
                levels = report.r2_quantiles[source][target]
                assert levels == sorted(levels)
                assert len(levels) == 5
        for record in report.latents:
            pair = record.pairs[CLASS_SITES]
            assert pair.phi_low <= pair.phi + 1e-9
            assert pair.phi_high >= pair.phi - 1e-9
        widths = [r.pairs[CLASS_SITES].phi_high - r.pairs[CLASS_SITES].phi_low for r in report.universal]
        assert 0.01 < np.mean(widths) < 0.4

    def test_intervals_are_of_resampled_images(self, usae: USAE, buffer: ActivationBuffer) -> None:
        """360 images in 256 groups, by the same draws: the interval of one latent's φ and of one R², by loops."""
        found = evaluate(usae, buffer, bootstrap=40, seed=3)
        rows = buffer.read("holdout")
        groups = ImageGroups(360, 3)
        group, weights = groups.of(rows.image_index), Resamples(groups.n, 40, 3).weights.astype(int)
        fires, record = fired(usae, buffer), found.universal[0]
        a, b = (fires[site][:, record.latent] for site in CLASS_SITES)
        chosen = [np.repeat(np.arange(360), w[group]) for w in weights]
        phi = [oracles.phi(a[rows], b[rows]) for rows in chosen]
        pair = record.pairs[CLASS_SITES]
        assert (pair.phi_low, pair.phi_high) == pytest.approx(tuple(np.quantile(phi, [0.025, 0.975])), abs=1e-9)

    def test_the_seed_alone_draws_the_intervals(self, usae: USAE, buffer: ActivationBuffer) -> None:
        cheap = {"bootstrap": 30, "nulls": 0, "linear": False, "similarity_images": 0}
        one, same, other = (evaluate(usae, buffer, seed=seed, **cheap) for seed in (0, 0, 1))
        assert one.to_json() == same.to_json()
        assert one.to_csv() == same.to_csv()
        assert one.r2_interval != other.r2_interval
        assert one.r2 == other.r2

    def test_what_stands_beside_it_goes_by_the_settings(self, usae: USAE, buffer: ActivationBuffer) -> None:
        found = evaluate(
            usae, buffer, split="validation", seed=3, nulls=4, neighbours=5, similarity_images=40, train_rows=60,
            bootstrap=0,
        )  # fmt: skip
        alike = similarity(buffer, usae.sites, split="validation", n_images=40, k=5, nulls=4, seed=3)
        assert str(found.similarity) == str(alike)  # NaN is not equal to itself
        linear = linear_reference(buffer, usae.sites, split="validation", train_rows=60, seed=3)
        assert str(found.linear) == str(linear)

    def test_no_resamples(self, usae: USAE, buffer: ActivationBuffer, report: UniversalityReport) -> None:
        found = evaluate(usae, buffer, bootstrap=0)
        assert found.r2_interval is None
        assert found.to_dict()["r2_interval"] is None
        assert found.counts == report.counts
        for record in found.latents:
            assert math.isnan(record.pairs[CLASS_SITES].phi_low)
            assert math.isnan(record.pairs[CLASS_SITES].phi_high)
        row = next(csv.DictReader(io.StringIO(found.to_csv())))
        assert row["phi_low[m/late|n/layer]"] == row["phi_high[m/late|n/layer]"] == ""
        json.loads(found.to_json(), parse_constant=refuse)

    def test_nothing_beside_it(self, usae: USAE, buffer: ActivationBuffer, report: UniversalityReport) -> None:
        found = evaluate(usae, buffer, nulls=0, linear=False, similarity_images=0)
        content = json.loads(found.to_json(), parse_constant=refuse)
        assert content["nulls"] == []
        assert (content["r2_ridge"], content["r2_share"], content["similarity"]) == (None, None, None)
        for row in content["platonic"]:
            assert [row[name] for name in ("cka", "cka_null", "mutual_knn", "mutual_knn_null", "r2_ridge")] == [
                None
            ] * 5
            assert row["r2"] == found.r2[row["source"]][row["target"]]
        assert found.counts == report.counts

    def test_nulls(self, report: UniversalityReport) -> None:
        assert report.counts["universal"] > 3
        (null,) = report.nulls
        assert (null.within, null.n_rows, null.n_images) == ("", 360, 360)
        assert len(null.counts["universal"]) == 20
        assert all(sum(numbers) == 24 for numbers in zip(*null.counts.values(), strict=True))
        assert sum(number > 0 for number in null.counts["universal"]) <= 1
        # an image's fires are exchanged as a whole: what never or hardly fires does not change
        for name in ("rare", "dead"):
            assert set(null.counts[name]) == {report.counts[name]}
        assert report.to_dict()["nulls"][0]["n"] == 20

    def test_nulls_within_a_label(self, usae: USAE, buffer: ActivationBuffer, known: list[Annotation]) -> None:
        cheap = {"bootstrap": 0, "linear": False, "similarity_images": 0, "annotations": known, "nulls": 3}
        first = evaluate(usae, buffer, **cheap)
        assert [null.within for null in first.nulls] == ["", "noise"]  # the first there is
        other = evaluate(usae, buffer, within="hue", **cheap)
        assert [null.within for null in other.nulls] == ["", "hue"]
        assert other.nulls[0] == first.nulls[0]
        # images are red that fire the most universal latent in one model: exchanged among themselves it stays
        assert min(other.nulls[1].counts["universal"]) > max(other.nulls[0].counts["universal"])
        with pytest.raises(UsageError, match=r"within names 'hu', which is no label .*did you mean 'hue'.*noise, hue"):
            evaluate(usae, buffer, within="hu", **cheap)
        assert len(evaluate(usae, buffer, within="hue", **(cheap | {"annotations": ()})).nulls) == 1

    def test_the_largest_share_of_energy(self, report: UniversalityReport) -> None:
        for site in CLASS_SITES:
            total = sum(record.energy[site] for record in report.latents)
            shared = sum(record.energy[site] for record in report.universal)
            assert report.universal_energy[site] == pytest.approx(shared / total)
        assert report.to_dict()["universal_energy"] == report.universal_energy

    def test_platonic_has_a_row_for_every_ordered_pair(self, report: UniversalityReport, usae: USAE) -> None:
        assert report.similarity is not None
        assert report.linear is not None
        assert report.r2_share is not None
        rows = report.to_dict()["platonic"]
        assert [(row["source"], row["target"]) for row in rows] == [CLASS_SITES, CLASS_SITES[::-1]]
        for row in rows:
            source, target = row["source"], row["target"]
            assert row["cka"] == report.similarity.cka[source][target]
            assert row["mutual_knn_null"] == report.similarity.mutual_knn_null[source][target]
            assert row["r2"] == report.r2[source][target]
            assert row["r2_ridge"] == report.linear.r2[source][target]
            assert row["r2_share"] == report.r2_share[source][target]
            assert row["universal_energy"] == report.universal_energy[target]
        three = replace(report, class_sites=tuple(DIMS)).platonic
        assert [(row["source"], row["target"]) for row in three] == list(permutations(DIMS, 2))

    def test_on_validation_rows(self, usae: USAE, buffer: ActivationBuffer, report: UniversalityReport) -> None:
        found = evaluate(usae, buffer, split="validation")
        rows = buffer.read("validation")
        assert found.measured_on == found.to_dict()["measured_on"] == "validation"
        assert found.n_rows_eval == rows.n == 54
        assert "54 validation rows" in repr(found)
        assert found.r2["m/late"] == pytest.approx(oracles.r2(usae, rows.values)["m/late"], abs=1e-5)
        assert found.r2_train == report.r2_train
        assert found.linear is not None
        assert found.similarity is not None
        assert found.linear.n_rows_eval == found.similarity.n_images == found.nulls[0].n_rows == 54
        assert found.linear.r2 != (report.linear and report.linear.r2)

    def test_csv_columns(self, report: UniversalityReport) -> None:
        rows = list(csv.DictReader(io.StringIO(report.to_csv())))
        pair = "[m/late|n/layer]"
        for name in ("share_a", "share_b", "phi_low", "phi_high", "correlation", "phi_place", "p_place"):
            assert f"{name}{pair}" in rows[0]
        codes = [row["positional"] for row in rows]
        assert codes == ["0"] * 24
        for row, record in zip(rows, report.latents, strict=True):
            found = record.pairs[CLASS_SITES]
            assert row[f"phi_place{pair}"] == row[f"p_place{pair}"] == ""  # every row is an image
            if not math.isnan(found.correlation):
                assert float(row[f"correlation{pair}"]) == pytest.approx(found.correlation, rel=1e-5, abs=1e-12)
            if record.fires["m/late"]:
                assert found.share_a == pytest.approx(found.cofires / record.fires["m/late"])
            if record.fires["n/layer"]:
                assert float(row[f"share_b{pair}"]) == pytest.approx(found.cofires / record.fires["n/layer"], rel=1e-5)

    def test_correlation_is_that_of_the_codes(
        self, usae: USAE, buffer: ActivationBuffer, report: UniversalityReport
    ) -> None:
        codes, seen = oracles.dense_codes(usae, buffer.read("holdout").values), 0
        for k, record in enumerate(report.latents):
            a, b = (codes[site][:, k] for site in CLASS_SITES)
            if a.std() > 0 and b.std() > 0:
                expected, seen = np.corrcoef(a, b)[0, 1], seen + 1
                assert record.pairs[CLASS_SITES].correlation == pytest.approx(expected, abs=1e-5)
        assert seen > 10


def test_one_site_has_nothing_to_be_compared_with(buffer: ActivationBuffer) -> None:
    single = train(buffer, sites=["n/layer"], n_latents=24, k=3, steps=5, validate_every=0).usae
    known = [Annotation("x", np.arange(900) % 3, ["a", "b", "c"])]
    report = evaluate(single, buffer, annotations=known)
    assert (report.linear, report.similarity, report.nulls, report.platonic) == (None, None, (), [])
    content = json.loads(report.to_json(), parse_constant=refuse)
    assert (content["r2_ridge"], content["r2_share"], content["similarity"], content["nulls"]) == (None, None, None, [])
    assert content["n_equal_rates"] == 0
    assert content["universal_energy"] == {"n/layer": 0.0}
    low, high = content["r2_interval"]["n/layer"]["n/layer"]
    assert low < content["r2"]["n/layer"]["n/layer"] < high


N_IMAGES, N_PLACES = 500, 9


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> UniversalityReport:
    """What is found of a USAE by hand that reads three directions, one of them of places alone."""
    # direction 0: at place 0 of every image and in 2 % of all other rows at random; direction 1: in the same random
    # tenth of the rows in both; direction 2: in other rows in each; direction 3 never
    rng = np.random.default_rng(0)
    shape = (N_IMAGES, N_PLACES)
    content, at_0 = rng.random(shape) < 0.1, np.broadcast_to(np.arange(N_PLACES) == 0, shape)
    rows = {}
    for site in ("m/a", "n/b"):
        kinds = [at_0 | (rng.random(shape) < 0.02), content, rng.random(shape) < 0.1, np.zeros(shape, bool)]
        rows[site] = np.stack([kind.reshape(-1) for kind in kinds], axis=1) * 2.0
    usae = USAE({"m/a": 4, "n/b": 4}, 4, 3)
    with torch.no_grad():
        for encoder, bias in zip(usae.W_enc, usae.b_enc, strict=True):
            encoder.copy_(torch.eye(4))
            bias.fill_(-0.5)
        usae.W_dec.copy_(torch.cat([torch.eye(4), torch.eye(4)], dim=1))
    buffer = ActivationBuffer.from_arrays(
        rows,
        tmp_path_factory.mktemp("places") / "acts",
        image_index=np.arange(N_IMAGES).repeat(N_PLACES),
        holdout=0.8,
    )
    return evaluate(usae, buffer, seed=0, nulls=5)


class TestPlaces:
    """What fires at a place is not what the image has in common."""

    def test_classes(self, placed: UniversalityReport) -> None:
        assert placed.n_rows_eval == 400 * N_PLACES
        assert [record.category for record in placed.latents] == ["chance", "universal", "chance", "dead"]
        assert [record.positional for record in placed.latents] == [True, False, False, False]
        by_place, by_content = (record.pairs["m/a", "n/b"] for record in placed.latents[:2])
        assert by_place.phi > 0.7
        assert by_place.p < 1e-20
        assert abs(by_place.phi_place) < 0.1
        assert by_place.p_place > 0.01
        assert by_content.phi_place == pytest.approx(1.0)
        assert by_content.p_place < 1e-6
        assert by_content.phi_low == by_content.phi_high == pytest.approx(1.0)
        assert by_place.phi_low < by_place.phi < by_place.phi_high

    def test_files(self, placed: UniversalityReport) -> None:
        content = json.loads(placed.to_json(), parse_constant=refuse)
        assert content["n_positional"] == 1
        assert content["n_equal_rates"] == 3
        rows = list(csv.DictReader(io.StringIO(placed.to_csv())))
        assert [row["positional"] for row in rows] == ["1", "0", "0", "0"]
        assert float(rows[0]["p_place[m/a|n/b]"]) == pytest.approx(
            placed.latents[0].pairs["m/a", "n/b"].p_place, rel=1e-5
        )

    def test_nulls_keep_places(self, placed: UniversalityReport) -> None:
        (null,) = placed.nulls
        assert (null.n_rows, null.n_images) == (3600, 400)
        assert sum(null.counts["universal"]) == 0
        assert set(null.counts["dead"]) == {1}
        assert set(null.counts["chance"]) == {3}
