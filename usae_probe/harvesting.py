"""Harvest: one pass over the images, one forward pass per model, any number of sites, into a buffer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .buffer import ActivationBuffer, BufferSpec, BufferWriter, OpenShard, Ring, SiteSpec, Skipped, as_json
from .config import BufferConfig, ImagesConfig, settled
from .errors import BufferMismatchError, ConfigError, ImageError, SiteError, UsaeProbeWarning
from .hooks import Grid, HookedModel, coarsest
from .images import ImageSource, LoadedImages, OpaqueTransform, SkippedImage, iter_batches, open_source
from .sites import Site
from .split import draw_split
from .world import World


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
    world: World | None = None,
    **settings: Any,
) -> ActivationBuffer:
    """Stream the activations of all sites of all models into a buffer; goes on where an interrupted harvest stopped.

    Row i of every site comes from the same image. With `@patch` it comes from the same place in it too: the grids of
    all `@patch` sites are resampled to the coarsest, row by row from the upper left; `token_index` is the place. With
    `@all` it is the same token, for layers that have the same tokens. Warns when models see different parts of a
    picture: their places do not coincide then.

    Args:
        models: hooked models with layers, with different names.
        images: a folder, an .npz/.npy file, an array, a torch map-style `Dataset`, or an `ImageSource`.
        out: the buffer's folder.
        images_config, buffer_config: settings as read from a config file (`source` is ignored here).
        progress: called after every batch.
        world: the processes that harvest together, from `up.joined()`, each of which calls this with its own models:
            every one fills its share of the shards, and all get the same buffer. Default: this process alone.
        settings: or single settings by the config's names: `limit`, `holdout`, `seed`, `batch_size`, `dtype`, …

    Raises:
        SiteError: when a model has no sites, two models share a name, or rows of sites do not pair up.
        ImageError: when the images cannot be opened, or none of them decoded.
        BufferMismatchError: when `out` holds a buffer made from something else.
        FolderLockedError: when another process writes to `out`.
        ConfigError: for `mode = "ring"`.
        NonFiniteError, PrecisionError: for activations that cannot be stored, naming site, layer and image.

    Example:
        `buffer = up.harvest([resnet, vit], "photos/", out="acts")`
    """
    given = (images_config or ImagesConfig(source=""), buffer_config or BufferConfig())
    how, store = settled(given, settings)
    if store.mode == "ring":
        raise ConfigError(
            "a ring is used up by a training that goes along with the harvest", hint="call harvest_and_train"
        )
    source = images if isinstance(images, ImageSource) else open_source(images, options=how.options)
    spec = buffer_spec(models, source, how, store)
    world = world or World()
    if not world.main:
        world.meet()  # process 0 makes the buffer, or finds that it is another one
    with BufferWriter(out, spec, describe=source.describe, rank=world.rank, size=world.size) as writer:
        if world.main:
            world.meet()
        fill(writer, models, source, how, progress=progress)
        world.meet()
        if world.main:
            writer.close()
        world.meet()
    buffer = ActivationBuffer(out, verify=store.verify, memory_budget=store.memory)
    demand_training_rows(buffer)
    return buffer


def fill(
    writer: BufferWriter,
    models: Sequence[HookedModel],
    source: ImageSource,
    how: ImagesConfig,
    *,
    progress: Callable[[HarvestProgress], None] | None = None,
    ring: Ring | None = None,
) -> None:
    """Harvest the shards that a writer still lacks.

    Args:
        writer: of a buffer whose spec `buffer_spec` made of these models and this source.
        models: hooked models with layers.
        source: the images.
        how: `batch_size` and `workers`.
        progress: called after every batch.
        ring: whoever uses the shards up meanwhile; it may end the harvest between two batches.
    """
    if writer.spec.sites[0].rows_per_image > 1:
        _warn_of_other_parts(writer.spec.sites)
    grid = _common_grid_of(models)
    skipped = 0
    if how.strict:
        demand_all_decoded([image for shard in writer.manifest.shards for image in shard.skipped])
    for plan in writer.pending():
        if ring and not ring.make_room(plan):
            return
        with suppress(_NoMoreWanted), writer.shard(plan) as shard:
            for batch in iter_batches(source, plan.images, how.batch_size, workers=how.workers):
                if ring and ring.stopped:
                    raise _NoMoreWanted
                if how.strict:
                    demand_all_decoded(batch.skipped)
                skipped += len(batch.skipped)
                _append(shard, models, batch, grid)
                if progress:
                    progress(HarvestProgress(writer.images_done, writer.n_images, skipped))
        if ring:
            ring.sealed()


class _NoMoreWanted(Exception):
    """Leaves a shard that nobody waits for unsealed."""


def demand_training_rows(buffer: ActivationBuffer) -> None:
    """Check that some training image could be decoded.

    Raises:
        ImageError: with the reason of the first that could not.
    """
    if not buffer.n_images("train"):
        planned = sum(entry.n_planned for entry in buffer.shards if entry.split == "train")
        raise ImageError(
            f"none of the {planned} training images of {buffer.source['location']} could be decoded",
            hint=f"first failure: {buffer.skipped[0].reason}" if buffer.skipped else "",
        )


def demand_same_models(models: Iterable[HookedModel], buffer: ActivationBuffer) -> None:
    """Check that models are those that a buffer was made by; sites that it does not have are not looked at.

    Raises:
        BufferMismatchError: with both values of weights or preprocessing.
    """
    for model in models:
        preprocessing = as_json(_describe_preprocessing(model), "the preprocessing")
        now = {"weights_hash": model.weights_hash, "preprocessing": preprocessing}
        for site in filter(buffer.specs.__contains__, map(str, model.sites)):
            spec = buffer.specs[site]
            then = {"weights_hash": spec.weights_hash, "preprocessing": spec.preprocessing}
            differing = [f"{key}: {then[key]} on disk, {now[key]} now" for key in now if then[key] != now[key]]
            if differing:
                raise BufferMismatchError(
                    f"model '{model.name}' is not the one that the buffer {buffer.path} was made by: "
                    f"{'; '.join(differing)}",
                    hint="give the weights and the preprocessing of the harvest, or run all stages again",
                )


def buffer_spec(
    models: Sequence[HookedModel], source: ImageSource, how: ImagesConfig, store: BufferConfig
) -> BufferSpec:
    """Say what the buffer of these models and images holds.

    Raises:
        SiteError: when a model has no sites, two models share a name, or rows of sites do not pair up.
    """
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            raise SiteError(f"two models are called '{model.name}'", hint="give attach() different names")
        if not model.sites:
            raise SiteError(f"model '{model.name}' has no sites", hint="attach it with layers=[…]")
    grid = _common_grid_of(models)
    _check_tokens(models, grid)
    sites = tuple(_site_spec(model, site, grid) for model in models for site in model.sites)
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


def common_grid(sites: Iterable[tuple[HookedModel, Site]]) -> Grid | None:
    """Return the places that `@patch` sites are resampled to: the fewest rows and columns of their grids.

    Returns:
        (rows, columns); None when none of the sites is `@patch`.
    """
    grids = [grid for model, site in sites if site.policy == "patch" and (grid := model.grid(site))]
    return coarsest(grids) if grids else None


def _common_grid_of(models: Sequence[HookedModel]) -> Grid | None:
    return common_grid((model, site) for model in models for site in model.sites)


def _site_spec(model: HookedModel, site: Site, grid: Grid | None) -> SiteSpec:
    return SiteSpec(
        site=str(site),
        model=model.name,
        layer=site.layer,
        policy=site.policy,
        d_in=model.d_in(site),
        grid=grid if site.policy == "patch" else model.grid(site),
        rows_per_image=model.rows_per_image(site, grid),
        weights_hash=model.weights_hash,
        preprocessing=_describe_preprocessing(model),
        layout=model.stated_layout(site),
    )


class _Tokens(NamedTuple):
    """What the rows of one image stand for, at a site with several of them; None where that is not known."""

    rows: int
    prefix: int | None
    has_cls: bool
    grid: Grid | None
    order: tuple[int, ...] | None = None

    @property
    def known(self) -> bool:
        return self.grid is not None or self.prefix == self.rows

    def __str__(self) -> str:
        if not self.known:
            return f"{self.rows} tokens whose places are not known"
        prefix = f"{self.prefix} prefix tokens{' (cls first)' if self.has_cls else ''}" if self.prefix else ""
        places = f"{self.grid[0]}x{self.grid[1]} places" if self.grid else ""
        order = "" if self.order is None else ", not in raster order"
        return " and ".join(filter(None, [prefix, places])) + order


def _check_tokens(models: Sequence[HookedModel], grid: Grid | None) -> None:
    """Check that sites with a row per token have the same tokens, in the same order.

    Raises:
        SiteError: naming the first two sites that differ, and in what.
    """
    several = [(m, s) for m in models for s in m.sites if m.rows_per_image(s, grid) > 1]
    if not any(site.policy == "all" for _, site in several):
        return
    (first_model, first), *others = several
    tokens = _tokens_of(first_model, first, grid)
    for model, site in others:
        found = _tokens_of(model, site, grid)
        # Layers of one model with equally many tokens most likely hold the same ones, known or not.
        if found != tokens or not (tokens.known or model is first_model):
            unknown = not (found.known and tokens.known)
            raise SiteError(
                f"rows of '{first}' and '{site}' are not of the same tokens: {tokens}, and {found}",
                hint="use @patch for both: it leaves prefix tokens out and brings all grids to the coarsest"
                + ("; layout={'…': 'cls+14x14'} says which tokens a layer has" if unknown else ""),
            )


def _tokens_of(model: HookedModel, site: Site, grid: Grid | None) -> _Tokens:
    rows = model.rows_per_image(site, grid)
    if site.policy == "patch":
        return _Tokens(rows, 0, False, grid)
    layout = model.layout(site)
    return _Tokens(rows, layout.prefix, layout.has_cls, layout.grid, layout.order)


def _warn_of_other_parts(sites: Sequence[SiteSpec]) -> None:
    """Warn, once, when models see different parts of a picture: equal places are not the same place in it then."""
    seen = {site.model: site.preprocessing for site in sites}
    own = [model for model, preprocessing in seen.items() if "image_size" not in preprocessing]
    if own:
        alike = all(preprocessing == seen[own[0]] for preprocessing in seen.values())
        found = [] if alike else [f"what the transform of '{model}' keeps is not known" for model in own]
    else:
        parts = {model: _part_seen(preprocessing) for model, preprocessing in seen.items()}
        found = [
            f"{key} is {', '.join(f'{part[key]} for {model!r}' for model, part in parts.items())}"
            for key in parts[sites[0].model]
            if len({part[key] for part in parts.values()}) > 1
        ]
    if found:
        warnings.warn(
            f"rows of one place may not be of the same place in the picture, because models see different parts of it: "
            f"{'; '.join(found)}; give all models one crop_pct, and image_size of one aspect ratio",
            UsaeProbeWarning,
            stacklevel=3,
        )


def _part_seen(preprocessing: dict[str, Any]) -> dict[str, str]:
    """Return what decides which part of a picture a preprocessing keeps."""
    height, width = preprocessing["image_size"]
    return {
        "crop_pct": f"{preprocessing['crop_pct']:g}",
        "crop_mode": preprocessing["crop_mode"],
        "height / width of image_size": f"{height / width:.3g}",
    }


def demand_all_decoded(skipped: Sequence[SkippedImage | Skipped]) -> None:
    """Check that no image was left out, as `images.strict` asks for.

    Raises:
        ImageError: for the first that was.
    """
    if skipped:
        raise ImageError(
            f"images.strict is set, and an image cannot be decoded: {skipped[0].reason}",
            hint="repair or remove it; without strict it is left out, and `usae-probe buffer info` names it",
        )


def _append(shard: OpenShard, models: Sequence[HookedModel], batch: LoadedImages, grid: Grid | None) -> None:
    for miss in batch.skipped:
        shard.skip(miss.index, miss.name, miss.reason)
    if not batch.pictures:
        return
    rows: dict[str, np.ndarray] = {}
    for model in models:
        with torch.no_grad():
            inputs = model.preprocess(batch.pictures)
        captured = model.rows(inputs, grid=grid)
        rows |= {site: values.to(device="cpu", dtype=torch.float32).numpy() for site, values in captured.items()}
    shard.append(batch.indices, rows)


def _describe_preprocessing(model: HookedModel) -> dict[str, Any]:
    describe = getattr(model.preprocess, "to_dict", None)
    return dict(describe()) if describe else OpaqueTransform(model.preprocess).to_dict()
