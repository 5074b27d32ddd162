"""What each of two processes does for tests/test_distributed.py: `distributed_worker.py FOLDER PORT …`, RANK set.

It writes what it saw to FOLDER/<rank>.json; nothing is checked here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import usae_probe.usae.state as state_module
from usae_probe.buffer import ActivationBuffer
from usae_probe.usae import StepRecord, train
from usae_probe.usae.distributed import joined
from usae_probe.world import World, current

STEPS = 50
BASE: dict[str, Any] = {
    "n_latents": 96,
    "k": 3,
    "steps": STEPS,
    "batch_size": 32,
    "lr": 0.01,
    "log_every": 1,
    "seed": 1,
}
BASE |= {"dead_after": 3, "aux_k": 8, "validate_every": 10}
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"source": "all", "keep": "best", "ema": 0.9},
    "shuffled": {"pairing": "shuffled", "update": "source"},
    "batchtopk": {"sparsity": "batchtopk", "input_noise": 0.1, "latent_dropout": 0.1},
    "jumprelu": {"sparsity": "jumprelu", "contrastive_coef": 0.1},
    "published": {"recipe": "published", "align_warmup": 0.0, "aux_k": 0, "lr": 3e-3},
}


class Failed(Exception):
    pass


def joined_at(port: str) -> AbstractContextManager[World]:
    os.environ["MASTER_PORT"] = port  # one process goes through several worlds here
    return joined()


def records(buffer: ActivationBuffer, world: World | None = None, **settings: Any) -> dict[str, Any]:
    """Train and return every record, and the weights as nested lists."""
    run = train(buffer, world=world, **BASE | settings)
    weights = {name: tensor.tolist() for name, tensor in run.usae.state_dict().items()}
    return {"records": [asdict(record) for record in run.history], "weights": weights}


def operations(world: World) -> dict[str, Any]:
    """Do each operation on numbers that differ between the processes."""
    rank, seen = world.rank, {}
    seen["share"] = [world.share(6).start, world.share(6).stop]
    leaf = torch.tensor([1.0 + rank, 3.0], dtype=torch.float64, requires_grad=True)
    mean = world.mean(leaf)
    (mean.square().sum() * (1.0 + rank)).backward()  # each process makes something else of the mean
    seen["mean"], seen["mean.grad"] = mean.tolist(), leaf.grad.tolist()
    leaf = torch.tensor([[1.0 + rank], [5.0 * rank]], dtype=torch.float64, requires_grad=True)
    gathered = world.gather(leaf)
    (gathered.square().sum() * (1.0 + rank)).backward()
    seen["gather"], seen["gather.grad"] = gathered.tolist(), leaf.grad.tolist()
    seen["any"] = world.any(torch.tensor([rank == 0, rank == 1, False])).tolist()
    values = [torch.randn(20, 25, generator=torch.Generator().manual_seed(seed)) - seed for seed in range(world.size)]
    ks = [k for k in (1, 7, 100, 999, 1000) if k <= 500 * world.size]
    seen["kth largest"] = [world.kth_largest(values[rank], k).item() for k in ks]
    seen["anyone"] = [world.anyone(rank == 1), world.anyone(False)]
    seen["drawn"] = world.drawn(lambda n: torch.arange(10.0 * n).reshape(n, 10), 2 + rank)[:, 0].tolist()
    seen["same"] = world.same(lambda: torch.tensor([0.1 + rank, current().size]), (2,)).tolist()
    return seen


def outcome(
    port: str, buffer: ActivationBuffer, folder: Path, follow: Callable[[StepRecord], None], **more: Any
) -> str:
    """Train in a world of its own until it ends, and return how; the state is in FOLDER/state-PORT."""
    try:
        with joined_at(port) as world:
            train(buffer, world=world, progress=follow, resume=folder / f"state-{port}", **BASE | more)
    except BaseException as error:
        return f"{type(error).__name__}: {error} told={getattr(error, 'told', None)}"
    return "finished"


def stopping(step: int, stop: Callable[[], None], rank: int | None = None) -> Callable[[StepRecord], None]:
    """Return a callback that stops one process (or all of them) after a step."""

    def follow(record: StepRecord) -> None:
        if record.step > step and rank in (None, int(os.environ["RANK"])):
            stop()

    return follow


def fail() -> None:
    raise Failed("no more")


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(110, exit=True)  # a hang says where
    state_module.SECONDS = 0.0
    rank, seen = int(os.environ["RANK"]), {}
    buffer = ActivationBuffer(folder / "acts")
    with joined_at(ports[0]) as world:
        if world.main:
            world.tell("ready")
        else:
            seen["heard"] = world.hear()
        world.device("cpu")
        seen["operations"] = operations(world)
        seen |= {name: records(buffer, world, **settings) for name, settings in TRAININGS.items()}
    seen["group left"] = not torch.distributed.is_initialized()
    seen["odd batch"] = outcome(ports[1], buffer, folder, lambda _: None, batch_size=33)
    interrupt = stopping(20, lambda: signal.raise_signal(signal.SIGINT), rank=1)
    seen["interrupted"] = outcome(ports[2], buffer, folder, interrupt)
    with joined_at(ports[3]) as world:
        seen["resumed"] = records(buffer, world, resume=folder / f"state-{ports[2]}")
    seen["raised"] = outcome(ports[4], buffer, folder, stopping(3, fail, rank=1))
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
