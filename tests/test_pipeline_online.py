"""Runs whose training goes along with the harvest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from usae_probe import ActivationBuffer, Run, RunConfig, Sweep, harvest, harvest_and_train
from usae_probe.attaching import attach
from usae_probe.config import ImagesConfig
from usae_probe.errors import BufferMismatchError, ConfigError, StageError
from usae_probe.pipeline import MEASURING, Progress, RunResult, measuring
from usae_probe.report import figures
from usae_probe.usae import USAE, World

from .tiny_run import changed, put_tiny_run
from .trainings import same

Runner = Callable[..., RunResult]
ONLINE = {"shard_images": 5, "online": True, "warmup_rows": 12}
# Of 60 images 11 are held out, in six shards; of training there are 25, of which six are sure to fit beside them.
RING = {"shard_images": 2, "mode": "ring", "capacity": "118kB", "memory": "1kB", "warmup_rows": 9, "reuse": 2}
TRAIN = {"steps": None, "batch_size": 4}
IMAGES = {"holdout": 0.1, "batch_size": 4}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return put_tiny_run(tmp_path)


@pytest.fixture
def run(base: Path) -> Runner:
    def do(config: dict[str, Any], stages: Any = MEASURING, out: str = "run", **more: Any) -> RunResult:
        return Run(RunConfig.from_dict(config, base=base), base / out, **more).run(stages)

    return do


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "training_curves", lambda _, path: path.touch())
    monkeypatch.setattr(measuring, "universality_figures", lambda *_: [])


def kept(result: RunResult) -> dict[str, bool]:
    return {stage.stage: stage.kept for stage in result.stages}


def weights(base: Path, out: str = "run") -> USAE:
    return USAE.load(base / out / "usae.safetensors")


def test_online_leaves_the_buffer_of_a_harvest_alone(base: Path, run: Runner) -> None:
    config = changed(buffer=ONLINE)
    assert kept(run(config)) == {"harvest": False, "train": False, "evaluate": False}
    run(changed(buffer={"shard_images": 5}), ("harvest",), out="alone")
    for file in (base / "alone/buffer").iterdir():
        assert file.read_bytes() == (base / "run/buffer" / file.name).read_bytes(), file.name
    assert all(kept(run(config)).values())


def test_another_training_online_keeps_the_harvest_and_is_what_it_would_have_been(base: Path, run: Runner) -> None:
    run(changed(buffer=ONLINE))
    config = changed(buffer=ONLINE, train={"lr": 1e-3})
    assert kept(run(config)) == {"harvest": True, "train": False, "evaluate": False}
    run(config, out="fresh")
    assert same(weights(base), weights(base, "fresh"))
    # Switched off, it is the training of a buffer that is there.
    off = changed(buffer={"shard_images": 5}, train={"lr": 1e-3})
    assert kept(run(off)) == {"harvest": True, "train": False, "evaluate": False}
    assert not same(weights(base), weights(base, "fresh"))


def test_harvest_then_train_apart_are_the_same_as_along(base: Path, run: Runner) -> None:
    config = changed(buffer=ONLINE)
    run(config)
    run(config, ("harvest",), out="apart")
    run(config, ("train",), out="apart")
    assert same(weights(base), weights(base, "apart"))


def test_a_ring_is_used_up_and_a_changed_training_starts_all_over(base: Path, run: Runner) -> None:
    config = changed(buffer=RING, train=TRAIN, images=IMAGES)
    result = run(config)
    buffer = ActivationBuffer(base / "run/buffer")
    assert buffer.complete
    assert any(entry.dropped for entry in buffer.shards)
    assert sum(file.stat().st_size for file in buffer.path.glob("shard-*")) <= 118_000
    assert result.metrics is not None
    assert result.metrics["n_rows_eval"] == 6
    assert all(kept(run(config)).values())
    again = run(config | {"train": config["train"] | {"lr": 1e-3}})
    assert kept(again) == {"harvest": False, "train": False, "evaluate": False}
    # Weights that are lost need the rows again, too.
    (base / "run/usae.safetensors").unlink()
    before = weights_of_a_fresh_run(base, run, config | {"train": config["train"] | {"lr": 1e-3}})
    run(config | {"train": config["train"] | {"lr": 1e-3}})
    assert same(weights(base), before)


def weights_of_a_fresh_run(base: Path, run: Runner, config: dict[str, Any]) -> USAE:
    run(config, out="fresh")
    return weights(base, "fresh")


def test_pictures_are_checked_against_the_rows_that_a_ring_left(base: Path, run: Runner) -> None:
    config = changed(buffer=RING, train=TRAIN, images=IMAGES) | {"cam": {"latents": "0,3", "steps": 2}}
    run(config)
    cam = run(config, ("cam",)).cam
    assert cam is not None
    buffer = ActivationBuffer(base / "run/buffer")
    there = sum(entry.rows for entry in buffer.shards if not entry.dropped)
    assert 11 <= cam["n_natural"] == there < 60


@pytest.mark.parametrize("buffer", [ONLINE, RING], ids=["store", "ring"])
@pytest.mark.parametrize("at", [("harvest", 20), ("harvest", 40), ("train", 3)], ids=str)
def test_a_stopped_run_goes_on_to_the_same(
    base: Path, run: Runner, buffer: dict[str, Any], at: tuple[str, int]
) -> None:
    train = TRAIN if buffer is RING else TRAIN | {"epochs": 3}
    config = changed(buffer=buffer, train=train, images=IMAGES)

    def stop(now: Progress) -> None:
        if now.stage == at[0] and now.done >= at[1]:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run(config, progress=stop)
    run(config)
    run(config, out="whole")
    assert same(weights(base), weights(base, "whole"))
    assert (base / "run/metrics.json").read_bytes() == (base / "whole/metrics.json").read_bytes()


def test_a_ring_cannot_be_taken_apart(run: Runner) -> None:
    for stage in ("harvest", "train"):
        with pytest.raises(ConfigError, match="harvested and trained from at the same time"):
            run(changed(buffer=RING, train=TRAIN), (stage,))


def test_several_processes_are_told_to_harvest_first(run: Runner) -> None:
    class Two(World):
        size = 2

    with pytest.raises(ConfigError, match="works in one process, 2 were started"):
        run(changed(buffer=ONLINE), world=Two())


@pytest.mark.parametrize("buffer", [ONLINE, RING], ids=["store", "ring"])
def test_a_sweep_needs_a_buffer_that_is_there(base: Path, buffer: dict[str, Any]) -> None:
    config = RunConfig.from_dict(changed(buffer=buffer, train=TRAIN), base=base)
    with pytest.raises(ConfigError, match="many times from one buffer"):
        Sweep(config, base / "sweep", {"usae.k": [2, 3]})


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        ({"mode": "ring"}, "needs a capacity"),
        ({"capacity": "1GB"}, "capacity bounds a ring"),
        ({"reuse": 2}, "set online = true"),
        ({"mode": "ring", "capacity": "20 apples"}, r"buffer\.capacity"),
        ({"mode": "ring", "capacity": "20kB"}, r"a ring of 0\.02 MB is too small"),
    ],
)
def test_settings_that_make_no_ring(run: Runner, buffer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(changed(buffer=buffer, train=TRAIN))


class TestPython:
    """`up.harvest_and_train`, without a run folder."""

    def test_it_gives_what_a_run_gives(self, base: Path, run: Runner) -> None:
        config = changed(buffer=RING, train=TRAIN, images=IMAGES)
        run(config)
        resolved = RunConfig.from_dict(config, base=base)
        models = [
            attach(
                entry.name,
                adapter=entry.adapter,
                name=name,
                layers=entry.layers,
                base=base,
                **entry.model_dump(exclude={"adapter", "name", "layers"}),
            )
            for name, entry in resolved.models.items()
        ]
        steps: list[int] = []
        done = harvest_and_train(
            models,
            base / "images.npz",
            base / "ring",
            images_config=resolved.images,
            train_config=resolved.train,
            progress=lambda record: steps.append(record.step),
            n_latents=16,
            k=2,
            **RING,
        )
        assert same(done.usae, weights(base))
        assert steps == list(range(1, done.taken + 1))
        with pytest.raises(ConfigError, match="'seed' is a setting of the images and of the training"):
            harvest_and_train(models, base / "images.npz", base / "ring", seed=1)
        with pytest.raises(ConfigError, match="harvest_and_train"):
            harvest(models, base / "images.npz", base / "other", images_config=ImagesConfig(source=""), **RING)
        # The ring was used up, and no state of another training can need it.
        with pytest.raises((StageError, BufferMismatchError), match=r"dropped rows|ring\.training"):
            harvest_and_train(
                models,
                base / "images.npz",
                base / "ring",
                images_config=resolved.images,
                train_config=resolved.train,
                n_latents=8,
                k=2,
                **RING,
            )
