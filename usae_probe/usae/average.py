"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .model import USAE


class Average:
    """Exponential moving average of a module's parameters: a ← a + (1 − d_t) (p − a), d_t = min(decay, (1+t)/(10+t)).

    The smaller decay of the first steps makes it forget where it began. Buffers are not averaged.

    Args:
        module: the module; its parameters stay as they are until `applied`.
        decay: d, above 0 and below 1.
        usae: the USAE whose decoder is held to its norm, where the module has its parameters.
    """

    def __init__(self, module: nn.Module, decay: float, usae: USAE) -> None:
        self.decay, self._usae = decay, usae
        self._parameters = dict(module.named_parameters())
        self.values = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the parameters after a step, counted from 1."""
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module have the averaged parameters while the block runs; decoder rows have norm √M then too."""
        held = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            self.put()
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = held[name]

    def put(self) -> None:
        """Give the module the averaged parameters for good."""
        for name, parameter in self._parameters.items():
            decoder = parameter is self._usae.W_dec  # renormalised in a copy: the average goes on from what it was
            parameter.data = self.values[name].clone() if decoder else self.values[name]
            if decoder:
                self._usae.renormalise_decoder()

    def tensors(self) -> dict[str, Tensor]:
        """Return its state, by parameter."""
        return self.values

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state that `tensors` gave."""
        for name, value in self.values.items():
            value.copy_(tensors[name])
