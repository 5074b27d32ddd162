"""What capturing costs beside plain forward hooks, timed in turn in one run. Prints JSON.

    python tests/benchmarks/hook_overhead.py [--rounds 15] [--batch 16] [--size 112] [--threads 1]

`overhead`: capturing 4 layers against a bare forward pass with 4 plain hooks that clone. The last of the four is the
last layer before the head, so both run nearly the whole model. `early`: capturing one early layer against the bare
forward pass, beside what a plain hook that ends the pass there takes, and the share of a pass (of two pictures) that
`time_shares` says has gone by there. Rounds alternate, each ratio is taken within its round; median and quartiles over
the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from usae_probe import attach

MODELS: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "resnet18": ("resnet18", {}, ["layer1", "layer2", "layer3", "layer4"], "layer1"),
    "vit_tiny": (
        "vit_tiny_patch16_224",
        {"img_size": None},
        ["blocks.1", "blocks.4", "blocks.8", "blocks.11"],
        "blocks.1",
    ),
}


def plain(module: nn.Module, batch: Tensor, layers: list[str]) -> dict[str, Tensor]:
    """Run the model with hooks that clone, registered and removed as a user would."""
    kept: dict[str, Tensor] = {}
    parts = dict(module.named_modules())
    handles = [
        parts[name].register_forward_hook(lambda _m, _a, out, name=name: kept.__setitem__(name, out.clone()))
        for name in layers
    ]
    with torch.no_grad():
        module(batch)
    for handle in handles:
        handle.remove()
    return kept


def seconds(work: Callable[[], Any]) -> float:
    """Return how long one call takes: of the processor's time if there is one thread, so that others do not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    return clock() - started


class Enough(Exception):
    """Ends a forward pass."""


def plain_up_to(module: nn.Module, batch: Tensor, layer: str) -> Tensor:
    """Run the model up to a layer by a plain hook that clones and raises: the least that capturing it can cost."""
    kept: list[Tensor] = []

    def end(_module: nn.Module, _args: Any, out: Tensor) -> None:
        kept.append(out.clone())
        raise Enough

    handle = module.get_submodule(layer).register_forward_hook(end)
    try:
        with torch.no_grad():
            module(batch)
    except Enough:
        pass
    finally:
        handle.remove()
    return kept[0]


def spread(ratios: list[float]) -> dict[str, Any]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def measured(name: str, rounds: int, batch_size: int, size: int) -> dict[str, Any]:
    """Time one model."""
    factory, options, layers, early = MODELS[name]
    options = dict.fromkeys(options, size)
    module = timm.create_model(factory, pretrained=False, **options).eval()
    batch = torch.randn(batch_size, 3, size, size)
    with attach(module, name="m", image_size=size, mean=(0.0,) * 3, std=(1.0,) * 3) as hooked:
        untouched = timm.create_model(factory, pretrained=False, **options).eval()
        untouched.load_state_dict(module.state_dict())
        work: dict[str, Callable[[], Any]] = {
            "plain": lambda: plain(untouched, batch, layers),
            "capture": lambda: hooked.capture(batch, layers),
            "early": lambda: hooked.capture(batch, [early]),
            "early_plain": lambda: plain_up_to(untouched, batch, early),
            "bare": lambda: plain(untouched, batch, []),
        }
        captured, wanted = work["capture"](), work["plain"]()
        if not all(torch.equal(captured[layer], wanted[layer]) for layer in layers):
            raise SystemExit(f"{name}: captures differ from plain hooks")
        times: dict[str, list[float]] = {kind: [] for kind in work}
        for number in range(rounds + 2):
            for kind in list(work)[:: 1 if number % 2 else -1]:  # whoever comes after whom takes turns
                times[kind].append(seconds(work[kind]))
        share = hooked.time_shares(repeats=5)[early]
    times = {kind: values[2:] for kind, values in times.items()}

    def ratios(ours: str, theirs: str) -> dict[str, Any]:
        return spread([a / b for a, b in zip(times[ours], times[theirs], strict=True)])

    return {
        "model": name,
        "layers": layers,
        "plain_ms": round(1e3 * statistics.median(times["plain"]), 2),
        "capture_ms": round(1e3 * statistics.median(times["capture"]), 2),
        "overhead": ratios("capture", "plain"),
        "early_layer": early,
        "early_over_forward": ratios("early", "bare"),
        "early_plain_over_forward": ratios("early_plain", "bare"),
        "early_over_early_plain": ratios("early", "early_plain"),
        "early_time_share": round(share, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [measured(name, args.rounds, args.batch, args.size) for name in MODELS]
    settings = {"batch": args.batch, "size": args.size, "rounds": args.rounds, "threads": args.threads}
    print(
        json.dumps({"benchmark": "hook_overhead", **settings, "torch": torch.__version__, "results": results}, indent=2)
    )


if __name__ == "__main__":
    main()
