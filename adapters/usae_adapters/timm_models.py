"""Adapter `timm`: any model of timm, by name or live, with timm's own preprocessing."""

from __future__ import annotations

import timm
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn

from usae_probe.adapter import LoadedModel, ModelSpec, Preprocessing
from usae_probe.errors import AdapterError, UsageError, first_line, nearest

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
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise AdapterError(
            f"timm could not load the pretrained weights of '{spec.name}': {reason}",
            hint=f"{_how_to_fetch(spec.name)}; or give checkpoint = 'weights.safetensors', or pretrained = false",
        ) from error
    return module


def _how_to_fetch(name: str) -> str:
    """Say what to download where, for a machine without network."""
    from huggingface_hub.constants import HF_HOME

    source, colon, repository = name.partition(":")
    known = None if colon else get_pretrained_cfg(name)
    if not colon:
        repository = (known and known.hf_hub_id) or ""
    elif source not in ("hf-hub", "hf_hub"):
        return f"timm looks for it in {repository}"
    if repository:
        return f"with network: hf download {repository}, then copy that machine's HF_HOME here ({HF_HOME})"
    url = known and known.url
    return f"with network: download {url}, and name the file as checkpoint" if url else "timm knows no weights of it"


def _described(module: nn.Module) -> LoadedModel:
    data = resolve_model_data_config(module)
    return LoadedModel(
        module,
        Preprocessing(
            image_size=_built_size(module) or tuple(data["input_size"][1:]),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"] if data["interpolation"] in ("nearest", "bilinear") else "bicubic",
            crop_pct=float(data["crop_pct"]),
            crop_mode="squash" if data.get("crop_mode") == "squash" else "center",
        ),
    )


def _built_size(module: nn.Module) -> tuple[int, int] | None:
    """Return the picture size that a model was built for (`img_size=`), where it says so."""
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) and len(size) == 2 else None
