"""Adapter `timm`: any model of timm, by name or live, with timm's own preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import timm
from timm.data import resolve_model_data_config
from timm.models import is_model, list_models
from torch import nn

from usae_probe.adapter import LoadedModel, ModelSpec, Preprocessing
from usae_probe.errors import AdapterError, UsageError, nearest
from usae_probe.hooks import Layout, default_layout

from .weights import load_checkpoint


class TimmAdapter:
    """Build models by `timm.create_model`, and recognise live ones."""

    def load(self, spec: ModelSpec) -> LoadedModel:
        """Build the model: from timm's hub weights, a local checkpoint, or untrained.

        Raises:
            UsageError: for a model timm does not have, or an option the model does not take.
            AdapterError: when the weights cannot be fetched.
            CheckpointError: when local weights do not fit.
        """
        name = spec.name.split(".")[0]
        if ":" not in name and not is_model(name):
            raise UsageError(f"timm has no model '{name}'", hint=nearest(name, list_models()))
        module = _create(spec)
        if spec.checkpoint is not None:
            load_checkpoint(module, spec.checkpoint, model=spec.name)
        return _described(module)

    def adopt(self, module: nn.Module) -> LoadedModel | None:
        """Recognise timm's models by the pretrained config they carry."""
        return _described(module) if hasattr(module, "pretrained_cfg") and hasattr(module, "num_features") else None


def _create(spec: ModelSpec) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(spec.name, pretrained=spec.pretrained, **spec.options)
    except TypeError as error:
        raise UsageError(f"timm model '{spec.name}' does not take options {dict(spec.options)}: {error}") from error
    except Exception as error:
        if not spec.pretrained or "Invalid pretrained tag" in str(error):
            raise UsageError(f"timm cannot build '{spec.name}' with options {dict(spec.options)}: {error}") from error
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise AdapterError(
            f"timm could not load the pretrained weights of '{spec.name}': {reason}",
            hint="without network give checkpoint = 'weights.safetensors', or pretrained = false",
        ) from error
    return module


def _described(module: nn.Module) -> LoadedModel:
    data = resolve_model_data_config(module)
    _, height, width = data["input_size"]
    return LoadedModel(
        module,
        Preprocessing(
            image_size=(height, width),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"] if data["interpolation"] in ("nearest", "bilinear") else "bicubic",
            crop_pct=float(data["crop_pct"]),
            crop_mode="squash" if data.get("crop_mode") == "squash" else "center",
        ),
        timm_layouts,
    )


def timm_layouts(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout | None]:
    """Say what the outputs of a timm model's layers mean.

    Prefix tokens are a fact of the layer: a layer has the model's prefix tokens if its output is longer than the
    patch embedding's by just that number, and consists of them alone if it is that long; otherwise it is unknown.
    Where patches are a flat list, what has three axes behind it is no map but heads of attention.
    """
    parts = dict(module.named_modules())
    prefix, patches = int(getattr(module, "num_prefix_tokens", 0) or 0), _patches(shapes)
    has_cls = bool(getattr(module, "has_class_token", prefix > 0))
    flat = len(shapes.get("patch_embed", ())) == 2
    layouts: dict[str, Layout | None] = {}
    for name, shape in shapes.items():
        if flat and len(shape) == 3 and not name.startswith("patch_embed."):
            layouts[name] = None
            continue
        layout = default_layout(parts[name], shape, maps_are=_map_format(parts[name], module))
        if layout is not None and layout.kind == "tokens" and patches is not None:
            layout = _tokens(shape[0], prefix, patches, has_cls)
        if layout is not None:
            layouts[name] = layout
    return layouts


def _map_format(part: nn.Module, model: nn.Module) -> Literal["nchw", "nhwc"]:
    declared = getattr(part, "output_fmt", None) or getattr(model, "output_fmt", "NCHW")
    return "nhwc" if str(declared).endswith("NHWC") else "nchw"


def _tokens(length: int, prefix: int, patches: int, has_cls: bool) -> Layout:
    if length == patches:
        return Layout("tokens", prefix=0)
    if prefix and length == patches + prefix:
        return Layout("tokens", prefix=prefix, has_cls=has_cls)
    if prefix and length == prefix:
        return Layout("tokens", prefix=prefix, has_cls=has_cls)
    return Layout("tokens")


def _patches(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Count the patches the model embeds: its `patch_embed` gives [N,D], [H,W,D] or (with a norm behind) [D,H,W]."""
    shape: Any = shapes.get("patch_embed")
    if shape is None:
        return None
    if len(shape) == 2:
        return int(shape[0])
    projected = shapes.get("patch_embed.proj", shape)
    return int(projected[1] * projected[2]) if len(projected) == 3 else None
