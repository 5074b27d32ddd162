"""Independent SAEs that match a USAE: what they see, how long they learn, and how they go on after a stop."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import usae_probe.usae.independent as independent_module
import usae_probe.usae.state as state_module
from usae_probe import ActivationBuffer, Run, RunConfig, evaluate, train_independent
from usae_probe.buffer import Rows
from usae_probe.config import TrainConfig
from usae_probe.errors import ConfigError, StageError, UsageError
from usae_probe.usae import StepRecord, TrainResult, encoder_updates, sources_of, train, train_steps, usae_for
from usae_probe.usae.independent import one_site

from .tiny_run import CONFIG, changed, put_tiny_run
from .trainings import PLAIN, Stopped, related_rows, same

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = ["a/x", "b/y"]
SETTINGS: dict[str, Any] = {
    "n_latents": 32, "k": 4, "steps": 20, "batch_size": 64, "dead_after": 5, "aux_k": 8, "log_every": 1, "seed": 3
}  # fmt: skip


@pytest.fixture
def buffer(tmp_path: Path) -> ActivationBuffer:
    return related_rows(tmp_path / "acts")


def seen(monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """Return a list that fills with all training rows that are asked of any buffer from now on."""
    found: list[Rows] = []
    gather = ActivationBuffer.gather

    def spy(self: ActivationBuffer, split: str, rows: Any, sites: Any = None) -> Rows:
        got = gather(self, split, rows, sites)
        if split == "train":
            found.append(Rows({site: x.copy() for site, x in got.values.items()}, got.image_index, got.token_index))
        return got

    monkeypatch.setattr(ActivationBuffer, "gather", spy)
    return found


def test_each_sees_the_same_rows_in_the_same_order(buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = seen(monkeypatch)
    run = train(buffer, **SETTINGS)
    shared = batches[:]
    batches.clear()
    found = train_independent(buffer, like=run)
    assert list(found) == SITES
    assert (len(shared), len(batches)) == (20, 40)
    for own, site in zip((batches[:20], batches[20:]), SITES, strict=True):
        for mine, all_sites in zip(own, shared, strict=True):
            assert list(mine.values) == [site]
            np.testing.assert_array_equal(mine.image_index, all_sites.image_index)
            np.testing.assert_array_equal(mine.values[site], all_sites.values[site])
    assert not np.array_equal(shared[0].image_index, shared[1].image_index)  # the order is one that could differ


def test_each_is_the_same_code_with_one_site(buffer: ActivationBuffer) -> None:
    run = train(buffer, **SETTINGS)
    found = train_independent(buffer, like=run)
    for site, result in found.items():
        assert (result.usae.sites, result.usae.n_latents, result.usae.k) == ((site,), 32, 4)
        assert [record.phase for record in result.history] == ["main"] * 20
        assert same(result.usae, train(buffer, sites=[site], **SETTINGS).usae)
        assert (result.train_config.seed, result.train_config.steps) == (3, 20)


def test_a_subset_of_the_buffers_sites_and_epochs(buffer: ActivationBuffer) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "steps"}
    run = train(buffer, sites=["b/y"], epochs=2.0, **settings)
    found = train_independent(buffer, like=run)
    assert list(found) == ["b/y"]
    assert len(found["b/y"].history) == len(run.history) == 2 * buffer.steps_per_epoch("train", 64)
    assert same(found["b/y"].usae, run.usae)  # a USAE with one site is an independent SAE


def test_encoder_updates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # 8 steps, a quarter of them aligning: steps 1, 2 update every encoder. Of steps 3 … 8 each updates one.
    turns = ["all", "all", "a", "b", "b", "c", "b", "a"]
    monkeypatch.setattr(
        independent_module, "phase_and_source", lambda sites, how, step, steps, joint: ("main", turns[step - 1])
    )
    how = TrainConfig(steps=8, align_warmup=0.25)
    assert encoder_updates(["a", "b", "c"], how, 8) == {"a": 4, "b": 5, "c": 3}  # 2 + 2, 2 + 3, 2 + 1
    assert encoder_updates(["a", "b", "c"], how, 8, taken=4) == {"a": 3, "b": 3, "c": 2}  # stopped after all all a b


@pytest.mark.parametrize("source", ["random", "all"])
def test_encoder_updates_are_those_of_the_training(buffer: ActivationBuffer, source: str) -> None:
    run = train(buffer, source=source, **SETTINGS)
    counted = Counter(site for r in run.history for site in (SITES if r.source == "all" else [r.source]))
    assert encoder_updates(SITES, run.train_config, 20) == dict(counted)
    if source == "all":
        assert set(counted.values()) == {20}
    else:
        assert sum(counted.values()) == 2 * 5 + 15  # a quarter of the steps aligns
        assert len(set(counted.values())) == 2
    found = train_independent(buffer, like=run, updates="encoder")
    assert {site: len(result.history) for site, result in found.items()} == dict(counted)


def test_encoder_updates_where_sites_are_drawn_to_be_aligned(tmp_path: Path) -> None:
    """A step of the warm-up moves the encoders of `align_sites` sites; they are the ones that are counted."""
    rng = np.random.default_rng(0)
    sites = ["a/x", "b/y", "c/z", "d/w"]
    buffer = ActivationBuffer.from_arrays({s: rng.normal(size=(300, 9)) for s in sites}, tmp_path / "acts")
    settings = SETTINGS | {"align_warmup": 0.5, "align_sites": 2, "aux_k": 0}
    run = train(buffer, **settings)
    counted = Counter(site for r in run.history for site in sources_of(r.source, sites))
    assert [len(sources_of(r.source, sites)) for r in run.history] == [2] * 10 + [1] * 10
    assert encoder_updates(sites, run.train_config, 20) == dict(counted)
    how = TrainConfig(**{key: value for key, value in settings.items() if key in TrainConfig.model_fields})
    usae = usae_for(buffer, run.usae_config, how)
    before = [w.detach().clone() for w in usae.W_enc]
    for record in train_steps(usae, buffer, how):
        now = [w.detach().clone() for w in usae.W_enc]
        moved = [site for site, old, new in zip(sites, before, now, strict=True) if not old.equal(new)]
        assert moved == list(sources_of(record.source, sites))
        before = now


def test_moved_encoders_are_the_counted_ones(buffer: ActivationBuffer) -> None:
    """One main step moves the encoder of its source alone: what is counted is what happens to the weights."""
    quiet = SETTINGS | {"align_warmup": 0.0, "steps": 1, "aux_k": 0, "lr_warmup": 0.0}
    for seed in range(4):
        settings = quiet | {"seed": seed}
        run = train(buffer, **settings)
        start = train(buffer, **settings | {"lr": 1e-30}).usae
        moved = {
            site: not torch.allclose(after, before, atol=1e-5)
            for site, after, before in zip(SITES, run.usae.W_enc, start.W_enc, strict=True)
        }
        assert {site: int(was) for site, was in moved.items()} == encoder_updates(SITES, run.train_config, 1)


def test_fewer_updates_see_the_first_batches(buffer: ActivationBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = seen(monkeypatch)
    run = train(buffer, **SETTINGS)
    shared = [rows.image_index for rows in batches]
    batches.clear()
    found = train_independent(buffer, like=run, updates="encoder")
    n = len(found["a/x"].history)
    assert n < 20
    assert found["a/x"].history[-1].lr == pytest.approx(run.history[-1].lr, rel=0.01)  # the schedule is stretched
    np.testing.assert_array_equal([rows.image_index for rows in batches[:n]], shared[:n])


def test_the_steps_behind_the_weights_are_matched(buffer: ActivationBuffer) -> None:
    """A run that kept its best validation is matched by that step; one that stopped early by the steps it took."""
    quick = (
        SETTINGS
        | {"steps": 32, "validate_every": 2, "lr": 0.2, "lr_final": 1.0, "log_every": 32, "weight_decay": 0.0}
        | PLAIN
    )
    kept = train(buffer, keep="best", **quick)
    assert kept.best is not None
    assert kept.best.step < kept.taken == kept.planned == 32
    stopped = train(buffer, early_stop=1, **quick)
    assert stopped.taken < stopped.planned == 32
    for run, steps in ((kept, kept.best.step), (stopped, stopped.taken)):
        lines = [asdict(record) for record in run.history]  # as in a run folder: few are kept, the last always is
        assert len(lines) < run.taken
        assert lines[-1]["step"] == run.taken
        assert independent_module._steps_of(lines, run.train_config) == steps
        found = train_independent(buffer, like=run)
        assert {result.taken for result in found.values()} == {steps}
        assert {result.train_config.keep for result in found.values()} == {"last"}
        by_encoder = train_independent(buffer, like=run, updates="encoder")
        n_aligned = 8  # a quarter of the 32 that were planned
        assert sum(result.taken for result in by_encoder.values()) == 2 * n_aligned + steps - n_aligned


def test_one_support_throughout_updates_every_encoder(buffer: ActivationBuffer) -> None:
    run = train(buffer, sparsity="global-topk", **SETTINGS)
    found = train_independent(buffer, like=run, updates="encoder")
    assert {site: result.taken for site, result in found.items()} == {"a/x": 20, "b/y": 20}
    assert {result.usae_config.sparsity for result in found.values()} == {"global-topk"}


def test_an_encoder_that_never_learned_cannot_be_matched(buffer: ActivationBuffer) -> None:
    run = train(buffer, **SETTINGS | {"steps": 1, "align_warmup": 0.0})
    with pytest.raises(UsageError, match="was never updated in 1 steps"):
        train_independent(buffer, like=run, updates="encoder")


def test_other_sizes(buffer: ActivationBuffer) -> None:
    run = train(buffer, **SETTINGS | {"steps": 2})
    found = train_independent(buffer, like=run, n_latents=16)
    assert {result.usae.n_latents for result in found.values()} == {16}
    assert {result.usae_config.n_latents for result in found.values()} == {16}
    with pytest.raises(ConfigError, match="k = 4 is more than n_latents = 3"):
        train_independent(buffer, like=run, n_latents=3)


def test_alone_a_site_is_reconstructed_better(buffer: ActivationBuffer) -> None:
    run = train(buffer, **SETTINGS | {"steps": 80, "log_every": 50})
    found = train_independent(buffer, like=run)
    shared = evaluate(run.usae, buffer).r2
    for site, result in found.items():
        alone = evaluate(result.usae, buffer).r2[site][site]
        assert alone > shared[site][site] > 0.3  # the alignment tax is positive


# --- stopped and gone on ---


def test_stopped_in_the_second_and_gone_on(
    buffer: ActivationBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "SECONDS", 0.0)
    run = train(buffer, **SETTINGS)
    whole = train_independent(buffer, like=run)
    steps: list[tuple[str, int]] = []

    def follow(site: str, record: StepRecord) -> None:
        if (site, record.step) == ("b/y", 14):
            raise Stopped
        steps.append((site, record.step))

    with pytest.raises(Stopped):
        train_independent(buffer, like=run, resume=tmp_path / "sae", progress=follow)
    steps.clear()
    later = lambda site, record: steps.append((site, record.step))
    found = train_independent(buffer, like=run, resume=tmp_path / "sae", progress=later)
    assert steps == [("b/y", step) for step in range(14, 21)]
    for site in SITES:
        assert same(found[site].usae, whole[site].usae)
        assert found[site].history == whole[site].history
    assert not list((tmp_path / "sae").rglob("training-state*"))
    steps.clear()
    again = train_independent(buffer, like=run, resume=tmp_path / "sae", progress=later)
    assert not steps
    assert all(same(again[site].usae, whole[site].usae) for site in SITES)


def test_kept_results_of_other_settings_are_not_used(buffer: ActivationBuffer, tmp_path: Path) -> None:
    run = train(buffer, **SETTINGS)
    train_independent(buffer, like=run, resume=tmp_path / "sae")
    for other in (train(buffer, **SETTINGS | {"lr": 1e-3}), train(buffer, **SETTINGS | {"k": 3})):
        steps: list[int] = []
        found = train_independent(
            buffer, like=other, resume=tmp_path / "sae", progress=lambda _, record, n=steps: n.append(record.step)
        )
        assert len(steps) == 40
        assert len(found["a/x"].history) == 20
    (tmp_path / "sae/a__x/training.json").write_text("{")
    steps = []
    train_independent(
        buffer, like=other, resume=tmp_path / "sae", progress=lambda site, record: steps.append(record.step)
    )
    assert len(steps) == 20  # of a/x alone


def test_validations_decide_nothing_in_a_matching_training(buffer: ActivationBuffer, tmp_path: Path) -> None:
    alone = one_site(TrainConfig(early_stop=1, keep="best", validate_every=2, steps=20), 7)
    assert (alone.early_stop, alone.keep, alone.steps, alone.validate_every) == (0, "last", 7, 2)
    often, seldom = (train(buffer, **SETTINGS, validate_every=every) for every in (2, 9))
    first = train_independent(buffer, like=often, resume=tmp_path / "sae")
    assert [record.step for record in first["a/x"].history if record.r2] == list(range(2, 21, 2))
    again = train_independent(buffer, like=seldom, resume=tmp_path / "sae", progress=lambda *_: pytest.fail("redone"))
    fresh = train_independent(buffer, like=seldom)
    assert all(same(again[site].usae, fresh[site].usae) for site in SITES)


# --- like a run folder ---


def test_like_a_run_folder(tmp_path: Path) -> None:
    base = put_tiny_run(tmp_path)
    config = RunConfig.from_dict(changed(train={"source": "random"}), base=base)
    run = Run(config, base / "run")
    run.run(("harvest",))
    with pytest.raises(UsageError, match="no run folder") as caught:
        train_independent(run.buffer(), like=base / "nowhere")
    assert "finished training" in caught.value.hint
    with pytest.raises(StageError, match="has no finished train"):
        train_independent(run.buffer(), like=base / "run")
    run.run(("train",))
    found = train_independent(run.buffer(), like=base / "run", updates="encoder")
    sites = ["a/0", "a/2", "b/2"]
    assert {site: result.history[-1].step for site, result in found.items()} == encoder_updates(sites, config.train, 8)
    assert {(result.usae.n_latents, result.usae.k) for result in found.values()} == {(16, 2)}
    trained = train(run.buffer(), usae_config=config.usae, train_config=config.train)
    assert isinstance(trained, TrainResult)
    again = train_independent(run.buffer(), like=trained, updates="encoder")
    assert all(same(again[site].usae, found[site].usae) for site in sites)

    best = RunConfig.from_dict(changed(train={"keep": "best", "validate_every": 3}), base=base)
    other = Run(best, base / "run")
    other.run(("train",))
    again = train(other.buffer(), usae_config=best.usae, train_config=best.train)
    assert again.best is not None
    matched = train_independent(other.buffer(), like=base / "run")
    assert {result.taken for result in matched.values()} == {again.best.step}

    record = json.loads((base / "run/run.json").read_text())
    record["config"]["train"]["lr"] = 0.5  # as a later stage with another config would have left it
    (base / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(StageError, match=r"train\.lr changed"):
        train_independent(run.buffer(), like=base / "run")
    assert CONFIG["train"]["steps"] == 8
