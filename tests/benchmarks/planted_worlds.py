"""How much of planted worlds the default recipe finds: five plain worlds, and a hard one. Prints JSON.

    python tests/benchmarks/planted_worlds.py [--worlds 5] [--steps 2000] [--mispaired] [--set weight_decay=1.0 ...]

A plain world is the one of the acceptance test (`tests/planted.py`): two models, 128 shared atoms, 64 private ones in
each. The hard one has three models, Zipf rates, gains by model, correlated pairs of atoms, a dense atom, and atoms that
two of the three share; it is where a recipe shows what it is worth. No threshold is applied here.

`class_right` is the share of the live latents with an atom (cosine ≥ .9) that are called what it is: universal, or
specific to its model. `found_again` is the share of the first world's universal latents that trainings with other seeds
have too (cosine ≥ .7 in both decoders).

With `--mispaired`, the first plain world's rows are paired at random in training, with five seeds: which shares of the
live latents are then universal or partial, and how many of them firing entropy alone would call universal
(`n_equal_rates`); the worlds themselves are not trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.oracles import classes_of_atoms
from tests.planted import HARD_SITES, SITES, World, found, found_hard, hard_world, planted_world
from usae_probe.buffer import ActivationBuffer
from usae_probe.probes import UniversalityReport, evaluate
from usae_probe.probes.matching import found_again
from usae_probe.usae import USAE, train

PLAIN: dict[str, Any] = {"n_latents": 512, "k": 8, "batch_size": 1024}
HARD: dict[str, Any] = {"n_latents": 1024, "k": 12, "batch_size": 1024}
SEEDS = 3
MISPAIRED_SEEDS = 5


def plain(seed: int, **settings: Any) -> dict[str, Any]:
    """Train on a plain world and say how much of it was found."""
    world = planted_world(seed)
    usae, report, seconds = trained(world.rows, PLAIN | settings)
    figures = found(world, usae, report)._asdict() | class_right(world, usae, report)
    nulls = [max(null.counts["universal"]) for null in report.nulls]
    return {"seed": seed, "seconds": seconds, **rounded(figures), "most_universal_when_paired_at_random": nulls}


def found_anew(**settings: Any) -> list[dict[str, Any]]:
    """Train on the first plain world with several seeds, and look for the first one's latents in the others."""
    world = planted_world(0)
    (first, report, _), *others = [trained(world.rows, PLAIN | settings | {"seed": seed}) for seed in range(SEEDS)]
    numbers = [record.latent for record in report.universal]
    shares = []
    for other, its, _ in others:
        found = found_again(first, other, numbers, [record.latent for record in its.universal])
        shares.append(found._asdict() | {"universal_there": its.counts["universal"]})
    return shares


def mispaired(seed: int, **settings: Any) -> dict[str, Any]:
    """Train on a plain world's rows, paired at random, and say which classes the live latents have."""
    _, report, seconds = trained(planted_world(0).rows, PLAIN | settings | {"pairing": "shuffled", "seed": seed})
    live = max(report.n_live, 1)
    figures = {
        "live": report.n_live,
        "universal_share": report.counts["universal"] / live,
        "partial_share": report.counts["partial"] / live,
        "n_equal_rates": report.n_equal_rates,
        "counts": report.counts,
    }
    return {"seed": seed, "seconds": seconds, **rounded(figures)}


def class_right(world: World, usae: USAE, report: UniversalityReport) -> dict[str, Any]:
    """Return how many live latents have an atom, and the share of them with the class that it has."""
    decoders = {site: usae.decoder(site).detach().double().numpy() for site in SITES}
    categories, fires_in = zip(*((record.category, record.fires_in) for record in report.latents), strict=True)
    named = classes_of_atoms(world.shared, world.private, decoders, categories, fires_in)
    return {"with_an_atom": named.matched, "class_right": named.right}


def hard(seed: int, **settings: Any) -> dict[str, Any]:
    """Train on a hard world and say how much of it was found."""
    world = hard_world(seed)
    usae, report, seconds = trained(world.rows, HARD | settings)
    return {"seed": seed, "sites": HARD_SITES, "seconds": seconds, **rounded(found_hard(world, usae, report))}


def trained(rows: dict[str, np.ndarray], settings: dict[str, Any]) -> tuple[USAE, UniversalityReport, float]:
    """Train on rows and evaluate on the held-out ones; also how long training took."""
    with tempfile.TemporaryDirectory() as folder:
        buffer = ActivationBuffer.from_arrays(rows, Path(folder) / "acts", dtype="float32")
        result = train(buffer, **settings)
        return result.usae, evaluate(result.usae, buffer), round(result.seconds, 1)


def rounded(value: Any) -> Any:
    """Round the numbers in a tree of dicts."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=5)
    parser.add_argument("--hard-worlds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mispaired", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(2)
    settings = {"steps": args.steps, "validate_every": 0}
    for text in args.set:
        settings |= tomllib.loads(text)
    document: dict[str, Any] = {"benchmark": "planted_worlds", "settings": settings}
    if args.mispaired:
        document["mispaired"] = [mispaired(seed, **settings) for seed in range(MISPAIRED_SEEDS)]
    else:
        document["plain"] = [plain(seed, **settings) for seed in range(args.worlds)]
        document["found_again"] = found_anew(**settings)
        document["hard"] = [hard(seed, **settings) for seed in range(args.hard_worlds)]
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
