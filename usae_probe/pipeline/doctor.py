"""Does it work here, and how fast? Versions, devices, adapters, kernels, hooks, disk, and a few seconds of work."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..adapter import all_entries
from ..attaching import attach, check_device
from ..config import TrainConfig, UsaeConfig
from ..errors import AdapterError, UsaeProbeError
from ..machine import PACKAGES, installed_memory, versions
from ..usae.kernels import KERNELS, check_kernel
from .timing import step_seconds

_LIBRARIES = ("transformers", "transformer-lens", "datasets", "safetensors", "pydantic", "typer", "rich")
_MODEL, _BATCH, _SIDE = "resnet18", 8, 224
_WIDTHS, _LATENTS, _K = (512, 768), 2042, 64
_STEPS, _ROUNDS = 5, 3
_WRITTEN = 64 * 2**20
_LITTLE_DISK, _LITTLE_MEMORY = 5 * 10**9, 4 * 10**9


def diagnose(
    folder: Path, *, device: str = "auto", benchmark: bool = True, announce: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Look at everything that a run needs, and return what was found; `problems` is what will not work.

    Args:
        folder: where runs would be written.
        device: where models and training would be, as `[models] device`.
        benchmark: time training steps and forward passes (about five seconds).
        announce: called with what is looked at next.

    Raises:
        UsageError: for a device that this machine does not have.
    """
    say = announce or (lambda _: None)
    check_device(device)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    problems: list[dict[str, str]] = []
    say("adapters")
    adapters = _adapters(problems)
    say("kernels")
    kernels = _kernels(place, problems)
    say("disk")
    found: dict[str, Any] = {
        "versions": versions((*PACKAGES, *_LIBRARIES)),
        "machine": _machine(problems),
        "devices": _devices(),
        "adapters": adapters,
        "kernels": kernels,
        "disk": _disk(folder, problems),
        "hub": _hub(),
    }
    say("hooks")
    found["hooks"], rate = _hooks(place, problems, _ROUNDS if benchmark else 1)
    if benchmark:
        say("training steps")
        found["benchmark"] = {"device": str(place), "images_per_second": rate, **_steps(str(place))}
    return found | {"problems": problems}


def _machine(problems: list[dict[str, str]]) -> dict[str, Any]:
    memory = installed_memory()
    if memory is not None and memory < _LITTLE_MEMORY:
        problems.append(
            _problem(f"{memory / 1e9:.1f} GB of memory", "smaller models and batches: images.batch_size = 8")
        )
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "cpu", "what": platform.processor() or platform.machine()}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append({"name": f"cuda:{index}", "what": about.name, "memory_bytes": about.total_memory})
    return found


def _adapters(problems: list[dict[str, str]]) -> list[dict[str, str]]:
    rows = []
    for entry in all_entries():
        state = "ok"
        try:
            entry.load()
        except AdapterError as error:
            state, hint = error.message, error.hint
            if "torchvision::nms" in state:
                hint = "torch and torchvision do not fit each other: pip install --upgrade torch torchvision"
            problems.append(_problem(state, hint))
        rows.append({"name": entry.name, "from": f"{entry.distribution} {entry.version}", "state": state})
    return rows


def _kernels(device: torch.device, problems: list[dict[str, str]]) -> list[dict[str, Any]]:
    checks = [check_kernel(name, place) for name in KERNELS for place in {torch.device("cpu"), device}]
    for check in checks:
        if check.wrong:
            what = check.problem or f"off by {check.error:.1e}"
            hint = "train with [train] kernel = 'reference', and report this with the output of doctor --json"
            problems.append(_problem(f"kernel {check.kernel} on {check.device}: {what}", hint))
    return [check._asdict() for check in checks]


def _hooks(device: torch.device, problems: list[dict[str, str]], rounds: int) -> tuple[dict[str, Any], float | None]:
    """Capture a layer as plain hooks see it, and time forward passes with hooks, the first aside."""
    about = {"model": f"timm:{_MODEL}", "layer": "layer4"}
    try:
        with attach(f"timm:{_MODEL}", pretrained=False, image_size=_SIDE, device=str(device)) as hooked:
            batch = torch.rand(_BATCH, 3, _SIDE, _SIDE, device=device)
            seen: list[torch.Tensor] = []
            handle = hooked.module.get_submodule("layer4").register_forward_hook(lambda _, __, out: seen.append(out))
            with torch.no_grad():
                hooked.module(batch)
            handle.remove()
            equal = bool(torch.allclose(hooked.capture(batch, ["layer4"])["layer4"], seen[0], rtol=1e-4, atol=1e-5))
            began = time.perf_counter()
            for _ in range(rounds):
                hooked.capture(batch, ["layer4"])["layer4"].sum().item()
            rate = rounds * _BATCH / (time.perf_counter() - began)
    except (UsaeProbeError, RuntimeError) as error:
        problems.append(_problem(f"hooks on {_MODEL}: {error}", "is nnsight installed in a version that fits torch?"))
        return about | {"equal": False}, None
    if not equal:
        hint = "report this with the output of doctor --json"
        problems.append(_problem(f"hooks on {_MODEL} capture other numbers than a plain forward hook", hint))
    return about | {"equal": equal}, rate


def _steps(device: str) -> dict[str, Any]:
    """Time training steps with the kernel that `auto` picks, and with the dense one."""
    usae = UsaeConfig(n_latents=_LATENTS, k=_K)
    seconds = {
        kernel: step_seconds(usae, TrainConfig(kernel=kernel, device=device), _WIDTHS, steps=_STEPS)
        for kernel in ("auto", "reference")
    }
    return {
        "sites": list(_WIDTHS),
        "n_latents": _LATENTS,
        "k": _K,
        "batch_size": TrainConfig().batch_size,
        "step_seconds": seconds["auto"],
        "dense_step_seconds": seconds["reference"],
    }


def _disk(folder: Path, problems: list[dict[str, str]]) -> dict[str, Any]:
    """Look at the disk of a folder, or of the nearest one above it that there is, and write to it for a moment."""
    there = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.is_dir())
    about: dict[str, Any] = {"folder": str(there), "free_bytes": shutil.disk_usage(there).free}
    trial = there / f".usae-probe-doctor-{os.getpid()}"
    try:
        began = time.perf_counter()
        with trial.open("wb") as file:
            file.write(os.urandom(_WRITTEN // 8) * 8)
            file.flush()
            os.fsync(file.fileno())
        about["write_bytes_per_second"] = _WRITTEN / (time.perf_counter() - began)
    except OSError as error:
        problems.append(
            _problem(f"cannot write to {there}: {error.strerror}", "give --out a folder that you may write to")
        )
    finally:
        trial.unlink(missing_ok=True)
    if about["free_bytes"] < _LITTLE_DISK:
        hint = "use [buffer] mode = 'ring' with a capacity, or another disk for --out"
        problems.append(_problem(f"{about['free_bytes'] / 1e9:.1f} GB free in {there}", hint))
    return about


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants

    return {"HF_HOME": constants.HF_HOME, "offline": constants.HF_HUB_OFFLINE, "torch": torch.hub.get_dir()}


def _problem(what: str, hint: str) -> dict[str, str]:
    return {"problem": what, "hint": hint}
