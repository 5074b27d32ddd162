"""The models of a run, attached."""

from __future__ import annotations

from contextlib import ExitStack

from ..attaching import attach
from ..config import RunConfig
from ..errors import CheckpointError
from ..hooks import HookedModel
from ..world import World


def attach_all(config: RunConfig, closing: ExitStack, world: World | None = None) -> list[HookedModel]:
    """Attach to all models of a config; they are closed with `closing`. Of several processes each has its device."""
    for name in config.models:  # before any is built, which takes longer
        if (path := config.checkpoint_path(name)) and not path.exists():
            raise CheckpointError(
                f"checkpoint '{path}' of model '{name}' does not exist", hint="give the path of local weights"
            )
    models = []
    for name, entry in config.models.items():
        given = entry.model_dump(exclude={"adapter", "name", "layers"})
        given["device"] = (world or World()).model_device(given["device"])
        model = attach(
            entry.name,
            adapter=entry.adapter,
            name=name,
            layers=entry.layers,
            base=config.base,
            where=config.lists_layers,
            **given,
        )
        models.append(closing.enter_context(model))
    return models
