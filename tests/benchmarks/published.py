"""Time one training step of `recipe = "published"` beside one of the default recipe, in one run. Prints JSON.

    python tests/benchmarks/published.py [--steps 8] [--batch 1024] [--n-latents 8168] [--k 32] [--threads 2]

A step is zero_grad, the objective with a source, backward, and the optimiser's step. `ratio` is how many times longer
the published recipe takes here. `code_ratio` is the same of a step written as the published code is: plain torch
modules, where gradients are worked out for every site's dictionary and clipped, and left where they are not the
source's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from usae_probe.config import TrainConfig
from usae_probe.usae import USAE
from usae_probe.usae.start import engine

D_IN = {"a/layer": 512, "b/layer": 768}


def recipe_times(
    recipes: Sequence[str], n_latents: int, k: int, *, batch: int, steps: int, d_in: Mapping[str, int] = D_IN
) -> dict[str, float]:
    """Return the median milliseconds of a step by recipe, after two that are not counted; the recipes take turns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, sum(d_in.values()), generator=generator)
    engines = {
        recipe: engine(USAE(d_in, n_latents, k), TrainConfig.model_validate({"recipe": recipe}), 100_000)
        for recipe in recipes
    }
    dead, sites = torch.zeros(n_latents, dtype=torch.bool), list(d_in)
    seconds: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for number in range(1, steps + 3):
        source = sites[number % len(sites)]
        for recipe, (objective, optimiser) in engines.items():
            objective.train()
            started = time.perf_counter()
            optimiser.zero_grad()
            objective(x, "main", source, dead, number).total.backward()
            optimiser.step(1e-4, objective.updated("main", source))
            seconds[recipe].append(time.perf_counter() - started)
    return {recipe: 1e3 * statistics.median(times[2:]) for recipe, times in seconds.items()}


def code_times(n_latents: int, k: int, *, batch: int, steps: int, d_in: Mapping[str, int] = D_IN) -> float:
    """Return the median milliseconds of a step as the published code does it."""
    x = {site: torch.randn(batch, d) for site, d in d_in.items()}
    encoders = {
        site: nn.Sequential(nn.Linear(d, n_latents), nn.BatchNorm1d(n_latents), nn.ReLU()) for site, d in d_in.items()
    }
    dictionaries = {site: nn.Parameter(nn.functional.normalize(torch.randn(n_latents, d))) for site, d in d_in.items()}
    learnt = {site: [*encoders[site].parameters(), dictionaries[site]] for site in d_in}
    adams = {site: torch.optim.AdamW(learnt[site], lr=1e-4, weight_decay=1e-5) for site in d_in}
    seconds = []
    for number in range(steps + 2):
        source = list(d_in)[number % len(d_in)]
        started = time.perf_counter()
        adams[source].zero_grad()
        codes = encoders[source](x[source])
        top = torch.topk(codes, k, dim=-1)
        z = torch.zeros_like(codes).scatter(-1, top.indices, top.values)
        errors = []
        for site, dictionary in dictionaries.items():
            dictionary.data = nn.functional.normalize(dictionary.data)
            errors.append((x[site] - z @ dictionary).abs().mean())
        torch.stack(errors).sum().backward()  # type: ignore[no-untyped-call]
        for site in d_in:
            nn.utils.clip_grad_norm_(learnt[site], 1.0)
        adams[source].step()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--n-latents", type=int, default=8168)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ms = recipe_times(("default", "published"), args.n_latents, args.k, batch=args.batch, steps=args.steps)
    found = {"benchmark": "published", "threads": args.threads, "torch": torch.__version__, "batch": args.batch}
    found |= {"d_in": list(D_IN.values()), "n_latents": args.n_latents, "k": args.k}
    found |= {f"{recipe}_ms": round(value, 1) for recipe, value in ms.items()}
    code = code_times(args.n_latents, args.k, batch=args.batch, steps=args.steps)
    found |= {"published_code_ms": round(code, 1), "ratio": round(ms["published"] / ms["default"], 2)}
    print(json.dumps(found | {"code_ratio": round(code / ms["default"], 2)}, indent=2))


if __name__ == "__main__":
    main()
