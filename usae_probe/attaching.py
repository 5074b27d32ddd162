"""Attach: from a model's name or a live module to a `HookedModel`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .adapter import LoadedModel, ModelSpec, all_entries, load_adapter
from .errors import AdapterError, ConfigError, UsaeProbeWarning, UsageError, first_line
from .hooks import HookedModel, LayerName, Layout
from .images import OpaqueTransform, Preprocessing

_WRAPPERS = {  # by name: importing the last two costs more than it is worth
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "module",
}


def attach(
    target: str | nn.Module,
    *,
    layers: Iterable[LayerName] = (),
    name: str | None = None,
    adapter: str | None = None,
    layout: Mapping[str, Layout | str] | None = None,
    transform: Callable[[Any], torch.Tensor] | None = None,
    preprocess: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None,
    forward_args: Callable[[torch.Tensor], Any] | None = None,
    pretrained: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    device: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    base: Path | None = None,
    where: str = "",
) -> HookedModel:
    """Attach to a model: one named by `adapter:name`, or any live `nn.Module`.

    Args:
        target: `timm:resnet18.a1_in1k`, `module:file.py:factory`, or a live module (used as it is, where it is; what
            `torch.compile` or `DataParallel` wrapped is unwrapped, with a warning that says so).
        layers: layer names or globs with site suffixes, or submodules; they become the hooked model's sites.
        name: the model's name in sites; default: from the target.
        adapter: the adapter's name, when `target` is the bare model name.
        layout: what the axes of layers mean, by name or glob, where the model is not understood or misunderstood:
            `{"blocks.*": "cls+4+tokens"}`; see `Layout.parse`.
        transform: a live model's own preprocessing, PIL image to tensor [3,h,w]; used instead of ours.
        preprocess: or a function of a whole batch, list of pictures (uint8 [3,h,w]) to model input [b,3,h,w].
        forward_args: from a batch of model input to what the model is called with: a dict of keyword arguments, a
            tuple of positional ones, or one argument; default: the batch.
        pretrained, checkpoint, options: see `ModelSpec`; for named models only.
        seed: of weights that are drawn at random (`pretrained=False`); for named models only: a live module has its
            weights, and `usae_probe.untrained.reinitialise` draws them anew.
        image_size, mean, std, interpolation, crop_pct: preprocessing; default: the model's own, as the adapter knows.
        device: `auto` is CUDA if there is one; default: `auto` for named models, where it is for live ones.
        dtype: dtype of the forward pass; default: float32 for named models, as it is for live ones.
        base: folder of relative paths.
        where: what lists the model's layers, for error messages; default: the command that does.

    Raises:
        UsageError: for an unknown adapter, model, option or layer, or preprocessing that is not given.
        AdapterError, CheckpointError: when the model cannot be built.

    Example:
        >>> import timm
        >>> live = timm.create_model("resnet10t", pretrained=False)
        >>> with attach(live, name="tiny", layers=["layer4"], image_size=32) as hooked:
        ...     print(hooked.sites[0], hooked.d_in(hooked.sites[0]))
        tiny/layer4 512
    """
    if transform is not None and preprocess is not None:
        raise UsageError("transform and preprocess are both given", hint="one of them makes the model's input")
    if isinstance(target, nn.Module):
        if adapter is not None or checkpoint is not None or options or seed:
            raise UsageError(
                "adapter, checkpoint, options and seed are for models given by name, but a live module was given",
                hint="load weights into the module, or draw them, before attaching to it",
            )
        target = _unwrapped(target)
        loaded = _adopt(target)
        name = name or type(target).__name__.lower()
        placed = _placed(target, device, dtype)
    else:
        which, bare = (adapter, target) if adapter else _split_spec(target)
        path = None if checkpoint is None else (base or Path.cwd()) / Path(checkpoint).expanduser()
        spec = ModelSpec(bare, pretrained and path is None, path, dict(options or {}), base or Path.cwd())
        with torch.random.fork_rng(devices=[]):
            # Untrained networks are the same each time, so that a run can be resumed. They are drawn on the CPU:
            # torch.manual_seed would seed the generators of every GPU too, and nothing would put them back.
            torch.default_generator.manual_seed(seed)
            loaded = load_adapter(which).load(spec)
        name = name or _default_name(bare)
        placed = _placed(loaded.module.eval(), device or "auto", dtype or "float32")
        where = where or f"`usae-probe layers {which}:{bare}` lists them"
    if transform is not None:
        preprocess = OpaqueTransform(transform)
    elif preprocess is None:
        given: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std}
        given |= {"interpolation": interpolation, "crop_pct": crop_pct}
        preprocess = _preprocessing(name, loaded.preprocessing, {k: v for k, v in given.items() if v is not None})
    return HookedModel(
        placed,
        name=name,
        layers=layers,
        preprocess=preprocess,
        layout_rule=loaded.layout_rule,
        layout=layout,
        points=loaded.points,
        forward_args=forward_args,
        where=where or "`.layers()` lists them",
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    """Take off what `torch.compile`, `DataParallel` and the like put around a model: hooks do not reach through it."""
    for kind, attribute in _WRAPPERS.items():
        if type(module).__name__ == kind and isinstance(inner := getattr(module, attribute, None), nn.Module):
            text = f"{kind} around {type(inner).__name__} is left aside: its layers are hooked in '.{attribute}'"
            warnings.warn(text, UsaeProbeWarning, stacklevel=3)
            return _unwrapped(inner)
    return module


def _split_spec(text: str) -> tuple[str, str]:
    adapter, colon, name = text.partition(":")
    if not colon or not name:
        raise UsageError(
            f"'{text}' names no model", hint="write adapter:name, e.g. timm:resnet18 or module:my_file.py:build"
        )
    return adapter, name


def _default_name(bare: str) -> str:
    last = re.split(r"[/:]", bare)[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.") or "model"


def _adopt(module: nn.Module) -> LoadedModel:
    """Ask every adapter that can be imported whether it knows the module."""
    for entry in all_entries():
        try:
            adapter = entry.load()
        except AdapterError:
            continue  # a broken plug-in must not stand between a user and a live model
        try:
            loaded = adapter.adopt(module)
        except Exception as error:
            text = f"adapter '{entry.name}' failed on {type(module).__name__} and is left out: {error!r}"
            warnings.warn(text, UsaeProbeWarning, stacklevel=3)
            continue
        if loaded is not None:
            return loaded
    return LoadedModel(module)


def _placed(module: nn.Module, device: str | None, dtype: str | None) -> nn.Module:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None:
        check_device(device)
        module = module.to(torch.device(device))
    return module if dtype is None else module.to(getattr(torch, dtype))


def check_device(device: str) -> None:
    """Check that tensors can be put there; `auto` always can.

    Raises:
        UsageError: for a device that torch does not know, or that this machine does not have.
    """
    try:
        torch.empty(0, device="cpu" if device == "auto" else device)
    except (RuntimeError, AssertionError) as error:
        reason = f"device '{device}' cannot be used: {first_line(error)}"
        raise UsageError(reason, hint="auto, cpu, cuda or cuda:1") from error


def _preprocessing(name: str, known: Preprocessing | None, given: dict[str, Any]) -> Preprocessing:
    size = given.get("image_size")
    if isinstance(size, int):
        given["image_size"] = (size, size)
    if known is not None:
        return replace(known, **given)
    missing = [key for key in ("image_size", "mean", "std") if key not in given]
    if missing:
        raise ConfigError(
            f"the preprocessing of model '{name}' is not known: {', '.join(missing)} missing",
            hint="give image_size, mean and std as the model was trained with (mean = [0, 0, 0], std = [1, 1, 1] for "
            "inputs in [0, 1]), or from Python transform=",
        )
    return Preprocessing(**given)
