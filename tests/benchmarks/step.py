"""Time one whole training step (zero_grad to renormalisation) of several implementations, in turns. Prints JSON.

    python tests/benchmarks/step.py [--steps 7] [--batch 1024] [--sizes 8168/32 2042/64 65536/64]
                                    [--threads 2] [--clock wall] [--skip published,sites,peak]

Each round does one step of everything that is compared, so that a busy machine slows all of them alike; figures are
medians of the rounds after two that do not count. `--threads 1 --clock cpu` measures the thread's own time, which
another process takes nothing of.

`dense` is the same model in the plainest PyTorch: z by top-k and scatter, autograd, clip_grad_norm_, fused Adam.
`encoder` is the encoder product alone, `ours_fb` forward and backward alone. `sites` compares M = 12 with M = 2, in
steps of the main phase and in those of the alignment warm-up; `peak` is the resident memory that three steps of each
at 65,536 latents and 4,096 rows add, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from usae_probe.config import TrainConfig
from usae_probe.machine import peak_memory
from usae_probe.usae import USAE
from usae_probe.usae.draws import draw_aligned
from usae_probe.usae.losses import Phase
from usae_probe.usae.start import engine

D_IN = {"a/layer": 512, "b/layer": 768}
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
WARM_UP = 2
GIB = 2**30


class Size(NamedTuple):
    n_latents: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Size:
        return cls(*map(int, text.split("/")))


class Ours:
    """The step as training does it."""

    def __init__(
        self, d_in: Mapping[str, int], size: Size, batch: int, precision: str = "fp32", phase: Phase = "main"
    ) -> None:
        self.how, self.phase = TrainConfig(recipe=self.recipe), phase
        self.usae = USAE(d_in, size.n_latents, size.k, kernel="csr", precision=precision)
        self.objective, self.optimiser = engine(self.usae, self.how, 100_000)
        self.objective.train()
        self.x = rows(d_in, batch)
        self.alive = torch.zeros(size.n_latents, dtype=torch.bool)
        self.number = 0

    recipe = "default"

    def forward_backward(self) -> str:
        sites = self.usae.sites
        aligned = self.phase == "align"
        source = draw_aligned(sites, self.how, self.number) if aligned else sites[self.number % len(sites)]
        self.number += 1
        self.optimiser.zero_grad()
        self.objective(self.x, self.phase, source, self.alive).total.backward()
        return source

    def __call__(self) -> None:
        source = self.forward_backward()
        self.optimiser.step(1e-4, self.objective.updated(self.phase, source))


class Published(Ours):
    """The step of `recipe = "published"`: dense, BatchNorm, L1, the source's own AdamW."""

    recipe = "published"


class Dense:
    """The same model and step in plain PyTorch."""

    def __init__(self, d_in: Mapping[str, int], size: Size, batch: int) -> None:
        def weights(d: int) -> nn.Parameter:
            return nn.Parameter(nn.functional.normalize(torch.randn(size.n_latents, d)))

        self.k, self.x, self.number = size.k, rows(d_in, batch).split(list(d_in.values()), dim=1), 0
        self.w_enc = nn.ParameterList([weights(d) for d in d_in.values()])
        self.b_enc = nn.ParameterList([nn.Parameter(torch.zeros(size.n_latents)) for _ in d_in])
        self.w_dec = nn.ParameterList([weights(d) for d in d_in.values()])
        self.b_dec = nn.ParameterList([nn.Parameter(torch.zeros(d)) for d in d_in.values()])
        self.parameters = [*self.w_enc, *self.b_enc, *self.w_dec, *self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=1e-4, fused=True)

    def __call__(self) -> None:
        source = self.number % len(self.x)
        self.number += 1
        self.adam.zero_grad(set_to_none=True)
        z_pre = (self.x[source] - self.b_dec[source]) @ self.w_enc[source].T + self.b_enc[source]
        top = torch.topk(z_pre, self.k, dim=1)
        z = torch.zeros_like(z_pre).scatter(1, top.indices, torch.relu(top.values))
        losses = [(x - z @ w - b).square().mean() for x, w, b in zip(self.x, self.w_dec, self.b_dec, strict=True)]
        torch.stack(losses).sum().backward()
        with torch.no_grad():
            sums = [(w.grad * w).sum(1, keepdim=True) for w in self.w_dec]
            along = torch.stack(sums).sum(0) / len(self.x)
            for w in self.w_dec:
                w.grad -= along * w
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        with torch.no_grad():
            norm = torch.stack([w.square().sum(1, keepdim=True) for w in self.w_dec]).sum(0).sqrt()
            for w in self.w_dec:
                w *= math.sqrt(len(self.x)) / norm


class EncoderProduct:
    """x W_encᵀ of one site after the other."""

    def __init__(self, d_in: Mapping[str, int], size: Size, batch: int) -> None:
        self.factors = [(torch.randn(batch, d), torch.randn(size.n_latents, d)) for d in d_in.values()]
        self.number = 0

    def __call__(self) -> None:
        x, w = self.factors[self.number % len(self.factors)]
        self.number += 1
        x @ w.T


def rows(d_in: Mapping[str, int], batch: int) -> Tensor:
    return torch.randn(batch, sum(d_in.values()), generator=torch.Generator().manual_seed(0))


def in_turns(steps: Mapping[str, Callable[[], object]], sites: int, args: argparse.Namespace) -> dict[str, float]:
    """Return median milliseconds; each round does every step once, and both sources are seen equally often."""
    clock, times = CLOCKS[args.clock], {name: [] for name in steps}
    rounds = -(-args.steps // sites) * sites
    for number in range(WARM_UP + rounds):
        for name, step in steps.items():
            started = clock()
            step()
            if number >= WARM_UP:
                times[name].append(1e3 * (clock() - started))
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


def ratios(ms: Mapping[str, float], pairs: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    return {name: round(ms[a] / ms[b], 2) for name, (a, b) in pairs.items() if a in ms and b in ms}


def at_size(size: Size, args: argparse.Namespace) -> dict[str, object]:
    ours = Ours(D_IN, size, args.batch)
    steps: dict[str, Callable[[], object]] = {
        "encoder": EncoderProduct(D_IN, size, args.batch),
        "ours_fb": Ours(D_IN, size, args.batch).forward_backward,
        "ours": ours,
        "ours_bf16": Ours(D_IN, size, args.batch, "bf16"),
        "dense": Dense(D_IN, size, args.batch),
    }
    if "published" not in args.skip:
        steps["published"] = Published(D_IN, size, args.batch)
    ms = in_turns(steps, len(D_IN), args)
    kernels = {name: step.usae.kernel for name, step in steps.items() if isinstance(step, Ours)}
    wanted = {
        "dense_over_ours": ("dense", "ours"),
        "ours_over_bf16": ("ours", "ours_bf16"),
        "published_over_ours": ("published", "ours"),
        "ours_over_encoder": ("ours", "encoder"),
        "ours_fb_over_encoder": ("ours_fb", "encoder"),
    }
    return {
        "n_latents": size.n_latents,
        "k": size.k,
        "ms": ms,
        "ratios": ratios(ms, wanted),
        "kernels": {name: f"{k.name} {getattr(k, 'precision', '')}: {k.reason}" for name, k in kernels.items()},
        "profile_ms": profiled(ours) if args.profile else None,
    }


def profiled(step: Callable[[], object], repeats: int = 4) -> dict[str, float]:
    """Return the operations that take most of a step, milliseconds each (of all threads' wall time)."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            step()
    averages = sorted(found.key_averages(), key=lambda a: -a.self_cpu_time_total)
    return {a.key: round(a.self_cpu_time_total / repeats / 1e3, 2) for a in averages[:16]}


def many_sites(size: Size, args: argparse.Namespace) -> dict[str, object]:
    """M = 12 against M = 2 sites of 768 dimensions."""
    few, many = ({f"m{i}/layer": 768 for i in range(m)} for m in (2, 12))
    ms: dict[str, float] = {}
    for label, phase in (("", "main"), (" aligned", "align")):
        steps = {f"{len(d)}{label}": Ours(d, size, args.batch, phase=phase) for d in (few, many)}
        ms |= in_turns(steps, 2, args)
    wanted = {"12_over_2": ("12", "2"), "12_over_2_aligned": ("12 aligned", "2 aligned")}
    return {"d": 768, **size._asdict(), "ms": ms, "ratios": ratios(ms, wanted)}


def peak(phase: Phase) -> dict[str, object]:
    """Resident memory that three steps add, against what has to be there."""

    size, batch, d_in = Size(65_536, 64), 4096, {"a/layer": 768, "b/layer": 768}
    torch.ones(64, 64) @ torch.ones(64, 64)  # libraries are loaded before
    before = peak_memory()
    step = Ours(d_in, size, batch, phase=phase)
    for _ in range(3):
        step()
    parameters = sum(p.numel() * p.itemsize for p in step.usae.parameters())
    product = 4 * batch * size.n_latents
    needed = 4 * parameters + product  # parameters, gradients, two moments
    added = peak_memory() - before
    return {
        "phase": phase,
        **size._asdict(),
        "batch": batch,
        "needed_gib": round(needed / GIB, 2),
        "peak_gib": round(added / GIB, 2),
        "peak_over_needed": round(added / needed, 2),
        "bound": 1.5,
    }


def in_own_process(phase: Phase) -> dict[str, object]:
    done = subprocess.run([sys.executable, __file__, "--only-peak", phase], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument(
        "--sizes", nargs="*", type=Size.parse, default=[Size(8168, 32), Size(2042, 64), Size(65_536, 64)]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help="published, sites, peak")
    parser.add_argument("--profile", action="store_true", help="say where the time of a step goes")
    parser.add_argument("--only-peak", choices=("main", "align"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only_peak:
        print(json.dumps(peak(args.only_peak)))
        return
    about = {"benchmark": "step", "threads": args.threads, "clock": args.clock, "torch": torch.__version__}
    found: dict[str, object] = {**about, "batch": args.batch, "d_in": list(D_IN.values()), "load": os.getloadavg()}
    found["results"] = [at_size(size, args) for size in args.sizes]
    if "sites" not in args.skip:
        found["sites"] = many_sites(Size(8168, 32), args)
    if "peak" not in args.skip:
        found["peak"] = [in_own_process(phase) for phase in ("main", "align")]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
