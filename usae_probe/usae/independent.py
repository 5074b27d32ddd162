"""Independent SAEs that match a USAE: the same code with one site, for what sharing a dictionary costs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..buffer import ActivationBuffer
from ..config import TrainConfig, UsaeConfig, checked, settled
from ..errors import StageError, UsageError
from ..files import json_sha256, write_json
from ..sites import file_stem
from .draws import sources_of
from .history import HistoryFile, read_history
from .model import USAE
from .reconstruction import Matrix
from .records import StepRecord, TrainResult
from .schedule import phase_and_source
from .train import train
from .validation import cross_r2

Updates = Literal["steps", "encoder"]


class Settings(NamedTuple):
    """What a USAE was trained with: sites, settings, the steps behind its weights, and those that were planned."""

    sites: tuple[str, ...]
    usae: UsaeConfig
    train: TrainConfig
    steps: int
    planned: int


def train_independent(
    buffer: ActivationBuffer,
    *,
    like: TrainResult | str | Path,
    updates: Updates = "steps",
    n_latents: int | None = None,
    progress: Callable[[str, StepRecord], None] | None = None,
    resume: str | Path | None = None,
) -> dict[str, TrainResult]:
    """Train the independent SAEs that match a USAE: one per site, the same code with one site.

    Each sees the same rows in the same order, from the same seed, with the same n_latents, k, sparsity and optimiser.
    Of a USAE's M encoders each learns in fewer steps than there are, so there are two fair lengths: as many steps; or
    as many updates as that site's own encoder got, which are

        n_aligned + |{t > n_aligned : source_t ∈ {site, all}}|

    (alignment warm-up, then the steps in which it was the source; counted exactly, `source_t` depends on seed and t
    alone). A shorter training sees the first so many batches, and its schedules span its own length. Where the USAE
    stopped early, or kept the weights of its best validation, only the steps up to there are matched: the SAEs take
    that many, without choosing again, and keep the last.

    Args:
        buffer: the activations that the USAE was trained on.
        like: the USAE's training, or the run folder it is in.
        updates: `steps`: as many steps; `encoder`: as many updates of the encoder.
        n_latents: latents of each instead of the USAE's: n_latents / M, say, for equal parameters in all.
        progress: called with the site and its step's record.
        resume: folder to keep results and the training's state in: given again, finished SAEs are read from it, and a
            training that was stopped goes on to the same weights (on CPU bit for bit). It is not removed.

    Returns:
        the trained SAE by site, in the USAE's order. The alignment tax (DESIGN.md) of a site is its R² on held-out rows
        minus the USAE's self-R² there.

    Raises:
        UsageError: when `like` is a folder without a run, or k is more than `n_latents` (ConfigError).
        StageError: when the run folder holds no finished training, or its config was changed since.
        BufferIntegrityError: when the buffer lacks a site.
        NonFiniteError: when a loss is not finite.

    Example:
        `sae = up.train_independent(buffer, like=run)["vit/blocks.10"].usae`
    """
    model = _of_result(like) if isinstance(like, TrainResult) else _of_folder(Path(like), buffer)
    joint = model.usae.sparsity == "global-topk"
    n_updates = encoder_updates(model.sites, model.train, model.planned, taken=model.steps, joint=joint)
    shape = model.usae if n_latents is None else settled((model.usae,), {"n_latents": n_latents})[0]
    found = {}
    for site in model.sites:
        steps = model.steps if updates == "steps" else n_updates[site]
        if not steps:
            raise UsageError(
                f"the encoder of '{site}' was never updated in {model.steps} steps: there is nothing to match",
                hint='match by updates="steps"',
            )
        folder = Path(resume) / file_stem(site) if resume else None
        found[site] = _train_one(buffer, site, shape, one_site(model.train, steps), progress, folder)
    return found


def encoder_updates(
    sites: Sequence[str], how: TrainConfig, steps: int, *, taken: int | None = None, joint: bool = False
) -> dict[str, int]:
    """Count the updates that the encoder of each site gets in a training of `steps` steps.

    Args:
        sites: of the USAE, in its order.
        how: its settings.
        steps: that were planned: the alignment warm-up is a share of them.
        taken: those that count, where training was stopped early.
        joint: the sparsity gives all sites one support throughout: every step updates all encoders.
    """
    counts: Counter[str] = Counter()
    for step in range(1, (steps if taken is None else taken) + 1):
        _, source = phase_and_source(sites, how, step, steps, joint=joint)
        counts.update(sources_of(source, sites))
    return {site: counts[site] for site in sites}


def one_site(how: TrainConfig, steps: int) -> TrainConfig:
    """Return the settings of a training with one site and so many steps; what is about several sites is left out."""
    alone = {"source": "random", "early_stop": 0, "keep": "last", "tensorboard": False}
    changed: TrainConfig = settled((how,), {"steps": steps, "epochs": None, **alone})[0]
    return changed


def _train_one(
    buffer: ActivationBuffer,
    site: str,
    shape: UsaeConfig,
    how: TrainConfig,
    progress: Callable[[str, StepRecord], None] | None,
    folder: Path | None,
) -> TrainResult:
    """Train the SAE of one site, or read it from `folder` where it is finished."""

    def follow(record: StepRecord) -> None:
        if history:
            history.add(record, keep=record.is_kept(how))
        if progress:
            progress(site, record)

    if folder is None:
        history = None
        return train(buffer, sites=[site], usae_config=shape, train_config=how, progress=follow)
    digest = _digest(buffer, site, shape, how)
    if (seconds := _finished(folder, digest)) is None:
        with HistoryFile(folder / "history.jsonl") as history:
            state = folder / "training-state.safetensors"
            done = train(buffer, sites=[site], usae_config=shape, train_config=how, progress=follow, resume=state)
        done.usae.save(folder / "usae.safetensors")
        write_json(folder / "training.json", {"digest": digest, "seconds": round(done.seconds, 3)})
        state.unlink(missing_ok=True)
        usae, seconds = done.usae, done.seconds
    else:
        usae = USAE.load(folder / "usae.safetensors", kernel=how.kernel)
    records = [_record(line) for line in read_history(folder / "history.jsonl")]
    steps = how.n_steps(buffer.steps_per_epoch("train", how.batch_size))
    return TrainResult(usae, records, seconds, shape, how, taken=steps, planned=steps)


def _finished(folder: Path, digest: str) -> float | None:
    """Return the seconds that the finished training in `folder` took; None when there is none of these settings."""
    try:
        about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        same = about["digest"] == digest and (folder / "usae.safetensors").is_file()
        return float(about["seconds"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(buffer: ActivationBuffer, site: str, shape: UsaeConfig, how: TrainConfig) -> str:
    # `validate_every` decides nothing here: `one_site` has switched off what goes by validations
    idle = {"log_every", "validate_every", "kernel", "device", "tensorboard", "workers"}
    settings = how.model_dump(mode="json", exclude=idle)
    shown = shape.model_dump(mode="json")
    return json_sha256({"buffer": buffer.identity, "site": site, "usae": shown, "train": settings})


def _record(line: dict[str, Any]) -> StepRecord:
    """Make a record of a line of the history again; R² of a target that does not vary is null there."""
    return StepRecord(**{**line, "r2": _matrix(line) if line["r2"] else None})


def _matrix(line: Mapping[str, Any]) -> Matrix:
    return {
        source: {target: math.nan if value is None else value for target, value in row.items()}
        for source, row in line["r2"].items()
    }


def _of_result(run: TrainResult) -> Settings:
    steps = run.best.step if run.best and run.last is not None else run.taken
    return Settings(tuple(run.usae.sites), run.usae_config, run.train_config, steps, run.planned)


def _of_folder(folder: Path, buffer: ActivationBuffer) -> Settings:
    """Read the settings of the training in a run folder.

    Raises:
        UsageError: when it is no run folder.
        StageError: when its training is not finished, or was done with another config.
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        trained, config = record["stages"].get("train"), record["config"]
        about = json.loads((folder / "usae.json").read_text(encoding="utf-8")) if trained else {}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"'{folder}' is no run folder that can be read: {error}", hint="give the folder of a finished training"
        ) from error
    if not trained:
        raise StageError(f"'{folder}' has no finished train", hint="do `usae-probe train` with its config first")
    changed = [key for key, value in trained["depends_on"].items() if _differs(config, key, value)]
    if changed:
        raise StageError(
            f"the train in '{folder}' was done with another config: {', '.join(sorted(changed))} changed",
            hint="do `usae-probe train` again",
        )
    shape, how = checked(UsaeConfig, config["usae"]), checked(TrainConfig, config["train"])
    planned = how.n_steps(buffer.steps_per_epoch("train", how.batch_size))
    steps = _steps_of(list(read_history(folder / "history.jsonl")), how) or planned
    return Settings(tuple(about["sites"]), shape, how, steps, planned)


def _steps_of(history: Sequence[Mapping[str, Any]], how: TrainConfig) -> int:
    """Return the steps behind a run's weights: the last, or with `keep = "best"` that of the best validation."""
    measured = [line for line in history if line["r2"]]
    measured = [line for line in measured if line["phase"] == "main"] or measured  # as `Watch` counts them
    if how.keep == "best" and measured:
        best: int = max(measured, key=lambda line: cross_r2(_matrix(line)))["step"]  # the first of equals
        return best
    return max((line["step"] for line in history), default=0)  # the last step is kept, also of an early stop


def _differs(config: dict[str, Any], key: str, value: Any) -> bool:
    """Say whether a key that a training depended on has another value in the run's config now."""
    table, _, name = key.partition(".")
    if table not in ("usae", "train") or name not in config[table]:
        return False  # of another table, or a single entry of a key that is a table itself
    return bool(config[table][name] != value)
