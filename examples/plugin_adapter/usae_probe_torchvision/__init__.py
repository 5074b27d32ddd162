"""Adapter `torchvision`: torchvision's classification models, by name or live."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from usae_probe.adapter import LoadedModel, ModelSpec, Preprocessing
from usae_probe.errors import AdapterError, CheckpointError, UsageError, nearest

NAMES: list[str] = models.list_models(module=models)  # without those for detection, segmentation and video


class TorchvisionAdapter:
    """Build models by `torchvision.models.get_model`, and recognise live ones."""

    def load(self, spec: ModelSpec) -> LoadedModel:
        """Build the model: with torchvision's default weights, those of a local checkpoint, or untrained.

        Raises:
            UsageError: for a model that torchvision does not have, or options that the model does not take.
            AdapterError: when the weights cannot be fetched, or building fails.
            CheckpointError: when local weights do not fit.
        """
        name, options = spec.name, dict(spec.options)
        if name not in NAMES:
            raise UsageError(f"torchvision has no classification model '{name}'", hint=nearest(name, NAMES))
        weights = models.get_model_weights(name).DEFAULT
        try:
            module = models.get_model(name, weights=weights if spec.pretrained else None, **options)
        except (TypeError, ValueError, AssertionError) as error:  # what torchvision raises for options
            raise UsageError(f"torchvision model '{name}' does not take options {options}: {error}") from error
        except Exception as error:
            hint = "without network give checkpoint = 'weights.pth', or pretrained = false" if spec.pretrained else ""
            raise AdapterError(f"torchvision could not build '{name}' with {options}: {error}", hint=hint) from error
        if spec.checkpoint is not None:
            _load_weights(module, spec.checkpoint, name)
        # Weights of another origin most likely want their pictures as torchvision's do; who knows better says so.
        return LoadedModel(module.eval(), _preprocessing(weights))

    def adopt(self, module: nn.Module) -> LoadedModel | None:
        """Recognise a live model whose preprocessing is beyond doubt; None for any other."""
        family = [name for name in NAMES if models.get_model_builder(name).__module__ == type(module).__module__]
        weights = [each for name in family for each in models.get_model_weights(name)]
        known = {_preprocessing(each) for each in weights}
        # A live model does not say which weights it carries, and its class does not say which model it is: a resnet18
        # and a resnet50 are both a ResNet. How it wants its pictures is known only where all weights of the family
        # agree (alexnet, densenet), and its outputs are as many as theirs: with other classes it was trained by the
        # user. Any guess beyond that would be silently wrong; given None, usae-probe asks the user.
        n_outputs = {parameter.shape[0] for parameter in [*module.parameters()][-1:]}
        if len(known) != 1 or n_outputs != {len(weights[0].meta["categories"])}:
            return None
        return LoadedModel(module, known.pop())


def _preprocessing(weights: models.WeightsEnum) -> Preprocessing:
    done = weights.transforms()
    (crop,), (resize,) = done.crop_size, done.resize_size
    mean, std, interpolation = tuple(done.mean), tuple(done.std), done.interpolation.value
    return Preprocessing((crop, crop), mean, std, interpolation=interpolation, crop_pct=crop / resize)


def _load_weights(module: nn.Module, path: Path, name: str) -> None:
    try:
        safe = path.suffix == ".safetensors"
        module.load_state_dict(load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = shorten(str(error), 240)  # torch lists what does not fit, a line each
        raise CheckpointError(
            f"checkpoint '{path}' cannot be loaded into '{name}': {reason}",
            hint="expected the model's state dict as .safetensors or .pth; check the model's name and options",
        ) from error
