"""Harvest: one pass over the images, one forward pass per model, any number of sites, into a buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .buffer import ActivationBuffer, BufferSpec, BufferWriter, OpenShard, SiteSpec
from .config import BufferConfig, ImagesConfig, settled
from .errors import ImageError, SiteError
from .hooks import HookedModel
from .images import ImageSource, LoadedImages, OpaqueTransform, iter_batches, open_source
from .split import draw_split


class HarvestProgress(NamedTuple):
    """How far a harvest is: images done (skipped ones too) of all, and how many were skipped in this call."""

    done: int
    total: int
    skipped: int


def harvest(
    models: Sequence[HookedModel],
    images: Any,
    out: str | Path,
    *,
    images_config: ImagesConfig | None = None,
    buffer_config: BufferConfig | None = None,
    progress: Callable[[HarvestProgress], None] | None = None,
    **settings: Any,
) -> ActivationBuffer:
    """Stream the activations of all sites of all models into a buffer; goes on where an interrupted harvest stopped.

    Args:
        models: hooked models with layers, with different names.
        images: a folder, an .npz/.npy file, an array, a torch map-style `Dataset`, or an `ImageSource`.
        out: the buffer's folder.
        images_config, buffer_config: settings as read from a config file (`source` is ignored here).
        progress: called after every batch.
        settings: or single settings by the config's names: `limit`, `holdout`, `seed`, `batch_size`, `dtype`, …

    Raises:
        SiteError: when a model has no sites, or two models share a name.
        ImageError: when the images cannot be opened, or none of them decoded.
        BufferMismatchError: when `out` holds a buffer made from something else.
        NonFiniteError, PrecisionError: for activations that cannot be stored, naming site, layer and image.

    Example:
        `buffer = up.harvest([resnet, vit], "photos/", out="acts")`
    """
    given = (images_config or ImagesConfig(source=""), buffer_config or BufferConfig())
    how, store = settled(given, settings)
    source = images if isinstance(images, ImageSource) else open_source(images)
    spec = buffer_spec(models, source, how, store)
    writer = BufferWriter(out, spec, describe=source.describe)
    skipped = 0
    for plan in writer.pending():
        with writer.shard(plan) as shard:
            for batch in iter_batches(source, plan.images, how.batch_size, workers=how.workers):
                skipped += len(batch.skipped)
                _append(shard, models, batch)
                if progress:
                    progress(HarvestProgress(writer.images_done, writer.n_images, skipped))
    buffer = writer.close()
    if not buffer.n_rows("train"):
        raise ImageError(
            f"none of the {len(spec.split.train)} training images of {source.location} could be decoded",
            hint=f"first failure: {buffer.skipped[0].reason}" if buffer.skipped else "",
        )
    return buffer


def buffer_spec(
    models: Sequence[HookedModel], source: ImageSource, how: ImagesConfig, store: BufferConfig
) -> BufferSpec:
    """Say what the buffer of these models and images holds.

    Raises:
        SiteError: when a model has no sites, or two models share a name.
    """
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            raise SiteError(f"two models are called '{model.name}'", hint="give attach() different names")
        if not model.sites:
            raise SiteError(f"model '{model.name}' has no sites", hint="attach it with layers=[…]")
    sites = tuple(
        SiteSpec(
            site=str(site),
            model=model.name,
            layer=site.layer,
            policy=site.policy,
            d_in=model.d_in(site),
            grid=model.grid(site),
            weights_hash=model.weights_hash,
            preprocessing=_describe_preprocessing(model),
        )
        for model in models
        for site in model.sites
    )
    return BufferSpec(
        sites=sites,
        source={
            "kind": source.kind,
            "location": source.location,
            "fingerprint": source.fingerprint(),
            "n_images": len(source),
        },
        split=draw_split(len(source), limit=how.limit, holdout=how.holdout, validation=how.validation, seed=how.seed),
        split_request=how.model_dump(include={"limit", "holdout", "validation", "seed"}),
        dtype=store.dtype,
        shard_images=store.shard_images,
        batch_size=how.batch_size,
    )


def _append(shard: OpenShard, models: Sequence[HookedModel], batch: LoadedImages) -> None:
    for miss in batch.skipped:
        shard.skip(miss.index, miss.name, miss.reason)
    if not batch.pictures:
        return
    rows: dict[str, np.ndarray] = {}
    for model in models:
        with torch.no_grad():
            inputs = model.preprocess(batch.pictures)
        captured = model.rows(inputs)
        rows |= {site: values.to(device="cpu", dtype=torch.float32).numpy() for site, values in captured.items()}
    shard.append(batch.indices, rows)


def _describe_preprocessing(model: HookedModel) -> dict[str, Any]:
    describe = getattr(model.preprocess, "to_dict", None)
    return dict(describe()) if describe else OpaqueTransform(model.preprocess).to_dict()
