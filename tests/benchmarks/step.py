"""Time one whole training step, `csr` against `reference`, in one run. Prints JSON.

    python tests/benchmarks/step.py [--steps 7] [--batch 1024]

The step is the one training does: zero_grad, encode, decode to both sites, backward, projected gradient, clip, Adam,
renormalisation. `dense_ratio` is reference / csr: how many times faster the sparse kernel is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from usae_probe.usae import USAE
from usae_probe.usae.losses import source_loss

D_IN = {"a/layer": 512, "b/layer": 768}
SIZES = ((8168, 32), (2042, 64))


def step_times(kernel: str, n_latents: int, k: int, batch: int, steps: int) -> list[float]:
    """Return the seconds of `steps` steps after two that are not counted."""
    generator = torch.Generator().manual_seed(0)
    usae = USAE(D_IN, n_latents, k, kernel=kernel)
    optimiser = torch.optim.Adam(usae.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, sum(D_IN.values()), generator=generator)
    dead = torch.zeros(n_latents, dtype=torch.bool)
    times = []
    for number in range(steps + 2):
        source = usae.sites[number % 2]
        started = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        source_loss(usae, x, source, dead=dead, aux_k=0, aux_coef=0.0).total.backward()
        usae.project_decoder_gradient()
        torch.nn.utils.clip_grad_norm_(usae.parameters(), 1.0)
        optimiser.step()
        usae.renormalise_decoder()
        times.append(time.perf_counter() - started)
    return times[2:]


def encoder_times(n_latents: int, batch: int, steps: int) -> list[float]:
    """Return the seconds of the encoder product alone, mean over the two sites."""
    x = {d: torch.randn(batch, d) for d in D_IN.values()}
    w = {d: torch.randn(n_latents, d) for d in D_IN.values()}
    times = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        for d in D_IN.values():
            x[d] @ w[d].T
        times.append((time.perf_counter() - started) / len(D_IN))
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(2)
    results = []
    for n_latents, k in SIZES:
        ms = {
            kernel: 1e3 * statistics.median(step_times(kernel, n_latents, k, args.batch, args.steps))
            for kernel in ("csr", "reference")
        }
        encoder = 1e3 * statistics.median(encoder_times(n_latents, args.batch, args.steps))
        results.append(
            {
                "n_latents": n_latents,
                "k": k,
                "batch": args.batch,
                "d_in": list(D_IN.values()),
                "csr_ms": round(ms["csr"], 1),
                "reference_ms": round(ms["reference"], 1),
                "encoder_product_ms": round(encoder, 1),
                "dense_ratio": round(ms["reference"] / ms["csr"], 2),
                "csr_over_encoder_product": round(ms["csr"] / encoder, 2),
            }
        )
    print(json.dumps({"benchmark": "step", "threads": 2, "torch": torch.__version__, "results": results}, indent=2))


if __name__ == "__main__":
    main()
