"""What a scan costs, and whether it finds that a layer is most like itself. Prints JSON.

    python tests/benchmarks/scan.py [harvest] [trainings] [itself] [--rounds 3] [--config CONFIG.toml]

`harvest`: all blocks of the config's models against their last block alone (without a config: `resnet18` and `vit_tiny`
with random weights on drawn images), in turn; each ratio within its round.

`trainings`: one USAE over M = 12 sites (512 and 768 wide, n_latents = 2,042, k = 32, batches of 1,024) against the 66
trainings of two of them, at equal steps: 10 steps of the joint one and of four of the pairs (both widths and mixed),
after 2 that do not count, and the median step is taken. Also at equal updates of each encoder: 6 times the steps.

`itself`: the demo's networks, each against a copy of itself and against an untrained copy: the share of target layers
for which the same layer wins over all others, by measure, and the counts of universal latents.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from usae_probe import ActivationBuffer, HookedModel, RunConfig, ScanReport, attach, harvest, scan, train
from usae_probe.config import ScanConfig, TrainConfig
from usae_probe.demo import draw_images, prepare_demo
from usae_probe.images import open_source
from usae_probe.pipeline.models import attach_all
from usae_probe.probes.scan import MEASURES, choose_sites
from usae_probe.probes.scan.choosing import looking_at
from usae_probe.untrained import reinitialise
from usae_probe.usae import StepRecord

WIDTHS = (512, 768) * 6


def toy_models(closing: ExitStack) -> list[HookedModel]:
    """Return two networks with random weights."""
    torch.manual_seed(0)
    plain: dict[str, Any] = {"image_size": 112, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    made = {"resnet": ("resnet18", {}), "vit": ("vit_tiny_patch16_224", {"img_size": 112})}
    return [
        closing.enter_context(attach(timm.create_model(kind, pretrained=False, **options), name=name, **plain))
        for name, (kind, options) in made.items()
    ]


def harvests(config: Path | None, rounds: int, images: int) -> dict[str, Any]:
    """Time the harvest of all blocks and of the last ones."""
    with ExitStack() as closing:
        if config is None:
            models, source = toy_models(closing), draw_images(images, size=112).images
        else:
            loaded = RunConfig.load(config)
            models, source = attach_all(loaded, closing), open_source(loaded.image_path)
        sites = {name: choose_sites(models, ScanConfig(depth=depth)) for name, depth in (("all", 10_000), ("last", 1))}
        found: dict[str, list[float]] = {name: [] for name in sites}
        for number in range(rounds + 1):
            for name, chosen in sites.items():
                with tempfile.TemporaryDirectory() as folder, looking_at(models, chosen):
                    began = time.perf_counter()
                    harvest(models, source, Path(folder) / "buffer", limit=images)
                    if number:
                        found[name].append(time.perf_counter() - began)
        ratios = [a / b for a, b in zip(found["all"], found["last"], strict=True)]
        return {
            "layers": {name: {model: len(of) for model, of in chosen.items()} for name, chosen in sites.items()},
            "images": images,
            "seconds": {name: statistics.median(spent) for name, spent in found.items()},
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)},
        }


def step_seconds(buffer: ActivationBuffer, sites: list[str], steps: int = 12) -> float:
    """Return the seconds of a training step: alignment and main phase, each by its share."""
    ends: list[tuple[str, float]] = []

    def follow(record: StepRecord) -> None:
        ends.append((record.phase, time.perf_counter()))

    train(
        buffer, sites=sites, n_latents=2042, k=32, steps=steps, batch_size=1024, validate_every=0,
        align_warmup=0.4, progress=follow,
    )  # fmt: skip
    spent: dict[str, list[float]] = {}
    for (_, before), (phase, after) in pairwise(ends[1:]):
        spent.setdefault(phase, []).append(after - before)
    share = TrainConfig().align_warmup
    return share * statistics.median(spent["align"]) + (1 - share) * statistics.median(spent["main"][1:])


def trainings(rounds: int) -> dict[str, Any]:
    """Time a joint step and steps of pairs."""
    draw = np.random.default_rng(0)
    rows = {f"m{i}/x": draw.standard_normal((3000, width), dtype=np.float32) for i, width in enumerate(WIDTHS)}
    names, ratios, joint, pair = list(rows), [], [], []
    every = list(combinations(names, 2))
    chosen = [(0, 2), (1, 3), (0, 1), (4, 7)]  # 512 with 512, 768 with 768, mixed twice: 15, 15 and 36 of 66 pairs
    share = [15 / 66, 15 / 66, 18 / 66, 18 / 66]
    with tempfile.TemporaryDirectory() as folder:
        buffer = ActivationBuffer.from_arrays(rows, folder)
        for _ in range(rounds):
            joint.append(step_seconds(buffer, names))
            steps = [step_seconds(buffer, [names[a], names[b]]) for a, b in chosen]
            pair.append(sum(part * step for part, step in zip(share, steps, strict=True)))
            ratios.append(joint[-1] / (len(every) * pair[-1]))
    return {
        "sites": len(names),
        "pairs": len(every),
        "joint_step_seconds": statistics.median(joint),
        "pair_step_seconds": statistics.median(pair),
        "ratio_at_equal_steps": {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)},
        "ratio_at_equal_updates": statistics.median(ratios) * len(names) / 2,
    }


def scans_of_itself(steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scan each of the demo's networks with copies of itself."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        config = prepare_demo(Path(folder))
        for model in attach_all(config, closing):
            module = copy.deepcopy(model.module)
            model.close()
            for kind in ("itself", "untrained"):
                other = copy.deepcopy(module) if kind == "itself" else reinitialise(copy.deepcopy(module), seed=1)
                pair = [
                    closing.enter_context(attach(part, name=name, preprocess=model.preprocess))
                    for name, part in (("one", copy.deepcopy(module)), ("other", other))
                ]
                found = scan(pair, config.image_path, n_latents=64, k=8, steps=steps, train_config=HOW)
                yield f"{model.name}, {kind}", summary(found)


HOW = TrainConfig(batch_size=256, validate_every=0)


def summary(found: ScanReport) -> dict[str, Any]:
    """Return how often the same layer wins, and the universal latents."""
    one, other = found.models.values()
    wins = {}
    for measure in MEASURES:
        if matrix := found.matrix(measure):
            wins[measure] = float(np.mean([_wins(matrix, one, other, j) for j in range(len(one))]))
    counts = [found.codes.universal[a][b] for a in one for b in other] if found.codes else []
    return {
        "layers": len(one),
        "same_layer_wins": wins,
        "universal": {"least": min(counts), "mean": float(np.mean(counts)), "greatest": max(counts)},
        "steps": dict(found.trained["steps"]),
    }


def _wins(matrix: Mapping[str, Mapping[str, float]], one: list[str], other: list[str], j: int) -> bool:
    """Say whether layer j of one is above all other layers of it, of those that target layer j of the other."""
    return all(matrix[one[j]][other[j]] > matrix[source][other[j]] for i, source in enumerate(one) if i != j)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help="harvest, trainings, itself; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600, help="of [train], in the scans of a model with itself")
    given = parser.parse_args()
    parts = given.parts or ["harvest", "trainings", "itself"]
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if "harvest" in parts:
        found["harvest"] = harvests(given.config, given.rounds, given.images)
    if "trainings" in parts:
        found["trainings"] = trainings(given.rounds)
    if "itself" in parts:
        found["itself"] = dict(scans_of_itself(given.steps))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
