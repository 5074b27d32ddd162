"""Time CAM's pictures in one batch against one by one, and layers early in the network against the last. Prints JSON.

    python tests/benchmarks/cam_batch.py [--pictures 16] [--steps 4] [--device cpu] [--resnet FILE.py:FACTORY]

Same latents, same steps, one process; `ratio` is (one batch) / (as many runs of one): below 1 a batch is worth it. A
ViT-S with patches of 14 pixels at 112 pixels (random weights: they take the same time), its block 8; a ResNet-18,
and a CIFAR ResNet where its factory is given. `early` is the time at the first layer over that at the last: the forward
pass ends after the layer that is climbed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import timm
import torch

import usae_probe as up

MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch14_dinov2": {
        "layers": ["blocks.0", "blocks.8"],
        "size": 112,
        "options": {"dynamic_img_size": True},
    },
    "resnet18": {"layers": ["layer1", "layer4"], "size": 112, "options": {}},
}
ROUNDS = 3


def attached(name: str, plan: dict[str, Any], device: str) -> up.HookedModel:
    live = timm.create_model(name, pretrained=False, **plan["options"]).eval()
    return up.attach(live, name="m", layers=plan["layers"], image_size=plan["size"], device=device)


def seconds(usae: up.USAE, model: up.HookedModel, site: str, latents: list[int], batch: int, steps: int) -> float:
    """Return the time of all pictures, in batches of a size; no look but the first and the last, as in any run."""
    started = time.perf_counter()
    up.maximize(usae, [model], latents, sites=[site], max_batch=batch, steps=steps, check_every=steps, patience=0)
    return time.perf_counter() - started


def measured(name: str, model: up.HookedModel, n: int, steps: int, device: str) -> dict[str, Any]:
    first, last = (str(site) for site in model.sites)
    usae = up.USAE({str(site): model.d_in(site) for site in model.sites}, n_latents=256, k=8).to(device)
    latents = list(range(n))
    seconds(usae, model, last, latents[:2], 2, 1)  # nnsight's wrapping is not counted
    rounds = []
    for _ in range(ROUNDS):
        together = seconds(usae, model, last, latents, n, steps)
        one_by_one = seconds(usae, model, last, latents, 1, steps)
        early = seconds(usae, model, first, latents, n, steps)
        rounds.append((together, one_by_one, together / one_by_one, early / together))
    columns = list(zip(*rounds, strict=True))
    together, one_by_one, ratio, early = (statistics.median(column) for column in columns)
    return {
        "model": name,
        "site": last,
        "pictures": n,
        "steps": steps,
        "one_batch_s": round(together, 2),
        "one_by_one_s": round(one_by_one, 2),
        "ratio": round(ratio, 3),
        "ratios": [round(value, 3) for value in columns[2]],
        "early": round(early, 3),
        "early_site": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resnet", help="a CIFAR ResNet with layer1 and layer3, as file.py:factory")
    args = parser.parse_args()
    torch.set_num_threads(2)
    results = []
    for name, plan in MODELS.items():
        with attached(name, plan, args.device) as model:
            results.append(measured(name, model, args.pictures, args.steps, args.device))
    if args.resnet:
        given: dict[str, Any] = {"image_size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        with up.attach(
            args.resnet, adapter="module", name="m", layers=["layer1", "layer3"], device=args.device, **given
        ) as model:
            results.append(measured(args.resnet.partition(":")[2], model, args.pictures, args.steps, args.device))
    ran = {"benchmark": "cam_batch", "device": args.device, "threads": torch.get_num_threads()}
    print(json.dumps({**ran, "results": results}, indent=2))


if __name__ == "__main__":
    main()
