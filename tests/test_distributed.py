"""Several processes train what one would at the same batch; process 0 alone writes; what fails says so and ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import RunConfig
from usae_probe.errors import UsageError
from usae_probe.pipeline import Run
from usae_probe.usae import USAE, train
from usae_probe.usae.distributed import joined
from usae_probe.world import World, current

from .command import command
from .distributed_worker import STEPS, TRAININGS, operations, records
from .tiny_run import changed, put_tiny_run, toml

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}", "NO_COLOR": "1"}
TIMEOUT = 120


def free_ports(n: int) -> list[str]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 10))
    arrays = {"a/x": shared @ rng.normal(size=(10, 12)), "b/y": shared @ rng.normal(size=(10, 9))}
    ActivationBuffer.from_arrays(arrays, folder / "acts", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What two processes saw, by rank."""
    ports = free_ports(5)
    running = []
    for rank in ("0", "1"):
        environment = QUIET | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
        call = [sys.executable, str(ROOT / "tests" / "distributed_worker.py"), str(folder), *ports]
        running.append(subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


class TestOperations:
    """By hand, for two processes r = 0 and 1."""

    def test_shares_are_the_halves(self, seen: list[dict[str, Any]]) -> None:
        assert [each["operations"]["share"] for each in seen] == [[0, 3], [3, 6]]

    def test_mean_and_its_gradient(self, seen: list[dict[str, Any]]) -> None:
        # m = ((1 + 2) / 2, (3 + 3) / 2) = (1.5, 3). Process r makes (1 + r) Σ m² of it; the mean over the processes is
        # 1.5 Σ m², by m: 3 m = (4.5, 9). That is what each process's own part must get: m is the mean of the parts, and
        # DistributedDataParallel takes the mean again.
        for each in seen:
            assert each["operations"]["mean"] == [1.5, 3.0]
            assert each["operations"]["mean.grad"] == [4.5, 9.0]

    def test_gather_and_its_gradient(self, seen: list[dict[str, Any]]) -> None:
        # G = (1, 0 | 2, 5); the mean of (1 + r) Σ G² by G is 3 G = (3, 0 | 6, 15); times 2, because the mean over the
        # processes is taken again, and each row is in one process only.
        assert [each["operations"]["gather"] for each in seen] == [[[1.0], [0.0], [2.0], [5.0]]] * 2
        assert [each["operations"]["gather.grad"] for each in seen] == [[[6.0], [0.0]], [[12.0], [30.0]]]

    def test_any(self, seen: list[dict[str, Any]]) -> None:
        assert [each["operations"]["any"] for each in seen] == [[True, True, False]] * 2
        assert [each["operations"]["anyone"] for each in seen] == [[True, False]] * 2

    def test_kth_largest_is_that_of_all_values(self, seen: list[dict[str, Any]]) -> None:
        values = [torch.randn(20, 25, generator=torch.Generator().manual_seed(seed)) - seed for seed in (0, 1)]
        ordered = torch.cat(values).flatten().sort(descending=True).values
        expected = [ordered[k - 1].item() for k in (1, 7, 100, 999, 1000)]
        assert [each["operations"]["kth largest"] for each in seen] == [expected] * 2

    def test_random_numbers_are_drawn_for_all(self, seen: list[dict[str, Any]]) -> None:
        # rows 0 … 4 of ten numbers each: two for process 0, three for process 1
        assert [each["operations"]["drawn"] for each in seen] == [[0.0, 10.0], [20.0, 30.0, 40.0]]

    def test_what_process_0_computes_alone_goes_to_all(self, seen: list[dict[str, Any]]) -> None:
        assert [each["operations"]["same"] for each in seen] == [[pytest.approx(0.1), 1.0]] * 2

    def test_words(self, seen: list[dict[str, Any]]) -> None:
        assert "heard" not in seen[0]
        assert seen[1]["heard"] == "ready"

    def test_one_process_does_nothing(self) -> None:
        with joined() as world:
            found = operations(world)
        assert type(world) is World
        assert found["share"] == [0, 6]
        assert found["mean"] == [1.0, 3.0]
        assert found["gather.grad"] == [[2.0], [0.0]]
        assert found["any"] == [True, False, False]
        assert found["drawn"] == [0.0, 10.0]
        assert current() is not world
        with pytest.raises(UsageError, match="nobody"):
            world.hear()


@pytest.mark.parametrize("name", TRAININGS)
class TestAgainstOneProcess:
    def test_every_record_is_that_of_one_process(self, folder: Path, seen: list[dict[str, Any]], name: str) -> None:
        one = records(ActivationBuffer(folder / "acts"), **TRAININGS[name])
        assert len(one["records"]) == STEPS
        if name == "plain":  # what has to be global is in use
            assert max(record["aux"] for record in one["records"]) > 0
            assert {record["source"] for record in one["records"]} == {"a/x", "b/y", "all"}
        for ours, theirs in zip(seen[0][name]["records"], one["records"], strict=True):
            for key in ("loss", "aux", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
            for key in ("step", "phase", "source", "lr", "dead_share"):
                assert ours[key] == theirs[key]
            assert (ours["r2"] is None) == (theirs["r2"] is None)
            # The published encoder has a bias before its batch normalisation: its gradient is nothing but rounding,
            # which Adam scales up to a full step. The loss does not see the bias; the running statistics lag behind it.
            for source in () if name == "published" else ours["r2"] or ():
                assert ours["r2"][source] == pytest.approx(theirs["r2"][source], abs=1e-4)
        if name != "published":
            for key, expected in one["weights"].items():
                found = np.array(seen[0][name]["weights"][key], float)
                np.testing.assert_allclose(found, np.array(expected, float), atol=1e-3)

    def test_the_processes_agree_bit_for_bit(self, seen: list[dict[str, Any]], name: str) -> None:
        assert seen[0][name] == seen[1][name]


class TestEnds:
    def test_the_group_is_left(self, seen: list[dict[str, Any]]) -> None:
        assert [each["group left"] for each in seen] == [True, True]

    def test_batches_that_cannot_be_divided_are_refused(self, seen: list[dict[str, Any]]) -> None:
        assert seen[0]["odd batch"].startswith("ConfigError: batches of 33 rows (train.batch_size")
        assert "2 processes" in seen[0]["odd batch"]
        assert seen[1]["odd batch"].endswith("told=True")  # process 0 has said it

    def test_an_interrupt_of_one_stops_all_after_the_same_step(self, folder: Path, seen: list[dict[str, Any]]) -> None:
        assert seen[0]["interrupted"].startswith("KeyboardInterrupt")
        assert "interrupted" in seen[1]["interrupted"]
        assert seen[1]["interrupted"].endswith("told=True")

    def test_resumed_in_the_middle_it_ends_with_the_same_weights(self, seen: list[dict[str, Any]]) -> None:
        for each in seen:
            assert each["resumed"]["records"] == each["plain"]["records"][21:]
            assert each["resumed"]["weights"] == each["plain"]["weights"]

    def test_the_error_of_one_is_what_process_0_says(self, seen: list[dict[str, Any]]) -> None:
        assert seen[0]["raised"].startswith("WorkerError: process 1 of 2 stopped: Failed: no more")
        assert seen[1]["raised"].startswith("WorkerError: process 1 of 2 stopped: Failed: no more")


class TestCommandLine:
    def config(self, folder: Path) -> Path:
        path = put_tiny_run(folder) / "tiny.toml"
        path.write_text(toml(changed(train={"steps": 50, "log_every": 1})))
        return path

    def test_torchrun_trains_what_one_process_does(self, tmp_path: Path) -> None:
        config, folder = self.config(tmp_path), tmp_path / "run"
        nets = tmp_path / "nets.py"
        nets.write_text(nets.read_text() + NOTED)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
        call = [
            *launch,
            *free_ports(1),
            "-m",
            "usae_probe",
            "run",
            str(config),
            "--out",
            str(folder),
            "--json",
        ]
        done = subprocess.run(
            call, env=QUIET, capture_output=True, text=True, timeout=TIMEOUT, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)  # of process 0 alone
        assert list(document["stages"]) == ["harvest", "train", "evaluate", "report"]
        assert done.stderr.count("train: done") == 1
        assert "Warning" not in done.stderr
        assert not (folder / "training-state.safetensors").exists()
        settings = RunConfig.load(config)
        buffer = ActivationBuffer(folder / "buffer")
        # Shards of 4, 18, 20 and 18 images, each process every second, in batches of 16 by two models; a batch of one
        # or two may be a look at the layers.
        batches = [line.split() for line in (tmp_path / "ranks").read_text().splitlines()]
        harvested = {rank: sorted(int(n) for who, n in batches if who == rank and int(n) > 2) for rank in ("0", "1")}
        assert harvested == {"0": [4, 4, 4, 4, 16, 16], "1": [16, 16, 16, 16]}
        Run(settings, tmp_path / "alone").run(("harvest",))
        for file in (tmp_path / "alone" / "buffer").iterdir():
            assert file.read_bytes() == (buffer.path / file.name).read_bytes(), file.name
        one = train(buffer, usae_config=settings.usae, train_config=settings.train)
        two = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert len(one.history) == STEPS
        assert [line["loss"] for line in two] == pytest.approx([record.loss for record in one.history], rel=1e-5)
        assert [line["source"] for line in two] == [record.source for record in one.history]
        for name, value in USAE.load(folder / "usae.safetensors").state_dict().items():
            torch.testing.assert_close(value, one.usae.state_dict()[name], atol=1e-3, rtol=0)

    def test_other_commands_work_in_one_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = self.config(tmp_path), command(monkeypatch, capsys)
        for key, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0"}.items():
            monkeypatch.setenv(key, value)
        refused = run("sweep", str(config))
        assert refused.status == 2
        assert "works in one process" in refused.err
        monkeypatch.setenv("RANK", "1")
        assert run("sweep", str(config)) == (1, "", "")


NOTED = """
plain = build

def build(**options):
    net = plain(**options)
    rank = os.environ.get("RANK")
    if rank:
        net.register_forward_pre_hook(lambda _, x: print(rank, len(x[0]), file=open("ranks", "a")))
    return net
"""
"""Notes in which process a network runs."""
