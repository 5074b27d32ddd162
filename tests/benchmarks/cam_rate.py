"""Time CAM's ascent against bare forward and backward passes of the same model on the same batch. Prints JSON.

    python tests/benchmarks/cam_rate.py [--steps 12] [--batch 8] [--image-size 112]

The bare pass is the model alone: a batch of inputs, forward to the last layer (its mean row), backward to the inputs.
CAM adds the Fourier transform, shift and scale, preprocessing, nnsight's trace, the USAE's encoder and Adam. The two
alternate in rounds, so that a slow minute of the machine meets both; `ratio` is bare / CAM, at best 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import timm
import torch

import usae_probe as up

LAYERS = {"resnet18": "layer4", "vit_tiny_patch16_224": "blocks.11"}
ROUNDS = 3


def cam_seconds(usae: up.USAE, model: up.HookedModel, batch: int, steps: int) -> float:
    """Return the seconds of one step, the first (which builds nnsight's wrapping) not counted."""
    moments: list[float] = []
    up.maximize(
        usae,
        [model],
        range(batch),
        max_batch=batch,
        check_every=steps + 1,
        steps=steps + 1,
        progress=lambda _: moments.append(time.perf_counter()),
    )
    return (moments[-1] - moments[0]) / steps


def bare_seconds(model: torch.nn.Module, layer: str, inputs: torch.Tensor, steps: int) -> float:
    """Return the seconds of one forward and backward pass to the inputs, with a plain hook."""
    caught: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, output: caught.append(output))
    inputs = inputs.clone().requires_grad_()
    started = 0.0
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        model(inputs)
        torch.autograd.grad(caught.pop().flatten(2).mean(2).sum(), inputs)
    handle.remove()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=112)
    args = parser.parse_args()
    torch.set_num_threads(2)
    results = []
    for name, layer in LAYERS.items():
        options = {"img_size": args.image_size} if name.startswith("vit") else {}
        live = timm.create_model(name, **options).eval()
        with up.attach(live, name="m", layers=[layer], image_size=args.image_size) as model:
            usae = up.USAE({str(model.sites[0]): model.d_in(model.sites[0])}, n_latents=256, k=8)
            inputs = torch.randn(args.batch, 3, args.image_size, args.image_size)
            rounds = [
                (bare_seconds(live, layer, inputs, args.steps), cam_seconds(usae, model, args.batch, args.steps))
                for _ in range(ROUNDS)
            ]
        bare, cam = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = [one / other for one, other in rounds]
        results.append(
            {
                "model": name,
                "batch": args.batch,
                "image_size": args.image_size,
                "bare_ms": round(1e3 * bare, 1),
                "cam_ms": round(1e3 * cam, 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )
    print(json.dumps({"benchmark": "cam_rate", "threads": torch.get_num_threads(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
