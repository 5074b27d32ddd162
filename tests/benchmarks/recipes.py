r"""Compare trainings on two sites of a harvested run: R², universal latents, what sharing costs. Prints JSON.

    usae-probe harvest examples/cifar10_real.toml --out runs/real
    python tests/benchmarks/recipes.py runs/real --out runs/recipes [--seeds 3] [--split validation] [--only default …]
    python tests/benchmarks/recipes.py runs/real --out runs/recipes --redraw 5 --split holdout \
        --only default independent

Every recipe is the default one with some settings changed; `independent` are the SAEs that match the default recipe,
one site each, with as many steps as that site's encoder got updates. `linear` is ridge regression from one site's rows
to the other's, its λ chosen by cross-validation on training rows. Choose on validation rows; `--split holdout` is for
the end. `--redraw N` draws the split of the same rows N times anew and does everything on each, to tell what is the
recipe's from what is one holdout's. Trainings are kept in `--out` and not repeated; two run side by side, with a thread
each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig, UsaeConfig, settled
from usae_probe.files import json_sha256
from usae_probe.probes import evaluate
from usae_probe.probes.linear import linear_reference
from usae_probe.usae import USAE, train
from usae_probe.usae.independent import encoder_updates, one_site

BASE: dict[str, Any] = {"n_latents": 2042, "k": 64, "steps": 1000, "validate_every": 0}
PLAIN: dict[str, Any] = {"weight_decay": 0.0, "latent_dropout": 0.0, "self_share": "equal"}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "rows mispaired": {"pairing": "shuffled"},
    "nothing against overfitting": PLAIN,
    "nothing against overfitting, batches of 256": PLAIN | {"batch_size": 256},
    "no weight decay": {"weight_decay": 0.0},
    "no latent dropout": {"latent_dropout": 0.0},
    "all targets alike": {"self_share": "equal"},
    "own error counted 1.5 times": {"self_share": 0.6},
    "latent dropout of .4": {"latent_dropout": 0.4},
    "batches of 256": {"batch_size": 256},
    "no alignment warm-up": {"align_warmup": 0.0},
    "alignment warm-up of .5": {"align_warmup": 0.5},
    "source = all": {"source": "all"},
    "2,000 steps": {"steps": 2000},
    "lr = 1e-3": {"lr": 1e-3},
    "input noise of .3": {"input_noise": 0.3},
    "start from data": {"init": "data"},
    "nested dictionaries": {"matryoshka": [512, 1024, 2042]},
    "published, 5,000 steps of 256, lr 3e-4": {"recipe": "published", "steps": 5000, "batch_size": 256},
    "published, 5,000 steps of 256, lr 1e-3": {"recipe": "published", "steps": 5000, "batch_size": 256, "lr": 1e-3},
    "published, 5,000 steps of 256, lr 3e-3": {"recipe": "published", "steps": 5000, "batch_size": 256, "lr": 3e-3},
}


class Job(NamedTuple):
    """A training: of all sites, or of one that stands alone."""

    buffer: Path
    out: Path
    sites: tuple[str, ...]
    name: str
    seed: int
    split: str
    alone: str | None = None


def trained(job: Job, buffer: ActivationBuffer) -> USAE:
    """Return the USAE of a job, from its file where there is one of these very settings and rows."""
    settings = BASE | RECIPES.get(job.name, {}) | {"seed": job.seed}
    shape, how = settled((UsaeConfig(), TrainConfig()), settings)
    sites = list(job.sites)
    if job.alone:
        how, sites = one_site(how, encoder_updates(job.sites, how, how.steps)[job.alone]), [job.alone]
    path = job.out / f"{_label(job)}-{_digest(buffer, sites, shape, how)}.safetensors"
    if path.is_file():
        return USAE.load(path)
    usae = train(buffer, sites=sites, usae_config=shape, train_config=how).usae
    usae.save(path)
    return usae


def _label(job: Job) -> str:
    return "_".join(re.findall(r"\w+", f"{job.name} {job.alone or ''} {job.seed}"))


def _digest(buffer: ActivationBuffer, sites: Sequence[str], *settings: UsaeConfig | TrainConfig) -> str:
    return json_sha256([buffer.identity, sites, *(some.model_dump(mode="json") for some in settings)])[:12]


def measured(job: Job) -> dict[str, Any]:
    """Do a job."""
    torch.set_num_threads(1)
    buffer = ActivationBuffer(job.buffer)
    report = evaluate(trained(job, buffer), buffer, split=job.split)
    about = {"name": job.name, "seed": job.seed, "alone": job.alone, "buffer": job.buffer.name}
    return about | {"r2": report.r2, "r2_train": report.r2_train, "counts": report.counts, "split": report.n_split}


def redrawn(buffer: ActivationBuffer, sites: Sequence[str], out: Path, seed: int) -> Path:
    """Make a buffer of the same rows under another draw of the split."""
    parts = [_rows(buffer, split, sites) for split in ("train", "validation", "holdout")]
    rows = {site: np.concatenate([part[site] for part in parts]) for site in sites}
    return ActivationBuffer.from_arrays(rows, out / f"redrawn-{seed}", seed=seed).path


def _rows(buffer: ActivationBuffer, split: Any, sites: Sequence[str]) -> dict[str, np.ndarray]:
    found = buffer.gather(split, np.arange(buffer.n_rows(split)), list(sites)).values
    return {site: found[site].astype(np.float64) for site in sites}


def over_seeds(cells: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> list[dict[str, Any]]:
    """Return mean, least and greatest of each recipe."""
    found = []
    for name in dict.fromkeys(cell["name"] for cell in cells):
        mine = [cell for cell in cells if cell["name"] == name]
        if mine[0]["alone"]:
            r2 = {s: {s: _spread([c["r2"][s][s] for c in mine if c["alone"] == s])} for s in sites}
            found.append({"name": name, "r2": r2})
            continue
        r2 = {s: {t: _spread([c["r2"][s][t] for c in mine]) for t in sites} for s in sites}
        counts = {key: _spread([c["counts"][key] for c in mine]) for key in mine[0]["counts"]}
        found.append({"name": name, "r2": r2, "counts": counts, "split": _spread([c["split"] for c in mine])})
    return found


def _spread(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in (np.mean(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished harvest")
    parser.add_argument("--out", type=Path, required=True, help="where trainings are kept")
    parser.add_argument("--sites", nargs="+", default=["vit/blocks.8@mean", "eff/bn2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("validation", "holdout"), default="validation")
    parser.add_argument("--redraw", type=int, default=0, help="draws of the split instead of the run's own")
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, "independent"], default=[*RECIPES, "independent"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    own = ActivationBuffer(args.run / "buffer")
    buffers = [redrawn(own, args.sites, args.out, seed) for seed in range(101, 101 + args.redraw)] or [own.path]
    jobs = [
        Job(buffer, args.out, tuple(args.sites), name, seed, args.split, alone)
        for buffer in buffers
        for seed in range(1 if args.redraw else args.seeds)
        for name in args.only
        for alone in (args.sites if name == "independent" else [None])
    ]
    cells = []
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for cell in pool.imap_unordered(measured, jobs, chunksize=1):
            cells.append(cell)
            print(json.dumps(cell), file=sys.stderr, flush=True)
    document = {"benchmark": "recipes", "base": BASE, "split": args.split, "rows": own.n_rows(args.split)}
    document |= {"seeds": args.seeds, "redraw": args.redraw, "buffers": []}
    for path in buffers:
        of_buffer = [cell for cell in cells if cell["buffer"] == path.name]
        buffer = ActivationBuffer(path)
        r2 = linear_reference(buffer, args.sites, split=args.split, train_rows=buffer.n_rows("train")).r2
        found = {"linear": {s: {t: r2[s][t] for t in args.sites if t != s} for s in args.sites}}
        document["buffers"].append({"buffer": path.name, **found, "recipes": over_seeds(of_buffer, args.sites)})
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
