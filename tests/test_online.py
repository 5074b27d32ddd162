"""Training along with a writer: what comes out depends on seeds and rows, not on timing, stops or the disk's size."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from usae_probe.buffer import ActivationBuffer, OnlinePlan
from usae_probe.config import BufferConfig
from usae_probe.errors import ConfigError, StageError
from usae_probe.online import plan_online
from usae_probe.probes import evaluate
from usae_probe.usae import USAE, StepRecord, train

from .rings import HOW, RING, SHAPE, SITES, STATE, ring_spec, rows_of, train_along, weights, write_all
from .trainings import same

ONLINE = BufferConfig(online=True, memory=RING.memory, warmup_rows=100, dtype="float32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> USAE:
    """What a ring gives that nothing disturbs."""
    return train_along(tmp_path_factory.mktemp("whole")).done.usae


def test_a_ring_keeps_within_its_capacity_and_drops_what_was_used(tmp_path: Path) -> None:
    seen = train_along(tmp_path)
    assert RING.capacity is not None
    assert max(seen.sizes) <= RING.capacity
    assert seen.done.taken == seen.steps == 1215 // 24
    buffer = ActivationBuffer(tmp_path / "buffer")
    assert buffer.complete
    assert buffer.verify() == []
    dropped = [entry for entry in buffer.shards if entry.dropped]
    assert dropped
    assert all(entry.split == "train" for entry in dropped)
    assert not any((buffer.path / entry.file).exists() for entry in dropped)
    assert buffer.n_rows("train") == 1215 - sum(entry.rows for entry in dropped)
    assert (buffer.n_images("train"), buffer.n_rows("validation"), buffer.n_rows("holdout")) == (1215, 135, 150)
    assert not (buffer.path / "buffer.h5").exists()


@pytest.mark.parametrize("who_is_slow", ["writer", "trainer", "nobody, without a state"])
def test_timing_changes_nothing(tmp_path: Path, whole: USAE, who_is_slow: str) -> None:
    seen = train_along(
        tmp_path,
        slow_writer=0.02 if who_is_slow == "writer" else 0.0,
        progress=(lambda _: time.sleep(0.03)) if who_is_slow == "trainer" else None,
        resume="without" not in who_is_slow,
    )
    assert same(seen.done.usae, whole)
    assert max(seen.sizes) <= (RING.capacity or 0)
    if who_is_slow == "trainer":
        waited, spent = seen.stalls
        assert waited > 0.1
        assert spent < 0.5 * waited


@pytest.mark.parametrize("step", [1, 17, 44])
def test_interrupted_and_gone_on_with_is_the_same(tmp_path: Path, whole: USAE, step: int) -> None:
    def interrupt(record: StepRecord) -> None:
        if record.step == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_along(tmp_path, progress=interrupt)
    resumed = train_along(tmp_path, slow_writer=0.01)
    assert resumed.done.resumed == step
    assert same(resumed.done.usae, whole)


def test_interrupted_while_it_waits_for_rows(tmp_path: Path, whole: USAE) -> None:
    """The writer takes a second per shard; Ctrl-C is heard at once, and the state of the last step is kept."""
    began = time.perf_counter()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    steps: list[int] = []

    def slow_down(record: StepRecord) -> None:
        steps.append(record.step)
        if record.step == 5:
            timer.start()

    with pytest.raises(KeyboardInterrupt):
        train_along(tmp_path, progress=slow_down, slow_writer=lambda: 1.0 if steps and steps[-1] >= 5 else 0.0)
    assert time.perf_counter() - began < 15
    resumed = train_along(tmp_path)
    assert resumed.done.resumed == steps[-1] < resumed.steps
    assert same(resumed.done.usae, whole)


def test_killed_at_any_moment_it_goes_on_to_the_same(tmp_path: Path, whole: USAE) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).with_name("rings.py")), str(tmp_path)]
    draw = np.random.default_rng(0)
    for _ in range(4):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0.05, 0.5))
            process.send_signal(signal.SIGKILL)
        if (tmp_path / "buffer" / "manifest.json").exists():
            assert ActivationBuffer(tmp_path / "buffer").verify() == []
    assert not (tmp_path / "usae.safetensors").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    assert same(weights(tmp_path), whole)


def test_what_stops_the_writer_is_raised_in_the_training(tmp_path: Path, whole: USAE) -> None:
    with pytest.raises(ValueError, match="the writer fails"):
        train_along(tmp_path, fails_at=20)
    assert len(ActivationBuffer(tmp_path / "buffer").shards) == 20
    assert same(train_along(tmp_path).done.usae, whole)


def test_a_ring_whose_training_is_lost_says_so(tmp_path: Path) -> None:
    def interrupt(record: StepRecord) -> None:
        if record.step == 40:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_along(tmp_path, progress=interrupt)
    (tmp_path / STATE).unlink()
    with pytest.raises(StageError, match=r"dropped rows that this training needs.*delete the buffer"):
        train_along(tmp_path)


def test_rows_that_are_left_of_a_ring_train_nothing_else_but_can_be_measured_on(tmp_path: Path) -> None:
    done = train_along(tmp_path).done
    buffer = ActivationBuffer(tmp_path / "buffer")
    with pytest.raises(StageError, match=r"was a ring: \d+ of its training rows were dropped"):
        train(buffer, n_latents=8, k=2, steps=2)
    report = evaluate(done.usae, buffer)
    assert report.n_rows_eval == 150
    assert report.n_rows_train == buffer.n_rows("train")


def test_skipped_images_take_rows_not_steps(tmp_path: Path) -> None:
    """A third of the images is skipped: the last rows are drawn again until the steps are done, whatever the timing."""
    both = [
        train_along(tmp_path / str(slow), skip=lambda image: image % 3 == 0, slow_writer=slow) for slow in (0.0, 0.01)
    ]
    assert [seen.done.taken for seen in both] == [50, 50]
    assert same(both[0].done.usae, both[1].done.usae)
    assert len(ActivationBuffer(tmp_path / "0.0" / "buffer").skipped) == 500


def test_too_few_rows_for_a_single_batch_say_so(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"have fewer rows than a batch of 24"):
        train_along(tmp_path, skip=lambda image: image % 30 != 0)


def test_the_normalisation_is_that_of_the_warm_up(tmp_path: Path) -> None:
    seen = train_along(tmp_path)
    assert seen.plan.warmup_shards == 3  # 100 rows, in shards of 40
    rows = rows_of(ring_spec().split.train[:120])
    usae = seen.done.usae
    for index, site in enumerate(usae.sites):
        x = rows[site].astype(np.float64)
        np.testing.assert_allclose(usae.mean[usae.columns[site]].numpy(), x.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(usae.scale[index], np.sqrt(x.var(0).mean()), rtol=1e-5)


@pytest.mark.parametrize(
    "change", [{"init": "data"}, {"pairing": "shuffled"}, {"early_stop": 1, "validate_every": 5}, {"steps": 20}]
)
def test_other_trainings_along(tmp_path: Path, change: dict[str, object]) -> None:
    how = HOW.model_copy(update=change)
    runs = [train_along(tmp_path / name, how=how, slow_writer=slow) for name, slow in (("a", 0.0), ("b", 0.005))]
    assert same(runs[0].done.usae, runs[1].done.usae)
    assert runs[0].done.taken <= 20 if "steps" in change else runs[0].done.taken <= 50
    assert ActivationBuffer(tmp_path / "a" / "buffer").complete


def test_data_initialisation_goes_on_after_its_rows_are_gone(tmp_path: Path) -> None:
    how = HOW.model_copy(update={"init": "data"})

    def interrupt(record: StepRecord) -> None:
        if record.step == 40:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_along(tmp_path / "a", how=how, progress=interrupt)
    resumed = train_along(tmp_path / "a", how=how)
    assert same(resumed.done.usae, train_along(tmp_path / "b", how=how).done.usae)


class TestStore:
    """`online = true`: the buffer is an ordinary one in the end."""

    def test_it_is_the_buffer_of_a_harvest_alone(self, tmp_path: Path) -> None:
        train_along(tmp_path, store=ONLINE, how=HOW.model_copy(update={"steps": 60}))
        write_all(tmp_path / "alone", ring_spec())
        for file in (tmp_path / "alone").iterdir():
            assert file.read_bytes() == (tmp_path / "buffer" / file.name).read_bytes(), file.name

    def test_more_passes_follow_and_timing_changes_nothing(self, tmp_path: Path) -> None:
        how = HOW.model_copy(update={"epochs": 3.0})
        runs = [train_along(tmp_path / str(s), store=ONLINE, how=how, slow_writer=s) for s in (0.0, 0.01)]
        assert [run.done.taken for run in runs] == [150, 150]
        assert same(runs[0].done.usae, runs[1].done.usae)

    @pytest.mark.parametrize("step", [20, 120])
    def test_interrupted_in_the_first_pass_or_later(self, tmp_path: Path, step: int) -> None:
        how = HOW.model_copy(update={"epochs": 3.0})

        def interrupt(record: StepRecord) -> None:
            if record.step == step:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train_along(tmp_path / "a", store=ONLINE, how=how, progress=interrupt)
        resumed = train_along(tmp_path / "a", store=ONLINE, how=how)
        assert resumed.done.resumed == step
        assert same(resumed.done.usae, train_along(tmp_path / "b", store=ONLINE, how=how).done.usae)


def test_one_pass_trains_as_well_as_the_same_rows_stored(tmp_path: Path) -> None:
    """The same number of steps from a ring, and from all rows at once."""
    store = RING.model_copy(update={"reuse": 8})
    along = train_along(tmp_path, store=store)
    write_all(tmp_path / "stored", ring_spec())
    buffer = ActivationBuffer(tmp_path / "stored")
    alone = train(buffer, usae_config=SHAPE, train_config=HOW.model_copy(update={"steps": along.done.taken}))
    ring, whole = (evaluate(done.usae, buffer).r2 for done in (along.done, alone))
    for source in SITES:
        for target in SITES:
            assert whole[source][target] > 0.6
            assert abs(ring[source][target] - whole[source][target]) < 0.02, (ring, whole)


class TestPlan:
    def plan(self, capacity: int | None = None, **more: int) -> OnlinePlan:
        return OnlinePlan.of(
            ring_spec(), **({"batch_size": 24, "memory": 2**30, "warmup_rows": 100} | more), capacity=capacity
        )

    def test_what_fits_is_mixed_as_a_whole(self) -> None:
        plan = self.plan()
        assert (plan.shards, plan.rows, plan.window, plan.drops) == (31, 1215, 31, False)

    def test_a_ring_mixes_less_than_it_holds(self) -> None:
        # Ten shards fit. A batch fills one, two more are being written and waited for: 10 − 1 − 2 = 7.
        plan = self.plan(RING.capacity)
        assert (plan.window, plan.warmup_shards, plan.tail) == (7, 3, 7)

    def test_the_warm_up_ends_before_the_ring_is_full(self) -> None:
        assert self.plan(RING.capacity, warmup_rows=10_000).warmup_shards == 9

    def test_one_that_is_too_small_says_what_would_do(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"a ring of 0\.1 MB is too small: held-out rows take") as caught:
            self.plan(100_000)
        found = re.search(r"capacity = '([\d.]+)MB'", str(caught.value))
        assert found is not None
        self.plan(int(float(found[1]) * 1e6))

    def test_large_batches_of_small_shards_need_room(self, tmp_path: Path) -> None:
        """A batch of 200 rows spans five shards, which all have to be there while the next one is written."""
        how = HOW.model_copy(update={"batch_size": 200})
        seen = train_along(tmp_path, how=how)
        assert seen.done.taken == 6
        assert max(seen.sizes) <= (RING.capacity or 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 2.0}, r"train\.epochs = 2, but a ring gives every row buffer\.reuse = 1 times.*50 steps"),
        ({"steps": 51}, r"train\.steps = 51, but 1215 training rows.*enough for 50 steps of 24"),
    ],
)
def test_more_steps_than_a_ring_has_rows_for_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_online(ring_spec(), RING, SHAPE, HOW.model_copy(update=change))
