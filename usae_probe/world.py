"""The processes that work together, as the harvest, the loop, the losses and the sparsity see them; their threads.

In a single process a `World` does nothing. In several (`usae_probe.usae.distributed`) it makes every figure that is
about the whole batch one of the whole batch: then gradients, averaged over the processes, are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import UsageError


class World:
    """The processes that work together; this class is one process alone, which leaves everything as it is.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def main(self) -> bool:
        """Whether this is process 0, the only one that writes and shows anything."""
        return self.rank == 0

    def device(self, asked: str) -> torch.device:
        """Return the device of this process for `train.device`, and meet the other processes there.

        Raises:
            ConfigError: when processes would have to share a device.
        """
        return torch.device("cuda" if asked == "auto" and torch.cuda.is_available() else asked.replace("auto", "cpu"))

    def share(self, n: int) -> slice:
        """Return which of a batch's n rows are this process's: a contiguous part, equal for all.

        Raises:
            ConfigError: when n cannot be divided equally; the mean over processes would not be that over rows.
        """
        return slice(0, n)

    def parallel(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that the gradients of its parameters are averaged over all processes."""
        return module

    def mean(self, t: Tensor) -> Tensor:
        """Return the mean over the processes of tensors of one shape, differentiable.

        Its gradient is the mean of the processes' gradients; averaged again by `parallel`, that is exact for whatever a
        loss makes of the mean, also where it is no linear function.
        """
        return t

    def any(self, mask: Tensor) -> Tensor:
        """Return where a boolean tensor is true in some process."""
        return mask

    def anyone(self, flag: bool) -> bool:
        """Return whether a flag is up in some process."""
        return flag

    def gather(self, t: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the whole batch, differentiable."""
        return t

    def kth_largest(self, values: Tensor, k: int) -> Tensor:
        """Return the k-th largest of all processes' values, exactly, as a scalar without a gradient.

        Args:
            values: this process's, of any shape; as many in every process.
            k: from 1 to the number of values in all processes.
        """
        return torch.topk(values.detach().flatten(), k, sorted=False).values.min()

    def drawn(self, draw: Callable[[int], Tensor], n: int) -> Tensor:
        """Return this process's n of the random numbers that are drawn for the whole batch.

        Args:
            draw: gives so many numbers (or rows of them), the same in every process.
            n: how many of them are this process's; the processes may have different numbers.
        """
        return draw(self.size * n)[self.rank * n : (self.rank + 1) * n]

    def same(self, compute: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return what process 0 computes, to all: a figure that decides something must not differ in its last bit.

        Args:
            compute: called in process 0 alone, in a world of its own; returns float64 numbers on the CPU.
            shape: of what it returns.
        """
        return compute()

    def demand_same(self, what: str, number: int) -> None:
        """Check that all processes have the same number.

        Raises:
            WorkerError: in all of them, when one has another.
        """

    def tell(self, word: str) -> None:
        """Let the other processes, which wait in `hear`, know what comes next."""

    def hear(self) -> str:
        """Wait, as long as it takes, for the next word of process 0.

        Raises:
            WorkerError: when process 0 has failed or gone.
        """
        raise UsageError("process 0 has nobody to listen to: it is the one that tells")

    def meet(self) -> None:
        """Wait, as long as it takes, until all processes have come here.

        Raises:
            WorkerError: when one of them has failed or gone.
        """

    def model_device(self, asked: str) -> str:
        """Return the device of this process for a model that is asked for on `asked`: with several GPUs, its own."""
        return asked

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Make this the world that `current` gives to losses and sparsity, while the block runs."""
        global _current
        before, _current = _current, self
        try:
            yield
        finally:
            _current = before


_current = World()


def current() -> World:
    """Return the world in which a loss is being computed: one process, unless `at_work` says otherwise."""
    return _current


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in this process.

    Bits can depend on the number of threads; and in very small networks they only wait for each other, for minutes on a
    busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
