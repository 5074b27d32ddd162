"""Training: records are yielded, nothing is printed, and no model's name is known here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..buffer import ActivationBuffer, Rows
from ..config import TrainConfig, UsaeConfig, settled
from ..errors import BufferIntegrityError, NonFiniteError
from .losses import Objective, Phase, StepLoss
from .model import USAE
from .optimiser import ConstrainedAdam
from .reconstruction import Matrix, ReconstructionSums
from .state import TrainingState

VALIDATION_ROWS = 2048
_SOURCE, _PAIRING = 1, 2  # streams of random numbers, so that one never shifts another


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step.

    Attributes:
        step: number of this step, from 1; `steps` is the last.
        phase: `align` (one support for all sites) or `main`.
        source: site whose code was decoded; `all` for several.
        lr: learning rate of the step.
        loss: what was minimised; `losses` normalised MSE per target site; `aux` the auxiliary term, unweighted.
        grad_norm: before clipping.
        dead_share: share of latents that have not fired for `dead_after` steps.
        r2: R² on validation rows, where it was measured.
    """

    step: int
    steps: int
    phase: Phase
    source: str
    lr: float
    loss: float
    losses: dict[str, float]
    aux: float
    grad_norm: float
    dead_share: float
    r2: Matrix | None = None

    def is_kept(self, how: TrainConfig) -> bool:
        """Return whether the history keeps this record: every `log_every`-th, the last, and those with R²."""
        return self.step % how.log_every == 0 or self.step == self.steps or self.r2 is not None


class TrainResult(NamedTuple):
    """A trained USAE, the records kept of its training, and how long it took."""

    usae: USAE
    history: list[StepRecord]
    seconds: float


def train(
    buffer: ActivationBuffer,
    *,
    sites: list[str] | None = None,
    usae_config: UsaeConfig | None = None,
    train_config: TrainConfig | None = None,
    progress: Callable[[StepRecord], None] | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a USAE from a buffer's training rows.

    Args:
        buffer: row-paired activations.
        sites: which of its sites; default: all. One site trains an independent SAE.
        usae_config, train_config: settings as read from a config file.
        progress: called with every step's record.
        resume: file to keep the training's state in, about once a minute. If it holds the state of this very training
            (same buffer, sites and settings), training goes on from there and ends with the same weights, on CPU bit
            for bit, as if it had not been stopped; the records are then those from there on. The caller removes it.
        settings: or single settings by the config's names: `n_latents`, `k`, `epochs`, `steps`, `batch_size`, `lr`, …

    Returns:
        the USAE, the records of every `log_every`-th step, of the last and of those with a validation R², and the
        seconds spent.

    Raises:
        ConfigError: for an unknown setting or a value out of range.
        NonFiniteError: when the loss is not finite, naming step and site.

    Example:
        `run = up.train(buffer, n_latents=2042, k=64, epochs=100)`
    """
    shape, how = settled((usae_config or UsaeConfig(), train_config or TrainConfig()), settings)
    started = time.perf_counter()
    usae = usae_for(buffer, shape, how, sites=sites)
    history = []
    state = TrainingState(Path(resume), _depends_on(buffer, usae, shape, how)) if resume else None
    for record in train_steps(usae, buffer, how, state):
        if record.is_kept(how):
            history.append(record)
        if progress:
            progress(record)
    return TrainResult(usae, history, time.perf_counter() - started)


def usae_for(buffer: ActivationBuffer, shape: UsaeConfig, how: TrainConfig, *, sites: list[str] | None = None) -> USAE:
    """Make an untrained USAE for a buffer: its sites, and mean and scale of its training rows.

    The scale makes E‖x̃‖² = d_in: s² = Σ_d variance_d / d_in.

    Raises:
        BufferIntegrityError: when a site is not in the buffer or has no spread.
    """
    chosen = list(buffer.sites) if sites is None else sites
    normalisation = {}
    for site in chosen:
        if site not in buffer.d_in:
            raise BufferIntegrityError(f"the buffer has no site '{site}'", hint=f"sites: {', '.join(buffer.sites)}")
        moments = buffer.moments(site)
        scale = math.sqrt(float(np.mean(moments.variance)))
        if not scale > 0:
            raise BufferIntegrityError(
                f"site '{site}' is constant over the {moments.n} training rows", hint="choose another layer"
            )
        normalisation[site] = (torch.from_numpy(moments.mean), scale)
    device = "cuda" if how.device == "auto" and torch.cuda.is_available() else how.device.replace("auto", "cpu")
    dims = {site: buffer.d_in[site] for site in chosen}
    grid = next((buffer.specs[site].grid for site in chosen if buffer.specs[site].policy == "patch"), None)
    usae = USAE(
        dims, shape.n_latents, shape.k, normalisation=normalisation, kernel=how.kernel, seed=how.seed, grid=grid
    )
    return usae.to(device)


def train_steps(
    usae: USAE, buffer: ActivationBuffer, how: TrainConfig, state: TrainingState | None = None
) -> Iterator[StepRecord]:
    """Train `usae` in place and yield a record per step; step t depends on seed and t alone.

    Raises:
        NonFiniteError: when the loss is not finite.
    """
    sites = list(usae.sites)
    steps = how.n_steps(buffer.steps_per_epoch("train", how.batch_size))
    aligned = round(how.align_warmup * steps) if len(sites) > 1 else 0
    objective, optimiser = Objective(usae, how), ConstrainedAdam(usae, how.grad_clip)
    silent = torch.zeros(usae.n_latents, dtype=torch.long, device=usae.W_dec.device)
    done = state.restore(usae, optimiser.adam, silent) if state else 0
    batches = buffer.batches("train", how.batch_size, seed=how.seed, start_step=done, sites=sites)
    for step, rows in zip(range(done + 1, steps + 1), batches, strict=False):
        x = _normalised(usae, _paired(rows, how, step))
        optimiser.zero_grad()
        phase: Phase = "align" if step <= aligned else "main"
        source = "all" if phase == "align" else _source(sites, how, step)
        loss: StepLoss = objective(x, phase, source, silent >= how.dead_after)
        _check_finite(loss, usae, step, source)
        loss.total.backward()  # type: ignore[no-untyped-call]
        lr = learning_rate(step, steps, how)
        norm = optimiser.step(lr)
        silent = torch.where(loss.fired, 0, silent + 1)
        yield StepRecord(
            step=step,
            steps=steps,
            phase=phase,
            source=source,
            lr=lr,
            loss=float(loss.total.detach()),
            losses=dict(zip(sites, loss.per_site.tolist(), strict=True)),
            aux=float(loss.aux),
            grad_norm=norm,
            dead_share=float((silent >= how.dead_after).float().mean()),
            r2=_validation_r2(usae, buffer) if _validates(step, steps, how) else None,
        )
        if state:  # after the record went out: a state never runs ahead of the history
            state.keep(usae, optimiser.adam, silent, step)


def learning_rate(step: int, steps: int, how: TrainConfig) -> float:
    """Return the learning rate of step 1 … steps: linear warm-up, then a cosine down to lr · lr_final.

    One global step count drives it, whichever site is the source.
    """
    rising = round(how.lr_warmup * steps)
    if step <= rising:
        return how.lr * step / rising
    along = (step - rising) / max(1, steps - rising)
    floor = how.lr * how.lr_final
    return floor + (how.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * along))


def _depends_on(buffer: ActivationBuffer, usae: USAE, shape: UsaeConfig, how: TrainConfig) -> dict[str, Any]:
    settings = how.model_dump(exclude={"log_every", "validate_every"})
    return {"buffer": buffer.identity, "sites": usae.sites, "usae": shape.model_dump(), "train": settings}


def _normalised(usae: USAE, rows: Mapping[str, np.ndarray]) -> Tensor:
    device = usae.W_dec.device
    return torch.cat([usae.normalise(torch.from_numpy(rows[site]).to(device), site) for site in usae.sites], dim=1)


def _paired(rows: Rows, how: TrainConfig, step: int) -> dict[str, np.ndarray]:
    if how.pairing == "image":
        return dict(rows.values)
    draw = np.random.default_rng((how.seed, _PAIRING, step))
    return {site: values[draw.permutation(len(values))] for site, values in rows.values.items()}


def _source(sites: list[str], how: TrainConfig, step: int) -> str:
    if how.source == "all":
        return "all"
    return sites[int(np.random.default_rng((how.seed, _SOURCE, step)).integers(len(sites)))]


def _check_finite(loss: StepLoss, usae: USAE, step: int, source: str) -> None:
    if torch.isfinite(loss.total):
        return
    bad = [site for site, value in zip(usae.sites, loss.per_site.tolist(), strict=True) if not math.isfinite(value)]
    raise NonFiniteError(
        f"the loss is not finite at step {step} (source {source}, targets {', '.join(bad) or 'auxiliary'})",
        hint="lower train.lr",
    )


def _validates(step: int, steps: int, how: TrainConfig) -> bool:
    return step == steps or (how.validate_every > 0 and step % how.validate_every == 0)


def _validation_r2(usae: USAE, buffer: ActivationBuffer) -> Matrix | None:
    rows = min(buffer.n_rows("validation"), VALIDATION_ROWS)
    if rows < 2:
        return None
    sums = ReconstructionSums(usae)
    sums.add(buffer.gather("validation", np.arange(rows), list(usae.sites)).values)
    return sums.r2()
