"""Training in several processes (torchrun): each has a share of every batch, and together they do what one would."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, WorkerError
from ..world import World
from .failures import is_lost, spelled

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in training before it gives up."""
_LOOK, _LAST_WORDS = 0.1, 2.0  # seconds between looks for a word; and for those of a process that has failed
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ERROR, _SAID = "error", "said"
_AGAIN = "the same command goes on from the last state"


@contextmanager
def joined() -> Iterator[World]:
    """Give the world of the processes that torchrun started, or of this process alone if it was started alone.

    How it was started is read from the environment: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`.

    Raises:
        WorkerError: when another process failed; in processes other than 0 also for their own errors, marked as `told`
            when process 0 says them.

    Example:
        >>> with joined() as world:  # doctest: +SKIP
        ...     run = train(buffer, world=world, steps=1000)
    """
    if not all(os.environ.get(key) for key in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield World()
        return
    world = Processes()
    try:
        yield world
    except BaseException as error:
        instead = world.failed(error)
        if instead is error:
            raise
        raise instead from error
    world.leave()


class Processes(World):
    """Several processes, started by torchrun: gloo between CPUs, nccl between GPUs.

    They meet in two places: a store of words from the start, where waiting costs nothing and may last as long as a
    harvest does; and from `device` on a process group, in which all have to keep step.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        store, _, _ = next(self._dist.rendezvous("env://", self.rank, self.size, timeout=TIMEOUT))
        self._store = self._dist.PrefixStore("usae-probe", store)
        self._words = self._met = 0

    def device(self, asked: str) -> torch.device:
        """Return `cpu`, or the GPU with this process's number on its machine; joins the process group."""
        device = self._own_device(asked)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._at = device
        if not self._dist.is_initialized():
            self._store.add("met", 1)
            self._wait(lambda: self._store.add("met", 0) == self.size)
            self._dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=self._dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
            self.any(torch.zeros(1, device=device))  # one that left before another is connected would leave it waiting
        return device

    def _own_device(self, asked: str) -> torch.device:
        if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if asked not in ("auto", "cuda"):
            raise ConfigError(
                f"train.device = '{asked}' is one device for {self.local_size} processes on this machine",
                hint="give auto, cuda or cpu: every process then takes its own",
            )
        if self.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"{self.local_size} processes on a machine with {torch.cuda.device_count()} GPUs: each needs its own",
                hint=f"--nproc-per-node {max(1, torch.cuda.device_count())}, or train.device = 'cpu'",
            )
        return torch.device("cuda", self.local_rank)

    def share(self, n: int) -> slice:
        """Return rows rank · n / size to (rank + 1) · n / size."""
        if n % self.size:
            lower = n - n % self.size
            raise ConfigError(
                f"batches of {n} rows (train.batch_size, or all training rows when there are fewer) cannot be divided "
                f"equally among {self.size} processes",
                hint=f"choose a batch_size of {f'{lower} or ' if lower else ''}{lower + self.size}, or another number "
                "of processes",
            )
        own = n // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def parallel(self, module: nn.Module) -> nn.Module:
        """Wrap in DistributedDataParallel; in a step with one source the encoders of the other sites are unused."""
        return nn.parallel.DistributedDataParallel(_Spared(module), find_unused_parameters=True)

    def mean(self, t: Tensor) -> Tensor:
        """All-reduce; its own adjoint."""
        mean: Tensor = _Mean.apply(t, self)
        return mean

    def any(self, mask: Tensor) -> Tensor:
        """All-reduce by maximum."""
        anywhere = mask.to(torch.uint8)
        self._dist.all_reduce(anywhere, self._dist.ReduceOp.MAX)
        return anywhere.bool()

    def anyone(self, flag: bool) -> bool:
        """All-reduce by maximum."""
        return bool(self.any(torch.tensor([flag], device=self._at)))

    def gather(self, t: Tensor) -> Tensor:
        """All-gather in the order of ranks, which is that of the shares."""
        rows: Tensor = _Gather.apply(t, self)
        return rows

    def kth_largest(self, values: Tensor, k: int) -> Tensor:
        """Each process's ⌈k / size⌉-th largest bound it from both sides; only what lies between them is gathered."""
        values = values.detach().flatten()
        bounds = self.collected(torch.topk(values, -(-k // self.size), sorted=False).values.min().reshape(1))
        low, high = bounds.min(), bounds.max()
        if k == 1:
            return high
        between = values[(values >= low) & (values <= high)]
        counts = self.collected(torch.stack([(values > high).sum(), torch.tensor(len(between), device=values.device)]))
        above, longest = int(counts[0::2].sum()), int(counts[1::2].max())
        padded = nn.functional.pad(between, (0, longest - len(between)), value=-torch.inf)
        return torch.topk(self.collected(padded), k - above, sorted=False).values.min()

    def drawn(self, draw: Callable[[int], Tensor], n: int) -> Tensor:
        """Draw for all processes and keep the own part."""
        counts = self.collected(torch.tensor([n], device=self._at)).tolist()
        before = sum(counts[: self.rank])
        return draw(sum(counts))[before : before + n]

    def same(self, compute: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """Compute in process 0 and broadcast."""
        value = torch.zeros(shape, dtype=torch.float64, device=self._at)
        if self.main:
            with World().at_work():
                value.copy_(compute())
        self._dist.broadcast(value, 0)
        return value.cpu()

    def demand_same(self, what: str, number: int) -> None:
        """Gather and compare."""
        numbers = self.collected(torch.tensor([number], device=self._at)).tolist()
        if len(set(numbers)) > 1:
            raise WorkerError(
                f"{what} is not the same in all processes: {', '.join(map(str, numbers))}",
                hint="the run folder has to be the same one on all machines",
            )

    def tell(self, word: str) -> None:
        """Put a word where `hear` looks for it."""
        self._words += 1
        self._store.set(f"word/{self._words}", word)

    def hear(self) -> str:
        """Look for the next word again and again: unlike a collective, that may take as long as it likes."""
        self._words += 1
        self._wait(lambda: self._store.check([f"word/{self._words}"]))
        word: str = self._store.get(f"word/{self._words}").decode()
        return word

    def _wait(self, over: Callable[[], bool]) -> None:
        while not over():
            if self._store.check([_ERROR]):
                raise WorkerError(self._first_error(), told=not self.main)
            time.sleep(_LOOK)

    def meet(self) -> None:
        """Count who has come, and look again and again."""
        self._met += 1
        self._store.add(f"met/{self._met}", 1)
        self._wait(lambda: self._store.add(f"met/{self._met}", 0) == self.size)

    def model_device(self, asked: str) -> str:
        """Return `cuda:N`, by this process's number on its machine, for `cuda`, and for `auto` where there are GPUs."""
        if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()):
            return f"cuda:{self.local_rank % max(1, torch.cuda.device_count())}"
        return asked

    def leave(self) -> None:
        """Leave the process group; process 0 stays until all have left, because the words may be kept by it."""
        if self._dist.is_initialized():
            self._dist.destroy_process_group()
        self._part()

    def _part(self) -> None:
        self._store.add("left", 1)
        until = time.monotonic() + _LAST_WORDS
        while self.main and self._store.add("left", 0) < self.size and time.monotonic() < until:
            time.sleep(_LOOK)

    def failed(self, error: BaseException) -> BaseException:
        """Leave after an error, and return what to raise instead of it.

        The first process to fail writes down why, and process 0 says that; what follows from it in the others (lost
        connections) says nobody. A process speaks for itself only when process 0 is past it.
        """
        mine = spelled(error)
        try:
            self._store.compare_set(_ERROR, "", f"{self.rank} {mine}")
            first = self._first_error()
            if self._dist.is_initialized() and self._dist.get_backend() == "gloo":  # nccl may wait for the others here
                clear_frames(error.__traceback__)
                gc.collect()
                self._dist.destroy_process_group()  # the last to hold the connections: now the others notice
            if self.main:
                self._store.set(_SAID, "")
                self._part()
                own = isinstance(error, KeyboardInterrupt) or (first.endswith(f": {mine}") and not is_lost(error))
                return error if own else WorkerError(first, hint=_AGAIN)
            until = time.monotonic() + _LAST_WORDS
            while not (told := bool(self._store.check([_SAID]))) and time.monotonic() < until:
                time.sleep(_LOOK)
            self._part()
            return WorkerError(first, hint=_AGAIN, told=told)
        except RuntimeError:  # the store went with process 0, which was killed, or left after saying its own error
            return WorkerError(f"process {self.rank} of {self.size} lost process 0: {mine}", hint=_AGAIN)

    def _first_error(self) -> str:
        rank, _, text = self._store.get(_ERROR).decode().partition(" ")
        return f"process {rank} of {self.size} stopped: {text}"

    def reduced(self, t: Tensor) -> Tensor:
        """Return the mean over processes of detached tensors."""
        total = t.detach().clone()
        self._dist.all_reduce(total)
        return total / self.size

    def collected(self, t: Tensor) -> Tensor:
        """Return the processes' detached tensors of one shape, one after the other."""
        pieces = [torch.empty_like(t) for _ in range(self.size)]
        self._dist.all_gather(pieces, t.detach().contiguous())
        return torch.cat(pieces)


class _Spared(nn.Module):
    """A module with a parameter that no step uses.

    DistributedDataParallel warns, in C++ past Python's filters, at the first step that uses all: but others do not.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.unused = nn.Parameter(next(module.parameters()).new_zeros(1))

    def forward(self, *inputs: Any) -> Any:
        """Do what the module does."""
        return self.module(*inputs)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, world: Processes) -> Tensor:
        ctx.world = world
        return world.reduced(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.world.reduced(grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, world: Processes) -> Tensor:
        ctx.world, ctx.n = world, len(t)
        return world.collected(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        first = ctx.world.rank * ctx.n
        return ctx.world.reduced(grad)[first : first + ctx.n] * ctx.world.size, None
