"""The adapter contract and the way adapters are found: entry points in the group `usae_probe.adapters`.

An adapter is a class with a no-argument constructor that follows `Adapter`. A distribution offers it with

    [project.entry-points."usae_probe.adapters"]
    my-hub = "my_package:MyAdapter"

and a config then says `adapter = "my-hub"`. An adapter imports this module, `usae_probe.hooks`, `usae_probe.shapes`
and `usae_probe.errors`, nothing else of `usae_probe`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import nn

from .errors import AdapterError, ConfigError, UnknownAdapterError, UsaeProbeWarning, UsageError, nearest
from .hooks import HookedModel, LayoutRule
from .images import OpaqueTransform, Preprocessing

GROUP = "usae_probe.adapters"

__all__ = [
    "Adapter",
    "AdapterEntry",
    "LoadedModel",
    "ModelSpec",
    "Preprocessing",
    "attach",
    "installed_adapters",
    "load_adapter",
]


@dataclass(frozen=True)
class ModelSpec:
    """What an adapter is asked to build.

    Attributes:
        name: the adapter's own name for the model.
        pretrained: whether to load the adapter's own weights.
        checkpoint: local weights to load instead.
        options: keyword arguments for the adapter's factory.
        base: folder that relative paths in `name` start from.
    """

    name: str
    pretrained: bool = True
    checkpoint: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    base: Path = field(default_factory=Path.cwd)


class LoadedModel(NamedTuple):
    """What an adapter gives back.

    Attributes:
        module: the live model.
        preprocessing: how pictures become its input; None when the adapter cannot know.
        layout_rule: layouts the adapter is sure of; None for the rule that goes by module type and rank.
    """

    module: nn.Module
    preprocessing: Preprocessing | None = None
    layout_rule: LayoutRule | None = None


@runtime_checkable
class Adapter(Protocol):
    """Builds live models from names, and recognises live models of its library."""

    def load(self, spec: ModelSpec) -> LoadedModel:
        """Build the model that `spec` names, in eval mode.

        Raises:
            UsageError: when the name or an option is wrong.
            AdapterError: when the model cannot be built.
            CheckpointError: when weights do not fit.
        """
        ...

    def adopt(self, module: nn.Module) -> LoadedModel | None:
        """Add what the adapter knows to a live model of its library; None for any other model."""
        ...


class AdapterEntry(NamedTuple):
    """An installed adapter: its name, where it is and which distribution brought it."""

    name: str
    target: str
    distribution: str
    version: str
    entry: EntryPoint


def installed_adapters() -> dict[str, AdapterEntry]:
    """Find all installed adapters by name, without importing them."""
    found: dict[str, AdapterEntry] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        dist = entry.dist
        found[entry.name] = AdapterEntry(
            entry.name, entry.value, dist.name if dist else "?", dist.version if dist else "?", entry
        )
    return found


def load_adapter(name: str) -> Adapter:
    """Import one adapter by name.

    Raises:
        UnknownAdapterError: when no installed adapter has that name.
        AdapterError: when it cannot be imported.
    """
    found = installed_adapters()
    if name not in found:
        listed = f"installed: {', '.join(found) or 'none'}"
        raise UnknownAdapterError(f"no adapter '{name}' is installed", hint=f"{nearest(name, found)} {listed}".strip())
    try:
        return cast(Adapter, found[name].entry.load()())
    except Exception as error:
        entry = found[name]
        raise AdapterError(
            f"adapter '{name}' ({entry.target}, {entry.distribution} {entry.version}) cannot be imported: {error}",
            hint="repair or uninstall that distribution; other adapters are not affected",
        ) from error


def attach(
    target: str | nn.Module,
    *,
    layers: Sequence[str] = (),
    name: str | None = None,
    adapter: str | None = None,
    transform: Callable[[Any], torch.Tensor] | None = None,
    pretrained: bool = True,
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
) -> HookedModel:
    """Attach to a model: one named by `adapter:name`, or any live `nn.Module`.

    Args:
        target: `timm:resnet18.a1_in1k`, `module:file.py:factory`, or a live module (used as it is, where it is).
        layers: layer names or globs with site suffixes; they become the hooked model's sites.
        name: the model's name in sites; default: from the target.
        adapter: the adapter's name, when `target` is the bare model name.
        transform: a live model's own preprocessing, PIL image to tensor [3,h,w]; used instead of ours.
        pretrained, checkpoint, options: see `ModelSpec`; for named models only.
        image_size, mean, std, interpolation, crop_pct: preprocessing; default: the model's own, as the adapter knows.
        device: `auto` is CUDA if there is one; default: `auto` for named models, where it is for live ones.
        dtype: dtype of the forward pass; default: float32 for named models, as it is for live ones.
        base: folder of relative paths.

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
    if isinstance(target, nn.Module):
        if adapter is not None or checkpoint is not None or options:
            raise UsageError(
                "adapter, checkpoint and options are for models given by name, but a live module was given",
                hint="load weights into the module before attaching to it",
            )
        loaded = _adopt(target)
        name = name or type(target).__name__.lower()
        placed = _placed(target, device, dtype)
    else:
        which, bare = (adapter, target) if adapter else _split_spec(target)
        path = None if checkpoint is None else (base or Path.cwd()) / Path(checkpoint).expanduser()
        spec = ModelSpec(bare, pretrained and path is None, path, dict(options or {}), base or Path.cwd())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # untrained networks are the same each time, so that a run can be resumed
            loaded = load_adapter(which).load(spec)
        name = name or _default_name(bare)
        placed = _placed(loaded.module.eval(), device or "auto", dtype or "float32")
    preprocess: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    if transform is not None:
        preprocess = OpaqueTransform(transform)
    else:
        given: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std}
        given |= {"interpolation": interpolation, "crop_pct": crop_pct}
        preprocess = _preprocessing(name, loaded.preprocessing, {k: v for k, v in given.items() if v is not None})
    return HookedModel(placed, name=name, layers=layers, preprocess=preprocess, layout_rule=loaded.layout_rule)


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
    for name in installed_adapters():
        try:
            loaded = load_adapter(name).adopt(module)
        except AdapterError:
            continue  # a broken plug-in must not stand between a user and a live model
        except Exception as error:
            text = f"adapter '{name}' failed on {type(module).__name__} and is left out: {error!r}"
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
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(f"device '{device}' cannot be used: {reason}", hint="auto, cpu, cuda or cuda:1") from error


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
