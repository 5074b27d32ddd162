"""The steps of a training, and its state between two of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..buffer import ActivationBuffer, OnlineBuffer
from ..config import TrainConfig
from ..errors import NonFiniteError
from ..world import World
from .average import Average
from .draws import Mispairing
from .losses import Objective, StepLoss
from .model import USAE
from .optimiser import ConstrainedAdam
from .published import PublishedAdamW, PublishedObjective, published_rate
from .reconstruction import Matrix
from .records import StepRecord
from .schedule import learning_rate, phase_and_source, validates, warn_without_stop
from .start import engine
from .state import check_finite
from .validation import Watch, validation_r2


class Training:
    """A training of `usae` in place, a record per step; step t depends on seed and t alone.

    Args:
        usae: the model, on its device.
        buffer: whose training rows it learns from.
        how: the settings.
        world: the processes that train together; default: this one alone.
        labels: [images of the source] whole numbers, for `pairing = "label"`.

    Attributes:
        step: steps done; `steps` those that were asked for.
        last: with `keep = "best"`, once all is over, the USAE of the last step.

    Raises:
        ConfigError: when the settings do not fit the model or the buffer.
    """

    def __init__(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        how: TrainConfig,
        world: World | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        self.usae, self.buffer, self.how, self.world = usae, buffer, how, world or World()
        self._mispairing = Mispairing(how, labels)
        if not isinstance(buffer, OnlineBuffer):
            buffer.demand_all_rows()
        self._share = self.world.share(min(how.batch_size, buffer.n_rows("train")))
        self.epoch = buffer.steps_per_epoch("train", how.batch_size)
        self.steps, self.step = how.n_steps(self.epoch), 0
        self.objective: Objective | PublishedObjective
        self.optimiser: ConstrainedAdam | PublishedAdamW
        self.objective, self.optimiser = engine(usae, how, buffer.n_rows("train"))
        self._parallel = self.world.parallel(self.objective)
        self.silent = torch.zeros(usae.n_latents, dtype=torch.long, device=usae.W_dec.device)
        self.watch = Watch(how, buffer)
        warn_without_stop(how, self.steps, joint=usae.sparsity.joint)
        self.average = Average(self.objective, how.ema, usae) if how.ema else None
        self.last: USAE | None = None
        self._last_good: Callable[[], str] = lambda: ""
        self._before, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """What it has taken until now, in all its parts if it was stopped between."""
        return self._before + time.perf_counter() - self._since

    def records(self, last_good: Callable[[], str] | None = None) -> Iterator[StepRecord]:
        """Do the steps that are left; at the end, not before, the USAE has the weights that `keep` asks for.

        Args:
            last_good: says where the last state that was kept is, for the message of what stops a training.

        Raises:
            NonFiniteError: when a loss, a gradient or a weight is not finite.
        """
        self._last_good = last_good or (lambda: "no state was kept: give resume, a file, to keep one")
        self.world.demand_same("the step that training goes on from", self.step)
        for step, rows in zip(range(self.step + 1, self.steps + 1), self._batches(), strict=False):
            if self.watch.stops:
                break
            yield self._do(step, rows)
        self._finish()

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield this process's share of the rows of every batch that is left."""
        how, share = self.how, self._share
        mispaired = how.pairing != "image"  # rows are paired at random across the whole batch
        batches = self.buffer.batches(
            "train",
            how.batch_size,
            seed=how.seed,
            start_step=self.step,
            sites=list(self.usae.sites),
            share=slice(None) if mispaired else share,
            workers=0 if isinstance(self.buffer, OnlineBuffer) else how.workers,  # it would wait for rows to come
        )
        for step, rows in enumerate(batches, self.step + 1):
            yield self._mispairing.of(rows, step, share) if mispaired else dict(rows.values)

    def _do(self, step: int, rows: Mapping[str, np.ndarray]) -> StepRecord:
        how, usae = self.how, self.usae
        phase, source = phase_and_source(usae.sites, how, step, self.steps, joint=usae.sparsity.joint)
        lr = self._rate(step)
        x = _normalised(usae, rows)
        self._train_mode(step)
        self.optimiser.zero_grad()
        with self.world.at_work():
            own: StepLoss = self._parallel(x, phase, source, self.silent >= how.dead_after, step)
            own.total.backward()  # type: ignore[no-untyped-call]
        loss = own.of_all(self.world)
        norm = self.optimiser.step(lr, self.objective.updated(phase, source))
        usae.eval()  # whoever looks at it between two steps encodes as inference does
        self.silent = torch.where(loss.fired, 0, self.silent + 1)
        figures = self._figures(loss, norm)
        self._check_finite(figures, step, source)
        if self.average:
            self.average.follow(step)
        self.step = step
        r2 = None
        if validates(step, self.steps, how):
            r2 = self._validate(step, counts=phase == "main" or usae.sparsity.joint or step == self.steps)
        return StepRecord(
            step=step,
            steps=self.steps,
            phase=phase,
            source=source,
            lr=lr,
            r2=r2,
            stopped=self.watch.stops and step < self.steps,
            **figures,
        )

    def _rate(self, step: int) -> float:
        if self.how.recipe == "published":
            return published_rate(step, self.steps, self.epoch, self.how)
        return learning_rate(step, self.steps, self.how)

    def _train_mode(self, step: int) -> None:
        self.objective.train()
        self.usae.train()
        self.usae.sparsity.anneal(step / self.steps)

    def _figures(self, loss: StepLoss, norm: Tensor | float) -> dict[str, Any]:
        """Return the step's figures as numbers: one transfer, because on a GPU each waits for all that was begun."""
        terms: list[Tensor | float] = [loss.total.detach(), loss.aux, norm, loss.l0, loss.penalty]
        terms += [(self.silent >= self.how.dead_after).double().mean()]
        terms += [0.0 if loss.contrastive is None else loss.contrastive]
        device = self.silent.device
        scalars = torch.stack([torch.as_tensor(term, dtype=torch.float64, device=device) for term in terms])
        numbers = torch.cat([scalars, loss.per_site.double()]).tolist()
        total, aux, grad_norm, l0, penalty, dead, contrastive, *per_site = numbers
        return {
            "loss": total,
            "losses": dict(zip(self.usae.sites, per_site, strict=True)),
            "aux": aux,
            "grad_norm": grad_norm,
            "dead_share": dead,
            "l0": l0,
            "penalty": penalty,
            "contrastive": None if loss.contrastive is None else contrastive,
        }

    def _check_finite(self, figures: Mapping[str, Any], step: int, source: str) -> None:
        hint = f"lower train.lr; {self._last_good()}"
        if not math.isfinite(figures["loss"]):
            bad = [site for site, value in figures["losses"].items() if not math.isfinite(value)]
            bad = bad or [name for name in ("aux", "contrastive") if not math.isfinite(figures[name] or 0.0)]
            raise NonFiniteError(
                f"the loss is not finite at step {step} (source {source}, targets {', '.join(bad) or 'all together'})",
                hint=hint,
            )
        if not math.isfinite(figures["grad_norm"]):
            raise NonFiniteError(f"the gradient is not finite at step {step} (source {source})", hint=hint)

    def _validate(self, step: int, *, counts: bool) -> Matrix | None:
        with self.average.applied() if self.average else nullcontext():
            self.objective.settle()
            self.usae.eval()
            with self.world.at_work():
                r2 = validation_r2(self.usae, self.buffer)
            if r2 and counts:
                self.watch.saw(step, r2, self.usae)
        return r2

    def _finish(self) -> None:
        """Give the USAE the weights that it is to have, in evaluation mode."""
        if self.average:
            self.average.put()
        self.objective.settle()
        self.objective.eval()
        self.usae.eval()
        self.usae.sparsity.anneal(1.0)
        check_finite(self.usae.state_dict(), self.step, self._last_good())
        if self.watch.weights:
            self.last = deepcopy(self.usae)
            self.usae.load_state_dict(self.watch.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the next steps depend on, by name."""
        parts = {
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.tensors(),
            "average": self.average.values if self.average else {},
            "best": self.watch.weights,
        }
        named = {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
        return named | {"silent": self.silent}

    def numbers(self) -> dict[str, Any]:
        """Return the rest of what they depend on, for JSON, and the seconds until now."""
        return {"step": self.step, "seconds": self.seconds, **self.watch.numbers()}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from a state that `tensors` and `numbers` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = value
        self.objective.load_state_dict(parts["objective"])
        self.optimiser.load(parts.get("optimiser", {}))
        if self.average:
            self.average.load(parts["average"])
        self.silent.copy_(tensors["silent"])
        self.watch.load(numbers, parts.get("best", {}))
        self.step, self._before = numbers["step"], numbers["seconds"]


def _normalised(usae: USAE, rows: Mapping[str, np.ndarray]) -> Tensor:
    device = usae.W_dec.device
    return torch.cat([usae.normalise(torch.from_numpy(rows[site]).to(device), site) for site in usae.sites], dim=1)
