"""Which layers a scan looks at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ...config import ScanConfig
from ...errors import SiteError, UsageError, nearest
from ...hooks import HookedModel, evenly
from ...sites import Site


def choose_sites(models: Sequence[HookedModel], how: ScanConfig) -> dict[str, tuple[Site, ...]]:
    """Return the sites of each model that a scan looks at, in the order of depth.

    Args:
        models: hooked models; with `depth = 0` their own sites are taken.
        how: `layers`, else `every`, else `depth`.

    Raises:
        UsageError: for a model in which no blocks are found.
        SiteError: for an entry of `layers` of no model, and a model without an entry.
        UnknownLayerError: for layers that a model does not have.
    """
    if how.layers is not None:
        chosen = _by_glob(models, how.layers)
    else:
        chosen = {model.name: _blocks(model, how) for model in models}
    return {model.name: _in_order(model, chosen[model.name]) for model in models}


def depths_of(models: Sequence[HookedModel], sites: Mapping[str, Sequence[Site]]) -> dict[str, float]:
    """Return {site: relative depth} of the chosen sites."""
    return {str(site): round(model.relative_depth(site), 6) for model in models for site in sites[model.name]}


@contextmanager
def looking_at(models: Sequence[HookedModel], sites: Mapping[str, tuple[Site, ...]]) -> Iterator[None]:
    """Give the models these sites for a while."""
    before = {id(model): model.sites for model in models}
    try:
        for model in models:
            model.sites = sites[model.name]
        yield
    finally:
        for model in models:
            model.sites = before[id(model)]


def _blocks(model: HookedModel, how: ScanConfig) -> tuple[Site, ...]:
    if how.every is None and how.depth == 0:
        if not model.sites:
            raise SiteError(f"model '{model.name}' has no sites", hint="attach it with layers=[…], or set scan.depth")
        return model.sites
    blocks = [name for name in model.blocks if model.d_in_by_policy(Site(model.name, name))]
    if not blocks:
        raise UsageError(
            f"no blocks are found in model '{model.name}': no family of like-named parts holds most of its parameters",
            hint=f"name its layers: scan.layers = ['{model.name}/…', …] with globs, or depth = 0 for those of [models]",
        )
    blocks = blocks[::-1][:: how.every][::-1] if how.every is not None else evenly(blocks, how.depth)
    return tuple(_with_policy(model, Site(model.name, name), how) for name in blocks)


def _with_policy(model: HookedModel, site: Site, how: ScanConfig) -> Site:
    """Give a block its token policy; `mean` says nothing new of a layer without a class token."""
    if how.policy == "mean" and not model.layout(site).has_cls:
        return site
    return replace(site, policy=how.policy)


def _by_glob(models: Sequence[HookedModel], globs: Sequence[str]) -> dict[str, tuple[Site, ...]]:
    names = [model.name for model in models]
    of_model: dict[str, list[Site]] = {name: [] for name in names}
    for text in globs:
        site = Site.parse(text)
        if site.model not in of_model:
            raise SiteError(
                f"scan.layers names '{text}', and there is no model '{site.model}'",
                hint=f"{nearest(site.model, names)} models: {', '.join(names)}".strip(),
            )
        of_model[site.model].append(site)
    for name, sites in of_model.items():
        if not sites:
            raise SiteError(f"scan.layers names no layer of model '{name}'", hint=f"add '{name}/…', e.g. '{name}/**'")
    return {model.name: model.expand(of_model[model.name]) for model in models}


def _in_order(model: HookedModel, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Order sites by depth; a layer's own sites stay in the order given."""
    place = {info.name: at for at, info in enumerate(model.layers())}
    aliases = {alias: place[info.name] for info in model.layers() for alias in info.aliases}
    return tuple(sorted(sites, key=lambda site: (place | aliases)[site.layer]))
